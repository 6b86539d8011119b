"""The header of a GGUF file, every claim in it checked against the file before anything is made of it.

Layout, little-endian: "GGUF"; version, number of tensors, number of fields; the fields (name, type, value); a record
for each tensor (name, dimensions, type, place); padding; the tensors' bytes. Knows neither torch nor transformers.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.printable import printable

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # where the file names none
MOST_VALUES = 2**24  # in all fields together, and tensors: vocabularies and their merges have some 10**6
MOST_DIMENSIONS = 4

# Types of tensors by number: name, values in a block, bytes of a block. Those that the package gguf can dequantise.
_FLOATS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
_BLOCKS = {2: ("Q4_0", 18), 3: ("Q4_1", 20), 6: ("Q5_0", 22), 7: ("Q5_1", 24), 8: ("Q8_0", 34)}
_BLOCKS |= {20: ("IQ4_NL", 18), 39: ("MXFP4", 17)}
_WIDE_BLOCKS = {10: ("Q2_K", 84), 11: ("Q3_K", 110), 12: ("Q4_K", 144), 13: ("Q5_K", 176), 14: ("Q6_K", 210)}
_WIDE_BLOCKS |= {16: ("IQ2_XXS", 66), 17: ("IQ2_XS", 74), 18: ("IQ3_XXS", 98), 19: ("IQ1_S", 50), 21: ("IQ3_S", 110)}
_WIDE_BLOCKS |= {22: ("IQ2_S", 82), 23: ("IQ4_XS", 136), 29: ("IQ1_M", 56), 34: ("TQ1_0", 54), 35: ("TQ2_0", 66)}
TYPES = {
    number: (name, size, num_bytes)
    for size, blocks in ((32, _BLOCKS), (256, _WIDE_BLOCKS))
    for number, (name, num_bytes) in blocks.items()
} | _FLOATS


class GgufError(UserError):
    """A GGUF file that cannot be read; the message names the file and what is wrong in it."""


@dataclass(frozen=True)
class GgufField:
    """A value of the header.

    Attributes:
        types: its type's number; of an array, ARRAY's and that of its values.
        values: one, or those of the array; strings as bytes.
    """

    types: tuple[int, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: as the file has it.
        type: a key of TYPES.
        shape: in torch's order, the last dimension contiguous.
        start, num_bytes: of its bytes in the file.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Weights in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself, checked by read_header()."""

    fields: dict[str, GgufField]
    tensors: tuple[GgufTensor, ...]

    @property
    def num_values(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.num_values for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        """The types of the weights with their shares, such as "Q4_1 79%, Q8_0 21%"; less than 1 in 200 is left out."""
        shares = Counter[str]()
        for tensor in self.tensors:
            shares[TYPES[tensor.type][0]] += tensor.num_values
        whole = max(1, shares.total())
        told = [(name, count / whole) for name, count in shares.most_common() if 200 * count >= whole]
        return told[0][0] if len(told) == 1 else ", ".join(f"{name} {share:.0%}" for name, share in told)


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; no tensor is read.

    Args:
        path: the file.

    Raises:
        GgufError: another format, version or byte order; a length, count or place beyond the file; an unknown type;
            tensors that overlap; a name twice; one of several pieces.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise GgufError(f"{path}: neither a directory with a checkpoint nor a GGUF file, which begins with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).header()


class _Reader:
    """Goes through a header; nothing is taken that the file does not have."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at, self._values = path, content, len(MAGIC), 0

    def header(self) -> GgufHeader:
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            is_big = version & 0xFFFF == 0
            said = "written for big-endian machines" if is_big else f"version {version}"
            raise self._error(f"{said}; expected version {' or '.join(map(str, VERSIONS))}, little-endian")
        num_tensors, num_fields = self._numbers("QQ")
        fields: dict[str, GgufField] = {}
        for _ in range(self._counted(num_fields, "fields")):
            name = self._name()
            if name in fields:
                raise self._error(f"field {name!r} is there twice")
            fields[name] = self._field(name)
        if _first(fields, "split.count", 1) not in (0, 1):
            raise self._error("one of several pieces; join them with `llama-gguf-split --merge` first")
        records = [self._record() for _ in range(self._counted(num_tensors, "tensors"))]
        return GgufHeader(fields, self._placed(records, fields))

    def _placed(self, records: list[tuple[str, tuple[int, ...], int, int]], fields: dict[str, GgufField]) -> Any:
        """Tensors in the order of their records, none over another or beyond the file."""
        alignment = _first(fields, "general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment: expected a power of two, got {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type, place in records:
            if name in tensors:
                raise self._error(f"tensor {name!r} is there twice")
            if type not in TYPES:
                raise self._error(f"tensor {name!r}: type {type} is unknown or cannot be dequantised")
            _, block, num_bytes = TYPES[type]
            if shape[-1] % block or place % alignment:
                raise self._error(f"tensor {name!r}: its rows or its place do not fit its type's blocks")
            tensors[name] = GgufTensor(name, type, shape, data + place, math.prod(shape) // block * num_bytes)
        end = data
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
            if tensor.start < end:
                raise self._error(f"tensor {tensor.name!r} overlaps another one")
            end = tensor.start + tensor.num_bytes
            if end > len(self._content):
                raise self._error(f"ends before its tensor {tensor.name!r} does; download the file again")
        return tuple(tensors.values())

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in torch's order, type and place of a tensor."""
        name = self._name()
        (num_dimensions,) = self._numbers("I")
        if not 1 <= num_dimensions <= MOST_DIMENSIONS:
            raise self._error(f"tensor {name!r}: expected 1 to {MOST_DIMENSIONS} dimensions, got {num_dimensions}")
        shape = self._numbers(f"{num_dimensions}Q")
        if not all(shape):
            raise self._error(f"tensor {name!r}: a dimension is 0")
        type, place = self._numbers("IQ")
        return name, shape[::-1], type, place

    def _field(self, name: str) -> GgufField:
        (type,) = self._numbers("I")
        count, is_array = 1, type == ARRAY
        if is_array:
            type, count = self._numbers("IQ")
        types = (ARRAY, type) if is_array else (type,)
        if type != STRING and type not in NUMBERS:
            raise self._error(f"field {name!r}: values of type {type} are not known")
        self._counted(count, f"values in field {name!r}")
        if type == STRING:
            return GgufField(types, tuple(self._string() for _ in range(count)))
        return GgufField(types, self._numbers(f"{count}{NUMBERS[type]}"))

    def _counted(self, count: int, of: str) -> int:
        """A count of what is to be read, if there can be so many."""
        self._values += count
        if self._values > MOST_VALUES or self._at + count > len(self._content):
            raise self._error(f"claims {count:,} {of}: more than the file or a model has")
        return count

    def _name(self) -> str:
        try:
            return printable(self._string().decode())
        except UnicodeDecodeError as error:
            raise self._error("a name is not UTF-8") from error

    def _string(self) -> bytes:
        (length,) = self._numbers("Q")
        return self._bytes(length)

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._content):
            raise self._error("ends within its header, or a length in it is wrong; download the file again")
        return self._content[start : self._at]

    def _error(self, message: str) -> GgufError:
        return GgufError(f"{self._path}: {message}")


def _first(fields: dict[str, GgufField], name: str, default: Any) -> Any:
    """A field's value, or the default."""
    return fields[name].values[0] if name in fields and fields[name].values else default
