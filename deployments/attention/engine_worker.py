"""vLLM's worker, extended: it notes in STEP_REQUEST_IDS which requests a step is for, for logs of its dispatches.

vLLM imports it by the name in `engine_args.WORKER`, in the process that runs the model.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

from deployments.attention import vllm_internals
from deployments.attention.vllm_internals import SchedulerOutput
from routing.tokens.request_ids import STEP_REQUEST_IDS, join_request_ids

Worker: Any = vllm_internals.CPUWorker if vllm_internals.current_platform.is_cpu() else vllm_internals.GPUWorker

logger = logging.getLogger(__name__)


class RequestIdsWorker(Worker):
    """vLLM's worker, which also notes the requests of each step and logs a debug line."""

    def load_model(self, **options: Any) -> None:
        """Load as vLLM's worker does. Its four full garbage collections meanwhile take 0.4 s each over the imported
        modules, so those are set aside first.
        """
        gc.freeze()
        super().load_model(**options)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Note the step's requests, then do what vLLM's worker does. The ids stay until the next step, because MTP
        drafts later, on the same thread, in `sample_tokens`.
        """
        tokens = scheduler_output.num_scheduled_tokens
        request_ids = join_request_ids(tokens)
        STEP_REQUEST_IDS.set(request_ids)
        if logger.isEnabledFor(logging.DEBUG):
            fields = {"request_id": request_ids, "requests": len(tokens), "tokens": sum(tokens.values())}
            logger.debug("step", extra={"fields": fields})
        return super().execute_model(scheduler_output)
