"""A simulated drafter: one request at a time, a newer request ends the older one between two levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipesim.recorder import Observer
from pipesim.scenario import DraftPlan
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.events import DraftReturned
from pipesim.scheduling.tree import Candidate, grow_tree
from pipesim.simulation.acceptance import Truth
from pipesim.simulation.devices import Call, Clock, Device
from pipesim.simulation.sharing import FairDevice, Job
from pipesim.simulation.times import DraftTimes


@dataclass(frozen=True, slots=True)
class DraftJob:
    """A request as it reaches the drafter. ``previous`` is the token before the first one to draft."""

    request: RequestDraft
    previous: int


class DrafterServer:
    """The drafter. ``answer(event)`` is called when a draft is ready."""

    def __init__(
        self,
        clock: Clock,
        plan: DraftPlan,
        device: Device,
        truth: Truth,
        observer: Observer,
        answer: Callable[[DraftReturned], None],
    ) -> None:
        self._clock = clock
        self._device = device
        self._truth = truth
        self._record = observer.draft_span
        self._answer = answer
        self._times = DraftTimes(plan, len(truth.prompt))
        self._waiting: DraftJob | None = None
        self._job: DraftJob | None = None
        self._draft: DraftReturned | None = None  # what the job will bring, None while it waits for a core
        self._start = self._end = 0
        self._work: Job | None = None  # on a fair device
        self._levels = 0

    def arrive(self, call: Call) -> None:
        """A request comes in; whatever came before it is worthless."""
        overtaken, self._waiting = self._waiting is not None, call.value
        if self._job is None:
            self._next()
        elif overtaken:
            return  # the draft at hand has been cut short already
        elif self._work is not None and isinstance(self._device, FairDevice):
            self._device.shorten(self._work, max(1, self._levels), self._work.work - self._levels * self._times.level)
        elif self._draft is not None and self._clock.now < self._end:
            boundary = self._times.cut(self._clock.now)
            if boundary < self._end:
                self._end = boundary
                self._clock.at(boundary, self._finish)

    def _next(self) -> None:
        self._job, self._waiting = self._waiting, None
        if self._job is not None:
            self._device.acquire(self._begin)

    def _begin(self) -> None:
        if self._waiting is not None:  # a newer request came while this one waited for the core
            self._job, self._waiting = self._waiting, None
        job = self._job
        assert job is not None
        request, truth, previous = job.request, self._truth, job.previous
        depth = len(request.path) + 1  # of the first token to draft
        first = request.frontier + len(request.path)

        def candidates(path: tuple[int, ...]) -> Sequence[Candidate]:
            return truth.candidates(first + len(path), path[-1] if path else previous, depth + len(path))

        tree, levels = grow_tree(candidates, request.max_nodes, request.branches, request.cutoff, request.split)
        self._draft = DraftReturned(request.request_id, tree)
        self._start = self._clock.now
        self._times.begin(self._start, first)
        self._levels, self._end = levels, self._times.end(levels)
        if isinstance(self._device, FairDevice):
            self._work = self._device.start(self._end - self._start, self._finish, demand=1.0)  # a token at a time
            return
        self._clock.at(self._end, self._finish)

    def _finish(self, _: Call) -> None:
        draft = self._draft
        if draft is None or (self._work is None and self._clock.now != self._end):
            return  # the planned end of a request that was abandoned
        self._draft = self._work = None
        self._end = self._clock.now
        self._device.release()
        abandoned = self._waiting is not None
        tokens = 0 if abandoned else len(draft.tree.tokens)
        self._record(draft.request_id, self._start, self._end, tokens)
        if not abandoned:
            self._answer(draft)
        self._next()

    def __str__(self) -> str:
        if self._job is None:
            return "drafter: idle"
        doing = f"drafts until {self._end / 1e9} s" if self._draft else f"waits for a core of {self._device}"
        return f"drafter: request {self._job.request.request_id} {doing}"
