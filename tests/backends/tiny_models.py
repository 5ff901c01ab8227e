"""Random Llama models of a few kilobytes, and a pipeline of stages chained in this process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from backends.models.llama import read_layer
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from backends.sampling import Sampling
from pipesim.scheduling.runs import Run, RunKind

__all__ = ["Chain", "prefill_runs", "read_layer", "save_tiny", "tiny_config", "tiny_source"]


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 160,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 2,
        "bos_token_id": 1,
    } | changes


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    weights = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            prefix + "self_attn.k_proj.weight": matrix(kv * head_dim, hidden),
            prefix + "self_attn.v_proj.weight": matrix(kv * head_dim, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            prefix + "mlp.gate_proj.weight": matrix(inner, hidden),
            prefix + "mlp.up_proj.weight": matrix(inner, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    weights["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocabulary, hidden)
    return weights


def save_tiny(folder: Path, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Writes a random model as a Hugging Face folder, in one file or in shards with an index."""
    config = tiny_config(**changes)
    weights = random_weights(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def tiny_source(folder: Path, **changes: Any) -> ModelSource:
    return open_model(save_tiny(folder, **changes))


def prefill_runs(tokens: Sequence[int], everyone: int, first_output: int | None = None) -> list[Run]:
    """The prompt in chunks of 64 positions; by default only its last row is predicted."""
    runs = []
    for start in range(0, len(tokens), 64):
        chunk = tuple(tokens[start : start + 64])
        positions = tuple(range(start, start + len(chunk)))
        unread = len(chunk) - (positions[-1] == len(tokens) - 1) if first_output is None else first_output
        runs.append(Run(start, 0, RunKind.PREFILL, chunk, positions, (everyone,) * len(chunk), unread))
    return runs


class Chain:
    """Stages in a row, as a pipeline without wires; opens one session on all of them."""

    def __init__(self, stages: Sequence[StageModel], cells: int, sequences: int = 4, session: int = 0) -> None:
        self.stages, self.session = stages, session
        for stage in stages:
            stage.open_session(session, cells, sequences, Sampling())

    def close(self) -> None:
        for stage in self.stages:
            stage.close_session(self.session)

    def skip(self, run: Run) -> None:
        """A void frame: every stage keeps its table in step, none computes."""
        for stage in self.stages:
            stage.admit(self.session, run)

    def logits(self, run: Run) -> torch.Tensor:
        hidden: torch.Tensor | None = None
        for stage in self.stages[:-1]:
            result = stage.forward(self.session, run, hidden, stage.admit(self.session, run))
            assert isinstance(result, torch.Tensor)
            hidden = result
        last = self.stages[-1]
        logits = last.logits(self.session, run, hidden, last.admit(self.session, run))
        assert logits is not None
        return logits
