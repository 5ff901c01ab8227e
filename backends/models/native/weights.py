"""Weights as the kernels read them: in panels of 64 outputs, widths padded with zeros, in few big pieces of memory."""

import ctypes
import mmap

import numpy as np
import numpy.typing as npt
import torch

from backends.models.blocks import Blocks
from backends.models.native import library
from pipesim.errors import BadInputError

PANEL = 64
_FLOAT32, _BFLOAT16, _NIBBLES, _BYTES = range(4)
_PIECE = 64 << 20


def wide(width: int) -> int:
    """``width`` with its padding."""
    return -(-width // PANEL) * PANEL


class Arena:
    """Memory in pieces of 64 MiB, in huge pages where Linux has them; what is not used of a piece costs nothing."""

    def __init__(self) -> None:
        self._piece = np.empty(0, np.uint8)
        self.used = 0

    def keep(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A copy of ``values`` at an address that is a multiple of 64."""
        values = np.asarray(values)
        size = -(-values.nbytes // 64) * 64
        if size > len(self._piece):
            self._piece = np.frombuffer(_piece(max(_PIECE, size)), np.uint8)
        kept, self._piece = self._piece[: values.nbytes].view(values.dtype), self._piece[size:]
        kept = kept.reshape(values.shape)
        np.copyto(kept, values)
        self.used += size
        return kept


def _piece(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class PackedMatrix:
    """A matrix of ``outputs`` by ``inputs``, as ``struct`` tells the kernels."""

    def __init__(self, weight: torch.Tensor | Blocks, arena: Arena) -> None:
        shape = weight.codes.shape if isinstance(weight, Blocks) else weight.shape
        self.outputs, self.inputs = (int(size) for size in shape)
        if isinstance(weight, Blocks):
            self._parts, fields = _pack_blocks(weight, arena)
        else:
            self._parts, fields = [_pack_plain(weight, arena), None, None], (_FORMATS[weight.dtype], 0, 0, 0)
        kind, block, half_scales, zero = fields
        at = [None if part is None else part.ctypes.data for part in self._parts]
        self.struct = library.Matrix(*at, kind, self.outputs, self.inputs, block, half_scales, zero)
        self.address = ctypes.addressof(self.struct)

    def product(self, rows: torch.Tensor, threads: int = 1) -> torch.Tensor:
        """``rows`` times the matrix, float32 ``[rows, outputs]``: for tests and benchmarks, the engine has its own."""
        rows = rows.float().contiguous()
        out = np.empty((len(rows), wide(self.outputs)), np.float32)
        library.load().pipesim_linear(self.address, rows.data_ptr(), len(rows), out.ctypes.data, threads)
        return torch.from_numpy(out)[:, : self.outputs]

    @property
    def parameters(self) -> int:
        """How many weights these are, padding left out."""
        return self.outputs * self.inputs


_FORMATS = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16}


def _pack_plain(weight: torch.Tensor, arena: Arena) -> npt.NDArray[np.generic]:
    """``[panels, inputs, 64]`` float32, or ``[panels, inputs / 2, 64, 2]`` bfloat16 bits."""
    outputs, inputs = weight.shape
    together = 1 if weight.dtype == torch.float32 else 2
    bits = weight.contiguous() if together == 1 else weight.contiguous().view(torch.int16)
    padded = _pad(bits.numpy(), wide(outputs), wide(inputs))
    return arena.keep(padded.reshape(-1, PANEL, wide(inputs) // together, together).transpose(0, 2, 1, 3))


def _pack_blocks(
    weight: Blocks, arena: Arena
) -> tuple[list[npt.NDArray[np.generic] | None], tuple[int, int, int, int]]:
    """Codes, scales and minima, and the fields of ``library.Matrix`` that tell what they are."""
    outputs, inputs = (wide(size) for size in weight.codes.shape)

    def per_block(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """``[panels, blocks, 64]``."""
        padded = _pad(values, outputs, inputs // weight.block)
        return arena.keep(padded.reshape(-1, PANEL, inputs // weight.block).transpose(0, 2, 1))

    pack = _pack_nibbles if weight.bits == 4 else _pack_bytes
    minima = None if weight.minima is None else per_block(weight.minima)
    fields = (_NIBBLES if weight.bits == 4 else _BYTES, weight.block, int(weight.scales.itemsize == 2), weight.zero)
    return [arena.keep(pack(_pad(weight.codes, outputs, inputs))), per_block(weight.scales), minima], fields


def _pack_nibbles(codes: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """``[panels, inputs / 8, 64]`` words; inputs 2j and 2j + 1 of eight are in bits 4j and 16 + 4j."""
    inputs = codes.shape[1]
    eights = codes.reshape(-1, PANEL, inputs // 8, 4, 2).astype(np.uint32)
    shifts = (4 * np.arange(4)[:, None] + 16 * np.arange(2)).astype(np.uint32)
    words: npt.NDArray[np.uint32] = (eights << shifts).sum(axis=(3, 4), dtype=np.uint32)
    return words.transpose(0, 2, 1)


def _pack_bytes(codes: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """``[panels, inputs / 4, 64 * 4]`` signs and magnitudes; of four outputs the first two inputs, then the others."""
    if codes.min() == -128:
        raise BadInputError("a quantized weight is -128, which no usual quantizer writes: use dtype bfloat16")
    signed = codes.astype(np.int8)
    magnitudes = np.abs(signed).view(np.uint8) | (signed < 0).astype(np.uint8) << 7
    inputs = codes.shape[1]
    fours = magnitudes.reshape(-1, PANEL // 4, 4, inputs // 4, 2, 2)  # panel, lane, output, group, step, input
    return fours.transpose(0, 3, 1, 4, 2, 5)


def _pad(values: npt.NDArray[np.generic], outputs: int, inputs: int) -> npt.NDArray[np.generic]:
    if values.shape == (outputs, inputs):
        return values
    padded = np.zeros((outputs, inputs), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded
