"""Puts a new key into a keys file without touching anything else in it, comments and layout included."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import yaml

from cluster.config.yaml_file import read_text
from cluster.errors import ConfigError
from cluster.keys.file import TenantEntry, parse_keys


def snippet(tenant: str, hashed: str) -> str:
    """What a keys file needs for a new tenant, below `tenants:`."""
    return "".join(f"  {line}\n" for line in _entry(tenant, hashed))


def add_key(path: Path, tenant: str, hashed: str) -> bool:
    """Writes the hash of a key for `tenant`, old or new, to the file, which is made if it is not there; mode 0600.

    False, and nothing written, if the file is laid out in a way that cannot be added to (flow style, aliases). Raises
    ConfigError if the file is not valid or cannot be written.
    """
    path = path.resolve()  # a link stays a link
    before = read_text(path, "keys file") if path.exists() else ""
    after = _with_key(path, before, tenant, hashed)
    if after is None:
        return False
    try:
        _replace(path, after)
    except OSError as error:
        raise ConfigError(f"cannot write the keys file {path}: {error.strerror}") from None
    return True


def _with_key(path: Path, text: str, tenant: str, hashed: str) -> str | None:
    if yaml.compose(text, Loader=yaml.SafeLoader) is None:  # nothing in it, comments at most
        return f"{_whole_lines(text)}tenants:\n{snippet(tenant, hashed)}"
    before = parse_keys(path, text)
    added = _insert(text, tenant, hashed)
    if added is None:
        return None
    # The text was put in by position: what it reads as must be what was there, the new key, and nothing else.
    try:
        after = parse_keys(path, added).tenants
    except ConfigError:
        return None
    without = [entry.model_copy(update={"keys": tuple(key for key in entry.keys if key != hashed)}) for entry in after]
    new = [] if any(entry.name == tenant for entry in before.tenants) else [TenantEntry(name=tenant, keys=())]
    holders = [entry.name for entry in after if hashed in entry.keys]
    return added if holders == [tenant] and without == [*before.tenants, *new] else None


def _insert(text: str, tenant: str, hashed: str) -> str | None:
    tenants = _value(yaml.compose(text, Loader=yaml.SafeLoader), "tenants")
    if not isinstance(tenants, yaml.SequenceNode) or tenants.flow_style:
        return None
    for entry in tenants.value:
        name, keys = _value(entry, "name"), _value(entry, "keys")
        if not isinstance(name, yaml.ScalarNode) or name.value != tenant:
            continue
        if not isinstance(keys, yaml.SequenceNode):
            return None
        if keys.flow_style:
            at = keys.start_mark.index + 1
            return f"{text[:at]}{hashed}{', ' if keys.value else ''}{text[at:]}"
        return _insert_lines(text, keys, [f"- {hashed}"])
    return _insert_lines(text, tenants, _entry(tenant, hashed))


def _insert_lines(text: str, sequence: yaml.SequenceNode, lines: list[str]) -> str:
    """`lines` as the last item of a block sequence; comments after it stay after it."""
    last: yaml.Node = sequence
    while isinstance(last, yaml.CollectionNode) and not last.flow_style and last.value:
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    end = text.find("\n", last.end_mark.index)
    at = len(text) if end < 0 else end + 1
    margin = " " * sequence.start_mark.column
    return "".join([_whole_lines(text[:at]), *(f"{margin}{line}\n" for line in lines), text[at:]])


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value for name, value in pairs if isinstance(name, yaml.ScalarNode) and name.value == key), None)


def _whole_lines(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _entry(tenant: str, hashed: str) -> list[str]:
    name = tenant if yaml.safe_load(tenant) == tenant else f'"{tenant}"'  # YAML takes 123 for a number
    return [f"- name: {name}", f"  keys: [{hashed}]"]


def _replace(path: Path, text: str) -> None:
    """Atomically; the new file has mode 0600, as `mkstemp` makes it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
