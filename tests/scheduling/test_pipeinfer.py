"""PipeInfer's mechanisms, one by one, on a world that is driven by hand."""

from dataclasses import replace

import pytest
from world import World, language_model, plain_text

from pipesim.scheduling.commands import CancelRuns, Outcome, RequestDraft, SubmitRun
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.scheduling.runs import Run, RunKind, SequenceCopy
from pipesim.scheduling.tree import DraftTree

PROMPT = [1, 2, 3]
TRUTH = plain_text(PROMPT, 40)


def started(policy: PipeInfer, new_tokens: int = 40) -> World:
    """A world in which the first token was just committed."""
    world = World(policy, PROMPT, new_tokens)
    world.compute()
    world.return_run()
    return world


def wrong(token: int) -> int:
    return (token + 1) % 5


def chain(*tokens: int) -> DraftTree:
    return DraftTree(tokens, tuple(range(-1, len(tokens) - 1)), (0.9,) * len(tokens))


def kinds(world: World) -> list[RunKind]:
    return [run.kind for run in world.submitted]


def test_asynchronous_speculation_sends_the_first_token_and_asks_for_a_draft_at_once() -> None:
    world = started(PipeInfer())
    assert kinds(world) == [RunKind.PREFILL, RunKind.CANONICAL]
    assert world.submitted[1].tokens == (TRUTH[0],)
    assert world.request is not None
    assert world.request.path == ()


def test_without_asynchronous_speculation_the_first_token_waits_for_its_draft() -> None:
    world = started(PipeInfer(asynchronous=False))
    assert kinds(world) == [RunKind.PREFILL]
    world.answer_draft(chain(*TRUTH[1:4]))
    assert world.submitted[1].tokens == tuple(TRUTH[:4])


def test_continuous_speculation_drafts_on_while_runs_are_in_flight() -> None:
    world = started(PipeInfer(micro_batch=2))
    world.answer_draft(chain(*TRUTH[1:3]))
    assert world.request is not None
    assert world.request.path == tuple(TRUTH[1:3]), "the chain goes on from the end of branch 0"


def test_without_continuous_speculation_one_micro_batch_follows_each_commit() -> None:
    world = started(PipeInfer(micro_batch=2, continuous=False))
    world.answer_draft(chain(*TRUTH[1:3]))
    assert world.request is None
    world.compute()
    world.return_run()
    assert world.request is not None


def test_look_ahead_is_bounded_by_the_partitions() -> None:
    world = started(PipeInfer(micro_batch=1, partitions=3))
    while world.request is not None:
        world.answer_draft()
    assert kinds(world).count(RunKind.SPECULATIVE) == 3


def test_without_multibuffering_a_speculative_run_comes_home_before_the_next_one_leaves() -> None:
    world = started(PipeInfer(multibuffering=False))
    world.answer_draft()
    assert world.request is None
    for _ in range(2):  # the canonical run, then the speculative one
        assert kinds(world).count(RunKind.SPECULATIVE) == 1
        world.compute()
        world.return_run()
    assert world.request is not None


def test_a_later_micro_batch_copies_the_path_from_the_partition_of_the_earlier_one() -> None:
    world = started(PipeInfer(micro_batch=2))
    world.answer_draft()
    world.answer_draft()
    first, second = world.submitted[2:4]
    copies = [op for op in second.kv_operations if isinstance(op, SequenceCopy)]
    assert [(1 << copy.source) & first.sequences[-1] for copy in copies] == [first.sequences[-1]]
    assert copies[0].targets & second.sequences[0]
    assert not first.sequences[0] & second.sequences[0]


def mispredicted(policy: PipeInfer) -> World:
    """Two micro-batches in flight on a wrong first draft; the canonical run has just contradicted them."""
    world = started(policy)
    world.answer_draft(chain(wrong(TRUTH[1]), 0))
    world.answer_draft(chain(0, 0))
    world.compute()
    world.return_run()
    return world


def test_runs_built_on_a_rejected_token_are_cancelled() -> None:
    world = mispredicted(PipeInfer(micro_batch=2))
    assert world.cancelled == {2, 3}


def test_the_corrected_token_leaves_before_any_new_speculation() -> None:
    world = mispredicted(PipeInfer(micro_batch=2))
    moves = [c for c in world.log[-1][1] if isinstance(c, CancelRuns | SubmitRun | RequestDraft)]
    assert [type(move) for move in moves] == [CancelRuns, SubmitRun, RequestDraft]
    assert isinstance(moves[1], SubmitRun)
    assert moves[1].run.tokens == (TRUTH[1],)


def test_without_cancellation_dead_runs_are_computed_and_rejected() -> None:
    world = mispredicted(PipeInfer(micro_batch=2, cancellation=False, partitions=2))
    assert not world.cancelled
    for _ in range(2):
        world.compute()
        world.return_run()
    assert [world.outcomes[run_id].outcome for run_id in (2, 3)] == [Outcome.REJECTED] * 2


def test_canonical_runs_are_never_cancelled_before_the_end() -> None:
    world = World(PipeInfer(micro_batch=2, always_canonical=True), PROMPT, 40)
    while world.finish is None:
        if world.request is not None:
            world.answer_draft(errors=[0, 0, 1])
        elif world.queued:
            world.compute()
        else:
            assert not world.cancelled & {r.run_id for r in world.submitted if r.kind is not RunKind.SPECULATIVE}
            world.return_run()


def test_a_run_lives_while_any_of_its_branches_agrees() -> None:
    world = started(PipeInfer(micro_batch=4, branches=2))
    tree = DraftTree((wrong(TRUTH[1]), TRUTH[1], 0, TRUTH[2]), (-1, -1, 0, 1), (0.5, 0.4, 0.5, 0.5))
    world.answer_draft(tree)
    world.compute()
    world.return_run()
    assert 2 not in world.cancelled, "branch 1 agrees with the text"
    assert kinds(world).count(RunKind.CANONICAL) == 1, "the committed token is in flight already"
    while 2 not in world.outcomes:
        world.compute()
        world.return_run()
    assert world.outcomes[2].outcome is Outcome.ACCEPTED
    assert world.outcomes[2].useful_rows == 2
    assert world.emitted == TRUTH[:4]


def test_after_a_branch_died_the_chain_goes_on_from_the_surviving_one() -> None:
    world = started(PipeInfer(micro_batch=4, branches=2, partitions=2))
    world.answer_draft(DraftTree((wrong(TRUTH[1]), TRUTH[1], 0, TRUTH[2]), (-1, -1, 0, 1), (0.5, 0.4, 0.5, 0.5)))
    assert world.request is not None
    assert world.request.path == (wrong(TRUTH[1]), 0)
    world.compute()
    world.return_run()
    assert world.request.path == (TRUTH[2],)


def test_cells_of_a_losing_branch_are_gone_when_its_partition_is_used_again() -> None:
    world = started(PipeInfer(micro_batch=4, branches=2, partitions=2))
    loser = wrong(TRUTH[1])
    world.answer_draft(DraftTree((loser, TRUTH[1], 0, 0), (-1, -1, 0, 2), (0.5, 0.4, 0.5, 0.5)))
    world.compute()
    world.return_run()  # the short branch wins, its run is still in flight
    world.answer_draft(chain(*TRUTH[2:4]))
    world.compute()
    world.return_run()  # its partition is free again, the longer branch lost
    world.answer_draft(chain(*TRUTH[4:6]))
    assert world.submitted[-1].sequences[0] & world.submitted[2].sequences[0], "the same partition"
    world.compute()
    world.compute()  # a row that saw two cells at one position would raise here


def test_where_cells_are_scarce_a_redundant_run_leaves_them_to_the_draft_on_its_way() -> None:
    policy = PipeInfer(always_canonical=True, micro_batch=4, partitions=4)
    for spare in range(8):
        world = World(policy, PROMPT, 12, kv_cells=len(PROMPT) + 12 + spare)
        assert world.run_to_the_end(errors=[0, 0, 0, 1]) == plain_text(PROMPT, 12)


@pytest.mark.parametrize("always", [False, True])
def test_always_canonical_runs_the_newest_token_even_if_it_is_in_flight(always: bool) -> None:
    world = started(PipeInfer(always_canonical=always))
    world.answer_draft()
    world.compute()
    world.return_run()
    newest = [run for run in world.submitted if run.tokens == (TRUTH[1],) and run.kind is RunKind.CANONICAL]
    assert len(newest) == always


def test_a_redundant_canonical_run_is_accepted_but_useless() -> None:
    world = World(PipeInfer(always_canonical=True, micro_batch=2, partitions=2), PROMPT, 60)
    world.run_to_the_end()
    redundant = [
        run
        for run in world.submitted
        if run.kind is RunKind.CANONICAL and world.outcomes[run.run_id].outcome is Outcome.ACCEPTED
        if not world.outcomes[run.run_id].useful_rows
    ]
    assert redundant


def test_recovery_raises_the_bar_with_each_micro_batch_and_a_commit_resets_it() -> None:
    world = started(PipeInfer(p_accept=0.1, p_split=0.3, p_recovery=0.2, micro_batch=1))
    bars = []
    for _ in range(3):
        assert world.request is not None
        bars.append(world.request.cutoff)
        assert world.request.split == pytest.approx(world.request.cutoff + 0.2), "the bar for a fork moves along"
        world.answer_draft(chain(TRUTH[len(bars)]))
    world.compute()
    world.return_run()
    world.answer_draft(chain(TRUTH[4]))  # to the request that was open before the commit
    assert world.request is not None
    assert bars == pytest.approx([0.1, 0.3, 0.5])
    assert world.request.cutoff == pytest.approx(0.3), "one micro-batch since the commit"


def test_speculation_stops_where_the_bar_reaches_one() -> None:
    world = started(PipeInfer(p_accept=0.5, p_recovery=0.5, micro_batch=1))
    world.answer_draft(chain(TRUTH[1]))
    assert world.request is None


def test_decay_lowers_the_bar_after_an_empty_draft() -> None:
    world = started(PipeInfer(p_accept=0.8, p_decay=0.3))
    world.answer_draft(DraftTree(refused=0.4))
    assert world.request is not None
    assert world.request.cutoff == pytest.approx(0.5)


def decoded(policy: PipeInfer, errors: list[int]) -> World:
    world = World(policy, PROMPT, 200)
    world.run_to_the_end(errors)
    return world


def speculative_runs(world: World) -> list[int]:
    return [run.positions[0] for run in world.submitted if run.kind is RunKind.SPECULATIVE]


def test_a_drafter_that_is_never_right_is_given_up_but_tried_now_and_then() -> None:
    believed = speculative_runs(decoded(PipeInfer(micro_batch=1), errors=[1]))
    tried = speculative_runs(decoded(PipeInfer(micro_batch=1, calibrated=True), errors=[1]))
    assert 0 < len(tried) < 0.3 * len(believed)
    assert max(tried) > 150, "what a drafter did long ago does not count for ever"


def test_a_drafter_that_keeps_what_it_promises_is_believed() -> None:
    plain, calibrated = (decoded(PipeInfer(calibrated=on), errors=[0]) for on in (False, True))
    assert speculative_runs(calibrated) == speculative_runs(plain)
    assert calibrated.scheduler.generation.trust > 1, "it said 0.6 and was always right"


def test_confidences_are_taken_for_what_they_have_proven_to_be_worth() -> None:
    world = started(PipeInfer(p_accept=0.3, p_split=0.4, micro_batch=1, calibrated=True))
    world.answer_draft(DraftTree((wrong(TRUTH[1]),), (-1,), (0.5,)))
    world.compute()
    world.return_run()
    assert world.scheduler.generation.trust == pytest.approx(1 / 1.5)
    assert world.request is not None
    assert (world.request.cutoff, world.request.split) == pytest.approx((0.45, 0.6))


@pytest.mark.parametrize("policy", [PipeInfer(), PipeInfer(p_decay=0.1)])
def test_a_drafter_without_any_candidate_is_asked_once_per_commit(policy: PipeInfer) -> None:
    world = started(policy)
    world.answer_draft(DraftTree())
    assert world.request is None
    world.compute()
    world.return_run()
    assert world.request is not None


def overtaken(policy: PipeInfer) -> World:
    """The draft that was asked for after the first token is still under way when the second one is committed."""
    world = started(policy)
    world.compute()
    world.return_run()
    assert world.scheduler.generation.overtaken == (TRUTH[1],)
    return world


def test_a_late_draft_that_agrees_with_the_text_loses_what_is_known_and_is_used() -> None:
    world = overtaken(PipeInfer())
    assert world.request is not None
    assert world.request.frontier == len(PROMPT) + 1, "nobody asked anew"
    world.answer_draft(chain(*TRUTH[1:4]))
    assert world.submitted[-1].tokens == tuple(TRUTH[2:4])
    assert world.submitted[-1].positions == (len(PROMPT) + 2, len(PROMPT) + 3)


def test_a_late_draft_that_contradicts_the_text_is_replaced_by_a_request_from_the_new_text() -> None:
    world = overtaken(PipeInfer())
    world.answer_draft(chain(wrong(TRUTH[1]), 0))
    assert kinds(world).count(RunKind.SPECULATIVE) == 0
    assert world.request is not None
    assert world.request.frontier == len(PROMPT) + 2


def test_a_draft_that_can_only_hold_what_is_known_is_not_waited_for() -> None:
    world = started(PipeInfer(micro_batch=1))
    old = world.request
    assert old is not None
    world.compute()
    world.return_run()
    assert world.request is not None
    assert world.request.request_id > old.request_id
    world.request = replace(world.request, request_id=old.request_id)
    assert not world.answer_draft(chain(TRUTH[1]))


def test_a_draft_below_a_contradicted_token_is_replaced_by_a_request_from_the_new_text() -> None:
    world = started(PipeInfer(micro_batch=2))
    world.answer_draft(chain(wrong(TRUTH[1]), 0))
    old = world.request
    assert old is not None
    assert old.path == (wrong(TRUTH[1]), 0)
    world.compute()
    world.return_run()
    assert world.request is not None
    assert world.request.request_id > old.request_id
    assert world.request.path == ()


def test_no_token_is_drafted_whose_successor_lies_beyond_the_end() -> None:
    world = World(PipeInfer(micro_batch=5), PROMPT, 6)
    world.run_to_the_end()
    drafted: list[Run] = [run for run in world.submitted if run.kind is RunKind.SPECULATIVE]
    assert max(run.positions[-1] for run in drafted) == len(PROMPT) + 6 - 2


def test_the_world_is_a_fair_judge() -> None:
    """The language model depends on every visible token and on their order."""
    assert len({language_model([a, b, 3]) for a in range(5) for b in range(5)}) == 5
