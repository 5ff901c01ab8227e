"""Real processes of an emulated cluster are due when the simulator says: the same models, driven by a fake clock.

``Emulated`` is a perfect world around the paced parts, in which everything happens exactly when it is due: what is left
must be the simulation, to the nanosecond.
"""

import heapq
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build

from backends.emulation import (
    EmulatedDrafter,
    EmulatedStage,
    PacedDrafter,
    PacedHead,
    PacedStage,
    emulated_parts,
    from_bytes,
    to_bytes,
)
from backends.frames import Hop
from pipesim.errors import BadInputError
from pipesim.recorder import Recorder
from pipesim.scenario import Scenario
from pipesim.scheduling.commands import CancelRuns, RequestDraft, SubmitRun
from pipesim.scheduling.events import DraftReturned, GenerationStarted, RunReturned
from pipesim.scheduling.runs import Run
from pipesim.scheduling.tree import grow_tree
from pipesim.simulation.acceptance import make_truth
from pipesim.simulation.pipeline import simulate
from pipesim.trace import Trace


class Emulated:
    """One generation on the paced parts. A stage works on one frame, and looks again whenever it hears something."""

    def __init__(self, scenario: Scenario) -> None:
        stages, drafter = emulated_parts(scenario)
        self.truth = make_truth(scenario)
        self.head = PacedHead(scenario)
        self.stages = [PacedStage(from_bytes(EmulatedStage, to_bytes(part))) for part in stages]
        self.drafter = PacedDrafter(from_bytes(EmulatedDrafter, to_bytes(drafter)), len(self.truth.prompt))
        self.inboxes: list[deque[tuple[Run, Hop, bool]]] = [deque() for _ in stages]
        self.runs: list[Run | None] = [None] * len(stages)
        self.orders: deque[tuple[int, RequestDraft, int]] = deque()
        self.draft: tuple[int, Any, int] | None = None
        self.heard: list[tuple[int, int, Any]] = []
        self.agenda: list[tuple[int, int, Any]] = []
        self.now = self.count = 0
        names = [plan.name for plan in scenario.stages()]
        self.recorder = Recorder(scenario.scheduler(), scenario.seed, names, ticks_per_s=1e9)
        started = GenerationStarted(self.truth.prompt, scenario.workload.max_new_tokens, self.truth.stop_tokens)
        self.carry_out(started)
        while self.agenda:
            self.now, _, act = heapq.heappop(self.agenda)
            act()

    def at(self, time: int, act: Any) -> None:
        self.count += 1
        heapq.heappush(self.agenda, (max(time, self.now), self.count, act))

    def carry_out(self, event: Any) -> None:
        for command in self.recorder.handle(event, self.head.now):
            match command:
                case SubmitRun(run):
                    self.arrive(0, run, self.head.submit(run), False)
                case CancelRuns(run_ids):
                    for index, hop in enumerate(self.head.cancel(len(run_ids))):
                        self.stages[index].cancel(run_ids, hop)
                        self.look(index)
                case RequestDraft() as request:
                    number = self.drafter.order(self.head.request(request))
                    text = self.recorder.scheduler.generation.text
                    previous = request.path[-1] if request.path else text[request.frontier - 1]
                    self.orders.append((number, request, previous))
                    self.at(self.drafter.arrival(number), self.look_at_drafter)
                    self.look_at_drafter()

    def arrive(self, index: int, run: Run, hop: Hop, void: bool) -> None:
        self.inboxes[index].append((run, hop, void))
        self.at(hop.arrival, lambda: self.look(index))

    def look(self, index: int) -> None:
        stage = self.stages[index]
        if self.runs[index] is None and self.inboxes[index] and self.inboxes[index][0][1].arrival <= self.now:
            run, hop, void = self.inboxes[index].popleft()
            self.runs[index] = run
            stage.begin(run, hop, void)
        if (current := self.runs[index]) is None:
            return
        if stage.due()[0] > self.now:
            self.at(stage.due()[0], lambda: self.look(index))
            return
        rows = range(current.first_output_row, current.rows)
        begin, end, dead, out = stage.leave(len(rows))
        assert end == self.now, "nothing is late in a perfect world"
        if end > begin:
            self.recorder.stage_span(index, current.run_id, begin, end, dead)
        self.runs[index] = None
        if index + 1 < len(self.stages):
            self.arrive(index + 1, current, out, dead)
        else:
            told = tuple(self.truth.next(current.positions[row] + 1, current.tokens[row]) for row in rows)
            self.come_home("pipeline", out, RunReturned(current.run_id, None if dead else told))
        self.look(index)

    def look_at_drafter(self) -> None:
        if self.draft is None and self.orders and self.drafter.arrival(self.orders[0][0]) <= self.now:
            number, request, previous = self.orders.popleft()
            if not self.drafter.begin(number, request.frontier + len(request.path)):
                self.look_at_drafter()
                return

            def candidates(path: tuple[int, ...]) -> Any:
                depth = len(request.path) + len(path)
                return self.truth.candidates(request.frontier + depth, path[-1] if path else previous, depth + 1)

            limits = (request.max_nodes, request.branches, request.cutoff, request.split)
            tree, levels = grow_tree(candidates, *limits)
            self.draft = number, DraftReturned(request.request_id, tree), levels
        if self.draft is None:
            return
        number, event, levels = self.draft
        due, abandoned = self.drafter.due(number, levels)
        if due > self.now:
            self.at(due, self.look_at_drafter)
            return
        begin, end, home = self.drafter.leave(number, levels, len(event.tree.tokens))
        self.recorder.draft_span(event.request_id, begin, end, 0 if abandoned else len(event.tree.tokens))
        if home:
            self.come_home("drafter", home, event)
        self.draft = None
        self.look_at_drafter()

    def come_home(self, link: str, hop: Hop, event: Any) -> None:
        self.count += 1
        arrival = self.head.arrival(link, hop)
        heapq.heappush(self.heard, (arrival, self.count, event))
        self.at(arrival, self.listen)

    def listen(self) -> None:
        if not self.heard or self.heard[0][0] > self.now:
            return
        due = self.head.due(self.heard[0][0], isinstance(self.heard[0][2], DraftReturned))
        if due > self.now:
            self.at(due, self.listen)
            return
        _, _, event = heapq.heappop(self.heard)
        self.head.now = due
        self.carry_out(event)
        self.listen()


def story(trace: Trace) -> tuple[Any, ...]:
    """What a trace says of times and decisions."""
    emissions = [(one.time_s, one.tokens) for one in trace.emissions]
    drafts = [draft for draft in trace.drafts if draft.end_s > draft.start_s]  # not overtaken as it began
    return emissions, sorted(trace.spans, key=lambda span: (span.stage, span.run_id)), drafts, trace.runs


SLOW = "{kind: slow-stage, start_ms: 60, duration_ms: 200, stage: 1, factor: 2.5}"
FAULTS = f"faults=[{SLOW}, {{kind: partition, start_ms: 150, duration_ms: 40}}, {{kind: latency, start_ms: 300,"
FAULTS += " duration_ms: 100, extra_ms: 7}, {kind: bandwidth, start_ms: 20, duration_ms: 500, cap_gbps: 0.01}]"
DRAFTS = ["cluster.head.draft_overhead_ms=0.2", "cluster.drafter.request_ms=1"]
DRAFTS += ["cluster.drafter.kv_us_per_kilocell=9000"]
CLUSTERS = {
    "plain": [],
    "head": ["cluster.head.overhead_ms=0.7", "cluster.drafter.prefill_per_token_ms=3", *DRAFTS],
    "chance": ["cluster.links={latency_ms: 2, bandwidth_gbps: 0.05, jitter_ms: 1, loss: 0.02, retransmit_ms: 9}"],
    "profile": [
        "cluster.links.profile={points: [{at_ms: 0, latency_ms: 1}, {at_ms: 90, latency_ms: 6}], shape: ramps}"
    ],
    "faults": [FAULTS],
    "interface": ["cluster.devices=[{name: a, nic_gbps: 0.02}]", "cluster.head.device=a"],
}


@pytest.mark.parametrize("policy", ["autoregressive", "speculative", "pipeinfer"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_perfect_emulation_is_the_simulation(cluster: str, policy: str) -> None:
    for seed in range(3):
        scenario = build(*CLUSTERS[cluster], f"policy.name={policy}", f"seed={seed}", "cluster.drafter.level_ms=2.1")
        emulated, simulated = Emulated(scenario).recorder.trace(), simulate(scenario)
        assert story(emulated)[0] == story(simulated)[0]
        assert story(emulated)[1:] == story(simulated)[1:]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(1, 10**5)), min_size=1, max_size=20))
def test_a_sender_is_shaped_as_the_simulated_link(sends: list[tuple[int, int]]) -> None:
    scenario = build(*CLUSTERS["chance"], "model.hidden=500")
    part = from_bytes(EmulatedStage, to_bytes(emulated_parts(scenario)[0][0]))
    from pipesim.simulation.network import Network

    ours, theirs = part.out.model(), Network(scenario).data[1]
    for now, size in sorted(sends):
        assert ours.passage(now, size) == theirs.passage(now, size)


def test_what_processes_cannot_share_is_refused() -> None:
    shared = ["cluster.devices=[{name: a}]", "cluster.stages.0.device=a"]
    with pytest.raises(BadInputError, match="share cores of the device 'a'"):
        emulated_parts(build(*shared))
    with pytest.raises(BadInputError, match="share nic_gbps"):
        emulated_parts(build("cluster.devices=[{name: a, cores: 9, nic_gbps: 1}]", *shared[1:]))
    assert emulated_parts(build("cluster.devices=[{name: a, cores: 9}]", *shared[1:]))
