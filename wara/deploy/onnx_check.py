"""Refuses an ONNX file that would read other files or need code of its own, before it is loaded.

The format is read from its bytes (protocol buffers: a tag, then a number, or a length and its
content), so that a hospital needs no further package for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from wara.errors import WaraError

_STANDARD = (b"", b"ai.onnx", b"ai.onnx.ml")
# Fields by which messages hold each other: ModelProto.graph 7, opset_import 8, training_info 20,
# functions 25; GraphProto.node 1, initializer 5, sparse_initializer 15; FunctionProto.node 7,
# opset_import 9, attribute_proto 11; NodeProto.attribute 5, domain 7; AttributeProto.t 5, g 6,
# tensors 10, graphs 11, sparse 22, 23; SparseTensorProto.values 1, indices 2;
# TensorProto.external_data 13, data_location 14.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function", 8: "opset"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_MOST_DEPTH = 32


def check_onnx(data: bytes, where: str) -> None:
    """Refuse external data and operators that are not of ONNX itself, and steps of a training.

    Args:
        data: the file.
        where: its name, for refusals.

    Raises:
        WaraError: kind "artefact".
    """
    try:
        for what in _faults(memoryview(data), "model", 0):
            raise WaraError("artefact", what, where, "export the bundle again with wara")
    except (LookupError, ValueError):
        remedy = "copy the whole bundle again from where it was exported"
        raise WaraError("artefact", "not an ONNX file", where, remedy) from None


def _faults(data: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deep")
    for field, value in _fields(data):
        if kind == "tensor":
            if field == 13 or (field == 14 and value == 1):
                yield "the ONNX file reads tensors from other files"
        elif (kind, field) == ("model", 20):
            yield "the ONNX file holds steps of a training"
        elif (kind, field) in (("node", 7), ("opset", 1)) and isinstance(value, memoryview):
            if bytes(value) not in _STANDARD:
                name = bytes(value).decode("utf-8", "replace")
                yield f"the ONNX file needs operators of its own: {name}"
        elif field in _INSIDE.get(kind, {}) and isinstance(value, memoryview):
            yield from _faults(value, _INSIDE[kind][field], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    place = 0
    while place < len(data):
        tag, place = _number(data, place)
        field, form = tag >> 3, tag & 7
        if form == 0:
            value, place = _number(data, place)
            yield field, value
            continue
        size, place = _number(data, place) if form == 2 else ({1: 8, 5: 4}[form], place)
        if place + size > len(data):
            raise ValueError("a field that goes beyond the end")
        yield field, data[place : place + size]
        place += size


def _number(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number that is too long")
