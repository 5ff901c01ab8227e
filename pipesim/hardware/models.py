"""Profiles of models: shapes, parameters counted from them, and bytes by quantization."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer, as far as bytes and operations depend on them.

    ``intermediate`` is the MLP's width; ``gated`` MLPs (Llama) have three matrices, others (Falcon) two. ``tied``: the
    LM head is the embedding; stages other than the first hold a copy.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Query and output projections, keys and values, MLP, two norms."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """The token embedding, which the first stage holds; the LM head on the last one is as large."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """The whole model, last norm included."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    @property
    def kv_elements(self) -> int:
        """Keys and values of one cell in one layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model by name. ``published`` is the number of parameters that its publisher or its files state."""

    name: str
    shape: ModelShape
    published: float
    source: str


_LLAMA_7B = ModelShape(32, 4096, 32, 32, 11008, 32000)
_LLAMA_13B = ModelShape(40, 5120, 40, 40, 13824, 32000)
_LLAMA_70B = ModelShape(80, 8192, 64, 8, 28672, 32000)
_LLAMA_2 = "Llama 2 (arXiv 2307.09288) and its config.json"
_LLAMA_3 = "The Llama 3 Herd of Models (arXiv 2407.21783) and its config.json"
_FALCON = "The Falcon Series (arXiv 2311.16867) and its config.json; the files hold an LM head of their own"

MODELS: Mapping[str, ModelProfile] = MappingProxyType(
    {
        model.name: model
        for model in (
            ModelProfile("llama-2-7b", _LLAMA_7B, 6_738_415_616, _LLAMA_2),
            ModelProfile("llama-2-13b", _LLAMA_13B, 13_015_864_320, _LLAMA_2),
            ModelProfile("llama-2-70b", _LLAMA_70B, 68_976_648_192, _LLAMA_2),
            ModelProfile(
                "dolphin-70b", _LLAMA_70B, 68.98e9, f"Dolphin 2.2 70B is a fine-tuned Llama-2-70B: {_LLAMA_2}"
            ),
            ModelProfile(
                "orca-2-7b", _LLAMA_7B, 6.74e9, f"Orca 2 (arXiv 2311.11045), a fine-tuned Llama-2-7B: {_LLAMA_2}"
            ),
            ModelProfile("xwin-7b", _LLAMA_7B, 6.74e9, f"Xwin-LM 7B, a fine-tuned Llama-2-7B: {_LLAMA_2}"),
            ModelProfile("xwin-13b", _LLAMA_13B, 13.02e9, f"Xwin-LM 13B, a fine-tuned Llama-2-13B: {_LLAMA_2}"),
            ModelProfile(
                "goliath-120b",
                ModelShape(137, 8192, 64, 8, 28672, 32000),
                117.75e9,
                "Goliath 120B model card and config.json: 137 layers of two fine-tuned Llama-2-70B",
            ),
            ModelProfile(
                "tinyllama-1.1b",
                ModelShape(22, 2048, 32, 4, 5632, 32000),
                1_100_048_384,
                "TinyLlama (arXiv 2401.02385) and its config.json",
            ),
            ModelProfile("falcon-7b", ModelShape(32, 4544, 71, 1, 18176, 65024, gated=False), 7.22e9, _FALCON),
            ModelProfile("falcon-40b", ModelShape(60, 8192, 128, 8, 32768, 65024, gated=False), 41.84e9, _FALCON),
            ModelProfile("falcon-180b", ModelShape(80, 14848, 232, 8, 59392, 65024, gated=False), 179.52e9, _FALCON),
            ModelProfile("llama-3.1-8b", ModelShape(32, 4096, 32, 8, 14336, 128256), 8_030_261_248, _LLAMA_3),
            ModelProfile("llama-3.1-70b", ModelShape(80, 8192, 64, 8, 28672, 128256), 70_553_706_496, _LLAMA_3),
            ModelProfile(
                "llama-3.2-1b",
                ModelShape(16, 2048, 32, 8, 8192, 128256, tied=True),
                1_235_814_400,
                "Llama 3.2 model card and config.json",
            ),
            ModelProfile(
                "smollm2-135m",
                ModelShape(30, 576, 9, 3, 1536, 49152, tied=True),
                134_515_008,
                "SmolLM2 (arXiv 2502.02737) and its config.json",
            ),
        )
    }
)
"""Known models by name."""

BITS_PER_WEIGHT: Mapping[str, float] = MappingProxyType(
    {
        "fp32": 32.0,
        "fp16": 16.0,
        "bf16": 16.0,
        "q8_0": 8.5,  # 32 weights: 32 bytes and a 2-byte scale
        "q6_k": 6.5625,  # 256 weights: 210 bytes
        "q5_k_m": 5.67,
        "q4_k_m": 4.83,
        "q4_1": 5.0,  # 32 weights: 16 bytes, scale and minimum of 2 bytes each
        "q4_0": 4.5,  # 32 weights: 16 bytes and a 2-byte scale
        "q3_k_m": 3.89,
    }
)
"""Bits of one weight by quantization, scales included.

Block formats follow from ggml's block layouts. The mixtures ``q5_k_m``, ``q4_k_m`` and ``q3_k_m`` give some matrices
more bits: theirs is file size / parameters of published GGUF files, within 2 % over 13B and 70B Llamas.
"""
