"""Prompt look-up: the text so far has said something like this before, so it may go on alike."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from backends.drafting.base import WIDTH, Context, Drafter, never
from pipesim.errors import BadInputError
from pipesim.scheduling.tree import Candidate, Detour

_DETOUR = 64  # tokens that a wrong look-up is followed for: more than any policy has in flight on one chain
_NEWEST = 32  # occurrences of a token, or of a pair, that are compared: the newest ones
_MEMORY = 0.95  # what a hit or a miss still counts after the next one of its kind
_LONGEST_PROVEN = 8  # matches of at least so many tokens share one record


class _Index:
    """The positions after each sequence of ``width`` tokens of a text, newest first.

    A hash table of positions alone, for the text tells what stands before them: some 16 bytes per token.
    """

    def __init__(self, text: "array[int]", width: int) -> None:
        self._text, self._width = text, width
        self._before = array("i", [0])  # position -> the one before it after the same sequence, 0 if there is none
        self._slots = array("i", [0]) * 64  # by hash, open addressing: the newest position after a sequence
        self._used = 0

    def add(self) -> None:
        """Takes note of the text's newest token; to be called for each."""
        position = len(self._text)
        if position < self._width:
            self._before.append(0)
            return
        slot = self._slot(self._text[-self._width :])
        self._before.append(self._slots[slot])
        self._used += not self._slots[slot]
        self._slots[slot] = position
        if 2 * self._used > len(self._slots):
            self._grow()

    def positions(self, sequence: "array[int]") -> Iterator[int]:
        """Where ``sequence`` ended."""
        position = self._slots[self._slot(sequence)]
        while position:
            yield position
            position = self._before[position]

    def _slot(self, sequence: "array[int]") -> int:
        mask = len(self._slots) - 1
        slot = hash(tuple(sequence)) & mask
        while (position := self._slots[slot]) and self._text[position - self._width : position] != sequence:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        newest = [position for position in self._slots if position]
        self._slots = array("i", [0]) * (2 * len(self._slots))
        for position in newest:
            self._slots[self._slot(self._text[position - self._width : position])] = position


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
        self._seen = {width: _Index(self.text, width) for width in (2, 1)}
        # by length of a match: hits and all proposals, both fading, after one imagined hit and one imagined miss
        self._record = [[1.0, 2.0] for _ in range(_LONGEST_PROVEN + 1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Compares what it would have proposed with ``tokens``, then indexes them."""
        if not self.text:
            self._forget()
        text = self.text
        for token in tokens:
            matches = self._matches(Context(text, len(text)), ())
            if matches:
                best, length = matches[0]
                record = self._record[min(length, _LONGEST_PROVEN)]
                record[0] = _MEMORY * record[0] + (best == token)
                record[1] = _MEMORY * record[1] + 1
            text.append(token)
            for index in self._seen.values():
                index.add()

    def candidates_after(self, context: Context, path: tuple[int, ...]) -> list[Candidate]:
        """The followers of the longest suffix of ``context + path`` that the committed text knows."""
        candidates: list[Candidate] = []
        left = 1.0
        for token, length in self._matches(context, path):
            hits, all_of_them = self._record[min(length, _LONGEST_PROVEN)]
            confidence = left * hits / all_of_them
            candidates.append((token, confidence))
            left = min(confidence, left - confidence)
        return candidates

    def _matches(self, context: Context, path: tuple[int, ...]) -> list[tuple[int, int]]:
        """At most ``WIDTH`` followers with the lengths of their matches, the longest first, among equals the newest."""
        text = self.text
        recent = array("i", [*context[-self._longest :], *path])[-self._longest :]
        found: dict[int, int] = {}
        for known, index in self._seen.items():
            if known > len(recent) or found:
                continue
            for position in islice(index.positions(recent[-known:]), _NEWEST):
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
            context = Context(self.text, len(self.text))
            candidates = self.candidates_after(context, path)
            while candidates and len(path) < _DETOUR and (path or candidates[0][0] != token):
                path += (candidates[0][0],)
                candidates = self.candidates_after(context, path)
                found.setdefault((len(self.text) + len(path), path[-1]), tuple(candidates))
            self.extend([token])
        return [(position, previous, candidates) for (position, previous), candidates in found.items()]
