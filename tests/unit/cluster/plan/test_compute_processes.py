from cluster.config import Config
from cluster.plan.compute_processes import compute_processes
from cluster.plan.cores import ComputeProcess


def processes(**sections: object) -> tuple[ComputeProcess, ...]:
    return compute_processes(Config.model_validate({"model": {"path": "/m"}, **sections}))


def test_replicas_and_workers_with_their_threads() -> None:
    made = processes(attention={"replicas": 2, "threads": 3, "pin_cores": "never"}, experts={"workers": 1})
    attention = [ComputeProcess(f"attention-{i}", 3, "never") for i in (0, 1)]
    assert made == (*attention, ComputeProcess("experts-0", 1, "auto"))


def test_a_replicas_ranks_are_counted_together() -> None:
    (attention, *_) = processes(attention={"threads": 3, "tensor_parallel_size": 2})
    assert attention.threads == 6


def test_what_computes_on_gpus_takes_no_cores() -> None:
    pools = [
        {"name": "gpu", "workers": 2, "device": "cuda"},
        {"name": "cpu", "workers": 1, "threads": 8, "pin_cores": "always"},
    ]
    made = processes(attention={"device": "cuda"}, experts={"workers": 3, "pools": pools})
    assert made == (ComputeProcess("experts-2", 8, "always"),)
