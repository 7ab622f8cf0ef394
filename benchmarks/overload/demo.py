"""The demo model behind the whole application, started as `deepsplit up` starts it. For `benchmarks.overload`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.measuring.free_port import free_port
from cluster.config import AdmissionConfig, ClassObjective
from cluster.config.file import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "local.yaml"
MODEL = "deepsplit-demo"
SLOTS = 8
PROMPT_WORDS = (10, 60)  # of four hex digits: with the tenants' common beginnings some 30 to 400 tokens
OBJECTIVES = AdmissionConfig(
    system=ClassObjective(ttft_s=2.0, tpot_s=0.5),
    interactive=ClassObjective(ttft_s=5.0, tpot_s=0.5),
    batch=ClassObjective(ttft_s=20.0, tpot_s=0.5),
)
_START_S = 300.0
_STOP_S = 90.0  # the gateway's draining included


class DemoApplication:
    """Starts it with the example's configuration and waits until it is ready; stops it with SIGINT."""

    def __init__(self, admission: AdmissionConfig, keys_file: Path) -> None:
        example = load_config(EXAMPLE)
        port = free_port()
        gateway = {"port": port, "grpc_port": None, "keys_file": keys_file, "max_streams": 100_000}
        config = example.model_copy(
            update={
                "attention": example.attention.model_copy(update={"max_num_seqs": SLOTS}),
                "gateway": example.gateway.model_copy(update=gateway),
                "admission": admission,
            }
        )
        self.address = f"{config.gateway.host}:{port}"
        config_file = keys_file.with_suffix(".config.yaml")
        config_file.write_text(config.model_dump_json(exclude_unset=True))  # JSON is YAML
        # Beside a cluster that this user runs already. In a session of its own: Ctrl-C is for us, who then stop it.
        runtime = keys_file.parent / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "up", str(config_file)],
            env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)}, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _START_S
        try:
            while not self._ready():
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the application did not become ready: it says why on stderr")
                time.sleep(0.2)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, or 503
            return False

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(_STOP_S)
