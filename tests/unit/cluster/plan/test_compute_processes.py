from cluster.config import Config
from cluster.plan.compute_processes import HostPlan, compute_processes, plan_whole_host
from cluster.plan.cores import ComputeProcess, regular_host


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


def whole_host(cores: int, **sections: object) -> HostPlan:
    return plan_whole_host(Config.model_validate({"model": {"path": "/m"}, **sections}), regular_host(cores))


def test_threads_spin_where_all_other_processes_can_be_kept_off_their_cores() -> None:
    wanted = {"attention": {"threads": 2}, "experts": {"workers": 2}}
    roomy = whole_host(7, **wanted)
    assert roomy.light_cores == (0, 5, 6)  # gateway, the replica's front end, Ray
    assert all(share.spin for share in roomy.shares)
    tight = whole_host(6, **wanted)
    assert tight.light_cores is None
    assert all(share.pinned and not share.spin for share in tight.shares)
    small = whole_host(4, **wanted)
    assert small.light_cores is None
    assert not any(share.pinned for share in small.shares)


def test_a_host_without_compute_threads_is_not_divided() -> None:
    assert whole_host(8, attention={"device": "cuda"}, experts={"device": "cuda"}) == HostPlan((), None)
