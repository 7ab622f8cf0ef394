"""Which errors of vLLM are told to the client as its own, over generators that fail as vLLM's does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from deployments.attention.request_faults import told_as_client_errors

CONSTRAINED = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
FREE = SamplingParams()


def output(tokens: list[int], finish: str | None) -> RequestOutput:
    one = CompletionOutput(0, "", tokens, None, None, finish_reason=finish)
    return RequestOutput("r", None, None, None, [one], finish is not None)


def seen(params: SamplingParams, *script: RequestOutput | Exception) -> list[RequestOutput]:
    async def generate(
        prompt: object, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    async def collect() -> list[RequestOutput]:
        return [one async for one in told_as_client_errors(generate)("p", params, "r")]

    return asyncio.run(collect())


def unexpected(cause: Exception) -> EngineGenerateError:
    error = EngineGenerateError()
    error.__cause__ = cause
    return error


def test_outputs_pass() -> None:
    outputs = [output([1], None), output([2], "stop")]
    assert seen(CONSTRAINED, *outputs) == outputs
    assert seen(FREE, *outputs) == outputs


@pytest.mark.parametrize("cause", [RecursionError("maximum recursion depth exceeded"), RuntimeError("nul")])
def test_a_library_that_gives_up_on_a_schema_is_the_clients_doing(cause: Exception) -> None:
    with pytest.raises(VLLMValidationError, match=f"structured output.*{cause}"):
        seen(CONSTRAINED, unexpected(cause))
    with pytest.raises(EngineGenerateError):
        seen(FREE, unexpected(cause))


def test_a_grammar_that_the_engine_core_cannot_compile_too() -> None:
    with pytest.raises(VLLMValidationError, match="cannot compile"):
        seen(CONSTRAINED, output([], "error"))
    with pytest.raises(VLLMValidationError, match="or follow"):
        seen(CONSTRAINED, output([7], "error"))  # an endless rule is found out at the first token
    assert len(seen(FREE, output([], "error"))) == 1


def test_an_error_after_the_first_token_is_the_engines() -> None:
    assert len(seen(CONSTRAINED, output([1], None), output([], "error"))) == 2
    with pytest.raises(EngineGenerateError):
        seen(CONSTRAINED, output([1], None), unexpected(RuntimeError("late")))


def test_a_dead_engine_is_nobodys_mistake() -> None:
    with pytest.raises(EngineDeadError):
        seen(CONSTRAINED, EngineDeadError())
