"""vLLM's engine and its OpenAI application in this process, as `vllm serve` builds them, without its HTTP server."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Mapping
from types import SimpleNamespace
from typing import Any, get_args

from pydantic import TypeAdapter
from starlette.types import ASGIApp
from vllm import RequestOutput, SamplingParams

from cluster.config import Config
from deployments.attention.request_faults import told_as_client_errors
from deployments.attention.vllm_internals import (
    AsyncEngineArgs,
    AsyncLLM,
    FrontendArgs,
    ReasoningParserManager,
    ToolParserManager,
    UsageContext,
    build_app,
    current_platform,
    init_app_state,
)


class AttentionEngine(AsyncLLM):
    """vLLM's client of an engine in a child process; structured output that cannot be compiled is a client's error."""

    def generate(
        self, prompt: object, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Return the outputs of one request, as `AsyncLLM.generate` does."""
        return told_as_client_errors(super().generate)(prompt, sampling_params, request_id, **options)


def start_engine(
    config: Config, args: Mapping[str, Any], before_processes: Callable[[], None]
) -> tuple[AttentionEngine, Namespace]:
    """Start the engine that `args` (see `engine_args`) describe, and return it with what its application is built from.

    `before_processes` is called when the configuration is complete and no process has been started yet. Blocks until
    the engine is ready. Raises what vLLM raises: TimeoutError when the engine is not ready in time.
    """
    engine_args, frontend_args = parse_args(config, args)
    if frontend_args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(frontend_args.tool_parser_plugin)
    if engine_args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(engine_args.reasoning_parser_plugin)
    vllm_config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    parallel = vllm_config.parallel_config
    if current_platform.is_cpu() and parallel.world_size == 1:
        # vLLM gives a CPU rank its own process only to set OpenMP's environment before torch loads; the replica has set
        # it by then. Saves a second import of vLLM (10 s and 0.5 GB) and a hop in shared memory per step. The
        # configuration's own check turns "uni" back into "mp", so it is set after that.
        parallel.distributed_executor_backend = "uni"
    before_processes()
    engine = AttentionEngine.from_vllm_config(vllm_config, enable_log_requests=engine_args.enable_log_requests)
    return engine, Namespace(**(vars(frontend_args) | vars(engine_args)))


async def openai_app(engine: AttentionEngine, args: Namespace) -> ASGIApp:
    """Return vLLM's OpenAI application for a started engine."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    # When the engine is dead, vLLM's error handler tells its own HTTP server to stop. Ours goes on, so that the answer
    # is the engine's error; Serve replaces the replica because its health check fails.
    app.state.server = SimpleNamespace()
    asgi: ASGIApp = app
    return asgi


def parse_args(config: Config, args: Mapping[str, Any]) -> tuple[AsyncEngineArgs, FrontendArgs]:
    """Return vLLM's argument objects: `args` by name, nested mappings as vLLM's own settings classes.

    Raises pydantic's ValidationError for a mapping that such a class refuses, TypeError for an unknown name.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(AsyncEngineArgs)}
    of_frontend = {field.name for field in dataclasses.fields(FrontendArgs)}
    frontend = {name: value for name, value in args.items() if name in of_frontend}
    engine = {name: _parsed(value, kinds.get(name)) for name, value in args.items() if name not in of_frontend}
    names = [config.model.served_name, *config.model.aliases]
    model = str(config.model.path)
    return AsyncEngineArgs(model=model, served_model_name=names, **engine), FrontendArgs(**frontend)


def _parsed(value: Any, kind: Any) -> Any:
    """`value`, as an object of the settings class that `kind` names, if it is a mapping and `kind` names one."""
    classes = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and dataclasses.is_dataclass(one)]
    return TypeAdapter(classes[0]).validate_python(value) if isinstance(value, dict) and classes else value
