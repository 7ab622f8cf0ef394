from cluster.plan.fit import Need, place
from cluster.plan.nodes import GIB, NodeSpec


def expert(i: int, gib: float, **more: object) -> Need:
    return Need(f"experts-{i}", "experts", int(gib * GIB), 0, 0, **more)  # type: ignore[arg-type]


def test_experts_spread_to_where_most_is_free() -> None:
    nodes = [NodeSpec(name="a", memory_gib=4), NodeSpec(name="b", memory_gib=5)]
    placed, shortfalls = place([expert(i, 2) for i in range(4)], nodes)
    assert [need.node for need in placed] == ["b", "a", "b", "a"]
    assert shortfalls == ()


def test_shortfall_names_process_node_and_what_is_missing() -> None:
    placed, shortfalls = place([expert(i, 3) for i in range(3)], [NodeSpec(name="a", memory_gib=4)])
    assert [need.node for need in placed] == ["a", None, None]
    assert shortfalls == (
        "experts-1: needs 3.00 GiB of memory, but a, the node with most room, has 1.00 GiB left: 2.00 GiB short "
        "(2 of 3 such processes have no room)",
    )


def test_labels_choose_nodes() -> None:
    nodes = [NodeSpec(name="gpu", memory_gib=99), NodeSpec(name="cpu", memory_gib=9, labels={"role": "experts"})]
    assert place([expert(0, 1, labels={"role": "experts"})], nodes)[0][0].node == "cpu"
    _, (shortfall,) = place([expert(0, 1, labels={"role": "x"})], nodes)
    assert shortfall.startswith("experts-0: no node has the labels {'role': 'x'}")


def test_resources_are_used_up() -> None:
    nodes = [NodeSpec(name="a", memory_gib=9, resources={"slot": 1}), NodeSpec(name="b", memory_gib=99)]
    placed, (shortfall,) = place([expert(i, 1, resources={"slot": 1}) for i in range(2)], nodes)
    assert [need.node for need in placed] == ["a", None]
    assert "no node has the resources {'slot': 1} left" in shortfall


def test_gpus_and_their_memory() -> None:
    node = NodeSpec(name="a", memory_gib=9, gpus=8, gpu_memory_gib=80)
    needs = [Need(f"attention-{i}", "attention", 8 * 70 * GIB, 0, GIB, gpus=8) for i in range(2)]
    placed, (shortfall,) = place(needs, [node])
    assert placed[0].node == "a"  # 560 GiB of weights are on the GPUs, not in 9 GiB of host memory
    assert "no node has 8 GPUs left" in shortfall
    _, (shortfall,) = place([Need("attention-0", "attention", 8 * 90 * GIB, 0, GIB, gpus=8)], [node])
    assert "needs 90.00 GiB per GPU, 10.00 GiB more than the largest GPU has" in shortfall
