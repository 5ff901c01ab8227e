"""Token trees: what a drafter proposes, and how every drafter, simulated or real, grows one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Candidate = tuple[int, float]
"""A token and the drafter's confidence in it, 0 to 1."""


_CHAIN = tuple(range(-1, 64))
"""The parents of a tree of one branch, and of a long one's beginning: nothing can be wrong with it."""

Detour = tuple[int, int, tuple[Candidate, ...]]
"""What a drafter proposes off the text: a position, the wrong token before it, and the candidates there."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A tree of drafted tokens, parents before children.

    ``parents[i]`` is the index of token ``i``'s parent, or -1 where it follows the drafter's context directly.
    A node's first child continues its branch; further children are forks. ``refused`` is the confidence of the
    best candidate that stayed under the cutoff in an empty tree, 0.0 if there was no candidate at all.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    refused: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.confidences):
            raise ValueError("a draft tree needs one parent and one confidence per token")
        if self.parents == _CHAIN[: len(self.parents)]:
            return
        if any(not -1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError(f"a draft tree lists parents before children, got parents {self.parents}")
        if len(set(zip(self.parents, self.tokens, strict=True))) != len(self.tokens):
            raise ValueError("a draft tree has two equal children under one parent")

    @property
    def leaves(self) -> int:
        """How many branches the tree ends in."""
        if self.parents == _CHAIN[: len(self.parents)]:
            return min(1, len(self.parents))
        return len(self.tokens) - len({parent for parent in self.parents if parent >= 0})

    def after(self, path: Sequence[int]) -> "DraftTree":
        """What hangs below ``path``: the tree of a context that went on with those tokens. Empty if it has them not."""
        if not path:
            return self
        edges = list(zip(self.tokens, self.parents, strict=True))
        node = -1
        for token in path:
            if (token, node) not in edges:
                return DraftTree()
            node = edges.index((token, node))
        renumbered = {node: -1}
        for i, parent in enumerate(self.parents):
            if parent in renumbered:
                renumbered[i] = len(renumbered) - 1
        kept = [i for i in renumbered if i != node]
        return DraftTree(
            tuple(self.tokens[i] for i in kept),
            tuple(renumbered[self.parents[i]] for i in kept),
            tuple(self.confidences[i] for i in kept),
        )


def grow_tree(
    candidates: Callable[[tuple[int, ...]], Sequence[Candidate]],
    max_nodes: int,
    branches: int,
    cutoff: float,
    split: float,
) -> tuple[DraftTree, int]:
    """Grows a micro-batch as PipeInfer does, one level of all branches at a time.

    ``candidates(path)`` gives the drafter's candidates after ``path`` (drafted tokens below the context), best first.
    A branch whose best candidate is under ``cutoff`` stops. A runner-up above ``split`` forks a new branch while there
    are fewer than ``branches``. Growth ends with ``max_nodes`` tokens in total. Returns the tree and the number of
    levels drafted: what a model drafter pays for, since it runs all branches of a level as one batch.

    Source: PipeInfer (arXiv 2407.11798), speculation loop of its reference implementation.
    """
    if branches == 1:
        return _grow_chain(candidates, max_nodes, cutoff)
    tokens: list[int] = []
    parents: list[int] = []
    confidences: list[float] = []
    refused = 0.0
    tips: list[tuple[int, tuple[int, ...]]] = [(-1, ())]  # (node, path) of every growing branch
    stopped, levels = 0, 0
    while tips and len(tokens) < max_nodes:
        levels += 1
        grown: list[tuple[int, tuple[int, ...]]] = []
        waiting = len(tips)
        for parent, path in tips:
            waiting -= 1
            ranked = candidates(path)
            if not ranked or ranked[0][1] < cutoff:
                refused = max(refused, ranked[0][1] if ranked else 0.0)
                stopped += parent >= 0
                continue
            for rank, (token, confidence) in enumerate(ranked):
                if len(tokens) == max_nodes:
                    break
                if rank and (confidence <= split or stopped + len(grown) + waiting >= branches):
                    break
                grown.append((len(tokens), (*path, token)))
                tokens.append(token)
                parents.append(parent)
                confidences.append(confidence)
        tips = grown
    tree = DraftTree(tuple(tokens), tuple(parents), tuple(confidences), 0.0 if tokens else refused)
    return tree, levels


def _grow_chain(
    candidates: Callable[[tuple[int, ...]], Sequence[Candidate]], max_nodes: int, cutoff: float
) -> tuple[DraftTree, int]:
    """What ``grow_tree`` does with a single branch, in a fraction of the time."""
    path: tuple[int, ...] = ()
    confidences: list[float] = []
    while len(path) < max_nodes:
        ranked = candidates(path)
        token, confidence = ranked[0] if ranked else (0, 0.0)
        if not ranked or confidence < cutoff:
            refused = 0.0 if path else confidence
            return DraftTree(path, tuple(range(-1, len(path) - 1)), tuple(confidences), refused), len(path) + 1
        path = (*path, token)
        confidences.append(confidence)
    return DraftTree(path, tuple(range(-1, len(path) - 1)), tuple(confidences)), len(path)
