"""The outline never disagrees with vLLM's own request classes, whatever a body says and however strangely."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st

from cluster.errors import RequestError
from deployments.gateway.outline import Outline, outline
from tests.unit.deployments.gateway.engine_requests import (
    CONTEXT,
    MESSAGE_FIELDS,
    PART_FIELDS,
    REQUESTS,
    TEXT_PARTS,
    TOKEN,
    Refused,
    fields_of,
    run,
)

GENERATE = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
ALL_FIELDS = sorted(set().union(*map(fields_of, REQUESTS)) | {"best_of", "content", "system_prompt"})
TEXT = st.text(TOKEN + 'a"\\\n', max_size=4) | st.just(TOKEN * 3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
INTEGER = st.integers(1, 70) | st.sampled_from(
    [None, True, False, 0, -1, "7", " 60 ", "6_0", "+6", "7.0", "1e2", "", 2.0, 2.5, 10**12, 10**30, [], {"a": 1}]
)
BOOLEAN = st.booleans() | st.sampled_from([None, 0, 1, 1.0, 2, "yes", "true", "off", "T", "x", []])
ID = st.integers(0, 9) | st.sampled_from([True, "7", 3.0])
PROMPT = (
    TEXT
    | st.lists(TEXT, max_size=4)
    | st.lists(ID, max_size=5)
    | st.lists(st.lists(ID, max_size=4), max_size=3)
    | st.lists(st.sampled_from(["1", "2", 3, True, [4], TOKEN]), max_size=3)
)
ARGUMENTS = TEXT | JSON.map(lambda value: json.dumps(value, ensure_ascii=False))
CALL = st.fixed_dictionaries(
    {"type": st.just("function"), "id": TEXT,
     "function": st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS})},
)  # fmt: skip
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}, optional={"output": TEXT}) | st.builds(
    lambda kind, text, more: (
        {**more, **dict.fromkeys(("text", "refusal", "thinking", "name"), text), "type": kind}
        if more
        else {"text": text, "type": "text"}
    ),
    st.sampled_from(TEXT_PARTS),
    TEXT,
    st.dictionaries(st.just("output") | st.sampled_from(PART_FIELDS), TEXT, max_size=2),
)
FUNCTION = st.fixed_dictionaries(
    {"name": TEXT}, optional={"description": TEXT, "parameters": st.dictionaries(TEXT, JSON, max_size=2), "x": JSON}
)
TOOL = st.builds(lambda function: {"type": "function", "function": function}, FUNCTION)
BILLED = TEXT.map(lambda text: f"x-anthropic-billing-header: cch={TOKEN}\n{text}")
MESSAGE = st.builds(
    lambda role, content, more: {"role": role, **more, **content},
    st.sampled_from(["system", "user", "assistant", "tool", "developer", "other"]),
    st.fixed_dictionaries({}, optional={"content": st.lists(PART | TEXT, max_size=3) | TEXT | BILLED | st.none()}),
    st.dictionaries(st.sampled_from([*MESSAGE_FIELDS, "x"]), TEXT, max_size=3)
    | st.fixed_dictionaries(
        {},
        optional={
            "tool_calls": st.lists(CALL, max_size=2),
            "tools": st.lists(TOOL, max_size=2),
            "reasoning": JSON,
            "reasoning_content": TEXT,
        },
    ),
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "tool_reference", "thinking", "redacted_thinking"])},
    optional={
        "text": TEXT | st.just("x-anthropic-billing-header" + TOKEN),
        "id": TEXT, "name": TEXT, "tool_name": TEXT, "tool_use_id": TEXT, "thinking": TEXT, "signature": TEXT,
        "input": st.dictionaries(TEXT, JSON, max_size=2), "data": TEXT,
        "content": TEXT | st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["text", "tool_reference", "other"])},
                optional={"text": TEXT, "name": TEXT, "tool_name": TEXT, "x": JSON},
            ), max_size=2),
    },
)  # fmt: skip
ITEM = MESSAGE | st.one_of(
    st.fixed_dictionaries({"type": st.just("custom_tool_call"), "call_id": TEXT, "name": TEXT, "input": TEXT}),
    st.fixed_dictionaries({"type": st.just("custom_tool_call_output"), "call_id": TEXT, "output": TEXT}),
    st.fixed_dictionaries(
        {"type": st.just("function_call"), "call_id": TEXT, "name": TEXT, "arguments": ARGUMENTS},
        optional={"namespace": TEXT},
    ),
    st.fixed_dictionaries(
        {"type": st.just("function_call_output"), "call_id": TEXT,
         "output": TEXT | st.lists(st.builds(lambda text: {"type": "input_text", "text": text}, TEXT), max_size=2)},
    ),
    st.fixed_dictionaries(
        {"type": st.just("reasoning"),
         "summary": st.lists(st.builds(lambda text: {"type": "summary_text", "text": text}, TEXT), max_size=2)},
        optional={"content": st.lists(st.builds(lambda text: {"type": "reasoning_text", "text": text}, TEXT))},
    ),
    st.fixed_dictionaries(
        {"type": st.just("message"), "role": st.just("assistant"),
         "content": st.lists(st.builds(lambda text: {"type": "output_text", "text": text}, TEXT), max_size=2)},
    ),
)  # fmt: skip
FLAT_TOOL = FUNCTION.map(lambda function: {"parameters": {}, "strict": None, **function, "type": "function"})
FLAT_TOOLS = st.lists(
    FLAT_TOOL
    | st.builds(lambda name, text: {"type": "custom", "name": name, "description": text}, TEXT, TEXT)
    | st.builds(
        lambda name, tools: {"type": "namespace", "name": name, "description": "", "tools": tools},
        TEXT,
        st.lists(FLAT_TOOL, min_size=1, max_size=3),
    ),
    max_size=3,
)
ANTHROPIC_TOOL = st.fixed_dictionaries(
    {"name": TEXT, "input_schema": st.dictionaries(TEXT, JSON, max_size=2)}, optional={"description": TEXT}
)
ANTHROPIC_TOOLS = st.lists(ANTHROPIC_TOOL, max_size=2)
TOOL_ADDITION = st.builds(
    lambda tool, more: {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}, **more},
    ANTHROPIC_TOOL,
    st.fixed_dictionaries({}, optional={"text": TEXT | st.just("x-anthropic-billing-header")}),
)
ANTHROPIC_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT | st.lists(BLOCK, max_size=3)}
    )
    | TOOL_ADDITION.map(lambda block: {"role": "system", "content": [block]}),
    max_size=3,
)
KWARGS = st.dictionaries(TEXT | st.sampled_from(["tools", "documents", "thinking"]), JSON, max_size=2)

# What would make a request look small if its path read it.
LOOK_SMALL: list[tuple[str, object]] = [
    ("prompt", [7]), ("kv_transfer_params", {"prompt_token_ids": [7]}), ("max_completion_tokens", 1),
    ("max_tokens", 1), ("max_output_tokens", 1), ("n", 1), ("truncate_prompt_tokens", 1),
]  # fmt: skip

# Of each path: what it must have, and what is read of it.
NEEDED: dict[str, st.SearchStrategy[dict[str, object]]] = {
    "/v1/completions": st.fixed_dictionaries({"prompt": PROMPT}),
    "/v1/chat/completions": st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
    "/v1/responses": st.fixed_dictionaries({"input": TEXT | st.lists(ITEM, max_size=3)}),
    "/v1/messages": st.fixed_dictionaries({"model": TEXT, "messages": ANTHROPIC_MESSAGES, "max_tokens": INTEGER}),
    "/v1/messages/count_tokens": st.fixed_dictionaries({"model": TEXT, "messages": ANTHROPIC_MESSAGES}),
    "/tokenize": st.fixed_dictionaries({"prompt": TEXT})
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
    "/detokenize": st.fixed_dictionaries({"tokens": st.lists(ID, max_size=5)}),
}
VALUES: dict[str, st.SearchStrategy[object]] = {
    "model": TEXT | st.none(),
    "prompt": PROMPT,
    "messages": st.lists(MESSAGE, max_size=3),
    "input": TEXT | st.lists(ITEM, max_size=3),
    "tokens": st.lists(ID, max_size=5),
    "n": INTEGER,
    "best_of": INTEGER,
    "max_tokens": INTEGER,
    "max_completion_tokens": INTEGER,
    "max_output_tokens": INTEGER,
    "truncate_prompt_tokens": INTEGER,
    "stream": BOOLEAN,
    "echo": BOOLEAN,
    "use_beam_search": BOOLEAN,
    "system": TEXT | st.lists(BLOCK, max_size=2),
    "instructions": TEXT,
    "tools": st.lists(TOOL, max_size=2),
    "documents": st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2),
    "chat_template_kwargs": KWARGS,
    "truncation": st.sampled_from(["auto", "disabled", None]),
    "kv_transfer_params": st.fixed_dictionaries({"prompt_token_ids": st.lists(st.integers(0, 9), max_size=5) | JSON})
    | st.none(),
    "response_format": st.builds(
        lambda schema: {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        st.dictionaries(TEXT, JSON, max_size=2),
    ),
}
OF_PATH: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "/v1/responses": {"tools": FLAT_TOOLS},
    "/v1/messages": {"tools": ANTHROPIC_TOOLS, "messages": ANTHROPIC_MESSAGES},
    "/v1/messages/count_tokens": {"tools": ANTHROPIC_TOOLS, "messages": ANTHROPIC_MESSAGES},
}


def raw(pairs: list[tuple[str, object]]) -> bytes:
    """JSON in which a name may be there twice."""
    return (
        b"{" + b",".join(json.dumps(name).encode() + b":" + json.dumps(value).encode() for name, value in pairs) + b"}"
    )


def _pair(path: str, name: str) -> st.SearchStrategy[tuple[str, object]]:
    values = OF_PATH.get(path, {}).get(name, VALUES.get(name, JSON))
    return values.map(lambda value: (name, value))


def _pairs(path: str) -> st.SearchStrategy[list[tuple[str, object]]]:
    read = sorted(VALUES)
    foreign = sorted(set(ALL_FIELDS) - fields_of(path))
    pair = st.sampled_from(read).flatmap(lambda name: _pair(path, name)) | st.tuples(st.sampled_from(foreign), JSON)
    pair |= st.sampled_from(LOOK_SMALL)
    needed = NEEDED[path].map(lambda fields: list(fields.items()))
    return st.builds(lambda first, more: first + more, needed, st.lists(pair, max_size=5))


BODIES = st.sampled_from(sorted(REQUESTS)).flatmap(lambda path: st.tuples(st.just(path), _pairs(path)))
FORMATS = st.sampled_from(["string", "openai"])


def counted(read: Outline) -> int:
    return read.prompt_ids or read.prompt_text.decode().count(TOKEN)


@pytest.mark.parametrize("path", sorted(REQUESTS))
def test_what_the_engine_takes_is_outlined_as_it_runs(path: str) -> None:
    accepted = 0

    @settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(pairs=_pairs(path), merge=st.booleans(), content_format=FORMATS)
    def check(pairs: list[tuple[str, object]], merge: bool, content_format: str) -> None:
        nonlocal accepted
        body = raw(pairs)
        note(body.decode())
        try:
            engine = run(path, body, merge, content_format)
        except Refused as refused:
            event(f"refused: {str(refused)[:60]}")
            assume(False)
        accepted += 1
        read = outline(path, body)
        assert read.model == (engine.model or None)
        assert (read.stream, read.echo) == (engine.stream, engine.echo)
        assert read.truncate_prompt_tokens == engine.truncation
        assert read.prompts == max(1, engine.prompts)
        if engine.sequences > 0 or path not in GENERATE:
            assert read.sequences == engine.sequences
        for bound, room in engine.bounds:
            expected = room if read.max_new_tokens is None else min(read.max_new_tokens, room)
            assert bound == expected or (bound < 1 == expected)
        if engine.ids_only:
            assert read.prompt_ids >= engine.prompt_tokens
            assert read.prompt_ids == engine.prompt_tokens or path == "/tokenize"
        else:
            assert counted(read) >= engine.prompt_tokens
            if path == "/v1/completions":
                assert counted(read) == engine.prompt_tokens

    check()
    assert accepted > 500, "at least half of the bodies must be such as the engine takes"


@settings(deadline=None)
@given(BODIES, st.data())
def test_fields_of_other_paths_change_nothing(drawn: tuple[str, list[tuple[str, object]]], data: st.DataObject) -> None:
    path, pairs = drawn
    # Its engine's class keeps what it does not know, and what makes prompts of conversations finds this one there.
    read_all_the_same = {"/tokenize": {"kv_transfer_params", "echo"}, "/v1/responses": {"echo"}}.get(path, set())
    foreign = st.sampled_from(sorted(set(ALL_FIELDS) - fields_of(path) - read_all_the_same))
    extra = data.draw(st.lists(foreign.flatmap(lambda name: _pair(path, name)), min_size=1, max_size=4))

    def seen(pairs: list[tuple[str, object]]) -> object:
        try:
            return replace(outline(path, raw(pairs)), fields={})
        except RequestError as refusal:
            return str(refusal)

    assert seen(pairs + extra) == seen(pairs)


@settings(deadline=None)
@given(st.sampled_from(sorted(REQUESTS)), st.dictionaries(st.sampled_from(ALL_FIELDS), JSON | PROMPT | INTEGER))
def test_any_object_is_outlined_or_refused(path: str, fields: dict[str, object]) -> None:
    try:
        read = outline(path, json.dumps(fields).encode())
    except RequestError:
        return
    assert read.prompts >= 1
    assert read.sequences >= 0
    assert read.max_new_tokens is None or 0 <= read.max_new_tokens < 2**31


def test_the_context_is_larger_than_any_prompt_here() -> None:
    assert CONTEXT > 10**6
