"""The engine made of PyTorch's own operations, exact by row tiles (see ``exact.py``)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from backends.models.compiled import compiled_layer
from backends.models.decoder import KvCache, LayerForward, forward_layer, plan_run, run_layers
from backends.models.devices import Device
from backends.models.engine import Part
from backends.models.exact import choose_tiling, float_product, joined, pad_rows
from backends.models.loading import ModelSource
from backends.models.products import Matrix, lay_out
from backends.models.rowwise import rms_norm
from backends.models.steps import FixedRuns, agreeing_steps
from backends.models.weights import Weight, WeightReader
from pipesim.errors import InvariantError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run


class TorchEngine:
    """Implements ``Engine``. ``tiling`` reports which row tiles the start-up check found to be exact here.

    ``dtype`` is the type of the matrices; norms and attention stay float32. With bfloat16, hidden states are rounded to
    it after every layer, so that it makes no difference where a stage ends. All lie on ``device``; where that wants
    fixed shapes, the layers are computed in the steps of ``steps.py``. ``compiles``: see ``compiled.py``.
    """

    def __init__(
        self, source: ModelSource, part: Part, dtype: torch.dtype, device: Device, compiles: bool = False
    ) -> None:
        config, place = part.config, device.place
        self.device, self._compiles = device, compiles
        self.tiling = choose_tiling(config, dtype, place)
        self._layer_forward: LayerForward = forward_layer
        if compiles:
            self.tiling, self._layer_forward = compiled_layer(self.tiling, config, dtype, device)
        elif device.fixed_shapes:
            self.tiling = agreeing_steps(self.tiling, config, dtype, device)
        self._idle: FixedRuns | None = None
        self._config, self._dtype = config, dtype
        self.hidden_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        read = WeightReader(source, dtype, self._lay_out, place)
        self.layers = [read.layer(index) for index in part.kept]
        self._embedding = self._norm = None
        self.head: Matrix | None = None
        if part.is_first or (part.is_last and config.tied):
            embedding = read.embedding()
            assert isinstance(embedding, torch.Tensor)
            self._embedding = embedding if part.is_first else None
        if part.is_last:
            self._norm = read.vector("model.norm.weight", config.hidden)
            self.head = self._lay_out(embedding if config.tied else read.head())

    @property
    def arithmetic(self) -> str:
        """As in ``Engine``."""
        name = "torch.compile" if self._compiles else "torch"
        return f"{name} {torch.__version__}, {self.device}, {str(self._dtype).removeprefix('torch.')}, {self.tiling}"

    @property
    def parameters(self) -> int:
        """As in ``Engine``."""
        embedding = None if self._config.tied and self.head is not None else self._embedding
        parts = [getattr(layer, name) for layer in self.layers for name in layer.__dataclass_fields__]
        parts += [embedding, self._norm, self.head]
        return sum(part.numel() for part in parts if isinstance(part, torch.Tensor | Matrix))

    def _lay_out(self, weight: Weight) -> Matrix:
        assert isinstance(weight, torch.Tensor)
        return lay_out(weight, self.tiling.kernel)

    def open_cache(self, cells: int) -> KvCache | FixedRuns:
        """As in ``Engine``; fixed shapes that were recorded for as large a cache are used again."""
        if self.device.fixed_shapes:
            idle, self._idle = self._idle, None
            if idle is not None and idle.cells == cells:
                return idle
            return FixedRuns(self.layers, self._config, cells, self.tiling, self.device, self._layer_forward)
        return KvCache(self._config, [layer.kind for layer in self.layers], cells)

    def close_cache(self, cache: KvCache | FixedRuns) -> None:
        """As in ``Engine``."""
        self._idle = cache if isinstance(cache, FixedRuns) else None

    @torch.inference_mode()
    def hidden_states(
        self,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        table: CellTable,
        cache: KvCache | FixedRuns,
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | None:
        """As in ``Engine``."""
        rows = self._enter(run, hidden)
        if isinstance(cache, FixedRuns):
            states = cache.forward(rows, run, cells, table, should_stop)
        else:
            plan = plan_run(run, cells, table, cache, self.tiling)
            states = run_layers(
                pad_rows(rows, plan.padded), self.layers, self._config, plan, cache, should_stop, self._layer_forward
            )
        return None if states is None else states[: run.rows].to(self.hidden_dtype)

    def _enter(self, run: Run, hidden: torch.Tensor | None) -> torch.Tensor:
        """The rows that go into the first layer, ``[rows, hidden]``."""
        if self._embedding is not None:
            tokens = self.device.send(torch.tensor(run.tokens)).arrived()
            return F.embedding(tokens, self._embedding).float() * self._config.embedding_scale
        if hidden is None:
            raise InvariantError("a stage without the embedding was given no hidden states")
        return self.device.send(hidden).arrived().float()

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As in ``Engine``."""
        if self.head is None or self._norm is None:
            raise InvariantError("logits were asked of a stage without the LM head")
        padded, bounds = self.tiling.split(len(hidden))
        normed = rms_norm(pad_rows(hidden.float(), padded), self._norm, self._config.norm_eps)
        return joined([float_product(normed[start:stop], self.head) for start, stop in bounds])[: len(hidden)]
