"""Who a request's API key belongs to."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.errors import Unauthenticated
from cluster.keys.api_keys import key_hash
from cluster.keys.file import TenantEntry, load_keys
from cluster.tls.reloading import ReloadedFiles
from routing.requests.request import Priority, Tenant

_HOW = "send it as `Authorization: Bearer KEY` (REST) or metadata `authorization: Bearer KEY` (gRPC)"
_ANYBODY = Tenant("anonymous", classes=tuple(Priority), operator=True)


class Tenants:
    """One state of a keys file."""

    def __init__(self, keys: Sequence[tuple[str, Tenant]], anybody: Tenant | None = None) -> None:
        """`keys`: (hash, tenant). `anybody`: whoever comes, if keys are not asked for."""
        self._keys = [(text.encode(), tenant) for text, tenant in keys]
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
        found: Tenant | None = None
        asked = key_hash(key).encode()
        # All entries, each in constant time: how long this takes does not tell which one matched, or how nearly.
        for text, tenant in self._keys:
            if hmac.compare_digest(text, asked):
                found = tenant
        if found is None:
            raise Unauthenticated(f"this API key is not known here: ask the operator for one, and {_HOW}")
        return found


class TenantsFile:
    """The tenants of a keys file, which is read again when it changes."""

    def __init__(self, path: Path | None) -> None:
        """None: there are no keys, and everybody is one tenant. Raises ConfigError."""
        self._current: Callable[[], Tenants] = Tenants.anonymous
        if path is not None:
            self._current = ReloadedFiles((path,), lambda: Tenants.load(path)).current

    def current(self) -> Tenants:
        """The newest usable content; a broken or deleted file leaves the former in force, with one warning."""
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
