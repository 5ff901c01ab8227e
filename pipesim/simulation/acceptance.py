"""What the simulated target says and the simulated drafter guesses, keyed by position.

Both are functions of (seed, position, previous token) and, where a model says so, of how far ahead of the committed
text a token is drafted; never of what was asked before: every policy meets the same text and the same lucky and
unlucky positions (common random numbers).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from pipesim.acceptance_trace import AcceptanceTrace
from pipesim.errors import BadInputError
from pipesim.scenario import (
    DrawnAcceptance,
    IidAcceptance,
    MarkovAcceptance,
    PerDepthAcceptance,
    Scenario,
    TraceAcceptance,
)
from pipesim.scheduling.tree import Candidate
from pipesim.simulation.randomness import mix, stream, unit

_MASK = 2**64 - 1
_TARGET, _DRAFTER = 0x7461726765740001, 0x6472616674657202  # one stream for each subsystem
_STOP_STRING = 2**31  # stands for the token that completes the string: no token has this id
_REMEMBERED = 1024  # positions whose draw is kept, a power of 2: more than are in flight at a time

Rates = tuple[float, ...]
"""Probability that a position's first candidate is right when drafted as the 1st, 2nd, .. token after the committed
text; the last one repeats."""
_Hand = tuple[int, float, int, float]
"""Two candidates: how far each token is from the right one (0: it is right), and the confidence in it."""


class Truth(Protocol):
    """A simulated model pair."""

    prompt: tuple[int, ...]
    stop_tokens: tuple[int, ...]
    depths: int
    """From this depth on candidates are the same."""

    def next(self, position: int, previous: int) -> int:
        """The token that the target puts at ``position`` after ``previous``."""
        ...

    def candidates(self, position: int, previous: int, depth: int) -> Sequence[Candidate]:
        """The drafter's candidates for ``position`` after ``previous``, best first.

        ``depth`` is the position's distance from the last token that was committed when the draft was asked for, from
        1 on.
        """
        ...


class DrawnTruth:
    """Text and candidates drawn from the seed; see ``DrawnAcceptance`` for what its kinds share.

    For each position five uniform numbers are drawn: is the first candidate right, else is the second, the
    confidence in the first, the second's share of the confidence that is left (the upper half of it if the second is
    right, the lower half otherwise), and which wrong tokens are offered.
    """

    stop_tokens: tuple[int, ...] = ()

    def __init__(self, acceptance: DrawnAcceptance, seed: int, prompt_tokens: int, vocabulary: int) -> None:
        self._settings = acceptance
        self.depths = len(acceptance.rates) if isinstance(acceptance, PerDepthAcceptance) else 1
        self._rates = _rates(acceptance, seed)
        self._vocabulary = vocabulary
        self._target = mix(seed & _MASK ^ _TARGET)
        self._drafter = mix(seed & _MASK ^ _DRAFTER)
        # of one position each, by its last bits: position, rates, luck, what is offered if the first is right or wrong
        self._drawn: list[tuple[int, Rates, float, _Hand, _Hand]] = [(-1, (), 0.0, _NOTHING, _NOTHING)] * _REMEMBERED
        tokens = [0]
        for position in range(prompt_tokens):
            tokens.append(self.next(position, tokens[-1]))
        self.prompt = tuple(tokens[1:])

    def next(self, position: int, previous: int) -> int:
        """A hash of seed, position and previous token."""
        return mix(self._target + position ^ previous << 32) % self._vocabulary

    def candidates(self, position: int, previous: int, depth: int) -> Sequence[Candidate]:
        """Two candidates; one of them may be right."""
        drawn = self._drawn[position % _REMEMBERED]
        if drawn[0] != position:
            drawn = self._drawn[position % _REMEMBERED] = self._draw(position)
        _, rates, luck, right, wrong = drawn
        hand = right if luck < (rates[depth - 1] if depth < len(rates) else rates[-1]) else wrong
        first_offset, first_confidence, second_offset, second_confidence = hand
        truth, vocabulary = self.next(position, previous), self._vocabulary
        return (
            ((truth + first_offset) % vocabulary, first_confidence),
            ((truth + second_offset) % vocabulary, second_confidence),
        )

    def _draw(self, position: int) -> tuple[int, Rates, float, _Hand, _Hand]:
        settings, others = self._settings, self._vocabulary - 1
        state = mix(self._drafter + position)
        luck, runner_up, spread, share, wrong = (mix(state + i) for i in range(1, 6))
        second_right = unit(runner_up) < settings.runner_up
        offset = 1 + wrong % others  # wrong tokens, told apart by how far they are from the right one
        second_offset = 1 + (offset + (wrong >> 32) % (others - 1)) % others
        deviation = settings.confidence_spread * (2.0 * unit(spread) - 1.0)

        def confidences(mean: float, second_right: bool) -> tuple[float, float]:
            first = min(1.0, max(0.0, mean + deviation))
            return first, min(first, (1.0 - first) * (0.5 * unit(share) + (0.5 if second_right else 0.0)))

        first, second = confidences(settings.confidence_right, False)
        right_hand = (0, first, second_offset, second)
        first, second = confidences(settings.confidence_wrong, second_right)
        wrong_hand = (offset, first, 0 if second_right else second_offset, second)
        return position, self._rates(position), unit(luck), right_hand, wrong_hand


_NOTHING: _Hand = (0, 0.0, 0, 0.0)


def _rates(acceptance: DrawnAcceptance, seed: int) -> Callable[[int], Rates]:
    """What a kind of acceptance is about: from a position to its rates by depth."""
    match acceptance:
        case IidAcceptance(rate=rate):
            return lambda position: (rate,)
        case PerDepthAcceptance(rates=rates):
            return lambda position: rates
        case MarkovAcceptance():
            return _Bursts(acceptance, seed)
        case _:
            raise BadInputError(f"acceptance: there is no way to draw from {type(acceptance).__name__}")


class _Bursts:
    """Good and bad stretches.

    With p = 1 / good_tokens, q = 1 / bad_tokens and p + q <= 1, the chain that leaves good with p and bad with q is the
    same as one that, at each position, draws a fresh state from the stationary distribution with probability p + q and
    keeps the state before otherwise: [[1-p, p], [q, 1-q]] = (1-p-q) I + (p+q) [[s, 1-s], [s, 1-s]], s = q / (p+q).
    So a position's state is the last fresh draw at or before it; looking for that takes 1 / (p + q) steps on average,
    and one where the position before was asked for last.
    """

    def __init__(self, acceptance: MarkovAcceptance, seed: int) -> None:
        self._stream = stream(seed, "acceptance bursts")
        self._fresh = 1 / acceptance.good_tokens + 1 / acceptance.bad_tokens
        self._good_share = acceptance.good_share
        self._good, self._bad = (acceptance.good_rate,), (acceptance.bad_rate,)
        self._last: tuple[int, Rates] = (-1, self._bad)  # position, its rates

    def __call__(self, position: int) -> Rates:
        known, rates = self._last
        at = position
        while at != known:
            drawn = mix(self._stream + at)
            if at == 0 or unit(drawn) < self._fresh:
                rates = self._good if unit(mix(drawn)) < self._good_share else self._bad
                break
            at -= 1
        self._last = (position, rates)
        return rates


class RecordedTruth:
    """The text and the drafter's candidates of a real model pair.

    Off the recorded text the target says something arbitrary. Such rows can never become text, only whether the drafter
    goes on matters there: it does as ``detours`` say, or, without any, as it did at that position of the text. Beyond
    the text's end there are no candidates; ``stop_tokens`` say what ended it before its length did.
    """

    def __init__(self, trace: AcceptanceTrace) -> None:
        tokens, self._candidates = trace.tokens, trace.candidates
        self.prompt, self.stop_tokens, self.depths = trace.prompt_tokens, trace.stop_tokens, 1
        if trace.stop_string and tokens:
            last = tuple((_STOP_STRING if token == tokens[-1] else token, c) for token, c in self._candidates[-1])
            tokens, self._candidates = (*tokens[:-1], _STOP_STRING), (*self._candidates[:-1], last)
            self.stop_tokens = (_STOP_STRING,)
        self.length = len(tokens)
        """Tokens after the prompt."""
        self.stopped = tokens[-1:] != () and tokens[-1] in self.stop_tokens
        """Whether a stop token or string ended the text."""
        self._text = (*trace.prompt_tokens, *tokens)
        self._detours: dict[tuple[int, int], Sequence[Candidate]] | None = None
        if trace.detours is not None:
            self._detours = {(at, previous): ranked for at, previous, ranked in trace.detours}

    def next(self, position: int, previous: int) -> int:
        """The recorded token, if the one before is as recorded."""
        if position < len(self._text) and previous == self._text[position - 1]:
            return self._text[position]
        return mix(position ^ previous << 32) % 2**31

    def candidates(self, position: int, previous: int, depth: int) -> Sequence[Candidate]:
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
    if not isinstance(acceptance, TraceAcceptance):
        return DrawnTruth(acceptance, scenario.seed, scenario.prompt_length(), scenario.model.vocabulary)
    truth = RecordedTruth(acceptance.recorded)
    if workload.prompt_tokens not in (None, len(truth.prompt)):
        raise BadInputError(
            f"workload.prompt_tokens = {workload.prompt_tokens}, but {acceptance.file} recorded {len(truth.prompt)}: "
            "leave it out"
        )
    if truth.length < workload.max_new_tokens and not truth.stopped:
        raise BadInputError(
            f"workload.max_new_tokens = {workload.max_new_tokens}, but {acceptance.file} holds {truth.length} tokens: "
            "generate fewer or record more"
        )
    return truth
