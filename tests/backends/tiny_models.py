"""Random models as GGUF files and as sources, and a pipeline of stages chained in this process."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

from backends.models.loading import ModelSource, open_model
from backends.models.random_models import FAMILY_CONFIGS, save_tiny, tiny_config
from backends.models.stage_model import StageModel
from backends.sampling import Sampling
from pipesim.scheduling.runs import Run, RunKind

__all__ = [
    "FAMILY_CONFIGS",
    "Chain",
    "prefill_runs",
    "save_gguf",
    "save_tiny",
    "tiny_config",
    "tiny_source",
]


def save_gguf(folder: Path, file: Path, quantization: gguf.GGMLQuantizationType | None = None) -> Path:
    """The tiny model of ``folder`` as a GGUF file, its matrices quantized or in float32, as converters write it."""
    config = json.loads((folder / "config.json").read_text())
    family, heads = config["model_type"], config["num_attention_heads"]
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(family, family)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if "sliding_window_pattern" in config:
        writer.add_uint32(f"{architecture}.attention.sliding_window_pattern", config["sliding_window_pattern"])
    if "rope_scaling" in config:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    arch = gguf.MODEL_ARCH[{"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3": "GEMMA3"}[architecture]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, weight in load_file(folder / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if family == "gemma3_text" and "norm" in name:
            weight = weight + 1
        if architecture == "llama" and re.search(r"[qk]_proj", name):
            of = heads if "q_proj" in name else config["num_key_value_heads"]
            weight = weight.view(of, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        values = weight.contiguous().numpy()
        if quantization is None or weight.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


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
