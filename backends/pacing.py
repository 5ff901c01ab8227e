"""Keeps real processes to an emulated cluster's times: waits until what ``emulation.py`` says is due.

All waiting is until a moment that the model gives, so that a late awakening delays nothing that follows.
"""

import asyncio
import contextlib
import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

from backends.control import DraftReply
from backends.emulation import EmulatedDrafter, EmulatedStage, PacedDrafter, PacedHead, PacedStage
from backends.frames import Hop, ResultFrame, RunFrame, StageStamp
from backends.pipeline import News
from pipesim.errors import PipesimError
from pipesim.pace import CALLED_OFF
from pipesim.trace import PaceSample

LEAD_S = 0.3
"""From the opening of a session to its time 0: stages and drafter must have heard of it by then."""
Wait = Callable[[float], None]
"""Waits for so many seconds, or until something has happened."""


class _Pace:
    """Time since the prompt, whose moment on this process's clock is ``origin``."""

    def __init__(self, origin: float) -> None:
        self.origin = origin

    def now(self) -> int:
        return round(1e9 * (time.monotonic() - self.origin))

    def on_clock(self, moment: int) -> float:
        return self.origin + 1e-9 * moment

    def wait(self, due: Callable[[], int], pause: Wait, given_up: Callable[[], bool]) -> None:
        """Until ``due``, which may change while it waits."""
        while (left := due() - self.now()) > 0 and not given_up():
            pause(1e-9 * left)


class StagePace(_Pace):
    """A stage's runs in one session."""

    def __init__(self, part: EmulatedStage, origin: float) -> None:
        super().__init__(origin)
        self._model = PacedStage(part)
        self._late_calls: list[int] = []
        self._left = 0
        self._hops: tuple[Hop, ...] = ()

    def cancel(self, run_ids: Sequence[int], hop: Hop) -> None:
        """The head calls off runs."""
        now = self.now()
        self._late_calls.append(max(0, now - self._model.cancel(run_ids, hop)))

    def begin(self, frame: RunFrame, received: float) -> None:
        """Takes up a run that was really here at ``received``, on this process's clock."""
        *before, hop = frame.hops
        self._model.begin(frame.run, hop, frame.void)
        arrival, really = self._model.arrival, round(1e9 * (received - self.origin))
        self._hops = (*before, hop._replace(arrival=arrival, received=really))

    def is_dead(self) -> bool:
        """Whether the run will be dead when it leaves."""
        return self._model.due()[1]

    def leave(
        self, predictions: int, pause: Wait, given_up: Callable[[], bool]
    ) -> tuple[float, float, bool, tuple[Hop, ...]]:
        """Waits until the computed run is due.

        Returns from when to when it kept the stage busy, on this process's clock, whether it is dead, and its hops.
        """
        computed = self.now()
        self.wait(lambda: self._model.due()[0], pause, given_up)
        begin, end, void, out = self._model.leave(predictions)
        left = self.now()
        calls, self._late_calls = self._late_calls, []
        *before, hop = self._hops
        hop = hop._replace(begin=begin, end=end, computed=computed, left=left, late_calls=tuple(calls))
        start = left if begin == end else max(begin, self._left)
        self._left = left
        return self.on_clock(min(start, left)), self.on_clock(left), void, (*before, hop, out)


class DrafterPace(_Pace):
    """The drafter's requests in one session."""

    def __init__(self, part: EmulatedDrafter, prompt_tokens: int, origin: float) -> None:
        super().__init__(origin)
        self._model = PacedDrafter(part, prompt_tokens)
        self._hops: list[Hop] = []

    def order(self, hop: Hop) -> int:
        """A request has come; returns its number."""
        received = self.now()
        number = self._model.order(hop)
        self._hops.append(hop._replace(arrival=self._model.arrival(number), received=received))
        return number

    def begin(self, number: int, position: int) -> bool:
        """Whether a request for tokens from ``position`` on is to be answered; else a newer one was there first."""
        return self._model.begin(number, position)

    def is_overtaken(self, number: int, levels: int) -> bool:
        """Whether a draft of so many levels would be abandoned."""
        return self._model.due(number, levels)[1]

    def leave(
        self, number: int, begun: bool, levels: int, nodes: int, pause: Wait, given_up: Callable[[], bool]
    ) -> tuple[float, float, bool, tuple[Hop, ...]]:
        """Waits until the draft is due; returns as ``StagePace.leave``. A request that was not begun is due at once."""
        computed = self.now()
        if not begun:
            at = self.on_clock(computed)
            return at, at, True, (self._hops[number],)
        self.wait(lambda: self._model.due(number, levels)[0], pause, given_up)
        begin, end, home = self._model.leave(number, levels, nodes)
        left = self.now()
        hop = self._hops[number]._replace(begin=begin, end=end, computed=computed, left=left)
        hops = (hop,) if home is None else (hop, home)
        return self.on_clock(min(begin, left)), self.on_clock(left), home is None, hops


class HeadPace(_Pace):
    """The head in one session: hears news when an emulated head would have handled them.

    Attributes:
        model: how messages cross their links. What the head sends leaves at ``model.now``.
        samples: what was due when, and when it really was.
    """

    def __init__(self, model: PacedHead, inbox: "asyncio.Queue[News]", origin: float) -> None:
        super().__init__(origin)
        self.model = model
        self.samples: list[PaceSample] = []
        self._inbox = inbox
        self._at_once: deque[News] = deque()
        self._waiting: list[tuple[int, int, News]] = []  # by arrival
        self._numbers = count()
        self._free: dict[str, int] = {}  # since when a stage or the drafter really is
        links = [link.name for link in model.links()]
        stages = (len(links) - 3) // 2
        self._ways, self._calls = links[: stages + 1], links[stages + 1 : -2]
        self._draft_ways = links[-2:]

    async def until_start(self) -> None:
        """Waits for time 0."""
        await asyncio.sleep(self.origin - time.monotonic())

    def catch_up(self) -> None:
        """The head hears of something now that is as late as it really is."""
        self.model.now = self.model.due(self.now(), drafted=False)

    async def next(self) -> News:
        """The next news that the head has handled by now."""
        while True:
            while not self._inbox.empty():
                self._sort(self._inbox.get_nowait())
            if self._at_once:
                return self._at_once.popleft()
            left = None
            if self._waiting:
                arrival, _, news = self._waiting[0]
                what = None if isinstance(news, PipesimError) else news[0]
                due, now = self.model.due(arrival, isinstance(what, DraftReply)), self.now()
                if due <= now:
                    heapq.heappop(self._waiting)
                    called_off = isinstance(what, ResultFrame) and what.predictions is None
                    self._sample(f"head{CALLED_OFF if called_off else ''}", arrival, due, now)
                    self.model.now = due
                    return news
                left = 1e-9 * (due - now)
            with contextlib.suppress(TimeoutError):
                self._sort(await asyncio.wait_for(self._inbox.get(), left))

    def _sort(self, news: News) -> None:
        now = self.now()
        if isinstance(news, PipesimError):
            self._wait_for(self.model.noticed(now), news)
            return
        what = news[0]
        if not isinstance(what, ResultFrame | DraftReply) or not what.hops:
            self._at_once.append(news)
            return
        drafted = isinstance(what, DraftReply)
        home = what.hops[-1]
        if drafted and len(what.hops) == 1:  # an abandoned draft: the model sends no word of it
            self._note_draft(what.hops[0], CALLED_OFF)
            self._at_once.append(news)
            return
        arrival = self.model.arrival("drafter" if drafted else "pipeline", home)
        self._sample(self._draft_ways[1] if drafted else self._ways[-1], home.start, arrival, now)
        if isinstance(what, DraftReply):
            self._note_draft(what.hops[0])
        else:
            self._note_stages(what.hops[:-1], what.stamps)
        self._wait_for(arrival, news)

    def _wait_for(self, arrival: int, news: News) -> None:
        heapq.heappush(self._waiting, (arrival, next(self._numbers), news))

    def _note_draft(self, hop: Hop, fate: str = "") -> None:
        self._sample(self._draft_ways[0], hop.start, hop.arrival, hop.received)
        if hop.begin >= 0:
            self._work("drafter", fate, hop)

    def _note_stages(self, hops: Sequence[Hop], stamps: Sequence[StageStamp]) -> None:
        for stage, (hop, stamp) in enumerate(zip(hops, stamps, strict=True)):
            self._sample(self._ways[stage], hop.start, hop.arrival, hop.received)
            self._work(f"stage {stage}", CALLED_OFF if stamp.void else "", hop)
            for late in hop.late_calls:
                self._sample(self._calls[stage], 0, 0, late)

    def _work(self, part: str, fate: str, hop: Hop) -> None:
        really = hop.computed - max(hop.received, self._free.get(part, 0))
        self._free[part] = hop.left
        self._sample(part + fate, hop.begin, hop.end, hop.left, really > hop.end - hop.begin > 0)

    def _sample(self, part: str, since: int, due: int, done: int, overrun: bool = False) -> None:
        self.samples.append(PaceSample(part, 1e-9 * since, 1e-9 * due, 1e-9 * done, overrun))
