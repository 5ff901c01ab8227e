"""Quantized weights as their GGUF file has them: small codes, per block of inputs a scale and perhaps a minimum.

Nothing is rounded again: ``scale * (code - zero) + minimum`` is what the file says, to the last bit.
Sources: the GGUF specification and ggml's block layouts (ggml project); the ``gguf`` package unpacks K-quants' scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import Q4_K

Raw = npt.NDArray[np.uint8]
"""A tensor's bytes, ``[outputs, bytes]``."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of ``[outputs, inputs]`` codes, int8; ``scales`` and ``minima`` are ``[outputs, inputs // block]``.

    ``bits`` are enough for a code: 4 (0 to 15) or 8. Scales and minima are float16 where the file's are, else float32.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.floating]
    minima: npt.NDArray[np.floating] | None
    bits: int
    zero: int = 0

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def rows(self, order: npt.NDArray[np.int64]) -> "Blocks":
        """Its rows in another ``order``."""
        minima = None if self.minima is None else self.minima[order]
        return replace(self, codes=self.codes[order], scales=self.scales[order], minima=minima)

    def values(self) -> npt.NDArray[np.float32]:
        """The weights in float32."""
        values = (self.codes.astype(np.float32) - self.zero) * self._per_input(self.scales)
        return values if self.minima is None else values + self._per_input(self.minima)

    def _per_input(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return np.repeat(values.astype(np.float32), self.block, axis=1)


def stack(parts: Sequence[Blocks]) -> Blocks:
    """One matrix of all their outputs, in a form that holds every part exactly."""
    block, bits = min(part.block for part in parts), max(part.bits for part in parts)
    zero = parts[0].zero if bits == 4 and len({part.zero for part in parts}) == 1 else 0
    if zero == 0 and any(part.zero for part in parts):
        bits = 8
    scale_type = np.result_type(*(part.scales.dtype for part in parts))
    has_minima = any(part.minima is not None for part in parts)

    def spread(values: npt.NDArray[np.floating], part: Blocks) -> npt.NDArray[np.floating]:
        return np.repeat(values.astype(scale_type), part.block // block, axis=1)

    return Blocks(
        codes=np.concatenate([part.codes - np.int8(part.zero - zero) for part in parts]),
        scales=np.concatenate([spread(part.scales, part) for part in parts]),
        minima=np.concatenate(
            [spread(np.zeros_like(part.scales) if part.minima is None else part.minima, part) for part in parts]
        )
        if has_minima
        else None,
        bits=bits,
        zero=zero,
    )


def _half(raw: Raw, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(raw[:, :, at : at + 2]).view(np.float16)[:, :, 0]


def _nibbles(raw: Raw) -> npt.NDArray[np.int8]:
    """Lower halves of all bytes of a block, then the upper ones."""
    return np.concatenate((raw & 15, raw >> 4), axis=-1).astype(np.int8)


def _fifth_bits(raw: Raw) -> npt.NDArray[np.int8]:
    return np.unpackbits(raw, axis=-1, bitorder="little").astype(np.int8) << 4


def _q4_0(raw: Raw) -> Blocks:
    return Blocks(_nibbles(raw[:, :, 2:]), _half(raw, 0), None, 4, zero=8)


def _q4_1(raw: Raw) -> Blocks:
    return Blocks(_nibbles(raw[:, :, 4:]), _half(raw, 0), _half(raw, 2), 4)


def _q5_0(raw: Raw) -> Blocks:
    return Blocks((_nibbles(raw[:, :, 6:]) | _fifth_bits(raw[:, :, 2:6])) - np.int8(16), _half(raw, 0), None, 8)


def _q5_1(raw: Raw) -> Blocks:
    return Blocks(_nibbles(raw[:, :, 8:]) | _fifth_bits(raw[:, :, 4:8]), _half(raw, 0), _half(raw, 2), 8)


def _q8_0(raw: Raw) -> Blocks:
    return Blocks(raw[:, :, 2:].view(np.int8), _half(raw, 0), None, 8)


def _k_scales(raw: Raw) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales and minima of the eight parts of each Q4_K or Q5_K block, ``[outputs, blocks * 8]``."""
    outputs = len(raw)
    scales, minima = Q4_K.get_scale_min(raw[:, :, 4:16].reshape(-1, 12))
    d, least = (_half(raw, at).astype(np.float32).reshape(-1, 1) for at in (0, 2))
    return (d * scales).reshape(outputs, -1).astype(np.float32), (-least * minima).reshape(outputs, -1).astype(
        np.float32
    )


def _pairs_of_parts(raw: Raw) -> npt.NDArray[np.int8]:
    """128 bytes hold 8 parts of 32: of each 32 bytes the lower halves, then the upper ones."""
    return _nibbles(raw.reshape(*raw.shape[:2], 4, 32))


def _q4_k(raw: Raw) -> Blocks:
    return Blocks(_pairs_of_parts(raw[:, :, 16:]), *_k_scales(raw), 4)


def _q5_k(raw: Raw) -> Blocks:
    high = raw[:, :, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    low = _pairs_of_parts(raw[:, :, 48:]).reshape(*high.shape)
    return Blocks(low | (high.astype(np.int8) << 4), *_k_scales(raw), 8)


def _q6_k(raw: Raw) -> Blocks:
    outputs, blocks = raw.shape[:2]
    low = raw[:, :, :128].reshape(outputs, blocks, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = raw[:, :, 128:192].reshape(outputs, blocks, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = low.reshape(outputs, blocks, 8, 32) | high.reshape(outputs, blocks, 8, 32) << 4
    scales = _half(raw, 208).astype(np.float32)[:, :, None] * raw[:, :, 192:208].view(np.int8).astype(np.float32)
    return Blocks(codes.astype(np.int8) - np.int8(32), scales.reshape(outputs, -1), None, 8)


_LAYOUTS: dict[Kind, tuple[int, int, Callable[[Raw], Blocks]]] = {  # bytes and values of a block
    Kind.Q4_0: (18, 32, _q4_0),
    Kind.Q4_1: (20, 32, _q4_1),
    Kind.Q5_0: (22, 32, _q5_0),
    Kind.Q5_1: (24, 32, _q5_1),
    Kind.Q8_0: (34, 32, _q8_0),
    Kind.Q4_K: (144, 256, _q4_k),
    Kind.Q5_K: (176, 256, _q5_k),
    Kind.Q6_K: (210, 256, _q6_k),
}

LAYOUTS = tuple(kind.name for kind in _LAYOUTS)
"""Quantizations that are understood, by GGUF's names."""


def read_blocks(raw: Raw, kind: Kind) -> Blocks | None:
    """The blocks of a tensor of ``kind``, None if they are not of ``LAYOUTS``."""
    if kind not in _LAYOUTS:
        return None
    size, values, read = _LAYOUTS[kind]
    outputs, inputs = len(raw), raw.shape[1] // size * values
    blocks = read(raw.reshape(outputs, -1, size))
    return replace(
        blocks,
        codes=blocks.codes.reshape(outputs, inputs),
        scales=blocks.scales.reshape(outputs, -1),
        minima=None if blocks.minima is None else blocks.minima.reshape(outputs, -1),
    )
