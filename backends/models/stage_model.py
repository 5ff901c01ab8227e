"""The part of a model that one stage drives: its layers, its sessions' KV cells, and on the last stage the LM head."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backends.models.devices import Device
from backends.models.engine import Engine, Part
from backends.models.engines import make_engine
from backends.models.loading import ModelSource
from backends.sampling import History, Sampling
from pipesim.errors import BadInputError, InvariantError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Session:
    """One generation on this stage. ``tokens`` holds the token of each KV cell, ``cache`` is the engine's."""

    table: CellTable
    cache: Any
    sampling: Sampling
    tokens: npt.NDArray[np.int64]

    def histories(self, run: Run) -> list[npt.NDArray[np.int64]]:
        """For each output row of ``run``, which was admitted last, its text from position 0 to itself."""
        prefix = self.table.shared_prefix()
        shared = self.tokens[np.array(prefix)]
        found = []
        for position, sequences in list(zip(run.positions, run.sequences, strict=True))[run.first_output_row :]:
            own = self.table.visible(position, sequences, len(prefix))
            found.append(np.concatenate((shared[: position + 1], self.tokens[own])))
        return found


class StageModel:
    """Layers ``[first_layer, last_layer)`` of a model, read and kept alone; with the embedding on the first stage, the
    final norm and the LM head on the last.

    ``dtype`` is the type of the matrices, or ``quantized``: as the GGUF file has them. ``threads`` sets PyTorch's
    threads for the whole process, too. ``skipped`` layers are left out (a self-draft). ``engine`` computes, on
    ``device``; which one that is, ``kernels`` says (see ``engines.py``). Tensors come and go in the host's memory.

    Raises:
        BadInputError: the model has no such layers, a weight is missing or of a wrong shape, or ``dtype`` or
            ``kernels`` cannot be had, or nothing is exact on the device.
    """

    def __init__(
        self,
        source: ModelSource,
        first_layer: int,
        last_layer: int,
        dtype: torch.dtype | str = torch.float32,
        threads: int = 1,
        skipped: Collection[int] = (),
        device: Device | None = None,
        kernels: str = "auto",
    ) -> None:
        part = Part.of(source.config, first_layer, last_layer, tuple(skipped), source.path)
        torch.set_num_threads(threads)
        self.config = source.config
        self.is_first, self.is_last = part.is_first, part.is_last
        self._device = device or Device()
        self._dtype = str(dtype).removeprefix("torch.")
        self.engine: Engine[Any] = make_engine(source, part, dtype, threads, self._device, kernels)
        self._sessions: dict[int, Session] = {}

    @property
    def parameters(self) -> int:
        """Weights kept by this stage; a tied embedding counts once, though its LM head may be a copy."""
        return self.engine.parameters

    @property
    def arithmetic(self) -> str:
        """As ``Engine``."""
        return self.engine.arithmetic

    def open_session(self, session: int, kv_cells: int, sequences: int, sampling: Sampling) -> None:
        """Reserves ``kv_cells`` KV cells for up to ``sequences`` sequences; their positions stay under ``kv_cells``."""
        if session in self._sessions:
            raise BadInputError(f"session {session} is already open")
        if kv_cells < 1 or sequences < 1:
            raise BadInputError(f"kv_cells {kv_cells} and sequences {sequences} must be at least 1")
        tokens = np.zeros(kv_cells, np.int64)
        cache = self.engine.open_cache(kv_cells)
        self._sessions[session] = Session(CellTable(kv_cells, sequences), cache, sampling, tokens)

    def close_session(self, session: int) -> None:
        """Forgets the session and its KV cells."""
        self.engine.close_cache(self._session(session).cache)
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
        predicted. Returns None as soon as ``should_stop()``, asked before every layer or tile, is true.

        Raises:
            BadInputError: the logits are not finite.
        """
        if not self.is_last:
            states = self._hidden_states(session, run, hidden, cells, should_stop)
            return None if states is None else self._device.fetch(states)
        logits = self._logits(session, run, hidden, cells, should_stop)
        if logits is None:
            return None
        held = self._session(session)
        if held.sampling.is_greedy:  # ids travel home, not logits; argmax takes the lowest id, too
            ids: list[int] = logits.argmax(-1).tolist()
            return ids
        logits = self._device.fetch(logits)
        positions = run.positions[run.first_output_row :]
        histories: Sequence[History] = held.histories(run) if held.sampling.needs_history else [()] * run.outputs
        rows = zip(logits.numpy(), positions, histories, strict=True)
        return [held.sampling.pick(row, at + 1, history) for row, at, history in rows]

    def logits(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool] = _never,
    ) -> torch.Tensor | None:
        """As :meth:`forward` on the last stage, but the logits ``[outputs, vocabulary]`` themselves."""
        logits = self._logits(session, run, hidden, cells, should_stop)
        return None if logits is None else self._device.fetch(logits)

    def _logits(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | None:
        """The logits, on the device."""
        if not self.is_last:
            raise InvariantError("logits were asked of a stage without the LM head")
        states = self._hidden_states(session, run, hidden, cells, should_stop)
        if states is None:
            return None
        if not run.outputs:
            return torch.empty(0, self.config.vocabulary)
        logits = self.engine.logits(states[run.first_output_row :])
        if not logits.amax(-1).isfinite().all():  # an infinity or a NaN anywhere before shows here
            raise BadInputError(
                f"run {run.run_id}: logits are not finite: the model's numbers overflow execution.dtype {self._dtype}, "
                "use float32 or bfloat16, or its weights are damaged"
            )
        return logits

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
        self._check_input(run, hidden)
        return self.engine.hidden_states(run, hidden, cells, held.table, held.cache, should_stop)

    def _check_input(self, run: Run, hidden: torch.Tensor | None) -> None:
        if self.is_first:
            if not 0 <= min(run.tokens) <= max(run.tokens) < self.config.vocabulary:
                raise BadInputError(f"run {run.run_id}: a token is outside the vocabulary of {self.config.vocabulary}")
            return
        expected, dtype = (run.rows, self.config.hidden), self.engine.hidden_dtype
        if hidden is None or tuple(hidden.shape) != expected or hidden.dtype != dtype:
            got = "none" if hidden is None else f"{hidden.dtype} {list(hidden.shape)}"
            raise BadInputError(
                f"run {run.run_id}: hidden states must be {dtype} {list(expected)}, got {got}: "
                "do all stages serve the same model?".replace("torch.", "")
            )

    def _session(self, session: int) -> Session:
        if session not in self._sessions:
            raise InvariantError(f"session {session} is not open on this stage")
        return self._sessions[session]
