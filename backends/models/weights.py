"""The weights of one decoder layer, of all families, read one matrix at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from backends.models.blocks import LAYOUTS, Blocks, stack
from backends.models.config import LayerKind
from backends.models.loading import ModelSource
from pipesim.errors import BadInputError

Weight = torch.Tensor | Blocks
"""A matrix as it was read, ``[outputs, inputs]``."""

M = TypeVar("M")
"""A matrix as an engine keeps it."""


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[M]):
    """One decoder layer: ``qkv`` is ``[qkv_width, hidden]``, ``gate_up`` ``[2 * intermediate, hidden]``.

    None stands for what the model's family does not have. ``qk_norm`` is ``[heads + kv_heads, head_dim]``, the queries'
    norm for each query head, then the keys'.
    """

    kind: LayerKind
    attention_norm: torch.Tensor
    qkv: M
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    output: M
    post_attention_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: M
    down: M
    post_mlp_norm: torch.Tensor | None


class WeightReader(Generic[M]):
    """Reads weights, their shapes checked; ``lay`` makes of each matrix what an engine keeps, before the next is read.

    Matrices are of ``dtype``, vectors float32; all are at ``place``.

    Raises:
        BadInputError: a weight is missing or of a wrong shape, or nothing is quantized that should be.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: torch.dtype | str,
        lay: Callable[[Weight], M],
        place: torch.device | None = None,
    ) -> None:
        self._source, self._config, self._dtype, self._lay = source, source.config, dtype, lay
        self._place = place or torch.device("cpu")
        if isinstance(dtype, str) and source.blocks("model.layers.0.mlp.down_proj.weight") is None:
            raise BadInputError(
                f"execution.dtype quantized: {source.path} holds no quantized blocks of {', '.join(LAYOUTS)}: use "
                "bfloat16, or a GGUF file that does"
            )

    def layer(self, index: int) -> LayerWeights[M]:
        """Layer ``index`` of the model, its parallel projections fused."""
        c, family = self._config, self._config.family
        queries, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        prefix = f"model.layers.{index}."

        def vector(name: str, size: int = c.hidden) -> torch.Tensor:
            return self.vector(prefix + name, size)

        projections = (("self_attn.q_proj", queries), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))
        head_norms = (("self_attn.q_norm.weight", c.heads), ("self_attn.k_norm.weight", c.kv_heads))
        mlp_norm = "pre_feedforward_layernorm.weight" if family.post_norms else "post_attention_layernorm.weight"
        return LayerWeights(
            kind=c.kinds[index],
            attention_norm=vector("input_layernorm.weight"),
            qkv=self._fused(prefix, projections),
            qkv_bias=torch.cat([vector(f"{name}.bias", size) for name, size in projections])
            if family.qkv_bias
            else None,
            qk_norm=torch.cat([vector(name, c.head_dim).expand(heads, -1) for name, heads in head_norms])
            if family.qk_norm
            else None,
            output=self.matrix(f"{prefix}self_attn.o_proj.weight", c.hidden, queries),
            post_attention_norm=vector("post_attention_layernorm.weight") if family.post_norms else None,
            mlp_norm=vector(mlp_norm),
            gate_up=self._fused(prefix, (("mlp.gate_proj", c.intermediate), ("mlp.up_proj", c.intermediate))),
            down=self.matrix(f"{prefix}mlp.down_proj.weight", c.hidden, c.intermediate),
            post_mlp_norm=vector("post_feedforward_layernorm.weight") if family.post_norms else None,
        )

    def embedding(self) -> Weight:
        """The token embedding, ``[vocabulary, hidden]``, not laid out."""
        return self._read("model.embed_tokens.weight", self._config.vocabulary, self._config.hidden)

    def head(self) -> Weight:
        """The LM head of a model that does not use its embedding for one, not laid out."""
        return self._read("lm_head.weight", self._config.vocabulary, self._config.hidden)

    def matrix(self, name: str, outputs: int, inputs: int) -> M:
        """One matrix, laid out."""
        return self._lay(self._read(name, outputs, inputs))

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm or bias, float32 ``[size]``."""
        vector = self._source.read(name)
        self._check(name, tuple(vector.shape), (size,))
        return vector.float().contiguous().to(self._place)

    def _fused(self, prefix: str, parts: tuple[tuple[str, int], ...]) -> M:
        """One part at a time is read."""
        c = self._config
        names = [f"{prefix}{name}.weight" for name, _ in parts]
        if isinstance(self._dtype, str):
            read = [self._read(name, outputs, c.hidden) for name, (_, outputs) in zip(names, parts, strict=True)]
            blocks = [one for one in read if isinstance(one, Blocks)]
            if len(blocks) == len(read):
                return self._lay(stack(blocks))
            plain = [torch.from_numpy(one.values()) if isinstance(one, Blocks) else one for one in read]
            return self._lay(torch.cat(plain))
        whole, start = (
            torch.empty(sum(outputs for _, outputs in parts), c.hidden, dtype=self._dtype, device=self._place),
            0,
        )
        for name, (_, outputs) in zip(names, parts, strict=True):
            weight = self._read(name, outputs, c.hidden)
            assert isinstance(weight, torch.Tensor)
            whole[start : start + outputs] = weight
            start += outputs
        return self._lay(whole)

    def _read(self, name: str, outputs: int, inputs: int) -> Weight:
        if isinstance(self._dtype, str):
            blocks = self._source.blocks(name)
            if blocks is not None:
                self._check(name, blocks.codes.shape, (outputs, inputs))
                return blocks
        weight = self._source.read(name)
        self._check(name, tuple(weight.shape), (outputs, inputs))
        weight = weight.to(torch.float32 if isinstance(self._dtype, str) else self._dtype)
        return weight.contiguous().to(self._place)

    def _check(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise BadInputError(
                f"{self._source.path}: weight {name!r} has shape {list(shape)}, the config asks for {list(expected)}"
            )
