"""Writes cluster/config/vllm_arguments.py, the names and types of this vLLM's arguments: `make engine-args`.

`deepsplit validate` checks `attention.engine_args` against that list on machines that have no vLLM.
"""

from __future__ import annotations

import dataclasses
import enum
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import vllm
from pydantic import BaseModel

import cluster.config
from deployments.attention.vllm_internals import (
    AsyncEngineArgs,
    FrontendArgs,
    ReasoningParserManager,
    ToolParserManager,
)

PATH = Path(cluster.config.__file__).with_name("vllm_arguments.py")

_HEAD = '''"""The arguments of vLLM that `attention.engine_args` may hold, with their types.

Generated from vLLM {version} by `make engine-args`; do not edit. `object`: a type whose check is left to vLLM.
"""

from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

VLLM_VERSION = "{version}"
TOOL_PARSERS = (
    {tool_parsers},
)  # fmt: skip
REASONING_PARSERS = (
    {reasoning_parsers},
)  # fmt: skip


@with_config(ConfigDict(extra="forbid", strict=True))
class EngineArguments(TypedDict, total=False):
    """Arguments of vLLM's engine (`AsyncEngineArgs`) and of its OpenAI application (`FrontendArgs`)."""

'''


def listing() -> str:
    """The whole module, as text."""
    fields = (*dataclasses.fields(FrontendArgs), *dataclasses.fields(AsyncEngineArgs))
    kinds = {field.name: _written(field.type) for field in fields if not field.name.startswith("_")}
    head = _HEAD.format(
        version=vllm.__version__,
        tool_parsers=_filled(ToolParserManager.list_registered()),
        reasoning_parsers=_filled(ReasoningParserManager.list_registered()),
    )
    return head + "".join(map(_line, *zip(*sorted(kinds.items()), strict=True)))


def _filled(names: list[str]) -> str:
    quoted = ", ".join(map(_quoted, sorted(names)))
    return textwrap.fill(quoted, 115, break_on_hyphens=False, subsequent_indent="    ")


def _line(name: str, kind: str) -> str:
    line = f"    {name}: {kind}"
    return f"{line}\n" if len(line) <= 120 else f"{line}  # noqa: E501\n"


def _written(kind: object) -> str:
    """`kind` as YAML can hold it: enums and classes by name, vLLM's settings objects as mappings."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"Literal[{', '.join(map(_quoted, arguments))}]"
    if origin in (Union, types.UnionType):
        return _union({_written(part) for part in arguments if part is not types.NoneType}, types.NoneType in arguments)
    if origin in (list, set):
        return f"list[{_written(arguments[0])}]"
    if origin is dict or kind is dict or dataclasses.is_dataclass(kind) or _is_subclass(kind, BaseModel):
        return "dict[str, Any]"
    if _is_subclass(kind, enum.Enum):
        return "int" if _is_subclass(kind, int) else "str"
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(kind, "object")  # type: ignore[call-overload]


def _union(kinds: set[str], optional: bool) -> str:
    if len(kinds) > 1:
        kinds = kinds - {"object"}  # classes and functions, which only code can pass
    if "str" in kinds:  # any name, beside those that vLLM lists
        kinds = {kind for kind in kinds if not kind.startswith("Literal")}
    return "object" if len(kinds) > 1 else f"{kinds.pop()}{' | None' if optional else ''}"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _is_subclass(kind: object, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


if __name__ == "__main__":
    PATH.write_text(listing(), encoding="utf-8")
