"""Sockets that servers listen on."""

from __future__ import annotations

import errno
import os
import socket

from cluster.errors import StartupError

# A name may have addresses that the machine has not, such as ::1 where IPv6 is off.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int, key: str, share_port: bool) -> list[socket.socket]:
    """One socket, bound and not listening yet, for each address of the name `host` that this machine has, all on one
    port (0 takes a free one). `share_port`: other processes of ours listen there too.

    Raises StartupError that names the configuration's `key`.
    """
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        for number, (family, address) in enumerate(addresses, 1):
            try:
                listener = _bound(family, (address[0], port, *address[2:]), share_port, len(addresses) > 1)
            except OSError as error:
                if error.errno not in _NOT_HERE or (number == len(addresses) and not listeners):
                    raise
            else:
                listeners.append(listener)
                port = listener.getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.close()
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        if isinstance(error, socket.gaierror):
            reason = str(error.strerror)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}; see {key}") from error
    return listeners


def _bound(family: int, address: tuple[object, ...], share_port: bool, beside_others: bool) -> socket.socket:
    # With the protocol named, asyncio turns Nagle's algorithm off: without, a token may wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and beside_others:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
