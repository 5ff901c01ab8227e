"""Measures forward passes on a device, in fixed shapes, recorded and not; for a machine with a GPU.

``python -m analysis.device_speed --device cuda:0 -o docs/gpu-speed.md``
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from analysis.forward_speed import CONTEXT, Forward, opened
from analysis.pages import fill, markdown_table
from backends.models.devices import Device, open_device
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from pipesim.cli.common import check_outputs, diagnostic

ROWS = (1, 4, 16, 32)
RECORDED, LAUNCHED, FLOOR = "recorded", "launched one by one", "reading the weights"


@dataclass(frozen=True, slots=True)
class Found:
    """Median ms of one dtype by ``(name, rows)``, and the arithmetic that the start-up check chose."""

    dtype: str
    arithmetic: str
    ms: dict[tuple[str, int], float]


def measure(source: ModelSource, device_name: str, dtype: str, rows: Sequence[int] = ROWS, rounds: int = 30) -> Found:
    """All logits of ``rows`` rows, from ids on the host to logits on the host, in turns."""
    device = _device(device_name, dtype)
    model, recorded = opened(StageModel(source, 0, source.config.layers, getattr(torch, dtype), device=device))
    with mock.patch.object(device, "record", lambda step: step):
        plain, launched = opened(StageModel(source, 0, source.config.layers, getattr(torch, dtype), device=device))
        for count in rows:  # steps are made, and recorded, when they are first needed
            launched(count)
    for count in rows:
        recorded(count)
    weights = torch.ones(model.parameters * getattr(torch, dtype).itemsize // 4, device=device.place)
    forwards: dict[str, Forward] = {RECORDED: recorded, LAUNCHED: launched, FLOOR: lambda _: weights.sum().item()}
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in forwards for count in rows}
    for _ in range(rounds):
        for count in rows:
            for name, forward in forwards.items():
                times[name, count].append(_timed(forward, count))
    assert model.engine.arithmetic == plain.engine.arithmetic
    medians = {key: statistics.median(found) for key, found in times.items()}
    return Found(dtype, model.engine.arithmetic, medians)


def _device(name: str, dtype: str) -> Device:
    return Device(fixed_shapes=True) if name == "cpu" else open_device(name, dtype)


def _timed(forward: Callable[[int], object], rows: int) -> float:
    began = time.perf_counter()
    forward(rows)  # ends with its result on the host
    return 1e3 * (time.perf_counter() - began)


def page(found: Sequence[Found], device: str) -> str:
    """The page as Markdown."""
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU, for a trial of this command"
    today = datetime.datetime.now(datetime.UTC).date()
    parts = [
        "# How fast a forward pass is on a GPU",
        fill(
            f"SmolLM2-135M as one stage on {place}: from token ids on the host to the logits of every row on the host, "
            f"{CONTEXT} KV cells before them, medians in ms of wall-clock time, measured on {today} with PyTorch "
            f"{torch.__version__}. *{RECORDED}*: a CUDA graph for each shape; *{LAUNCHED}*: the same without it."
        ),
    ]
    for one in found:
        rows = sorted({count for _, count in one.ms})
        names = list(dict.fromkeys(name for name, _ in one.ms))
        lines = [[name, *(f"{one.ms[name, count]:.3f}" for count in rows)] for name in names]
        parts += [f"## {one.dtype}", f"Arithmetic: {one.arithmetic}.", markdown_table(["rows", *map(str, rows)], lines)]
    parts.append(f"Made by `python -m analysis.device_speed --device {device} -o docs/gpu-speed.md`.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="cuda:0, ..; cpu tries the command out")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contestant")
    options = parser.parse_args()
    check_outputs(options.output)
    source = open_model(DEFAULT_MODEL)
    found = [
        measure(source, options.device, dtype, rounds=options.rounds) for dtype in ("float32", "bfloat16", "float16")
    ]
    options.output.write_text(page(found, options.device))
    diagnostic(f"wrote {options.output}")


if __name__ == "__main__":
    main()
