"""What a model looks like: its family, sizes and constants, whatever file they were read from."""

import math
from dataclasses import dataclass

from pipesim.errors import BadInputError


@dataclass(frozen=True, slots=True)
class Family:
    """All that sets a model family apart from Llama. One decoder layer serves them all.

    Attributes:
        name: Hugging Face's ``model_type``.
        qkv_bias: query, key and value projections have biases.
        qk_norm: each head's queries and keys are normalised before they are rotated.
        post_norms: what attention and MLP return is normalised before it is added to the hidden state.
        norm_offset: added to the norms' stored weights (Gemma stores them minus 1; GGUF files do not).
        scaled_embedding: embeddings are multiplied by the square root of ``hidden``.
        activation: of the MLP's gate, ``silu`` or ``gelu_tanh``.
        windows: which layers look back only so far, where a window is configured: ``all``, ``late`` ones, or ``most``,
            all but every sixth; ``none`` if the family has no windows.
    """

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    activation: str = "silu"
    windows: str = "none"


FAMILIES = {
    family.name: family
    for family in (
        Family("llama"),
        Family("mistral", windows="all"),
        Family("qwen2", qkv_bias=True, windows="late"),
        Family("qwen3", qk_norm=True, windows="late"),
        Family(
            "gemma3_text",
            qk_norm=True,
            post_norms=True,
            norm_offset=1.0,
            scaled_embedding=True,
            activation="gelu_tanh",
            windows="most",
        ),
    )
}
"""Supported families by name."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How a layer looks back on the text.

    A row at position ``p`` sees positions above ``p - window`` (0: all). ``rope_factors`` divides each of the
    ``head_dim // 2`` rotary frequencies (empty: all by 1); every supported kind of RoPE scaling comes down to it.
    """

    rope_theta: float
    rope_factors: tuple[float, ...] = ()
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a model. ``kinds`` has one entry per layer; ``query_scale`` multiplies queries."""

    family: Family
    kinds: tuple[LayerKind, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    query_scale: float
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
        for kind in self.kinds:
            if len(kind.rope_factors) not in (0, self.head_dim // 2):
                raise BadInputError(f"model config: {len(kind.rope_factors)} rope factors for head_dim {self.head_dim}")
            if kind.window < 0:
                raise BadInputError(f"model config: sliding window {kind.window} must be at least 1")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.kinds)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return math.sqrt(self.hidden) if self.family.scaled_embedding else 1.0
