"""Reads a model's sizes and constants from the metadata of a GGUF file."""

from collections.abc import Mapping, Sequence
from typing import Any

from backends.models.config import FAMILIES, LayerKind, ModelConfig
from pipesim.errors import BadInputError

_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_GEMMA_LOCAL_THETA = 10000.0
_GEMMA_PERIOD = 6
_LARGEST_GEMMA = 62  # layers: only this one scales queries by another width than head_dim's


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    rope_factors: Sequence[float] = (),
) -> ModelConfig:
    """The model of a GGUF file with ``metadata`` and tensors of ``shapes``, outermost dimension first.

    ``rope_factors`` is the file's tensor of that name: where Llama 3 files keep their RoPE scaling.

    Raises:
        BadInputError: the model is of an unsupported architecture, or a key is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise BadInputError(
            f"{where}: architecture {architecture!r} is not supported, only {', '.join(_ARCHITECTURES)}"
        )

    def get(key: str, default: Any) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def need(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise BadInputError(f"{where}: metadata key '{architecture}.{key}' is missing")
        return metadata[f"{architecture}.{key}"]

    if "token_embd.weight" not in shapes:
        raise BadInputError(f"{where}: tensor 'token_embd.weight' is missing, the file is incomplete")
    family = FAMILIES[_ARCHITECTURES[architecture]]
    heads, hidden, layers = (int(need(k)) for k in ("attention.head_count", "embedding_length", "block_count"))
    head_dim = int(get("attention.key_length", hidden // heads))
    if int(get("rope.dimension_count", head_dim)) != head_dim:
        raise BadInputError(
            f"{where}: {architecture}.rope.dimension_count differs from head_dim {head_dim}, not supported"
        )
    is_gemma = family.scaled_embedding
    scaling = get("rope.scaling.type", "none")
    if scaling == "linear":
        rope_factors = (float(need("rope.scaling.factor")),) * (head_dim // 2)
    elif scaling != "none":
        raise BadInputError(f"{where}: {architecture}.rope.scaling.type {scaling!r} is not supported")
    window, theta = int(get("attention.sliding_window", 0)), float(get("rope.freq_base", 10000.0))
    everywhere = LayerKind(theta, tuple(rope_factors))
    within = LayerKind(theta, everywhere.rope_factors, window)
    if is_gemma:
        within = LayerKind(float(get("rope.freq_base_swa", _GEMMA_LOCAL_THETA)), window=window)
    pattern = get("attention.sliding_window_pattern", _GEMMA_PERIOD if is_gemma else 0)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return ModelConfig(
        family=family,
        kinds=_layer_kinds(pattern, everywhere, within, layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate=int(need("feed_forward_length")),
        vocabulary=shapes["token_embd.weight"][0],
        query_scale=(hidden // heads if is_gemma and layers == _LARGEST_GEMMA else head_dim) ** -0.5,
        norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in shapes,
        max_context=int(need("context_length")),
        eos_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
    )


def _layer_kinds(
    pattern: int | Sequence[bool], everywhere: LayerKind, within: LayerKind, layers: int
) -> tuple[LayerKind, ...]:
    """``pattern``: every how many layers one sees everything (0: none does), or for each layer whether it does not."""
    if not within.window:
        return (everywhere,) * layers
    if isinstance(pattern, int):
        pattern = [not pattern or (index + 1) % pattern != 0 for index in range(layers)]
    return tuple(within if slides else everywhere for slides in pattern)
