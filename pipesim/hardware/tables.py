"""The profiles as tables in Markdown: what ``pipesim profiles`` prints and ``docs/hardware.md`` shows."""

from collections.abc import Iterable, Sequence

from pipesim.hardware.devices import DEVICES, INTERCONNECTS, NumberFormat
from pipesim.hardware.models import BITS_PER_WEIGHT, MODELS


def profile_tables() -> str:
    """Devices, links, models and quantizations, each with its source."""
    devices = _table(
        ("device", "memory GB/s", "TFLOPS float32", "bfloat16", "int8", "memory GiB", "source"),
        (
            (
                device.name,
                f"{device.memory_bandwidth_gbytes_s:g}",
                *(f"{device.peak_tflops[f]:g}" if f in device.peak_tflops else "-" for f in _FORMATS),
                f"{device.memory_gib:g}",
                device.source,
            )
            for device in DEVICES.values()
        ),
    )
    links = _table(
        ("link", "GB/s one way", "µs per step", "source"),
        (
            (link.name, f"{link.bandwidth_gbytes_s:g}", f"{link.latency_us:g}", link.source)
            for link in INTERCONNECTS.values()
        ),
    )
    models = _table(
        (
            "model",
            "layers",
            "hidden",
            "heads (KV)",
            "MLP",
            "vocabulary",
            "parameters",
            "q4_k_m GB",
            "KV kB/token",
            "source",
        ),
        (
            (
                model.name,
                str(shape.layers),
                str(shape.hidden),
                f"{shape.heads} ({shape.kv_heads})",
                f"{shape.intermediate}{'' if shape.gated else ' ungated'}",
                f"{shape.vocabulary}{' tied' if shape.tied else ''}",
                f"{shape.parameters / 1e9:.4g}e9",
                f"{shape.parameters * BITS_PER_WEIGHT['q4_k_m'] / 8e9:.3g}",
                f"{shape.layers * shape.kv_elements * 2 / 1e3:.4g}",
                model.source,
            )
            for model in MODELS.values()
            for shape in (model.shape,)
        ),
    )
    bits = _table(("quantization", "bits per weight"), ((name, f"{bits:g}") for name, bits in BITS_PER_WEIGHT.items()))
    return "\n".join((devices, links, models, bits))


_FORMATS: tuple[NumberFormat, ...] = ("float32", "bfloat16", "int8")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
