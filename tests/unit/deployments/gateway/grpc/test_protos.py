"""The generated stubs are those of the protos, and the Open Inference Protocol is the published one."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from setuptools import find_packages

from deployments.protos.inference import open_inference_pb2 as oip

ROOT = Path(__file__).parents[5]
PROTOS = sorted((ROOT / "deployments/protos").rglob("*.proto"))
# Message -> field numbers, from open_inference_grpc.proto in github.com/kserve/open-inference-protocol.
PUBLISHED = {
    "ServerLiveResponse": {"live": 1},
    "ServerReadyResponse": {"ready": 1},
    "ModelReadyRequest": {"name": 1, "version": 2},
    "ModelReadyResponse": {"ready": 1},
    "ServerMetadataResponse": {"name": 1, "version": 2, "extensions": 3},
    "ModelMetadataRequest": {"name": 1, "version": 2},
    "ModelMetadataResponse": {"name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5, "properties": 6},
    "ModelMetadataResponse.TensorMetadata": {"name": 1, "datatype": 2, "shape": 3},
    "ModelInferRequest": {
        "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "inputs": 5, "outputs": 6,
        "raw_input_contents": 7,
    },
    "ModelInferRequest.InferInputTensor": {"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    "ModelInferRequest.InferRequestedOutputTensor": {"name": 1, "parameters": 2},
    "ModelInferResponse": {
        "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "outputs": 5, "raw_output_contents": 6,
    },
    "ModelInferResponse.InferOutputTensor": {"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    "ModelStreamInferResponse": {"error_message": 1, "infer_response": 2},
    "InferParameter": {
        "bool_param": 1, "int64_param": 2, "string_param": 3, "double_param": 4, "uint64_param": 5,
    },
    "InferTensorContents": {
        "bool_contents": 1, "int_contents": 2, "int64_contents": 3, "uint_contents": 4, "uint64_contents": 5,
        "fp32_contents": 6, "fp64_contents": 7, "bytes_contents": 8,
    },
}  # fmt: skip


def test_generated_stubs_do_not_drift(tmp_path: Path) -> None:
    names = [str(path.relative_to(ROOT)) for path in PROTOS]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *names], cwd=ROOT, check=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    kept = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "deployments/protos").rglob("*_pb2*.py*")}
    kept = {path: text for path, text in kept.items() if "__pycache__" not in path.parts}
    assert len(fresh) == 3 * len(PROTOS)
    assert fresh == kept, "run `make protos`"


def test_every_folder_of_stubs_is_installed() -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = find_packages(str(ROOT), include=included)
    for folder in {path.parent for path in PROTOS}:
        assert ".".join(folder.relative_to(ROOT).parts) in packages


@pytest.mark.parametrize("name", PUBLISHED)
def test_open_inference_field_numbers(name: str) -> None:
    outer, *inner = name.split(".")
    message: Descriptor = oip.DESCRIPTOR.message_types_by_name[outer]
    for part in inner:
        message = message.nested_types_by_name[part]
    assert {field.name: field.number for field in message.fields} == PUBLISHED[name]


def test_open_inference_methods() -> None:
    service = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == "inference.GRPCInferenceService"
    assert {method.name: (method.input_type.name, method.output_type.name) for method in service.methods} == {
        name: (f"{name}Request", f"{name}Response")
        for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
    } | {"ModelStreamInfer": ("ModelInferRequest", "ModelStreamInferResponse")}
