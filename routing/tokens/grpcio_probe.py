"""Whether the installed grpcio has the private names that both ends of the expert plane are built on."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from cluster.errors import StartupError


def require(needed: Mapping[object, tuple[str, ...]], user: str) -> None:
    """Raise StartupError, which names the version and the fix, if an object of `needed` lacks one of its names. `user`:
    what is built on them, for the message.
    """
    missing = [name for owner, names in needed.items() for name in names if not hasattr(owner, name)]
    if missing:
        raise StartupError(
            f"grpcio {grpc.__version__} has no {', '.join(missing)} in grpc._cython.cygrpc, which {user} is built on: "
            f"install the grpcio that the lock file names"
        )
