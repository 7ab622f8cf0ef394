"""The wait before a pod goes, with an injected clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deployments.directory.node_drain import SETTLE_S, drain


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def run(still_open: Callable[[], int], wait_s: float) -> tuple[str, float]:
    clock, asked = Clock(), list[tuple[float, bool]]()

    def leave(settled: bool) -> int:
        asked.append((clock.now, settled))
        return still_open()

    said = drain(leave, wait_s, clock.monotonic, clock.sleep)
    assert asked[:2] == [(0.0, False), (SETTLE_S, True)]  # at once, and then after the pause
    assert all(settled for _, settled in asked[1:])
    return said, clock.now


def test_it_settles_and_waits_until_nothing_is_open() -> None:
    answers: Iterator[int] = iter([0, 3, 2, 0])
    assert run(lambda: next(answers), 60) == ("drained", SETTLE_S + 1.0)


def test_it_goes_when_the_time_is_up() -> None:
    said, took_s = run(lambda: 2, 20)
    assert said == "2 request(s) or expert worker(s) still need it after 20 s: going all the same"
    assert took_s == 20


def test_a_directory_that_comes_back_is_asked_again() -> None:
    answers: Iterator[int | None] = iter([1, None, None, 0])

    def ask() -> int:
        answer = next(answers)
        if answer is None:
            raise TimeoutError
        return answer

    assert run(ask, 60)[0] == "drained"


def test_a_directory_that_stays_away_is_not_waited_for() -> None:
    def ask() -> int:
        raise ConnectionError

    said, took_s = run(ask, 600)
    assert said == "the directory is away (ConnectionError): nothing to wait for"
    assert took_s < 20
