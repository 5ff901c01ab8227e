"""What a run costs at a stage: the schema of cost models."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from pipesim.hardware.costs import CostModel, FittedCost, Machine, linear, table
from pipesim.hardware.devices import DEVICES, INTERCONNECTS, NumberFormat
from pipesim.scenario.section import Section, find_profile

_GIB = 2**30


def _json_key(key: Any, info: ValidationInfo) -> Any:
    """JSON has no keys but text."""
    return int(key) if info.mode == "json" and isinstance(key, str) and key.isdecimal() else key


_Rows = Annotated[int, BeforeValidator(_json_key), Field(ge=1)]


class _Fitted(Section):
    per: Literal["stage", "layer"] = "stage"
    """Whether the times are those of the whole stage, or of each of its layers."""
    kv_us_per_kilocell: float = Field(default=0.0, ge=0)
    """Extra time of each row for every 1000 KV cells of context that it attends to, itself included."""
    prefill_per_token_ms: float | None = Field(default=None, ge=0)
    """Time per prompt row in a prefill run, which takes at least a one-row run's time; null: as any other row."""
    prefill_rows_ms: dict[_Rows, Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Time of a prefill run by its rows, as measured, in the place of prefill_per_token_ms; linear between and beyond,
    constant under the smallest number given."""
    lm_head_ms: float = Field(default=0.0, ge=0)
    """Time that the LM head adds to every run if this is the last stage, however many layers it has."""

    @model_validator(mode="after")
    def _one_prefill(self) -> Self:
        if self.prefill_rows_ms is not None and self.prefill_per_token_ms is not None:
            raise ValueError("prefill_rows_ms: prefill_per_token_ms says the same: remove one of the two")
        return self

    def unit(self, layers: int) -> float:
        """Seconds in which a stage with so many layers does what a given time of one millisecond stands for."""
        return 1e-3 * (layers if self.per == "layer" else 1)

    def fitted(self, decode: Callable[[int], float], unit: float, last: bool) -> CostModel:
        """The cost model around the time of a run by its rows."""
        prefill: Callable[[int], float] | None = None
        if self.prefill_rows_ms is not None:
            prefill = table({rows: ms * unit for rows, ms in self.prefill_rows_ms.items()})
        elif self.prefill_per_token_ms is not None:
            per_row, least = self.prefill_per_token_ms * unit, decode(1)
            prefill = lambda rows: max(least, rows * per_row)  # noqa: E731
        extra = self.lm_head_ms * 1e-3 if last else 0.0
        return FittedCost(decode, prefill, self.kv_us_per_kilocell * 1e-6 * unit, extra)


class LinearCost(_Fitted):
    """Time of a run at a stage: constant_ms + rows * per_token_ms."""

    kind: Literal["linear"]
    constant_ms: float = Field(gt=0)
    """Time that every run takes, whatever its rows: reading the weights."""
    per_token_ms: float = Field(default=0.0, ge=0)
    """Time that every row adds."""

    def model(self, layers: int, last: bool) -> CostModel:
        """The cost model of a stage with so many layers."""
        unit = self.unit(layers)
        return self.fitted(linear(self.constant_ms * unit, self.per_token_ms * unit), unit, last)


class TableCost(_Fitted):
    """Time of a run at a stage, measured at some numbers of rows; linear between and beyond them."""

    kind: Literal["table"]
    rows_ms: dict[_Rows, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Rows of a run -> its time. Constant under the smallest number given; never falling beyond the largest."""

    def model(self, layers: int, last: bool) -> CostModel:
        """The cost model of a stage with so many layers."""
        unit = self.unit(layers)
        return self.fitted(table({rows: ms * unit for rows, ms in self.rows_ms.items()}), unit, last)


class AllReduce(Section):
    """The link between the devices of a tensor-parallel stage."""

    profile: str | None = Field(default=None, json_schema_extra={"enum": [*INTERCONNECTS, None]})
    """A known link such as nvlink-4 or pcie-4-x16 (`pipesim profiles` lists them)."""
    bandwidth_gbytes_s: float | None = Field(default=None, gt=0)
    """10^9 bytes per second of one device in one direction; null: as the profile."""
    latency_us: float | None = Field(default=None, ge=0)
    """Latency of one step of the ring; null: as the profile."""

    @model_validator(mode="after")
    def _check(self) -> "AllReduce":
        if self.profile is not None:
            find_profile("profile", self.profile, INTERCONNECTS)
        else:
            missing = [key for key in ("bandwidth_gbytes_s", "latency_us") if getattr(self, key) is None]
            if missing:
                raise ValueError(f"{missing[0]}: missing, add it or name a profile")
        return self

    def bandwidth(self) -> float:
        """Bytes per second."""
        own = self.bandwidth_gbytes_s
        return 1e9 * (own if own is not None else INTERCONNECTS[self.profile or ""].bandwidth_gbytes_s)

    def latency(self) -> float:
        """Seconds per step."""
        own = self.latency_us
        return 1e-6 * (own if own is not None else INTERCONNECTS[self.profile or ""].latency_us)


class RooflineCost(Section):
    """Time of a run from the model's bytes and operations, and from what a device can do.

    A matrix takes max(its bytes / bandwidth, its operations / peak); the model section says how large it is.
    """

    kind: Literal["roofline"]
    profile: str | None = Field(default=None, json_schema_extra={"enum": [*DEVICES, None]})
    """A known device such as h100-sxm (`pipesim profiles` lists them); keys beside it differ from it."""
    memory_bandwidth_gbytes_s: float | None = Field(default=None, gt=0)
    """Peak memory bandwidth in 10^9 bytes per second; null: as the profile."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak in 10^12 operations per second; null: the profile's for the number format."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one device in 2^30 bytes: what does not fit is an error; null: as the profile, without one no limit."""
    bandwidth_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of the memory bandwidth that runs reach."""
    compute_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of the peak that runs reach."""
    compute: NumberFormat | None = None
    """Number format of the arithmetic; null: float32 for fp32 weights, otherwise bfloat16."""
    overhead_ms: float = Field(default=0.0, ge=0)
    """Time that every run takes on top: launches, bookkeeping."""
    tensor_parallel: int = Field(default=1, ge=1)
    """This many equal devices divide each layer of the stage among them."""
    all_reduce: AllReduce | None = None
    """The link between them; needed if there are several."""

    @model_validator(mode="after")
    def _check(self) -> "RooflineCost":
        if self.profile is not None:
            find_profile("profile", self.profile, DEVICES)
        else:
            missing = [key for key in ("memory_bandwidth_gbytes_s", "peak_tflops") if getattr(self, key) is None]
            if missing:
                raise ValueError(f"{missing[0]}: missing, add it or name a profile")
        if self.compute is not None and self.peak_tflops is not None:
            raise ValueError("compute: peak_tflops says how fast the arithmetic is: remove one of the two")
        if self.tensor_parallel > 1 and self.all_reduce is None:
            raise ValueError("all_reduce: missing, tensor_parallel devices need a link, e.g. {profile: nvlink-4}")
        if self.tensor_parallel == 1 and self.all_reduce is not None:
            raise ValueError("all_reduce: one device has nobody to talk to: remove it, or set tensor_parallel")
        return self

    def memory_bytes(self) -> float | None:
        """Memory of one device; None without limit."""
        gib = self.memory_gib
        if gib is None and self.profile is not None:
            gib = DEVICES[self.profile].memory_gib
        return None if gib is None else gib * _GIB

    def machine(self, quantization: str) -> Machine:
        """The devices, for weights of a quantization."""
        bandwidth, peak = self.memory_bandwidth_gbytes_s, self.peak_tflops
        if self.profile is not None:
            device = DEVICES[self.profile]
            number_format = self.compute or ("float32" if quantization == "fp32" else "bfloat16")
            bandwidth = device.memory_bandwidth_gbytes_s if bandwidth is None else bandwidth
            peak = device.peak(number_format) if peak is None else peak
        assert bandwidth is not None
        assert peak is not None
        reached = (bandwidth * 1e9 * self.bandwidth_efficiency, peak * 1e12 * self.compute_efficiency)
        link = self.all_reduce
        if link is None:
            return Machine(*reached, self.overhead_ms * 1e-3)
        overhead = self.overhead_ms * 1e-3
        return Machine(*reached, overhead, self.tensor_parallel, link.bandwidth(), link.latency())


Cost = Annotated[LinearCost | TableCost | RooflineCost, Field(discriminator="kind")]
