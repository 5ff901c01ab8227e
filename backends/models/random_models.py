"""Random models of a few kilobytes of every family, for tests and for the exactness campaign."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 70},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 64,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
"""Changes to the tiny Llama that make one of each family (windows in the way of short prompts, not of blocks)."""


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A tiny Llama's ``config.json``, with ``changes``."""
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


def random_weights(config: Mapping[str, Any], seed: int = 0, sharpness: float = 1.0) -> dict[str, torch.Tensor]:
    """All weights that a model of this ``config`` has, by their names in a Hugging Face folder.

    Logits have about ``sharpness`` as their standard deviation: with 1, no token is much more probable than others.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return float(inputs**-0.5) * torch.randn(outputs, inputs, generator=generator)

    family = config["model_type"]
    offset = 1.0 if family == "gemma3_text" else 0.0

    def vector(size: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.1 * torch.randn(size, generator=generator)

    def norm(size: int = hidden) -> torch.Tensor:
        return vector(size, 1.0 - offset)

    # As its own LM head, an embedding of full size would repeat each token for ever.
    scale = hidden**-0.5 if config["tie_word_embeddings"] else 1.0
    weights = {"model.embed_tokens.weight": scale * torch.randn(vocabulary, hidden, generator=generator)}
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
        if family == "qwen2":
            for name, size in (("q", heads), ("k", kv), ("v", kv)):
                weights[f"{prefix}self_attn.{name}_proj.bias"] = vector(size * head_dim)
        if family in ("qwen3", "gemma3_text"):
            weights |= {f"{prefix}self_attn.{name}_norm.weight": norm(head_dim) for name in "qk"}
        if family == "gemma3_text":
            weights[f"{prefix}pre_feedforward_layernorm.weight"] = norm()
            # Layers must outweigh the token that goes in, or its own embedding makes it the next one, too.
            for place in ("attention", "feedforward"):
                weights[f"{prefix}post_{place}_layernorm.weight"] = 2.0 + norm()
    weights["model.norm.weight"] = sharpness * (norm() + offset) - offset
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocabulary, hidden)
    return weights


def save_tiny(folder: Path, shards: int = 1, seed: int = 0, sharpness: float = 1.0, **changes: Any) -> Path:
    """Writes a random model as a Hugging Face folder, in one file or in shards with an index."""
    config = tiny_config(**changes)
    weights = random_weights(config, seed, sharpness)
    if shards == 1:
        return _save(folder, config, weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def save_talker(folder: Path, layers: int = 8, vocabulary: int = 160, **changes: Any) -> Path:
    """Writes a random model whose vocabulary are the words w0, w1, ..; no text of it ends by itself."""
    folder = save_tiny(folder, num_hidden_layers=layers, vocab_size=vocabulary, eos_token_id=None, **changes)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_shortened(folder: Path, model: Path, layers: int) -> Path:
    """Writes the first ``layers`` layers of the tiny model in folder ``model`` as one that drafts for it."""
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": layers}
    kept = {
        name: weight
        for name, weight in load_file(model / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    return _save(folder, config, kept)


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


def _save(folder: Path, config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
