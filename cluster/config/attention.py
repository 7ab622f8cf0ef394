"""The section `attention`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config.engine_args import refusals
from cluster.config.section import NodeSelector, PinCores, Section, conflict, conflicts
from cluster.config.vllm_arguments import VLLM_VERSION, EngineArguments


class AttentionAutoscaling(Section):
    """Serve sets the number of attention replicas by what clients ask for: admitted, waiting and refused requests."""

    min_replicas: int = Field(1, ge=1, description="Fewest replicas.")
    max_replicas: int = Field(ge=1, description="Most replicas.")
    target_occupancy: float = Field(0.7, gt=0, le=1, description="Fraction of a replica's decode slots, those at which "
                                                                 "steps are as fast as promised, that clients' "
                                                                 "requests are to fill on average.")
    upscale_delay_s: float = Field(30.0, ge=0, description="How long more must be wanted before there are more.")
    downscale_delay_s: float = Field(600.0, ge=0, description="How long fewer must be wanted before there are fewer.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise conflict("max_replicas", f"{self.max_replicas} is below min_replicas ({self.min_replicas}): raise it")
        return self


class AttentionConfig(Section):
    """Attention replicas: vLLM engines with everything but the routed experts."""

    replicas: int = Field(1, ge=1, description="Number of attention replicas; with autoscaling, at the start.")
    autoscaling: AttentionAutoscaling | None = Field(None, description="Let the load set the number of replicas, on a "
                                                                       "joined cluster with room for them.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where attention runs.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one replica that share its attention.")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus completion, in tokens; "
                                                              "the model's own bound if not set.")
    max_num_seqs: int = Field(64, ge=1, description="Most sequences in one engine step.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of one CPU replica, in GiB. "
                                                       "CUDA: gpu_memory_utilization in engine_args.")
    threads: int | None = Field(None, ge=1, description="Compute threads of one CPU replica; one per core, "
                                                       "within a CPU quota, if not set.")
    compile: bool = Field(False, description="Compile a CPU replica's attention half with torch.compile: faster steps, "
                                             "and a minute more for the first start with a model, which fills "
                                             "compile_cache. Needs a C++ compiler (g++). On CUDA vLLM always compiles.")
    compile_cache: Path = Field(Path("~/.cache/deepsplit/compile"), description="Folder in which compiled code stays "
                                                                    "between starts, on each node that has a replica.")
    pin_cores: PinCores = Field(
        "auto", description="Whether each CPU replica gets cores of its own: `auto` where its host has one for each "
                            "compute thread and one more, `always` (it does not start without), or `never`. Needs "
                            "attention.threads.")
    speculative_tokens: int = Field(0, ge=0, description="Tokens drafted per step by the checkpoint's own Multi-Token "
                                                         "Prediction layer; 0 turns speculative decoding off.")
    dialect: Literal["auto", "none"] = Field(
        "none", description="Parsers for tool calls and reasoning: `auto` takes those that the model's type and chat "
                            "template ask for, where they are known (`deepsplit validate` says which); engine_args has "
                            "the last word.")
    engine_args: EngineArguments = Field(
        default_factory=EngineArguments,
        description=f"More arguments of vLLM {VLLM_VERSION}'s engine and of its OpenAI application, such as "
                    "`gpu_memory_utilization`; the last section below lists those that are refused.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes attention replicas run on.")

    @model_validator(mode="after")
    def _pins_what_computes(self) -> Self:
        if self.pin_cores == "always" and self.device == "cuda":
            raise conflict("pin_cores", "is always, but attention runs on GPUs: leave it out")
        if self.pin_cores == "always" and self.threads is None:
            raise conflict("pin_cores", "is always, but the number of cores is not set: set attention.threads")
        return self

    @model_validator(mode="after")
    def _engine_args_can_work(self) -> Self:
        found = list(refusals(self.engine_args, self.device, self.compile, self.speculative_tokens))
        if found:
            raise conflicts(self, [(("engine_args", *path), message) for path, message in found])
        return self
