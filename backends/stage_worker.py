"""What a stage does with the frames that reach it. Knows nothing of gRPC."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from backends.compression import to_activation, to_hidden
from backends.control import ConfigureStage
from backends.emulation import EmulatedStage, from_bytes
from backends.frames import (
    Compression,
    Frame,
    FrameError,
    Hop,
    OpenFrame,
    ReleaseFrame,
    ResultFrame,
    RunFrame,
    Session,
    StageStamp,
)
from backends.logs import event
from backends.models.devices import DTYPES, open_device
from backends.models.loading import fingerprint, open_model
from backends.models.stage_model import StageModel
from backends.pacing import StagePace, Wait
from backends.sampling import Sampling
from pipesim.errors import BadInputError
from pipesim.scheduling.runs import Run

_log = logging.getLogger(__name__)


class Layers(Protocol):
    """The part of ``StageModel`` that a worker uses."""

    @property
    def is_last(self) -> bool:
        """Whether it predicts tokens."""

    @property
    def arithmetic(self) -> str:
        """As ``Engine``."""

    def open_session(self, session: int, kv_cells: int, sequences: int, sampling: Sampling) -> None:
        """As ``StageModel``."""

    def close_session(self, session: int) -> None:
        """As ``StageModel``."""

    def admit(self, session: int, run: Run) -> list[int]:
        """As ``StageModel``."""

    def forward(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | list[int] | None:
        """As ``StageModel``."""


def load_layers(order: ConfigureStage, device: str = "cpu") -> StageModel:
    """Reads the layers that a stage was told to serve, on ``device`` unless it was told another.

    Raises:
        BadInputError: the model has no such layers, or the device is none of this machine's.
    """
    place = open_device(order.device or device, order.dtype)
    source = open_model(order.model)
    if fingerprint(source) != order.fingerprint:
        raise BadInputError(f"{source.path} holds other weights than the head's model: give both the same files")
    layers = order.first_layer, order.last_layer
    return StageModel(
        source, *layers, dtype=DTYPES[order.dtype], threads=order.threads, device=place, kernels=order.kernels
    )


@dataclass(slots=True)
class _Course:
    """How far an open session has come on this stage: ``last_run`` is done, or ``computing`` at this moment."""

    session: Session
    last_run: int = -1
    computing: bool = False


class StageWorker:
    """Turns each arriving frame into the frame that leaves. Sessions know nothing of each other.

    ``checkpoint`` is called between layers; it may come back with calls of :meth:`cancel` and :meth:`abandon`.
    ``emulated``, with ``pause``, keeps sessions that want it to the pace of another machine. ``compression`` is that of
    all activations that come and go.
    """

    def __init__(
        self,
        stage: int,
        layers: Layers,
        checkpoint: Callable[[], None],
        pause: Wait | None = None,
        emulated: bytes | None = None,
        compression: Compression = "none",
    ) -> None:
        self.last_run = -1
        self._stage = stage
        self._layers = layers
        self._checkpoint = checkpoint
        self._compression: Compression = compression
        self._open: dict[int, _Course] = {}
        self._cancelled: dict[int, set[tuple[int, int]]] = {}  # session number -> its (epoch, run id)
        self._abandoned = False
        self._closed = -1  # the newest session that is over
        self._pause = pause
        self._emulated = from_bytes(EmulatedStage, emulated) if emulated else None
        self._paces: dict[int, StagePace] = {}  # by session

    def cancel(self, session: int, epoch: int, run_ids: Sequence[int], hop: Hop | None = None) -> None:
        """Declares runs dead, whether they have arrived yet or not; one that has passed is left alone.

        The head's word may overtake the session's first frame. In an emulated cluster it counts from the end of ``hop``
        on.
        """
        if hop is not None:
            if pace := self._paces.get(session):
                pace.cancel(run_ids, hop)
            return
        course = self._open.get(session)
        if course is None and session <= self._closed:
            return
        is_open = course is not None and course.session.epoch == epoch
        next_run = course.last_run + (not course.computing) if course and is_open else 0
        dead = self._cancelled.setdefault(session, set())
        dead.update((epoch, run_id) for run_id in run_ids if run_id >= next_run)

    def abandon(self) -> None:
        """Nobody waits for any run any more, up to the next :meth:`close`."""
        self._abandoned = True

    def close(self) -> None:
        """Closes what sessions are left, so that the layers can serve another epoch, or another head."""
        for number in list(self._open):
            self._close(number)
        self._cancelled.clear()
        self._abandoned = False

    def handle(self, frame: Frame, received_bytes: int, received: float = 0.0) -> Frame:
        """Carries out one frame and returns what goes on to the successor, or home from the last stage.

        It was here at ``received``, on our clock; only an emulated stage needs to know that.

        Raises:
            FrameError: the frame does not fit what came before it (I2).
            PipesimError: the layers refuse it.
        """
        match frame:
            case OpenFrame(session, kv_cells, sequences, sampling, origins):
                if session.number in self._open:  # a new epoch begins with empty cells
                    self._close(session.number)
                self._layers.open_session(session.number, kv_cells, sequences, sampling)
                self._open[session.number] = _Course(session)
                if origins and self._emulated:  # links and times go on over a new epoch
                    self._paces.setdefault(session.number, StagePace(self._emulated, origins[self._stage]))
                self.last_run = -1
                event(_log, logging.INFO, "session opened", session=session.number, epoch=session.epoch)
                return frame
            case ReleaseFrame(session):
                self._expect(session)
                self._close(session.number)
                self._paces.pop(session.number, None)
                self._closed = max(self._closed, session.number)
                return frame
            case RunFrame():
                return self._run(frame, received_bytes, received)
            case ResultFrame():
                raise FrameError(f"run {frame.run_id}: a result came down the pipeline, only runs may")

    def _close(self, number: int) -> None:
        self._layers.close_session(number)
        del self._open[number]
        self._cancelled.pop(number, None)

    def _expect(self, session: Session) -> _Course:
        course = self._open.get(session.number)
        if course is None or course.session != session:
            raise FrameError(f"session {session.number} epoch {session.epoch} is not open on stage {self._stage}")
        return course

    def _run(self, frame: RunFrame, received_bytes: int, received: float) -> Frame:
        start = time.monotonic()
        run, session = frame.run, frame.session
        course = self._expect(session)
        if run.run_id <= course.last_run:
            raise FrameError(f"run {run.run_id} reached stage {self._stage} after run {course.last_run} (I2)")
        self.last_run = course.last_run = run.run_id
        course.computing = True
        key = (session.epoch, run.run_id)
        cancelled = self._cancelled.setdefault(session.number, set())

        pace = self._paces.get(session.number) if frame.hops else None
        if pace:
            pace.begin(frame, received)

        def should_stop() -> bool:
            self._checkpoint()
            return self._abandoned or (pace.is_dead() if pace else key in cancelled)

        cells = self._layers.admit(session.number, run)
        output = None
        if not frame.void and not should_stop():
            output = self._layers.forward(session.number, run, self._hidden(frame), cells, should_stop)
        end, hops = time.monotonic(), frame.hops
        if pace and self._pause:
            predictions = len(output) if isinstance(output, list) else 0
            start, end, dead, hops = pace.leave(predictions, self._pause, lambda: self._abandoned)
            output = None if dead else output
        course.computing = False
        cancelled.discard(key)
        void = output is None
        stamps = (*frame.stamps, StageStamp(self._stage, start, end, void, received_bytes))
        event(
            *(_log, logging.DEBUG, "run computed"),
            session=session.number,
            epoch=session.epoch,
            run=run.run_id,
            rows=run.rows,
            void=void,
            ms=1e3 * (end - start),
        )
        if self._layers.is_last:
            if isinstance(output, torch.Tensor):
                raise FrameError(f"run {run.run_id}: the last stage computed activations instead of tokens")
            return ResultFrame(session, run.run_id, None if output is None else tuple(output), stamps, hops)
        activation = to_activation(output, self._compression) if isinstance(output, torch.Tensor) else None
        return RunFrame(session, run, activation, void, stamps, hops)

    def _hidden(self, frame: RunFrame) -> torch.Tensor | None:
        if frame.activation is None:
            return None
        if frame.activation.compression != self._compression:
            raise FrameError(
                f"run {frame.run.run_id}: activation_compression is {frame.activation.compression} on the way to stage "
                f"{self._stage}, which was told {self._compression}"
            )
        return to_hidden(frame.activation)
