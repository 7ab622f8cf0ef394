"""Writes docs/configuration.md from the configuration tree: `make docs`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from cluster.config import Config, section_type
from cluster.config.engine_args import CONDITIONS, REFUSED
from cluster.config.vllm_arguments import VLLM_VERSION

_HEAD = """# Configuration

Generated from `cluster/config/` by `python -m cluster.config.reference > docs/configuration.md`; do not edit.

A deployment is one YAML file. Every key has its place below, most have a default, and a key that is not listed is
rejected, with the nearest valid name. `deepsplit validate FILE` checks a file, `deepsplit plan FILE` shows what it
would run. The files in `examples/` are complete.
"""


def reference() -> str:
    """The whole page, as Markdown."""
    return "\n".join([_HEAD, *_sections(), *_refused_engine_args()])


def _sections() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        section = section_type(field.annotation)
        assert section is not None
        yield f"## `{name}`\n"
        yield f"{section.__doc__}{' Off if not set.' if _may_be_left_out(field) else ''}\n"
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        yield from _rows(section, name, optional=_may_be_left_out(field))
        yield ""


def _rows(section: type[BaseModel], prefix: str, optional: bool, defaults: BaseModel | None = None) -> Iterator[str]:
    """One row per key and per nested section. `optional`: whether the section around them may be left out; `defaults`:
    what its keys are if it is.
    """
    for name, field in section.model_fields.items():
        inner, dotted = section_type(field.annotation), f"{prefix}.{name}"
        if inner is None:
            yield _row(f"`{dotted}`", _type(field), _default(field, name, optional, defaults), field.description)
            continue
        listed = get_origin(field.annotation) is tuple
        kind, default = ("list of sections", "`[]`") if listed else ("section", _section_default(field))
        yield _row(f"`{dotted}`", kind, default, field.description or inner.__doc__)
        nested = field.default if isinstance(field.default, inner) else None
        yield from _rows(inner, f"{dotted}[]" if listed else dotted, listed or _may_be_left_out(field), nested)


def _row(*cells: str | None) -> str:
    return "| " + " | ".join((cell or "").replace("|", "\\|") for cell in cells) + " |"


def _may_be_left_out(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _section_default(field: FieldInfo) -> str:
    return "not set" if _may_be_left_out(field) else "as below"


def _refused_engine_args() -> Iterator[str]:
    yield "## What `attention.engine_args` may not hold\n"
    yield f"`deepsplit validate` knows the names and types of vLLM {VLLM_VERSION}'s arguments, and refuses these:\n"
    yield "| argument | why, or what to set instead |"
    yield "|---|---|"
    for fix, names in REFUSED.items():
        yield _row(", ".join(f"`{name}`" for name in names), fix)
    yield f"\nRefused in some cases only: {'; '.join(CONDITIONS)}."
    yield ""


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
    if get_origin(annotation) is dict or is_typeddict(annotation):
        return "mapping"
    if get_origin(annotation) is tuple:
        return "list of texts" if arguments[0] is str else "list of numbers"
    if get_origin(annotation) is not None:  # Annotated
        return _type_name(arguments[0])
    return {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}[annotation]


def _default(field: FieldInfo, name: str, optional: bool, defaults: BaseModel | None) -> str:
    if defaults is not None:
        return f"`{json.dumps(getattr(defaults, name), default=str)}`"
    if field.is_required():
        return "required with the section" if optional else "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "not set" if value is None else f"`{json.dumps(value, default=str)}`"


if __name__ == "__main__":
    print(reference(), end="")
