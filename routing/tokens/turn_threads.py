"""The two threads of an expert server: one computes, and one of them polls for frames at any time.

A lone small request costs no thread switch: the computing thread polls, computes and answers by itself. While it is in
a kernel that takes long, or answers are still on their way out, the helper polls instead, so that pings are answered,
frames are read and clients that left are noticed. It hands the polling back when the computing thread is idle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum

from routing.tokens.batcher import Batcher, Owner, QueuedRequest, Turn
from routing.tokens.frame_server import FrameServer

logger = logging.getLogger(__name__)

_LONG_S = 0.002  # a turn that is expected to take longer gets the helper from its start: some 50 us of wake-ups
_MOST_EVENTS = 1024  # between two turns: several for each frame of as many streams as there are engines
_TICK_S = 0.005  # how often the helper looks whether it is still needed


class _Polls(Enum):
    COMPUTER = "the computing thread"
    HELPER = "the helper"
    NOBODY = "nobody: the computing thread is in a short turn"


class TurnThreads:
    """Runs turns of `batcher` and the polling of `frames`. Guards the batcher: it is reached through here only."""

    def __init__(self, batcher: Batcher, run: Callable[[Turn], None], frames: FrameServer, watch_s: float) -> None:
        """`watch_s`: how long a turn may take unexpectedly before the helper polls: less than a ping may wait."""
        self._batcher = batcher
        self._run = run
        self._frames = frames
        self._watch_s = watch_s
        self._changed = threading.Condition(threading.Lock())  # of all below
        self._polls = _Polls.COMPUTER
        self._idle = False  # the computing thread waits for work or for the polling
        self._wanted = False  # the present turn is expected to be long
        self._since: float | None = None  # when the present turn began
        self._last = (0.0, 1)  # seconds and rows of the turn before
        self._threads = [
            threading.Thread(target=self._compute_loop, name="experts", daemon=True),
            threading.Thread(target=self._help_loop, name="experts-helper", daemon=True),
        ]

    def start(self) -> None:
        """Start both."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for both after the frame server has ended; not for one in a hung kernel."""
        for thread in self._threads:
            thread.join(timeout_s)

    def add(self, work: QueuedRequest) -> None:
        """Queue a request. Raises WorkerBusy as the batcher does."""
        with self._changed:
            self._batcher.add(work)
            if self._idle:
                self._changed.notify_all()

    def drop(self, work: QueuedRequest) -> None:
        """Take a request out of the queue."""
        with self._changed:
            self._batcher.drop(work)

    def drop_untouched(self) -> list[QueuedRequest]:
        """Take all requests out of the queue of which nothing is being or was computed, and return them."""
        with self._changed:
            return self._batcher.drop_untouched()

    def drop_owner(self, owner: Owner) -> None:
        """Take all requests of one owner out of the queue."""
        with self._changed:
            self._batcher.drop_owner(owner)

    def computing_s(self) -> float:
        """How long the present turn has been going on; 0 between turns."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _compute_loop(self) -> None:
        ended, poll = self._frames.ended, self._frames.poll
        while not ended.is_set():
            turn = self._next_turn()
            if turn is not None:
                try:
                    self._run(turn)
                except Exception:  # its callers wait in vain, but the others are served
                    logger.exception("a turn of the experts was not finished")
                if self._turn_ends(turn):
                    self._poll_ready()
            elif self._polls is _Polls.COMPUTER and poll(None):
                self._poll_ready()  # what is ready may share a turn
        with self._changed:
            self._changed.notify_all()

    def _poll_ready(self) -> None:
        """Take what is ready, within a bound: a caller that sends refused frames without end must not stop the turns.
        """
        for _ in range(_MOST_EVENTS):
            if not self._frames.poll(0):
                return

    def _next_turn(self) -> Turn | None:
        """The next turn; None when there is none now, after a wait if the other thread polls."""
        with self._changed:
            now = time.monotonic()
            turn = self._batcher.next(now)
            if not turn.slices and not turn.expired:
                if self._polls is not _Polls.COMPUTER and not self._frames.ended.is_set():
                    self._idle = True
                    self._changed.wait()
                    self._idle = False
                return None
            self._since = now
            if self._polls is _Polls.COMPUTER:
                self._polls = _Polls.NOBODY
                last_s, last_rows = self._last
                self._wanted = last_s * max(1.0, turn.rows / last_rows) > _LONG_S or self._frames.sending()
                if self._wanted:
                    self._changed.notify_all()
            return turn

    def _turn_ends(self, turn: Turn) -> bool:
        """Whether the computing thread polls from now on."""
        with self._changed:
            assert self._since is not None
            self._last = (time.monotonic() - self._since, max(1, turn.rows))
            self._since, self._wanted = None, False
            if self._polls is _Polls.NOBODY:
                self._polls = _Polls.COMPUTER
            return self._polls is _Polls.COMPUTER

    def _help_loop(self) -> None:
        ended, poll = self._frames.ended, self._frames.poll
        while not ended.is_set():
            with self._changed:
                self._changed.wait_for(self._needs_help, self._watch_s / 2)
                if not self._needs_help():
                    continue
                self._polls = _Polls.HELPER
            while not ended.is_set() and not self._handed_back():
                poll(time.time() + _TICK_S)
        with self._changed:
            self._changed.notify_all()

    def _needs_help(self) -> bool:
        return self._polls is _Polls.NOBODY and (self._wanted or self.computing_s() > self._watch_s / 2)

    def _handed_back(self) -> bool:
        with self._changed:
            if not self._idle or len(self._batcher):
                return False
            self._polls = _Polls.COMPUTER
            self._changed.notify_all()
            return True
