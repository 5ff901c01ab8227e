"""How a micro-batch grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipesim.scheduling.tree import Candidate, DraftTree, grow_tree


def ranked(*confidences: float) -> list[Candidate]:
    return [(token, confidence) for token, confidence in enumerate(confidences)]


def test_a_confident_chain_grows_to_the_limit() -> None:
    tree, levels = grow_tree(lambda path: ranked(0.9, 0.05), max_nodes=4, branches=3, cutoff=0.5, split=0.3)
    assert tree.parents == (-1, 0, 1, 2)
    assert levels == 4


def test_a_branch_stops_under_the_cutoff() -> None:
    tree, levels = grow_tree(lambda path: ranked(0.9 if len(path) < 2 else 0.4), 8, 1, cutoff=0.5, split=0.3)
    assert tree.parents == (-1, 0)
    assert levels == 3, "finding out that the third token is unlikely costs a level, too"


def test_an_empty_tree_tells_the_confidence_that_was_refused() -> None:
    tree, _ = grow_tree(lambda path: ranked(0.4), 8, 1, cutoff=0.5, split=0.3)
    assert (tree.tokens, tree.refused) == ((), 0.4)
    assert grow_tree(lambda path: [], 8, 1, 0.0, 0.3)[0].refused == 0.0


@given(
    confidences=st.lists(st.floats(0, 1), max_size=6),
    max_nodes=st.integers(0, 5),
    cutoff=st.floats(0, 1),
    split=st.floats(0, 1),
)
def test_a_single_branch_grows_as_one_of_two_that_never_forks(
    confidences: list[float], max_nodes: int, cutoff: float, split: float
) -> None:
    def candidates(path: tuple[int, ...]) -> list[Candidate]:
        return [(7, confidences[len(path)]), (8, 0.9)] if len(path) < len(confidences) else []

    assert grow_tree(candidates, max_nodes, 1, cutoff, split) == grow_tree(candidates, max_nodes, 2, cutoff, 1.0)


def test_a_likely_runner_up_forks_a_branch() -> None:
    tree, _ = grow_tree(lambda path: ranked(0.5, 0.4, 0.1), max_nodes=6, branches=2, cutoff=0.2, split=0.3)
    assert tree.parents == (-1, -1, 0, 1, 2, 3)
    assert tree.leaves == 2


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_there_are_never_more_leaves_than_branches(branches: int) -> None:
    def candidates(path: tuple[int, ...]) -> list[Candidate]:
        return ranked(0.4, 0.3, 0.3) if sum(path) % 2 == 0 else ranked(0.1)

    tree, _ = grow_tree(candidates, max_nodes=20, branches=branches, cutoff=0.2, split=0.2)
    assert tree.leaves <= branches
    assert len(tree.tokens) <= 20


@given(parents=st.lists(st.integers(-1, 8), max_size=8), path=st.lists(st.integers(0, 8), max_size=3))
def test_what_hangs_below_a_path_is_the_tree_of_a_later_context(parents: list[int], path: list[int]) -> None:
    parents = [parent % (i + 1) - 1 if i else -1 for i, parent in enumerate(parents)]
    tree = DraftTree(tuple(range(len(parents))), tuple(parents), (0.5,) * len(parents))

    def paths(tree: DraftTree) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            found.append((*(found[parent] if parent >= 0 else ()), token))
        return found

    below = [one[len(path) :] for one in paths(tree) if len(one) > len(path) and one[: len(path)] == tuple(path)]
    assert paths(tree.after(path)) == below


def test_a_tree_validates_itself() -> None:
    with pytest.raises(ValueError, match="parents before children"):
        DraftTree((1,), (0,), (0.5,))
    with pytest.raises(ValueError, match="two equal children"):
        DraftTree((1, 1), (-1, -1), (0.5, 0.5))
    with pytest.raises(ValueError, match="one parent and one confidence"):
        DraftTree((1,), (), (0.5,))
