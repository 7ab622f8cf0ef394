"""Which experts go where when a worker is lost, or the number of slots changes. Pure; whole experts, by count alone:
the load is `routing.tokens.balancing`'s.

Legend: L MoE layers, E experts of a layer. Shares are bool [L, E].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

_Key = TypeVar("_Key")  # a slot, or a worker


def with_orphans(
    orphans_LE: np.ndarray, wanted: Mapping[_Key, np.ndarray], has: Mapping[_Key, np.ndarray]
) -> dict[_Key, np.ndarray]:
    """Divide experts that nobody is wanted to hold among workers: to one that `has` it, for it need not be loaded
    (again), else to the one with the fewest experts of the layer. Returns what each is wanted to hold with them.
    """
    taken = {worker_id: wanted_LE.copy() for worker_id, wanted_LE in wanted.items()}
    for layer in np.flatnonzero(orphans_LE.any(axis=1)).tolist():
        count = {worker_id: int(wanted_LE[layer].sum()) for worker_id, wanted_LE in wanted.items()}
        for expert in orphans_LE[layer].nonzero()[0].tolist():
            taker = min(count, key=lambda one: (not has[one][layer, expert], count[one]))
            taken[taker][layer, expert] = True
            count[taker] += 1
    return taken


def with_enough(
    shares: Mapping[_Key, np.ndarray], copies_LE: np.ndarray, has: Mapping[_Key, np.ndarray]
) -> dict[_Key, np.ndarray]:
    """Return shares in which each expert is `copies_LE` times (int), or once in each. What is added goes where it is
    held already (`has`; nothing is by those that are not in it), else to the smallest share of the layer.
    """
    enough = {key: share_LE.copy() for key, share_LE in shares.items()}
    lacking_LE = copies_LE.astype(np.int64)
    for share_LE in shares.values():
        lacking_LE -= share_LE
    for layer, expert in np.argwhere(lacking_LE > 0).tolist():
        for _ in range(int(lacking_LE[layer, expert])):
            without = [key for key, share_LE in enough.items() if not share_LE[layer, expert]]
            if not without:
                break
            held = {key for key in without if key in has and has[key][layer, expert]}
            taker = min(without, key=lambda key: (key not in held, enough[key][layer].sum()))
            enough[taker][layer, expert] = True
    return enough


def with_one_more(shares: Mapping[_Key, np.ndarray], new: _Key) -> dict[_Key, np.ndarray]:
    """Return shares of which a part of equal size goes to `new`: in each layer, experts of the largest ones."""
    more = {key: share_LE.copy() for key, share_LE in shares.items()}
    new_LE = np.zeros_like(next(iter(more.values())))
    total_L = sum(share_LE.sum(axis=1) for share_LE in shares.values())
    for layer, part in enumerate((total_L // (len(shares) + 1)).tolist()):
        for _ in range(part):
            givers = [key for key, share_LE in more.items() if (share_LE[layer] & ~new_LE[layer]).any()]
            if not givers:
                break
            giver = max(givers, key=lambda key: more[key][layer].sum())
            expert = int((more[giver][layer] & ~new_LE[layer]).nonzero()[0][-1])
            more[giver][layer, expert], new_LE[layer, expert] = False, True
    return more | {new: new_LE}
