"""Engine errors that are the request's own fault are told to its client as such: 400 and why, rather than 500.

vLLM 0.32 answers 500 where the library that compiles a grammar, a schema or a regular expression gives up in a way that
vLLM does not expect (endless recursion, a nul character), in the API process or in the engine core.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm import RequestOutput, SamplingParams

from deployments.attention.vllm_internals import EngineGenerateError, VLLMValidationError

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]


def told_as_client_errors(generate: Generate) -> Generate:
    """`AsyncLLM.generate`, which raises VLLMValidationError for structured output that cannot be compiled."""

    async def checked(
        prompt: object, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        constrained = sampling_params.structured_outputs is not None
        generated = False
        try:
            async with aclosing(generate(prompt, sampling_params, request_id, **options)) as outputs:
                async for output in outputs:
                    if constrained and not generated and _failed(output):
                        raise _refusal("the engine cannot compile or follow it")
                    generated = True
                    yield output
        except EngineGenerateError as error:
            if constrained and not generated and error.__cause__ is not None:
                raise _refusal(f"{type(error.__cause__).__name__}: {error.__cause__}") from error
            raise

    return checked


def _failed(output: RequestOutput) -> bool:
    return any(one.finish_reason == "error" for one in output.outputs)


def _refusal(why: str) -> VLLMValidationError:
    return VLLMValidationError(
        f"the request's structured output (schema, regex, grammar or choices) is not usable: {why}"
    )
