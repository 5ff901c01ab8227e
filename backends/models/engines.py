"""Which engine serves a stage: the native kernels where they can be had, else PyTorch's operations."""

import functools
import logging
from typing import Any

import torch

from backends.models.devices import Device
from backends.models.engine import Engine, Part
from backends.models.loading import ModelSource
from backends.models.native.engine import NativeEngine
from backends.models.native.self_check import kernels_refusal
from backends.models.torch_engine import TorchEngine
from pipesim.errors import BadInputError

_log = logging.getLogger(__name__)
KERNELS = ("auto", "native", "torch", "compile")
"""``execution.kernels``."""


def make_engine(
    source: ModelSource, part: Part, dtype: torch.dtype | str, threads: int, device: Device, kernels: str = "auto"
) -> Engine[Any]:
    """The engine for ``part``: on CPUs, ``auto`` takes native kernels if this machine has them, and says so if not.

    Raises:
        BadInputError: the kernels asked for, or those that ``dtype`` needs, cannot be had; or the model is not whole.
    """
    if kernels not in KERNELS:
        raise BadInputError(f"kernels {kernels!r} is none of {', '.join(KERNELS)}")
    if isinstance(dtype, str) and kernels in ("torch", "compile"):
        raise BadInputError(f"execution.dtype {dtype} needs native kernels: leave execution.kernels at auto")
    refusal = "they were declined" if kernels in ("torch", "compile") else _refusal(dtype, device)
    if not refusal:
        return NativeEngine(source, part, dtype, threads)
    if kernels == "native" or isinstance(dtype, str):
        what = f"execution.dtype {dtype}" if isinstance(dtype, str) else "execution.kernels native"
        raise BadInputError(f"{what} cannot be had here: {refusal}")
    if kernels == "auto" and refusal == kernels_refusal():
        _say_once(refusal)
    return TorchEngine(source, part, dtype, device, compiles=kernels == "compile")


def _refusal(dtype: torch.dtype | str, device: Device) -> str:
    """Why native kernels cannot serve; empty if they can."""
    if device.place.type != "cpu" or device.fixed_shapes:
        return f"native kernels are for CPUs, not for {device}"
    if dtype == torch.float16:
        return "native kernels do not compute in float16"
    return kernels_refusal()


@functools.cache
def _say_once(refusal: str) -> None:
    _log.warning("no native kernels, PyTorch's operations serve instead, at about half the speed: %s", refusal)
