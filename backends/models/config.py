"""What a Llama-family model looks like: sizes, constants and special tokens, whatever file they were read from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipesim.errors import BadInputError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a Llama-family model.

    ``rope_factors`` divides each of the ``head_dim // 2`` rotary frequencies (empty: all by 1); every supported kind of
    RoPE scaling comes down to it.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    rope_theta: float
    rope_factors: tuple[float, ...]
    norm_eps: float
    tied: bool
    max_context: int
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "max_context"):
            if getattr(self, name) < 1:
                raise BadInputError(f"model config: {name} is {getattr(self, name)}, must be at least 1")
        if self.heads % self.kv_heads:
            raise BadInputError(f"model config: {self.heads} heads do not divide into {self.kv_heads} kv_heads")
        if self.head_dim % 2:
            raise BadInputError(f"model config: head_dim {self.head_dim} is odd, rotary embedding needs pairs")
        if len(self.rope_factors) not in (0, self.head_dim // 2):
            raise BadInputError(f"model config: {len(self.rope_factors)} rope factors for head_dim {self.head_dim}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def config_from_huggingface(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the keys of a Hugging Face ``config.json``; ``where`` names the file in errors."""

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise BadInputError(f"{where}: key {key!r} is missing")
        return raw[key]

    if raw.get("model_type") != "llama":
        raise BadInputError(f"{where}: model_type {raw.get('model_type')!r} is not supported, use a 'llama' model")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise BadInputError(f"{where}: {key} is set, models with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise BadInputError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, use 'silu'")
    heads = int(need("num_attention_heads"))
    head_dim = int(raw.get("head_dim") or int(need("hidden_size")) // heads)
    rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta", 10000.0)}
    rope |= raw.get("rope_scaling") or {}
    rope |= raw.get("rope_parameters") or {}
    theta = float(rope["rope_theta"])
    eos = raw.get("eos_token_id")
    return ModelConfig(
        family="llama",
        layers=int(need("num_hidden_layers")),
        hidden=int(need("hidden_size")),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        intermediate=int(need("intermediate_size")),
        vocabulary=int(need("vocab_size")),
        rope_theta=theta,
        rope_factors=_rope_factors(rope, theta, head_dim, where),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_context=int(raw.get("max_position_embeddings", 2048)),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _rope_factors(rope: Mapping[str, Any], theta: float, head_dim: int, where: str) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind == "linear":
        return (float(rope["factor"]),) * (head_dim // 2)
    if kind == "llama3":
        return _llama3_factors(rope, theta, head_dim)
    raise BadInputError(f"{where}: rope_type {kind!r} is not supported, use 'default', 'linear' or 'llama3'")


def _llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between blended (Llama 3.1)."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for pair in range(head_dim // 2):
        turns = context / (2 * math.pi * theta ** (2 * pair / head_dim))  # full turns within the trained context
        blend = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / (blend + (1.0 - blend) / factor))
    return tuple(factors)


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
    """Reads GGUF metadata of the llama architecture; ``shapes`` are the tensors' shapes, outermost first.

    ``rope_factors`` stays empty here: GGUF keeps Llama 3's factors in a tensor, which the caller adds.
    """

    def need(key: str) -> Any:
        if key not in metadata:
            raise BadInputError(f"{where}: metadata key {key!r} is missing")
        return metadata[key]

    if need("general.architecture") != "llama":
        raise BadInputError(
            f"{where}: architecture {metadata['general.architecture']!r} is not supported, use a 'llama' model"
        )
    if "token_embd.weight" not in shapes:
        raise BadInputError(f"{where}: tensor 'token_embd.weight' is missing, the file is incomplete")
    heads, hidden = int(need("llama.attention.head_count")), int(need("llama.embedding_length"))
    head_dim = int(metadata.get("llama.attention.key_length", hidden // heads))
    if int(metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise BadInputError(f"{where}: llama.rope.dimension_count differs from head_dim {head_dim}, not supported")
    factors: tuple[float, ...] = ()
    if metadata.get("llama.rope.scaling.type", "none") == "linear":
        factors = (float(metadata["llama.rope.scaling.factor"]),) * (head_dim // 2)
    elif metadata.get("llama.rope.scaling.type", "none") != "none":
        raise BadInputError(f"{where}: llama.rope.scaling.type {metadata['llama.rope.scaling.type']!r} not supported")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return ModelConfig(
        family="llama",
        layers=int(need("llama.block_count")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(metadata.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate=int(need("llama.feed_forward_length")),
        vocabulary=shapes["token_embd.weight"][0],
        rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
        rope_factors=factors,
        norm_eps=float(need("llama.attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in shapes,
        max_context=int(need("llama.context_length")),
        eos_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
    )
