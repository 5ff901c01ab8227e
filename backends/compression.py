"""Activations in one byte per element, for slow links. Lossy; each row by itself, whatever rows are beside it.

A row is divided by a scale of its own, so that its largest element just fits, and rounded: to float8 with 4 bits of
exponent and 3 of mantissa (arXiv 2209.05433), or to whole numbers up to 127 (the row-wise half of LLM.int8(),
arXiv 2208.07339).
"""

import ctypes

import torch

from backends.frames import SCALE_BYTES, Activation, Compression, FrameError

_LARGEST = {"fp8": 448.0, "int8": 127.0}


def to_activation(hidden: torch.Tensor, compression: Compression = "none") -> Activation:
    """Hidden states ``[rows, hidden]``, which lie in the CPU's memory, as they travel.

    Raises:
        FrameError: they shall be compressed and overflow.
    """
    rows, width = hidden.shape
    dtype = str(hidden.dtype).removeprefix("torch.")
    if compression == "none":
        return Activation(dtype, (rows, width), _bytes(hidden))
    values = hidden.float()
    scales = values.abs().amax(1, keepdim=True) / _LARGEST[compression]
    if not scales.isfinite().all():
        raise FrameError(f"activations cannot be compressed to {compression}: a row has values that are not finite")
    scaled = (values / scales.where(scales > 0, 1.0)).clamp(-_LARGEST[compression], _LARGEST[compression])
    codes = scaled.to(torch.float8_e4m3fn) if compression == "fp8" else scaled.round().to(torch.int8)
    return Activation(dtype, (rows, width), _bytes(scales) + _bytes(codes), compression)


def to_hidden(activation: Activation) -> torch.Tensor:
    """Hidden states ``[rows, hidden]`` in memory of their own, for an activation as ``decode`` has checked it."""
    dtype, data = getattr(torch, activation.dtype), bytearray(activation.data)
    if activation.compression == "none":
        return torch.frombuffer(data, dtype=dtype).view(activation.shape)
    rows = activation.shape[0]
    scales = torch.frombuffer(data, dtype=torch.float32, count=rows)
    form = torch.float8_e4m3fn if activation.compression == "fp8" else torch.int8
    codes = torch.frombuffer(data, dtype=form, offset=rows * SCALE_BYTES).view(activation.shape)
    return (codes.float() * scales[:, None]).to(dtype)


def _bytes(tensor: torch.Tensor) -> bytes:
    kept = tensor.contiguous()
    return ctypes.string_at(kept.data_ptr(), kept.nbytes)  # as `numpy()`, in a fraction of the code
