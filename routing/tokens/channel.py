"""What both ends of the expert plane agree on: names of the method and of the metadata, channel options."""

from __future__ import annotations

import os
import warnings

from cluster.config import DispatchConfig

# gRPC's event-engine endpoints cost a thread hop each way: 0.32-0.45 ms against 0.24 ms per 16 KiB round trip
# (benchmarks/dispatch_latency.py). gRPC reads this when `grpc` is first imported, so processes that import it before
# this module, as Ray Serve's replicas do, must be started with it.
GRPC_ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"}
for _name, _value in GRPC_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# Frames are read-only bytes and tensors are views of them that nobody writes to.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

SERVICE = "deepsplit.experts.v1.Experts"
METHOD = "Dispatch"
METHOD_PATH = f"/{SERVICE}/{METHOD}"
PIECE_PATH = f"/{SERVICE}/Piece"  # of an expert's weights, for other workers
MODEL_KEY = "deepsplit-model"  # metadata key: the model's identity, which must fit on both ends
LAYOUT_KEY = "deepsplit-layout"  # metadata key of calls for pieces: how experts are held, the same on both ends


def channel_options(settings: DispatchConfig) -> list[tuple[str, int]]:
    """Return the options of channel and server: bounded messages, and pings that find a hung or cut-off peer."""
    max_bytes = settings.max_message_mib << 20
    keepalive_ms = int(settings.keepalive_interval_s * 1000)
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_timeout_s * 1000)),  # 60 s if not set, and it rules
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
        ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_s * 1000)),  # also bounds a connection attempt
        ("grpc.so_reuseport", 0),  # a port in use is an error
        ("grpc.use_local_subchannel_pool", 1),  # links share nothing, so closing one closes its connection
        ("grpc.enable_http_proxy", 0),
    ]
