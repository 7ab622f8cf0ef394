"""How long `deepsplit up` takes until the first token, by stage. `python -m benchmarks.startup --help`"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

COMMAND = (sys.executable, "-m", "cluster.cli")


def main() -> None:
    """Run the whole start-up a few times; stages come from the command itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/local.yaml"), help="configuration to start")
    parser.add_argument("--runs", type=int, default=1, help="starts, one after another")
    parser.add_argument("--limit-s", type=float, default=90.0, help="the target that is printed beside the result")
    args = parser.parse_args()
    for run in range(args.runs):
        started = time.monotonic()
        up = subprocess.run([*COMMAND, "up", str(args.config), "--detach"], stdout=subprocess.PIPE, text=True)
        if up.returncode != 0:
            raise SystemExit(up.returncode)  # it has said why on stderr
        try:
            status = json.loads(subprocess.check_output([*COMMAND, "status", "--json"], text=True))
            body = {"model": status["model"], "prompt": "import", "max_tokens": 1}
            request = urllib.request.Request(
                f"{status['gateway']['rest']}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
            total_s = time.monotonic() - started
            print(f"run {run + 1}: first token after {total_s:.1f} s (target {args.limit_s:.0f} s)", flush=True)
        finally:
            subprocess.run([*COMMAND, "down"], stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
