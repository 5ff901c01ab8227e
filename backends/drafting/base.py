"""What every drafter has in common: it follows the committed text and answers draft requests with trees."""

import copy
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import Self, overload

from backends.sampling import Sampling
from pipesim.errors import InvariantError
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.tree import Candidate, Detour, DraftTree, grow_tree

WIDTH = 8
"""Candidates per position at most: as many branches as a draft tree can sensibly fork."""


class Abandoned(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a drafter when the request it works on is no longer wanted."""


def never() -> bool:
    """The answer of a request that nobody abandons."""
    return False


def no_news() -> Sequence[int]:
    """What is heard of a text that waits for its draft."""
    return ()


def contradicts(path: Sequence[int], news: Sequence[int]) -> bool:
    """Whether a text that goes on with ``news`` cannot go on with ``path``, as far as both are known."""
    return any(drafted != token for drafted, token in zip(path, news, strict=False))


class Context(Sequence[int]):
    """``text[:frontier]``, then ``path``. A view, for texts are long and requests many; its slices are arrays."""

    __slots__ = ("_frontier", "_path", "_text")

    def __init__(self, text: "array[int]", frontier: int, path: Sequence[int] = ()) -> None:
        self._text, self._frontier, self._path = text, frontier, path

    def __len__(self) -> int:
        return self._frontier + len(self._path)

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> "array[int]": ...

    def __getitem__(self, at: "int | slice") -> "int | array[int]":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            after = slice(max(0, start - self._frontier), max(0, stop - self._frontier))
            return (self._text[start : min(stop, self._frontier)] + array("i", self._path[after]))[::step]
        at = range(len(self))[at]
        return self._text[at] if at < self._frontier else self._path[at - self._frontier]

    def then(self, path: Sequence[int]) -> "Context":
        """This context, and ``path`` after it."""
        return Context(self._text, self._frontier, (*self._path, *path))


class Drafter(ABC):
    """Proposes how a text goes on. One generation at a time: ``start``, then ``draft`` and ``extend`` in turns."""

    def __init__(self) -> None:
        self.text = array("i")
        self.sampling = Sampling()
        self.levels = 0  # of the newest draft

    def another(self) -> Self:
        """A drafter of the same kind for another text at the same time; weights are shared, texts and caches are not.

        It must be told to :meth:`start` first.
        """
        return copy.copy(self)

    def end(self) -> None:
        """The text is over: frees its caches."""
        self.text = array("i")

    def start(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """A new generation begins; ``sampling`` is the target's, since drafters share its noise."""
        self.text, self.sampling = array("i"), sampling
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """``tokens`` were committed."""
        self.text.extend(tokens)

    def draft(
        self, request: RequestDraft, abandoned: Callable[[], bool], news: Callable[[], Sequence[int]] = no_news
    ) -> DraftTree | None:
        """The tree that continues ``text[:frontier] + path``, or None once ``abandoned()`` is true.

        ``news()`` are the tokens that were committed from the frontier on meanwhile: no branch grows that contradicts
        them, and if ``path`` itself does, nobody wants the draft any more.
        """
        if request.frontier > len(self.text):
            raise InvariantError(
                f"draft request {request.request_id} continues position {request.frontier}, "
                f"but only {len(self.text)} tokens are committed here"
            )
        context = Context(self.text, request.frontier, request.path)

        def stale() -> bool:
            return abandoned() or contradicts(request.path, news())

        def candidates(path: tuple[int, ...]) -> Sequence[Candidate]:
            if stale():
                raise Abandoned
            if contradicts((*request.path, *path), news()):
                return ()
            return self.candidates_after(context, path)

        try:
            self.prepare(context, request, stale)
            limits = (request.max_nodes, request.branches, request.cutoff, request.split)
            tree, self.levels = grow_tree(candidates, *limits)
        except Abandoned:
            return None
        return tree

    def prepare(self, context: Context, request: RequestDraft, abandoned: Callable[[], bool]) -> None:
        """Gets ready to answer ``request``; :meth:`candidates_after` calls follow, level by level."""
        del context, request, abandoned

    @abstractmethod
    def candidates_after(self, context: Context, path: tuple[int, ...]) -> Sequence[Candidate]:
        """At most ``WIDTH`` candidates for the token after ``context + path``, best first."""

    def trace(
        self, tokens: Sequence[int], sampling: Sampling, abandoned: Callable[[], bool] = never
    ) -> list[tuple[Candidate, ...]] | None:
        """What it would propose all along a known text: entry ``i`` are the candidates for ``tokens[i + 1]``.

        None once ``abandoned()`` is true; asked often, also as a sign of life.
        """
        if not tokens:
            return []
        self.start(tokens[:1], sampling)
        found = []
        for token in tokens[1:]:
            if abandoned():
                return None
            found.append(tuple(self.candidates_after(Context(self.text, len(self.text)), ())))
            self.extend([token])
        return found

    def detours(self, tokens: Sequence[int], abandoned: Callable[[], bool] = never) -> list[Detour] | None:
        """How it would go on after each of its own wrong proposals along ``tokens``.

        None, where that is much like what it proposes on the text, as with models: they always have a next token. None
        also once ``abandoned()`` is true; asked often, also as a sign of life.
        """
        del tokens, abandoned
        return None
