"""Sampling with coupled noise: a token is a function of (seed, position, logits), whichever run computes it.

``token = argmax(logits / T + Gumbel(seed, position))`` after top-k, top-p and min-p draws from the same distribution as
ordinary sampling (the Gumbel-max trick), yet two computations of one position always agree. With a repetition penalty
the token is a function of the text before it, too: of its own branch, not of what else is in flight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipesim.errors import BadInputError, InvariantError

_LOWEST_TEMPERATURE = 1e-3  # the scenario schema has it too; logits divided by much less overflow

Scores = npt.NDArray[np.float64]
History = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is picked: greedy at ``temperature`` 0, else among ``top_k`` tokens (0: all), the fewest
    tokens that hold ``top_p`` of the probability, and those at least ``min_p`` times as probable as the best.

    Before all that, tokens that the text has had already, prompt included, become less likely: their positive logits
    are divided by ``repetition_penalty``, their negative ones multiplied (CTRL, arXiv 1909.05858, section 4.1).

    Raises:
        BadInputError: a setting is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        low = self.temperature != 0 and not self.temperature >= _LOWEST_TEMPERATURE
        if low or not math.isfinite(self.temperature):
            raise BadInputError(
                f"temperature {self.temperature} must be 0 or a number of at least {_LOWEST_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise BadInputError(f"top_k {self.top_k} must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise BadInputError(f"top_p {self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise BadInputError(f"min_p {self.min_p} must be at least 0 (0 keeps all tokens) and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInputError(f"repetition_penalty {self.repetition_penalty} must be above 0 (1 changes nothing)")
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"seed {self.seed} must be at least 0 and under 2**64")

    @property
    def is_greedy(self) -> bool:
        """Whether the token is simply that of the largest logit."""
        return self.temperature == 0 and not self.needs_history

    @property
    def needs_history(self) -> bool:
        """Whether a token depends on the tokens before it other than through the logits."""
        return self.repetition_penalty != 1

    def pick(self, logits: npt.NDArray[np.float32], position: int, history: History = ()) -> int:
        """The token at ``position``, given the logits ``[vocabulary]`` that predict it; the lowest id wins a tie.

        ``history`` are the tokens at positions ``0 .. position - 1``, if :attr:`needs_history`.
        """
        return int(np.argmax(logits if self.is_greedy else self.scores(logits, position, history)))

    def scores(self, logits: npt.NDArray[np.float32], position: int, history: History = ()) -> Scores:
        """What :meth:`pick` maximises, ``[vocabulary]``, -inf for tokens that are shut out."""
        scores = logits.astype(np.float64)
        if self.needs_history:
            if len(history) != position:
                raise InvariantError(f"{len(history)} tokens are no history of position {position}")
            scores = self._penalised(scores, np.asarray(history, np.int64))
        if self.temperature == 0:
            return scores
        return self._filtered(scores / self.temperature) + gumbel_noise(self.seed, position, len(logits))

    def _penalised(self, scores: Scores, had: npt.NDArray[np.int64]) -> Scores:
        had = had[had < len(scores)]  # a draft model may know fewer tokens than the target
        before, penalty = scores[had], self.repetition_penalty
        scores[had] = np.where(before > 0, before / penalty, before * penalty)
        return scores

    def _filtered(self, scaled: Scores) -> Scores:
        kept = scaled
        if self.top_k or self.top_p < 1:
            # A stable order: equal logits rank by token id, in every run.
            order = np.argsort(-scaled, kind="stable")
            if self.top_k:
                order = order[: self.top_k]
            if self.top_p < 1:
                shares = np.exp(scaled[order] - scaled[order[0]])
                before = np.cumsum(shares) - shares
                order = order[before < self.top_p * shares.sum()]
            kept = np.full_like(scaled, -np.inf)
            kept[order] = scaled[order]
        if self.min_p:
            kept = np.where(kept >= kept.max() + math.log(self.min_p), kept, -np.inf)
        return kept


def gumbel_noise(seed: int, position: int, vocabulary: int) -> Scores:
    """Standard Gumbel noise ``[vocabulary]``, a function of (seed, position) through the Philox counter generator."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    # random() may return 0, whose logarithm is -inf; half a step up keeps the noise finite
    return -np.log(-np.log(generator.random(vocabulary) + 2.0**-54))


def softmax(logits: npt.NDArray[np.float32]) -> Scores:
    """Probabilities ``[vocabulary]`` of the bare logits."""
    shares = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(shares / shares.sum())
