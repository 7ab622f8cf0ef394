"""Drains a node before its pod or host goes: `python -m deployments.directory.node_drain --wait-s 600`.

It is Kubernetes' preStop hook.

The expert workers on this node hand over to others, its gateways refuse what is new, its attention replicas get nothing
new, and the command waits until nothing that runs needs the node any more. Connects to the node's own Ray, with the
token in its environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Sequence

from cluster.launch.driver import APP
from deployments.directory.calls import over_grpc
from deployments.directory.replica import NAME as DIRECTORY

SETTLE_S = 5.0  # until load balancers have heard that this pod takes no more connections
_POLL_S = 0.5
_AWAY_S = 10.0  # if the directory is away for longer, nothing is waited for
_CALL_TIMEOUT_S = 5.0


def drain(
    leave: Callable[[bool], int], wait_s: float, monotonic: Callable[[], float], sleep: Callable[[float], None]
) -> str:
    """Say that the node goes, let that settle, and ask until `leave(True)` says that nothing needs it. Returns how it
    ended. Gives up after `wait_s`, and when the directory has not answered for a while.
    """
    deadline = monotonic() + wait_s
    with contextlib.suppress(Exception):  # asked again below
        leave(False)  # at once: where a whole cluster goes, every node must know of it before the first is done
    sleep(min(SETTLE_S, wait_s))
    answered, left = monotonic(), -1
    while True:
        try:
            left, answered = leave(True), monotonic()
        except Exception as error:  # Ray raises many kinds; each means that nobody answers
            if monotonic() - answered > _AWAY_S:
                return f"the directory is away ({type(error).__name__}): nothing to wait for"
        if left == 0:
            return "drained"
        if monotonic() >= deadline:
            return f"{left} request(s) or expert worker(s) still need it after {wait_s:g} s: going all the same"
        sleep(_POLL_S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Drain this node. Fails if Ray does not run on it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wait-s", type=float, required=True, help="longest wait, in seconds")
    wait_s = parser.parse_args(arguments).wait_s

    import ray
    from ray import serve

    # Asked before connecting, and given: by itself Ray takes the first node whose processes it sees, the head's if any.
    node = ray.util.get_node_ip_address()
    address = os.environ.get("RAY_ADDRESS", "auto")
    ray.init(address=address, _node_ip_address=node, namespace="serve", log_to_driver=False)

    print(f"node {node}: leaves in {SETTLE_S:g} s", flush=True)

    def leave(settled: bool) -> int:
        # Looked up each time: a directory that was restarted has a new handle.
        handle = over_grpc(serve.get_deployment_handle(DIRECTORY, APP))
        return int(handle.leave_node.remote(node, settled).result(timeout_s=_CALL_TIMEOUT_S))

    print(f"node {node}: {drain(leave, wait_s, time.monotonic, time.sleep)}", flush=True)


if __name__ == "__main__":
    main()
