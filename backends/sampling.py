"""Sampling with coupled noise: a token is a function of (seed, position, logits), whichever run computes it.

``token = argmax(logits / T + Gumbel(seed, position))`` after top-k and top-p draws from the same distribution as
ordinary sampling (the Gumbel-max trick), yet two computations of one position always agree.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipesim.errors import BadInputError

_LOWEST_TEMPERATURE = 1e-3  # the scenario schema has it too; logits divided by much less overflow

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is picked: greedy at ``temperature`` 0, else among ``top_k`` tokens (0: all) and the fewest
    tokens that hold ``top_p`` of the probability.

    Raises:
        BadInputError: a setting is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

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
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"seed {self.seed} must be at least 0 and under 2**64")

    def pick(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """The token at ``position``, given the logits ``[vocabulary]`` that predict it; the lowest id wins a tie."""
        return int(np.argmax(logits if self.temperature == 0 else self.scores(logits, position)))

    def scores(self, logits: npt.NDArray[np.float32], position: int) -> Scores:
        """What :meth:`pick` maximises, ``[vocabulary]``, -inf for tokens that top-k or top-p shut out."""
        if self.temperature == 0:
            return logits.astype(np.float64)
        scaled = logits.astype(np.float64) / self.temperature
        return self._filtered(scaled) + gumbel_noise(self.seed, position, len(logits))

    def _filtered(self, scaled: Scores) -> Scores:
        if not self.top_k and self.top_p == 1:
            return scaled
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
