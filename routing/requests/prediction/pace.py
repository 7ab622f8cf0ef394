"""How long requests will take: how many tokens they generate, and what prefill and decode steps cost.

All of it is learned from requests as they run, and starts from priors that let everything through.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from routing.requests.prediction.decayed import Fit, Mean
from routing.requests.request import Ask, Priority

# Before anything is learned: short completions on a quick replica, so that ignorance refuses nobody for long.
_PRIOR_TOKENS = 128.0
_PRIOR_STEP_S = 0.02
_PRIOR_PREFILL_S_PER_TOKEN = 1e-4
_MEMORY_S = 30.0  # of step and prefill times; a regime change (an expert host lost) is learned in a few seconds
_REQUESTS = 50.0  # about how many of a tenant's last completions count
_PRIOR_REQUESTS = 2.0  # what a class's mean weighs against a tenant's own
_MOST_TENANTS = 2048  # per-tenant lengths that are remembered
_LONGEST = 10.0  # one completion counts as at most this many times the mean so far


class _Ends:
    """A geometric length's ending probability per token, from completions that ended by themselves or were cut."""

    def __init__(self) -> None:
        self.ends = 0.0
        self.tokens = 0.0

    def add(self, tokens: float, ended: bool) -> None:
        kept = 1 - 1 / _REQUESTS
        self.ends = self.ends * kept + ended
        self.tokens = self.tokens * kept + tokens


class Lengths:
    """Expected completion lengths per tenant and class.

    A completion is taken to end with a constant probability per token or at its bound, whichever is first. One number
    then serves any `max_tokens`, completions that were cut off count for what they show, and what is left of a
    running one does not depend on how far it is. How wrong that is for one request does not matter: only sums over
    many are used.
    """

    def __init__(self) -> None:
        self._tenants: OrderedDict[tuple[str, Priority], _Ends] = OrderedDict()
        self._classes = {priority: _Ends() for priority in Priority}

    def end_probability(self, ask: Ask) -> float:
        """Each token of one of this request's sequences is the last one with this probability."""
        of_class = self._classes[ask.priority]
        prior = (of_class.ends + 1) / (of_class.tokens + _PRIOR_TOKENS)
        own = self._tenants.get((ask.tenant.name, ask.priority))
        if own is None:
            return prior
        return (own.ends + _PRIOR_REQUESTS * prior * _PRIOR_TOKENS) / (own.tokens + _PRIOR_REQUESTS * _PRIOR_TOKENS)

    def observe(self, ask: Ask, generated_tokens: int, complete: bool) -> None:
        """A request ended with so many tokens over all its sequences. Not `complete`: it was cut off."""
        if not ask.sequences:
            return
        each, bound = generated_tokens / ask.sequences, ask.max_new_tokens / ask.sequences
        each = min(each, _LONGEST / self.end_probability(ask))
        ended = complete and each < bound
        key = (ask.tenant.name, ask.priority)
        own = self._tenants.pop(key, None) or _Ends()
        self._tenants[key] = own
        if len(self._tenants) > _MOST_TENANTS:
            self._tenants.popitem(last=False)
        for ends in (own, self._classes[ask.priority]):
            ends.add(each, ended)


class Pace:
    """What prefill and decode cost on this cluster's replicas, in seconds.

    A decode step's time is learned as a + b * running sequences + c * prompt tokens prefilled in between, the way from
    a request's placing to its first token as d + e * prompt tokens that had to be computed until then. The expert
    plane's queue is taken off what is observed and put back as it is now, so a change of it counts at once.
    """

    def __init__(self) -> None:
        # Ridges: a handful of observations outweigh the priors.
        self._steps = Fit((_PRIOR_STEP_S, 0.0, 0.0), (3.0, 3.0, 3.0), _MEMORY_S)
        self._prefill = Fit((_PRIOR_STEP_S, _PRIOR_PREFILL_S_PER_TOKEN), (3.0, 3e4), _MEMORY_S)
        self._prefilled_per_step = Mean(0.0, 0.02)
        self.steps_seen_s = self.prefill_seen_s = -math.inf  # when one was last observed

    def observe_steps(
        self, steps: float, took_s: float, running: float, prefilled_tokens: float, queue_s: float, now_s: float
    ) -> None:
        """A sequence got `steps` tokens in `took_s` seconds beside so many running ones, itself included. Meanwhile
        others' prompts of `prefilled_tokens` were computed on its replica, and each step waited `queue_s` for experts.
        """
        prefilled = prefilled_tokens / steps
        self._steps.observe((1.0, running, prefilled), max(0.0, took_s / steps - queue_s), now_s)
        self._prefilled_per_step.add(prefilled)
        self.steps_seen_s = now_s

    def observe_prefill(self, tokens: float, took_s: float, queue_s: float, now_s: float) -> None:
        """A first token came `took_s` after the request was placed, with `tokens` to compute until then."""
        self._prefill.observe((1.0, tokens), max(0.0, took_s - queue_s), now_s)
        self.prefill_seen_s = now_s

    def step_s(self, running: float, queue_s: float) -> float:
        """Seconds per token beside so many running sequences, others' prefills included."""
        return queue_s + max(1e-4, self._steps.predict((1.0, running, self._prefilled_per_step.value)))

    def alone_step_s(self) -> float:
        """Seconds per token on an idle replica: no other sequences, no prefills, no queue at the experts."""
        return max(1e-4, self._steps.predict((1.0, 1.0, 0.0)))

    def prefill_s(self, tokens: float, queue_s: float) -> float:
        """Seconds from placing to the first token, with `tokens` to compute until then."""
        return queue_s + max(1e-4, self._prefill.predict((1.0, tokens)))

    def bearable_step_s(self, promised_s: float) -> float:
        """The longest step that is no overload. Where not even an idle replica keeps a promise, only what others add to
        its step is judged.
        """
        alone_s = self.alone_step_s()
        return promised_s if alone_s <= promised_s else promised_s + alone_s

    def prefill_line(self) -> tuple[float, ...]:
        """Seconds that every prefill takes, and seconds per token, without the experts' queue."""
        return self._prefill.coefficients()

    def most_running(self, step_s: float, queue_s: float) -> float:
        """How many sequences can run at a step time of at most `step_s`; below one if not even one can."""
        fixed, each, per_token = self._steps.coefficients()
        left_s = step_s - queue_s - fixed - per_token * self._prefilled_per_step.value
        if left_s < 0:
            return 0.0
        return left_s / each if each > 0 else math.inf

    def forget(self, now_s: float) -> None:
        """Let time pass: what is not observed any more returns to the priors."""
        self._steps.forget(now_s)
        self._prefill.forget(now_s)
