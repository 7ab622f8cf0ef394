"""On the PYTHONPATH of `benchmarks.failover`'s cluster: an expert worker's kernels fail or hang when a file says so.

Python imports a module of this name at its start. It waits for the module that computes experts, which only expert
workers import. The file has the worker's pid for its name, and `fail` or `hang` in it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FAULTS = "BENCHMARK_FAULTS"  # environment: the folder of these files
_MODULE = "deployments.experts.compute"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _inject(module.ExpertCompute)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _inject(compute: Any) -> None:
    forward, told = compute._forward, Path(os.environ[FAULTS]) / str(os.getpid())

    def failing(*arguments: Any) -> Any:
        fault = told.read_text() if told.exists() else ""
        if fault == "fail":
            raise RuntimeError("a kernel failed, as the benchmark wants it")
        while fault == "hang":
            time.sleep(1)
        return forward(*arguments)

    compute._forward = failing


if FAULTS in os.environ:
    sys.meta_path.insert(0, _Finder())
