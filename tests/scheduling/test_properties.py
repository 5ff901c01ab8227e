"""The numbered invariants of the scheduler under random interleavings, drafts, cancellations and lost stages."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import VOCABULARY, World, plain_text

from pipesim.scheduling.commands import FinishReason
from pipesim.scheduling.events import DraftReturned, GenerationAborted, PipelineRestored, StageLost
from pipesim.scheduling.policy import Policy, make_policy
from pipesim.scheduling.runs import RunKind
from pipesim.scheduling.scheduler import Scheduler
from pipesim.scheduling.tree import DraftTree

probability = st.sampled_from([0.0, 0.2, 0.5])
policies = st.one_of(
    st.just(("autoregressive", {})),
    st.fixed_dictionaries(
        {
            "max_nodes": st.integers(1, 6),
            "branches": st.integers(1, 4),
            "cutoff": probability,
            "split": probability,
        }
    ).map(lambda s: ("speculative", s)),
    st.fixed_dictionaries(
        {
            "micro_batch": st.integers(1, 5),
            "branches": st.integers(1, 3),
            "partitions": st.integers(1, 6),
            "p_accept": probability,
            "p_split": probability,
            "p_recovery": probability,
            "p_decay": probability,
            "asynchronous": st.booleans(),
            "continuous": st.booleans(),
            "multibuffering": st.booleans(),
            "cancellation": st.booleans(),
            "always_canonical": st.booleans(),
            "calibrated": st.booleans(),
        }
    ).map(lambda s: ("pipeinfer", s)),
).map(lambda named: make_policy(*named))
tokens = st.integers(0, VOCABULARY - 1)
errors = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


class Interleavings(RuleBasedStateMachine):
    """The world's freedom: who comes first, what the drafter says, which cancellation arrives in time, what breaks."""

    @initialize(
        policy=policies,
        prompt=st.lists(tokens, min_size=1, max_size=11),
        new_tokens=st.integers(1, 24),
        stop=st.sets(tokens, max_size=1),
        spare_cells=st.one_of(st.none(), st.integers(0, 8)),
    )
    def start(
        self, policy: Policy, prompt: list[int], new_tokens: int, stop: set[int], spare_cells: int | None
    ) -> None:
        cells = None if spare_cells is None else len(prompt) + new_tokens + spare_cells
        self.policy, self.cells = policy, cells
        self.expected = plain_text(prompt, new_tokens, tuple(stop))
        self.world = World(policy, prompt, new_tokens, tuple(stop), kv_cells=cells)
        self.suspended = False
        self.aborted = False

    @precondition(lambda self: self.world.queued)
    @rule(in_time=st.booleans())
    def a_stage_computes(self, in_time: bool) -> None:
        self.world.compute(void_if_cancelled=in_time)

    @precondition(lambda self: self.world.computed)
    @rule()
    def a_run_returns(self) -> None:
        self.world.return_run()

    @precondition(lambda self: self.world.request is not None and not self.suspended)
    @rule(errors=errors)
    def a_draft_returns(self, errors: list[int]) -> None:
        self.world.answer_draft(errors=errors)

    @precondition(lambda self: self.world.request is not None and not self.suspended)
    @rule(refused=probability)
    def an_empty_draft_returns(self, refused: float) -> None:
        self.world.answer_draft(DraftTree(refused=refused))

    @rule(tree_token=tokens)
    def an_abandoned_draft_returns_late(self, tree_token: int) -> None:
        late = DraftTree((tree_token,), (-1,), (0.9,))
        open_request = self.world.request.request_id if self.world.request else -1
        stale_id = open_request - 1 if open_request > 0 else 10**9
        if not self.world.released and self.world.scheduler.generation.draft_id != stale_id:
            assert not self.world.feed(DraftReturned(stale_id, late)), "a stale draft changes nothing"

    @precondition(lambda self: not self.suspended and not self.world.finish)
    @rule()
    def a_stage_is_lost(self) -> None:
        world = self.world
        world.feed(StageLost(stage=1, reason="test"))
        world.queued.clear()
        world.computed.clear()
        world.request = None
        self.suspended = True

    @precondition(lambda self: self.suspended)
    @rule()
    def the_pipeline_is_restored(self) -> None:
        assert self.world.cells is not None
        self.world.cells.clear()
        self.suspended = False
        self.world.feed(PipelineRestored())

    @precondition(lambda self: not self.world.finish and len(self.world.emitted) > 8)
    @rule()
    def the_user_aborts(self) -> None:
        self.aborted = True
        self.world.feed(GenerationAborted("test"))

    @invariant()
    def only_committed_text_is_emitted_in_order(self) -> None:
        if hasattr(self, "world"):
            assert self.world.emitted == self.expected[: len(self.world.emitted)]

    @invariant()
    def nothing_hangs(self) -> None:
        if hasattr(self, "world") and not self.suspended and not self.world.released:
            assert self.world.queued or self.world.computed or self.world.request

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if self.suspended:
            self.the_pipeline_is_restored()
        world.run_to_the_end(errors=[0, 1])
        if not self.aborted:
            assert world.emitted == self.expected
            assert world.finish is not None
            assert world.finish.reason is not FinishReason.ABORTED
        assert set(world.outcomes) == {run.run_id for run in world.submitted}, "every run ended once"
        generation = world.scheduler.generation
        assert generation.cells.free == generation.cells.total
        assert generation.partitions.free == generation.partitions.total
        replayed = Scheduler(self.policy, kv_cells=self.cells, prefill_chunk=4, prefill_window=3)
        for now, (event, commands) in enumerate(world.log):
            assert replayed.handle(event, float(now)) == commands


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=500, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@given(policy=policies, prompt=st.lists(tokens, min_size=1, max_size=20), wrong=errors, new=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_text_equals_autoregressive_text(policy: Policy, prompt: list[int], wrong: list[int], new: int) -> None:
    world = World(policy, prompt, new)
    assert world.run_to_the_end(errors=wrong) == plain_text(prompt, new)


@pytest.mark.parametrize("name", ["speculative", "pipeinfer"])
def test_a_perfect_drafter_leaves_few_canonical_runs(name: str) -> None:
    world = World(make_policy(name), [1, 2, 3], 30)
    world.run_to_the_end()
    assert world.scheduler.statistics.drafted_accepted == world.scheduler.statistics.drafted_verified > 15
    assert sum(run.kind is RunKind.CANONICAL for run in world.submitted) <= 2
