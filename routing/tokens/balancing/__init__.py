"""Balances experts over workers: loads and capacities in, a placement and an ordered list of moves out. Pure.

Nothing here loads, drops or publishes: who has loads, capacities and a placement calls `place` (from nothing) or
`balance` (from what is there) and carries the moves out.
"""

from routing.tokens.balancing.balancer import balance, place, score
from routing.tokens.balancing.plan import Move, Plan
from routing.tokens.balancing.records import BalanceOptions, Placement, Score, WorkerCapacity

__all__ = ["BalanceOptions", "Move", "Placement", "Plan", "Score", "WorkerCapacity", "balance", "place", "score"]
