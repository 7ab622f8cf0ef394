"""The ids of a step, as a frame and a log line carry them: bounded, whole ids, nothing that could break a line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.tokens.request_ids import MAX_BYTES, join_request_ids


def test_ids_are_joined_in_their_order() -> None:
    assert join_request_ids(["cmpl-b-0", "chatcmpl-a"]) == "cmpl-b-0,chatcmpl-a"
    assert join_request_ids([]) == ""


def test_what_does_not_fit_becomes_an_ellipsis_and_no_id_is_cut() -> None:
    ids = [f"cmpl-{number:032x}-0" for number in range(64)]
    *kept, last = join_request_ids(ids).split(",")
    assert last == "…"
    assert kept == ids[: len(kept)]
    assert len(kept) == 6


def test_one_id_that_is_too_long_is_cut() -> None:
    assert join_request_ids(["é" * 200]) == "é" * 126 + "…"  # 252 + 3 bytes


def test_an_id_that_a_client_made_up_cannot_end_a_line() -> None:
    assert join_request_ids(["a\nb\x1b[2K\u2028\ud800"]) == "a?b?[2K??"


@given(st.lists(st.text(max_size=80), max_size=12))
def test_always_short_and_printable(ids: list[str]) -> None:
    request_ids = join_request_ids(ids)
    assert len(request_ids.encode()) <= MAX_BYTES
    assert request_ids.isprintable()
