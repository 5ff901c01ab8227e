"""A GGUF file, memory-mapped: its metadata, and single tensors dequantized on demand.

The ``gguf`` package's own reader makes NumPy views of all 100,000 vocabulary entries, which takes 2 s per process;
this one walks the header in some 0.1 s and leaves the quantization formats to the package.
Source: the GGUF specification, version 3 (ggml project).
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from backends.models.blocks import Blocks, read_blocks
from pipesim.errors import BadInputError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


_AT_ONCE = 2**20  # values dequantized in one go


def _plain(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    if kind == GGMLQuantizationType.F32:
        return raw.view(np.float32)
    if kind == GGMLQuantizationType.F16:
        return raw.view(np.float16).astype(np.float32)
    return np.asarray(dequantize(raw, kind), np.float32)


class GgufFile:
    """Metadata (``metadata``), tensor shapes (``shapes``, outermost dimension first) and tensors of one file.

    Raises:
        BadInputError: the file is no GGUF file of version 2 or 3, or ends early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise BadInputError(f"{path} is too short for a GGUF file: download it again")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._cursor = 0
        self.metadata: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, tuple[GGMLQuantizationType, int]] = {}
        try:
            self._read_header()
        except (struct.error, ValueError, KeyError, MemoryError) as error:
            raise BadInputError(f"{path} is a damaged GGUF file: {error}") from error

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32, in an array of its own, of shape ``shapes[name]``."""
        raw, kind = self._raw(name)
        shape = self.shapes[name]
        tensor = np.empty((len(raw), shape[-1]), np.float32)
        rows = max(1, _AT_ONCE // shape[-1])
        try:
            for start in range(0, len(raw), rows):  # dequantizing takes several times the memory of its result
                tensor[start : start + rows] = _plain(raw[start : start + rows], kind)
        except NotImplementedError as error:
            raise BadInputError(f"{self.path}: tensor {name!r} has unsupported quantization {kind.name}") from error
        self._forget(name, raw)
        return tensor.reshape(shape)

    def blocks(self, name: str) -> Blocks | None:
        """The tensor, a matrix, in its own quantization; None if that is not one of blocks that are understood."""
        raw, kind = self._raw(name)
        blocks = read_blocks(raw, kind)
        self._forget(name, raw)
        return blocks

    def _raw(self, name: str) -> tuple[npt.NDArray[np.uint8], GGMLQuantizationType]:
        """The tensor's bytes, ``[rows, bytes]``, and its quantization."""
        if name not in self._tensors:
            raise BadInputError(f"{self.path}: tensor {name!r} is missing, the model has no such part")
        kind, offset = self._tensors[name]
        shape = self.shapes[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        if offset + size > len(self._bytes):
            raise BadInputError(f"{self.path} ends within tensor {name!r}: download it again")
        raw = np.frombuffer(self._bytes, np.uint8, size, offset)
        return raw.reshape(-1, shape[-1] // block * block_bytes), kind

    def _forget(self, name: str, raw: npt.NDArray[np.uint8]) -> None:
        """Its pages are not needed again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            offset = self._tensors[name][1]
            page = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, page, offset + raw.nbytes - page)

    def _read_header(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise BadInputError(f"{self.path} is not a GGUF file")
        self._cursor = 4
        version, tensors, pairs = self._unpack("<IQQ")
        if version not in (2, 3):
            raise BadInputError(f"{self.path}: GGUF version {version} is not supported, convert the file to version 3")
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(GGUFValueType(self._unpack("<I")[0]))
        infos = []
        for _ in range(tensors):
            name = self._string()
            (dimensions,) = self._unpack("<I")
            shape = self._unpack(f"<{dimensions}Q")
            kind, offset = self._unpack("<IQ")
            self.shapes[name] = tuple(reversed(shape))
            infos.append((name, GGMLQuantizationType(kind), offset))
        alignment = int(self.metadata.get("general.alignment", 32))
        data = -(-self._cursor // alignment) * alignment
        self._tensors = {name: (kind, data + offset) for name, kind, offset in infos}

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._bytes, self._cursor)
        self._cursor += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._bytes, self._cursor)
        start = self._cursor + 8
        self._cursor = start + length
        if self._cursor > len(self._bytes):
            raise ValueError("a string reaches past its end")
        return self._bytes[start : self._cursor].decode("utf-8", errors="replace")

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._unpack("<" + _SCALARS[kind])[0]
        item, length = self._unpack("<IQ")
        item = GGUFValueType(item)
        if item in _SCALARS:
            return list(self._unpack(f"<{length}{_SCALARS[item]}"))
        return [self._value(item) for _ in range(length)]
