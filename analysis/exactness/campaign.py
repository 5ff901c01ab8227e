"""Runs combinations on pipelines of processes and holds each text against plain decoding in this process."""

import asyncio
import hashlib
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import gguf
import torch

from analysis.exactness.combinations import (
    LETTERS,
    LONGEST_PROMPT,
    LONGEST_TEXT,
    PER_PIPELINE,
    TINY_LAYERS,
    Combination,
    Setup,
    draw_combination,
    draw_setup,
)
from analysis.exactness.mutations import defect
from backends.cluster import ClusterPlan, DrafterPart, running_pipeline, stage_parts
from backends.control import Planted
from backends.head import Head
from backends.models.devices import DTYPES, QUANTIZED
from backends.models.loading import open_model
from backends.models.random_models import FAMILY_CONFIGS, save_gguf, save_shortened, save_tiny
from backends.models.stage_model import StageModel
from backends.pipeline import Pipeline
from backends.reference import generate_in_one_process
from backends.text_stream import TextStream
from backends.tokenizer import open_tokenizer
from pipesim.errors import InvariantError
from pipesim.event_log import replay_log
from pipesim.recorder import Recorder
from pipesim.scenario import IidAcceptance
from pipesim.scheduling.commands import Command
from pipesim.scheduling.events import Event, GenerationStarted, StageLost
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.runs import Run
from pipesim.scheduling.scheduler import Scheduler
from pipesim.sweep.engines import Done, attempt, run_local
from pipesim.sweep.journal import Journal
from pipesim.trace import Trace

EQUAL = "equal"
SHARPNESS = 3.0
"""Of random models: drafters are sure enough to draft, and torn often enough to fork."""

_TIMEOUT_S = 60.0  # a generation that hangs is a failure, not a reason to wait
Outcome = dict[str, Any]
"""What became of one combination: ``verdict`` (equal, or what was wrong) and figures of its trace."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The text of plain decoding: all tokens that the model gives, those up to a stop string, and their text."""

    prompt: tuple[int, ...]
    all_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


class Rig:
    """The model of one setup, its files in ``folder``, and plain decoding with it."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.model = setup.family
        if setup.is_tiny:
            target = folder / f"{setup.number}-target"
            changes = {"num_hidden_layers": TINY_LAYERS, **FAMILY_CONFIGS[setup.family]}
            self.model = str(save_tiny(target, sharpness=SHARPNESS, **changes))
            self.draft_model = str(save_shortened(folder / f"{setup.number}-draft", target, TINY_LAYERS - 2))
            if setup.dtype == QUANTIZED:
                file = target.with_suffix(".gguf")
                self.model = str(save_gguf(target, file, gguf.GGMLQuantizationType[setup.quantization]))
        source = open_model(self.model)
        self._whole = StageModel(source, 0, source.config.layers, DTYPES[setup.dtype], kernels=setup.kernels)
        self._vocabulary = source.config.vocabulary
        self._tokenizer = None if setup.is_tiny else open_tokenizer(source)

    def plan(self) -> ClusterPlan:
        """The pipeline of processes."""
        setup = self.setup
        name = self.draft_model if setup.drafter == "draft model" else setup.drafter
        skipped = setup.skipped if setup.drafter == "layer-skip" else None
        drafter = DrafterPart(name, self._vocabulary, LONGEST_PROMPT + LONGEST_TEXT, skipped)
        return ClusterPlan(self.model, stage_parts(setup.layers), drafter, setup.dtype, setup.kernels)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``."""
        if self._tokenizer:
            return self._tokenizer.decode(tokens)
        return "".join(LETTERS[token % len(LETTERS)] for token in tokens)

    def expected(self, combination: Combination) -> Expected:
        """What plain decoding makes of ``combination``: one process, one row at a time, no scheduler."""
        prompt = combination.prompt
        if isinstance(prompt, str):
            assert self._tokenizer
            prompt = tuple(self._tokenizer.encode(prompt))
        tokens = generate_in_one_process(
            self._whole, prompt, combination.new_tokens, combination.stop_tokens, combination.sampling
        )
        stream = TextStream(self.decode, combination.stop)
        text = stream.feed(tokens) + stream.finish()
        return Expected(prompt, tuple(tokens), tuple(tokens[: stream.ended]), text)


class _Killer(Recorder):
    """A recorder that kills the stage that the combination wants lost, when its run is submitted."""

    def __init__(
        self, scheduler: Scheduler, combination: Combination, stages: Sequence[str], log: TextIO, pipeline: Pipeline
    ) -> None:
        super().__init__(scheduler, combination.sampling.seed, stages, log)
        self.killed = self.lost = 0
        self._wanted, self._pipeline, self._submissions = combination.lost, pipeline, 0

    def handle(self, happened: Event, now: float) -> list[Command]:
        """As the base's; counts losses."""
        self.lost += isinstance(happened, StageLost)
        return super().handle(happened, now)

    def _submitted(self, run: Run, now: float) -> None:
        super()._submitted(run, now)
        self._submissions += 1
        if self._wanted and self._submissions == self._wanted[1]:
            process = self._pipeline.stages[self._wanted[0]].process
            assert process
            process.kill()
            self.killed += 1


async def generate(pipeline: Pipeline, rig: Rig, combination: Combination, expected: Expected) -> Outcome:
    """One generation on ``pipeline``, judged. Raises whatever breaks it."""
    policy = make_policy(combination.policy, combination.settings)
    cells = None
    if combination.spare_cells is not None:
        cells = len(expected.prompt) + combination.new_tokens + combination.spare_cells
    scheduler = Scheduler(policy, cells, prefill_window=combination.prefill_window)
    log = io.StringIO()
    recorder = _Killer(scheduler, combination, [str(stage) for stage in rig.setup.layers], log, pipeline)
    stream, pieces = TextStream(rig.decode, combination.stop), list[str]()

    def on_tokens(tokens: tuple[int, ...]) -> int | None:
        pieces.append(stream.feed(tokens))
        return stream.ended

    planted = None
    if rig.setup.drafter == "planted" and policy.limits.nodes:
        acceptance = IidAcceptance(kind="iid", rate=combination.acceptance)
        planted = Planted((*expected.prompt, *expected.all_tokens), acceptance.model_dump())
    started = GenerationStarted(expected.prompt, combination.new_tokens, combination.stop_tokens)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await Head(pipeline, recorder, on_tokens).generate(started, combination.sampling, planted)
    except TimeoutError:
        raise InvariantError(f"no end within {_TIMEOUT_S:g} s") from None
    trace = recorder.trace()
    text = "".join(pieces) + stream.finish()
    verdict = judge(trace, text, expected, log.getvalue())
    if recorder.lost > recorder.killed:
        verdict = "a stage failed by itself, and was replaced"  # a text that is right all the same hides nothing
    return {"verdict": verdict, "killed": recorder.killed, **figures(trace, log.getvalue(), bool(stream.ended))}


def judge(trace: Trace, text: str, expected: Expected, log: str) -> str:
    """``equal``, or what is wrong with a generation."""
    if trace.tokens != expected.tokens:
        pairs = zip(trace.tokens, expected.tokens, strict=False)
        at = next((i for i, (got, want) in enumerate(pairs) if got != want), None)
        return "the text has another length" if at is None else f"another text from token {at} on"
    if text != expected.text:
        return "equal tokens, but another text"
    if not trace.complete or trace.drained_s is None:
        return f"it did not come to its end: {trace.finish_reason}"
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write(log)
        file.flush()
        replayed = replay_log(Path(file.name))
    if replayed.difference or not replayed.released:
        return f"the event log does not replay: {replayed.difference}"
    return EQUAL


def figures(trace: Trace, log: str, met_stop_string: bool) -> Outcome:
    """What shows that speculation was at work; ``forks`` are runs with several branches of two tokens or more."""
    commands = (command for line in log.splitlines()[1:] for command in json.loads(line)["commands"])
    positions = [Counter(command["run"]["positions"]) for command in commands if command["type"] == "SubmitRun"]
    return {
        "tokens": len(trace.tokens),
        "distinct": len(set(trace.tokens)),
        "end": "stop string" if met_stop_string else str(trace.finish_reason),
        "verified": trace.drafted_verified,
        "accepted": trace.drafted_accepted,
        "void_spans": sum(span.void for span in trace.spans),
        "fates": dict(Counter(str(run.fate) for run in trace.runs)),
        "forks": sum(sorted(rows.values())[-2:-1] >= [2] for rows in positions),
    }


def run_campaign(
    numbers: Iterable[int],
    journal: Journal,
    progress: Callable[[str], None],
    jobs: int = 1,
    with_defect: str | None = None,
) -> list[Outcome]:
    """The outcomes of all combinations in ``numbers``; what ``journal`` has is not run again.

    ``jobs``: so many pipelines at a time, each driven by a process of its own, beyond one.
    """
    combinations = [draw_combination(number) for number in sorted(set(numbers))]
    keys = {one.number: journal_key(one, with_defect) for one in combinations}
    left = [one for one in combinations if keys[one.number] not in journal.finished]
    batches = [
        (with_defect, tuple(one.number for one in members)) for _, members in groupby(left, lambda one: one.pipeline)
    ]
    began = time.monotonic()
    for index, outcomes, error in _here(batches) if jobs == 1 else run_local(run_batch, batches, jobs):
        of = batches[index][1]
        for number, outcome in zip(
            of, outcomes or [{"verdict": f"the campaign broke: {error}"}] * len(of), strict=True
        ):
            journal.add(keys[number], outcome)
        bad = [number for number in of if journal.finished[keys[number]]["verdict"] != EQUAL]
        setup = _describe(draw_setup(of[0] // PER_PIPELINE))
        progress(f"{time.monotonic() - began:.0f} s: {setup}: {len(bad)} bad{' '.join(['', *map(str, bad)])}")
    return [{"number": number, **journal.finished[key]} for number, key in keys.items()]


Batch = tuple[str | None, tuple[int, ...]]
"""A defect, if any, and combinations that share a pipeline."""


def _here(batches: Sequence[Batch]) -> Iterator[Done]:
    return (attempt(run_batch, index, batch) for index, batch in enumerate(batches))


def run_batch(batch: Batch) -> list[Outcome]:
    """The outcomes; a combination that breaks the pipeline has its own, those after it a new one."""
    torch.set_num_threads(1)
    name, numbers = batch
    combinations, outcomes = [draw_combination(number) for number in numbers], list[Outcome]()
    with tempfile.TemporaryDirectory() as folder, defect(name):
        rig = Rig(draw_setup(combinations[0].pipeline), Path(folder))
        while left := combinations[len(outcomes) :]:
            asyncio.run(_until_it_breaks(rig, left, outcomes))
    return outcomes


async def _until_it_breaks(rig: Rig, work: Sequence[Combination], outcomes: list[Outcome]) -> None:
    """Adds the outcome of one combination of ``work`` or more."""
    wanted = len(outcomes) + len(work)
    try:
        async with running_pipeline(rig.plan()) as pipeline:
            for combination in work:
                expected, began = rig.expected(combination), time.monotonic()
                outcome = await generate(pipeline, rig, combination, expected)
                outcomes.append({**outcome, "seconds": round(time.monotonic() - began, 3)})
    except Exception as error:
        if len(outcomes) < wanted:
            outcomes.append({"verdict": f"{type(error).__name__}: {error}"})


def journal_key(combination: Combination, with_defect: str | None = None) -> str:
    """Names a combination with all that it consists of: what is drawn otherwise is run anew."""
    drawn = f"{asdict(draw_setup(combination.pipeline))} {asdict(combination)}"
    key = f"{combination.number} {hashlib.sha256(drawn.encode()).hexdigest()[:16]}"
    return f"{key} {with_defect}" if with_defect else key


def _describe(setup: Setup) -> str:
    stages = f"{len(setup.layers)} stage{'s' * (len(setup.layers) > 1)}"
    return f"pipeline {setup.number}: {setup.family}, {setup.dtype} ({setup.kernels}), {stages}, {setup.drafter}"
