from __future__ import annotations

import json

import pytest

from cluster.errors import RequestError
from deployments.gateway.outline import (
    MAX_NEW_TOKENS,
    MAX_PARTS,
    MAX_SEQUENCES,
    UNSTATED_NEW_TOKENS,
    model_of,
    parse,
    peek,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{bad", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"7", "must be a JSON object, not int"),
    ],
)
def test_what_is_no_json_object(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse(body)


def test_a_model_is_a_string() -> None:
    assert model_of({}) is None
    assert model_of({"model": "m"}) == "m"
    with pytest.raises(RequestError, match="`model` must be a string, not int"):
        model_of({"model": 7})


@pytest.mark.parametrize(
    ("path", "fields", "new_tokens", "sequences"),
    [
        (COMPLETIONS, {"prompt": "a"}, 16, 1),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 5, "n": 3}, 15, 3),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 5, "n": 2}, 20, 4),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "max_tokens": 5}, 10, 2),
        (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 5}, 5, 1),
        (CHAT, {"messages": []}, UNSTATED_NEW_TOKENS, 1),
        (CHAT, {"messages": [], "max_tokens": 9, "max_completion_tokens": 4}, 4, 1),
        (CHAT, {"messages": [], "max_tokens": "many", "n": "two"}, UNSTATED_NEW_TOKENS, 1),  # vLLM will refuse these
        (CHAT, {"messages": [], "max_tokens": -3, "n": True}, 0, 1),
        (CHAT, {"messages": [], "max_tokens": 10**400, "n": 2}, 2 * MAX_NEW_TOKENS, 2),
        ("/v1/responses", {"input": "a", "max_output_tokens": 7}, 7, 1),
    ],
)
def test_what_is_reserved(path: str, fields: dict[str, object], new_tokens: int, sequences: int) -> None:
    outline = peek(path, fields)
    assert (outline.max_new_tokens, outline.sequences) == (new_tokens, sequences)


def test_too_many_sequences() -> None:
    with pytest.raises(RequestError, match=f"the most is {MAX_SEQUENCES}"):
        peek(COMPLETIONS, {"prompt": ["a"] * 2, "n": MAX_SEQUENCES})


@pytest.mark.parametrize("body", [b'{"a":[' + b"[]," * MAX_PARTS + b"[]]}", b'{"a":[' + b"{}," * MAX_PARTS + b"{}]}"])
def test_too_many_objects_are_refused_before_any_is_made(body: bytes) -> None:
    with pytest.raises(RequestError, match="more than 65536 objects, lists and texts"):
        parse(body)


@pytest.mark.parametrize("text", ["[{" * MAX_PARTS, '"[{' * MAX_PARTS, "\\[\\" * MAX_PARTS])
def test_brackets_within_text_are_no_objects(text: str) -> None:
    assert parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize("tail", [b"", b"\\", b'"', b'{"a":1}'])
def test_counting_brackets_never_looks_twice(tail: bytes) -> None:
    """A search that began again at each quote would take hours for these two megabytes."""
    with pytest.raises(RequestError, match=r"not valid JSON|objects"):
        parse(b"[" * (MAX_PARTS + 1) + b'"' + b'\\"' * 2**20 + tail)


def test_too_many_texts() -> None:
    peek(COMPLETIONS, {"input": ["a"] * (MAX_PARTS - 6)})
    with pytest.raises(RequestError, match="more than 65536 objects, lists and texts"):
        peek(COMPLETIONS, {"input": ["a"] * MAX_PARTS})


def test_text_at_any_depth_that_json_allows() -> None:
    deep: list[object] = ["a"]
    for _ in range(5000):
        deep = [deep]
    assert peek(CHAT, {"messages": deep}).prompt_text == b"a"
    with pytest.raises(RequestError, match="nested too deeply"):
        peek(CHAT, {"tools": deep})


def test_text_is_in_the_order_of_a_chat_template_and_shared_prefixes_stay_shared() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    system = {"role": "system", "content": "be brief"}
    first = peek(CHAT, {"messages": [system, {"role": "user", "content": "one"}], "tools": tools}).prompt_text
    second = peek(
        CHAT, {"tools": tools, "messages": [system, {"role": "user", "content": [{"type": "text", "text": "two"}]}]}
    ).prompt_text
    shared = json.dumps(tools, separators=(",", ":")).encode() + b"\nsystem\nbe brief\nuser\n"
    assert first == shared + b"one"
    assert second == shared + b"text\ntwo"


def test_token_ids_are_counted_exactly_and_tell_prompts_apart() -> None:
    one, two = peek(COMPLETIONS, {"prompt": [5, 6, 7]}), peek(COMPLETIONS, {"prompt": [5, 6, 8]})
    assert one.prompt_ids == 3
    assert one.prompt_text != two.prompt_text
