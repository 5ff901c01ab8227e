"""Drafters propose what they promise: look-up, a model, the target without some layers, planted text."""

import functools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.control import Planted
from backends.drafter_server import plant
from backends.drafting.base import WIDTH, Context, Drafter, never
from backends.drafting.layer_skip import LayerSkipDrafter, default_skipped
from backends.drafting.model import ModelDrafter
from backends.drafting.ngram import NgramDrafter
from backends.drafting.planted import PlantedDrafter
from backends.models.loading import ModelSource
from backends.models.stage_model import StageModel
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from pipesim.errors import BadInputError, InvariantError
from pipesim.scenario import IidAcceptance, MarkovAcceptance
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.tree import Candidate, DraftTree, grow_tree
from pipesim.simulation.acceptance import DrawnTruth


def request(
    frontier: int, path: Sequence[int] = (), nodes: int = 4, branches: int = 1, cutoff: float = 0.0, split: float = 1.0
) -> RequestDraft:
    return RequestDraft(1, frontier, tuple(path), nodes, branches, cutoff, split)


def draft(drafter: Drafter, asked: RequestDraft) -> DraftTree:
    tree = drafter.draft(asked, lambda: False)
    assert tree is not None
    return tree


# look-up


def test_ngram_continues_as_the_longest_match_did() -> None:
    drafter = NgramDrafter(longest=2)
    drafter.start([1, 2, 3, 9, 2, 4, 1, 2], Sampling())
    assert draft(drafter, request(8, nodes=3)).tokens == (3, 9, 2)  # (1, 2) -> 3, although (2,) -> 4 is newer


def test_ngram_ranks_longer_matches_first_then_newer_ones() -> None:
    drafter = NgramDrafter()
    drafter.start([7, 1, 7, 2, 7, 1, 7, 3, 7], Sampling())
    assert [token for token, _ in drafter.candidates_after(drafter.text, ())] == [3, 1, 2]
    drafter.start([5, 7, 1, 7, 2, 7, 3, 5, 7], Sampling())
    assert drafter.candidates_after(drafter.text, ())[0][0] == 1, "only 1 followed (5, 7)"


def test_ngram_is_as_confident_as_its_matches_of_that_length_were_right_lately() -> None:
    drafter = NgramDrafter()

    def confidence() -> float:
        return drafter.candidates_after(drafter.text, ())[0][1]

    drafter.start([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], Sampling())
    unproven = confidence()
    drafter.extend([3, 4, 5, 6, 7, 8, 1, 2])
    proven = confidence()
    assert proven > unproven
    for token in range(10, 60, 2):
        drafter.extend([1, 2, 3, token])  # it goes another way each time
    drafter.extend([1, 2, 3])
    assert confidence() < 0.2
    assert all(0 < one[1] <= 1 for one in drafter.candidates_after(drafter.text, ()))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(1, 4))
def test_ngram_candidates_rank_by_confidence_and_share_at_most_one(text: list[int], longest: int) -> None:
    drafter = NgramDrafter(longest)
    drafter.start(text, Sampling())
    confidences = [confidence for _, confidence in drafter.candidates_after(text, ())]
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) <= 1


def test_ngram_learns_what_is_committed_and_forgets_with_a_new_text() -> None:
    drafter = NgramDrafter()
    drafter.start([5, 6], Sampling())
    assert draft(drafter, request(2)) == DraftTree()
    drafter.extend([7, 5, 6])
    assert draft(drafter, request(5, nodes=1)).tokens == (7,)
    assert draft(drafter, request(3, path=[5], nodes=1)).tokens == (6,)
    drafter.start([5, 6], Sampling())
    assert draft(drafter, request(2)) == DraftTree()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(1, 4))
def test_ngram_finds_what_a_scan_of_the_text_finds(text: list[int], longest: int) -> None:
    drafter = NgramDrafter(longest)
    drafter.start(text, Sampling())
    expected = None
    for length in range(min(longest, len(text) - 1), 0, -1):
        followers = [text[i + length] for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
        if followers:
            expected = followers[-1]
            break
    candidates = drafter.candidates_after(text, ())
    assert (candidates[0][0] if candidates else None) == expected


# planted


def test_planted_text_is_right_as_often_as_drawn_whatever_the_order_of_asking() -> None:
    known = [random.Random(i).randrange(50) for i in range(4000)]

    def draw(position: int) -> list[tuple[bool, float]]:
        return [(random.Random(f"3:{position}").random() < 0.7, 0.9)]

    drafter = PlantedDrafter(known, 50, draw)
    forward = [drafter.candidates_after(known[:i], ())[0][0] for i in range(4000)]
    assert abs(sum(a == b for a, b in zip(forward, known, strict=True)) / 4000 - 0.7) < 0.03
    backward = [drafter.candidates_after(known[: i - 2], (0, 0))[0][0] for i in range(3999, 1, -1)]
    assert backward[::-1] == forward[2:]
    assert drafter.candidates_after(known, ()) == []


@pytest.mark.parametrize(
    "acceptance",
    [
        IidAcceptance(kind="iid", rate=0.6),
        MarkovAcceptance(kind="markov", good_rate=0.9, bad_rate=0.2, good_tokens=6, bad_tokens=4),
    ],
    ids=lambda one: one.kind,
)
def test_planted_text_is_right_where_the_simulated_one_is(acceptance: IidAcceptance | MarkovAcceptance) -> None:
    text, seed = list(range(50, 150)), 7
    drafter = plant(Planted(tuple(text), acceptance.model_dump()), seed, vocabulary=1000)
    world = DrawnTruth(acceptance, seed, prompt_tokens=0, vocabulary=1000)
    firsts = []
    for at in range(1, 100):
        planted = [(token == text[at], confidence) for token, confidence in drafter.candidates_after(text[:at], ())]
        simulated = [(token == world.next(at, 0), confidence) for token, confidence in world.candidates(at, 0, depth=1)]
        assert planted == simulated
        firsts.append(planted[0][0])
    assert {*firsts} == {True, False}


def test_planted_runner_ups_differ_from_the_truth_and_from_each_other() -> None:
    draws = [(False, 0.6), (True, 0.3), (False, 0.1)]
    candidates = PlantedDrafter([4, 4], 5, lambda position: draws).candidates_after([4], ())
    assert [token == 4 for token, _ in candidates] == [False, True, False]
    assert len({token for token, _ in candidates}) == 3


# models


@pytest.fixture
def whole(tiny: ModelSource) -> StageModel:
    return StageModel(tiny, 0, 4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, seed=5)], ids=["greedy", "noise"])
def test_a_model_that_drafts_for_itself_is_always_right(whole: StageModel, sampling: Sampling) -> None:
    prompt = [3, 14, 15, 92, 65]
    text = generate_in_one_process(whole, prompt, 20, sampling=sampling)
    drafter = ModelDrafter(whole, max_context=64)
    drafter.start(prompt, sampling)
    assert list(draft(drafter, request(5, nodes=6)).tokens) == text[:6]
    assert list(draft(drafter, request(5, path=text[:6], nodes=6)).tokens) == text[6:12]
    drafter.extend(text[:3])
    assert list(draft(drafter, request(8, nodes=4)).tokens) == text[3:7]
    drafter.extend(text[3:20])
    assert list(draft(drafter, request(8, path=text[3:5], nodes=4)).tokens) == text[5:9]
    assert [best[0][0] for best in drafter.trace(prompt + text, sampling)][4:] == text


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), branches=st.integers(1, 4), split=st.floats(0, 0.05))
def test_kept_kv_cells_never_change_a_draft(tiny: ModelSource, seed: int, branches: int, split: float) -> None:
    """A drafter asked about ever changing contexts answers as one that starts afresh each time."""
    draw = random.Random(seed)
    model = StageModel(tiny, 0, 4)
    drafter, text = ModelDrafter(model, max_context=60), [draw.randrange(160) for _ in range(6)]
    drafter.start(text, Sampling())
    for _ in range(6):
        path = [draw.randrange(160) for _ in range(draw.randrange(3))]
        asked = request(len(drafter.text), path, 6, branches, 0.0, split)
        patience = draw.choice([10_000, draw.randrange(1, 12)])
        if patience < 100:
            calls = iter(range(patience))
            drafter.draft(asked, lambda calls=calls: next(calls, None) is None)
        tree = draft(drafter, asked)
        fresh = ModelDrafter(StageModel(tiny, 0, 4), max_context=60)
        fresh.start(drafter.text, Sampling())
        expected, _ = grow_tree(functools.partial(plain_candidates, fresh, path), 6, branches, 0.0, split)
        assert (tree.tokens, tree.parents) == (expected.tokens, expected.parents)
        kept = draw.randrange(len(tree.tokens) + 1)
        committed = draw.choice([[*path, *branch_of(tree, kept)], path, [draw.randrange(160)], []])
        drafter.extend(committed)


def plain_candidates(drafter: ModelDrafter, path: Sequence[int], below: tuple[int, ...]) -> Sequence[Candidate]:
    """Candidates from a single draft of one token right after ``path + below``: no tree, no batch."""
    drafter.start(drafter.text, Sampling())
    context = Context(drafter.text, len(drafter.text), (*path, *below))
    drafter.prepare(context, request(len(drafter.text)), lambda: False)
    return drafter.candidates_after(context, ())


def branch_of(tree: DraftTree, node: int) -> list[int]:
    """The tokens from the context down to node number ``node`` (1-based; 0 for none)."""
    branch: list[int] = []
    at = node - 1
    while at >= 0:
        branch.insert(0, tree.tokens[at])
        at = tree.parents[at]
    return branch


def test_all_branches_of_a_level_are_one_batch(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StageModel(tiny, 0, 4)
    drafter = ModelDrafter(model, max_context=40)
    drafter.start([1, 2, 3], Sampling())
    rows: list[int] = []
    admit = model.admit
    monkeypatch.setattr(model, "admit", lambda session, run: rows.append(run.rows) or admit(session, run))
    tree = draft(drafter, request(3, nodes=12, branches=4, split=0.0))
    assert len(tree.tokens) == 12
    assert rows == [3, 4, 4]  # the prompt, then two levels of four branches


def test_an_abandoned_draft_stops_between_layers(whole: StageModel) -> None:
    drafter = ModelDrafter(whole, max_context=40)
    drafter.start([1, 2, 3], Sampling())
    calls: list[int] = []
    assert drafter.draft(request(3, nodes=30), lambda: calls.append(1) is None and len(calls) > 8) is None
    assert len(calls) == 9


def test_a_model_drafter_falls_silent_at_the_end_of_its_context(whole: StageModel) -> None:
    drafter = ModelDrafter(whole, max_context=8)
    drafter.start([1, 2, 3, 4, 5, 6], Sampling())
    assert 0 < len(draft(drafter, request(6, nodes=20)).tokens) <= 3
    drafter.extend([1, 1, 1])
    assert draft(drafter, request(9)) == DraftTree()
    assert draft(drafter, request(6, nodes=1)).tokens != ()
    with pytest.raises(BadInputError, match="max_context"):
        ModelDrafter(whole, max_context=5000)
    with pytest.raises(InvariantError, match="only 9 tokens"):
        drafter.draft(request(10), lambda: False)


def test_candidates_are_few_ranked_and_confident_as_the_softmax(whole: StageModel) -> None:
    drafter = ModelDrafter(whole, max_context=40)
    (candidates,) = drafter.trace([1, 2], Sampling())
    assert len(candidates) == WIDTH
    confidences = [confidence for _, confidence in candidates]
    assert confidences == sorted(confidences, reverse=True)
    assert 0 < sum(confidences) <= 1


def test_default_layers_to_skip() -> None:
    assert default_skipped(30) == (5, 12, 17, 25)
    assert all(0 < layer < layers - 1 for layers in range(3, 80) for layer in default_skipped(layers))


@pytest.mark.model
def test_smollm2_without_four_layers_still_drafts_well(smollm2: ModelSource, smollm2_model: StageModel) -> None:
    prompt = [504, 3575, 282, 4649, 314, 7042, 30] * 4
    text = generate_in_one_process(smollm2_model, prompt, 24)
    drafter = LayerSkipDrafter(smollm2, max_context=100)
    found = drafter.trace(prompt + text, Sampling())[len(prompt) - 1 :]
    hits = sum(candidates[0][0] == token for candidates, token in zip(found, text, strict=True))
    assert hits >= 12


def test_ngram_detours_tell_how_a_wrong_look_up_goes_on() -> None:
    text = [1, 2, 3, 4, 5, 9, 1, 2, 7]
    detours = {(at, previous): candidates for at, previous, candidates in NgramDrafter().detours(text) or ()}
    assert [token for token, _ in detours[9, 3]] == [4], "after the wrong 3 the copy goes on"
    assert [token for token, _ in detours[10, 4]] == [5]


def test_ngram_detours_end_once_abandoned_and_ask_at_every_token() -> None:
    text = [1, 2, 3, 4, 5, 9, 1, 2, 7]
    asked = 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return asked == len(text)

    assert NgramDrafter().detours(text, abandoned) == NgramDrafter().detours(text)
    assert asked == len(text) - 1
    assert NgramDrafter().detours(text, lambda: True) is None


def test_two_texts_at_once_are_drafted_like_one_at_a_time(tiny: ModelSource) -> None:
    """They share the weights, and neither cells nor text."""
    first = ModelDrafter(StageModel(tiny, 0, 4), max_context=60)
    drafters, texts = [first, first.another()], [[5, 9, 17, 3], [80, 9, 2]]
    alone = [ModelDrafter(StageModel(tiny, 0, 4), max_context=60) for _ in texts]
    for drafter, lonely, text in zip(drafters, alone, texts, strict=True):
        drafter.start(text, Sampling())
        lonely.start(text, Sampling())
    for number in range(3):
        for drafter, lonely in zip(drafters, alone, strict=True):
            request = RequestDraft(number, len(drafter.text), (), 6, 2, 0.0, 0.1)
            tree = drafter.draft(request, never)
            assert tree == lonely.draft(request, never)
            assert tree is not None
            drafter.extend(tree.tokens[:1])
            lonely.extend(tree.tokens[:1])
    drafters[0].end()
    assert drafters[1].draft(RequestDraft(3, 4, (), 6, 2, 0.0, 0.1), never) is not None
