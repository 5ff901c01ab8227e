"""Prompt look-up: the text so far has said something like this before, so it may go on alike."""

import heapq
from collections.abc import Callable, Sequence

from backends.drafting.base import WIDTH, Drafter, never
from pipesim.errors import BadInputError
from pipesim.scheduling.tree import Candidate, Detour

_DETOUR = 64  # tokens that a wrong look-up is followed for: more than any policy has in flight on one chain


class NgramDrafter(Drafter):
    """Continues with what followed the longest suffix, up to ``longest`` tokens, that the committed text had before.

    Its candidates are the tokens that followed that suffix, the most frequent first, among equals the most recent.
    The confidence is ``count / (occurrences + 1)``: the relative frequency, with one imagined occurrence that went
    on otherwise. Every committed token adds one entry per suffix length, so drafting a token never scans the text.

    Source: prompt lookup decoding (Saxena 2023), extended by runner-ups.
    """

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise BadInputError(f"ngram drafter: longest {longest} must be at least 1")
        super().__init__()
        self._longest = longest
        self._followers: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Indexes ``tokens``: suffix -> follower -> (count, last position)."""
        if not self.text:
            self._followers = {}
        for token in tokens:
            position = len(self.text)
            for length in range(1, min(self._longest, position) + 1):
                followers = self._followers.setdefault(tuple(self.text[position - length :]), {})
                count, _ = followers.get(token, (0, 0))
                followers[token] = (count + 1, position)
            self.text.append(token)

    def candidates_after(self, context: Sequence[int], path: tuple[int, ...]) -> list[Candidate]:
        """The followers of the longest known suffix of ``context + path``."""
        recent = (*context[-self._longest :], *path)[-self._longest :]
        for start in range(len(recent)):
            followers = self._followers.get(recent[start:])
            if followers:
                occurrences = sum(count for count, _ in followers.values())
                best = heapq.nlargest(WIDTH, followers, key=followers.__getitem__)
                return [(token, followers[token][0] / (occurrences + 1)) for token in best]
        return []

    def detours(self, tokens: Sequence[int], abandoned: Callable[[], bool] = never) -> list[Detour] | None:
        """A wrong look-up goes on repeating what it found, where the text itself has nothing to look up."""
        self.start(tokens[:1], self.sampling)
        found: dict[tuple[int, int], tuple[Candidate, ...]] = {}
        for token in tokens[1:]:
            if abandoned():
                return None
            path: tuple[int, ...] = ()
            candidates = self.candidates_after(self.text, path)
            while candidates and len(path) < _DETOUR and (path or candidates[0][0] != token):
                path += (candidates[0][0],)
                candidates = self.candidates_after(self.text, path)
                found.setdefault((len(self.text) + len(path), path[-1]), tuple(candidates))
            self.extend([token])
        return [(position, previous, candidates) for (position, previous), candidates in found.items()]
