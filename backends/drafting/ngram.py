"""Prompt look-up: the text so far has said something like this before, so it may go on alike."""

from collections.abc import Callable, Sequence

from backends.drafting.base import WIDTH, Drafter, never
from pipesim.errors import BadInputError
from pipesim.scheduling.tree import Candidate, Detour

_DETOUR = 64  # tokens that a wrong look-up is followed for: more than any policy has in flight on one chain
_NEWEST = 32  # occurrences of a token, or of a pair, that are compared: the newest ones
_MEMORY = 0.95  # what a hit or a miss still counts after the next one of its kind
_LONGEST_PROVEN = 8  # matches of at least so many tokens share one record


class NgramDrafter(Drafter):
    """Continues with what followed the longest suffix, up to ``longest`` tokens, that the text had before.

    Its candidates are the tokens that followed that suffix, the newest first, then those of shorter suffixes. The
    confidence in the best one is how often such proposals have come true lately in this very text, prompt included:
    there is one fading record of hits and misses for each length of a match. What the best one leaves goes to the
    runner-ups, in halves.

    The index holds the positions of every token and of every pair. A look-up compares the newest few, whatever the
    length of the text.

    Source: prompt lookup decoding (Saxena 2023), extended by runner-ups and confidences.
    """

    def __init__(self, longest: int = 16) -> None:
        if longest < 1:
            raise BadInputError(f"ngram drafter: longest {longest} must be at least 1")
        super().__init__()
        self._longest = longest
        self._forget()

    def _forget(self) -> None:
        self._seen: dict[tuple[int, ...], list[int]] = {}  # one token or two -> positions after them
        # by length of a match: hits and all proposals, both fading, after one imagined hit and one imagined miss
        self._record = [[1.0, 2.0] for _ in range(_LONGEST_PROVEN + 1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Compares what it would have proposed with ``tokens``, then indexes them."""
        if not self.text:
            self._forget()
        text = self.text
        for token in tokens:
            matches = self._matches(text, ())
            if matches:
                best, length = matches[0]
                record = self._record[min(length, _LONGEST_PROVEN)]
                record[0] = _MEMORY * record[0] + (best == token)
                record[1] = _MEMORY * record[1] + 1
            text.append(token)
            position = len(text)
            self._seen.setdefault((token,), []).append(position)
            if position > 1:
                self._seen.setdefault((text[-2], token), []).append(position)

    def candidates_after(self, context: Sequence[int], path: tuple[int, ...]) -> list[Candidate]:
        """The followers of the longest suffix of ``context + path`` that the committed text knows."""
        candidates: list[Candidate] = []
        left = 1.0
        for token, length in self._matches(context, path):
            hits, all_of_them = self._record[min(length, _LONGEST_PROVEN)]
            confidence = left * hits / all_of_them
            candidates.append((token, confidence))
            left = min(confidence, left - confidence)
        return candidates

    def _matches(self, context: Sequence[int], path: tuple[int, ...]) -> list[tuple[int, int]]:
        """At most ``WIDTH`` followers with the lengths of their matches, the longest first, among equals the newest."""
        text, recent = self.text, [*context[-self._longest :], *path][-self._longest :]
        found: dict[int, int] = {}
        for known in (2, 1):
            if known > len(recent) or found:
                continue
            for position in reversed(self._seen.get(tuple(recent[-known:]), ())[-_NEWEST:]):
                if position == len(text):
                    continue  # this is the suffix itself
                length, most = known, min(len(recent), position)
                while length < most and recent[-1 - length] == text[position - 1 - length]:
                    length += 1
                if length > found.get(text[position], 0):
                    found.pop(text[position], None)  # it takes its place among equals anew
                    found[text[position]] = length
                if length == self._longest:
                    break
        return sorted(found.items(), key=lambda one: -one[1])[:WIDTH]

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
