"""What every policy shares: prefill, the end of a generation, recovery, and refusing nonsense."""

import pytest
from world import World, language_model, plain_text

from pipesim.errors import BadInputError, InvariantError
from pipesim.scheduling.commands import FinishReason, Outcome, SubmitRun
from pipesim.scheduling.events import (
    GenerationAborted,
    GenerationStarted,
    PipelineRestored,
    RunReturned,
    StageLost,
    StopStringMet,
)
from pipesim.scheduling.generation import Generation
from pipesim.scheduling.policies.autoregressive import Autoregressive
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.scheduling.policies.speculative import Speculative
from pipesim.scheduling.policy import Policy
from pipesim.scheduling.runs import RunKind
from pipesim.scheduling.scheduler import Scheduler
from pipesim.scheduling.speculation import Node
from pipesim.scheduling.tree import DraftTree

PROMPT = [3, 1, 4, 1, 0, 2, 2, 4, 3, 0]


def test_prefill_comes_in_chunks_and_only_the_last_row_is_predicted() -> None:
    world = World(Autoregressive(), PROMPT, 4, prefill_chunk=4)
    runs = list(world.submitted)
    assert [run.positions for run in runs] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [run.outputs for run in runs] == [0, 0, 1]


def test_prefill_keeps_a_bounded_number_of_chunks_in_flight() -> None:
    world = World(Autoregressive(), PROMPT * 5, 1, prefill_chunk=4)
    assert len(world.submitted) == 3
    world.compute()
    world.return_run()
    assert len(world.submitted) == 4


@pytest.mark.parametrize("policy", [Autoregressive(), Speculative(), PipeInfer()])
def test_a_stop_token_ends_the_text_and_is_its_last_token(policy: Policy) -> None:
    text = plain_text(PROMPT, 30)
    stop = text[6]
    world = World(policy, PROMPT, 30, stop=(stop,))
    assert world.run_to_the_end(errors=[0, 0, 2]) == text[: text.index(stop) + 1]
    assert world.finish is not None
    assert world.finish.reason is FinishReason.STOP


def test_synchronous_speculation_has_one_run_in_flight_and_it_starts_with_the_newest_token() -> None:
    world = World(Speculative(max_nodes=3), PROMPT, 20, prefill_chunk=64)
    world.compute()
    world.return_run()
    assert not world.queued, "nothing leaves before the draft is there"
    world.answer_draft()
    assert [len(world.queued), world.submitted[-1].rows] == [1, 4]
    assert world.submitted[-1].tokens[0] == world.text[-1]
    assert world.request is None


def test_rows_of_a_synchronous_run_are_useful_as_far_as_its_draft_is_right() -> None:
    world = World(Speculative(max_nodes=3), PROMPT, 20, prefill_chunk=64)
    world.compute()
    world.return_run()
    world.answer_draft(errors=[0, 0, 1])
    world.compute()
    world.return_run()
    assert world.outcomes[1].useful_rows == 3, "the newest token and two right drafts"


def test_synchronous_speculation_without_a_draft_decodes_plainly() -> None:
    world = World(Speculative(), PROMPT, 20, prefill_chunk=64)
    world.compute()
    world.return_run()
    world.answer_draft(DraftTree())
    assert world.submitted[-1].kind is RunKind.CANONICAL


def test_a_stop_string_ends_the_generation_like_a_stop_token() -> None:
    world = World(PipeInfer(), PROMPT, 20, prefill_chunk=64)
    world.compute()
    world.return_run()
    world.answer_draft()
    with pytest.raises(InvariantError, match="after 2 tokens"):
        world.feed(StopStringMet(2))
    world.feed(StopStringMet(1))
    assert world.finish is not None
    assert world.finish.reason is FinishReason.STOP
    world.run_to_the_end()
    world.feed(StopStringMet(1))
    assert world.released


def test_an_aborted_generation_calls_off_and_drains_what_is_in_flight() -> None:
    world = World(PipeInfer(), PROMPT, 20, prefill_chunk=64)
    world.compute()
    world.return_run()
    world.answer_draft()
    world.feed(GenerationAborted("Ctrl-C"))
    assert world.finish is not None
    assert world.finish.reason is FinishReason.ABORTED
    assert world.cancelled == {1, 2}
    assert not world.released
    world.run_to_the_end()
    assert world.outcome_counts() == {
        Outcome.ACCEPTED: 1,
        Outcome.REJECTED: 0,
        Outcome.CANCELLED: 0,
        Outcome.DRAINED: 2,
    }


def test_after_a_lost_stage_the_text_is_prefilled_in_the_rows_that_made_it() -> None:
    world = World(Autoregressive(), PROMPT, 12, prefill_chunk=4)
    while len(world.emitted) < 6:
        world.compute()
        world.return_run()
    world.feed(StageLost(stage=2, reason="killed"))
    world.queued.clear()
    assert world.cells is not None
    world.cells.clear()
    commands = world.feed(PipelineRestored())
    runs = [c.run for c in commands if isinstance(c, SubmitRun)]
    assert {run.epoch for run in runs} == {1}
    world.run_to_the_end()
    replayed = [run for run in world.submitted if run.epoch == 1][:5]
    assert [(run.kind, run.rows) for run in replayed] == [
        (RunKind.PREFILL, 4),
        (RunKind.PREFILL, 4),
        (RunKind.PREFILL, 2),
        (RunKind.CANONICAL, 4),
        (RunKind.CANONICAL, 2),
    ]
    assert world.emitted == plain_text(PROMPT, 12)


def test_rows_count_as_useful_once_even_if_a_lost_stage_makes_them_come_again() -> None:
    for lost_after in range(5):
        world = World(Autoregressive(), PROMPT, 6, prefill_chunk=4)
        for _ in range(lost_after):
            world.compute()
            world.return_run()
        world.feed(StageLost(stage=0, reason="killed"))
        world.queued.clear()
        assert world.cells is not None
        world.cells.clear()
        world.feed(PipelineRestored())
        world.run_to_the_end()
        assert sum(end.useful_rows for end in world.outcomes.values()) == len(PROMPT) + 6 - 1


def test_all_runner_ups_of_a_verified_position_count_as_verified() -> None:
    world = World(Speculative(max_nodes=2, branches=2, split=0.0), PROMPT, 20, prefill_chunk=64)
    world.compute()
    world.return_run()
    world.answer_draft(errors=[1])
    world.compute()
    world.return_run()
    statistics = world.scheduler.statistics
    assert (statistics.drafted_verified, statistics.drafted_accepted) == (2, 1)


@pytest.mark.parametrize("field", ["kv_cells", "prefill_chunk", "prefill_window"])
def test_limits_of_a_scheduler_are_at_least_one(field: str) -> None:
    with pytest.raises(BadInputError, match=f"{field}: 0 is out of range"):
        Scheduler(Autoregressive(), **{field: 0})


def test_the_whole_text_fits_exactly_its_cells() -> None:
    world = World(PipeInfer(partitions=4), PROMPT, 10, kv_cells=len(PROMPT) + 10)
    assert world.run_to_the_end() == plain_text(PROMPT, 10)


def test_too_few_cells_are_refused() -> None:
    with pytest.raises(BadInputError, match="kv_cells: 12 cells cannot hold prompt \\+ max_new_tokens = 20"):
        World(Autoregressive(), PROMPT, 10, kv_cells=12)


@pytest.mark.parametrize(("prompt", "new"), [([], 3), ([1], 0)])
def test_an_empty_generation_is_refused(prompt: list[int], new: int) -> None:
    with pytest.raises(BadInputError, match="at least one token"):
        World(Autoregressive(), prompt, new)


def started() -> Scheduler:
    scheduler = Scheduler(Autoregressive())
    scheduler.handle(GenerationStarted((1, 2), 5), 1.0)
    return scheduler


@pytest.mark.parametrize(
    ("event", "now", "message"),
    [
        (RunReturned(1, (0,)), 2.0, "run 1 returned, but the oldest in flight is 0"),
        (RunReturned(0, None), 2.0, "was not cancelled and owes 1, but brought a void frame"),
        (RunReturned(0, (1, 2)), 2.0, "owes 1, but brought 2 predictions"),
        (RunReturned(0, (1,)), 0.5, "the clock ran back"),
        (RunReturned(0, (1,)), float("nan"), "the clock ran back"),
        (GenerationStarted((1,), 1), 2.0, "has started already"),
    ],
)
def test_events_that_cannot_be_are_refused(event: RunReturned, now: float, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        started().handle(event, now)


def test_a_policy_that_leaves_nothing_in_flight_is_a_loud_error() -> None:
    class Idle(Autoregressive):
        def decide(self, generation: object) -> None:
            pass

    scheduler = Scheduler(Idle())
    scheduler.handle(GenerationStarted((1, 2), 5), 0.0)
    with pytest.raises(InvariantError, match="left nothing in flight at frontier 3"):
        scheduler.handle(RunReturned(0, (1,)), 1.0)


def test_arithmetic_that_is_not_exact_is_noticed_where_a_run_repeats_known_text() -> None:
    world = World(PipeInfer(always_canonical=True, partitions=2, micro_batch=2), PROMPT, 60)
    with pytest.raises(InvariantError, match="arithmetic is not exact"):  # noqa: PT012
        while True:
            if world.request is not None:
                world.answer_draft()
            elif world.queued:
                world.compute()
            else:
                run, predictions = world.computed.popleft()
                if run.kind is RunKind.CANONICAL and run.sequences == (1,) and predictions is not None:
                    predictions = ((predictions[0] + 1) % 5,)
                world.feed(RunReturned(run.run_id, predictions))


def test_the_world_computes_what_it_should() -> None:
    assert plain_text([1], 2) == [language_model([1]), language_model([1, language_model([1])])]


class Careless(Speculative):
    """Breaks the rules of the moves in the way that ``fault`` says."""

    fault = ""

    def decide(self, generation: Generation) -> None:
        if self.fault == "asks for too much" and generation.root.run is None:
            generation.request_draft(generation.root, self.max_nodes, self.branches + 1, 0.0, 0.0)
        super().decide(generation)

    def draft_returned(self, generation: Generation, tip: Node, tree: DraftTree) -> None:
        if self.fault == "drafts twice":
            tip.add_child(tree.tokens[0])
        if self.fault == "uses a dead tip":
            tip.alive = False
        super().draft_returned(generation, tip, tree)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("asks for too much", "asked for 4 tokens on 2 branches"),
        ("drafts twice", "was drafted twice at position"),
        ("uses a dead tip", "below a dead token"),
    ],
)
def test_a_policy_that_breaks_the_rules_of_the_moves_is_told_so(fault: str, message: str) -> None:
    policy = Careless()
    object.__setattr__(policy, "fault", fault)
    world = World(policy, PROMPT, 20, prefill_chunk=64)
    world.compute()
    with pytest.raises(InvariantError, match=message):  # noqa: PT012
        world.return_run()
        world.answer_draft()
