"""`deepsplit up` on an existing three-node Ray cluster: attention on one host, expert workers on the two others, and
another one when the load asks for it; then a host dies under requests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.checkpoints import SHAPES, make_checkpoint
from tests.cli import Cli, free_port, wait_until
from tests.integration.netns import Network, Node, RayCluster
from tests.reference import greedy_reference, make_prompts
from tests.tiny_tokenizer import VOCAB_SIZE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

PROMPTS, TOKENS = 4, 32
COMPLETE = """
import json, sys
from tests.cli import complete
prompts = json.loads(sys.argv[2])
print(json.dumps([complete(sys.argv[1], "tiny", prompt, int(sys.argv[3])) for prompt in prompts]))
"""
# The same again and again, until stdin ends: how often it was answered, and what was not as expected.
KEEP_ASKING = """
import json, sys, threading
from tests.cli import complete
url, prompts, tokens, expected = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
ended, answers, wrong = threading.Event(), 0, []
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.is_set():
    for prompt, right in zip(prompts, expected):
        try:
            got = complete(url, "tiny", prompt, tokens)
        except Exception as error:
            got = repr(error)
        answers += 1
        if got != right:
            wrong.append(got)
print(json.dumps([answers, wrong]))
"""


def test_attention_and_experts_on_different_hosts_give_the_same_tokens(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", SHAPES["q_lora_groups"])
    prompts = make_prompts(PROMPTS, VOCAB_SIZE)
    expected = greedy_reference(checkpoint, prompts, TOKENS).token_ids
    nodes = [
        Node(num_cpus=4, labels={"role": "attention"}),
        Node(num_cpus=4, resources={"expert_host": 2}),
        Node(num_cpus=4, resources={"expert_host": 1}),
    ]
    with Network(3) as network, RayCluster(network, nodes) as cluster:
        head, *hosts = network.hosts
        short = Path(tempfile.mkdtemp(prefix="dsplit-", dir="/tmp"))
        cli = Cli(tmp_path, short, cluster.environment, ("ip", "netns", "exec", head.name))
        port = free_port()
        config = cli.write_config(
            {
                "model": {"path": str(checkpoint), "name": "tiny"},
                "attention": {
                    "kv_cache_gib": 0.25, "max_model_len": 256, "max_num_seqs": 8,
                    "placement": {"labels": {"role": "attention"}},
                },
                "experts": {
                    "workers": 2, "replicas_per_expert": 2, "heartbeat_interval_s": 0.5,
                    "placement": {"resources": {"expert_host": 1}},
                    "autoscaling": {"min_workers": 2, "max_workers": 3, "target_busy": 0.001, "upscale_delay_s": 1},
                },
                "gateway": {"port": port, "placement": {"labels": {"role": "attention"}}},
                "ray": {"address": cluster.address},
            }
        )  # fmt: skip
        cli.up(config)
        report = cli.status()
        assert [replica["node"] for replica in report["attention"]] == [head.address]
        assert {worker["node"] for worker in report["experts"]} == {host.address for host in hosts}
        assert all(worker["address"].split(":")[0] == worker["node"] for worker in report["experts"])
        first = report["experts"][0]
        command = [sys.executable, "-c", COMPLETE, report["gateway"]["rest"], json.dumps(prompts), str(TOKENS)]
        deadline = time.monotonic() + 90
        while len(ready := [worker for worker in cli.status()["experts"] if worker["state"] == "ready"]) < 3:
            assert json.loads(network.run(head, command)) == expected  # while the load brings a third worker
            assert time.monotonic() < deadline, ready
        assert cli.status()["wanted"]["experts"] == 3
        assert len({worker["node"] for worker in ready}) == 2
        os.kill(first["pid"], signal.SIGKILL)
        assert json.loads(network.run(head, command)) == expected
        asking = network.popen(
            head, [sys.executable, "-c", KEEP_ASKING, *command[3:], json.dumps(expected)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=dict(os.environ),
        )  # fmt: skip
        cluster.kill(hosts[1])

        def whole() -> bool:
            workers = cli.status()["experts"]
            return {worker["node"] for worker in workers if worker["state"] == "ready"} == {hosts[0].address}

        wait_until("the other host alone has all experts", whole, 90)
        time.sleep(3)
        answers, wrong = json.loads(asking.communicate(timeout=120)[0])
        assert answers > PROMPTS
        assert wrong == []
        cli.down()
        alive = cluster.python("import ray; ray.init(log_to_driver=False); print(len(ray.nodes()))")
        assert alive.strip() == "3"  # the cluster is not ours to stop; one of them is dead
        shutil.rmtree(short)
