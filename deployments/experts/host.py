"""An expert worker without Ray: weights, kernels and gRPC server put together."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from functools import partial

from cluster.config import Config
from cluster.model.identity import model_identity
from cluster.model.spec import load_checkpoint_index, load_model_spec
from cluster.tls.certificates import load_internal
from cluster.tls.grpc_credentials import ExpertChannels
from deployments.experts.calibration import choice_text, fastest_form, many_rows_from
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import choose_form
from deployments.experts.loading import OnProgress
from deployments.experts.sources import Peer, most_useful
from deployments.experts.store import ExpertStore
from monitoring.expert_meter import ExpertMeter
from routing.tokens.expert_pieces import ExpertPeer
from routing.tokens.kept_memory import keep_freed_memory
from routing.tokens.placement import WorkerEndpoint
from routing.tokens.server import ExpertServer
from routing.tokens.share import Share

_LONG_LOAD_BYTES = 1 << 30

logger = logging.getLogger(__name__)


class _Progress:
    """Logs each tenth of a long load."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        tenths = 10 * done_bytes // total_bytes
        if tenths > self._tenths and total_bytes > _LONG_LOAD_BYTES:
            self._tenths = tenths
            logger.info("experts: %d of %d MiB loaded", done_bytes >> 20, total_bytes >> 20)


class ExpertHost:
    """Loads a share of the experts (expert ids by layer) and serves them. Raises CheckpointError or StartupError."""

    def __init__(
        self, config: Config, experts: Share, meter: ExpertMeter, holders: Sequence[WorkerEndpoint] = ()
    ) -> None:
        """`holders`: other workers, from which experts may be loaded as well as from disk."""
        self._channels = None
        if config.internal_tls is not None:
            load_internal(config.internal_tls, time.time())  # before a load of minutes
            self._channels = ExpertChannels(config.internal_tls)
        keep_freed_memory()  # packing asks for the same few MiB again and again
        spec = load_model_spec(config.model.path)
        threads, device = config.experts.threads, config.experts.device
        self._device = device
        fastest = partial(fastest_form, spec=spec, threads=threads)
        form = choose_form(config.experts.dtype, config.model.dtype, spec, device, fastest)
        index = load_checkpoint_index(config.model.path)
        self._dispatch, self._model_id = config.dispatch, model_identity(spec, index)
        self._meter = meter
        self._store = ExpertStore(index, spec, form, device, experts)
        began_s = time.monotonic()
        self.loaded = self._load(experts, holders, _Progress())  # where the first share came from, in words
        meter.metrics.load.set(time.monotonic() - began_s)
        many_rows = many_rows_from(self._store.weights, self._store.held, threads)
        self.form = choice_text(form, many_rows)
        logger.info("experts: %s", self.form)
        self._compute = ExpertCompute(self._store.weights, threads, meter.gemms, many_rows)
        self._serve_held()
        self._server = ExpertServer(
            self._compute.forward,
            spec.hidden_size,
            self._model_id,
            config.dispatch,
            config.internal_tls,
            meter=meter,
            pieces=self._store if device == "cpu" else None,
        )

    @property
    def held(self) -> Share:
        """The experts that dispatches may ask for."""
        return self._store.held

    @property
    def elastic(self) -> bool:
        """Whether `load` and `drop` are possible."""
        return self._store.elastic

    @property
    def expert_bytes(self) -> int:
        """Size in memory of one expert."""
        return self._store.expert_bytes

    def nbytes_of(self, share: Share) -> int:
        """Return the size in memory that a share has or would have."""
        return self._store.nbytes_of(share)

    def load(self, share: Share, holders: Sequence[WorkerEndpoint] = ()) -> str:
        """Hold these experts too, while others are computed. One thread at a time may load or drop. Returns where they
        came from, in words. Raises CheckpointError, and then holds what it held before.
        """
        text = self._load(share, holders)
        self._serve_held()
        return text

    def _load(self, share: Share, holders: Sequence[WorkerEndpoint], on_progress: OnProgress | None = None) -> str:
        with contextlib.ExitStack() as links:
            peers = []
            for holder in most_useful(holders, share) if self._device == "cpu" else ():
                link = ExpertPeer(holder.address, self._model_id, self._store.layout, self._dispatch, self._channels)
                links.callback(link.close)
                peers.append(Peer(link, holder.experts))
            loaded = self._store.load(share, on_progress, peers)
        total = sum(map(len, share.values()))
        self._meter.metrics.loaded.labels("disk").inc(total - loaded.from_peers)
        self._meter.metrics.loaded.labels("peers").inc(loaded.from_peers)
        return f"{total - loaded.from_peers} from disk, {loaded.from_peers} from other workers"

    def drop(self, share: Share) -> None:
        """Hold these experts no more: a dispatch that asks for them is told that its placement is stale."""
        self._store.drop(share)
        self._serve_held()
        self._store.release(share)

    def _serve_held(self) -> None:
        self._compute.serve(self._store.held)
        self._meter.metrics.weights.set(self._store.nbytes)
        self._meter.metrics.held.set(sum(map(len, self._store.held.values())))

    def measure(self) -> None:
        """Bring the metrics up to date, before a scrape."""
        self._meter.fold()
        self._meter.metrics.waiting.set(self._server.waiting())

    def failure(self) -> str | None:
        """Return why this worker must be replaced, None while it is well."""
        return self._server.failure() or self._compute.failure

    def busy_s(self) -> float:
        """Return the seconds in which experts were computed, so far."""
        return self._server.busy_s()

    def work(self) -> float:
        """Return what was computed so far, in experts; see ExpertCompute."""
        return self._compute.work

    def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        return self._server.start(host)

    def stop(self, grace_s: float) -> None:
        """End streams and stop listening."""
        self._server.stop(grace_s)
