"""What operators set for the cluster as a whole: the sections `monitoring`, `logging` and `ray`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config.section import Section, conflict


class MonitoringConfig(Section):
    """What operators see (docs/observability.md)."""

    port: int = Field(9400, ge=0, le=65472, description="First port for scrape targets: each process takes the first "
                                                        "free one of 64 from here on; 0: any free port.")
    host: str | None = Field(None, description="Address that scrape targets listen on; loopback on a local cluster, "
                                               "the node's own address on a joined one, if not set.")
    expert_load: Literal["top", "full"] = Field(
        "top", description="Per-expert metrics: the fullest 8 experts of each layer, or the full matrix of layers and "
                           "experts (a DeepSeek-V3: 29,696 series more per attention replica).")


class LoggingConfig(Section):
    """What every process writes to its log file, see docs/observability.md."""

    format: Literal["text", "json"] = Field("text", description="Text for people, or one JSON object per line.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe lines that are written. `debug` is for deepsplit's own lines; libraries stay "
                            "at info, because their debug lines may hold prompts.")
    prompts: bool = Field(False, description="Also write each request's body, prompt included, as a debug line of the "
                                             "gateway. API keys are never written.")

    @model_validator(mode="after")
    def _says_all_that_is_asked_for(self) -> Self:
        if self.prompts and self.level != "debug":
            raise conflict("prompts", f"request bodies are debug lines, and logging.level is {self.level}: set "
                                       "logging.level: debug, or leave prompts out")
        return self

    @property
    def of_serve(self) -> dict[str, str | bool]:
        """For `logging_config` of Ray Serve: its own lines, before and beside those of our processes."""
        level = "INFO" if self.level == "debug" else self.level.upper()
        # An access line per heartbeat and health check helps nobody; the gateway has its own.
        return {"encoding": self.format.upper(), "log_level": level, "enable_access_log": False}


class RayConfig(Section):
    """The Ray cluster that everything runs on."""

    address: str | None = Field(None, description="Existing cluster to join, such as `auto` or host:port; "
                                                  "a local one is started (and stopped) if not set.")
    num_cpus: int | None = Field(None, ge=1, description="Logical CPUs of a local cluster; what the processes ask for "
                                                         "if not set.")
    start_timeout_s: float = Field(600.0, gt=0, description="Longest wait until everything is ready.")
    stop_timeout_s: float = Field(20.0, gt=0, description="Longest wait for a clean stop, once requests have drained, "
                                                          "before processes are killed.")
