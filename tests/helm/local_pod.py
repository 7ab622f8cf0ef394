"""A rendered pod as processes of this machine: its own network, its mounts, its user, its memory limit.

Not a container engine: the image is this checkout and its environment, mounted where the image has them. Everything
else is what the pod's manifest says: environment, user and group, read-only root, scratch volumes with their sizes,
Secrets, no capabilities, no new privileges.
"""

from __future__ import annotations

import base64
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helm.chart import ROOT, Manifest, Pod
from tests.integration.netns import Host, Network

IMAGE_ROOT = "/opt/deepsplit"  # where the image has the checkout
_MEMORY = Path("/sys/fs/cgroup/memory")
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def quantity_bytes(text: str) -> int:
    """Of a Kubernetes quantity of memory."""
    return int(text[:-2]) * _UNITS[text[-2:]]


class LocalPod:
    """One pod on one host of a network. `close` it when nothing runs in it any more."""

    def __init__(
        self, pod: Pod, host: Host, network: Network, folder: Path, secrets: Mapping[str, Manifest],
        names: Mapping[str, str], environment: Mapping[str, str],
    ) -> None:  # fmt: skip
        """`folder` must be empty and outlive the pod; `names`: host names and their addresses, for /etc/hosts;
        `environment`: what the operator adds to the manifest's.
        """
        self.pod, self.host = pod, host
        self._added = environment
        self._network, self._folder = network, folder
        (self._container,) = pod.spec["containers"]
        self._cgroup = _MEMORY / f"deepsplit-{host.name}"
        self._write_files(secrets, names)
        self._limit_memory()

    def _write_files(self, secrets: Mapping[str, Manifest], names: Mapping[str, str]) -> None:
        user, group = (self.pod.spec["securityContext"][key] for key in ("runAsUser", "runAsGroup"))
        for name in ("tmp", "etc", "python", "image"):
            (self._folder / name).mkdir(parents=True)
        os.chown(self._folder / "tmp", user, group)
        hosts = Path("/etc/hosts").read_text() + "".join(f"{address} {name}\n" for name, address in names.items())
        (self._folder / "etc" / "hosts").write_text(hosts)
        volumes = {volume["name"]: volume for volume in self.pod.spec["volumes"]}
        for mount in self._container["volumeMounts"]:
            if "secret" not in volumes[mount["name"]]:
                continue
            wanted = volumes[mount["name"]]["secret"]
            secret = secrets[wanted["secretName"]]
            data = {key: base64.b64decode(value) for key, value in secret.get("data", {}).items()}
            data |= {key: value.encode() for key, value in secret.get("stringData", {}).items()}
            items = wanted.get("items", [{"key": key, "path": key} for key in data])
            place = self._folder / mount["mountPath"].removeprefix("/")
            place.mkdir(parents=True)
            for item in items:
                file = place / item["path"]
                file.write_bytes(data[item["key"]])
                os.chown(file, 0, group)
                file.chmod(wanted["defaultMode"])

    def _limit_memory(self) -> None:
        assert _MEMORY.is_dir(), "no memory cgroups (v1) here: limits of pods cannot be tried"
        self._cgroup.mkdir()
        limit = quantity_bytes(self._container["resources"]["limits"]["memory"])
        (self._cgroup / "memory.limit_in_bytes").write_text(str(limit))

    @property
    def peak_bytes(self) -> int:
        """Most memory that the pod has had, page cache and /dev/shm included."""
        return int((self._cgroup / "memory.max_usage_in_bytes").read_text())

    @property
    def was_short_of_memory(self) -> bool:
        """Whether the kernel killed something in it."""
        return "oom_kill 0" not in (self._cgroup / "memory.oom_control").read_text()

    def _script(self, command: Sequence[str]) -> str:
        """What makes the container around `command`, in a mount namespace of its own; root until its last line."""
        context = self.pod.spec["securityContext"]
        volumes = self.pod.spec["volumes"]
        shm = [quantity_bytes(volume["emptyDir"]["sizeLimit"]) for volume in volumes if volume["name"] == "shm"]
        here, python = self._folder, Path(sys.base_prefix)
        hidden = next((p for p in reversed(python.parents) if not p.stat().st_mode & 0o001), None)
        lines = [
            "set -e",
            "mount --make-rprivate /",
            f"mount -t overlay overlay -o ro,lowerdir={here}/etc:/etc /etc",
            f"mount --bind {ROOT} {here}/image",
            "mount -t tmpfs -o mode=755 tmpfs /opt",
            f"mkdir -p {IMAGE_ROOT}",
            f"mount --bind {here}/image {IMAGE_ROOT}",
        ]
        if hidden is not None:  # the interpreter lies in a home that no other user may enter
            lines += [
                f"mount --bind {python} {here}/python",
                f"mount -t tmpfs -o mode=755 tmpfs {hidden}",
                f"mkdir -p {python}",
                f"mount --bind {here}/python {python}",
            ]
        lines += [
            *(f"mount -t tmpfs -o size={size} tmpfs /dev/shm" for size in shm),
            f"mount --bind {here}/tmp /tmp",
            "mount -o remount,bind,ro /",
            shlex.join([
                "exec", "setpriv", f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}",
                "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
                "env", "-i", *self._environment(), *command,
            ]),
        ]  # fmt: skip
        return "\n".join(lines)

    def _environment(self) -> list[str]:
        given = {entry["name"]: entry["value"] for entry in self._container["env"]}
        # What the image sets.
        image = {"PATH": f"{IMAGE_ROOT}/.venv/bin:/usr/bin:/bin", "PYTHONPATH": IMAGE_ROOT}
        return [f"{name}={value}" for name, value in (image | given | self._added).items()]

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[str]:
        """Start a command in the container; its output goes to `log`."""
        procs = self._cgroup / "cgroup.procs"
        with log.open("a") as output:
            return self._network.popen(
                self.host, ["unshare", "--mount", "bash", "-c", self._script(command)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, cwd="/", preexec_fn=lambda: procs.write_text("0") and None,
            )  # fmt: skip

    def run(self, command: Sequence[str], timeout_s: float = 120) -> str:
        """Run a command in the container; what it prints. AssertionError if it fails."""
        log = self._folder / "run.log"
        process = self.start(command, log)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        assert code == 0, f"{command} on {self.host.name}: exit {code}\n{log.read_text()}"
        return log.read_text()

    def close(self) -> None:
        """Forget its memory limit."""
        deadline = time.monotonic() + 10
        while (self._cgroup / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._cgroup.rmdir()
