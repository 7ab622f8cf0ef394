"""Ends an engine's process when the process that started it is gone, however it went.

Ray's node agent kills the children of a replica that dies, but nobody does when it dies with the agent (a killed node).
"""

from __future__ import annotations

import multiprocessing
import os
import threading

_NAME = "deepsplit-parent-watch"


def end_with_parent() -> None:
    """Watch the parent from a thread, once per process. Does nothing in a process that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _NAME for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)  # not sys.exit: other threads of an engine do not heed it

    threading.Thread(target=watch, name=_NAME, daemon=True).start()
