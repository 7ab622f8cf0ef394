"""The process that talks to Ray: `python -m cluster.launch.driver`. A child of the supervisor, which can therefore end
it at any moment, even in the middle of `ray.init`.

A job comes in as one line of JSON on stdin, events go out as lines of JSON on the file descriptor it names. stdin then
is the lifeline: a line that says `stop` ends the application in good order; its end means that the supervisor is gone,
and the driver ends everything itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_type_hints

from cluster.config import Config
from cluster.errors import CheckpointError, ConfigError, DeepsplitError, PlanError, StartupError
from cluster.launch.processes import end_all
from cluster.plan.compute_processes import plan_whole_host
from cluster.plan.host_cores import keep_to, this_host

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APP = "deepsplit"  # Serve application
DIRECTORY = "Directory"  # Serve deployment that knows both planes
GATEWAY = "gateway"  # Serve deployment that clients talk to
_POLL_S = 0.5
_CALL_TIMEOUT_S = 10.0
# The object store carries only Serve's requests between processes; Ray's own floor is 75 MiB.
_OBJECT_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Job:
    """What the supervisor wants done."""

    action: Literal["serve", "status", "scale", "restart", "delete"]
    config: str  # Config as JSON
    address: str  # Ray cluster to connect to; empty: start a local one
    root: str  # folder for everything temporary
    events_fd: int
    builder: str  # import string of the function that builds the application
    resources: dict[str, float]  # of a local cluster's one node, "CPU" among them
    labels: dict[str, str]  # of a local cluster's one node
    wanted: dict[str, int] = field(default_factory=dict)  # processes by role (experts.POOL: of one pool), to "scale" to


@dataclass(frozen=True)
class Event:
    """One thing that the supervisor should know."""

    kind: Literal["stage", "progress", "address", "ready", "failed", "result"]
    text: str
    error: str = ""  # class of cluster.errors, for "failed"


class _Driver:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._config = Config.model_validate_json(job.config)
        self._stop = threading.Event()
        os.set_inheritable(job.events_fd, False)  # or Ray's processes would keep it open

    def run(self) -> None:
        threading.Thread(target=self._watch_lifeline, daemon=True).start()
        try:
            self._connect()
            if self._job.action == "status":
                self._send(Event("result", self._directory_status()))
            elif self._job.action == "scale":
                self._send(Event("result", self._scale()))
            elif self._job.action == "restart":
                self._send(Event("result", self._restart_experts()))
            elif self._job.action == "delete":
                self._drain()
                self._delete()
                self._send(Event("result", ""))
            else:
                self._serve()
        except DeepsplitError as error:
            self._send(Event("failed", str(error), type(error).__name__))
        except Exception as error:  # Ray raises many kinds; each is a start that failed
            if "timed out during startup" in str(error):  # Ray's own bound of 30 s, which nothing can raise
                error = TimeoutError("its node was not up after 30 s: end other work on this host and try again")
            self._send(Event("failed", f"{type(error).__name__} from Ray: {error}", "StartupError"))
            raise

    # --- Ray ---

    def _connect(self) -> None:
        import ray

        if self._job.address:
            ray.init(address=self._job.address, namespace="serve", log_to_driver=False)
        else:
            light_cores = plan_whole_host(self._config, this_host()).light_cores
            if light_cores is not None:
                keep_to(light_cores)
            resources = dict(self._job.resources)
            ray.init(
                address="local",
                num_cpus=int(resources.pop("CPU")),
                resources=resources,
                labels=self._job.labels,
                namespace="serve",
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=self._job.root,
            )
        self._send(Event("address", ray.get_runtime_context().gcs_address))
        if self._job.action == "serve":
            self._send(Event("stage", "Ray started" if not self._job.address else "Ray cluster joined"))

    def _serve(self) -> None:
        from ray import serve

        # Gateways listen themselves.
        serve.start(proxy_location="Disabled", logging_config=self._config.logging.of_serve)
        target = serve.RunTarget(_build(self._job.builder, self._job.config), name=APP, route_prefix="/")
        # `serve.run` would block without saying anything until all is well or all is lost.
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        try:
            self._await_ready()
        except Exception:
            self._delete()  # a joined cluster would keep it
            raise
        if not self._stop.is_set():
            self._send(Event("ready", ""))
            self._stop.wait()
            self._drain()
        self._delete()
        if not self._job.address:
            serve.shutdown()

    def _drain(self) -> None:
        """Every gateway refuses what is new and ends what runs, so that nothing behind them is in use any more."""
        handle = _directory()
        grace_s = self._config.gateway.drain_timeout_s
        deadline = time.monotonic() + grace_s + _CALL_TIMEOUT_S
        # A directory that is gone has nobody to tell; the gateways then drain when Serve stops them.
        with contextlib.suppress(Exception):
            while handle.drain.remote().result(timeout_s=_CALL_TIMEOUT_S) > 0 and time.monotonic() < deadline:
                time.sleep(_POLL_S / 5)

    def _delete(self) -> None:
        from ray import serve

        if APP in serve.status().applications:
            serve.delete(APP)

    def _await_ready(self) -> None:
        """Reports stages until the gateway answers. Raises the deployment's own error if one cannot start."""
        from ray import serve

        done: set[str] = set()

        def reached(stage: str) -> None:
            if stage not in done:
                done.add(stage)
                self._send(Event("stage", stage))

        while not self._stop.wait(_POLL_S):
            app = serve.status().applications.get(APP)
            if app is None:
                continue
            messages = [d.message for d in app.deployments.values()] + [app.message]
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY") or any(map(_own_error, messages)):
                raise _failure(messages)
            healthy = {name for name, d in app.deployments.items() if d.status == "HEALTHY"}
            if DIRECTORY in healthy and "experts loaded" not in done:
                experts = json.loads(self._directory_status())["experts"]
                loaded, wanted = sum(e["state"] == "ready" for e in experts), self._config.experts.workers
                if loaded >= wanted:
                    reached("experts loaded")
                else:
                    self._send(Event("progress", f"experts loaded on {loaded} of {wanted} workers"))
            if "attention" in healthy:
                reached("engine ready")
            if app.status == "RUNNING" and self._gateway_ready():
                reached("gateway ready")
                return

    def _directory_status(self) -> str:
        return str(_directory().status.remote().result(timeout_s=_CALL_TIMEOUT_S))

    def _scale(self) -> str:
        roles = {role.partition("."): count for role, count in self._job.wanted.items()}
        experts = {pool: count for (role, _, pool), count in roles.items() if role == "experts"}
        asked = _directory().scale.remote(experts, self._job.wanted.get("attention"))
        return str(asked.result(timeout_s=_CALL_TIMEOUT_S))

    def _restart_experts(self) -> str:
        return str(_directory().restart_experts.remote().result(timeout_s=_CALL_TIMEOUT_S))

    def _gateway_ready(self) -> bool:
        from ray import serve

        handle = serve.get_deployment_handle(GATEWAY, APP)
        return bool(handle.ready.remote().result(timeout_s=_CALL_TIMEOUT_S))

    # --- the supervisor ---

    def _send(self, event: Event) -> None:
        # A supervisor that is gone is noticed at the lifeline.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._job.events_fd, (json.dumps(asdict(event)) + "\n").encode())

    def _watch_lifeline(self) -> None:
        if sys.stdin.readline():
            self._stop.set()
            if sys.stdin.readline():  # blocks until the supervisor is gone
                return
        self._abandoned()

    def _abandoned(self) -> None:
        if self._job.action == "serve" and not self._job.address:
            end_all(Path(self._job.root), os.getsid(0), grace_s=0, descendants=True)
            shutil.rmtree(self._job.root, ignore_errors=True)
        os._exit(1)


def _build(builder: str, config: str) -> Application:
    """Calls the function that `builder` ("module:name") names, as `serve run module:name config=...` does."""
    module, _, name = builder.partition(":")
    function = getattr(importlib.import_module(module), name)
    (parameter,) = (hint for key, hint in get_type_hints(function).items() if key != "return")
    app: Application = function(parameter(config=config))
    return app


def _directory() -> DeploymentHandle:
    """A handle to the directory, over gRPC as deployments.directory.calls makes it, and for the same reason: Ctrl-Z
    must not hold the directory up.
    """
    from ray import serve

    return serve.get_deployment_handle(DIRECTORY, APP).options(_by_reference=False)


def _own_error(message: str) -> DeepsplitError | None:
    """The deepsplit error in a traceback, found by the line that ends it: `cluster.errors.PlanError: text`."""
    for kind in (CheckpointError, ConfigError, PlanError, StartupError):
        marker = f"{kind.__module__}.{kind.__name__}: "
        if marker in message:
            return kind(message.rsplit(marker, 1)[1].strip())
    return None


def _failure(messages: list[str]) -> DeepsplitError:
    own = [error for error in map(_own_error, messages) if error is not None]
    text = "\n".join(dict.fromkeys(message for message in messages if message))
    return own[0] if own else StartupError(f"a deployment failed to start:\n{text}")


if __name__ == "__main__":
    _Driver(Job(**json.loads(sys.stdin.readline()))).run()
