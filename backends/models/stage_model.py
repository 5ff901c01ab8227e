"""The part of a model that one stage drives: its layers, its sessions' KV cells, and on the last stage the LM head."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from backends.models.decoder import KvCache, plan_run, read_layer, read_weight, run_layers
from backends.models.exact import choose_tiling, pad_rows, tiled_linear
from backends.models.huge_pages import mapped, use_huge_pages
from backends.models.loading import ModelSource
from backends.models.products import Matrix, lay_out
from backends.models.rowwise import rms_norm
from backends.sampling import History, Sampling
from pipesim.errors import BadInputError, InvariantError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run

_WORTH_HUGE_PAGES = 64e6  # bytes of weights; fewer stay in a cache


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Session:
    """One generation on this stage. ``tokens`` holds the token of each KV cell."""

    table: CellTable
    cache: KvCache
    sampling: Sampling
    tokens: npt.NDArray[np.int64]

    def histories(self, run: Run) -> list[npt.NDArray[np.int64]]:
        """For each output row of ``run``, which was admitted last, its text from position 0 to itself."""
        prefix = self.table.shared_prefix()
        shared = self.tokens[prefix]
        found = []
        for position, sequences in list(zip(run.positions, run.sequences, strict=True))[run.first_output_row :]:
            own = self.table.visible(position, sequences, len(prefix))
            found.append(np.concatenate((shared[: position + 1], self.tokens[own])))
        return found


class StageModel:
    """Layers ``[first_layer, last_layer)`` of a model, read and kept alone; with the embedding on the first stage, the
    final norm and the LM head on the last.

    ``dtype`` is the type of the matrices; norms, attention and the hidden states between layers and stages stay
    float32. ``threads`` sets PyTorch's threads for the whole process. ``skipped`` layers are left out (a self-draft).
    ``tiling`` reports which row tiles the start-up check found to be exact here.

    Raises:
        BadInputError: the model has no such layers, or a weight is missing or of a wrong shape.
    """

    def __init__(
        self,
        source: ModelSource,
        first_layer: int,
        last_layer: int,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        skipped: Collection[int] = (),
    ) -> None:
        config = source.config
        if not 0 <= first_layer < last_layer <= config.layers:
            raise BadInputError(
                f"stage layers [{first_layer}, {last_layer}) do not exist: "
                f"{source.path} has layers [0, {config.layers})"
            )
        kept = [index for index in range(first_layer, last_layer) if index not in skipped]
        if len(kept) + len(set(skipped)) != last_layer - first_layer or not kept:
            raise BadInputError(
                f"skipped layers {sorted(skipped)} must lie within [{first_layer}, {last_layer}) and leave one layer"
            )
        torch.set_num_threads(threads)
        self.config = config
        self.is_first = first_layer == 0
        self.is_last = last_layer == config.layers
        self.tiling = choose_tiling(config, dtype)
        shared = mapped()
        self._layers = [read_layer(source, index, dtype, self.tiling.kernel) for index in kept]
        table = (config.vocabulary, config.hidden)
        self._embedding = self._norm = None
        self._head: Matrix | None = None
        if self.is_first or (self.is_last and config.tied):
            embedding = read_weight(source, "model.embed_tokens.weight", table, dtype)
            self._embedding = embedding if self.is_first else None
        if self.is_last:
            self._norm = read_weight(source, "model.norm.weight", (config.hidden,), torch.float32)
            head = embedding if config.tied else read_weight(source, "lm_head.weight", table, dtype)
            self._head = lay_out(head, self.tiling.kernel)
        if self.parameters * dtype.itemsize >= _WORTH_HUGE_PAGES:
            use_huge_pages(besides=shared)
        self._sessions: dict[int, Session] = {}

    @property
    def parameters(self) -> int:
        """Weights kept by this stage; a tied embedding counts once, though its LM head may be a copy."""
        embedding = None if self.config.tied and self._head is not None else self._embedding
        others = (embedding, self._norm, self._head)
        return sum(layer.parameters for layer in self._layers) + sum(one.numel() for one in others if one is not None)

    def open_session(self, session: int, kv_cells: int, sequences: int, sampling: Sampling) -> None:
        """Reserves ``kv_cells`` KV cells for up to ``sequences`` sequences; their positions stay under ``kv_cells``."""
        if session in self._sessions:
            raise BadInputError(f"session {session} is already open")
        if kv_cells < 1 or sequences < 1:
            raise BadInputError(f"kv_cells {kv_cells} and sequences {sequences} must be at least 1")
        cache = KvCache(self.config, [layer.kind for layer in self._layers], kv_cells)
        tokens = np.zeros(kv_cells, np.int64)
        self._sessions[session] = Session(CellTable(kv_cells, sequences), cache, sampling, tokens)

    def close_session(self, session: int) -> None:
        """Forgets the session and its KV cells."""
        self._session(session)
        del self._sessions[session]

    def admit(self, session: int, run: Run) -> list[int]:
        """Applies the run's KV operations and takes its cells, one per row; for void frames, too.

        Call :meth:`forward` for a live run before the next run is admitted.
        """
        held = self._session(session)
        cells = held.table.admit(run)
        held.tokens[cells] = run.tokens
        return cells

    def forward(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool] = _never,
    ) -> torch.Tensor | list[int] | None:
        """Computes the admitted ``run``: hidden states ``[rows, hidden]``, or on the last stage the predicted tokens.

        ``hidden`` is what the previous stage returned, None on the first stage. Only the run's output rows are
        predicted. Returns None as soon as ``should_stop()``, asked before every layer, is true.
        """
        if not self.is_last:
            return self._hidden_states(session, run, hidden, cells, should_stop)
        logits = self.logits(session, run, hidden, cells, should_stop)
        if logits is None:
            return None
        held = self._session(session)
        positions = run.positions[run.first_output_row :]
        histories: Sequence[History] = held.histories(run) if held.sampling.needs_history else [()] * run.outputs
        rows = zip(logits.numpy(), positions, histories, strict=True)
        return [held.sampling.pick(row, at + 1, history) for row, at, history in rows]

    @torch.inference_mode()
    def logits(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool] = _never,
    ) -> torch.Tensor | None:
        """As :meth:`forward` on the last stage, but the logits ``[outputs, vocabulary]`` themselves."""
        if self._head is None or self._norm is None:
            raise InvariantError("logits were asked of a stage without the LM head")
        states = self._hidden_states(session, run, hidden, cells, should_stop)
        if states is None:
            return None
        outputs = states[run.first_output_row :]
        if not run.outputs:
            return outputs.new_empty(0, self.config.vocabulary)
        padded, bounds = self.tiling.split(run.outputs)
        normed = rms_norm(pad_rows(outputs, padded), self._norm, self.config.norm_eps)
        return tiled_linear(normed, self._head, bounds)[: run.outputs]

    @torch.inference_mode()
    def _hidden_states(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | None:
        if should_stop():
            return None
        held = self._session(session)
        plan = plan_run(run, cells, held.table, held.cache, self.tiling)
        rows = pad_rows(self._enter(run, hidden), plan.padded)
        states = run_layers(rows, self._layers, self.config, plan, held.cache, should_stop)
        return None if states is None else states[: run.rows]

    def _enter(self, run: Run, hidden: torch.Tensor | None) -> torch.Tensor:
        """The rows that go into this stage's first layer, float32 ``[rows, hidden]``."""
        if self._embedding is not None:
            if not 0 <= min(run.tokens) <= max(run.tokens) < self.config.vocabulary:
                raise BadInputError(f"run {run.run_id}: a token is outside the vocabulary of {self.config.vocabulary}")
            return F.embedding(torch.tensor(run.tokens), self._embedding).float() * self.config.embedding_scale
        expected = (run.rows, self.config.hidden)
        if hidden is None or tuple(hidden.shape) != expected or hidden.dtype != torch.float32:
            got = "none" if hidden is None else f"{hidden.dtype} {list(hidden.shape)}"
            raise BadInputError(
                f"run {run.run_id}: hidden states must be float32 {list(expected)}, got {got}: "
                "do all stages serve the same model?"
            )
        return hidden

    def _session(self, session: int) -> Session:
        if session not in self._sessions:
            raise InvariantError(f"session {session} is not open on this stage")
        return self._sessions[session]
