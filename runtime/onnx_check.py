"""An ONNX file looked through before onnxruntime opens it: no other files, no sizes that it cannot hold.

Field numbers are those of onnx.proto. Only lengths and numbers are read; weights are stepped over in the
mapped file.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import InputError

MOST_ONNX_BYTES = 2**31  # what protobuf itself takes
MOST_VALUES = 2**30  # of an array for one slab that the file declares; 64 filters at 2048 x 2048 have 2**28
MOST_DEPTH = 16  # of graphs inside nodes inside graphs
NO_END = 2**63 - 1  # "to the end of the axis", in a list of sizes
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
INT64 = 7  # TensorProto.DataType


class OddModelError(ValueError):
    """What is wrong with an ONNX file."""


def check_onnx(path: Path) -> None:
    """Raise InputError where an ONNX file is damaged, names other files, or declares what it cannot hold."""
    size = path.stat().st_size
    if not 0 < size <= MOST_ONNX_BYTES:
        raise InputError(
            path, f"has {size:,} bytes, and 1 to {MOST_ONNX_BYTES:,} are read", "export it again"
        )
    try:
        with path.open("rb") as file:  # not closed by hand: parts of it live on in an error's traceback
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _Checker(size).check_model(memoryview(mapped))
    except OddModelError as error:
        raise InputError(path, str(error), "export it again") from error


def read_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a protobuf message: numbers, or the bytes of strings and messages."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _read_varint(message, at)
        elif kind in (FIXED64, FIXED32, BYTES):
            length = {FIXED64: 8, FIXED32: 4}.get(kind)
            if length is None:
                length, at = _read_varint(message, at)
            if length > len(message) - at:
                raise OddModelError("not a readable ONNX file (cut short)")
            value = message[at : at + length]
            at += length
        else:
            raise OddModelError("not a readable ONNX file (no protobuf)")
        yield key >> 3, value


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & (2**64 - 1), at
    raise OddModelError("not a readable ONNX file (cut short)")


def _messages(message: memoryview, *numbers: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, bytes) of the fields of these numbers that are strings or messages."""
    for number, value in read_fields(message):
        if number in numbers and isinstance(value, memoryview):
            yield number, value


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _numbers(value: int | memoryview) -> list[int]:
    """Return the numbers of a repeated int64 field, one or packed."""
    if isinstance(value, int):
        return [_signed(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _read_varint(value, at)
        numbers.append(_signed(number))
    return numbers


class _Checker:
    """Goes through the messages of a file of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def check_model(self, message: memoryview) -> None:
        graphs = 0
        for number, value in _messages(message, 7, 25):  # graph, functions
            if number == 7:
                graphs += 1
                self.check_graph(value, 0)
            else:
                for _, node in _messages(value, 7):
                    self.check_node(node, 0)
        if not graphs:
            raise OddModelError("not a readable ONNX file (without a graph)")

    def check_graph(self, message: memoryview, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise OddModelError(f"holds graphs more than {MOST_DEPTH} deep")
        for number, value in _messages(message, 1, 5, 15, 11, 12, 13):
            if number == 1:
                self.check_node(value, depth)
            elif number == 5:
                self.check_tensor(value)
            elif number == 15:
                self.check_sparse(value)
            else:  # inputs, outputs, arrays between
                self.check_shape(value)

    def check_node(self, message: memoryview, depth: int) -> None:
        for _, attribute in _messages(message, 5):
            for number, value in _messages(attribute, 5, 10, 6, 11, 22, 23):
                if number in (5, 10):
                    self.check_tensor(value)
                elif number in (6, 11):
                    self.check_graph(value, depth + 1)
                else:
                    self.check_sparse(value)

    def check_sparse(self, message: memoryview) -> None:
        for number, value in read_fields(message):
            if number in (1, 2) and isinstance(value, memoryview):
                self.check_tensor(value)
            elif number == 3:
                self.check_sizes(_numbers(value), MOST_VALUES)

    def check_tensor(self, message: memoryview) -> None:
        sizes: list[int] = []
        kind, raw, listed = 0, memoryview(b""), []
        for number, value in read_fields(message):
            if number == 13 or (number == 14 and value == 1):
                raise OddModelError("keeps its weights in other files, which are not read")
            if number == 1:
                sizes += _numbers(value)
            elif number == 2 and isinstance(value, int):
                kind = value
            elif number == 9 and isinstance(value, memoryview):
                raw = value
            elif number == 7 and (isinstance(value, int) or len(value) < 640):
                listed += _numbers(value)
        self.check_sizes(sizes, 2 * self.size)  # the smallest values have four bits
        if kind == INT64 and len(raw) <= 64:  # sizes, of what a node makes
            eight = (raw[at : at + 8] for at in range(0, len(raw), 8))
            listed += [int.from_bytes(part, "little", signed=True) for part in eight]
        if kind == INT64 and len(listed) <= 8:
            self.check_sizes([abs(value) for value in listed if value < NO_END], MOST_VALUES)

    def check_shape(self, message: memoryview) -> None:
        sizes = []
        for _, kind in _messages(message, 2):
            for _, tensor in _messages(kind, 1):
                for _, shape in _messages(tensor, 2):
                    for _, axis in _messages(shape, 1):
                        sizes += [_signed(value) for number, value in read_fields(axis) if number == 1]
        self.check_sizes(sizes, MOST_VALUES)

    def check_sizes(self, sizes: list[int], most: int) -> None:
        if len(sizes) > 16 or any(size < 0 for size in sizes) or math.prod(sizes) > most:
            shown = " x ".join(map(str, sizes[:5]))
            raise OddModelError(f"declares an array of {shown}, more than such a file can hold")
