"""The section `experts`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config.section import NodeSelector, PinCores, Section, conflict


class ExpertAutoscaling(Section):
    """As many expert workers as the load asks for, by the fraction of their time that they compute. They must be able
    to load and drop experts while they serve: on CPU, with experts.take_over.
    """

    min_workers: int = Field(1, ge=1, description="Fewest workers.")
    max_workers: int = Field(ge=1, description="Most workers.")
    target_busy: float = Field(0.6, gt=0, le=1, description="Fraction of its time that a worker is to compute, on "
                                                            "average.")
    upscale_delay_s: float = Field(30.0, ge=0, description="How long more must be wanted before there are more.")
    downscale_delay_s: float = Field(600.0, ge=0, description="How long fewer must be wanted before there are fewer.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_workers < self.min_workers:
            raise conflict("max_workers", f"{self.max_workers} is below min_workers ({self.min_workers}): raise it")
        return self


class Rebalance(Section):
    """Experts move to where their load is served soonest, while they serve. For that all expert workers must be able to
    load and drop experts: on CPU, with experts.take_over.
    """

    enabled: bool = Field(True, description="Whether they do.")
    interval_s: float = Field(60.0, gt=0, description="How often the directory asks whether moves would pay.")
    threshold: float = Field(0.05, gt=0, lt=1, description="Part of the time that experts take in a step, by the load "
                                                           "of lately, that moves must save.")
    budget_gib: float = Field(4.0, gt=0, description="Most that one round of moves may load, beside copies that "
                                                     "replicas_per_expert asks for.")
    headroom: float = Field(0.25, ge=0, description="How much more than its first share a worker may hold, as far as "
                                                    "its host has free memory; more of it means more copies of hot "
                                                    "experts, and more experts on fast workers.")


class ExpertPool(Section):
    """Some of the expert workers, on nodes of one kind."""

    name: str = Field(pattern="^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$", description="Name, unique among the pools.")
    workers: int = Field(ge=1, description="Number of its workers.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where its experts compute.")
    threads: int = Field(1, ge=1, description="Compute threads of one of its CPU workers.")
    pin_cores: PinCores = Field("auto", description="Whether each of its CPU workers gets cores of its own, as "
                                                    "experts.pin_cores.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes its workers run on.")
    autoscaling: ExpertAutoscaling | None = Field(None, description="Let the load set the number of workers, on a "
                                                                    "joined cluster with room for them.")


class ExpertsConfig(Section):
    """Expert workers: routed experts only, stateless between calls."""

    workers: int = Field(2, ge=1, description="Number of expert workers; at the start, where it can change.")
    replicas_per_expert: int = Field(1, ge=1, description="How many workers hold each expert (for failover and load).")
    shares: tuple[float, ...] | None = Field(
        None, description="Relative share of the experts per worker, such as [3, 1]; equal shares if not set.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where experts compute.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="How workers hold and compute the experts. `auto`: as stored, so FP8 stays FP8 (on CUDA "
                            "from compute capability 8.9 on), anything else takes the model's dtype. `int8` (CPU): "
                            "quantised when loaded, one scale per row: half of bfloat16's memory, and faster.")
    threads: int = Field(1, ge=1, description="Compute threads of one CPU worker; a GPU worker copies rows with them.")
    pin_cores: PinCores = Field(
        "auto", description="Whether each CPU worker gets cores of its own: `auto` where its host has one for each "
                            "compute thread and one more, `always` (it does not start without), or `never`.")
    host: str | None = Field(None, description="Address that workers listen on; loopback on a local cluster, "
                                               "the node's own address on a joined one, if not set.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes expert workers run on.")
    pools: tuple[ExpertPool, ...] = Field((), description="Workers on different kinds of nodes, such as GPU and CPU "
                                                          "hosts side by side.")
    autoscaling: ExpertAutoscaling | None = Field(None, description="Let the load set the number of workers, on a "
                                                                    "joined cluster with room for them.")
    max_per_node: int | None = Field(None, ge=1, description="Most expert workers on one node; Ray spreads them over "
                                                             "the nodes as evenly as it can if not set.")
    take_over: bool = Field(True, description="Whether CPU workers load, while they serve, experts that no other "
                                              "worker holds any more or is to hold on to, as far as memory is free.")
    from_peers: bool = Field(True, description="Whether CPU workers load experts also from workers on other hosts "
                                               "that hold them in the same form, at the same time as from disk: the "
                                               "faster gives more.")
    rebalance: Rebalance = Field(default_factory=Rebalance, description="When experts move with their load.")
    hand_over_timeout_s: float = Field(60.0, ge=0, description="How long a worker that is stopped goes on serving "
                                                               "until other workers hold what only it holds.")
    heartbeat_interval_s: float = Field(1.0, gt=0, description="How often a worker reports to the directory.")
    heartbeat_timeout_s: float = Field(5.0, gt=0, description="Silence after which a worker is taken as lost.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.replicas_per_expert > self.workers:
            raise conflict("replicas_per_expert", f"{self.replicas_per_expert} copies of each expert need as many "
                                                   f"workers, but experts.workers is {self.workers}")
        if self.shares is not None and len(self.shares) != self.workers:
            raise conflict("shares", f"has {len(self.shares)} entries, but experts.workers is {self.workers}: "
                                      f"give one share per worker")
        if self.shares is not None and min(self.shares) <= 0:
            raise conflict("shares", f"every share must be above 0, but they are {list(self.shares)}")
        if self.heartbeat_timeout_s <= self.heartbeat_interval_s:
            raise conflict("heartbeat_timeout_s", f"must be above experts.heartbeat_interval_s "
                                                   f"({self.heartbeat_interval_s}), or every worker is always lost")
        return self

    @model_validator(mode="after")
    def _pins_what_computes(self) -> Self:
        if self.device == "cuda" and self.pin_cores == "always":
            raise conflict("pin_cores", "is always, but these workers compute on GPUs: leave it out")
        for position, pool in enumerate(self.pools):
            if pool.device == "cuda" and pool.pin_cores == "always":
                raise conflict(("pools", position, "pin_cores"), "is always, but this pool computes on GPUs: leave it "
                                                                 "out")
        return self

    @model_validator(mode="after")
    def _pools_are_all_workers(self) -> Self:
        if not self.pools:
            return self
        for name in ("device", "threads", "pin_cores", "placement", "autoscaling"):
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise conflict(name, "is set per pool where there are pools: move it into experts.pools")
        total, names = sum(pool.workers for pool in self.pools), {pool.name for pool in self.pools}
        if total != self.workers:
            raise conflict("pools", f"have {total} workers, but experts.workers is {self.workers}: make them equal")
        if len(names) != len(self.pools):
            raise conflict("pools", "two have the same name: give each its own")
        return self

    @model_validator(mode="after")
    def _dtype_of_the_device(self) -> Self:
        devices = {pool.device for pool in self.pools} or {self.device}
        if self.dtype == "int8" and "cuda" in devices:
            raise conflict("dtype", "int8 runs on CPU workers only: set bfloat16, or move all experts to CPU workers")
        return self

    @model_validator(mode="after")
    def _scales_what_can_change(self) -> Self:
        sections: list[tuple[tuple[str | int, ...], ExpertsConfig | ExpertPool]] = [(("autoscaling",), self)]
        sections += [(("pools", at, "autoscaling"), pool) for at, pool in enumerate(self.pools)]
        for path, section in sections:
            scaling = section.autoscaling
            if scaling is None:
                continue
            if section.device == "cuda":
                raise conflict(path, "needs workers that load and drop experts while they serve, and those on GPUs do "
                                     "not: leave it out, and give them the number of workers that they need at most")
            if not self.take_over:
                raise conflict(path, "needs workers that load and drop experts while they serve, and experts.take_over "
                                     "is false: leave one of the two out")
            if not scaling.min_workers <= section.workers <= scaling.max_workers:
                raise conflict(path, f"is for {scaling.min_workers} to {scaling.max_workers} workers, but workers is "
                                     f"{section.workers}: put it between the two")
        return self

    @model_validator(mode="after")
    def _always_has_enough(self) -> Self:
        sections: tuple[ExpertsConfig | ExpertPool, ...] = self.pools or (self,)
        least = sum(one.workers if one.autoscaling is None else one.autoscaling.min_workers for one in sections)
        if self.replicas_per_expert > least:
            raise conflict("replicas_per_expert", f"{self.replicas_per_expert} copies of each expert need as many "
                                                   f"workers, but with autoscaling there may be {least}: raise "
                                                   f"min_workers")
        return self

    def worker_shares(self) -> tuple[float, ...]:
        """One share per worker, equal ones if none are set."""
        return self.shares if self.shares is not None else (1.0,) * self.workers
