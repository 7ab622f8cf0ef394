"""The section `dispatch`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config.section import AutoDtype, Section, conflict


class DispatchConfig(Section):
    """The token dispatcher between the two halves."""

    dispatch_dtype: AutoDtype | Literal["float8_e4m3fn"] = Field(
        "auto", description="Dtype of hidden states on their way to the experts; `auto` takes the model's. "
                            "`float8_e4m3fn` has one float32 scale per 128 values, as DeepSeek-V3 dispatches: half the "
                            "bytes of bfloat16, each value off by at most 1/16 of itself.")
    combine_dtype: AutoDtype = Field(
        "auto", description="Dtype of expert outputs on their way back; `auto` takes the model's.")
    max_message_mib: int = Field(64, ge=1, le=1024, description="Largest message on the expert plane, in MiB; "
                                                                "longer batches are sent in pieces.")
    batch_rows: int = Field(1024, ge=8, description="Most rows that a worker computes in one turn; longer requests are "
                                                    "computed in slices, between those of others.")
    max_streams: int = Field(1024, ge=1, description="Streams that an expert worker takes at once: one of each rank of "
                                                     "each attention replica.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Longest wait for a connection to a worker.")
    call_timeout_s: float = Field(30.0, gt=0, description="Longest wait for one worker's reply before its rows are "
                                                          "sent to another holder.")
    dispatch_timeout_s: float = Field(90.0, gt=0, description="Longest life of one layer's dispatch, retries included.")
    keepalive_interval_s: float = Field(1.0, gt=0, description="How often an idle connection is probed.")
    keepalive_timeout_s: float = Field(2.0, gt=0, description="Silence after a probe that makes a worker lost "
                                                              "(hung, or cut off).")
    hedge_after_s: float = Field(0.3, gt=0, description="Least time after which a reply is late, if it also takes much "
                                                        "longer than usual: its rows then go to another holder, where "
                                                        "there is one, in at most 5 % of the dispatches.")
    lost_worker_pause_s: float = Field(10.0, gt=0, description="How long a lost worker gets no rows while others hold "
                                                               "its experts.")
    reconnect_interval_s: float = Field(0.2, gt=0, description="How often a lost worker is tried again while nobody "
                                                               "else holds its experts.")
    on_uncovered: Literal["wait", "degrade", "fail"] = Field(
        "wait", description="When no live worker holds an expert: wait for one; go on at once without it, with the "
                            "weights of a token's other experts scaled up (a token with none left waits); or fail at "
                            "once (the engine's requests fail, and it restarts).")
    uncovered_timeout_s: float = Field(60.0, ge=0, description="Longest wait for a holder to come back, within "
                                                               "dispatch_timeout_s.")

    @model_validator(mode="after")
    def _waits_fit(self) -> Self:
        if self.call_timeout_s >= self.dispatch_timeout_s:
            raise conflict("call_timeout_s", f"must be below dispatch.dispatch_timeout_s ({self.dispatch_timeout_s}), "
                                             f"or a silent worker's rows are never sent to another holder")
        if self.uncovered_timeout_s > self.dispatch_timeout_s:
            raise conflict("uncovered_timeout_s", f"must not be above dispatch.dispatch_timeout_s "
                                                  f"({self.dispatch_timeout_s}), which bounds every wait")
        return self
