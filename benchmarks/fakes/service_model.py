"""A service model of an attention replica: the stated cost of requests, to be simulated or run in real time.

One engine works in steps, as vLLM's scheduler does. A step gives every decoding sequence one token and spends the rest
of its token budget on prefill, first come first served (chunked prefill):

    step time = base_s + sequence_s * decoding sequences + prefilled tokens / prefill_tokens_per_s

A sequence starts when a decode slot and the KV blocks for its whole prompt and completion are free (so nothing is ever
preempted). Prompt blocks are shared and kept after their last user in the order of use, and are not computed again.
No clock in here: `benchmarks.fakes.replica` runs it in real time, `benchmarks.replica_choice` simulates it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 16  # vLLM's default


@dataclass(frozen=True)
class ServiceModel:
    """One replica's speed and size."""

    slots: int  # decode slots
    kv_cache_tokens: int
    base_s: float  # of a step
    sequence_s: float  # a step's further time per decoding sequence
    prefill_tokens_per_s: float
    step_tokens: int = 2048  # most tokens of one step


@dataclass(eq=False)
class SimulatedSequence:
    """One sequence."""

    blocks: Sequence[int]  # hash of each full block of the prompt, covering all before it
    prompt_tokens: int
    new_tokens: int
    computed_tokens: int = 0  # of the prompt, cached ones included
    cached_tokens: int = 0
    generated: int = 0
    private_blocks: int = 0  # held by this sequence alone
    shared: list[int] = field(default_factory=list)  # prompt blocks that others may use too


class KvCache:
    """Blocks in use by jobs, and prompt blocks that nobody uses now but somebody may again."""

    def __init__(self, blocks: int) -> None:
        self._free = blocks  # neither in use nor cached
        self._total = blocks
        self._users: dict[int, int] = {}  # of each shared block in use
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, oldest first

    @property
    def usage(self) -> float:
        """Fraction of the blocks that jobs hold."""
        return 1 - (self._free + len(self._unused)) / self._total

    def start(self, job: SimulatedSequence) -> bool:
        """Give the job what it needs to run to its end. False: there is no room."""
        hits = 0
        for block in job.blocks[: (job.prompt_tokens - 1) // BLOCK_TOKENS]:  # the last token is always computed
            if block not in self._users and block not in self._unused:
                break
            hits += 1
        shared = list(job.blocks[:hits])
        private = -(-(job.prompt_tokens + job.new_tokens) // BLOCK_TOKENS) - hits
        taken = sum(block in self._unused for block in shared)
        if private > self._free + len(self._unused) - taken:
            return False
        for block in shared:
            self._use(block)
        while self._free < private:
            self._unused.popitem(last=False)
            self._free += 1
        self._free -= private
        job.shared, job.private_blocks = shared, private
        job.cached_tokens = job.computed_tokens = hits * BLOCK_TOKENS
        return True

    def publish(self, job: SimulatedSequence) -> None:
        """Others may use what the job has computed of its prompt."""
        for block in job.blocks[len(job.shared) : job.computed_tokens // BLOCK_TOKENS]:
            job.private_blocks -= 1
            if block in self._users or block in self._unused:
                self._free += 1  # computed twice at the same time: one copy is enough
            self._use(block)
            job.shared.append(block)

    def end(self, job: SimulatedSequence) -> None:
        """The job is over; the ends of its prompt are evicted before their beginnings."""
        self._free += job.private_blocks
        for block in reversed(job.shared):
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._unused[block] = None
        job.shared, job.private_blocks = [], 0

    def _use(self, block: int) -> None:
        self._unused.pop(block, None)
        self._users[block] = self._users.get(block, 0) + 1


class SimulatedEngine:
    """One replica's scheduler. `begin_step`, wait as long as it says, `end_step`."""

    def __init__(self, model: ServiceModel) -> None:
        self.model = model
        self.cache = KvCache(model.kv_cache_tokens // BLOCK_TOKENS)
        self.waiting: deque[SimulatedSequence] = deque()
        self.running: list[SimulatedSequence] = []
        self._planned: list[tuple[SimulatedSequence, int]] = []  # with prompt tokens of this step; 0: it decodes

    def add(self, job: SimulatedSequence) -> None:
        """Queue it. One that can never fit must not be added."""
        self.waiting.append(job)

    def fits(self, job: SimulatedSequence) -> bool:
        """Whether an idle replica could run it."""
        return job.prompt_tokens + job.new_tokens <= self.model.kv_cache_tokens // BLOCK_TOKENS * BLOCK_TOKENS

    def abort(self, job: SimulatedSequence) -> None:
        """Drop it, wherever it is. Harmless for one that ended."""
        if job in self.running:
            self.running.remove(job)
            self.cache.end(job)
        elif job in self.waiting:
            self.waiting.remove(job)

    def begin_step(self) -> float | None:
        """Plan a step; returns its length in seconds, or None if there is nothing to do."""
        while self.waiting and len(self.running) < self.model.slots and self.cache.start(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        decoding = [(job, 0) for job in self.running if job.computed_tokens == job.prompt_tokens]
        budget = max(0, self.model.step_tokens - len(decoding))
        prefill = []
        for job in self.running:
            chunk = min(job.prompt_tokens - job.computed_tokens, budget)
            if chunk:
                prefill.append((job, chunk))
                budget -= chunk
        self._planned = decoding + prefill
        if not self._planned:
            return None
        model, prefilled = self.model, sum(chunk for _, chunk in prefill)
        return model.base_s + model.sequence_s * len(decoding) + prefilled / model.prefill_tokens_per_s

    def end_step(self) -> list[SimulatedSequence]:
        """The jobs that have one more token now; those that have them all are over."""
        emitted = []
        for job, chunk in self._planned:
            if job not in self.running:
                continue  # aborted meanwhile
            job.computed_tokens += chunk
            if chunk:
                self.cache.publish(job)
            if job.computed_tokens == job.prompt_tokens:
                job.generated += 1
                emitted.append(job)
                if job.generated >= job.new_tokens:
                    self.finish(job)
        return emitted

    def finish(self, job: SimulatedSequence) -> None:
        """The job stops here (at its bound, or because it said its last word)."""
        self.running.remove(job)
        self.cache.end(job)
