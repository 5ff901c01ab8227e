"""The clairvoyant bound: times that no scheduler could beat with this cluster, this text and this drafter.

The clairvoyant scheduler knows the text, and which of the drafter's candidates are right; it never drafts or computes
in vain. Yet a token is only text once a run that carries its predecessor has passed all stages, and a run can carry
only tokens that its head was told: by the target, or by the drafter. All times are lower bounds; every max and min
below keeps that. docs/bound.md derives the same at more leisure.

**Latency, along the text.** For position ``p`` let ``E(p)`` be when the user gets its token, ``D(p)`` when the drafter
has drafted it, ``K(p)`` when the head knows it, ``S(p)`` when the row that carries it leaves the head. With ``T`` the
time of a one-row run through all links and stages, and ``o`` the head's overhead for each event:

    D(p)   = level + min(D(p-1), K(p-1) + way to the drafter)    if the right token is among the candidates, else never
    K(p)   = min(E(p), D(p) + way back + o)
    S(p)   = max(S(p-1), K(p))                                   a row needs its ancestors' KV cells: rows go in order
    E(p+1) = max(E(p), S(p) + T(p) + o)

The drafter may begin with the prompt and may tell each level at once; any candidate counts, however wide the tree.
Where it is right only up to some depth ahead of the committed text, the text must have come so near: ``E(p - depth)``
and the way to the drafter. Where it misses, the token starts a new root: its run begins with the KV operation that
clears stale cells, and holds no row before it, so that ``T`` is that of the context at the latest miss. Where a stage
crashes, the row may also come with all of its chunk, prefilled anew without KV operations: see ``home``.

**Capacity, at every resource** (stage, link, shared device with its cores). Each text row passes each once, so rows
``q..p`` leave it no earlier than row ``q`` can come plus the work of all of them, spread over its cores. The work of a
row is its share of the cheapest batch, ``min over b of cost(b) / b``. From there, row ``p`` still has the rest of its
way before it, hence with ``I`` a lone row's time inside the resource and ``w`` the share:

    H(p)   = max(H(p-1), S(p) + T(p) - I(p)) + w(p)
    E(p+1) >= H(p) + o

**Prefill** is the cluster's, not a policy's: chunks and window are as the scenario says, and a max-plus recurrence
over them gives the first token exactly where no device is shared. Its end is where each ``H`` begins.

Costs are asked for through ``CostModel.seconds`` alone: for a number of rows they must be linear in the context and
never fall, and not fall beyond as many rows as the text has. Kept out, so that the bound only gets lower: who else
waits for a shared core, a shared network interface or the head, the bytes of wrong tokens, KV capacity, a dearer level
for a wider tree; jitter, loss and faults, which only ever delay. A link whose profile varies is taken at its best.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor, inf

from pipesim.scenario import CrashFault, Link, Scenario, StagePlan
from pipesim.scheduling.runs import RunKind
from pipesim.simulation.acceptance import Truth, make_truth
from pipesim.simulation.courses import at_best
from pipesim.simulation.links import HEADER_BYTES, KV_OPERATION_BYTES, ROW_BYTES, TOKEN_BYTES, draft_bytes

_ROWS_PROBED = 512  # batches of at least so many rows are asked for their share, even for shorter texts


@dataclass(frozen=True, slots=True)
class Bound:
    """No policy shows the user token ``i`` before ``emissions_s[i]`` seconds after the prompt was submitted."""

    emissions_s: tuple[float, ...]

    @property
    def e2e_s(self) -> float:
        """Prompt submitted to last token, at the earliest."""
        return self.emissions_s[-1]

    @property
    def tokens_per_second(self) -> float | None:
        """The highest speed of decoding, ``(n - 1) / (last - first)``; None if that has no meaning or no limit."""
        elapsed = self.emissions_s[-1] - self.emissions_s[0]
        return (len(self.emissions_s) - 1) / elapsed if elapsed > 0 else None

    def as_dict(self, e2e_s: float | None) -> dict[str, float | None]:
        """What ``--json`` shows beside the figures of a generation that took ``e2e_s`` seconds."""
        return {
            "e2e_s": self.e2e_s,
            "tokens_per_second": self.tokens_per_second,
            "fraction": None if e2e_s is None else self.fraction(e2e_s),
        }

    def fraction(self, e2e_s: float) -> float:
        """How much of the possible speed a generation reached that took ``e2e_s`` seconds, at most 1."""
        return self.e2e_s / e2e_s


def clairvoyant_bound(scenario: Scenario, truth: Truth | None = None) -> Bound:
    """The bound of a scenario; its policy plays no part. Takes O(tokens * different stages) steps.

    ``truth`` replaces the scenario's acceptance, as in ``simulate``.

    Raises:
        BadInputError: the scenario cannot be simulated.
    """
    truth = truth or make_truth(scenario)
    reaches, root = _reaches(truth, scenario.workload.max_new_tokens), len(truth.prompt)
    pipeline, drafter = _Pipeline(scenario, root, len(reaches)), _Drafter(scenario, root)
    submitted, emitted = pipeline.prefill()
    emissions = [emitted]
    for position, reach in enumerate(reaches[:-1], start=root):
        submitted = max(submitted, drafter.know(reach, emissions))
        root = root if reach else position
        home = pipeline.home(submitted, position, root, missed=not reach)
        emissions.append(max(emissions[-1], home + pipeline.overhead))
    return Bound(tuple(time / 1e9 for time in emissions))


def _reaches(truth: Truth, max_new_tokens: int) -> list[float]:
    """For each generated token, the furthest that it can be ahead of committed text and the drafter offers it.

    0: never, infinite: at any depth.
    """
    reaches, previous, prompt = [], truth.prompt[-1], len(truth.prompt)
    for position in range(prompt, prompt + max_new_tokens):
        token, reach = truth.next(position, previous), 0
        for depth in range(truth.depths, 0, -1):
            if any(token == candidate for candidate, _ in truth.candidates(position, previous, depth)):
                reach = depth
                break
        reaches.append(inf if reach == truth.depths else reach)
        if token in truth.stop_tokens:
            break
        previous = token
    return reaches


@dataclass(frozen=True, slots=True)
class _Wire:
    """A link at its best, on which a frame has ``row_bytes`` for each row. Whole nanoseconds, as in the simulation."""

    latency: int
    ns_per_byte: float
    row_bytes: int
    outputs_only: bool = False

    @classmethod
    def of(cls, link: Link, row_bytes: int, outputs_only: bool = False) -> "_Wire":
        ns_per_byte = 8.0 / link.bandwidth_gbps if link.bandwidth_gbps else 0.0
        return cls(round(link.latency_ms * 1e6), ns_per_byte, row_bytes, outputs_only)

    def occupied(self, size_bytes: int) -> int:
        """Serialisation of a message."""
        return round(size_bytes * self.ns_per_byte)

    def crossed(self, size_bytes: int) -> int:
        """From the sender to the receiver."""
        return self.occupied(size_bytes) + self.latency

    def prefill(self, rows: int, _: float, outputs: int) -> int:
        """Time that a prefill run occupies the link."""
        return self.occupied(HEADER_BYTES + (outputs if self.outputs_only else rows) * self.row_bytes)

    def alone(self, _: int) -> int:
        """Time that a one-row run without KV operations occupies the link."""
        return self.occupied(HEADER_BYTES + self.row_bytes)

    def share(self, _: int) -> int:
        """Of any run's time, the part of each row; a header may be rounded down by half a nanosecond."""
        return max(0, floor(self.row_bytes * self.ns_per_byte + min(0.0, HEADER_BYTES * self.ns_per_byte - 0.5)))

    @property
    def operation(self) -> int:
        """Time that a KV operation adds to a one-row run."""
        if self.outputs_only:
            return 0
        return self.occupied(HEADER_BYTES + self.row_bytes + KV_OPERATION_BYTES) - self.alone(0)


class _Stage:
    """One sort of stage, with the same questions answered."""

    latency = 0

    def __init__(self, plan: StagePlan, prompt: int, tokens: int) -> None:
        self._seconds = plan.cost_model().seconds
        self._first = prompt + 1  # cells that the first generated row attends to
        batches = range(1, max(tokens, _ROWS_PROBED) + 1)
        self._share = min((self._decode(rows, self._first) * 1e9 - 0.5) / rows for rows in batches)
        one = self._decode(1, self._first)
        self._beside = min(0.0, min(self._decode(rows, self._first) - one for rows in batches))
        self._cell = max(0.0, min(map(self._cell_ns, (1, batches[-1] // 2, batches[-1]))))
        self.constant = self._decode(1, prompt + tokens) == one

    def _decode(self, rows: int, context: float) -> float:
        return self._seconds(RunKind.CANONICAL, rows, context)

    def _cell_ns(self, rows: int) -> float:
        """What each of so many rows pays for another cell of context."""
        step = self._decode(rows, self._first + 1) - self._decode(rows, self._first)
        return (1 - 1e-9) * step * 1e9 / rows

    def prefill(self, rows: int, context: float, _: int) -> int:
        """Time of a prefill run."""
        return max(1, round(self._seconds(RunKind.PREFILL, rows, context) * 1e9))

    def alone(self, position: int) -> int:
        """Time of a run of rows from ``position`` on: of one, or of more if a table says that this is faster."""
        return max(1, round((self._decode(1, position + 1) + self._beside) * 1e9))

    def share(self, position: int) -> int:
        """Of any run's time, the part of a row at ``position``."""
        return max(0, floor(self._share + (position + 1 - self._first) * self._cell))


class _Drafter:
    """``D`` and ``K``, position by position."""

    def __init__(self, scenario: Scenario, prompt: int) -> None:
        cluster, plan = scenario.cluster, scenario.drafter(branches=1)
        wire = _Wire.of(at_best(scenario.links()[-1]), TOKEN_BYTES)
        self._level = round(plan.level_ms * 1e6)
        self._there = wire.crossed(HEADER_BYTES + TOKEN_BYTES)
        own = cluster.head.draft_overhead_ms
        self._back = wire.crossed(draft_bytes(1)) + round((cluster.head.overhead_ms if own is None else own) * 1e6)
        setup = round(plan.prefill_per_token_ms * 1e6 * prompt)
        self._ready = wire.crossed(HEADER_BYTES + TOKEN_BYTES * prompt) + setup  # it has the prompt
        self._drafted: float = inf
        self._known = 0

    def know(self, reach: float, emissions: Sequence[int]) -> int:
        """When the head knows the next token.

        ``reach``: how far ahead of committed text the drafter gets it right; ``emissions``: of all tokens up to it.
        """
        told = max(self._known + self._there, self._ready)
        self._drafted = min(self._drafted, told) + self._level if reach else inf
        if reach < len(emissions):  # not before the text has come so near
            self._drafted = max(self._drafted, emissions[-1 - int(reach)] + self._there + self._level)
        self._known = int(min(emissions[-1], self._drafted + self._back))
        return self._known


class _Resource:
    """A stretch of the way that rows pass in order, and that works on its ``members``, with ``cores`` at a time."""

    def __init__(self, way: Sequence[_Wire | _Stage], members: Sequence[int], cores: int = 1) -> None:
        self.first, self.last = members[0], members[-1]
        self.members, self.cores = members, cores
        stretch = way[self.first : self.last + 1]
        self._latency = sum(element.latency for element in stretch[:-1])
        self._inside = Counter(stretch)
        self._own = Counter(way[member] for member in members)
        self.sort = self._latency, frozenset(self._inside.items()), frozenset(self._own.items()), cores
        self.done = 0  # ``H``; during prefill, when the resource itself is done
        self.inside = self.share = 0

    def weigh(self, position: int, root: int) -> None:
        """Sets ``I`` and ``w`` for a row."""
        self.inside = self._latency + _alone(self._inside, root)
        self.share = sum(count * element.share(position) for element, count in self._own.items()) // self.cores


def _alone(elements: Counter[_Wire | _Stage], position: int) -> int:
    return sum(count * element.alone(position) for element, count in elements.items())


class _Pipeline:
    """The way of a run: link, stage, link, ..., stage, link home."""

    def __init__(self, scenario: Scenario, prompt: int, tokens: int) -> None:
        cluster, plans = scenario.cluster, scenario.stages()
        hops = [at_best(link) for link in scenario.links() if link.group == "data"]
        self.overhead = round(cluster.head.overhead_ms * 1e6)
        self._prompt, self._chunk, self._window = prompt, cluster.prefill_chunk, cluster.prefill_window
        activations = scenario.row_bytes()
        sorts: list[StagePlan] = []
        stages: list[_Stage] = []
        self._way: list[_Wire | _Stage] = []
        for number, plan in enumerate(plans):
            same = replace(plan, name="", device=None, first_layer=min(plan.first_layer, 1))  # the first one embeds
            if same not in sorts:
                sorts.append(same)
                stages.append(_Stage(plan, prompt, tokens))
            carried = activations if number else TOKEN_BYTES
            self._way += [_Wire.of(hops[number], ROW_BYTES + carried), stages[sorts.index(same)]]
        self._way.append(_Wire.of(hops[-1], TOKEN_BYTES, outputs_only=True))
        self._crashes = any(isinstance(fault, CrashFault) for fault in scenario.faults)
        self._constant = all(stage.constant for stage in stages)
        self._elements = Counter(self._way)
        self._latency = sum(element.latency for element in self._way)
        self._operation = sum(element.operation for element in self._way if isinstance(element, _Wire))
        self._resources = [_Resource(self._way, [number]) for number in range(len(self._way))]
        for device in cluster.devices:
            members = [2 * number + 1 for number, plan in enumerate(plans) if plan.device == device.name]
            if len(members) > 1:
                self._resources.append(_Resource(self._way, members, device.cores))

    def prefill(self) -> tuple[int, int]:
        """When the last prefill run leaves the head, and when the first token is at the user, in nanoseconds."""
        handled: list[int] = []
        submitted = 0
        for number, start in enumerate(range(0, self._prompt, self._chunk)):
            submitted = 0 if number < self._window else handled[number - self._window]
            home = self._carry(submitted, start, min(start + self._chunk, self._prompt))
            handled.append(max(home, handled[-1] if handled else 0) + self.overhead)
        self._begin_decoding()
        return submitted, handled[-1]

    def _carry(self, now: int, start: int, stop: int) -> int:
        """Sends a prefill run on its way; says when it is home."""
        context, outputs = (start + stop - 1) / 2 + 1, int(stop == self._prompt)
        times = [element.prefill(stop - start, context, outputs) for element in self._way]
        for number, (element, time) in enumerate(zip(self._way, times, strict=True)):
            for resource in self._resources:
                if resource.first == number:
                    work = sum(times[member] for member in resource.members)
                    resource.done = max(resource.done, now) + work // resource.cores
            now += time
            now = max([now, *(resource.done for resource in self._resources if resource.last == number)])
            now += element.latency
        return now

    def _begin_decoding(self) -> None:
        """``H`` begins where prefill ended, the rest of a row's way added; equal resources become one."""
        rest = 0
        after = []
        for element in reversed(self._way):
            after.append(rest := rest + element.latency)
            rest += element.alone(self._prompt)
        after.reverse()
        sorts: dict[object, _Resource] = {}
        for resource in self._resources:
            same = sorts.setdefault(resource.sort, resource)
            same.done = max(same.done, resource.done + after[resource.last])
        self._resources = list(sorts.values())
        self._weigh(self._prompt, self._prompt)

    def _weigh(self, position: int, root: int) -> None:
        self._time = self._latency + _alone(self._elements, root)
        for resource in self._resources:
            resource.weigh(position, root)

    def home(self, submitted: int, position: int, root: int, missed: bool) -> int:
        """When the row at ``position`` is home; its run, ``submitted`` then, has no rows before ``root``.

        After a crash it may be the last row of its chunk of the text, whose mean context then counts.
        """
        if self._crashes:
            start = position - (position - self._prompt) % self._chunk
            root, missed = min(root, (start + position) // 2), False
        if not self._constant:
            self._weigh(position, root)
        home = submitted + self._time
        times = [home + self._operation if missed else home]
        for resource in self._resources:
            resource.done = max(resource.done, home - resource.inside) + resource.share
            times.append(resource.done)
        return max(times)
