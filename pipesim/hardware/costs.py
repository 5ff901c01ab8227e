"""How long a run takes at a stage."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipesim.hardware.models import ModelShape
from pipesim.scheduling.runs import RunKind


class CostModel(Protocol):
    """Time of a run at one stage."""

    def seconds(self, kind: RunKind, rows: int, context: float) -> float:
        """Compute time of a run whose rows attend to ``context`` cells on average."""


class FittedCost:
    """Coefficients from measurements: constant + rows + rows x context.

    Args:
        decode: time of a run of so many rows, in seconds.
        prefill: time of a prefill run of so many rows, in seconds; None: as any other run's.
        per_cell: seconds per row and KV cell that it attends to.
        extra: seconds that every run takes on top.
    """

    def __init__(
        self, decode: Callable[[int], float], prefill: Callable[[int], float] | None, per_cell: float, extra: float
    ) -> None:
        self._decode = decode
        self._prefill = prefill or decode
        self._per_cell = per_cell
        self._extra = extra

    def seconds(self, kind: RunKind, rows: int, context: float) -> float:
        """Compute time of a run whose rows attend to ``context`` cells on average."""
        by_rows = self._prefill if kind is RunKind.PREFILL else self._decode
        return by_rows(rows) + rows * context * self._per_cell + self._extra


def linear(constant: float, per_token: float) -> Callable[[int], float]:
    """Time by rows: ``constant + rows * per_token``."""
    return lambda rows: constant + rows * per_token


def table(seconds_by_rows: dict[int, float]) -> Callable[[int], float]:
    """Time by rows: linear between the known numbers of rows, constant before, on beyond but never falling."""
    known = sorted(seconds_by_rows)
    seconds = [seconds_by_rows[rows] for rows in known]

    def time(rows: int) -> float:
        if rows <= known[0] or len(known) == 1:
            return seconds[0]
        right = min(bisect_right(known, rows), len(known) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (known[right] - known[left])
        if rows > known[-1]:
            return seconds[-1] + max(0.0, slope) * (rows - known[-1])
        return seconds[left] + slope * (rows - known[left])

    return time


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What of a model a stage holds, and in which form.

    Attributes:
        layers: how many transformer layers.
        embeds: it holds the token embedding (the first stage).
        predicts: it holds the LM head (the last stage).
        weight_bytes: of one weight, scales of its quantization included.
        kv_bytes: of one element of the KV cache.
        activation_bytes: of one element of the activations that tensor-parallel devices exchange.
    """

    shape: ModelShape
    layers: int
    embeds: bool
    predicts: bool
    weight_bytes: float
    kv_bytes: int = 2
    activation_bytes: int = 2

    def weights(self) -> float:
        """Bytes of all weights; a tied LM head counts only where the embedding lies elsewhere."""
        shape = self.shape
        tables = self.embeds + self.predicts
        if shape.tied and tables == 2:
            tables = 1
        parameters = self.layers * shape.layer_parameters + tables * shape.embedding_parameters
        return (parameters + self.predicts * shape.hidden) * self.weight_bytes

    def kv_cell(self, devices: int = 1) -> float:
        """Bytes of one KV cell in all layers, on that one of ``devices`` tensor-parallel devices that holds most.

        A KV head cannot be divided: devices beyond their number hold copies.
        """
        heads = -(-self.shape.kv_heads // devices)
        return self.layers * self.shape.kv_elements / self.shape.kv_heads * heads * self.kv_bytes

    def memory_bytes(self, kv_cells: int, devices: int = 1) -> float:
        """Weights and KV cells on each of ``devices`` tensor-parallel devices; activations are small and left out."""
        return self.weights() / devices + kv_cells * self.kv_cell(devices)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a stage computes on: ``devices`` equal ones that divide its layers among them.

    Attributes:
        bandwidth: reachable memory bandwidth of one device in bytes per second.
        flops: reachable operations per second of one device.
        overhead: seconds that every run takes on top.
        devices: tensor parallelism.
        link_bandwidth: of a device to its neighbour, bytes per second; infinite for no cost.
        link_latency: of a ring step, seconds.
    """

    bandwidth: float
    flops: float
    overhead: float = 0.0
    devices: int = 1
    link_bandwidth: float = float("inf")
    link_latency: float = 0.0


class Roofline:
    """Time of a run from bytes and operations (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009).

    An operation takes ``max(bytes / bandwidth, operations / flops)``, both as far as they can be reached. With ``r``
    rows that attend to ``s`` cells on average, on ``N`` tensor-parallel devices, a stage's run takes

    * per layer, its matrices: ``max(weight_bytes / bandwidth, 2 r weights / flops) / N``. Weights are read once per
      run, whatever its rows: this is why a micro-batch is cheap where bandwidth is the limit;
    * per layer, attention: ``max(s kv_cell_bytes / bandwidth, 4 r s heads head_dim / N / flops)``, KV heads undivided.
      The rows of a run share their context, whose cells are read once;
    * per layer, for ``N > 1``: two ring all-reduces, after attention and after the MLP, of
      ``2 (N - 1) / N * r hidden activation_bytes / link_bandwidth + 2 (N - 1) link_latency`` each (Patarasuk and Yuan,
      JPDC 69(2), 2009; where: Megatron-LM, arXiv 1909.08053);
    * on the first stage, reading ``r`` rows of the embedding; on the last one, the LM head, a matrix like the others.
      A prefill run predicts its last row alone (real ones only where the prompt ends: this is a little dear);
    * ``overhead``.
    """

    def __init__(self, part: ModelPart, machine: Machine) -> None:
        shape, devices = part.shape, machine.devices
        matrices = part.layers * (shape.layer_parameters - 2 * shape.hidden) / devices
        self._weights = matrices * part.weight_bytes / machine.bandwidth
        self._weights_row = 2 * matrices / machine.flops
        self._cell = part.kv_cell(devices) / machine.bandwidth
        self._cell_row = 4 * part.layers * shape.heads * shape.head_dim / devices / machine.flops
        table = shape.embedding_parameters / devices
        self._head = part.predicts * table * part.weight_bytes / machine.bandwidth
        self._head_row = part.predicts * 2 * table / machine.flops
        steps = 2 * part.layers * 2 * (devices - 1)  # of all all-reduces of a run
        reduced = steps / devices * shape.hidden * part.activation_bytes / machine.link_bandwidth
        embedded = part.embeds * shape.hidden * part.weight_bytes / machine.bandwidth
        self._per_row = reduced + embedded
        self._constant = machine.overhead + steps * machine.link_latency

    def seconds(self, kind: RunKind, rows: int, context: float) -> float:
        """Compute time of a run whose rows attend to ``context`` cells on average."""
        predicted = 1 if kind is RunKind.PREFILL else rows
        return (
            max(self._weights, rows * self._weights_row)
            + context * max(self._cell, rows * self._cell_row)
            + max(self._head, predicted * self._head_row)
            + rows * self._per_row
            + self._constant
        )


def micro_batch_slope(cost: CostModel, rows: int, context: float) -> float:
    """The micro-batch cost slope ``c``: extra time per extra row, relative to a one-row run.

    ``(t(rows) - t(1)) / ((rows - 1) t(1))``: 0 where more rows are free, 1 where two rows cost twice as much as one.
    """
    one = cost.seconds(RunKind.CANONICAL, 1, context)
    return (cost.seconds(RunKind.CANONICAL, rows, context) - one) / ((rows - 1) * one)
