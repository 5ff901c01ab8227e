"""Profiles of devices, and of the links inside a tensor-parallel stage, from public data sheets.

Peaks are dense: figures that vendors print "with sparsity" are halved. Memory makers count GB in powers of two, so
memory stands in GiB; bandwidth is in 10^9 bytes per second. What no data sheet says is derived, and ``source`` says
how.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

NumberFormat = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device, or one node that computes as one device.

    Attributes:
        memory_bandwidth_gbytes_s: peak of its main memory.
        peak_tflops: dense peak (int8: TOPS) by number format; ``bfloat16`` stands for float16, too. A format without
            an entry has no faster unit of its own and runs as the next wider one.
        memory_gib: what fits into it.
        source: the public document, and what was derived.
    """

    name: str
    memory_bandwidth_gbytes_s: float
    peak_tflops: Mapping[NumberFormat, float]
    memory_gib: float
    source: str

    def peak(self, number_format: NumberFormat) -> float:
        """Dense peak in TFLOPS for a number format, or the next wider one that the device has."""
        wider: dict[NumberFormat, NumberFormat] = {"int8": "bfloat16", "bfloat16": "float32"}
        while number_format not in self.peak_tflops:
            number_format = wider[number_format]
        return self.peak_tflops[number_format]


@dataclass(frozen=True, slots=True)
class Interconnect:
    """What joins the devices of a tensor-parallel stage.

    Attributes:
        bandwidth_gbytes_s: of one device in one direction.
        latency_us: of one step of a ring.
    """

    name: str
    bandwidth_gbytes_s: float
    latency_us: float
    source: str


def _device(
    name: str, bandwidth: float, peaks: tuple[float, float | None, float | None], gib: float, source: str
) -> DeviceProfile:
    formats: tuple[NumberFormat, ...] = ("float32", "bfloat16", "int8")
    tflops = {number_format: peak for number_format, peak in zip(formats, peaks, strict=True) if peak is not None}
    return DeviceProfile(name, bandwidth, MappingProxyType(tflops), gib, source)


_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_MI250X = "AMD Instinct MI250X data sheet"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A; 16-bit with 32-bit accumulation"
_ORIN = (
    "NVIDIA Jetson AGX Orin Series technical brief, the GPU alone: its 170 sparse INT8 TOPS halved; "
    "16-bit derived: half of INT8"
)
_XEON_2017 = (
    "Two Intel Xeon Gold 6140 (18 cores at 2.3 GHz base, six channels of DDR4-2666), derived: 12 channels x 2666 MT/s "
    "x 8 bytes; 36 cores x 2.3 GHz x 64 float32 operations per cycle (AVX-512, two FMA units); 12 modules of 16 GiB"
)
_XEON_2023 = (
    "Two Intel Xeon Platinum 8480+ (56 cores at 2.0 GHz base, eight channels of DDR5-4800), derived: 16 channels x "
    "4800 MT/s x 8 bytes; 112 cores x 2.0 GHz x 64 (AVX-512 float32), 1024 (AMX bfloat16) or 2048 (AMX int8) "
    "operations per cycle; 16 modules of 32 GiB"
)
_M2 = "Apple M2 Ultra press release and Mac Pro page, 76 GPU cores; no faster 16-bit rate is named"

DEVICES: Mapping[str, DeviceProfile] = MappingProxyType(
    {
        device.name: device
        for device in (
            # name, GB/s, TFLOPS of (float32, bfloat16, int8), GiB, source
            _device("h100-sxm", 3350, (67, 989.4, 1978.9), 80, f"{_H100} (SXM5)"),
            _device("h100-pcie", 2000, (51, 756, 1513), 80, f"{_H100} (PCIe)"),
            _device("a100-sxm-80gb", 2039, (19.5, 312, 624), 80, f"{_A100} (80 GB SXM)"),
            _device("mi250x", 3276.8, (95.7, 383, 383), 128, f"{_MI250X}, the whole module; software sees two devices"),
            _device("mi250x-gcd", 1638.4, (47.85, 191.5, 191.5), 64, f"{_MI250X}, one of its two dies (GCD): the half"),
            _device("rtx-4090", 1008, (82.6, 165.2, 660.6), 24, _ADA),
            _device("jetson-agx-orin-64gb", 204.8, (5.3, 42.5, 85), 64, _ORIN),
            _device("dual-xeon-2017", 255.9, (5.3, None, None), 192, _XEON_2017),
            _device("dual-xeon-2023", 614.4, (14.3, 229.4, 458.8), 512, _XEON_2023),
            _device("m2-ultra", 800, (27.2, None, None), 192, _M2),
        )
    }
)
"""Known devices by name."""

_RING = "latency: a ring step of its low-latency protocol in NCCL's tuning table (src/graph/tuning.cc)"
_CDNA_2 = "AMD CDNA 2 whitepaper: 400 GB/s both ways between the dies of a module; latency assumed as of PCIe"

INTERCONNECTS: Mapping[str, Interconnect] = MappingProxyType(
    {
        link.name: link
        for link in (
            Interconnect("nvlink-4", 450, 0.6, f"{_H100}: 900 GB/s both ways; {_RING}"),
            Interconnect("nvlink-3", 300, 0.6, f"{_A100}: 600 GB/s both ways; {_RING}"),
            Interconnect("mi250x-gcd-to-gcd", 200, 1.0, _CDNA_2),
            Interconnect("pcie-5-x16", 63, 1.0, f"PCI Express 5.0: 32 GT/s x 16 lanes, 128b/130b; {_RING}"),
            Interconnect("pcie-4-x16", 31.5, 1.0, f"PCI Express 4.0: 16 GT/s x 16 lanes, 128b/130b; {_RING}"),
        )
    }
)
"""Known links inside a tensor-parallel stage, by name."""
