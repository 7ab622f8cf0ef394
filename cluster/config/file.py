"""Reads a configuration file: YAML in, `Config` out, every problem at once with its line and its fix."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from cluster.config import Config
from cluster.config.yaml_file import parse_yaml, read_text

_LEAST = "  model:\n    path: <folder of the checkpoint>"


def load_config(path: Path) -> Config:
    """The configuration in the YAML file `path`, with relative paths taken from the file's folder.

    Raises ConfigError that lists every problem as `line N: dotted.key: what is wrong and what would be right`.
    """
    kind = "configuration file"
    return _absolute(parse_yaml(path, read_text(path, kind), Config, kind, _LEAST), path.absolute().parent)


_Section = TypeVar("_Section", bound=BaseModel)


def _absolute(section: _Section, folder: Path) -> _Section:
    """`section` with every relative path taken from `folder`."""
    changed: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            # Not resolve(): the name of a symlink to a model is the name that the operator chose.
            changed[name] = folder.joinpath(value.expanduser())
        elif isinstance(value, BaseModel):
            changed[name] = _absolute(value, folder)
    return section.model_copy(update=changed)
