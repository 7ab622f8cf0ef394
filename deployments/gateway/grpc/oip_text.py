"""Tensors of the Open Inference Protocol to a completion request of vLLM, and texts back to tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cluster.errors import ModelNotFound, RequestError
from deployments.gateway.grpc.requests import Body, Json, json_object
from deployments.protos.inference import open_inference_pb2 as pb

VERSION = "1"
TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
PARAMETERS_INPUT, STREAM_INPUT, EXCLUDE_INPUT = "sampling_parameters", "stream", "exclude_input_in_output"
DATATYPES = {TEXT_INPUT: "BYTES", PARAMETERS_INPUT: "BYTES", STREAM_INPUT: "BOOL", EXCLUDE_INPUT: "BOOL"}
_EMPTY_FINAL = "triton_enable_empty_final_response"
_IGNORED_PREFIXES = ("triton_", "sequence_")
_IGNORED = ("priority", "timeout", "binary_data_output")
MAX_SEQUENCES = 1024  # prompts in one message; gateway.max_sequences bounds them further
_OWN_FIELDS = ("model", "prompt", "stream", "echo")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class TextRequest:
    """A ModelInferRequest, read."""

    model: str
    id: str
    prompts: Sequence[str]
    rank: int  # of text_input, which text_output takes over
    fields: Body  # of POST /v1/completions
    stream: bool | None  # as asked; None: not asked
    raw: bool  # its client wants raw_output_contents
    empty_final: bool

    def body(self, stream: bool) -> bytes:
        """For POST /v1/completions."""
        prompt: Json = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return msgspec.json.encode(self.fields | {"model": self.model, "prompt": prompt, "stream": stream})

    def response(self, texts: Sequence[str]) -> pb.ModelInferResponse:
        """`text_output` with one element per text."""
        response = pb.ModelInferResponse(model_name=self.model, model_version=VERSION, id=self.id)
        shape = [len(texts)] + [1] * (self.rank - 1)
        output = response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=shape)
        elements = [text.encode() for text in texts]
        if self.raw:
            response.raw_output_contents.append(b"".join(_LENGTH.pack(len(one)) + one for one in elements))
        else:
            output.contents.bytes_contents.extend(elements)
        return response


def read(request: pb.ModelInferRequest) -> TextRequest:
    """Raises RequestError naming the tensor or parameter at fault, ModelNotFound for another version."""
    if request.model_version not in ("", VERSION):
        raise ModelNotFound(f"there is no version {request.model_version!r} of the model, only {VERSION!r}")
    for output in request.outputs:
        if output.name != TEXT_OUTPUT:
            raise RequestError(f"there is no output {output.name!r}, only {TEXT_OUTPUT!r}")
    inputs = _inputs(request)
    if not inputs.get(TEXT_INPUT):
        raise RequestError(f"the request has no prompt: give the input {TEXT_INPUT!r}")
    fields = {name: _parameter(value, name) for name, value in request.parameters.items()}
    if texts := inputs.get(PARAMETERS_INPUT):
        fields |= json_object(_text(texts[0], PARAMETERS_INPUT), PARAMETERS_INPUT)
    empty_final = fields.get(_EMPTY_FINAL) is True
    stream = _flag(inputs, fields, STREAM_INPUT)
    exclude = _flag(inputs, fields, EXCLUDE_INPUT)
    fields = {name: value for name, value in fields.items() if not _is_tritons(name)}
    for name in _OWN_FIELDS:
        if name in fields:
            raise RequestError(f"the parameter {name!r} cannot be set: the request's own fields say it")
    if exclude is False:
        fields["echo"] = True
    return TextRequest(
        model=request.model_name,
        id=request.id,
        prompts=[_text(element, TEXT_INPUT) for element in inputs[TEXT_INPUT]],
        rank=max(1, next(len(one.shape) for one in request.inputs if one.name == TEXT_INPUT)),
        fields=fields,
        stream=stream,
        raw=bool(request.raw_input_contents),
        empty_final=empty_final,
    )


def _inputs(request: pb.ModelInferRequest) -> dict[str, list[bytes]]:
    """Elements by tensor name; of BOOL tensors, b"\\0" or something else."""
    raws: Sequence[bytes | None] = list(request.raw_input_contents) or [None] * len(request.inputs)
    if len(raws) != len(request.inputs):
        raise RequestError(f"raw_input_contents has {len(raws)} entries for {len(request.inputs)} inputs")
    inputs: dict[str, list[bytes]] = {}
    for tensor, raw in zip(request.inputs, raws, strict=True):
        if DATATYPES.get(tensor.name) != tensor.datatype:
            known = ", ".join(f"{name} ({datatype})" for name, datatype in DATATYPES.items())
            raise RequestError(f"there is no input {tensor.name!r} of type {tensor.datatype!r}, only {known}")
        if tensor.name in inputs:
            raise RequestError(f"the input {tensor.name!r} is there twice")
        inputs[tensor.name] = elements = _elements(tensor, raw)
        if len(elements) > MAX_SEQUENCES:
            raise RequestError(f"the input {tensor.name!r} has more than {MAX_SEQUENCES} elements, this server's limit")
        if min(tensor.shape, default=1) < 1 or math.prod(tensor.shape) != len(elements):
            raise RequestError(
                f"the input {tensor.name!r} has {len(elements)} elements, but the shape {list(tensor.shape)}"
            )
        if tensor.name != TEXT_INPUT and len(elements) != 1:
            raise RequestError(f"the input {tensor.name!r} must have one element, but has {len(elements)}")
    return inputs


def _elements(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[bytes]:
    if raw is None:
        if tensor.datatype == "BOOL":
            return [bytes([value]) for value in tensor.contents.bool_contents[: MAX_SEQUENCES + 1]]
        return list(tensor.contents.bytes_contents[: MAX_SEQUENCES + 1])
    if tensor.HasField("contents"):
        raise RequestError(f"the input {tensor.name!r} has contents beside raw_input_contents")
    if tensor.datatype == "BOOL":
        return [raw[place : place + 1] for place in range(min(len(raw), MAX_SEQUENCES + 1))]
    elements: list[bytes] = []
    place = 0
    while place < len(raw) and len(elements) <= MAX_SEQUENCES:
        start = place + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, place)[0] if start <= len(raw) else len(raw) + 1
        if end > len(raw):
            raise RequestError(f"raw contents of the input {tensor.name!r} end within an element")
        elements.append(raw[start:end])
        place = end
    return elements


def _parameter(value: pb.InferParameter, name: str) -> Json:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise RequestError(f"the parameter {name!r} has no value of a known type")
    parameter: Json = getattr(value, kind)
    if isinstance(parameter, float) and not math.isfinite(parameter):
        raise RequestError(f"the parameter {name!r} must be a finite number, but is {parameter}")
    return parameter


def _flag(inputs: dict[str, list[bytes]], fields: Body, name: str) -> bool | None:
    asked = fields.pop(name, None)
    if name in inputs:
        return inputs[name][0] != b"\0"
    if asked is not None and not isinstance(asked, bool):
        raise RequestError(f"the parameter {name!r} must be true or false")
    return asked


def _is_tritons(name: str) -> bool:
    return name.startswith(_IGNORED_PREFIXES) or name in _IGNORED


def _text(element: bytes, name: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the input {name!r} is not UTF-8: {error.reason} at byte {error.start}") from error
