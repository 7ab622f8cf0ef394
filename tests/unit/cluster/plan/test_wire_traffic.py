import itertools

import pytest
import torch

from cluster.plan.wire_traffic import expected_workers, wire_traffic
from routing.tokens import wire


def test_expected_workers_against_counting_every_choice() -> None:
    held = [3, 2, 1]  # experts 0-2, 3-4, 5
    owner = [0, 0, 0, 1, 1, 2]
    choices = list(itertools.combinations(range(6), 3))
    counted = sum(len({owner[expert] for expert in choice}) for choice in choices) / len(choices)
    assert expected_workers(held, 6, 3, replicas=1) == pytest.approx(counted)


def test_one_worker_is_always_met_once() -> None:
    assert expected_workers([8], 8, 2, replicas=1) == 1


def test_all_experts_chosen_meets_all_workers() -> None:
    assert expected_workers([5, 3], 8, 8, replicas=1) == 2


def test_copies_share_the_work() -> None:
    # Two workers with all experts each: half of them answer at one, half at the other.
    assert expected_workers([8, 8], 8, 2, replicas=2) == pytest.approx(expected_workers([4, 4], 8, 2, replicas=1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("hidden", [16, 300])
def test_bytes_are_those_of_real_frames(dtype: str, hidden: int) -> None:
    tokens, slots = 3, 4
    traffic = wire_traffic(1.0, 1, hidden, slots, 1, dtype, "float32")
    request = wire.request_bytes(tokens, hidden, slots, getattr(torch, dtype))
    reply = wire.encode_reply(wire.DispatchReply(1, 1, 0, 0, 0, torch.zeros(tokens, hidden)))
    headers = 2 * wire.HEADER_BYTES
    payload = tokens * (traffic.dispatch_bytes_per_layer + traffic.combine_bytes_per_layer)
    assert payload + headers == request + len(reply)
    assert traffic.header_bytes_per_step == headers


def test_a_step_is_all_layers() -> None:
    traffic = wire_traffic(2.0, 4, 7168, 8, 58, "bfloat16", "bfloat16")
    assert traffic.dispatch_bytes_per_layer == 2 * (7168 * 2 + 8 * 6)
    assert traffic.dispatch_bytes_per_step == 58 * traffic.dispatch_bytes_per_layer
    assert traffic.combine_bytes_per_step == 58 * 2 * 7168 * 2
