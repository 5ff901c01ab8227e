"""Runs many simulations on all cores, and none of them twice: results are kept under all that they depend on."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

import pipesim
from pipesim.cli.common import diagnostic
from pipesim.errors import BadInputError, InvariantError
from pipesim.metrics import Metrics
from pipesim.recorder import Meter
from pipesim.scenario import Scenario
from pipesim.simulation.pipeline import Simulation
from pipesim.sweep.journal import Journal

Settings = Mapping[str, Any]
"""A policy's section of a scenario: its name and settings."""

Job = tuple[Any, ...]
"""What a function of :meth:`Laboratory.map` works on: plain values."""


class Laboratory:
    """Works on jobs in parallel and remembers their results.

    Args:
        pool: where jobs run.
        journal: what is done already, and where it is written down.
    """

    def __init__(self, pool: Executor, journal: Journal) -> None:
        self._pool = pool
        self._journal = journal

    def map(self, function: Callable[..., Any], jobs: Iterable[Job]) -> list[Any]:
        """``function(*job)`` for each job, in order, as plain values (tuples come back as lists).

        A job that is interrupted has not been done, one that is done stays done. ``function`` stands at the top of its
        module and depends on nothing but its arguments and the source that :func:`_source` reads.
        """
        keyed = [(_key(function, job), job) for job in jobs]
        work = {key: job for key, job in keyed if key not in self._journal.finished}
        names = {self._pool.submit(function, *job): key for key, job in work.items()}
        for number, future in enumerate(as_completed(names), 1):
            self._journal.add(names[future], json.loads(json.dumps(future.result())))
            if number % 200 == 0 or number == len(work) > 50:
                diagnostic(f"  {function.__name__}: {number} of {len(work)}")
        return [self._journal.finished[key] for key, _ in keyed]

    def measure(self, variants: Mapping[str, Scenario], seeds: Sequence[int]) -> pd.DataFrame:
        """One line per variant and seed, in order: ``variant``, ``seed``, and :func:`figures`' columns.

        All variants meet the same model pair: with one seed they must generate the same text.

        Raises:
            InvariantError: two variants generated different texts with one seed (I3).
        """
        (frame,) = self.measure_all([variants], seeds)
        return frame

    def measure_all(self, groups: Iterable[Mapping[str, Scenario]], seeds: Sequence[int]) -> list[pd.DataFrame]:
        """As :meth:`measure` for each group of variants, all at once."""
        groups = list(groups)
        plain = {id(one): one.model_dump_json() for variants in groups for one in variants.values()}
        jobs = [(plain[id(one)], seed) for variants in groups for one in variants.values() for seed in seeds]
        found = iter(self.map(figures, jobs))
        return [_frame(variants, seeds, found) for variants in groups]


def _frame(variants: Iterable[str], seeds: Sequence[int], found: Iterator[dict[str, Any]]) -> pd.DataFrame:
    lines = [{"variant": name, "seed": seed, **next(found)} for name in variants for seed in seeds]
    texts: dict[int, str] = {}
    for line in lines:
        if texts.setdefault(line["seed"], line["text"]) != line["text"]:
            other = lines[0]["variant"]
            raise InvariantError(f"{line['variant']} generates another text than {other} with seed {line['seed']} (I3)")
    return pd.DataFrame(lines)


@contextmanager
def laboratory(memory: Path | None = None) -> Iterator[Laboratory]:
    """A laboratory on all cores of this machine.

    Args:
        memory: file that keeps results from one run to the next; None: they are forgotten.
    """
    if memory:
        memory.parent.mkdir(parents=True, exist_ok=True)
    with Journal.opened(memory) as journal, ProcessPoolExecutor() as pool:
        try:
            yield Laboratory(pool, journal)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for what has not begun
            raise


def figures(scenario: str, seed: int) -> dict[str, Any]:
    """The columns of one generation of a scenario, given as JSON; ``text`` stands for the tokens."""
    resolved = with_settings(scenario, seed=seed)
    meter = Meter(resolved.scheduler(), seed, len(resolved.stages()))
    Simulation(resolved, meter).run()
    text = hashlib.blake2b(repr(meter.scheduler.generation.text).encode(), digest_size=8).hexdigest()
    return {"text": text, **columns(meter.metrics())}


def columns(metrics: Metrics) -> dict[str, float]:
    """What tables and figures are made of."""
    itl, waste = metrics.itl_s, metrics.wasted_compute_fraction
    speed, ttft, bubbles = metrics.tokens_per_second, metrics.ttft_s, metrics.bubble_fraction
    if itl is None or waste is None or speed is None or ttft is None or bubbles is None:
        raise BadInputError("workload.max_new_tokens: generations of a single token have no speed, use more")
    gap = {} if metrics.latency_breakdown_s is None else dataclasses.asdict(metrics.latency_breakdown_s)["itl"]
    return {
        **{f"gap, {part}, ms": 1e3 * seconds for part, seconds in gap.items()},
        "tokens/s": speed,
        "TTFT, ms": 1e3 * ttft,
        "ITL p95, ms": 1e3 * itl.p95,
        "utilisation, %": 100 * (1 - bubbles),
        "bubbles, %": 100 * bubbles,
        "wasted compute, %": 100 * waste.total,
        "acceptance, %": 100 * (metrics.acceptance_rate or 0.0),
        "link, MB": metrics.link_bytes / 1e6,
    }


def with_settings(scenario: str, **sections: Any) -> Scenario:
    """A scenario given as JSON, with whole sections replaced."""
    return Scenario.model_validate_json(json.dumps({**json.loads(scenario), **sections}))


def _key(function: Callable[..., Any], job: Job) -> str:
    text = json.dumps([_source(function), function.__qualname__, job], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def _source(function: Callable[..., Any]) -> str:
    """A digest of the simulator, of how settings are searched, and of the function's own module."""
    digest = hashlib.blake2b(digest_size=16)
    analysis = Path(__file__).parent
    files = {Path(inspect.getfile(function)), analysis / "laboratory.py", analysis / "tuning.py"}
    for path in sorted({*files, *Path(pipesim.__file__).parent.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()
