"""SmolLM2-135M under every policy, drafter and number of stages, greedy and sampled. Minutes long: --runslow."""

import pytest
from pipelines import running

from backends.cluster import ClusterPlan, DrafterPart, stage_parts
from backends.models.loading import open_model
from backends.models.stage_model import StageModel
from backends.placement import split_layers
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from backends.tokenizer import open_tokenizer

pytestmark = [pytest.mark.model, pytest.mark.slow]

NEW_TOKENS = 24
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, seed=7)]
POLICIES = {
    "autoregressive": {},
    "speculative": {"max_nodes": 5, "branches": 2},
    "pipeinfer": {"micro_batch": 3, "branches": 2, "p_split": 0.1},
}
QUESTIONS = ["Write a haiku about rivers.", "Say the months of the year twice, and then once more backwards. " * 6]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = open_tokenizer(open_model("smollm2-135m"))
    return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(smollm2_model: StageModel, prompts: list[list[int]]) -> list[list[list[int]]]:
    """By prompt and sampling."""
    return [
        [generate_in_one_process(smollm2_model, prompt, NEW_TOKENS, sampling=sampling) for sampling in SAMPLINGS]
        for prompt in prompts
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("drafter", ["ngram", "layer-skip", "planted"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_the_text_is_one_processs(
    prompts: list[list[int]], expected: list[list[list[int]]], stages: int, drafter: str
) -> None:
    config = open_model("smollm2-135m").config
    part = DrafterPart(drafter, config.vocabulary, max(map(len, prompts)) + NEW_TOKENS)
    with running(ClusterPlan("smollm2-135m", stage_parts(split_layers(config, stages)), part)) as pipeline:
        for prompt, texts in zip(prompts, expected, strict=True):
            for sampling, text in zip(SAMPLINGS, texts, strict=True):
                for policy, settings in POLICIES.items():
                    known = text if drafter == "planted" and policy != "autoregressive" else None
                    assert pipeline.generate(policy, prompt, NEW_TOKENS, settings, sampling, known) == text
