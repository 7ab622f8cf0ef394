from __future__ import annotations

import json
import sys

import pytest

from cluster.errors import RequestError
from deployments.gateway.outline import MAX_NEW_TOKENS, MAX_PARTS, Outline, certain_prompts, outline, parse

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOKENIZE, DETOKENIZE, COUNT_TOKENS = "/tokenize", "/detokenize", "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "hello"}]


def read(path: str, **fields: object) -> Outline:
    return outline(path, json.dumps(fields).encode())


# --- the body ---


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{bad", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ('{"prompt": "a"}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud83d"}', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e400}', "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"7", "must be a JSON object, not int"),
    ],
)
def test_what_is_no_json_object(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        outline(CHAT, body)


def test_a_byte_order_mark_is_skipped() -> None:
    assert outline(COMPLETIONS, '\ufeff{"prompt": "ab"}'.encode()).prompt_text == b"ab"


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


MANY = ["a"] * (MAX_PARTS + 1)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": MANY}),
        (COMPLETIONS, {"prompt": ["1", 2, *MANY]}),
        (COMPLETIONS, {"prompt_embeds": MANY}),
        (CHAT, {"messages": MANY}),
        (CHAT, {"messages": [{"role": "user", "content": MANY}]}),
        (CHAT, {"messages": [{"role": "user", "content": MANY[: MAX_PARTS // 2]}] * 2}),
        (RESPONSES, {"input": MANY}),
        (MESSAGES, {"messages": [{"role": "user", "content": MANY}], "max_tokens": 1}),
        (COUNT_TOKENS, {"messages": [], "system": MANY}),
        (TOKENIZE, {"messages": [{"role": "user", "content": MANY}]}),
    ],
)
def test_too_many_texts(path: str, fields: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="more than 65536 objects, lists and texts"):
        read(path, **fields)


def test_prompts_as_many_as_parts_may_be_are_read() -> None:
    assert read(COMPLETIONS, prompt=["a"] * MAX_PARTS).prompts == MAX_PARTS


@pytest.mark.parametrize("fields", ['"tools": %s', '"messages": [{"role": "user", "content": %s}]'])
def test_what_can_just_be_read_and_not_be_written_again_is_refused(fields: str) -> None:
    def refusal(depth: int) -> str:
        try:
            outline(CHAT, f"{{{fields % ('[' * depth + ']' * depth)}}}".encode())
        except RequestError as error:
            return str(error).partition(":")[0]
        return ""

    assert {refusal(depth) for depth in range(100, sys.getrecursionlimit())} == {
        "", "the request body is nested too deeply", "the request body is not valid JSON",
    }  # fmt: skip


# --- fields that are read ---


def test_a_model_is_a_text() -> None:
    assert [read(CHAT, messages=HELLO, model=model).model for model in ("m", "", None)] == ["m", None, None]
    assert read(CHAT, messages=HELLO).model is None
    with pytest.raises(RequestError, match="`model`: Input should be a valid string"):
        read(CHAT, model=7)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (COMPLETIONS, {"prompt": "a", "n": "two"}, "`n`: Input should be a valid integer"),
        (COMPLETIONS, {"prompt": "a", "n": None}, "`n`: Input should be a valid integer"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2.5}, "`max_tokens`: Input should be a valid integer"),
        (COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": -2}, "`truncate_prompt_tokens`: "),
        (CHAT, {"messages": HELLO, "stream": 2}, "`stream`: Input should be a valid boolean"),
        (MESSAGES, {"messages": HELLO}, "`max_tokens`: Field required"),
    ],
)
def test_types_that_the_engine_refuses(path: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(path, **fields)


@pytest.mark.parametrize(
    ("path", "fields", "sequences", "bound"),
    [
        (COMPLETIONS, {"prompt": "a"}, 1, 16),
        (COMPLETIONS, {"prompt": "a", "max_tokens": None}, 1, 16),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 5, "n": 3}, 3, 5),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 100, "max_completion_tokens": 1}, 1, 100),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0, "echo": True}, 1, 1),
        (COMPLETIONS, {"prompt": "a", "n": "60", "max_tokens": "7"}, 60, 7),
        (COMPLETIONS, {"prompt": "a", "n": 2.0, "max_tokens": True}, 2, 1),
        (COMPLETIONS, {"prompt": "a", "n": 4, "use_beam_search": True}, 4, 16),
        (COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 9}, 2, 16),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 5, "n": 2}, 4, 5),
        (COMPLETIONS, {"prompt": [[1, 2], [3]]}, 2, 16),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1, 16),
        (COMPLETIONS, {"prompt": []}, 1, 16),
        (COMPLETIONS, {"prompt": ["a", "b"], "prompt_embeds": ["Zg==", "Zg=="]}, 4, 16),
        (CHAT, {"messages": HELLO}, 1, None),
        (CHAT, {"messages": HELLO, "n": None, "max_tokens": None}, 1, None),
        (CHAT, {"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 4}, 1, 4),
        (CHAT, {"messages": HELLO, "max_tokens": 4, "max_completion_tokens": 9}, 1, 9),
        (CHAT, {"messages": HELLO, "max_tokens": 9, "max_completion_tokens": None}, 1, 9),
        (CHAT, {"messages": HELLO, "max_output_tokens": 1}, 1, None),
        (CHAT, {"messages": HELLO, "max_tokens": 10**400, "n": 2}, 2, MAX_NEW_TOKENS),
        (CHAT, {"messages": HELLO, "prompt": ["a", "b"]}, 1, None),
        (RESPONSES, {"input": "a", "max_output_tokens": 7, "max_tokens": 1, "n": 5}, 1, 7),
        (RESPONSES, {"input": "a", "max_tokens": 1}, 1, None),
        (MESSAGES, {"messages": HELLO, "max_tokens": 7, "max_completion_tokens": 1, "n": 5}, 1, 7),
        (TOKENIZE, {"prompt": "a", "n": 5, "max_tokens": 7}, 0, 0),
        (DETOKENIZE, {"tokens": [1]}, 0, 0),
        (COUNT_TOKENS, {"messages": HELLO, "max_tokens": 7}, 0, 0),
    ],
)
def test_sequences_and_the_bound_of_one(
    path: str, fields: dict[str, object], sequences: int, bound: int | None
) -> None:
    read_so = read(path, **fields)
    assert (read_so.sequences, read_so.max_new_tokens) == (sequences, bound)


def test_of_a_doubled_field_the_last_one_counts() -> None:
    assert outline(CHAT, b'{"messages": [], "n": 2, "n": 60, "n": 3}').sequences == 3


def test_absurd_numbers_stay_numbers_that_can_be_multiplied_by_fractions() -> None:
    assert read(COMPLETIONS, prompt=["a"] * 1000, n=10**400).sequences * 0.5 > 2**39


@pytest.mark.parametrize(("value", "streams"), [(True, True), ("true", True), (1, True), ("no", False), (None, False)])
def test_stream_and_echo(value: object, streams: bool) -> None:
    assert read(CHAT, messages=HELLO, stream=value).stream is streams
    assert read(COMPLETIONS, prompt="a", echo=value).echo is streams
    assert read(CHAT, messages=HELLO, echo=value).echo is False


def test_a_prompt_that_the_engine_will_cut() -> None:
    assert read(COMPLETIONS, prompt="a").truncate_prompt_tokens is None
    assert read(COMPLETIONS, prompt="a", truncate_prompt_tokens="9").truncate_prompt_tokens == 9
    assert read(CHAT, messages=HELLO, truncate_prompt_tokens=-1).truncate_prompt_tokens == -1
    assert read(RESPONSES, input="a", truncation="auto").truncate_prompt_tokens == -1
    assert read(RESPONSES, input="a", truncation="disabled").truncate_prompt_tokens is None


# --- the prompt ---


def test_fields_of_another_path_are_no_prompt() -> None:
    chat = read(CHAT, messages=HELLO, prompt=[1], input="x" * 999, system="x" * 999, instructions="x" * 999)
    assert (chat.prompt_text, chat.prompt_ids, chat.prompts) == (b"user\nhello", 0, 1)
    assert read(COMPLETIONS, prompt="ab", messages=HELLO, tools=[{"name": "f"}], input="x").prompt_text == b"ab"
    assert read(RESPONSES, input="ab", messages=HELLO, system="x").prompt_text == b"ab"


def test_text_is_in_the_order_of_a_chat_template_and_shared_prefixes_stay_shared() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    system = {"role": "system", "content": "be brief"}
    marked = {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}
    first = read(CHAT, messages=[system, {"role": "user", "content": "one"}], tools=tools).prompt_text
    second = read(
        CHAT, tools=tools, messages=[system, {"role": "user", "content": [marked]}, {"role": "user", "content": "3"}]
    ).prompt_text
    shared = json.dumps(tools, separators=(",", ":")).encode() + b"\nsystem\nbe brief\nuser\n"
    assert first == shared + b"one"
    assert second == shared + b'two\nuser\n3\n{"cache_control":{"type":"ephemeral"}}'


def test_every_text_of_a_chat_that_can_reach_its_prompt() -> None:
    call = {"id": "i", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    text = read(
        CHAT,
        documents=[{"title": "document"}],
        chat_template_kwargs={"thinking": True},
        response_format={"type": "json_object"},
        messages=[
            {"role": "user", "name": "me", "content": ["plain", {"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "assistant", "reasoning": "new", "reasoning_content": "old", "annotations": ["x"], "audio": None},
            {"role": "tool", "tool_call_id": "i", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
        ],
    ).prompt_text  # fmt: skip
    assert text.decode().splitlines() == [
        '[{"title":"document"}]', '{"thinking":true}', "user", "me", "plain", "no", "assistant", "hm",
        json.dumps([call], separators=(",", ":")), "assistant", "new", "tool", "i",
        '{"type":"image_url","image_url":{"url":"u"}}', '{"type":"json_object"}',
    ]  # fmt: skip


def test_items_of_the_responses_api() -> None:
    text = read(
        RESPONSES,
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}], "encrypted_content": "x"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}],
             "content": [{"type": "reasoning_text", "text": "at length"}]},
            {"type": "function_call", "call_id": "i", "name": "f", "arguments": "{}", "namespace": "space"},
            {"type": "function_call_output", "call_id": "i", "output": "seven"},
        ],
    ).prompt_text  # fmt: skip
    assert text.decode().splitlines() == [
        "be brief", "user", "one", "in short", "at length", "i", "f", "{}", "space", "i", "seven",
    ]  # fmt: skip


def test_the_name_of_a_namespace_is_repeated_for_each_of_its_tools() -> None:
    def space(name: str, tools: int) -> list[dict[str, object]]:
        return [{"type": "namespace", "name": name, "tools": [{"type": "function", "name": "f"}] * tools}]

    assert read(RESPONSES, input="a", tools=space("zone", 9)).prompt_text.count(b"zone") == 10
    with pytest.raises(RequestError, match="shorten it"):
        read(RESPONSES, input="a", tools=space("x" * 2**20, 9))


def test_blocks_of_the_messages_api() -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: changes every time"}
    fields: dict[str, object] = {
        "tools": [{"name": "f", "input_schema": {}}],
        "system": [billing, {"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "b3Bh"},
                {"type": "tool_use", "id": "i", "name": "f", "input": {"key": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "i", "content": [
                    {"type": "text", "text": "seven"}, {"type": "tool_reference", "tool_name": "g"}]},
                {"type": "tool_result", "tool_use_id": "j", "content": "eight"},
            ]},
        ],
    }  # fmt: skip
    expected = [
        '[{"name":"f","input_schema":{}}]', "be brief", "user", "one", "assistant", "hm", "i", "f", '{"key":1}',
        "user", "i", "seven", "g", "i", "j", "eight",
    ]  # fmt: skip
    assert read(MESSAGES, max_tokens=1, **fields).prompt_text.decode().splitlines() == expected
    assert read(COUNT_TOKENS, **fields).prompt_text.decode().splitlines() == expected


def test_token_ids_are_counted_exactly_and_tell_prompts_apart() -> None:
    one, two = read(COMPLETIONS, prompt=[5, 6, 7]), read(COMPLETIONS, prompt=[5, 6, 8])
    assert (one.prompt_ids, one.prompt_text) == (3, b"[5,6,7]")
    assert one.prompt_text != two.prompt_text
    assert read(COMPLETIONS, prompt=[[5, 6], [7]]).prompt_ids == 3
    assert read(COMPLETIONS, prompt=["5", 6]).prompt_ids == 2
    assert read(COMPLETIONS, prompt=["5", "6"]).prompt_ids == 0
    assert read(DETOKENIZE, tokens=[5, 6]).prompt_ids == 2


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HELLO}),
        (RESPONSES, {"input": "hello"}),
        (MESSAGES, {"messages": HELLO, "max_tokens": 1}),
        (TOKENIZE, {"messages": HELLO}),
    ],
)
def test_ids_of_an_earlier_prefill_replace_the_text(path: str, fields: dict[str, object]) -> None:
    ids = [7] * 999
    assert read(path, kv_transfer_params={"prompt_token_ids": ids}, **fields).prompt_ids == 999
    assert read(path, kv_transfer_params={"prompt_token_ids": []}, **fields).prompt_ids == 0
    assert b"hello" in read(path, kv_transfer_params={"prompt_token_ids": []}, **fields).prompt_text


PICTURE = {"type": "image_url", "image_url": {"url": "data:a-picture"}}
BLOCK = {"type": "image", "source": {"type": "base64", "data": "a-picture"}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [PICTURE]}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a-picture", "audio_url": ""}]}]}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a-picture"}]}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": [BLOCK]}], "max_tokens": 1}),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [BLOCK]}]}],
                    "max_tokens": 1}),
    ],
)  # fmt: skip
def test_ids_beside_media_replace_nothing(path: str, fields: dict[str, object]) -> None:
    few = read(path, kv_transfer_params={"prompt_token_ids": [7]}, **fields)
    assert b"a-picture" in few.prompt_text
    assert few.prompt_ids == len(few.prompt_text)
    assert read(path, kv_transfer_params={"prompt_token_ids": [7] * 999}, **fields).prompt_ids == 999


@pytest.mark.parametrize(("path", "name"), [(CHAT, "messages"), (RESPONSES, "input"), (TOKENIZE, "messages")])
def test_ids_of_a_request_that_is_to_be_echoed_replace_nothing(path: str, name: str) -> None:
    echoed = read(path, kv_transfer_params={"prompt_token_ids": [7]}, echo=True, **{name: HELLO})
    assert echoed.prompt_ids == 0
    assert b"hello" in echoed.prompt_text


def test_a_billing_line_is_no_certain_part_of_a_prompt() -> None:
    billed = "x-anthropic-billing-header: cch=1\nbe brief"
    fields = [{"role": "system", "content": billed}, {"role": "user", "content": [{"type": "text", "text": billed}]}]
    _, (certain,) = certain_prompts(CHAT, read(CHAT, messages=fields))
    assert certain.decode() == f"be brief\n{billed}"


def test_tools_that_come_with_a_message() -> None:
    tool = {"type": "tool_definition", "definition": {"name": "late", "input_schema": {}}}
    block = {"type": "tool_addition", "tool": tool, "text": "x-anthropic-billing-header"}
    fields = {"messages": [{"role": "system", "content": [block]}], "max_tokens": 1}
    assert b"late" in read(MESSAGES, **fields).prompt_text


def test_embeddings_count_as_text_and_beside_ids_as_ids() -> None:
    assert read(COMPLETIONS, prompt_embeds="Zm9v").prompt_text == b"Zm9v"
    assert read(COMPLETIONS, prompt=[1, 2], prompt_embeds=["Zm9v"]).prompt_ids == 6


def test_what_is_to_be_tokenized() -> None:
    assert read(TOKENIZE, prompt="ab").prompt_text == b"ab"
    assert read(TOKENIZE, messages=HELLO).prompt_text == b"user\nhello"
