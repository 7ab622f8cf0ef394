"""Loads everything but the routed experts, which an attention replica neither reads nor allocates."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Generator

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, StartupError
from cluster.model.identity import model_identity
from cluster.model.spec import is_routed_expert, load_checkpoint_index, load_model_spec
from deployments.attention.dispatch_ops import RemoteLayer, connect
from deployments.attention.forward_rows import rows_of_requests
from deployments.attention.parent_watch import end_with_parent
from deployments.attention.pinned_rows import PinnedRows
from deployments.attention.remote_experts import RemoteRoutedExperts
from deployments.attention.settings import RemoteExpertsSettings, settings_of
from deployments.attention.vllm_internals import (
    DefaultModelLoader,
    ModelConfig,
    MoERunner,
    RoutedExperts,
    VllmConfig,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    moe_forward,
    moe_forward_shared,
)
from deployments.hosting.scrape import ProcessScrape, write_scrape_file
from monitoring.dispatch_meter import DispatchMeter
from monitoring.expert_load import ExpertLoad
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import DispatchMetrics
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile
from routing.tokens.plane_state import ExpertPlaneFile
from routing.tokens.routed_tokens import RoutedTokensCounter, RoutedTokensFile

logger = logging.getLogger(__name__)


class AttentionOnlyLoader(DefaultModelLoader):
    """The model loader that vLLM uses for `load_format="deepsplit"`."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """Build and load the model (main or MTP), then connect its MoE layers to the expert plane."""
        settings = settings_of(vllm_config)
        if settings is None:
            raise StartupError("load_format=deepsplit needs additional_config['deepsplit']; start through `deepsplit`")
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
        local = [layer.layer_name for layer in layers if not isinstance(layer, RemoteRoutedExperts)]
        if local or not layers:
            raise StartupError(
                f"{type(model).__name__} keeps its routed experts to itself"
                f"{' in ' + local[0] if local else ''}: vLLM's extension point RoutedExperts is not in use, so this "
                f"model cannot be split"
            )
        for module in model.modules():
            if isinstance(module, MoERunner):
                _let_compilers_in(module)
        end_with_parent()
        _wait_for_experts(settings, sorted(layer.layer_index for layer in layers))
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        client, pinned = _client(settings, model_config.dtype, rank), PinnedRows()
        for layer in layers:
            connect(layer.layer_name, RemoteLayer(layer.layer_index, client, rows_of_requests, pinned, rank, ranks))
        return model

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield every tensor that is not a routed expert's, one at a time; names are filtered before a byte is read."""
        index = load_checkpoint_index(model_config.model)
        shards: dict[str, list[str]] = {}
        for name, shard in index.weight_map.items():
            if not is_routed_expert(name):
                shards.setdefault(shard, []).append(name)
        bytes_read = 0
        for shard in sorted(shards):
            try:
                with safe_open(index.path / shard, framework="pt") as tensors:
                    for name in sorted(shards[shard]):
                        tensor = tensors.get_tensor(name)
                        bytes_read += tensor.nbytes
                        yield name, tensor
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{index.path / shard} cannot be read ({error}): download this shard again"
                ) from None
        logger.info("Read %.1f MiB of weights, no routed expert among them", bytes_read / 2**20)


def _let_compilers_in(runner: MoERunner) -> None:
    """Have a compiler trace the MoE layer down to our own operators, as vLLM does on CPU. On CUDA the whole layer is
    one operator of vLLM's, which returns a new tensor each time: a CUDA graph of what follows would read an old one.
    """
    runner._forward_entry = moe_forward if runner.shared_experts is None else moe_forward_shared


def _wait_for_experts(settings: RemoteExpertsSettings, layers: list[int]) -> None:
    """Wait until each expert has a holder: the first forward pass comes right after loading, and the experts of a real
    checkpoint load for longer than attention.
    """
    placement, num_experts = PlacementFile(settings.placement_file), load_model_spec(settings.model_path).num_experts
    deadline = time.monotonic() + settings.start_timeout_s
    while not placement.current().covers(layers, num_experts):
        if time.monotonic() > deadline:
            raise StartupError(
                f"expert workers did not cover all experts within ray.start_timeout_s ({settings.start_timeout_s:.0f} "
                f"s): see `deepsplit status` and the workers' logs"
            )
        time.sleep(0.1)


@functools.cache
def _client(settings: RemoteExpertsSettings, model_dtype: torch.dtype, rank: int) -> ExpertClient:
    """Return the process's only client: the main model and its MTP layer share streams, metrics and a scrape target."""
    spec = load_model_spec(settings.model_path)
    identity = model_identity(spec, load_checkpoint_index(settings.model_path))
    shape = ExpertShape(identity, spec.hidden_size, spec.num_experts)
    registry, monitoring = ProcessRegistry(), settings.monitoring
    counter = RoutedTokensCounter(spec.num_experts, RoutedTokensFile(settings.routed_tokens_file(rank)))
    registry.register(ExpertLoad(counter.totals, monitoring.expert_load, time.monotonic))
    meter = DispatchMeter(DispatchMetrics(registry))
    registry.before_scrape(meter.fold)
    client = ExpertClient(
        settings.dispatch,
        shape,
        PlacementFile(settings.placement_file),
        getattr(torch, settings.dispatch.dispatch_dtype, model_dtype),  # `auto`: the model's
        getattr(torch, settings.dispatch.combine_dtype, model_dtype),
        settings.internal_tls,
        ExpertPlaneFile(settings.plane_file(rank)),
        meter,
        counter,
    )
    assert monitoring.host is not None, "the replica fills it in"
    name = settings.replica_id if rank == 0 else f"{settings.replica_id}-rank{rank}"
    certificates = {} if settings.internal_tls is None else {"internal_tls": settings.internal_tls.cert_file}
    scrape = ProcessScrape(registry, "engine", name, settings.node, monitoring.host, monitoring.port, certificates)
    write_scrape_file(settings.scrape_file(rank), scrape.target)
    return client
