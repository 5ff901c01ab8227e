"""The sans-IO scheduler: events in, commands out. No clock, no randomness, no I/O, no look into the future.

What every policy shares is here: prefill, the FIFO of runs in flight, verification, commit, the end of a generation,
and recovery from a lost stage. A policy adds only its decision (``policy.py``). Same events at the same times give
equal commands (I9).
"""

from collections import deque
from dataclasses import dataclass

from pipesim.errors import BadInputError, InvariantError
from pipesim.scheduling.commands import (
    Command,
    EmitTokens,
    EndRun,
    FinishGeneration,
    FinishReason,
    Outcome,
    ReleaseSession,
)
from pipesim.scheduling.events import (
    DraftReturned,
    Event,
    GenerationAborted,
    GenerationStarted,
    PipelineRestored,
    RunReturned,
    StageLost,
    StopStringMet,
)
from pipesim.scheduling.generation import Generation
from pipesim.scheduling.partitions import CANONICAL
from pipesim.scheduling.policy import Policy
from pipesim.scheduling.runs import END, RunKind, SequenceRemove
from pipesim.scheduling.speculation import InFlightRun


@dataclass(slots=True)
class Statistics:
    """Counts of drafted tokens: acceptance rate = accepted / verified.

    A drafted token is *verified* when the text at its position becomes known and its parent is text; what hangs below
    a contradicted token is never verified.
    """

    drafted_verified: int = 0
    drafted_accepted: int = 0


class Scheduler:
    """Drives one generation through a pipeline.

    Args:
        policy: decides what to run beside what every policy must.
        kv_cells: KV cells of every stage; by default the text's plus what the policy's look-ahead can use.
        prefill_chunk: rows of a prefill run; chunks start at multiples of it.
        prefill_window: prefill runs in flight at once.
    """

    def __init__(
        self, policy: Policy, kv_cells: int | None = None, prefill_chunk: int = 64, prefill_window: int = 8
    ) -> None:
        for field, value in (
            ("kv_cells", kv_cells),
            ("prefill_chunk", prefill_chunk),
            ("prefill_window", prefill_window),
        ):
            if value is not None and value < 1:
                raise BadInputError(f"{field}: {value} is out of range, use a value of at least 1")
        self.policy = policy
        self.statistics = Statistics()
        self.finished = False
        self.released = False
        self._kv_cells = kv_cells
        self.prefill_chunk = prefill_chunk
        self.prefill_window = prefill_window
        self._prefill: deque[tuple[RunKind, int, int]] = deque()
        self._prefilling = True  # until the end of the known text came home, the policy has nothing to decide
        self._delivered = 0  # positions of which a run came home
        self._suspended = False
        self._now = float("-inf")
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        """The generation under way. Raises InvariantError before it started."""
        if self._generation is None:
            raise InvariantError("the first event of a scheduler must be GenerationStarted")
        return self._generation

    @property
    def kv_cells(self) -> int:
        """Cells that every stage must provide, known once the generation started."""
        return self.generation.cells.total

    @property
    def sequences(self) -> int:
        """Sequence ids in use, known once the generation started."""
        return self.generation.partitions.sequences

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event at time ``now`` (seconds on any clock) and says what to do, in order.

        Raises:
            BadInputError: the generation cannot be started as asked.
            InvariantError: the event contradicts what the scheduler knows: a defect of a stage, a driver or a policy.
        """
        if not now >= self._now:  # a clock that is not a number has not moved on, either
            raise InvariantError(f"the clock ran back from {self._now} to {now}")
        self._now = now
        match event:
            case GenerationStarted():
                self._start(event)
            case RunReturned():
                self._run_returned(event)
            case DraftReturned():
                self._draft_returned(event)
            case StageLost():
                self._stage_lost()
            case PipelineRestored():
                self._pipeline_restored()
            case GenerationAborted():
                self._finish(FinishReason.ABORTED)
            case StopStringMet(tokens):
                if not 0 < tokens <= self.generation.frontier - self.generation.prompt_length:
                    raise InvariantError(f"a stop string was met after {tokens} tokens, not so many were emitted")
                self._finish(FinishReason.STOP)
        self._move_on()
        commands, self.generation.commands = self.generation.commands, []
        return commands

    # -- the pipeline comes and goes -------------------------------------------------------------------------------

    def _start(self, event: GenerationStarted) -> None:
        if self._generation is not None:
            raise InvariantError("a scheduler drives one generation, and it has started already")
        self._generation = Generation(event, self.policy.limits, self._kv_cells)
        self._plan_prefill()

    def _stage_lost(self) -> None:
        for run in self.generation.in_flight:
            self._end(run, Outcome.DRAINED)
        self.generation.forget_pipeline()
        self._prefill.clear()
        self._suspended = not self.finished

    def _pipeline_restored(self) -> None:
        if self._suspended:
            self._suspended = False
            self.generation.epoch += 1
            self._plan_prefill()

    def _plan_prefill(self) -> None:
        """Prompt chunks, then text generated before a stage was lost: as decode rows, so that their bits stay equal."""
        generation = self.generation
        self._prefilling = True
        prompt, frontier, chunk = generation.prompt_length, generation.frontier, self.prefill_chunk
        for kind, first, last in ((RunKind.PREFILL, 0, prompt), (RunKind.CANONICAL, prompt, frontier)):
            for start in range(first, last, chunk):
                self._prefill.append((kind, start, min(start + chunk, last)))

    def _move_on(self) -> None:
        """After every event: prefill goes on, then the policy decides, and a finished generation winds up."""
        generation = self.generation
        if self.finished:
            if not generation.in_flight and not self.released:
                self._release()
            return
        if self._suspended:
            return
        while self._prefill and len(generation.in_flight) < self.prefill_window:
            generation.submit_prefill(*self._prefill.popleft())
        if not self._prefilling:
            self.policy.decide(generation)
        if not generation.in_flight and generation.draft_id is None:
            raise InvariantError(f"policy {self.policy.name} left nothing in flight at frontier {generation.frontier}")

    def _release(self) -> None:
        generation = self.generation
        generation.queue(SequenceRemove(CANONICAL, generation.shared, END))  # of redundant runs that were drained
        held = generation.cells.allocated
        if held != generation.shared:
            raise InvariantError(f"{held} cells are held at the end, the text has {generation.shared} (I5)")
        generation.cells.release_all()
        if generation.partitions.free != generation.partitions.total:
            raise InvariantError(f"{generation.partitions.free} of {generation.partitions.total} partitions came back")
        generation.commands.append(ReleaseSession())
        self.released = True

    def _finish(self, reason: FinishReason) -> None:
        """The user has the whole text: what is still in flight comes home for nothing."""
        if self.finished:
            return
        self.finished = True
        generation = self.generation
        generation.commands.append(FinishGeneration(reason))
        generation.cancel([run for run in generation.in_flight if not run.cancelled])
        generation.abandon_draft()
        self._prefill.clear()

    # -- results ---------------------------------------------------------------------------------------------------

    def _draft_returned(self, event: DraftReturned) -> None:
        generation = self.generation
        tip, overtaken = generation.draft_tip, generation.overtaken
        if tip is None or event.request_id != generation.draft_id:
            return  # its context died while it was drafted, or a newer request took its place
        generation.abandon_draft()
        tree = event.tree.after(overtaken)
        if tree.tokens or not overtaken:  # the text has gone another way than a late draft: it says nothing
            self.policy.draft_returned(generation, tip, tree)

    def _run_returned(self, event: RunReturned) -> None:
        generation = self.generation
        oldest = generation.in_flight[0].run_id if generation.in_flight else None
        if event.run_id != oldest:
            raise InvariantError(f"run {event.run_id} returned, but the oldest in flight is {oldest} (I2)")
        run = generation.in_flight.popleft()
        if self.finished:
            outcome = Outcome.DRAINED
        elif run.cancelled:
            outcome = Outcome.CANCELLED
        else:
            self._verify(run, event.predictions)
            is_text = run.useful_rows or run.run.kind is not RunKind.SPECULATIVE
            outcome = Outcome.ACCEPTED if is_text else Outcome.REJECTED
        generation.release_partition(run)
        self._end(run, outcome)

    def _verify(self, run: InFlightRun, predictions: tuple[int, ...] | None) -> None:
        """Walks from the root along the run's rows: each row at the root is news and moves the root on."""
        if predictions is None or len(predictions) != run.run.outputs:
            count = "a void frame" if predictions is None else f"{len(predictions)} predictions"
            raise InvariantError(f"run {run.run_id} was not cancelled and owes {run.run.outputs}, but brought {count}")
        generation = self.generation
        if run.is_prefill:  # after a lost stage, text comes by a second time
            run.useful_rows = sum(position >= self._delivered for position in run.run.positions)
            self._delivered = max(self._delivered, run.run.positions[-1] + 1)
        committed: list[int] = []
        last, reason = generation.root, None
        while generation.root.run is run and reason is None:
            last = generation.root
            committed.append(predictions[last.row - run.run.first_output_row])
            reason = self._commit(committed[-1])
        if not committed:
            self._check_redundant(run, predictions)
            return
        generation.promote(last)
        self._delivered = max(self._delivered, last.position + 1)
        generation.commands.append(EmitTokens(generation.frontier - len(committed), tuple(committed)))
        if reason is not None:
            self._finish(reason)

    def _commit(self, token: int) -> FinishReason | None:
        """Appends ``token`` to the text. Says why the generation ends with it, if it does."""
        generation = self.generation
        self.statistics.drafted_verified += len(generation.root.children)
        self.statistics.drafted_accepted += token in generation.root.children
        generation.commit(token)
        if generation.root.run is not None:
            generation.root.run.useful_rows += 1
        self._prefilling = False
        if token in generation.stop_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if generation.frontier == generation.limit else None

    def _check_redundant(self, run: InFlightRun, predictions: tuple[int, ...]) -> None:
        """A run that repeats known text must repeat it exactly, or the text would depend on which run came first."""
        if run.run.kind is not RunKind.CANONICAL or not predictions:
            return
        position = run.run.positions[-1] + 1
        known = self.generation.text[position] if position < self.generation.frontier else predictions[-1]
        if predictions[-1] != known:
            raise InvariantError(
                f"run {run.run_id} predicts token {predictions[-1]} at position {position}, "
                f"where the text has {known}: the stages' arithmetic is not exact"
            )

    def _end(self, run: InFlightRun, outcome: Outcome) -> None:
        useful = run.useful_rows if outcome is Outcome.ACCEPTED else 0
        self.generation.commands.append(EndRun(run.run_id, outcome, useful))
