"""A real vLLM engine in a child process, driven by token ids.

    with Engine(checkpoint, engine_args={...}) as engine:
        run = engine.generate(prompts, max_tokens=64)

One engine is one process (`python -m tests.engines`): it speaks JSON lines over two pipes, logs to a file, and is gone
with all its children when the `with` block ends, so one pytest process can run many engines one after another. Split
engines differ only in `engine_args` (`load_format`, `additional_config`, `speculative_config`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

_REPOSITORY = Path(__file__).resolve().parents[1]

# vLLM's CPU rotary kernel misreads MLA's queries in eager mode (see "Known defects" in the design): use the other one.
EAGER_ARGS: Mapping[str, Any] = {
    "enforce_eager": True,
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
}
# Where the processor has AMX, vLLM picks its AMX_MLA backend, which fails on float32 weights. The drafter of
# speculative decoding picks its own.
_MLA_BACKEND = "CPU_MLA"


class EngineFailed(Exception):
    """The engine process ended or refused; the message carries the end of its log."""


@dataclass(frozen=True)
class EngineRun:
    """One `generate` call. Lists have one entry per prompt.

    `decode_seconds` are those from the last first token to the last token;
    `logprobs` holds the log-probability of each sampled token; `drafted` and `accepted` count speculative tokens since
    the engine's start (0 without speculative decoding).
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    seconds: float
    decode_seconds: float
    drafted: int
    accepted: int


class Engine:
    """A vLLM engine process.

    `engine_args` are keyword arguments of `vllm.LLM`, laid over small defaults; `threads` its OpenMP threads;
    `environment` extra variables. `start_s` is the time from process start to readiness. Raises `EngineFailed` if the
    engine does not start, dies or does not answer in time.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        engine_args: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        eager: bool = True,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 300,
    ) -> None:
        self._args: dict[str, Any] = {
            "model": str(checkpoint),
            "dtype": dtype,
            "max_model_len": 256,
            "max_num_seqs": 32,
            "seed": 0,
            "kv_cache_memory_bytes": 256 << 20,
            "disable_log_stats": False,
            "enable_prefix_caching": False,
            **(EAGER_ARGS if eager else {}),
            **(engine_args or {}),
        }
        if "kv_lora_rank" in json.loads((checkpoint / "config.json").read_text()):
            self._args.setdefault("attention_config", {"backend": _MLA_BACKEND})
            if drafter := self._args.get("speculative_config"):
                self._args["speculative_config"] = {"attention_backend": _MLA_BACKEND, **drafter}
        self._environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **({"TORCH_COMPILE_DISABLE": "1"} if eager else {}),  # as engine_args.engine_env does
            **(environment or {}),
        }
        self._start_timeout_s = start_timeout_s
        self.start_s = 0.0

    def __enter__(self) -> Engine:
        begun = time.monotonic()
        self._log = tempfile.NamedTemporaryFile(prefix="engine-", suffix=".log")
        answer_read, answer_write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines", str(answer_write)],
            cwd=_REPOSITORY,
            env=self._environment,
            pass_fds=(answer_write,),
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(answer_write)
        self._answers: IO[bytes] = os.fdopen(answer_read, "rb")
        try:
            self._ask(self._args, self._start_timeout_s)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - begun
        return self

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, timeout_s: float = 300) -> EngineRun:
        """Continue every prompt by exactly `max_tokens` greedy tokens, all prompts in one batch."""
        answer = self._ask({"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}, timeout_s)
        return EngineRun(**answer)

    def score(self, sequences: Sequence[Sequence[int]], timeout_s: float = 300) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, given the tokens before it."""
        answer = self._ask({"sequences": [list(sequence) for sequence in sequences]}, timeout_s)
        return [[float(value) for value in scores] for scores in answer["scores"]]

    def distributions(
        self, sequences: Sequence[Sequence[int]], vocab_size: int, top: int, timeout_s: float = 600
    ) -> np.ndarray:
        """Log-probabilities after every token but the last of each sequence, float32 [positions, vocab_size]: of the
        `top` most likely tokens, -inf for the others.
        """
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            question = {"distributions": [list(one) for one in sequences], "vocab": vocab_size, "top": top}
            self._ask({**question, "file": file.name}, timeout_s)
            found: np.ndarray = np.load(file.name)
        return found

    @property
    def pid(self) -> int:
        """Process id of the engine; its children are in its session."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What the engine and its children have printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def close(self) -> None:
        """Ask the engine to end, and after 20 s kill it and everything that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session: children that outlived it
        self._answers.close()
        self._log.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(f"the engine is gone:\n{self.log[-4000:]}") from None
        if not select.select([self._answers], [], [], timeout_s)[0]:
            raise EngineFailed(f"the engine did not answer within {timeout_s:.0f} s:\n{self.log[-4000:]}")
        line = self._answers.readline()
        if not line:
            raise EngineFailed(f"the engine ended with status {self._process.wait(20)}:\n{self.log[-8000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}\n{self.log[-8000:]}")
        return answer


def _serve(answers: IO[str]) -> None:
    """The child: engine arguments on the first line of stdin, then one `generate` or `score` per line."""
    # A killed test run must not leave engines: PR_SET_PDEATHSIG = 1.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    import vllm

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        llm = vllm.LLM(**json.loads(sys.stdin.readline()))
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
    answer({})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prompts" in request:
                answer(asdict(_generate(llm, request["prompts"], request["max_tokens"])))
            elif "distributions" in request:
                of = (request["distributions"], request["vocab"], request["top"])
                np.save(request["file"], _distributions(llm, *of))
                answer({})
            else:
                answer({"scores": _score(llm, request["sequences"])})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def _generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> EngineRun:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    begun = time.monotonic()
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    seconds = time.monotonic() - begun
    outputs = [result.outputs[0] for result in results]
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return EngineRun(
        token_ids=[list(output.token_ids) for output in outputs],
        logprobs=[
            [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ],
        seconds=seconds,
        decode_seconds=max(r.metrics.last_token_ts for r in results) - max(r.metrics.first_token_ts for r in results),
        drafted=int(counts.get("vllm:spec_decode_num_draft_tokens", 0)),
        accepted=int(counts.get("vllm:spec_decode_num_accepted_tokens", 0)),
    )


def _score(llm: Any, sequences: list[list[int]]) -> list[list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    results = llm.generate([{"prompt_token_ids": sequence} for sequence in sequences], params, use_tqdm=False)
    return [
        [step[token].logprob for token, step in zip(sequence[1:], result.prompt_logprobs[1:], strict=True)]
        for sequence, result in zip(sequences, results, strict=True)
    ]


def _distributions(llm: Any, sequences: list[list[int]], vocab_size: int, top: int) -> np.ndarray:
    from vllm import SamplingParams

    wanted = -1 if top >= vocab_size else top
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=wanted, flat_logprobs=True, detokenize=False)
    found: list[np.ndarray] = []
    for sequence in sequences:  # one by one: each is large
        (result,) = llm.generate([{"prompt_token_ids": sequence}], params, use_tqdm=False)
        flat = result.prompt_logprobs
        ids, logprobs = np.asarray(flat.token_ids), np.asarray(flat.logprobs, dtype=np.float32)
        rows = np.full((len(sequence) - 1, vocab_size), -np.inf, dtype=np.float32)
        for row, (first, last) in enumerate(zip(flat.start_indices[1:], flat.end_indices[1:], strict=True)):
            rows[row, ids[first:last]] = logprobs[first:last]
        found.append(rows)
    return np.concatenate(found)


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as _answers:
        _serve(_answers)
