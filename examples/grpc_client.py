"""Streams a completion over gRPC; see --help."""

from __future__ import annotations

import argparse
import sys

import grpc

from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1 import inference_pb2_grpc as api


def main() -> None:
    """Print tokens as they come."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:9000")
    parser.add_argument("--key", help="API key, if the gateway has keys")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    request = pb.CompletionRequest(text=args.prompt, sampling=pb.Sampling(max_tokens=args.max_tokens, temperature=0))
    metadata = [("authorization", f"Bearer {args.key}")] if args.key else []
    with grpc.insecure_channel(args.address) as channel:
        try:
            for chunk in api.InferenceStub(channel).CompleteStream(request, timeout=120, metadata=metadata):
                for choice in chunk.choices:
                    print(choice.text, end="", flush=True)
        except grpc.RpcError as error:
            sys.exit(f"{error.code().name}: {error.details()}")
    print()


if __name__ == "__main__":
    main()
