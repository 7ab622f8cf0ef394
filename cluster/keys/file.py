"""The keys file: tenants, the hashes of their API keys, and what each tenant may do.

    tenants:
      - name: search
        keys: [sha256:...]            # several while a key is being replaced; none locks the tenant out
        requests_per_minute: 600
        tokens_per_minute: 200000
        classes: [interactive, batch]

No message about the file shows a key or a hash.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cluster.config import Section, conflict
from cluster.config.yaml_file import parse_yaml, read_text
from cluster.errors import ConfigError
from cluster.keys.api_keys import is_key_hash, without_keys

PriorityName = Literal["system", "interactive", "batch"]
LEAST = "  tenants:\n    - name: <who>\n      keys: [<what `deepsplit key new --tenant WHO` prints>]"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def tenant_name_fault(name: str) -> str | None:
    """What is wrong with a tenant's name; None if nothing is."""
    if not _NAME.fullmatch(name):
        return "must be 1 to 63 letters, digits, `.`, `_` or `-`, for use in metrics"
    return None if without_keys(name) == name else "looks like a key, and names are shown in metrics and logs"


def _tenant_name(name: str) -> str:
    fault = tenant_name_fault(name)
    if fault is not None:
        raise PydanticCustomError("tenant_name", "{fault}", {"fault": fault})
    return name


def _hash_of_key(text: str) -> str:
    if text.startswith("ds-"):
        raise PydanticCustomError("key_hash", "is a key: put its hash here instead, and give out a new key")
    if not is_key_hash(text):
        raise PydanticCustomError(
            "key_hash", "must be `sha256:` and 64 lower-case hex digits, as `deepsplit key new` prints it"
        )
    return text


class TenantEntry(Section):
    """One tenant. Limits that are not set do not hold it back."""

    name: Annotated[str, AfterValidator(_tenant_name)]
    keys: tuple[Annotated[str, AfterValidator(_hash_of_key)], ...]
    classes: tuple[PriorityName, ...] = ("interactive", "batch")
    default_class: PriorityName | None = None  # interactive if the tenant has it, else the first of `classes`
    models: tuple[str, ...] | None = None  # all models if not set
    weight: float = Field(1.0, gt=0, strict=True)  # part of the cluster relative to other tenants of the same class
    requests_per_minute: int | None = Field(None, ge=1, strict=True)
    tokens_per_minute: int | None = Field(None, ge=1, strict=True)  # prompt plus generated
    max_streams: int | None = Field(None, ge=1, strict=True)  # in flight at once, all gateways together
    operator: bool = Field(False, strict=True)  # may read the cluster's metrics and service discovery

    @model_validator(mode="after")
    def _may_do_something(self) -> Self:
        for name in ("classes", "models"):
            if getattr(self, name) == ():
                raise conflict(name, "must list at least one; leave the key out for the default")
        if self.default_class is not None and self.default_class not in self.classes:
            raise conflict("default_class", f"{self.default_class} is not among the tenant's classes: add it there")
        return self

    def default(self) -> PriorityName:
        """The class of requests that name none."""
        if self.default_class is not None:
            return self.default_class
        return "interactive" if "interactive" in self.classes else self.classes[0]


class KeysFile(Section):
    """All tenants."""

    tenants: tuple[TenantEntry, ...]

    @model_validator(mode="after")
    def _names_and_keys_are_unique(self) -> Self:
        if not self.tenants:
            raise conflict("tenants", "must list at least one tenant, or nobody gets in")
        names: dict[str, int] = {}
        holders: dict[str, str] = {}
        for position, tenant in enumerate(self.tenants):
            if tenant.name in names:
                raise conflict(
                    ("tenants", position, "name"),
                    f"{tenant.name!r} is also the name of tenants[{names[tenant.name]}]: put all keys under one entry",
                )
            names[tenant.name] = position
            for index, text in enumerate(tenant.keys):
                if text in holders:
                    raise conflict(
                        ("tenants", position, "keys", index),
                        f"the same key is also {holders[text]}'s: a key stands for one tenant, and is listed once",
                    )
                holders[text] = tenant.name
        return self


def load_keys(path: Path) -> KeysFile:
    """The keys file at `path`. Raises ConfigError that lists every problem with its line and fix."""
    return parse_keys(path, read_text(path, "keys file"))


def parse_keys(path: Path, text: str) -> KeysFile:
    """`text` as the content of the keys file `path`. Raises as `load_keys`."""
    try:
        return parse_yaml(path, text, KeysFile, "keys file", LEAST, hidden=frozenset({"keys"}))
    except ConfigError as error:
        raise ConfigError(without_keys(str(error))) from None
