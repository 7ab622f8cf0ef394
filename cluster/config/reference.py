"""Writes docs/configuration.md from the configuration tree: `make docs`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import Config, section_type

_HEAD = """# Configuration

Generated from `cluster/config/` by `python -m cluster.config.reference > docs/configuration.md`; do not edit.

A deployment is one YAML file. Every key has its place below, most have a default, and a key that is not listed is
rejected, with the nearest valid name. `deepsplit validate FILE` checks a file, `deepsplit plan FILE` shows what it
would run. The files in `examples/` are complete.
"""


def reference() -> str:
    """The whole page, as Markdown."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        section = section_type(field.annotation)
        assert section is not None
        yield f"## `{name}`\n"
        yield f"{section.__doc__}{'' if field.default_factory or field.is_required() else ' Off if not set.'}\n"
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        yield from _rows(section, name)
        yield ""


def _nested_defaults(field: FieldInfo, inner: type[BaseModel]) -> BaseModel | None:
    return field.default if isinstance(field.default, inner) else None


def _rows(section: type[BaseModel], prefix: str, defaults: BaseModel | None = None) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{prefix}.{name}", _nested_defaults(field, inner))
        else:
            cells = (f"`{prefix}.{name}`", _type(field), _default(field, name, defaults), field.description or "")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if hasattr(limit, name)
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is tuple:
        return "list of texts" if arguments[0] is str else "list of numbers"
    if get_origin(annotation) is not None:  # Annotated
        return _type_name(arguments[0])
    return {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}[annotation]


def _default(field: FieldInfo, name: str, defaults: BaseModel | None) -> str:
    if defaults is not None:
        return f"`{json.dumps(getattr(defaults, name))}`"
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "not set" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
