"""Counts which experts the router chooses: tokens per expert and layer, as one engine's process sees them.

The counts travel in a file to the engine's Serve replica and from there to the directory, which balances experts by
them. Legend: L layers, E experts of a layer, T tokens, K experts per token.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FOLD_S = 1.0
_WRITE_S = 5.0


class RoutedTokens(NamedTuple):
    """Tokens that had an expert computed, since the process started. `tokens_LE`: int64, a row for each of `layers`."""

    layers: tuple[int, ...]
    tokens_LE: np.ndarray

    @property
    def encoded(self) -> bytes:
        """What `decode` reads back: a line of JSON, then the array."""
        head = {"layers": self.layers, "experts": self.tokens_LE.shape[1]}
        return json.dumps(head).encode() + b"\n" + self.tokens_LE.astype("<i8").tobytes()

    @classmethod
    def decode(cls, data: bytes) -> RoutedTokens:
        """Return what was `encoded`. Raises ValueError for anything else."""
        line, _, array = data.partition(b"\n")
        head = json.loads(line)
        layers = tuple(head["layers"])
        return cls(layers, np.frombuffer(array, "<i8").reshape(len(layers), head["experts"]))

    @classmethod
    def added(cls, parts: Iterable[RoutedTokens]) -> RoutedTokens | None:
        """Return what several processes have counted, added up; None of none."""
        parts = list(parts)
        if not parts:
            return None
        layers = tuple(sorted({layer for part in parts for layer in part.layers}))
        total_LE = np.zeros((len(layers), max(part.tokens_LE.shape[1] for part in parts)), dtype=np.int64)
        for part in parts:
            total_LE[[layers.index(layer) for layer in part.layers]] += part.tokens_LE
        return cls(layers, total_LE)


@dataclass(frozen=True)
class RoutedTokensFile:
    """A file that the engine's process replaces atomically and its Serve replica reads."""

    path: Path

    def write(self, tokens: RoutedTokens) -> None:
        """Replace the file: readers see the old counts or the new ones. Raises OSError."""
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(tokens.encoded)
        partial.replace(self.path)

    def read(self) -> RoutedTokens | None:
        """Return the last counts, None before the first."""
        try:
            return RoutedTokens.decode(self.path.read_bytes())
        except FileNotFoundError:
            return None


class RoutedTokensCounter:
    """Costs the dispatching thread one append per dispatch. Thread-safe."""

    def __init__(self, num_experts: int, file: RoutedTokensFile | None = None) -> None:
        """`file`: where `tend` writes the counts every few seconds."""
        self._file = file
        self._num_experts = num_experts
        self._chosen: deque[tuple[int, np.ndarray]] = deque()
        self._folding = threading.Lock()
        self._tokens: dict[int, np.ndarray] = {}  # by layer, int64 [E]
        self._folded_s = self._written_s = 0.0
        self._news = False  # that the file does not have

    def record(self, layer: int, expert_ids_TK: np.ndarray) -> None:
        """Count the router's choice, which must not change any more: any integer dtype; ids of no expert are left out.
        """
        self._chosen.append((layer, expert_ids_TK))

    def totals(self) -> RoutedTokens:
        """Return all that was recorded so far."""
        with self._folding:
            self._fold()
            layers = tuple(sorted(self._tokens))
            return RoutedTokens(layers, np.array([self._tokens[layer] for layer in layers], dtype=np.int64)
                                .reshape(len(layers), self._num_experts))  # fmt: skip

    def tend(self, now_s: float) -> None:
        """Fold what was recorded, and write the file if it is time. To be called a few times a second."""
        if now_s - self._folded_s < _FOLD_S:
            return
        self._folded_s = now_s
        with self._folding:
            self._fold()
        if self._file is not None and self._news and now_s - self._written_s >= _WRITE_S:
            self._written_s, self._news = now_s, False
            with contextlib.suppress(OSError):  # dispatches do not depend on it
                self._file.write(self.totals())

    def _fold(self) -> None:
        by_layer: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        for _ in range(len(self._chosen)):
            layer, ids_TK = self._chosen.popleft()
            by_layer[layer].append(ids_TK.ravel())
        for layer, parts in by_layer.items():
            ids = np.concatenate(parts)
            counts_E = np.bincount(ids[(ids >= 0) & (ids < self._num_experts)], minlength=self._num_experts)
            self._tokens[layer] = self._tokens.get(layer, 0) + counts_E
            self._news = True
