"""A pipeline without clocks for driving the scheduler by hand: strict about everything that a stage relies on.

Its language model is a hash of all (position, token) pairs that a row sees through the real cell table, so a single
wrong cell changes the text. Void runs leave poison in their cells; a live row that sees poison fails the test.
"""

import hashlib
from collections import deque
from collections.abc import Sequence

from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.commands import (
    CancelRuns,
    Command,
    EmitTokens,
    EndRun,
    FinishGeneration,
    Outcome,
    ReleaseSession,
    RequestDraft,
    SubmitRun,
)
from pipesim.scheduling.events import DraftReturned, Event, GenerationStarted, RunReturned
from pipesim.scheduling.policy import Policy
from pipesim.scheduling.runs import Run
from pipesim.scheduling.scheduler import Scheduler
from pipesim.scheduling.tree import Candidate, DraftTree, grow_tree

VOCABULARY = 5
POISON = -1


def language_model(tokens: Sequence[int]) -> int:
    """The next token after ``tokens``, dependent on every one of them and their order."""
    return hashlib.blake2b(bytes(tokens)).digest()[0] % VOCABULARY


def plain_text(prompt: Sequence[int], new_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    """What autoregressive decoding yields."""
    text = list(prompt)
    for _ in range(new_tokens):
        text.append(language_model(text))
        if text[-1] in stop:
            break
    return text[len(prompt) :]


class World:
    """Carries out the scheduler's commands; the test decides what happens next."""

    def __init__(
        self,
        policy: Policy,
        prompt: Sequence[int],
        new_tokens: int,
        stop: Sequence[int] = (),
        kv_cells: int | None = None,
        prefill_chunk: int = 4,
    ) -> None:
        self.scheduler = Scheduler(policy, kv_cells=kv_cells, prefill_chunk=prefill_chunk, prefill_window=3)
        self.text = list(prompt)
        self.emitted: list[int] = []
        self.queued: deque[Run] = deque()  # submitted, not yet computed
        self.computed: deque[tuple[Run, tuple[int, ...] | None]] = deque()
        self.request: RequestDraft | None = None
        self.cancelled: set[int] = set()
        self.outcomes: dict[int, EndRun] = {}
        self.submitted: list[Run] = []
        self.finish: FinishGeneration | None = None
        self.released = False
        self.log: list[tuple[Event, list[Command]]] = []
        self.cells: CellTable | None = None
        self.content: dict[int, int] = {}
        self.feed(GenerationStarted(tuple(prompt), new_tokens, tuple(stop)))

    def feed(self, event: Event) -> list[Command]:
        """Hands the scheduler an event and carries out what it answers."""
        commands = self.scheduler.handle(event, float(len(self.log)))
        self.log.append((event, commands))
        if self.cells is None:
            self.cells = CellTable(self.scheduler.kv_cells, self.scheduler.sequences)
        for command in commands:
            self.carry_out(command)
        self.scheduler.generation.cells.check()
        return commands

    def carry_out(self, command: Command) -> None:
        assert not self.released, "ReleaseSession is the last command"
        match command:
            case SubmitRun(run):
                assert run.run_id == len(self.submitted), "run ids count up in launch order"
                self.submitted.append(run)
                self.queued.append(run)
            case RequestDraft():
                assert command.frontier == len(self.text)
                self.request = command
            case CancelRuns(run_ids):
                assert not self.cancelled & set(run_ids)
                self.cancelled |= set(run_ids)
            case EmitTokens(position, tokens):
                assert self.finish is None, "no token after the end"
                assert position == len(self.text), "each token once, in order"
                self.emitted += tokens
                self.text += tokens
            case EndRun(run_id):
                assert run_id not in self.outcomes, "a run ends once"
                self.outcomes[run_id] = command
            case FinishGeneration():
                self.finish = command
            case ReleaseSession():
                self.released = True

    def compute(self, void_if_cancelled: bool = True) -> None:
        """Computes the oldest queued run, or passes it on void if it is cancelled and the stage noticed in time."""
        run = self.queued.popleft()
        assert self.cells is not None
        cells = self.cells.admit(run)
        void = run.run_id in self.cancelled and void_if_cancelled
        for cell, token in zip(cells, run.tokens, strict=True):
            self.content[cell] = POISON if void else token
        if void:
            self.computed.append((run, None))
            return
        predictions = []
        for row in range(run.rows):
            seen = [self.content[c] for c in self.cells.visible(run.positions[row], run.sequences[row])]
            if POISON in seen:
                assert run.run_id in self.cancelled or self.is_dead(run), "a live row sees a void cell"
                seen = [max(token, 0) for token in seen]
            predictions.append(language_model(seen))
        self.computed.append((run, tuple(predictions[run.first_output_row :])))

    def is_dead(self, run: Run) -> bool:
        flying = [r for r in self.scheduler.generation.in_flight if r.run_id == run.run_id]
        return self.scheduler.finished or not flying or not flying[0].live_nodes

    def return_run(self) -> list[Command]:
        """The oldest computed run comes home."""
        run, predictions = self.computed.popleft()
        return self.feed(RunReturned(run.run_id, predictions))

    def answer_draft(self, tree: DraftTree | None = None, errors: Sequence[int] = ()) -> list[Command]:
        """Answers the open request with ``tree``, or with one grown from the truth where ``errors`` says nothing else.

        ``errors[i % len(errors)]`` is the rank of the true token among the candidates of the i-th node asked for.
        """
        request = self.request
        assert request is not None
        self.request = None
        if tree is None:
            context = [*self.text[: request.frontier], *request.path]
            asked = iter(range(10**6))

            def candidates(path: tuple[int, ...]) -> list[Candidate]:
                truth = language_model([*context, *path])
                rank = errors[next(asked) % len(errors)] if errors else 0
                ranked = [(truth + 1 + i) % VOCABULARY for i in range(VOCABULARY - 1)]
                ranked.insert(rank, truth)
                return [(token, 0.6 / (i + 1)) for i, token in enumerate(ranked)]

            tree, _ = grow_tree(candidates, request.max_nodes, request.branches, request.cutoff, request.split)
        return self.feed(DraftReturned(request.request_id, tree))

    def run_to_the_end(self, errors: Sequence[int] = ()) -> list[int]:
        """Lets everything happen in the plainest order and returns the emitted tokens."""
        while not self.released:
            if self.request is not None and self.finish is None:
                self.answer_draft(errors=errors)
            elif self.queued:
                self.compute()
            else:
                self.return_run()
        return self.emitted

    def outcome_counts(self) -> dict[Outcome, int]:
        counts = dict.fromkeys(Outcome, 0)
        for end in self.outcomes.values():
            counts[end.outcome] += 1
        return counts
