"""A fidelity card: how far each way to serve a model is from the model itself.

The reference is unsplit vLLM in float32 on the same text. Against it: the configured dtype unsplit and split, and the
split with each form of experts and of the rows on the wire; KL divergence and agreement on the most likely token over
the whole vocabulary (`--top` tokens of a large one), teacher-forced. Then greedy answers of the split: prompts one by
one against all at once, MTP drafts on against off, and after a worker was killed against before. It exits with 1 if a
bound is broken. `python -m benchmarks.fidelity --help`
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.fidelity.measures import Agreement, agreement, same_tokens
from cluster.config import Config, DispatchConfig
from cluster.config.file import load_config
from cluster.model.spec import ModelSpec, load_model_spec
from tests.engines import Engine
from tests.expert_processes import ExpertPlane

_SHARES = (3, 1)
# What a variant may be off by on average, in nats: some four times what the demo model is (docs/fidelity.md).
_KL = {"bfloat16": 0.001, "float16": 0.0005, "float32": 1e-6, "int8": 0.001, "rows in FP8": 0.001}
_KL_OF_FP8 = 0.02  # a checkpoint whose experts are FP8 is computed so, and the reference dequantises them
_SAME_TOKENS = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.7}  # greedy answers part at the first near tie


@dataclass(frozen=True)
class Row:
    """One line of the card."""

    variant: str
    against: str
    measured: Mapping[str, float]
    bound: str
    kept: bool


class Card:
    """Runs the variants of one model."""

    def __init__(
        self, config: Config, spec: ModelSpec, texts: Sequence[Sequence[int]], top: int, threads: int, factor: float
    ) -> None:
        """`texts`: token ids. `top`: tokens that are compared at each position. `factor`: of all bounds of KL."""
        self._config, self._spec, self._texts, self._threads = config, spec, texts, threads
        self._top = min(top, spec.vocab_size)
        self._tokens_P = np.concatenate([np.asarray(text[1:]) for text in texts])
        self._dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
        self._kl = {name: factor * max(bound, _KL_OF_FP8 if spec.expert_quant else 0) for name, bound in _KL.items()}
        self.rows: list[Row] = []

    def run(self) -> None:
        """All of them. An engine at a time."""
        with Engine(self._config.model.path, engine_args=self._limits, threads=self._threads) as engine:
            exact_PV = self._predict(engine)
        with Engine(
            self._config.model.path, dtype=self._dtype, engine_args=self._limits, threads=self._threads
        ) as engine:
            unsplit_PV = self._predict(engine)
        self._distance(f"unsplit, {self._dtype}", "unsplit, float32", exact_PV, unsplit_PV, self._kl[self._dtype])
        rows_in_fp8 = DispatchConfig(dispatch_dtype="float8_e4m3fn")
        forms = ["auto"] if self._dtype == "float32" else ["auto", "int8"]
        for form, dispatch in [*((form, DispatchConfig()) for form in forms), ("auto", rows_in_fp8)]:
            what = "rows in FP8" if dispatch is rows_in_fp8 else form
            with self._plane(dispatch) as plane:
                plane.publish(plane.start(_SHARES, form=form))
                with self._engine(plane) as engine:
                    split_PV = self._predict(engine)
            name = f"split, {self._dtype}" + ("" if what == "auto" else f", {what}")
            bound = self._kl[self._dtype] if what == "auto" else self._kl[what] + self._kl[self._dtype]
            self._distance(name, "unsplit, float32", exact_PV, split_PV, bound)
            if what == "auto":
                self._distance(name, f"unsplit, {self._dtype}", unsplit_PV, split_PV, self._kl[self._dtype])
        self._answers()

    @property
    def _limits(self) -> Mapping[str, Any]:
        longest = max(map(len, self._texts)) + 1
        return {"max_logprobs": -1, "max_model_len": longest, "max_num_batched_tokens": max(2048, longest)}

    @contextlib.contextmanager
    def _plane(self, dispatch: DispatchConfig) -> Iterator[ExpertPlane]:
        with tempfile.TemporaryDirectory(prefix="fidelity-") as folder:
            model, dtype = self._config.model.path, self._dtype
            with ExpertPlane(model, Path(folder), dtype=dtype, dispatch=dispatch) as plane:  # type: ignore[arg-type]
                yield plane

    def _engine(self, plane: ExpertPlane, **more: Any) -> Engine:
        args = {**plane.engine_args, **self._limits, **more}
        return Engine(self._config.model.path, dtype=self._dtype, engine_args=args, threads=self._threads)

    def _predict(self, engine: Engine) -> np.ndarray:
        return engine.distributions(self._texts, self._spec.vocab_size, self._top)

    def _answers(self) -> None:
        prompts = [list(text[: len(text) // 2]) for text in self._texts]
        tokens = min(len(text) - len(prompt) for text, prompt in zip(self._texts, prompts, strict=True))
        with self._plane(DispatchConfig()) as plane:
            workers = plane.start(_SHARES, replicas=2)
            plane.publish(workers)
            with self._engine(plane) as engine:
                together = engine.generate(prompts, tokens).token_ids
                alone = [engine.generate([prompt], tokens).token_ids[0] for prompt in prompts]
                plane.kill(workers[0])
                after = engine.generate(prompts, tokens).token_ids
            self._same("prompts one by one", "all at once", together, alone)
            self._same("after a worker was killed", "before", together, after)
            if self._spec.num_mtp_layers:
                plane.publish(plane.start(_SHARES))
                drafts = {"method": "mtp", "num_speculative_tokens": 1}
                with self._engine(plane, speculative_config=drafts) as engine:
                    self._same("MTP drafts", "no drafts", together, engine.generate(prompts, tokens).token_ids)

    def _distance(self, variant: str, against: str, reference: np.ndarray, other: np.ndarray, bound: float) -> None:
        found: Agreement = agreement(reference, other, self._tokens_P)
        self.rows.append(Row(variant, against, asdict(found), f"KL {bound:g}", found.kl_mean <= bound))

    def _same(self, variant: str, against: str, first: list[list[int]], second: list[list[int]]) -> None:
        part, bound = same_tokens(first, second), _SAME_TOKENS[self._dtype]
        self.rows.append(Row(f"split, {variant}", against, {"same_tokens": part}, f"tokens {bound:g}", part >= bound))


def report(rows: Sequence[Row]) -> str:
    """The card as text."""
    lines = [f"{'variant':<38}{'against':<20}{'KL mean':>10}{'KL p99':>10}{'top-1':>8}{'loss':>10}{'tokens':>8}  bound"]
    for row in rows:
        cells = "".join(
            f"{row.measured[key]:>{width}.{digits}f}" if key in row.measured else " " * width
            for key, width, digits in (("kl_mean", 10, 6), ("kl_p99", 10, 5), ("top1", 8, 4), ("loss", 10, 5),
                                       ("same_tokens", 8, 3))
        )  # fmt: skip
        lines.append(f"{row.variant:<38}{row.against:<20}{cells}  {row.bound}{'' if row.kept else ': BROKEN'}")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration; its model, dtypes and nothing else count")
    parser.add_argument("--text", type=Path, help="text of a kind that the model knows; Python's textwrap if not set")
    parser.add_argument("--sequences", type=int, default=8, help="pieces of the text")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--top", type=int, default=4096, help="most likely tokens that are compared at each position")
    parser.add_argument("--factor", type=float, default=1.0, help="of all bounds of KL, which are the demo model's")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of the engine")
    parser.add_argument("--json", action="store_true", help="every value, as JSON")
    args = parser.parse_args()
    config = load_config(args.config)
    text = args.text.read_text() if args.text else inspect.getsource(textwrap)
    ids: list[int] = AutoTokenizer.from_pretrained(config.model.path).encode(text)
    texts = [ids[at * args.length : (at + 1) * args.length] for at in range(args.sequences)]
    if len(texts[-1]) < args.length:
        parser.error(f"the text has {len(ids)} tokens, and {args.sequences} x {args.length} are wanted")
    card = Card(config, load_model_spec(config.model.path), texts, args.top, args.threads, args.factor)
    card.run()
    print(json.dumps([asdict(row) for row in card.rows]) if args.json else report(card.rows))
    if not all(row.kept for row in card.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
