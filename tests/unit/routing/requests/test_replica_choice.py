"""Who has room, who is cheapest, and that equals share."""

from __future__ import annotations

from collections import Counter

import pytest

from routing.requests.prefix_index import prefix_hashes
from routing.requests.replica_choice import Candidate, ReplicaChoice
from routing.requests.request import Ask, Priority, ReplicaLoad, Tenant

TENANT = Tenant("t")


def ask(
    ticket: str = "t", *, prompt: str = "", prompt_tokens: int = 100, new_tokens: int = 50, sequences: int = 1
) -> Ask:
    hashes = prefix_hashes(prompt.encode())
    return Ask(ticket, TENANT, Priority.INTERACTIVE, prompt_tokens, new_tokens, sequences, hashes, None)


def replica(
    name: str, *, slots: int = 8, capacity: int = 10_000, sequences: int = 0, queued: int = 0, held: int = 0,
    running: int = 0, usage: float = 0.0,
) -> Candidate:  # fmt: skip
    load = ReplicaLoad(name, slots, capacity, running=running, kv_cache_usage=usage)
    return Candidate(load, sequences, queued, held)


def test_nobody_is_chosen_from_nobody() -> None:
    assert ReplicaChoice().best(ask(), []) is None


def test_the_last_slot_and_the_last_token_of_room_can_be_had() -> None:
    tight = replica("tight", sequences=7, held=9_850)
    assert tight.has_room(1, 150, 8)
    assert not tight.has_room(1, 151, 8)
    assert not tight.has_room(2, 150, 8)
    assert not tight.has_room(1, 150, 7.9)


def test_what_is_too_large_for_any_replica_goes_to_an_idle_one() -> None:
    assert replica("idle").has_room(64, 50_000, 8)
    assert not replica("busy", sequences=1).has_room(64, 50_000, 8)


def test_a_prefix_goes_where_it_went_before() -> None:
    choice = ReplicaChoice()
    prompt = "You are a helpful assistant. " * 100
    first = ask("1", prompt=prompt, prompt_tokens=800)
    home = choice.best(first, [replica("a"), replica("b"), replica("c")])
    assert home is not None
    choice.placed(first, replica(home).load)
    for number in range(20):
        again = ask(str(number), prompt=prompt + f"Question {number}", prompt_tokens=810)
        assert choice.best(again, [replica("a"), replica("b"), replica("c")]) == home
    assert choice.cached_tokens(again, home) > 700
    choice.forget(home)
    assert choice.cached_tokens(again, home) == 0


def test_the_longer_shared_prefix_wins() -> None:
    choice = ReplicaChoice()
    system, history = "s" * 1024, "h" * 2048
    choice.placed(ask(prompt=system), replica("short").load)
    choice.placed(ask(prompt=system + history), replica("long").load)
    asked = ask(prompt=system + history + "q", prompt_tokens=800)
    assert choice.best(asked, [replica("short"), replica("long")]) == "long"


def test_a_queue_longer_than_the_prefix_saves_sends_it_elsewhere() -> None:
    choice = ReplicaChoice()
    asked = ask(prompt="p" * 2560, prompt_tokens=600)
    choice.placed(asked, replica("home").load)
    short, long = (replica("home", slots=64, sequences=1, queued=queued) for queued in (300, 900))
    assert choice.best(asked, [short, replica("other", slots=64)]) == "home"
    assert choice.best(asked, [long, replica("other", slots=64)]) == "other"


@pytest.mark.parametrize(
    ("busier", "freer"),
    [
        (replica("busier", queued=200, sequences=1), replica("freer", queued=100, sequences=1)),
        (replica("busier", sequences=4), replica("freer", sequences=3)),
        (replica("busier", slots=8, sequences=4), replica("freer", slots=32, sequences=8)),
        (replica("busier", sequences=1, held=5_000), replica("freer", sequences=1, held=1_000)),
        (replica("busier", usage=0.9), replica("freer", usage=0.1)),
        (replica("busier", running=5), replica("freer")),  # another gateway's requests
    ],
)
def test_all_else_equal_the_freer_replica_is_picked(busier: Candidate, freer: Candidate) -> None:
    for number in range(10):
        assert ReplicaChoice().best(ask(str(number)), [busier, freer]) == "freer"
        assert ReplicaChoice().best(ask(str(number)), [freer, busier]) == "freer"


def test_equals_share_and_the_order_of_the_list_decides_nothing() -> None:
    choice = ReplicaChoice()
    idle = [replica(name) for name in "abcd"]
    picked = [choice.best(ask(f"ticket {number}"), idle) for number in range(400)]
    assert min(Counter(picked)[name] for name in "abcd") > 60
    backwards = [choice.best(ask(f"ticket {number}"), idle[::-1]) for number in range(400)]
    assert backwards == picked


def test_the_index_is_no_larger_than_the_replica_s_cache() -> None:
    choice = ReplicaChoice()
    small = replica("small", capacity=640)  # ten blocks of 64 tokens
    old, new = ask(prompt="old " * 640, prompt_tokens=640), ask(prompt="new " * 640, prompt_tokens=640)
    for one in (old, new):
        assert choice.best(one, [small]) == "small"
        choice.placed(one, small.load)
    assert choice.cached_tokens(new, "small") > 0
    assert choice.cached_tokens(old, "small") == 0
