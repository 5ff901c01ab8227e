"""What is combined: everything is a function of a combination's number, so that one alone can be run again."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from backends.models.finding import DEFAULT_MODEL
from backends.models.random_models import FAMILY_CONFIGS
from backends.sampling import Sampling

PER_PIPELINE = 20
"""Combinations that share a pipeline: those with the same quotient of their numbers."""

TINY_LAYERS = 6
VOCABULARY = 160
ARITHMETICS = (
    ("float32", "auto"),
    ("bfloat16", "auto"),
    ("quantized", "auto"),
    ("float32", "torch"),
    ("bfloat16", "torch"),
    ("float16", "torch"),
)
"""``execution.dtype`` with ``execution.kernels``; ``auto`` is the native kernels."""
QUANTIZATIONS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""Of random models' GGUF files."""
STAGES = (1, 2, 3, 4)
DRAFTERS = ("ngram", "planted", "layer-skip", "draft model")
LONGEST_PROMPT, LONGEST_TEXT = 200, 48
LETTERS = "abcdef"
"""What the tokens of random models stand for, in turns: few letters, so that stop strings are met."""

_REAL_MODEL_EVERY = 20  # pipelines
_REAL_PROMPTS = (
    "Count from one to twenty: one, two, three, four, five, six, seven, eight,",
    "The river runs to the sea. The river runs to the town. The river",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
    "Why is the sky blue?",
)
_REAL_STOPS = (".", "\n\n", " the", "er ", "!", "return")
_BLOCK_EDGES = (1, 2, 63, 64, 65, 127, 128, 129)


@dataclass(frozen=True, slots=True)
class Setup:
    """One pipeline: ``layers`` per stage of a random model of ``family``, or of SmolLM2-135M under its name.

    ``skipped`` layers are left out by the layer-skip drafter; ``quantization`` is that of a random model's GGUF file.
    """

    number: int
    family: str
    dtype: str
    kernels: str
    quantization: str
    layers: tuple[int, ...]
    drafter: str
    skipped: tuple[int, ...]

    @property
    def is_tiny(self) -> bool:
        """Whether its model is a random one."""
        return self.family in FAMILY_CONFIGS


@dataclass(frozen=True, slots=True)
class Combination:
    """One generation. ``prompt`` is tokens, or the text of a real model's.

    ``spare_cells`` are KV cells beyond the text's own (None: as many as the policy can use); ``acceptance`` is how
    often a planted drafter is right. ``lost``: this stage's process is killed when so many runs have been submitted.
    """

    number: int
    policy: str
    settings: Mapping[str, Any]
    sampling: Sampling
    prompt: tuple[int, ...] | str
    new_tokens: int
    stop_tokens: tuple[int, ...]
    stop: tuple[str, ...]
    spare_cells: int | None
    prefill_window: int
    acceptance: float
    lost: tuple[int, int] | None

    @property
    def pipeline(self) -> int:
        """The number of its setup."""
        return self.number // PER_PIPELINE


@cache
def _kinds() -> list[tuple[str, tuple[str, str], int, str]]:
    """Every family with every arithmetic, number of stages and drafter, in an order that mixes them well."""
    kinds = list(product(FAMILY_CONFIGS, ARITHMETICS, STAGES, DRAFTERS))
    random.Random("kinds").shuffle(kinds)
    return kinds


def draw_setup(number: int) -> Setup:
    """Pipeline ``number``: every twentieth runs SmolLM2-135M."""
    draw = random.Random(f"pipeline {number}")
    family, (dtype, kernels), stages, drafter = _kinds()[number % len(_kinds())]
    layers = TINY_LAYERS
    if (family, dtype) == ("qwen2-windows", "quantized"):
        family = "qwen2"  # GGUF files cannot say which layers have windows
    if number % _REAL_MODEL_EVERY == _REAL_MODEL_EVERY - 1:
        family, layers, kernels = DEFAULT_MODEL, 30, "auto"
        dtype = "bfloat16" if dtype == "float16" else dtype
        drafter = "layer-skip" if drafter == "draft model" else drafter
    cuts = sorted(draw.sample(range(1, layers), stages - 1))
    each = tuple(last - first for first, last in zip([0, *cuts], [*cuts, layers], strict=True))
    skipped = tuple(sorted(draw.sample(range(1, layers - 1), 1 + layers // 10)))
    return Setup(number, family, dtype, kernels, draw.choice(QUANTIZATIONS), each, drafter, skipped)


def draw_combination(number: int) -> Combination:
    """Combination ``number``."""
    draw = random.Random(f"combination {number}")
    setup = draw_setup(number // PER_PIPELINE)
    policy = draw.choices(("pipeinfer", "speculative", "autoregressive"), (12, 5, 1))[0]
    return Combination(
        number=number,
        policy=policy,
        settings=_settings(draw, policy),
        sampling=_sampling(draw),
        prompt=_prompt(draw) if setup.is_tiny else draw.choice(_REAL_PROMPTS),
        new_tokens=_length(draw) if setup.is_tiny else draw.randint(4, LONGEST_TEXT // 2),
        stop_tokens=tuple(draw.sample(range(VOCABULARY), 2)) if draw.random() < 0.25 else (),
        stop=_stop(draw, setup) if draw.random() < 0.3 else (),
        spare_cells=draw.choice((None, None, None, 0, 3, 9)),
        prefill_window=draw.choice((1, 2, 8)),
        acceptance=draw.choice((0.0, 0.5, 0.8, 0.95, 1.0)),
        lost=(draw.randrange(len(setup.layers)), draw.randint(1, 12)) if draw.random() < 0.1 else None,
    )


def _settings(draw: random.Random, policy: str) -> dict[str, Any]:
    if policy == "pipeinfer":
        return {
            "micro_batch": draw.randint(1, 9),
            "branches": draw.choice((1, 2, 2, 3, 4)),
            "p_accept": draw.choice((0.0, 0.0, 0.1, 0.3)),
            "p_split": draw.choice((0.0, 0.02, 0.1, 0.3)),
            "p_recovery": draw.choice((0.0, 0.0, 0.1)),
            "p_decay": draw.choice((0.0, 0.0, 0.1)),
            "partitions": draw.choice((1, 2, 4, 16)),
            "asynchronous": draw.random() < 0.8,
            "continuous": draw.random() < 0.8,
            "multibuffering": draw.random() < 0.8,
            "cancellation": draw.random() < 0.8,
            "always_canonical": draw.random() < 0.4,
            "calibrated": draw.random() < 0.4,
        }
    if policy == "speculative":
        return {
            "max_nodes": draw.randint(1, 12),
            "branches": draw.choice((1, 2, 2, 3, 4)),
            "cutoff": draw.choice((0.0, 0.1, 0.3)),
            "split": draw.choice((0.0, 0.02, 0.1)),
        }
    return {}


def _sampling(draw: random.Random) -> Sampling:
    return Sampling(
        temperature=draw.choice((0.0, 0.0, 0.3, 0.7, 1.0, 1.5)),
        top_k=draw.choice((0, 0, 4, 40)),
        top_p=draw.choice((1.0, 1.0, 0.7, 0.95)),
        min_p=draw.choice((0.0, 0.0, 0.05)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.2, 0.9)),
        seed=draw.randrange(2**32),
    )


def _prompt(draw: random.Random) -> tuple[int, ...]:
    """A few phrases again and again, for the look-up of n-grams; often a length at the edge of a block."""
    length = draw.choice((draw.choice(_BLOCK_EDGES), draw.randint(1, LONGEST_PROMPT)))
    phrases = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 9))] for _ in range(4)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += draw.choice(phrases)
    return tuple(tokens[:length])


def _length(draw: random.Random) -> int:
    if draw.random() < 0.1:
        return draw.randint(1, 3)
    return draw.randint(12, LONGEST_TEXT)


def _stop(draw: random.Random, setup: Setup) -> tuple[str, ...]:
    if not setup.is_tiny:
        return tuple(draw.sample(_REAL_STOPS, 2))
    return tuple("".join(draw.choices(LETTERS, k=length)) for length in (3, 3, 4))
