"""`deepsplit up` on an existing three-node Ray cluster: attention on one host, expert workers on the two others, and
another one when the load asks for it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.checkpoints import SHAPES, make_checkpoint
from tests.cli import Cli, free_port
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
                    "workers": 2, "placement": {"resources": {"expert_host": 1}}, "heartbeat_interval_s": 0.5,
                    "autoscaling": {"min_workers": 2, "max_workers": 3, "target_busy": 0.001, "upscale_delay_s": 1},
                },
                "gateway": {"port": port},
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
        cli.down()
        alive = cluster.python("import ray; ray.init(log_to_driver=False); print(len(ray.nodes()))")
        assert alive.strip() == "3"  # the cluster is not ours to stop
        shutil.rmtree(short)
