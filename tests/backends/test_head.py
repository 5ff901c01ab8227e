"""Head, stages and drafter as real processes: the text is plain decoding's, whatever runs where (I3)."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pipelines import LAYERS, RunningPipeline, running, tiny_plan
from tiny_models import save_tiny

from backends.cluster import ClusterPlan, DrafterPart, stage_parts
from backends.models.loading import open_model
from backends.models.stage_model import StageModel
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from pipesim.errors import BadInputError, KvCapacityError, StageFailedError
from pipesim.event_log import replay
from pipesim.scheduling.commands import Outcome

PROMPT = [5, 9, 5, 9, 17, 5, 9, 5, 33, 80] * 7  # more than one prefill chunk, and worth looking up n-grams in
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=11),
    Sampling(temperature=0.6, min_p=0.02, repetition_penalty=1.2, seed=12),
]
POLICIES = {
    "autoregressive": {},
    "speculative": {"max_nodes": 5, "branches": 2},
    "pipeinfer": {"micro_batch": 3, "branches": 2, "p_split": 0.1},
}
Reference = Callable[..., list[int]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eight-layers"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    """Plain decoding in this process, each text computed once."""
    whole = StageModel(open_model(model), 0, LAYERS)
    texts: dict[object, list[int]] = {}

    def text(prompt: list[int], new_tokens: int, sampling: Sampling) -> list[int]:
        key = (tuple(prompt), new_tokens, sampling)
        if key not in texts:
            texts[key] = generate_in_one_process(whole, prompt, new_tokens, sampling=sampling)
        return texts[key]

    return text


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 8], ids=lambda n: f"{n}-stages")
def stages(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=["ngram", "layer-skip", "planted"])
def drafter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(model: Path, stages: int, drafter: str) -> Iterator[RunningPipeline]:
    with running(tiny_plan(model, stages, drafter)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def two_stages(model: Path) -> Iterator[RunningPipeline]:
    with running(tiny_plan(model, 2)) as pipeline:
        yield pipeline


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_text_is_plain_decodings(
    pipeline: RunningPipeline, drafter: str, reference: Reference, policy: str, sampling: Sampling
) -> None:
    expected = reference(PROMPT, 40, sampling)
    known = expected if drafter == "planted" and policy != "autoregressive" else None
    assert pipeline.generate(policy, PROMPT, 40, POLICIES[policy], sampling, known) == expected
    trace = pipeline.traces[-1]
    assert trace.complete
    assert trace.drained_s is not None
    assert len(trace.spans) == len(trace.runs) * len(trace.stages)
    if drafter == "planted" and policy != "autoregressive":
        assert trace.drafted_accepted > 0.3 * trace.drafted_verified > 0, "a drafter that is right in 70 % of all cases"


@pytest.mark.parametrize("total", [2, 3, 63, 64, 65, 66, 127, 128, 129, 130, 257, 600])
def test_texts_of_any_length_cross_the_blocks_of_the_kv_cells(
    two_stages: RunningPipeline, reference: Reference, total: int
) -> None:
    new_tokens = min(12, total - 1)
    prompt = [3 + i * i % 150 for i in range(total - new_tokens)]
    expected = reference(prompt, new_tokens, Sampling())
    for policy, settings in POLICIES.items():
        assert two_stages.generate(policy, prompt, new_tokens, settings) == expected


def test_the_event_log_of_a_real_head_replays_exactly(two_stages: RunningPipeline, tmp_path: Path) -> None:
    log = io.StringIO()
    two_stages.generate("pipeinfer", PROMPT, 40, {**POLICIES["pipeinfer"], "calibrated": True}, events=log)
    file = tmp_path / "events.jsonl"
    file.write_text(log.getvalue())
    assert replay(file) is None


def test_runs_that_the_text_contradicts_are_cancelled_on_the_stages(two_stages: RunningPipeline) -> None:
    two_stages.generate("pipeinfer", PROMPT, 60, {"micro_batch": 2, "p_accept": 0.0})
    trace = two_stages.traces[-1]
    cancelled = {run.run_id for run in trace.runs if run.outcome is Outcome.CANCELLED}
    assert cancelled
    assert any(span.void for span in trace.spans if span.run_id in cancelled)
    assert all(span.end_s >= span.start_s for span in trace.spans)


def test_spans_lie_between_submission_and_return(two_stages: RunningPipeline) -> None:
    """One clock, although every stage stamps with its own; a loopback clock offset is known to a millisecond or so."""
    two_stages.generate("autoregressive", PROMPT, 20)
    trace = two_stages.traces[-1]
    runs = {run.run_id: run for run in trace.runs}
    slack_s = 0.005
    for span in trace.spans:
        run = runs[span.run_id]
        assert run.returned_s is not None
        assert run.submitted_s - slack_s <= span.start_s <= span.end_s <= run.returned_s + slack_s


def test_link_bytes_are_counted_for_every_hop(two_stages: RunningPipeline) -> None:
    two_stages.generate("pipeinfer", PROMPT, 20)
    sent = two_stages.traces[-1].link_bytes
    expected = {"head to stage 0", "stage 0 to stage 1", "stage 1 to head", "head to drafter", "drafter to head"}
    assert expected <= set(sent)
    assert sent["stage 0 to stage 1"] > sent["head to stage 0"] > 0, "activations are longer than tokens"


@pytest.mark.parametrize("vocabulary", [176, 100])
def test_a_draft_model_may_have_more_or_fewer_embeddings(
    model: Path, reference: Reference, tmp_path: Path, vocabulary: int
) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=2, vocab_size=vocabulary)
    with running(tiny_plan(model, 1, str(other))) as pipeline:
        assert pipeline.generate("pipeinfer", PROMPT, 30) == reference(PROMPT, 30, Sampling())


def test_a_draft_model_drafts(model: Path, reference: Reference, tmp_path: Path) -> None:
    draft_model = save_tiny(tmp_path / "draft", num_hidden_layers=2)
    with running(tiny_plan(model, 2, str(draft_model))) as pipeline:
        for sampling in SAMPLINGS:
            assert pipeline.generate("pipeinfer", PROMPT, 30, sampling=sampling) == reference(PROMPT, 30, sampling)
            assert pipeline.traces[-1].drafts


def test_layers_that_do_not_exist_are_bad_input(model: Path) -> None:
    plan = ClusterPlan(str(model), stage_parts([LAYERS, 1]))
    with pytest.raises(BadInputError, match=r"layers \[8, 9\) do not exist"), running(plan):
        pass


def test_a_model_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"), running(tiny_plan(tmp_path / "none", 2)):
        pass


def test_a_startup_that_takes_too_long_is_an_error_that_names_the_knob(model: Path) -> None:
    with (
        pytest.raises(StageFailedError, match="startup_timeout_s"),
        running(tiny_plan(model, 2, startup_timeout_s=0.05)),
    ):
        pass


def test_bad_input_at_the_scheduler_leaves_the_pipeline_usable(
    two_stages: RunningPipeline, reference: Reference
) -> None:
    with pytest.raises((BadInputError, KvCapacityError)):
        two_stages.generate("autoregressive", [], 5)
    assert two_stages.generate("autoregressive", PROMPT, 5) == reference(PROMPT, 5, Sampling())


@pytest.mark.model
@pytest.mark.parametrize("drafter_name", ["ngram", "layer-skip"])
def test_smollm2_over_two_stages_gives_plain_decodings_text(smollm2_model: StageModel, drafter_name: str) -> None:
    config = smollm2_model.config
    prompt = [1, 4093, 198, 5345, 253, 2260, 253, 2260, 253, 2260, 198]
    part = DrafterPart(drafter_name, config.vocabulary, 64)
    with running(ClusterPlan("smollm2-135m", stage_parts([19, 11]), part)) as pipeline:
        for sampling in (Sampling(), Sampling(temperature=0.7, seed=3)):
            expected = generate_in_one_process(smollm2_model, prompt, 16, sampling=sampling)
            for policy in POLICIES:
                assert pipeline.generate(policy, prompt, 16, POLICIES[policy], sampling) == expected
