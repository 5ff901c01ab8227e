"""The engine made of the kernels: one call per layer."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backends.models.config import LayerKind, ModelConfig
from backends.models.decoder import rotary_frequencies
from backends.models.engine import Part
from backends.models.loading import ModelSource
from backends.models.native import library
from backends.models.native.weights import Arena, PackedMatrix, wide
from backends.models.weights import LayerWeights, Weight, WeightReader
from pipesim.errors import InvariantError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run

_LANES = 16  # cells per block of keys


class NativeCache:
    """Keys and values of one session, float32: keys lie in blocks of 16 cells, one dimension after the other."""

    def __init__(self, config: ModelConfig, kinds: Sequence[LayerKind], cells: int) -> None:
        cells = -(-cells // _LANES) * _LANES
        blocks, width = cells // _LANES, -(-config.head_dim // 16) * 16
        self.keys = np.empty((len(kinds), config.kv_heads, blocks, config.head_dim, _LANES), np.float32)
        self.values = np.empty((len(kinds), config.kv_heads, cells, width), np.float32)
        self.keys.fill(0)  # touched now: memory does not grow with the text
        self.values.fill(0)
        self.layers = [
            library.Cells(keys.ctypes.data, values.ctypes.data, cells)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        self.marks = np.zeros(blocks, np.uint8)
        self.looks = {kind: _LookBuffers(config, kind, blocks) for kind in dict.fromkeys(kinds)}


class _LookBuffers:
    """What the kernels write of a run into a look, kept from run to run."""

    def __init__(self, config: ModelConfig, kind: LayerKind, blocks: int) -> None:
        self._half = config.head_dim // 2
        self._blocks = np.empty(blocks, np.int32)
        self._frequencies = rotary_frequencies(kind, config.head_dim).numpy()
        self._turns = np.empty((2, 0, self._half), np.float32)
        self.struct = library.Look(
            window=kind.window, blocks=self._blocks.ctypes.data, frequencies=self._frequencies.ctypes.data
        )

    def for_rows(self, rows: int) -> library.Look:
        """The look, with room for ``rows`` rows."""
        if self._turns.shape[1] < rows:
            self._turns = np.empty((2, rows, self._half), np.float32)
            self.struct.cosines, self.struct.sines = (part.ctypes.data for part in self._turns)
        return self.struct


@dataclass(frozen=True, slots=True)
class _Plan:
    """A run as the kernels want it; ``arrays`` are what the structure points to."""

    rows: library.Rows
    arrays: tuple[npt.NDArray[np.int32], ...]


def _plan(run: Run, cells: Sequence[int], table: CellTable) -> _Plan:
    prefix = np.array(table.shared_prefix(), np.int32)
    ends, tails = [], []
    own: dict[int, list[int]] = {}  # a branch's cells after the prefix, of its farthest row
    farthest: dict[int, int] = {}
    for position, sequences in zip(run.positions, run.sequences, strict=True):
        farthest[sequences] = max(position, farthest.get(sequences, 0))
    for position, sequences in zip(run.positions, run.sequences, strict=True):
        if position >= len(prefix):
            if sequences not in own:
                own[sequences] = table.visible(farthest[sequences], sequences, len(prefix))
            tails += own[sequences][: position + 1 - len(prefix)]
        ends.append(len(tails))
    arrays = tuple(np.array(part, np.int32) for part in (run.positions, cells, prefix, tails, ends))
    return _Plan(library.Rows(run.rows, len(prefix), *(array.ctypes.data for array in arrays)), arrays)


class NativeEngine:
    """Implements ``Engine``. Matrices are float32, bfloat16, or the blocks of a GGUF file; attention is float32.

    Rows need no tiles: each is computed in an order of its own, however many there are.

    Raises:
        BadInputError: the kernels cannot be had here (see ``library.load``), or a weight is missing.
    """

    def __init__(self, source: ModelSource, part: Part, dtype: torch.dtype | str, threads: int) -> None:
        self._kernels = library.load()
        config = part.config
        self._config, self._dtype = config, str(dtype).removeprefix("torch.")
        self.hidden_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._arena = Arena()
        read = WeightReader(source, dtype, self._matrix)
        self._vectors: list[npt.NDArray[np.float32]] = []
        self._kinds = [config.kinds[index] for index in part.kept]
        self.parameters = 0
        self.matrices: list[PackedMatrix] = []
        self._layers = [self._pack_layer(read.layer(index)) for index in part.kept]
        self._embedding = self._head = None
        self._norm: int | None = None
        if part.is_first or (part.is_last and config.tied):
            embedding = self._matrix(read.embedding())
            self._embedding = embedding if part.is_first else None
        if part.is_last:
            self._norm = self._vector(read.vector("model.norm.weight", config.hidden))
            self._head = embedding if config.tied else self._matrix(read.head())
        self._settings = library.Config(
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate,
            gelu=config.family.activation == "gelu_tanh",
            round_hidden=self.hidden_dtype == torch.bfloat16,
            threads=threads if self._kernels.pipesim_has_threads() else 1,
            norm_eps=config.norm_eps,
            query_scale=config.query_scale,
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of all matrices."""
        return self._arena.used

    @property
    def arithmetic(self) -> str:
        """As in ``Engine``."""
        return f"native kernels {library.VERSION}, {self._dtype}, {self._kernels.pipesim_variant().decode()}"

    def open_cache(self, cells: int) -> NativeCache:
        """As in ``Engine``."""
        return NativeCache(self._config, self._kinds, cells)

    def close_cache(self, cache: NativeCache) -> None:
        """As in ``Engine``."""

    def hidden_states(
        self,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        table: CellTable,
        cache: NativeCache,
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | None:
        """As in ``Engine``."""
        states = self._enter(run, hidden)
        plan = _plan(run, cells, table)
        settings, rows, at = ctypes.addressof(self._settings), ctypes.addressof(plan.rows), states.ctypes.data
        looks = {}
        for kind, buffers in cache.looks.items():
            looks[kind] = ctypes.addressof(buffers.for_rows(run.rows))
            self._kernels.pipesim_look(settings, rows, looks[kind], cache.marks.ctypes.data)
        compute = self._kernels.pipesim_layer
        for layer, kind, layer_cells in zip(self._layers, self._kinds, cache.layers, strict=True):
            if should_stop():
                return None
            compute(settings, ctypes.addressof(layer), rows, looks[kind], ctypes.addressof(layer_cells), at)
        return torch.from_numpy(states)[:, : self._config.hidden].to(self.hidden_dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As in ``Engine``."""
        if self._head is None:
            raise InvariantError("logits were asked of a stage without the LM head")
        states = self._padded(hidden)
        logits = np.empty((len(states), wide(self._config.vocabulary)), np.float32)
        settings = ctypes.addressof(self._settings)
        self._kernels.pipesim_head(
            settings, self._head.address, self._norm, states.ctypes.data, len(states), logits.ctypes.data
        )
        return torch.from_numpy(logits)[:, : self._config.vocabulary]

    def _enter(self, run: Run, hidden: torch.Tensor | None) -> npt.NDArray[np.float32]:
        if self._embedding is None:
            if hidden is None:
                raise InvariantError("a stage without the embedding was given no hidden states")
            return self._padded(hidden)
        states = np.empty((run.rows, wide(self._config.hidden)), np.float32)
        tokens = np.array(run.tokens, np.int32)
        scale = self._config.embedding_scale
        self._kernels.pipesim_embed(self._embedding.address, tokens.ctypes.data, run.rows, scale, states.ctypes.data)
        return states

    def _padded(self, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
        states = np.zeros((len(hidden), wide(self._config.hidden)), np.float32)
        states[:, : self._config.hidden] = hidden.float().numpy()
        return states

    def _matrix(self, weight: Weight) -> PackedMatrix:
        packed = PackedMatrix(weight, self._arena)
        self.matrices.append(packed)
        self.parameters += packed.parameters
        return packed

    def _vector(self, vector: torch.Tensor | None) -> int | None:
        """Its address, with zeros up to its padded width."""
        if vector is None:
            return None
        flat = vector.float().flatten().numpy()
        kept = np.zeros(wide(len(flat)), np.float32)
        kept[: len(flat)] = flat
        self._vectors.append(kept)
        self.parameters += len(flat)
        return int(kept.ctypes.data)

    def _pack_layer(self, weights: LayerWeights[PackedMatrix]) -> library.Layer:
        matrices = (one.struct for one in (weights.qkv, weights.output, weights.gate_up, weights.down))
        vectors = (
            weights.attention_norm,
            weights.qkv_bias,
            weights.qk_norm,
            weights.post_attention_norm,
            weights.mlp_norm,
            weights.post_mlp_norm,
        )
        return library.Layer(*matrices, *map(self._vector, vectors))
