"""Who a request's API key belongs to."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.errors import Unauthenticated
from cluster.keys.api_keys import key_hash
from cluster.keys.file import TenantEntry, load_keys
from cluster.tls.reloading import ReloadedFiles, in_thread
from routing.requests.request import Priority, Tenant

_HOW = "send it as `Authorization: Bearer KEY` (REST) or metadata `authorization: Bearer KEY` (gRPC)"
_ANYBODY = Tenant("anonymous", classes=tuple(Priority), operator=True)


class Tenants:
    """One state of a keys file."""

    def __init__(self, keys: Sequence[tuple[str, Tenant]], anybody: Tenant | None = None) -> None:
        """`keys`: (hash, tenant). `anybody`: whoever comes, if keys are not asked for."""
        self._keys = {text: (text.encode(), tenant) for text, tenant in keys}
        self._anybody = anybody

    @classmethod
    def load(cls, path: Path) -> Tenants:
        """Raises ConfigError that names each problem's line and fix."""
        entries = load_keys(path).tenants
        return cls([(text, tenant) for entry in entries for tenant in [_tenant(entry)] for text in entry.keys])

    @classmethod
    def anonymous(cls) -> Tenants:
        """Everybody is one tenant with all classes and no limits."""
        return cls((), _ANYBODY)

    def identify(self, key: str | None) -> Tenant:
        """Raises Unauthenticated, which says how to pass a key."""
        if self._anybody is not None:
            return self._anybody
        if not key:
            raise Unauthenticated(f"no API key: {_HOW}")
        asked = key_hash(key)
        # How far a look-up by hash gets tells nothing of a key: who could aim at a hash would have to invert SHA-256.
        text, tenant = self._keys.get(asked, (b"", None))
        if tenant is None or not hmac.compare_digest(text, asked.encode()):
            raise Unauthenticated(f"this API key is not known here: ask the operator for one, and {_HOW}")
        return tenant


class TenantsFile:
    """The tenants of a keys file, which is read again when it changes."""

    def __init__(self, path: Path | None, run: Callable[[Callable[[], None]], None] = in_thread) -> None:
        """None: there are no keys, and everybody is one tenant. The file is read before this returns, and by `run`
        once it changed. Raises ConfigError.
        """
        self._current: Callable[[], Tenants] = Tenants.anonymous
        if path is not None:
            self._current = ReloadedFiles((path,), lambda: Tenants.load(path), run).current

    def current(self) -> Tenants:
        """The newest usable content. A broken or deleted file leaves the former in force, with one warning; a
        changed one leaves it in force until it has been read.
        """
        return self._current()


def _tenant(entry: TenantEntry) -> Tenant:
    return Tenant(
        entry.name,
        tuple(sorted({Priority[name.upper()] for name in entry.classes})),
        Priority[entry.default().upper()],
        entry.models,
        entry.weight,
        entry.requests_per_minute,
        entry.tokens_per_minute,
        entry.max_streams,
        entry.operator,
    )
