"""Reading along: whatever the cuts between packets, clients get the same bytes and the counts are exact."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deployments.gateway.outline import outline
from deployments.gateway.paths import CHAT, COMPLETIONS
from deployments.gateway.upstream.events import AnswerEvents, EngineError
from tests.unit.deployments.gateway.engine_stream import EOS, Engine, chunks_of, text_of

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
DONE = b"data: [DONE]\n\n"
PROMPT = [0, 55, 30]


def events_of(path: str = COMPLETIONS, **fields: object) -> AnswerEvents:
    bound = {"max_tokens": 99} if path == MESSAGES else {}  # which that API wants
    body = json.dumps({"stream": True, **bound, **fields}).encode()
    return AnswerEvents(path, outline(path, body), body)


def event(data: object, name: str | None = None) -> bytes:
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + json.dumps(data).encode() + b"\n\n"


def choice(index: int, text: str, ids: list[int] | None, **more: object) -> dict[str, object]:
    return {"index": index, "text": text, "token_ids": ids, "finish_reason": None, **more}


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(one, len(stream)) for one in at), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


@pytest.fixture(scope="module")
def answers(demo_model: Path) -> dict[str, bytes]:
    """A whole stream of each API, as the replica sends it."""
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    engine = Engine(tokenizer, PROMPT, [*tokenizer.encode("é 🎉 def", add_special_tokens=False).ids, EOS], 2)
    asked = json.dumps({"stream": True, "return_token_ids": True, "max_tokens": 99}).encode()
    streams = {path: b": ping\n\n".join(engine.stream(path, asked)) for path in (COMPLETIONS, CHAT)}
    streams[RESPONSES] = b"".join(
        event({"type": kind, **data}, kind)
        for kind, data in [
            ("response.created", {"response": {"usage": None}}),
            ("response.output_text.delta", {"delta": "é"}),
            ("response.output_text.delta", {"delta": "🎉"}),
            ("response.completed", {"response": {"usage": {"input_tokens": 3, "output_tokens": 12}}}),
        ]
    )
    streams[MESSAGES] = b"".join(
        event({"type": kind, **data}, kind)
        for kind, data in [
            ("message_start", {"message": {"usage": {"input_tokens": 3, "output_tokens": 0}}}),
            ("content_block_delta", {"delta": {"type": "text_delta", "text": "é"}}),
            ("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 12}}),
            ("message_stop", {}),
        ]
    )
    return streams


def state(seen: AnswerEvents) -> dict[str, Any]:
    parts = {name: value for name, value in vars(seen).items() if name not in ("_body", "_split")}
    return parts | {"rest": seen._split._rest}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_cuts_between_packets_change_nothing(answers: dict[str, bytes], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(answers)))
    stream = answers[path]
    if data.draw(st.booleans()):
        stream = stream.replace(b"\n", b"\r\n")
    whole = events_of(path)
    expected = whole.feed(stream)
    seen = events_of(path)
    packets = cut(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=40)))
    assert b"".join(seen.feed(packet) for packet in packets) == expected
    assert state(seen) == state(whole)
    assert whole.finished
    assert whole.saw_token
    assert whole.prompt_tokens == 3


def test_byte_by_byte(answers: dict[str, bytes]) -> None:
    for path, stream in answers.items():
        whole, seen = events_of(path), events_of(path)
        assert b"".join(seen.feed(stream[at : at + 1]) for at in range(len(stream))) == whole.feed(stream)
        assert state(seen) == state(whole)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_event_passes_as_soon_as_it_is_whole(answers: dict[str, bytes], path: str) -> None:
    seen = events_of(path)
    for one in answers[path].split(b"\n\n")[:-1]:
        assert seen.feed(one + b"\n") == b""
        assert seen.feed(b"\n").endswith(b"\n\n")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_counts_are_exact_and_ids_stay_here(answers: dict[str, bytes], path: str) -> None:
    seen = events_of(path)
    out = seen.feed(answers[path])
    chunks = chunks_of(answers[path])
    ids = [token for chunk in chunks for one in chunk["choices"] for token in one.get("token_ids") or ()]
    assert (seen.prompt_tokens, seen.generated_tokens) == (3, len(ids))
    assert (seen.prompt_ids, seen.generated_ids) == (PROMPT, ids)
    assert seen.text == text_of(out) == "é 🎉 def"
    for chunk in chunks_of(out):
        for holder in (chunk, *chunk["choices"]):
            assert holder.get("token_ids") is None
            assert holder.get("prompt_token_ids") is None
    assert out.count(b": ping\n\n") == answers[path].count(b": ping\n\n")
    assert out.endswith(DONE)


def test_a_client_that_asks_for_ids_gets_the_stream_as_it_is(answers: dict[str, bytes]) -> None:
    for path in (COMPLETIONS, CHAT):
        seen = events_of(path, return_token_ids=True)
        assert chunks_of(seen.feed(answers[path])) == chunks_of(answers[path])
        assert seen.prompt_ids == PROMPT


@pytest.mark.parametrize(
    ("path", "fields", "added"),
    [
        (COMPLETIONS, {}, True),
        (CHAT, {"return_token_ids": False}, True),
        (CHAT, {"return_token_ids": None, "n": 3}, True),
        (COMPLETIONS, {"return_token_ids": True}, False),
        (COMPLETIONS, {"stream": False}, False),
        (COMPLETIONS, {"echo": True}, False),
        (RESPONSES, {}, False),
        (MESSAGES, {}, False),
    ],
)
def test_ids_are_asked_for_where_they_come_back(path: str, fields: dict[str, object], added: bool) -> None:
    seen = events_of(path, prompt="é🎉", **fields)
    sent = json.loads(seen.upstream_body())
    bound = {"max_tokens": 99} if path == MESSAGES else {}
    assert sent == {"stream": True, "prompt": "é🎉"} | bound | fields | ({"return_token_ids": True} if added else {})
    if not added:
        body = b'{ "stream":true }'
        assert AnswerEvents(path, seen.outline, body).upstream_body() is body


@pytest.mark.parametrize("asked", [True, 1, "true", "yes"])
def test_a_client_may_ask_for_ids_in_every_way_that_the_engine_reads(asked: object) -> None:
    seen = events_of(prompt="x", return_token_ids=asked)
    assert json.loads(seen.upstream_body())["return_token_ids"] == asked
    out = seen.feed(event({"choices": [choice(0, "x", [7], prompt_token_ids=[1])]}))
    assert chunks_of(out)[0]["choices"][0]["token_ids"] == [7]


def test_several_choices_and_prompts_are_counted_each() -> None:
    seen = events_of(n=2, prompt=["a", "b"])
    for index in (0, 1, 2, 3):
        prompt = [1, 2, 3] if index < 2 else [4, 5]
        seen.feed(event({"choices": [choice(index, "x", [7], prompt_token_ids=prompt)]}))
    seen.feed(event({"choices": [choice(0, "y", [7, 8]), choice(3, "z", [9])]}))
    assert (seen.prompt_tokens, seen.generated_tokens) == (5, 7)
    assert (seen.text, seen.generated_ids, seen.prompt_ids) == ("xy", [7, 7, 8], [1, 2, 3])


def test_tokens_without_text_count_and_text_without_ids_does_too() -> None:
    seen = events_of()
    seen.feed(event({"choices": [choice(0, "", [])]}))
    assert (seen.saw_token, seen.generated_tokens) == (False, 0)
    seen.feed(event({"choices": [choice(0, "", [240, 159])]}))  # within a character
    assert (seen.saw_token, seen.generated_tokens, seen.text) == (True, 2, "")
    seen.feed(event({"choices": [choice(0, "x", None)]}))
    assert seen.generated_tokens == 3


def test_usage_has_the_last_word() -> None:
    seen = events_of(CHAT)
    seen.feed(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    assert seen.prompt_tokens is None
    seen.feed(event({"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": {"completion_tokens": 1}}))
    seen.feed(event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}}))
    assert (seen.prompt_tokens, seen.generated_tokens) == (9, 6)
    seen.feed(event({"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": "6"}}))
    seen.feed(event({"choices": [], "usage": None}))
    assert (seen.prompt_tokens, seen.generated_tokens) == (9, 6)


@pytest.mark.parametrize("field", ["reasoning", "tool_calls"])
def test_more_than_text_is_noticed(field: str) -> None:
    seen = events_of(CHAT)
    seen.feed(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "x", field: None}}]}))
    assert not seen.strange_delta
    seen.feed(event({"choices": [{"index": 0, "delta": {field: "y"}, "token_ids": [1, 2]}]}))
    assert seen.strange_delta
    assert seen.generated_tokens == 3


def test_an_error_ends_what_the_client_sees() -> None:
    seen = events_of()
    token = event({"choices": [choice(0, "x", None)]})
    error = event({"error": {"message": "EngineCore died", "code": 500}})
    assert chunks_of(seen.feed(token + error + token + DONE)) == chunks_of(token)
    assert (seen.error is not None, seen.finished, seen.generated_tokens) == (True, False, 1)
    assert seen.feed(token) == b""


@pytest.mark.parametrize(
    ("path", "error", "status"),
    [
        (COMPLETIONS, {"error": {"message": "no", "code": 400}}, 400),
        (CHAT, {"error": {"message": "no", "type": "NotFoundError", "code": 404}}, 404),
        (CHAT, {"error": {"message": "no"}}, 500),
        (MESSAGES, {"type": "error", "error": {"type": "api_error", "message": "no"}}, 500),
        (RESPONSES, {"type": "error", "code": "server_error", "message": "no"}, 500),
    ],
)
def test_an_error_event_is_told_with_its_status(path: str, error: dict[str, object], status: int) -> None:
    seen = events_of(path)
    assert seen.feed(event(error, "error")) == b""
    assert seen.error == EngineError(status, json.dumps(error, separators=(",", ":")).encode())
    assert not seen.finished


@pytest.mark.parametrize(
    "odd",
    [
        b": keep-alive\n\n",
        b"data: not json\n\n",
        b"data: [1, 2]\n\n",
        b"data: 7\n\n",
        b'data: "\xff"\n\n',
        b'data: {"choices": \n\n',
        b"retry: 3000\n\n",
        b"event: ping\n\n",
        b"id: 4\nevent: x\ndata: text\n\n",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_what_is_no_chunk_passes_unchanged(path: str, odd: bytes) -> None:
    seen = events_of(path)
    assert seen.feed(odd) == odd
    assert (seen.generated_tokens, seen.saw_token, seen.finished, seen.error) == (0, False, False, None)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=10))
def test_no_bytes_break_it(packets: list[bytes]) -> None:
    for path in (COMPLETIONS, RESPONSES):
        seen = events_of(path)
        for packet in packets:
            seen.feed(packet)
        seen.feed(b"\n\ndata: " + b"".join(packets).replace(b"\n", b"") + b"\n\n")
        assert seen.prompt_tokens is None


def test_a_named_event_keeps_its_name_and_loses_the_ids() -> None:
    out = events_of().feed(event({"choices": [choice(0, "x", [7])]}, "chunk"))
    assert out.startswith(b"event: chunk\ndata: {")
    assert json.loads(out.split(b"data: ")[1])["choices"][0]["token_ids"] is None


def test_events_of_many_megabytes() -> None:
    seen = events_of()
    prompt = list(range(1_000_000))
    stream = event({"choices": [choice(0, "x" * 8_000_000, [7], prompt_token_ids=prompt)]}) + DONE
    started = time.process_time()
    packets = [stream[at : at + 65536] for at in range(0, len(stream), 65536)]
    out = b"".join(seen.feed(packet) for packet in packets)
    assert time.process_time() - started < 5
    assert len(chunks_of(out)[0]["choices"][0]["text"]) == 8_000_000
    assert seen.prompt_tokens == 1_000_000
    assert seen.finished


@pytest.mark.parametrize(
    ("path", "answer", "counts"),
    [
        (COMPLETIONS, {"usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}, (3, 5)),
        (CHAT, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}, (3, 5)),
        (RESPONSES, {"usage": {"input_tokens": 3, "output_tokens": 5}}, (3, 5)),
        (MESSAGES, {"usage": {"input_tokens": 3, "output_tokens": 5}}, (3, 5)),
        (COMPLETIONS, {"usage": None}, (None, 0)),
        (COMPLETIONS, {}, (None, 0)),
    ],
)
def test_an_answer_in_one_piece(path: str, answer: dict[str, object], counts: tuple[int | None, int]) -> None:
    seen = events_of(path, stream=False)
    seen.whole(json.dumps(answer).encode())
    assert (seen.prompt_tokens, seen.generated_tokens) == counts
    assert seen.finished


@pytest.mark.parametrize("body", [b"", b"Internal Server Error", b"[]", b'"\xff"', b"{", b"[" * 100_000])
def test_an_answer_in_one_piece_that_is_no_object(body: bytes) -> None:
    seen = events_of(stream=False)
    seen.whole(body)
    assert seen.prompt_tokens is None
    assert not seen.finished
