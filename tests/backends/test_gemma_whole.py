"""Gemma-3-270M as it comes: sliding windows of 512 in five of six layers. Minutes long: --runslow."""

import gc
from typing import Any

import pytest
import torch
from pipelines import running
from test_exact import EVERYONE, micro_batches, one_row_at_a_time, text
from test_models import all_logits
from test_tokenizer import TEXTS
from tiny_models import Chain, prefill_runs

from backends.cluster import ClusterPlan, DrafterPart, stage_parts
from backends.models.finding import GEMMA
from backends.models.loading import ModelSource
from backends.models.stage_model import StageModel
from backends.placement import split_layers
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from backends.tokenizer import ModelTokenizer, open_tokenizer

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1800)]

STORY = "A pipeline is a row of stages. Each stage holds some layers, and a token goes through all of them in order. "
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer(gemma: ModelSource) -> ModelTokenizer:
    return open_tokenizer(gemma)


@pytest.fixture(scope="module")
def theirs(gemma: ModelSource) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        gemma.path.parent, gguf_file=gemma.path.name, dtype=torch.float32, attn_implementation="eager"
    )


def test_logits_and_greedy_text_equal_transformers_beyond_the_window(
    gemma: ModelSource, tokenizer: ModelTokenizer, theirs: Any
) -> None:
    prompt = tokenizer.encode(STORY * 25)
    assert len(prompt) > gemma.config.kinds[0].window == 512
    with torch.inference_mode():
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        expected = theirs(torch.tensor([output])).logits[0]
    model = StageModel(gemma, 0, gemma.config.layers)
    got = all_logits(model, output)
    error = float((got - expected).abs().max())
    assert error < 2e-3, "of logits up to a hundred"
    best = expected.topk(2).values
    margin = float((best[:, 0] - best[:, 1])[len(prompt) - 1 : -1].min())
    assert margin > 2 * error, "a near-tie decided this text: choose another prompt"
    assert generate_in_one_process(model, prompt, NEW_TOKENS) == output[len(prompt) :]
    print(f"largest logit error {error:.1e} of {float(expected.abs().max()):.0f}, smallest greedy margin {margin:.1e}")


def test_ids_equal_transformers(gemma: ModelSource, tokenizer: ModelTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(gemma.path.parent, gguf_file=gemma.path.name)
    for sample in [
        *TEXTS,
        STORY * 3,
        "  two  spaces   three",
        "<b>bold</b>\n\n\n<start_of_turn>user\nhi<end_of_turn>\n",
    ]:
        ids = theirs(sample)["input_ids"]
        assert tokenizer.encode(sample) == ids, sample
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), sample
    assert tokenizer.vocabulary == gemma.config.vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_equal_in_any_micro_batch_and_stage_split(gemma: ModelSource, dtype: torch.dtype) -> None:
    kept = {0, 5, 17}  # within the window, everything, everything
    stages = [
        StageModel(gemma, first, last, dtype, skipped=[at for at in range(first, last) if at not in kept])
        for first, last in ((0, 3), (3, 18))
    ]
    gc.collect()
    whole = StageModel(gemma, 0, 18, dtype, skipped=[at for at in range(18) if at not in kept])
    for length, sizes, siblings in [(5, [1, 2, 3], 1), (574, [4, 9], 3), (640, [8, 1], 0)]:
        tokens = text(length + sum(sizes), gemma.config.vocabulary)
        alone = one_row_at_a_time([whole], tokens[:length], tokens[length:])
        assert torch.equal(alone, micro_batches(stages, tokens[:length], tokens[length:], sizes, siblings, 7))


def test_a_pipeline_gives_one_process_s_text_at_every_policy(gemma: ModelSource, tokenizer: ModelTokenizer) -> None:
    config, prompt = gemma.config, tokenizer.encode(STORY * 22)
    model = StageModel(gemma, 0, config.layers)
    samplings = [Sampling(), Sampling(temperature=0.8, min_p=0.02, repetition_penalty=1.1, seed=7)]
    expected = [generate_in_one_process(model, prompt, NEW_TOKENS, sampling=sampling) for sampling in samplings]
    part = DrafterPart("ngram", config.vocabulary, len(prompt) + NEW_TOKENS)
    plan = ClusterPlan(GEMMA, stage_parts(split_layers(config, 3)), part, startup_timeout_s=600)
    with running(plan) as pipeline:
        for sampling, wanted in zip(samplings, expected, strict=True):
            for policy in ("autoregressive", "speculative", "pipeinfer"):
                assert pipeline.generate(policy, prompt, NEW_TOKENS, sampling=sampling) == wanted


def test_the_whole_context_is_at_hand(gemma: ModelSource) -> None:
    """Cells for 32,768 positions; two layers are enough to reach the last one."""
    model = StageModel(gemma, 0, 18, skipped=[at for at in range(18) if at not in (0, 5)])
    assert gemma.config.max_context == 32_768
    chain = Chain([model], gemma.config.max_context, sequences=4)
    tokens = text(gemma.config.max_context, gemma.config.vocabulary)
    for run in prefill_runs(tokens, EVERYONE):
        logits = chain.logits(run)
    assert logits.shape == (1, gemma.config.vocabulary)
    assert logits.isfinite().all()
    chain.close()
