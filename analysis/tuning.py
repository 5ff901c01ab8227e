"""The best settings of a policy for a scenario, found alike for every policy, on seeds of their own.

Every setting has a ladder of values. A coarse grid is tried on few seeds; from its best entries the search climbs, on
more seeds, to whatever neighbour on the ladders is faster, until none is. Ladders are so long that a search which ends
at the end of one is worth a remark: :func:`tune` reports it.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from analysis.laboratory import Settings, columns, with_settings
from pipesim.scenario import PolicySection, Scenario
from pipesim.simulation.pipeline import evaluate

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
BARS = (0.0, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
SPLITS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_SPLIT_ENDS = (0.0, 0.5)  # two candidates share a confidence of 1: beyond 0.5 no runner-up forks

SEEDS = ((1001, 1002), (1003, 1004, 1005, 1006, 1007))
"""Of the coarse grid, and of the climb. Results are made with other seeds: 1, 2, ..."""
CLIMBS = 2
"""So many of the coarse grid's best are starting points."""
GAIN = 1.002
"""A step is taken if it makes the policy this much faster: what has no effect stays as it is."""
HOPELESS, HOPELESS_AFTER = 0.97, 1
"""A neighbour that is this much slower after so many seeds is not measured with the others."""
METHOD = (
    f"All policies were tuned alike: a coarse grid on {len(SEEDS[0])} seeds, and from the {CLIMBS} best of it a climb, "
    f"on {len(SEEDS[1])} other seeds, to faster neighbours until there is none: tokens of a run, branches, both "
    "confidence bars, and for PipeInfer the number of partitions. The results have seeds of their own."
)
"""How it is done, for pages."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting's ladder of values, and those of the coarse grid. ``natural``: ends that cannot be passed anyway."""

    ladder: tuple[Any, ...]
    coarse: tuple[Any, ...]
    natural: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Space:
    """What a policy can be set to: its axes, and ``fixed`` settings, its name among them."""

    fixed: Settings
    axes: Mapping[str, Axis]
    size: str
    """The axis that bounds a run's tokens, and with them its branches."""
    split: str
    """The axis that means nothing without branches."""

    def settings(self, place: Settings) -> dict[str, Any]:
        """The policy's section for one value per axis, spelled in one way only."""
        found = {**self.fixed, **place}
        found["branches"] = min(found["branches"], found[self.size])
        if found["branches"] == 1:
            found.pop(self.split, None)
        return found

    def coarse(self) -> Iterator[dict[str, Any]]:
        """The coarse grid: places, one value per axis."""
        for values in itertools.product(*(axis.coarse for axis in self.axes.values())):
            yield dict(zip(self.axes, values, strict=True))

    def along(self, place: Settings, name: str, step: int) -> dict[str, Any] | None:
        """The neighbour that is ``step`` away on the ladder of ``name``, if there is one."""
        ladder = self.axes[name].ladder
        at = ladder.index(place[name]) + step
        return {**place, name: ladder[at]} if 0 <= at < len(ladder) else None

    def ends(self, place: Settings) -> list[str]:
        """The axes on which ``place`` is at an end that only the ladder sets."""
        settings = self.settings(place)
        return [
            name
            for name, axis in self.axes.items()
            if name in settings and place[name] in (axis.ladder[0], axis.ladder[-1]) and place[name] not in axis.natural
        ]


def speculative_space(fixed: Settings) -> Space:
    """Synchronous speculation: everything that it can be set to."""
    return Space(
        fixed,
        {
            "max_nodes": Axis(COUNTS, (1, 2, 4, 8, 16), (1,)),
            "branches": Axis(COUNTS, (1, 4), (1,)),
            "cutoff": Axis(BARS, (0.0, 0.6), (0.0,)),
            "split": Axis(SPLITS, (0.2,), _SPLIT_ENDS),
        },
        size="max_nodes",
        split="split",
    )


def pipeinfer_space(fixed: Settings, stages: int) -> Space:
    """PipeInfer: the same, and partitions. A single buffer has a single partition."""
    single = fixed.get("multibuffering") is False
    at_hand = min(COUNTS, key=lambda count: abs(count - stages))
    return Space(
        fixed,
        {
            "micro_batch": Axis(COUNTS, (1, 2, 4, 8), (1,)),
            "branches": Axis(COUNTS, (1, 2), (1,)),
            "p_accept": Axis(BARS, (0.0, 0.6), (0.0,)),
            "p_split": Axis(SPLITS, (0.2,), _SPLIT_ENDS),
            "partitions": Axis((1,), (1,), (1,)) if single else Axis(COUNTS, tuple({min(8, at_hand), at_hand}), (1,)),
        },
        size="micro_batch",
        split="p_split",
    )


def space_of(scenario: Scenario, fixed: Settings) -> Space:
    """What the policy that ``fixed`` names can be set to."""
    if fixed["name"] == "speculative":
        return speculative_space(fixed)
    return pipeinfer_space(fixed, len(scenario.stages()))


class Search:
    """Measures places of a space, each once with each seed."""

    def __init__(self, space: Space, scenario: Scenario) -> None:
        self.space = space
        self._scenario = scenario
        self._speeds: dict[str, dict[int, float]] = {}

    @property
    def tried(self) -> int:
        """How many settings have been measured."""
        return len(self._speeds)

    def speed(self, place: Settings, seeds: Sequence[int]) -> float:
        """Mean tokens per second over ``seeds``."""
        policy = self.space.settings(place)
        known = self._speeds.setdefault(json.dumps(policy, sort_keys=True), {})
        for seed in seeds:
            if seed not in known:
                chosen = {"policy": PolicySection(**policy), "seed": seed}
                known[seed] = columns(evaluate(self._scenario.model_copy(update=chosen)))["tokens/s"]
        return fmean(known[seed] for seed in seeds)

    def better(self, place: Settings, than: Settings, seeds: Sequence[int]) -> bool:
        """Whether ``place`` is faster; it leaves the race as soon as it is hopelessly behind."""
        if self.space.settings(place) == self.space.settings(than):
            return False
        for started in range(HOPELESS_AFTER, len(seeds)):
            if self.speed(place, seeds[:started]) < HOPELESS * self.speed(than, seeds[:started]):
                return False
        return self.speed(place, seeds) > GAIN * self.speed(than, seeds)

    def climb(self, place: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """Walks on one ladder after the other, both ways, until no neighbour is better."""
        still = 0
        for name in itertools.cycle(self.space.axes):
            start = place
            for step in (1, -1):
                while (other := self.space.along(place, name, step)) and self.better(other, place, seeds):
                    place = other
            still = still + 1 if place is start else 0
            if still == len(self.space.axes):
                return place
        raise AssertionError("a space has at least one axis")


def tune(scenario: str, fixed: Settings, starts: Sequence[Settings] = ()) -> dict[str, Any]:
    """The best settings of a policy for a scenario, given as JSON; a job for :meth:`Laboratory.map`.

    Args:
        scenario: as JSON.
        fixed: the policy's ``name``, and settings that are not to be touched.
        starts: places to climb from, in place of the best of the coarse grid.

    Returns:
        ``settings``: the policy's section; ``place``: its values on all axes; ``ends``: axes on which it lies at the
        end of the ladder; ``tried``: how many settings were measured.
    """
    valid = with_settings(scenario)
    search = Search(space_of(valid, fixed), valid)
    few, more = SEEDS
    if not starts:
        unlike = {json.dumps(search.space.settings(place)): place for place in search.space.coarse()}.values()
        starts = sorted(unlike, key=lambda place: search.speed(place, few), reverse=True)[:CLIMBS]
    summits = [search.climb(dict(place), more) for place in starts]
    best = max(summits, key=lambda place: search.speed(place, more))
    return {
        "settings": search.space.settings(best),
        "place": best,
        "ends": search.space.ends(best),
        "tried": search.tried,
    }
