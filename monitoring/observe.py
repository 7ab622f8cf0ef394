"""`python -m monitoring.observe` (`make observe`): Prometheus, with our rules, on this user's cluster until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from monitoring.local_prometheus import Discovery, ObserveError, choose_port, prometheus, prometheus_config

_FOLDER = Path(__file__).resolve().parent
_PORT = 9090
_STATUS_S = 90.0
_ASK_S = 10.0


def running_gateway() -> str:
    """Return the REST address of this user's cluster, as `deepsplit status` knows it. Raises ObserveError."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "status", "--json"], capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=_STATUS_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise ObserveError(done.stderr.strip().removeprefix("error: "))
    report = json.loads(done.stdout)
    if report["state"] != "ready":
        raise ObserveError("the cluster is still starting: try again when `deepsplit up` says that it is ready")
    address: str = report["gateway"]["rest"]
    return address


def check(discovery: Discovery) -> None:
    """Ask service discovery once, as Prometheus will. Raises ObserveError."""
    request = urllib.request.Request(discovery.url)
    try:
        if discovery.key_file is not None:
            request.add_header("Authorization", f"Bearer {discovery.key_file.read_text().strip()}")
        trust = ssl.create_default_context(cafile=discovery.ca_file) if discovery.ca_file is not None else None
        with urllib.request.urlopen(request, timeout=_ASK_S, context=trust):
            pass
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise ObserveError(f"{discovery.url} answers {error.code}: see the gateway's log") from error
        raise ObserveError(
            f"{discovery.url} wants the key of a tenant with `operator: true`: write it to a file and give "
            "--key-file FILE (make observe OBSERVE_KEY_FILE=FILE)"
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise ObserveError(
                f"{discovery.url} has a certificate that this machine does not trust: give its authority's, "
                "--ca-file FILE (make observe OBSERVE_CA_FILE=FILE)"
            ) from error
        raise ObserveError(f"{discovery.url} does not answer ({error.reason}): is the gateway up?") from error
    except OSError as error:
        raise ObserveError(f"{error.filename or discovery.url}: {error.strerror or error}") from error


def observe(gateway: str, key_file: Path | None, ca_file: Path | None, wanted_port: int | None) -> None:
    """Run Prometheus until Ctrl-C or SIGTERM. Raises ObserveError."""
    discovery = Discovery(f"{gateway}/sd/prometheus", key_file, ca_file)
    check(discovery)
    port = choose_port(wanted_port, _PORT)
    with prometheus(prometheus_config(discovery), port) as process:
        url = f"http://127.0.0.1:{port}"
        print(
            f"Prometheus  {url}   (targets: {url}/targets, alerts: {url}/alerts)\n"
            f"Grafana     import {_FOLDER}/dashboards/*.json with this data source, or start Grafana with\n"
            f"            GF_PATHS_PROVISIONING={_FOLDER}/grafana DEEPSPLIT_DASHBOARDS={_FOLDER}/dashboards "
            f"PROMETHEUS_URL={url}\n\n"
            "Ctrl-C ends it and removes what it has stored.",
            flush=True,
        )
        process.wait()


def main() -> None:
    """Run the command; exits with 1 for an error, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m monitoring.observe", description=__doc__)
    parser.add_argument("--gateway", metavar="URL", help="REST address; that of this user's cluster if not given")
    parser.add_argument("--key-file", metavar="FILE", type=Path, help="API key of a tenant with `operator: true`")
    parser.add_argument("--ca-file", metavar="FILE", type=Path, help="authority of the gateway's certificate")
    parser.add_argument("--port", type=int, help=f"of Prometheus; {_PORT} or else a free one if not given")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        gateway = arguments.gateway or running_gateway()
        observe(gateway.rstrip("/"), arguments.key_file, arguments.ca_file, arguments.port)
    except ObserveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
