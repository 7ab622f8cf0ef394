"""Streams cut anywhere and continued: with the demo model's tokenizer, against the stream that nobody cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.errors import StreamLost
from deployments.gateway.detokenizer import ModelTokenizer
from deployments.gateway.outline import Outline, outline
from deployments.gateway.paths import CHAT, COMPLETIONS
from deployments.gateway.upstream.continuation import Continuation, why_not
from tests.unit.deployments.gateway.engine_stream import EOS, Engine, chunks_of, text_of

TEXTS = {
    "code": "def double(x):\n    return 2 * x  # twice\n",
    "multibyte": "héllo 🎉🎉 你好, 世界! naïve 👨‍👩‍👧 ﷽ end",
    "only emoji": "🎉🚀",
    "spaces": "a  b\n\n\t c   ",
    "replacement": "a\ufffdb\ufffd\ufffdc",
}


class Client:
    """One request, its stream and what has come out of it so far."""

    def __init__(self, model: ModelTokenizer, engine: Engine, path: str, **fields: object) -> None:
        asked = {"messages": [{"role": "user", "content": "?"}]} if path == CHAT else {"prompt": "?"}
        self.fields = {"model": "demo", "stream": True, "temperature": 0, "max_tokens": 500, **asked, **fields}
        self.body = json.dumps(self.fields).encode()
        self.stream = Continuation(path, outline(path, self.body), self.body, model.decode)
        self.engine = engine
        self.events = engine.stream(path, self.stream.upstream_body())
        self.got = b""

    def read(self, events: int | None = None) -> bool:
        """Read some events, or all. False once the stream has come to its end."""
        taken, self.events = (self.events, []) if events is None else (self.events[:events], self.events[events:])
        self.got += b"".join(self.stream.feed(event) for event in taken)
        return not self.stream.finished

    async def move(self) -> None:
        """The replica is lost, another one goes on."""
        assert self.stream.why_not_continuable is None
        path, body = await self.stream.continue_request(0)
        assert path == COMPLETIONS
        self.events = self.engine.stream(path, body)


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


@pytest.fixture
def model(demo_model: Path) -> ModelTokenizer:
    return ModelTokenizer(demo_model)


@pytest.fixture
def engine_of(tokenizer: Tokenizer) -> Callable[..., Engine]:
    def make(text: str, tokens_per_chunk: int = 1) -> Engine:
        answer = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        return Engine(tokenizer, tokenizer.encode("Say: é").ids, answer, tokens_per_chunk)

    return make


def uncut(model: ModelTokenizer, engine: Engine, path: str, **fields: object) -> Client:
    client = Client(model, engine, path, **fields)
    client.read()
    return client


def cuts(client: Client) -> Iterator[int]:
    """Every number of events after which the client has something, and tokens are still missing."""
    for events in range(1, len(client.events)):
        if any(json.loads(one[6:])["choices"][0]["finish_reason"] for one in client.events[:events]):
            return
        yield events


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 5])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_stream_cut_anywhere_gives_the_same_text_and_counts(
    model: ModelTokenizer, engine_of: Callable[..., Engine], path: str, tokens_per_chunk: int, text: str
) -> None:
    async def scenario() -> None:
        engine = engine_of(text, tokens_per_chunk)
        options = {"include_usage": True}
        whole = uncut(model, engine, path, stream_options=options)
        assert text_of(whole.got) == text
        assert whole.stream.generated_tokens == len(engine.answer)
        for cut in cuts(Client(model, engine, path)):
            client = Client(model, engine, path, stream_options=options)
            assert client.read(cut)
            await client.move()
            client.read()
            assert text_of(client.got) == text, cut
            assert client.stream.generated_ids == list(engine.answer), cut
            assert client.stream.generated_tokens == len(engine.answer), cut
            assert client.stream.prompt_tokens == len(engine.prompt), cut
            assert chunks_of(client.got)[-1]["usage"] == chunks_of(whole.got)[-1]["usage"], cut
            assert client.got.count(b"[DONE]") == 1
            assert client.stream.finished

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_cut_again_and_again(model: ModelTokenizer, engine_of: Callable[..., Engine], path: str) -> None:
    async def scenario() -> None:
        text = TEXTS["multibyte"]
        engine = engine_of(text)
        client = Client(model, engine, path, stream_options={"include_usage": True})
        # Enough events each time for a whole character, or it would never get further.
        moves = 0
        while client.read(7) and not client.stream.finished_choices:
            await client.move()
            moves += 1
        client.read()
        assert moves > 3
        assert text_of(client.got) == text
        usage = chunks_of(client.got)[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(engine.prompt), len(engine.answer))

    asyncio.run(scenario())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_a_model_says(model: ModelTokenizer, tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Bytes that are no text and special tokens too: exact, or refused."""
    prompt = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
    answer = data.draw(st.lists(st.integers(2, 300), min_size=2, max_size=40))
    engine = Engine(tokenizer, prompt, answer, data.draw(st.integers(1, 3)))
    path = data.draw(st.sampled_from([COMPLETIONS, CHAT]))
    fields = {"skip_special_tokens": data.draw(st.booleans()), "max_tokens": len(answer)}

    async def scenario() -> None:
        fresh = ModelTokenizer(model._file.parent)  # tasks of another event loop are of no use
        whole = text_of(uncut(fresh, engine, path, **fields).got)
        client = Client(fresh, engine, path, **fields)
        client.read(data.draw(st.sampled_from(list(cuts(client)) or [len(client.events)])))
        if not client.stream.finished_choices:
            try:
                await client.move()
            except StreamLost:
                return
            client.read()
        assert text_of(client.got) == whole

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("usage", [None, {"include_usage": True}])
def test_a_loss_after_the_last_token_is_closed_here(
    model: ModelTokenizer, engine_of: Callable[..., Engine], path: str, usage: object
) -> None:
    engine = engine_of("some words")
    whole = uncut(model, engine, path, stream_options=usage)
    client = Client(model, engine, path, stream_options=usage)
    client.read(len(client.events) - (3 if usage else 2))
    assert client.stream.closing() is None  # a token is missing
    client.read(1)
    closing = client.stream.closing()
    assert closing is not None
    assert chunks_of(client.got + closing) == chunks_of(whole.got)
    assert closing.endswith(b"data: [DONE]\n\n")
    assert client.stream.finished


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}])
def test_one_finished_choice_of_two_does_not_close_the_stream(model: ModelTokenizer, fields: dict[str, object]) -> None:
    body = json.dumps({"stream": True, **fields}).encode()
    stream = Continuation(COMPLETIONS, outline(COMPLETIONS, body), body, model.decode)
    for index in (0, 1):
        assert stream.closing() is None
        choice = {"index": index, "text": "x", "token_ids": [5], "prompt_token_ids": [1], "finish_reason": "length"}
        stream.feed(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    assert stream.closing() == b"data: [DONE]\n\n"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_continued_chunk_looks_like_those_before_it(
    model: ModelTokenizer, engine_of: Callable[..., Engine], path: str
) -> None:
    async def scenario() -> None:
        engine = engine_of(TEXTS["code"])
        options = {"include_usage": True, "continuous_usage_stats": True}
        whole = uncut(model, engine, path, stream_options=options)
        client = Client(model, engine, path, stream_options=options)
        client.read(5)
        await client.move()
        client.read()
        for ours, theirs in zip(chunks_of(client.got), chunks_of(whole.got), strict=True):
            for choices in (ours["choices"], theirs["choices"]):
                for choice in choices:  # null or absent
                    choice.pop("prompt_token_ids", None)
                    choice.pop("stop_reason", None)
            ours.pop("prompt_token_ids", None)
            theirs.pop("prompt_token_ids", None)
            assert ours == theirs
        assert b'token_ids":[' not in client.got.replace(b" ", b"")

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_asks_for_ids_gets_each_once(
    model: ModelTokenizer, engine_of: Callable[..., Engine], path: str
) -> None:
    async def scenario() -> None:
        engine = engine_of(TEXTS["code"])
        for cut in cuts(Client(model, engine, path)):
            client = Client(model, engine, path, return_token_ids=True)
            client.read(cut)
            await client.move()
            client.read()
            chunks = chunks_of(client.got)
            ids = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
            assert ids == list(engine.answer), cut
            holders = [holder for chunk in chunks for holder in (chunk, *chunk["choices"])]
            prompts = [holder["prompt_token_ids"] for holder in holders if holder.get("prompt_token_ids")]
            assert prompts == [list(engine.prompt)], cut

    asyncio.run(scenario())


def test_ids_within_a_character_that_the_client_has_are_not_taken_back(
    model: ModelTokenizer, engine_of: Callable[..., Engine]
) -> None:
    async def scenario() -> None:
        engine = engine_of("🎉")
        client = Client(model, engine, COMPLETIONS, return_token_ids=True)
        client.read(2)
        with pytest.raises(StreamLost, match="middle of a character"):
            await client.stream.continue_request(0)

    asyncio.run(scenario())


def continued(
    model: ModelTokenizer, engine: Engine, path: str, context_tokens: int = 0, **fields: object
) -> dict[str, object]:
    """What the second replica is asked for after four chunks."""
    client = Client(model, engine, path, **fields)
    client.read(4)
    return json.loads(asyncio.run(client.stream.continue_request(context_tokens))[1])


def test_what_is_left_to_generate(model: ModelTokenizer, engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(TEXTS["code"])  # four events of a chat are three tokens
    assert continued(model, engine, COMPLETIONS, max_tokens=10, min_tokens=6)["max_tokens"] == 6
    assert continued(model, engine, COMPLETIONS, max_tokens=10, min_tokens=6)["min_tokens"] == 2
    assert continued(model, engine, COMPLETIONS, max_tokens=10, min_tokens=3)["min_tokens"] == 0
    assert continued(model, engine, COMPLETIONS, max_tokens=10, min_tokens="6")["min_tokens"] == 2
    assert continued(model, engine, COMPLETIONS, max_tokens=None)["max_tokens"] == 12  # null is the default of 16 too
    assert continued(model, engine, COMPLETIONS, max_tokens=9, max_completion_tokens=5)["max_tokens"] == 5  # 9 - 4
    assert continued(model, engine, CHAT, max_tokens=9, max_completion_tokens=7)["max_tokens"] == 4
    assert continued(model, engine, CHAT, max_tokens=9)["max_tokens"] == 6
    left = 100 - len(engine.prompt) - 3  # a chat without a bound fills the context, and the engine's default is 16
    assert continued(model, engine, CHAT, 100, max_tokens=None)["max_tokens"] == left


def test_the_default_bound_of_completions_holds(model: ModelTokenizer, engine_of: Callable[..., Engine]) -> None:
    async def scenario() -> None:
        engine = engine_of(TEXTS["multibyte"])
        fields = {"prompt": "?", "stream": True, "temperature": 0}
        body = json.dumps(fields).encode()
        stream = Continuation(COMPLETIONS, outline(COMPLETIONS, body), body, model.decode)
        for event in engine.stream(COMPLETIONS, stream.upstream_body())[:4]:
            stream.feed(event)
        assert json.loads((await stream.continue_request(0))[1])["max_tokens"] == 12

    asyncio.run(scenario())


def test_sampling_is_carried_and_the_prompt_is_not_made_again(
    model: ModelTokenizer, engine_of: Callable[..., Engine]
) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1}
    others = {"logit_bias": {"5": -1}, "stop_token_ids": [9], "ignore_eos": True, "user": "u", "priority": 3}
    carried = continued(model, engine_of("a b c d e f"), CHAT, add_generation_prompt=True, **sampling, **others)
    assert carried | sampling | others == carried
    assert {"messages", "add_generation_prompt"}.isdisjoint(carried)


def outlined(path: str, fields: dict[str, object]) -> Outline:
    bound = {"max_tokens": 9} if path == "/v1/messages" else {}
    return outline(path, json.dumps({"stream": True, **bound, **fields}).encode())


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        ("/v1/responses", {}, "keeps state in the replica"),
        ("/v1/messages", {}, "keeps state in the replica"),
        (COMPLETIONS, {"n": 2}, "several choices"),
        (COMPLETIONS, {"best_of": 2}, "several choices"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "several prompts"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "several prompts"),
        (COMPLETIONS, {"echo": True}, "echoed"),
        (COMPLETIONS, {"stop": "x"}, "stop string"),
        (COMPLETIONS, {"stop": ["x"]}, "stop string"),
        (COMPLETIONS, {"seed": 1}, "seed"),
        (COMPLETIONS, {"seed": 0, "temperature": 0.5}, "seed"),
        (COMPLETIONS, {"logprobs": 1}, "log-probabilities"),
        (COMPLETIONS, {"logprobs": 0}, "log-probabilities"),
        (COMPLETIONS, {"logprobs": False}, "log-probabilities"),  # which vLLM reads as 0
        (CHAT, {"logprobs": True}, "log-probabilities"),
        (CHAT, {"top_logprobs": 2}, "log-probabilities"),
        (CHAT, {"presence_penalty": 0.1}, "penalties"),
        (CHAT, {"frequency_penalty": -0.1}, "penalties"),
        (CHAT, {"tools": [{"type": "function"}]}, "tool call"),
        (CHAT, {"response_format": {"type": "json_object"}}, "grammar"),
        (CHAT, {"structured_outputs": {"regex": "a"}}, "`structured_outputs`"),
        (CHAT, {"use_beam_search": True}, "beams"),
        (CHAT, {"prompt_logprobs": 1}, "`prompt_logprobs`"),
        (CHAT, {"kv_transfer_params": {}}, "`kv_transfer_params`"),
        (CHAT, {"bad_words": ["x"]}, "`bad_words`"),
    ],
)
def test_what_cannot_be_continued_says_why(path: str, fields: dict[str, object], reason: str) -> None:
    why = why_not(path, outlined(path, fields))
    assert why is not None
    assert reason in why


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": [1, 2], "n": 1, "best_of": 1, "echo": False, "logprobs": None}),
        (COMPLETIONS, {"seed": 1, "temperature": 0}),
        (CHAT, {"prompt": ["a", "b"]}),  # of another path, and ignored here
        (CHAT, {"logprobs": False, "top_logprobs": 0, "tools": [], "response_format": {"type": "text"}}),
        (CHAT, {"stop": [], "presence_penalty": 0.0, "frequency_penalty": 0, "temperature": 1.5, "top_p": 0.3}),
    ],
)
def test_what_changes_nothing_is_no_obstacle(path: str, fields: dict[str, object]) -> None:
    assert why_not(path, outlined(path, fields)) is None


def test_what_the_stream_shows_can_be_an_obstacle(model: ModelTokenizer, engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("some words")
    client = Client(model, engine, CHAT)
    assert client.stream.why_not_continuable == "the replica sent no token ids"
    client.read(2)
    assert client.stream.why_not_continuable is None
    client.stream.feed(b'data: {"choices": [{"index": 0, "delta": {"reasoning": "hm"}, "token_ids": [7]}]}\n\n')
    assert "reasoning" in str(client.stream.why_not_continuable)

    body = b'{"stream": true, "echo": true, "prompt": "a"}'
    echo = Continuation(COMPLETIONS, outline(COMPLETIONS, body), body, model.decode)
    assert echo.why_not_continuable == "the prompt is echoed"


def test_an_error_of_the_engine_is_as_good_as_a_loss(model: ModelTokenizer, engine_of: Callable[..., Engine]) -> None:
    async def scenario() -> None:
        engine = engine_of(TEXTS["code"])
        client = Client(model, engine, COMPLETIONS)
        error = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\ndata: [DONE]\n\n'
        client.got += client.stream.feed(b"".join(client.events[:3]) + error)  # one packet
        assert client.stream.error is not None
        assert not client.stream.finished
        assert b"[DONE]" not in client.got
        await client.move()
        client.read()
        assert text_of(client.got) == TEXTS["code"]
        assert client.stream.finished

    asyncio.run(scenario())


def test_half_an_event_of_the_lost_replica_is_forgotten(
    model: ModelTokenizer, engine_of: Callable[..., Engine]
) -> None:
    async def scenario() -> None:
        engine = engine_of(TEXTS["code"])
        client = Client(model, engine, CHAT)
        client.read(4)
        client.got += client.stream.feed(client.events[0][:-1])
        await client.move()
        client.read()
        assert text_of(client.got) == TEXTS["code"]

    asyncio.run(scenario())


def test_the_tokenizer_is_loaded_once_and_again_after_a_failure(demo_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        tokens = ModelTokenizer(demo_model)
        assert await asyncio.gather(tokens.count(b"def f", 9), tokens.count(b"def f", 9)) == [3, 3]  # with <|bos|>
        assert await tokens.count("é".encode()[:1], 9) > 1  # no text, still counted
        assert await tokens.decode([0, 319], True) == "def"
        assert await tokens.decode([0, 319], False) == "<|bos|>def"

        late = ModelTokenizer(tmp_path)
        with pytest.raises(Exception, match="No such file"):
            await late.count(b"x", 9)
        (tmp_path / "tokenizer.json").symlink_to(demo_model / "tokenizer.json")
        assert await late.count(b"def f", 9) == 3

    asyncio.run(scenario())


def test_a_long_text_is_counted_until_there_is_enough(demo_model: Path) -> None:
    async def scenario() -> None:
        tokens = ModelTokenizer(demo_model)
        text = b"def split(self, word):\n    return word.split()\n" * 20_000
        whole = len(Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode(text.decode()).ids)
        assert abs(await tokens.count(text, 10**9) - whole) <= len(text) // 65536
        assert 1_000 < await tokens.count(text, 1_000) < whole / 5

    asyncio.run(scenario())
