"""Experts from other workers and from disk: the same weights, whatever fails on the way. Real processes and gRPC."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import DispatchConfig
from cluster.errors import CheckpointError
from cluster.model.identity import model_identity
from cluster.model.spec import load_checkpoint_index, load_model_spec
from deployments.experts.forms import Form, choose_form
from deployments.experts.sources import NotThere, Peer, Wanted, load_all, most_useful
from deployments.experts.store import ExpertStore
from routing.tokens.expert_pieces import ExpertPeer, PeerAway
from routing.tokens.placement import WorkerEndpoint
from tests.checkpoint_edits import shard_files
from tests.expert_processes import ExpertPlane

MakeCheckpoint = Callable[..., Path]
SETTINGS = DispatchConfig(connect_timeout_s=0.5, keepalive_interval_s=0.5, keepalive_timeout_s=0.5)
ALL = tuple(range(60))


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: MakeCheckpoint) -> Path:
    return random_checkpoint("sixty_experts", shards=4)


@pytest.fixture(scope="module")
def plane(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExpertPlane]:
    with ExpertPlane(checkpoint, tmp_path_factory.mktemp("plane")) as plane:
        yield plane


class Loading:
    """A worker's store, before its first load."""

    def __init__(self, path: Path, form: Form = Form.FLOAT32, first: tuple[int, ...] = ALL) -> None:
        index, spec = load_checkpoint_index(path), load_model_spec(path)
        self.share = dict.fromkeys(spec.moe_layers, first)
        self.store = ExpertStore(index, spec, form, "cpu", self.share)
        self.model_id = model_identity(spec, index)

    def peer(self, endpoint: WorkerEndpoint) -> Peer:
        link = ExpertPeer(endpoint.address, self.model_id, self.store.layout, SETTINGS, None)
        return Peer(link, endpoint.experts)

    def same_as(self, path: Path) -> bool:
        other = Loading(path, next(iter(self.store.layers.values())).form)
        other.store.load(other.share)
        return all(
            bytes(mine) == bytes(theirs)
            for layer, ids in self.store.held.items()
            for expert in ids
            for mine, theirs in zip(
                self.store.layers[layer].parts_of(expert), other.store.layers[layer].parts_of(expert), strict=True
            )
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_from_workers_are_those_from_disk(
    checkpoint: Path, tmp_path: Path, plane: ExpertPlane, dtype: str
) -> None:
    holders = plane.start([1, 1], form=dtype)
    form = choose_form(dtype, "auto", load_model_spec(checkpoint), "cpu")
    shutil.copytree(checkpoint, tmp_path / "bare")
    for shard in shard_files(tmp_path / "bare"):
        shard.unlink()
    loading = Loading(tmp_path / "bare", form)
    loaded = loading.store.load(loading.share, peers=[loading.peer(one) for one in holders])
    assert loaded.from_peers == 60 * len(loading.share)
    assert loaded.bytes_read == 0
    assert loading.same_as(checkpoint)
    for one in holders:
        plane.kill(one)


def test_both_sources_are_used(checkpoint: Path, plane: ExpertPlane) -> None:
    (holder,) = plane.start([1])
    loading = Loading(checkpoint)
    loaded = loading.store.load(loading.share, peers=[loading.peer(holder)])
    assert 0 < loaded.from_peers < 60 * len(loading.share)
    assert loaded.bytes_read > 0
    assert loading.same_as(checkpoint)
    plane.kill(holder)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_costs_time_and_nothing_else(
    checkpoint: Path, plane: ExpertPlane, sent: int
) -> None:
    (holder,) = plane.start([1])
    loading = Loading(checkpoint)
    count = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == 10:
            os.kill(plane.pid(holder), sent)

    loaded = loading.store.load(loading.share, on_progress, peers=[loading.peer(holder)])
    assert loaded.from_peers < 60 * len(loading.share)
    assert loading.same_as(checkpoint)
    plane.kill(holder)


def test_a_worker_of_another_form_gives_nothing(checkpoint: Path, plane: ExpertPlane) -> None:
    (holder,) = plane.start([1], form="int8")
    loading = Loading(checkpoint)
    assert loading.store.load(loading.share, peers=[loading.peer(holder)]).from_peers == 0
    assert loading.same_as(checkpoint)
    plane.kill(holder)


def without_a_shard(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    shard_files(folder)[1].unlink()
    return folder


def test_what_a_disk_lacks_comes_from_a_worker(checkpoint: Path, tmp_path: Path, plane: ExpertPlane) -> None:
    (holder,) = plane.start([1])
    lacking = without_a_shard(checkpoint, tmp_path / "lacking")
    loading = Loading(lacking)
    with pytest.raises(CheckpointError, match="is missing: download this shard again"):
        Loading(lacking).store.load(loading.share)
    loading.store.load(loading.share, peers=[loading.peer(holder)])
    assert loading.same_as(checkpoint)
    plane.kill(holder)


def test_what_nobody_has_is_told_by_the_checkpoints_error(
    checkpoint: Path, tmp_path: Path, plane: ExpertPlane
) -> None:
    first, second = plane.start([1, 1])
    loading = Loading(without_a_shard(checkpoint, tmp_path / "lacking"))
    plane.kill(second)
    with pytest.raises(CheckpointError, match="is missing: download this shard again"):
        loading.store.load(loading.share, peers=[loading.peer(first), loading.peer(second)])
    assert loading.store.held == {}
    plane.kill(first)


# --- who gives what, without processes ---


class Named:
    """A source whose loads a test decides."""

    threads = 1

    def __init__(self, name: str, load: Callable[[Wanted], None], from_end: bool = False) -> None:
        self.name, self._load, self.from_end = name, load, from_end
        self.loaded: list[int] = []

    def why_not(self, wanted: Wanted) -> Exception | None:
        return None

    def load(self, wanted: Wanted) -> None:
        self._load(wanted)
        self.loaded.append(wanted.expert)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[Wanted]:
    layer = Loading(checkpoint).store.layers[1]
    return [Wanted(1, expert, layer, expert) for expert in range(60)]


def test_the_faster_source_gives_more(wanted: list[Wanted]) -> None:
    slow = Named("slow", lambda one: time.sleep(0.01))
    fast = Named("fast", lambda one: time.sleep(0.001), from_end=True)
    load_all(wanted, [slow, fast], lambda one, source: None)
    assert sorted(slow.loaded + fast.loaded) == list(range(60))
    assert len(fast.loaded) > 2 * len(slow.loaded)
    assert slow.loaded[0] == 0
    assert fast.loaded[0] == 59


def test_an_expert_that_comes_back_late_is_loaded_all_the_same(wanted: list[Wanted]) -> None:
    others_done = threading.Event()

    def hold_on(one: Wanted) -> None:
        assert others_done.wait(30)
        raise PeerAway("gone")

    def load(one: Wanted) -> None:
        if len(disk.loaded) == 58:
            others_done.set()

    disk, peer = Named("disk", load), Named("peer", hold_on, from_end=True)
    load_all(wanted, [disk, peer], lambda one, source: None)
    assert sorted(disk.loaded) == list(range(60))


def test_a_defect_ends_all_threads_and_is_told(wanted: list[Wanted]) -> None:
    def fail(one: Wanted) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load_all(wanted, [Named("disk", fail), Named("peer", lambda one: time.sleep(0.001))], lambda *_: None)


def test_nobody_has_it(wanted: list[Wanted]) -> None:
    def not_there(one: Wanted) -> None:
        if one.expert == 7:
            raise NotThere("it is gone")

    def unreadable(one: Wanted) -> None:
        if one.expert == 7:
            raise CheckpointError("cannot be read")

    for sources in (Named("peer", not_there), Named("disk", unreadable)), (Named("disk", unreadable),):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_all(wanted, sources, lambda *_: None)


def test_those_who_have_most_are_asked() -> None:
    def holder(name: str, *experts: int) -> WorkerEndpoint:
        return WorkerEndpoint(name, name, {1: experts})

    holders = [holder("none", 9), holder("one", 0), *(holder(f"all{n}", 0, 1, 2) for n in range(4)), holder("two", 0)]
    assert {one.worker_id for one in most_useful(holders, {1: (0, 1, 2)})} == {f"all{n}" for n in range(4)}
    assert [one.worker_id for one in most_useful(holders[:2], {1: (0,), 2: (5,)})] == ["one"]
    assert most_useful((), {1: (0,)}) == []


def test_a_store_gives_only_what_it_holds(checkpoint: Path) -> None:
    loading = Loading(checkpoint, first=(3, 4))
    loading.store.load(loading.share)
    whole = bytes(loading.store.layers[1].parts_of(3)[0])
    assert loading.store.read(1, 3, 0, 8, 24) == whole[8:32]
    assert loading.store.read(1, 5, 0, 0, 8) == b""
    assert loading.store.read(99, 3, 0, 0, 8) == b""
    for part, offset, length in ((9, 0, 1), (0, len(whole), 1), (0, 0, len(whole) + 1)):
        with pytest.raises(ValueError, match="no bytes"):
            loading.store.read(1, 3, part, offset, length)
    loading.store.drop({1: (3,)})
    assert loading.store.read(1, 3, 0, 8, 24) == b""
