"""Coupled noise: a token is a function of (seed, position, logits), drawn from the right distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.sampling import Sampling, gumbel_noise, softmax
from pipesim.errors import BadInputError, InvariantError

LOGITS = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 10_000), others=st.lists(st.integers(0, 99), max_size=3))
def test_a_token_does_not_depend_on_what_was_picked_before(seed: int, position: int, others: list[int]) -> None:
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=seed)
    token = sampling.pick(LOGITS, position)
    for other in others:
        sampling.pick(LOGITS[::-1].copy(), other)
    assert sampling.pick(LOGITS.copy(), position) == token == Sampling(0.8, 50, 0.95, seed).pick(LOGITS, position)


def test_seed_position_and_logits_all_matter() -> None:
    assert len({Sampling(1.0, seed=seed).pick(LOGITS, 7) for seed in range(60)}) > 3
    assert len({Sampling(1.0).pick(LOGITS, position) for position in range(60)}) > 3
    assert Sampling(1.0).pick(LOGITS[::-1].copy(), 7) != Sampling(1.0).pick(LOGITS, 7)
    assert not np.array_equal(gumbel_noise(1, 2, 10), gumbel_noise(2, 1, 10))


def test_greedy_takes_the_highest_logit_and_the_lowest_id_of_a_tie() -> None:
    assert Sampling().pick(np.array([0, 3, 1, 3], np.float32), 5) == 1


def test_frequencies_follow_the_softmax_at_that_temperature() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0], np.float32)
    expected = softmax(logits / 0.7)
    sampling = Sampling(temperature=0.7, seed=11)
    picked = np.bincount([sampling.pick(logits, position) for position in range(6000)], minlength=4) / 6000
    assert np.abs(picked - expected).max() < 0.03  # over four standard deviations


@given(k=st.integers(1, 500), position=st.integers(0, 50))
def test_top_k_picks_among_the_k_highest(k: int, position: int) -> None:
    scores = Sampling(1.5, top_k=k).scores(LOGITS, position)
    assert np.isfinite(scores).sum() == k
    assert set(np.flatnonzero(np.isfinite(scores))) == set(np.argsort(-LOGITS)[:k])


@given(p=st.floats(0.01, 1.0), temperature=st.floats(0.2, 2.0))
def test_top_p_keeps_the_fewest_tokens_that_hold_p(p: float, temperature: float) -> None:
    kept = np.isfinite(Sampling(temperature, top_p=p).scores(LOGITS, 3))
    shares = softmax((LOGITS / temperature).astype(np.float32))
    assert shares[kept].sum() >= p - 1e-6
    assert shares[kept].sum() - shares[kept].min() < p + 1e-6
    assert shares[kept].min() >= shares[~kept].max(initial=0.0)


@given(p=st.floats(0.001, 1.0), temperature=st.floats(0.2, 2.0))
def test_min_p_keeps_the_tokens_that_are_so_probable_beside_the_best(p: float, temperature: float) -> None:
    kept = np.isfinite(Sampling(temperature, min_p=p).scores(LOGITS, 3))
    shares = softmax((LOGITS / temperature).astype(np.float32))
    assert kept[np.argmax(LOGITS)]
    assert shares[kept].min() >= p * shares.max() * (1 - 1e-4)
    assert shares[~kept].max(initial=0.0) <= p * shares.max() * (1 + 1e-4)


def test_tokens_that_the_text_has_had_become_less_likely_however_often_it_had_them() -> None:
    logits = np.array([2.0, -1.0, 3.0, 0.5], np.float32)
    sampling = Sampling(repetition_penalty=2.0)
    assert sampling.scores(logits, 3, [0, 1, 0]).tolist() == [1.0, -2.0, 3.0, 0.5]
    assert Sampling().pick(logits, 2) == sampling.pick(logits, 2, [0, 1]) == 2
    assert sampling.pick(logits, 1, [2]) == 0
    assert sampling.scores(logits, 2, [9, 0]).tolist() == [1.0, -1.0, 3.0, 0.5], "a token that a draft model lacks"
    with pytest.raises(InvariantError, match="no history of position 3"):
        sampling.pick(logits, 3, [2])


@settings(deadline=None)
@given(
    temperature=st.floats(0.2, 2.0),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.floats(0.3, 0.99), st.just(1.0)),
    min_p=st.floats(0.0, 0.2),
    penalty=st.floats(0.5, 2.0),
    history=st.lists(st.integers(0, 499), max_size=20),
)
def test_the_distribution_is_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, history: list[int]
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    sampling = Sampling(temperature, top_k, top_p, 0, min_p, penalty)
    got = sampling.scores(LOGITS, len(history), history) - gumbel_noise(0, len(history), len(LOGITS))
    expected, text = torch.tensor(LOGITS, dtype=torch.float64)[None], torch.tensor([history], dtype=torch.long)
    if history:
        expected = process.RepetitionPenaltyLogitsProcessor(penalty)(text, expected)
    for warp, value, off in (
        (process.TemperatureLogitsWarper, temperature, None),
        (process.TopKLogitsWarper, top_k, 0),
        (process.TopPLogitsWarper, top_p, 1.0),
        (process.MinPLogitsWarper, min_p, 0.0),
    ):
        expected = expected if value == off else warp(value)(text, expected)
    np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-9, atol=1e-9)


def test_equal_logits_at_the_border_of_top_k_rank_by_id() -> None:
    scores = Sampling(1.0, top_k=2).scores(np.array([1, 5, 1, 1], np.float32), 0)
    assert np.isfinite(scores).tolist() == [True, True, False, False]


def test_noise_is_finite_and_gumbel() -> None:
    noise = gumbel_noise(3, 4, 100_000)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.05


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-320}, "temperature"),
        ({"temperature": 0.0009}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, float], field: str) -> None:
    with pytest.raises(BadInputError, match=field):
        Sampling(**settings)


def test_the_lowest_temperature_is_as_good_as_greedy() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert Sampling(1e-3, top_p=0.9).pick(LOGITS, 3) == Sampling().pick(LOGITS, 3)
