"""How fast a worker loads its experts, beside a plain read of the same bytes into memory by as many threads.

A temporary checkpoint of experts of DeepSeek-V3's size, bfloat16 and FP8 with block scales; its files are in the page
cache, so the disk has no part in it. Both sides take turns in one process of each form, whose peak of memory above the
weights' final size is measured too; and so do loads from another worker, a process that holds the same experts, alone
and together with the disk. `python -m benchmarks.expert_loading --help`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.experts.sources import Peer
    from deployments.experts.store import ExpertStore
    from routing.tokens.expert_pieces import ExpertPeer
    from routing.tokens.share import Share

_FORMS = {  # what is loaded: checkpoint, experts.dtype
    "bfloat16": ("bfloat16", "bfloat16"), "float32 from bfloat16": ("bfloat16", "float32"),
    "int8 from bfloat16": ("bfloat16", "int8"), "fp8": ("fp8", "auto"), "bfloat16 from fp8": ("fp8", "bfloat16"),
}  # fmt: skip
_READ_BYTES = 1 << 20  # of a plain read, at once


@dataclass(frozen=True)
class Row:
    """One form."""

    name: str
    form: str
    gb_per_s: float  # of checkpoint bytes, the best of all loads
    plain_gb_per_s: float
    ratio: float  # median over neighbouring pairs
    peak_mib: float  # resident memory above the final weights
    peer_gb_per_s: float  # of bytes in memory, from another worker alone, the best
    peer_ratio: float  # seconds from disk alone to seconds from the worker alone, median
    both_ratio: float  # and to seconds from both at once


def main() -> None:
    """Print the table, and with --json its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16, help="experts of the checkpoint")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5, help="loads of each form, each beside a plain read")
    parser.add_argument("--forms", nargs="+", default=list(_FORMS), choices=list(_FORMS))
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made (some GiB); a temporary place without")
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the table on stderr")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # checkpoint and experts.dtype, in a child process
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(_measure(Path(args.one[0]), args.one[1], args.pairs)))
        return
    out = sys.stderr if args.json else sys.stdout
    print(f"{'loaded':24} {'GB/s':>6} {'plain':>6} {'ratio':>6} {'peak, MiB':>10} {'peer GB/s':>10} {'peer':>6} "
          f"{'both':>6}  form", file=out)  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="loading-", dir=args.dir) as folder:
        for name in args.forms:
            stored, dtype = _FORMS[name]
            checkpoint = Path(folder) / stored
            if not checkpoint.exists():
                _make(checkpoint, args, fp8=stored == "fp8")
            command = [sys.executable, "-m", "benchmarks.expert_loading", "--one", str(checkpoint), dtype]
            env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as an expert worker
            told = subprocess.run([*command, "--pairs", str(args.pairs)], env=env, check=True, stdout=subprocess.PIPE)
            row = Row(name, **json.loads(told.stdout))
            rows.append(row)
            print(f"{row.name:24} {row.gb_per_s:6.2f} {row.plain_gb_per_s:6.2f} {row.ratio:6.2f} {row.peak_mib:10.0f} "
                  f"{row.peer_gb_per_s:10.2f} {row.peer_ratio:6.2f} {row.both_ratio:6.2f}  {row.form}",
                  file=out, flush=True)  # fmt: skip
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


def _make(checkpoint: Path, args: argparse.Namespace, fp8: bool) -> None:
    from tests.checkpoints import Shape, make_checkpoint

    shape = Shape(
        hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_layers=1, dense_layers=0,
        num_experts=args.experts, top_k=2, n_group=1, topk_group=1, fp8_experts=fp8,
    )  # fmt: skip
    make_checkpoint(checkpoint, shape, dtype="bfloat16")


def _measure(checkpoint: Path, dtype: str, pairs: int) -> dict[str, object]:
    from cluster.config import DispatchConfig
    from cluster.model.identity import model_identity
    from cluster.model.spec import load_checkpoint_index, load_model_spec
    from deployments.experts.forms import choose_form
    from deployments.experts.sources import Peer
    from deployments.experts.store import ExpertStore
    from routing.tokens.expert_pieces import ExpertPeer
    from routing.tokens.kept_memory import keep_freed_memory
    from tests.expert_processes import ExpertPlane

    keep_freed_memory()  # as an expert worker
    index, spec = load_checkpoint_index(checkpoint), load_model_spec(checkpoint)
    form = choose_form(dtype, "auto", spec, "cpu")
    share = dict.fromkeys(spec.moe_layers, tuple(range(spec.num_experts)))
    threads = max(2, min(8, len(os.sched_getaffinity(0))))
    _plain_read(checkpoint, threads)  # into the page cache

    def load(peers: Sequence[Peer] = ()) -> tuple[float, ExpertStore]:
        store = ExpertStore(index, spec, form, "cpu", share)
        began_s = time.perf_counter()
        store.load(share, peers=peers)
        return time.perf_counter() - began_s, store

    took_s, store = load()
    nbytes, size, store_layout = store.bytes_read, store.nbytes, store.layout
    del store
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status_kib("VmRSS")
    load()
    peak = (_status_kib("VmHWM") - before) * 1024 - size
    loads, reads, disk_s, peer_s, both_s = [], [], [], [], []
    with ExpertPlane(checkpoint, Path(tempfile.gettempdir())) as plane:
        (holder,) = plane.start([1], form=dtype)
        link = ExpertPeer(holder.address, model_identity(spec, index), store_layout, DispatchConfig(), None)
        for _ in range(pairs):
            reads.append(_plain_read(checkpoint, threads))
            took_s, store = load()
            del store
            disk_s.append(took_s)
            loads.append(nbytes / took_s / 1e9)
            peer_s.append(_fetch_all(ExpertStore(index, spec, form, "cpu", share), link, share))
            took_s, store = load([Peer(link, share)])
            del store
            both_s.append(took_s)
        link.close()
    ratio = statistics.median(load_ / read for load_, read in zip(loads, reads, strict=True))
    return {
        "form": form.value, "gb_per_s": max(loads), "plain_gb_per_s": max(reads), "ratio": ratio,
        "peak_mib": peak / 2**20, "peer_gb_per_s": size / min(peer_s) / 1e9,
        "peer_ratio": statistics.median(disk / peer for disk, peer in zip(disk_s, peer_s, strict=True)),
        "both_ratio": statistics.median(disk / both for disk, both in zip(disk_s, both_s, strict=True)),
    }  # fmt: skip


def _fetch_all(store: ExpertStore, link: ExpertPeer, share: Share) -> float:
    """Return the seconds that it takes to fill all places from a peer alone."""
    began_s = time.perf_counter()
    for layer, ids in share.items():
        for expert in ids:
            assert link.fetch(layer, expert, store.layers[layer].parts_of(expert))
    return time.perf_counter() - began_s


def _plain_read(checkpoint: Path, threads: int) -> float:
    """Return GB/s of reading all shards, piece by piece, into memory of their size that is new, in huge pages."""
    files = {os.open(file, os.O_RDONLY): file.stat().st_size for file in sorted(checkpoint.glob("*.safetensors"))}
    with mmap.mmap(-1, sum(files.values()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        pieces, begin = [], 0
        for file, size in files.items():
            pieces += [(file, at, begin + at, min(_READ_BYTES, size - at)) for at in range(0, size, _READ_BYTES)]
            begin += size

        def read(piece: tuple[int, int, int, int]) -> int:
            file, at, place, size = piece
            with memoryview(memory) as whole, whole[place : place + size] as part:
                return os.preadv(file, [part], at)

        began_s = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            done = sum(pool.map(read, pieces))
        took_s = time.perf_counter() - began_s
    for file in files:
        os.close(file)
    return done / took_s / 1e9


def _status_kib(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])


if __name__ == "__main__":
    main()
