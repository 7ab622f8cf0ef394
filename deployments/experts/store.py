"""The experts that a worker holds: it loads more and drops some while it computes.

On CPU each layer has a place for every expert of the model, most of them without memory (`sparse_memory`). On GPUs, and
where the system does not allow that, there is room for the first share only, and it stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

from cluster.model.checkpoint import CheckpointIndex
from cluster.model.spec import ModelSpec
from deployments.experts.forms import Form
from deployments.experts.loading import Loaded, OnProgress, fill_layers
from deployments.experts.operators import load_operators
from deployments.experts.sources import Peer
from deployments.experts.sparse_memory import SparseStack
from deployments.experts.weights import ExpertWeights, LayerExperts, empty_layer, layer_of, shapes_of
from routing.tokens.share import Share

_LAYOUTS = 1  # another number when a form's bytes change

logger = logging.getLogger(__name__)


class ExpertStore:
    """One thread at a time loads and drops, others may `read`. What `layers` has of an expert that is not held is not
    to be read.
    """

    def __init__(self, index: CheckpointIndex, spec: ModelSpec, form: Form, device: str, first: Share) -> None:
        """`first`: the share that is to be loaded first. Reads nothing yet."""
        self._index, self._spec = index, spec
        self._stacks: dict[int, tuple[SparseStack, ...]] = {}
        self._releasing = threading.Lock()
        self.held: Mapping[int, tuple[int, ...]] = {}
        self.bytes_read = 0  # from the shards, their headers left out
        self.layers: dict[int, LayerExperts] = {}
        try:
            if device == "cpu":
                for layer in spec.moe_layers:
                    self._stacks[layer] = tuple(SparseStack(*one) for one in shapes_of(spec, spec.num_experts, form))
        except OSError as error:
            logger.warning("experts cannot be loaded and dropped at run time, for lack of address space (%s): set "
                           "vm.overcommit_memory to 0 or 1, and no limit of the address space", error)  # fmt: skip
            self._stacks.clear()
        if self.elastic:
            every = tuple(range(spec.num_experts))
            for layer, stacks in self._stacks.items():
                self.layers[layer] = layer_of(spec, every, form, [stack.tensor for stack in stacks])
        else:
            for layer in sorted(first):
                self.layers[layer] = empty_layer(spec, tuple(sorted(first[layer])), form, device)

    @property
    def weights(self) -> ExpertWeights:
        """All places, of held experts and of others."""
        return ExpertWeights(self.layers, self._spec.num_experts, self.bytes_read)

    @property
    def elastic(self) -> bool:
        """Whether more can be loaded and some dropped after the first share."""
        return bool(self._stacks)

    @property
    def nbytes(self) -> int:
        """Return the size in memory of what is held."""
        return sum(self.layers[layer].expert_bytes * len(ids) for layer, ids in self.held.items())

    @property
    def expert_bytes(self) -> int:
        """Return the size in memory of one expert."""
        return next(iter(self.layers.values())).expert_bytes

    def nbytes_of(self, share: Share) -> int:
        """Return the size in memory that a share has or would have."""
        return sum(self.layers[layer].expert_bytes * len(ids) for layer, ids in share.items())

    def load(self, share: Share, on_progress: OnProgress | None = None, peers: Sequence[Peer] = ()) -> Loaded:
        """Hold these experts too. Raises CheckpointError, and then holds what it held before."""
        assert self.elastic or not self.held, "only an elastic store loads more than its first share"
        wanted = {layer: [e for e in ids if e not in self.held.get(layer, ())] for layer, ids in share.items()}
        loaded = fill_layers(self._index, self._spec, self.layers, wanted, on_progress, peers)
        self.bytes_read += loaded.bytes_read
        layers = sorted({*self.held, *wanted})
        self.held = {layer: tuple(sorted({*self.held.get(layer, ()), *wanted.get(layer, ())})) for layer in layers}
        return loaded

    def drop(self, share: Share) -> Share:
        """Hold these experts no more, and return what is held then. Their memory is still there: `release` it when
        nobody computes with it any more.
        """
        assert self.elastic
        self.held = {layer: tuple(e for e in ids if e not in share.get(layer, ())) for layer, ids in self.held.items()}
        return self.held

    def release(self, share: Share) -> None:
        """Give back the memory of experts that were dropped."""
        with self._releasing:
            for layer, ids in share.items():
                for stack in self._stacks[layer]:
                    for expert in ids:
                        stack.release(expert)

    @property
    def layout(self) -> str:
        """How experts lie in memory: bytes of one store are right in another one with the same layout, of the same
        checkpoint.
        """
        experts = next(iter(self.layers.values()))
        return f"{_LAYOUTS} {experts.form.name} {load_operators()} {experts.expert_bytes}"

    def read(self, layer: int, expert: int, part: int, offset: int, length: int) -> bytes:
        """Return some bytes of a part of an expert, as `LayerExperts.parts_of` counts them; none if it is not held.
        Raises ValueError if there are no such bytes.
        """
        with self._releasing:
            if expert not in self.held.get(layer, ()):
                return b""
            parts = self.layers[layer].parts_of(self.layers[layer].ids.index(expert))
            if part >= len(parts) or offset + length > len(parts[part]):
                raise ValueError(f"an expert has no bytes {offset} to {offset + length} of part {part}")
            return bytes(parts[part][offset : offset + length])
