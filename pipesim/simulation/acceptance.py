"""What the simulated target says and the simulated drafter guesses, keyed by position.

Both are functions of (seed, position, previous token), never of what was asked before: every policy meets the same
text and the same lucky and unlucky positions (common random numbers).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pipesim.errors import BadInputError
from pipesim.scenario import IidAcceptance, Scenario
from pipesim.scheduling.tree import Candidate, Detour
from pipesim.simulation.randomness import mix, unit

_MASK = 2**64 - 1
_TARGET, _DRAFTER = 0x7461726765740001, 0x6472616674657202  # one stream for each subsystem
_CHARACTERS_PER_TOKEN = 4


class Truth(Protocol):
    """A simulated model pair."""

    prompt: tuple[int, ...]
    stop_tokens: tuple[int, ...]

    def next(self, position: int, previous: int) -> int:
        """The token that the target puts at ``position`` after ``previous``."""
        ...

    def candidates(self, position: int, previous: int) -> Sequence[Candidate]:
        """The drafter's candidates for ``position`` after ``previous``, best first."""
        ...


class IidTruth:
    """Drafted tokens are right independently of each other; see ``IidAcceptance`` for the model.

    For each position five uniform numbers are drawn: is the first candidate right, else is the second, the
    confidence in the first, the second's share of the confidence that is left (the upper half of it if the second is
    right, the lower half otherwise), and which wrong tokens are offered.
    """

    stop_tokens: tuple[int, ...] = ()

    def __init__(self, acceptance: IidAcceptance, seed: int, prompt_tokens: int, vocabulary: int) -> None:
        self._settings = acceptance
        self._vocabulary = vocabulary
        self._target = mix(seed & _MASK ^ _TARGET)
        self._drafter = mix(seed & _MASK ^ _DRAFTER)
        self._drawn: dict[int, tuple[bool, bool, float, float, int, int]] = {}
        tokens = [0]
        for position in range(prompt_tokens):
            tokens.append(self.next(position, tokens[-1]))
        self.prompt = tuple(tokens[1:])

    def next(self, position: int, previous: int) -> int:
        """A hash of seed, position and previous token."""
        return mix(self._target + position ^ previous << 32) % self._vocabulary

    def candidates(self, position: int, previous: int) -> Sequence[Candidate]:
        """Two candidates; one of them may be right."""
        drawn = self._drawn.get(position)
        if drawn is None:
            drawn = self._drawn[position] = self._draw(position)
        first_right, second_right, first_confidence, second_confidence, offset, second_offset = drawn
        truth = self.next(position, previous)
        first = truth if first_right else (truth + offset) % self._vocabulary
        second = truth if second_right else (truth + second_offset) % self._vocabulary
        return ((first, first_confidence), (second, second_confidence))

    def _draw(self, position: int) -> tuple[bool, bool, float, float, int, int]:
        settings = self._settings
        state = mix(self._drafter + position)
        right, runner_up, spread, share, wrong = (mix(state + i) for i in range(1, 6))
        first_right = unit(right) < settings.rate
        second_right = not first_right and unit(runner_up) < settings.runner_up
        mean = settings.confidence_right if first_right else settings.confidence_wrong
        first = min(1.0, max(0.0, mean + settings.confidence_spread * (2.0 * unit(spread) - 1.0)))
        second = min(first, (1.0 - first) * (0.5 * unit(share) + (0.5 if second_right else 0.0)))
        others = self._vocabulary - 1  # wrong tokens, told apart by how far they are from the right one
        offset = 1 + wrong % others
        second_offset = 1 + (offset + (wrong >> 32) % (others - 1)) % others
        return first_right, second_right, first, second, offset, second_offset


class RecordedTruth:
    """The text and the drafter's candidates of a real model pair.

    Off the recorded text the target says something arbitrary. Such rows can never become text, only whether the drafter
    goes on matters there: it does as ``detours`` say, or, without any, as it did at that position of the text. Beyond
    the text's end there are no candidates; ``stop_tokens`` say what ended it before its length did.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        candidates: Sequence[Sequence[Candidate]],
        detours: Sequence[Detour] | None = None,
        stop_tokens: tuple[int, ...] = (),
    ) -> None:
        self.stop_tokens = stop_tokens
        self.prompt = tuple(prompt)
        self._text = (*prompt, *tokens)
        self._candidates = candidates
        self._detours = None if detours is None else {(at, previous): ranked for at, previous, ranked in detours}

    def next(self, position: int, previous: int) -> int:
        """The recorded token, if the one before is as recorded."""
        if position < len(self._text) and previous == self._text[position - 1]:
            return self._text[position]
        return mix(position ^ previous << 32) % 2**31

    def candidates(self, position: int, previous: int) -> Sequence[Candidate]:
        """The recorded candidates for this position, on the text or off it."""
        index = position - len(self.prompt)
        if self._detours is not None and index <= len(self._candidates) and previous != self._text[position - 1]:
            return self._detours.get((position, previous), ())
        return self._candidates[index] if 0 <= index < len(self._candidates) else ()


def make_truth(scenario: Scenario) -> Truth:
    """The truth of a scenario.

    Raises:
        BadInputError: there is no ``acceptance`` section, or its trace cannot be used.
    """
    acceptance, workload = scenario.acceptance, scenario.workload
    if acceptance is None:
        raise BadInputError("acceptance: a simulation needs this section, e.g. acceptance: {kind: iid, rate: 0.7}")
    if isinstance(acceptance, IidAcceptance):
        count = workload.prompt_tokens or -(-len(workload.prompt or "") // _CHARACTERS_PER_TOKEN)
        return IidTruth(acceptance, scenario.seed, count, scenario.model.vocabulary)
    prompt, tokens, candidates = _read_trace(acceptance.file)
    if workload.prompt_tokens not in (None, len(prompt)):
        raise BadInputError(
            f"workload.prompt_tokens = {workload.prompt_tokens}, but {acceptance.file} recorded {len(prompt)}: "
            "leave it out"
        )
    if len(tokens) < workload.max_new_tokens:
        raise BadInputError(
            f"workload.max_new_tokens = {workload.max_new_tokens}, but {acceptance.file} holds {len(tokens)} tokens: "
            "generate fewer or record more"
        )
    return RecordedTruth(prompt, tokens, candidates)


def _read_trace(path: Path) -> tuple[list[int], list[int], list[list[Candidate]]]:
    """Prompt, text and candidates of an acceptance trace file."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BadInputError(f"acceptance.file: {path} cannot be read as JSON ({problem})") from None
    if not isinstance(raw, dict) or raw.keys() != {"prompt_tokens", "tokens", "candidates"}:
        raise BadInputError(f"acceptance.file: {path} needs exactly the keys prompt_tokens, tokens and candidates")
    prompt, tokens = ([_token(path, item) for item in _list(path, raw[key])] for key in ("prompt_tokens", "tokens"))
    candidates = [
        [_candidate(path, candidate) for candidate in _list(path, ranked)] for ranked in _list(path, raw["candidates"])
    ]
    if not prompt or len(candidates) != len(tokens):
        raise BadInputError(
            f"acceptance.file: {path} needs a prompt and one list of candidates per token, "
            f"it has {len(prompt)} prompt tokens, {len(tokens)} tokens and {len(candidates)} lists"
        )
    return prompt, tokens, candidates


def _list(path: Path, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadInputError(f"acceptance.file: {path} has {value!r} where a list is needed")
    return value


def _token(path: Path, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadInputError(f"acceptance.file: {path} has {value!r} where a token id is needed")
    return value


def _candidate(path: Path, value: Any) -> Candidate:
    pair = _list(path, value)
    if len(pair) != 2 or not isinstance(pair[1], int | float) or not 0 <= pair[1] <= 1:
        raise BadInputError(f"acceptance.file: {path} has {value!r}, not a [token, confidence up to 1]")
    return _token(path, pair[0]), float(pair[1])
