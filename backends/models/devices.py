"""Where a stage computes: the CPU, or a CUDA device. All that differs between them is here.

A stage computes on a CUDA device in fixed shapes (``steps.py``), whose launches are recorded once as CUDA graphs. What
goes to the device and what comes from it passes through pinned memory, on a stream of its own beside the computing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipesim.errors import BadInputError

QUANTIZED = "quantized"
"""In place of a type: matrices stay in the blocks of their GGUF file."""

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    QUANTIZED: QUANTIZED,
}
"""Types of weight matrices by name."""

CPU = torch.device("cpu")

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability; older devices emulate it

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Sent:
    """A tensor on its way to a device; ``ready`` tells when it is there (None: it is)."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None = None

    def arrived(self) -> torch.Tensor:
        """The tensor; what is computed from now on waits for it, nobody else does."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            self.tensor.record_stream(stream)
        return self.tensor


class Device:
    """The CPU: everything is there already. ``fixed_shapes``: runs are computed in a few fixed shapes."""

    def __init__(self, place: torch.device = CPU, fixed_shapes: bool = False) -> None:
        self.place, self.fixed_shapes = place, fixed_shapes

    def __str__(self) -> str:
        return str(self.place)

    def send(self, host: torch.Tensor) -> Sent:
        """Starts the way of ``host`` to the device. From any thread."""
        return Sent(host)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Brings ``tensor`` home."""
        return tensor

    def record(self, step: Callable[[], _Value]) -> Callable[[], _Value]:
        """``step``, which reads and writes the same tensors at each call, to be repeated at less cost."""
        return step


class CudaDevice(Device):
    """A CUDA device."""

    def __init__(self, place: torch.device) -> None:
        super().__init__(place, fixed_shapes=True)
        # reproducible bits: no TF32, no sums in half precision, no kernel chosen by trying
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cudnn.benchmark = False
        torch.cuda.set_device(place)
        self._copies = _new_stream(place)
        self._pool = torch.cuda.graph_pool_handle()

    def send(self, host: torch.Tensor) -> Sent:
        """Copies through pinned memory, on the stream of copies."""
        with torch.cuda.stream(self._copies):
            there = host.pin_memory().to(self.place, non_blocking=True)  # the allocator keeps it until it is copied
            return Sent(there, self._copies.record_event())

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies into pinned memory, on the stream of copies, once ``tensor`` is computed."""
        computed = torch.cuda.current_stream(self.place).record_event()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(computed)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copies)
            done = self._copies.record_event()
        done.synchronize()
        return host

    def record(self, step: Callable[[], _Value]) -> Callable[[], _Value]:
        """A CUDA graph of ``step``; all graphs of the device share their scratch memory."""
        side = _new_stream(self.place)
        side.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(side):  # libraries set themselves up at a first call, which cannot be recorded
            step()
        torch.cuda.current_stream(self.place).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            value = step()

        def replay() -> _Value:
            graph.replay()
            return value

        return replay


def _new_stream(place: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
    return stream


def open_device(name: str, dtype: str) -> Device:
    """The device called ``name`` (cpu, cuda:0, ..), to compute in ``dtype``.

    Raises:
        BadInputError: there is no such device here, or it does not compute in ``dtype``.
    """
    if dtype not in DTYPES:
        raise BadInputError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if name == "cpu":
        return Device()
    number = re.fullmatch(r"cuda:(\d+)", name)
    if number is None:
        raise BadInputError(f"device {name!r} is not known: use cpu or cuda:0, cuda:1, ..")
    count = torch.cuda.device_count()
    if int(number[1]) >= count:
        known = f"use cuda:0 to cuda:{count - 1}, or cpu" if count else f"{_why_no_cuda()}, use cpu"
        raise BadInputError(f"there is no device {name!r} on this machine, {known}")
    place = torch.device(name)
    if dtype == "bfloat16" and torch.cuda.get_device_capability(place) < _FIRST_WITH_BFLOAT16:
        kind = torch.cuda.get_device_name(place)
        raise BadInputError(f"dtype bfloat16: {name} ({kind}) does not compute in it, use float16")
    return CudaDevice(place)


def _why_no_cuda() -> str:
    built = torch.version.cuda
    return "PyTorch finds no CUDA device" if built else "this PyTorch is built for the CPU alone"
