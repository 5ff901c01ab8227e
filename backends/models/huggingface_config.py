"""Reads a Hugging Face ``config.json``, as old and new versions of transformers write it."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from backends.models.config import FAMILIES, Family, LayerKind, ModelConfig
from pipesim.errors import BadInputError

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_REFUSED = ("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping")
_DEFAULTS: dict[str, dict[str, Any]] = {  # what the family's files may leave out
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    },
}


def config_from_huggingface(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that ``raw`` describes; ``where`` names the file in errors.

    Raises:
        BadInputError: the model is of an unsupported kind, or a key is missing.
    """
    if raw.get("model_type") == "gemma3":  # text and images: the text part is a model of its own
        raw = {"eos_token_id": raw.get("eos_token_id"), **raw.get("text_config", {}), "model_type": "gemma3_text"}
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise BadInputError(
            f"{where}: model_type {raw.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}"
        )
    given = {key: value for key, value in raw.items() if value is not None}
    if "sliding_window" in raw:  # null: no window, not the default one
        given.setdefault("sliding_window", 0)
    raw = _DEFAULTS.get(family.name, {}) | given
    for key in _REFUSED:
        if raw.get(key):
            raise BadInputError(f"{where}: {key} is set, models with that are not supported")
    activation = raw.get("hidden_activation") or raw.get("hidden_act", "silu")
    if _ACTIVATIONS.get(activation) != family.activation:
        raise BadInputError(f"{where}: hidden_act {activation!r} is not supported for {family.name}")

    def need(key: str) -> Any:
        if key not in raw:
            raise BadInputError(f"{where}: key {key!r} is missing")
        return raw[key]

    heads = int(need("num_attention_heads"))
    head_dim = int(raw.get("head_dim") or int(need("hidden_size")) // heads)
    eos = raw.get("eos_token_id")
    return ModelConfig(
        family=family,
        kinds=_layer_kinds(raw, family, int(need("num_hidden_layers")), head_dim, where),
        hidden=int(need("hidden_size")),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads", heads)),
        head_dim=head_dim,
        intermediate=int(need("intermediate_size")),
        vocabulary=int(need("vocab_size")),
        query_scale=float(raw.get("query_pre_attn_scalar", head_dim)) ** -0.5,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_context=int(raw.get("max_position_embeddings", 2048)),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _layer_kinds(
    raw: Mapping[str, Any], family: Family, layers: int, head_dim: int, where: str
) -> tuple[LayerKind, ...]:
    window = int(raw.get("sliding_window", 0))
    if family.windows == "none" or (family.windows == "late" and not raw.get("use_sliding_window")):
        window = 0
    everywhere = LayerKind(*_rope(raw, "full_attention", head_dim, where))
    within = LayerKind(*_rope(raw, "sliding_attention", head_dim, where), window=window)
    types = raw.get("layer_types") if family.windows != "all" else None
    if types is not None:
        if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise BadInputError(f"{where}: layer_types must name full_attention or sliding_attention for each layer")
        return tuple(within if kind == "sliding_attention" else everywhere for kind in types)
    period, first = int(raw.get("sliding_window_pattern", 6)), int(raw.get("max_window_layers", 28))
    match family.windows:
        case "all":
            full: Collection[int] = ()
        case "most":
            full = range(period - 1, layers, period)
        case "late":
            full = range(first)
        case _:
            full = range(layers)
    return tuple(everywhere if index in full else within for index in range(layers))


def _rope(raw: Mapping[str, Any], layer_type: str, head_dim: int, where: str) -> tuple[float, tuple[float, ...]]:
    """Base frequency and factors of the layers of one type: some files have one entry for each type."""
    rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta", 1e4)}
    if layer_type == "sliding_attention" and "rope_local_base_freq" in raw:
        rope = {"rope_theta": raw["rope_local_base_freq"]}
    else:
        rope |= raw.get("rope_scaling") or {}
    given = raw.get("rope_parameters") or {}
    rope |= (given.get(layer_type) or {}) if "full_attention" in given or "sliding_attention" in given else given
    theta = float(rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        if kind == "default":
            return theta, ()
        if kind == "linear":
            return theta, (float(rope["factor"]),) * (head_dim // 2)
        if kind == "llama3":
            return theta, _llama3_factors(rope, theta, head_dim)
    except KeyError as error:
        raise BadInputError(f"{where}: rope_type {kind!r} needs the key {error}") from None
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
