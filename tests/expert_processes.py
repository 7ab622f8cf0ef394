"""Expert workers as plain processes, and the placement file that leads an engine to them: the split without Ray.

    with ExpertPlane(checkpoint, tmp_path) as plane:
        plane.publish(plane.start(shares=[3, 1]))
        with Engine(checkpoint, engine_args=plane.engine_args) as engine: ...

Each process is what a Serve replica is inside: `deployments.experts.host.ExpertHost`. One engine can be led from one
set of workers to the next by another `publish`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.config import Config, DispatchConfig, Dtype, ExpertsConfig, InternalTlsConfig, ModelConfig
from cluster.model.spec import load_model_spec
from cluster.plan.shares import split_shares
from monitoring.expert_meter import BatchSample, ExpertMeter
from monitoring.metrics import ExpertMetrics
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint

_REPOSITORY = Path(__file__).resolve().parents[1]


class ExpertPlane:
    """Starts expert processes for `checkpoint`; `folder` takes the placement file. On exit all processes end."""

    def __init__(
        self, checkpoint: Path, folder: Path, *, dtype: Dtype = "float32", dispatch: DispatchConfig | None = None,
        tls: InternalTlsConfig | None = None,
    ) -> None:  # fmt: skip
        self._spec = load_model_spec(checkpoint)
        self._dispatch = dispatch or DispatchConfig()
        self._config = Config(
            model=ModelConfig(path=checkpoint, dtype=dtype), experts=ExpertsConfig(threads=1), dispatch=self._dispatch,
            internal_tls=tls,
        )  # fmt: skip
        self._file = PlacementFile(folder / "placement")
        self._epoch = 0
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> ExpertPlane:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.communicate()

    @property
    def engine_args(self) -> Mapping[str, Any]:
        """What makes a vLLM engine use these experts."""
        settings = {
            "placement_file": str(self._file.path),
            "model_path": str(self._config.model.path),
            "dispatch": self._dispatch.model_dump(mode="json"),
            "internal_tls": self._config.internal_tls and self._config.internal_tls.model_dump(mode="json"),
        }
        return {"load_format": "deepsplit", "additional_config": {"deepsplit": settings}}

    def start(
        self, shares: Sequence[float], replicas: int = 1, metered: bool = True, form: str = "auto"
    ) -> tuple[WorkerEndpoint, ...]:
        """Start one process per share, its weights in `form` (`experts.dtype`), and wait until all listen; nobody uses
        them before `publish`.
        """
        experts_config = ExpertsConfig.model_validate({"threads": 1, "dtype": form})
        config = self._config.model_copy(update={"experts": experts_config})
        held = split_shares(self._spec.num_experts, shares, replicas)
        started = []
        for experts in held:
            assignment = dict.fromkeys(self._spec.moe_layers, experts)
            command = [sys.executable, "-m", "tests.expert_processes", config.model_dump_json()]
            process = subprocess.Popen(
                [*command, json.dumps(assignment), str(int(metered))],
                cwd=_REPOSITORY,
                env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"},  # as ExpertWorker
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            worker_id = uuid.uuid4().hex
            self._processes[worker_id] = process
            started.append((worker_id, process, assignment))
        endpoints = []
        for worker_id, process, assignment in started:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, f"an expert process ended with status {process.wait(10)}"
            endpoints.append(WorkerEndpoint(worker_id, address, assignment))
        return tuple(endpoints)

    def publish(self, workers: Sequence[WorkerEndpoint]) -> None:
        """From now on these workers, and no others, are the expert half."""
        self._epoch += 1
        self._file.write(PlacementTable.of(Stamp(1, self._epoch), tuple(workers)))

    def pid(self, worker: WorkerEndpoint) -> int:
        """Of its process."""
        return self._processes[worker.worker_id].pid

    def kill(self, worker: WorkerEndpoint) -> None:
        """SIGKILL, as the kernel's out-of-memory killer would; the placement file still names the worker."""
        process = self._processes.pop(worker.worker_id)
        process.kill()
        process.communicate()


class _NoMeter(ExpertMeter):
    def batch(self, sample: BatchSample) -> None: ...

    def gemms(self, rows_N: list[int]) -> None: ...

    def failed(self, outcome: str) -> None: ...


def _serve(config: Config, experts: Mapping[int, tuple[int, ...]], metered: bool) -> None:
    from deployments.experts.host import ExpertHost

    meter = (ExpertMeter if metered else _NoMeter)(ExpertMetrics(CollectorRegistry()))
    host = ExpertHost(config, experts, meter)
    print(host.start("127.0.0.1"), flush=True)
    sys.stdin.read()  # until the parent goes away
    host.stop(0)


if __name__ == "__main__":
    _serve(
        Config.model_validate_json(sys.argv[1]),
        {int(layer): tuple(experts) for layer, experts in json.loads(sys.argv[2]).items()},
        sys.argv[3] == "1",
    )
