"""Files that operators write: YAML in, a pydantic model out, every problem at once with its line and its fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from cluster.config import section_type
from cluster.errors import ConfigError

KeyPath = tuple[str | int, ...]
Problem = tuple[int, str]  # line (0: the whole file) and message

# The loader in C, where PyYAML was built with it, reads a long file several times as fast.
_FASTEST: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST_LISTED = 40  # of a section's keys, in a message about an unknown one

_Model = TypeVar("_Model", bound=BaseModel)


def read_text(path: Path, kind: str) -> str:
    """The file's text; `kind` is what to call the file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the {kind} {path}: {reason}") from None


def parse_yaml(
    path: Path, text: str, model: type[_Model], kind: str, least: str, hidden: frozenset[str] = frozenset()
) -> _Model:
    """`text`, the content of `path`, as `model`. `least`: what such a file must hold at least; `hidden`: names of keys
    whose values no message may show.

    Raises ConfigError that lists every problem as `line N: dotted.key: what is wrong and what would be right`.
    """
    data, lines, problems = _parse(path, text, model, least)
    try:
        made = model.model_validate(data)
    except ValidationError as error:
        problems += [_explain(detail, lines, model, hidden) for detail in error.errors(include_url=False)]
    if problems:
        ordered = sorted(set(problems))
        listed = "\n".join(f"  line {line}: {message}" if line else f"  {message}" for line, message in ordered)
        raise ConfigError(f"{path} is not a valid {kind}:\n{listed}")
    return made


# --- YAML --------------------------------------------------------------------------------------------------


def _parse(
    path: Path, text: str, model: type[BaseModel], least: str
) -> tuple[dict[str, object], dict[KeyPath, int], list[Problem]]:
    """The file's mapping, the line of every key, and duplicate keys."""
    try:
        node, data = _composed(text, _FASTEST)
    except yaml.YAMLError:
        node, data = _composed_or_refused(path, text)
    if node is None or data is None:
        raise ConfigError(f"{path} is empty: it needs at least\n{least}")
    if not isinstance(data, dict):
        found, example = f"{path}:{node.start_mark.line + 1}", next(iter(model.model_fields))
        raise ConfigError(f"{found}: expected sections such as `{example}:`, found a {_kind(data)}")
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    for key_path, line in _keys(node, ()):
        if key_path in lines:
            problems.append((line, f"{_dotted(key_path)}: set twice; the first is on line {lines[key_path]}, keep one"))
        else:
            lines[key_path] = line
    # A section whose keys are all commented out reads as null: take it as a section without keys.
    sections = {name for name, field in model.model_fields.items() if _is_section(field.annotation)}
    filled = {str(key): {} if value is None and key in sections else value for key, value in data.items()}
    return filled, lines, problems


def _composed(text: str, loader_class: type[yaml.SafeLoader]) -> tuple[yaml.Node | None, object]:
    """The document's nodes, which know their lines, and the Python objects that they stand for."""
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _composed_or_refused(path: Path, text: str) -> tuple[yaml.Node | None, object]:
    """With the loader whose messages are clearer. Raises ConfigError."""
    try:
        return _composed(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        hint = " (indent with spaces)" if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _is_section(annotation: object) -> bool:
    return section_type(annotation) is not None and get_origin(annotation) is not tuple


def _keys(node: yaml.Node, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                yield (*prefix, key.value), key.start_mark.line + 1
                yield from _keys(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _keys(value, (*prefix, index))


# --- pydantic's errors in an operator's words --------------------------------------------------------------


def _explain(
    detail: ErrorDetails, lines: Mapping[KeyPath, int], model: type[BaseModel], hidden: frozenset[str]
) -> Problem:
    location: KeyPath = detail["loc"]
    context = detail.get("ctx", {})
    if detail["type"] == "conflict":  # raised about one field of a section; see cluster.config.conflict
        field = context["field"]
        location = (*location, *(field if isinstance(field, tuple) else (field,)))
    return _line(location, lines), f"{_dotted(location)}: {_wording(detail, location, model, hidden)}"


def _wording(detail: ErrorDetails, location: KeyPath, model: type[BaseModel], hidden: frozenset[str]) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    wanted: str
    if kind == "extra_forbidden":
        return _unknown(location, model)
    if kind == "missing":
        return "missing; it must be set"
    if kind == "conflict":
        return detail["msg"]
    if kind in bounds:
        wanted = f"{words[bounds[kind]]} {context[bounds[kind]]}"
    elif kind == "literal_error":
        wanted = f"one of {str(context['expected']).replace(chr(39), '')}"
    elif kind.startswith("int"):
        wanted = "a whole number"
    elif kind.startswith(("float", "finite")):
        wanted = "a finite number" if kind == "finite_number" else "a number"
    elif kind.startswith("bool"):
        wanted = "true or false"
    elif kind.startswith(("string", "path")):
        wanted = "text"
    elif kind.startswith(("tuple", "list")):
        wanted = f"a list, such as {_example_list(location, model)}"
    elif kind.startswith(("model", "dict", "mapping")):
        wanted = "a section of `key: value` lines"
    else:
        return detail["msg"]
    if hidden.intersection(location):
        return f"must be {wanted}"
    shown = "empty" if given is None else f"a {_kind(given)}" if isinstance(given, (dict, list)) else repr(given)
    return f"must be {wanted}, but is {shown}"


def _example_list(location: KeyPath, model: type[BaseModel]) -> str:
    *parents, key = location
    return "[3, 1]" if _parts(_keys_in(model, *parents).get(str(key))) & {int, float} else "[a, b]"


def _parts(annotation: object) -> set[object]:
    return {annotation}.union(*(_parts(part) for part in get_args(annotation)))


def _unknown(location: KeyPath, model: type[BaseModel]) -> str:
    """What an unknown key was most likely meant to be."""
    *parents, key = location
    siblings = sorted(_keys_in(model, *parents))
    everywhere = {".".join(path): path[-1] for path in _all_keys(model, ())}
    same = [dotted for dotted, last in everywhere.items() if last == key]
    close = [_dotted((*parents, name)) for name in difflib.get_close_matches(str(key), siblings, n=1)]
    if len(siblings) > _MOST_LISTED:
        near = same or close
        return f"unknown key; did you mean {' or '.join(near)}?" if near else "unknown key; no valid one is like it"
    if close:
        return f"unknown key; did you mean {close[0]}?"
    near = same or difflib.get_close_matches(_dotted(location), list(everywhere), n=1)
    valid = f"valid here: {', '.join(siblings)}"
    return f"unknown key; did you mean {' or '.join(near)}?" if near else f"unknown key; {valid}"


def _all_keys(section: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        inner = section_type(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*prefix, name))


def _keys_in(model: type[BaseModel], *path: str | int) -> Mapping[str, object]:
    """Keys of the section at `path` with their types; a position in a list of sections is that list's kind of section.
    Empty if there is no section at `path`.
    """
    kind: object = model
    for name in path:
        if isinstance(name, str):
            kind = _members(kind).get(name)
    return _members(kind)


def _members(kind: object) -> Mapping[str, object]:
    if is_typeddict(kind):
        return get_type_hints(kind)
    section = section_type(kind)
    return {} if section is None else {name: field.annotation for name, field in section.model_fields.items()}


def _line(location: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    """Line of the key, else of the nearest section around it, else 0."""
    for end in range(len(location), 0, -1):
        if location[:end] in lines:
            return lines[location[:end]]
    return 0


def _dotted(location: KeyPath) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "section"
    return "text" if isinstance(value, str) else type(value).__name__
