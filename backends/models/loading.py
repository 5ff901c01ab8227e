"""Opening a model by name or path, and reading single weights from it.

Weights go by their Hugging Face names (``model.layers.3.self_attn.q_proj.weight``), whatever the file format.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from backends.models.blocks import Blocks
from backends.models.config import ModelConfig
from backends.models.finding import find_model
from backends.models.gguf_config import config_from_gguf
from backends.models.gguf_file import GgufFile
from backends.models.huggingface_config import config_from_huggingface
from pipesim.errors import BadInputError

if TYPE_CHECKING:
    import torch  # only reading weights needs it: the head opens models for their config and tokenizer

_BLOCKS, _BLOCK_BYTES = 256, 4096  # of a weight file, for its fingerprint
_TEXT_PARTS = ("", "language_model.", "model.language_")  # where a model for text and images keeps its text part

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class ModelSource(Protocol):
    """An opened model: nothing of its weights is in memory until :meth:`read` asks for it."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def config(self) -> ModelConfig:
        """Sizes and constants."""

    def read(self, name: str) -> torch.Tensor:
        """The weight called ``name``, in memory of its own, in float32 (GGUF) or its stored type.

        Norms come ready to be multiplied by, whatever the file adds to or takes off them.
        """

    def blocks(self, name: str) -> Blocks | None:
        """The matrix called ``name`` in the file's own quantization, None if it has none that is understood."""


class GgufSource:
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        factors = self.file.tensor("rope_freqs.weight").tolist() if "rope_freqs.weight" in self.file.shapes else ()
        self.config = config_from_gguf(self.file.metadata, self.file.shapes, str(path), factors)

    def read(self, name: str) -> torch.Tensor:
        """The weight in float32, its rows in Hugging Face order."""
        import torch

        stored = self._stored_name(name)
        weight = torch.from_numpy(self.file.tensor(stored))
        order = self._order(stored)
        return weight if order is None else weight[torch.from_numpy(order)]

    def blocks(self, name: str) -> Blocks | None:
        """As in ``ModelSource``, its rows in Hugging Face order."""
        stored = self._stored_name(name)
        blocks = self.file.blocks(stored)
        order = self._order(stored)
        return blocks if blocks is None or order is None else blocks.rows(order)

    def _order(self, stored: str) -> npt.NDArray[np.int64] | None:
        """Where Hugging Face's rows are: in Llama files the halves of each rotary pair are interleaved in a head."""
        if self.file.metadata["general.architecture"] != "llama" or not re.search(r"attn_[qk]\.weight", stored):
            return None
        heads = self.config.heads if "attn_q" in stored else self.config.kv_heads
        rows = np.arange(self.file.shapes[stored][0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    def _stored_name(self, name: str) -> str:
        """``model.layers.3.self_attn.q_proj.bias`` is ``blk.3.attn_q.bias`` here."""
        part, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part)
        if layer is None:
            return f"{_GGUF_NAMES[part]}.{kind}"
        own = {"post_attention_layernorm": "post_attention_norm" if self.config.family.post_norms else "ffn_norm"}
        return f"blk.{layer[1]}.{(_GGUF_NAMES | own)[layer[2]]}.{kind}"


class SafetensorsSource:
    """A folder with ``config.json`` and ``model.safetensors``, or shards and their index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_from_huggingface(_read_json(path / "config.json"), str(path / "config.json"))
        index = path / "model.safetensors.index.json"
        if index.exists():
            self._files: dict[str, str] = _read_json(index).get("weight_map", {})
            if not self._files:
                raise BadInputError(f"{index}: key 'weight_map' is missing or empty")
        else:
            single = "model.safetensors"
            if not (path / single).exists():
                raise BadInputError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
            try:
                with safe_open(path / single, framework="numpy") as file:
                    self._files = dict.fromkeys(file.keys(), single)
            except SafetensorError as error:
                raise BadInputError(f"{path / single} is damaged: {error}") from error

    def read(self, name: str) -> torch.Tensor:
        """The weight in its stored type, norms in float32."""
        stored = next((part + name for part in _TEXT_PARTS if part + name in self._files), None)
        if stored is None:
            raise BadInputError(f"{self.path}: weight {name!r} is missing, the model has no such part")
        file_path = self.path / self._files[stored]
        try:
            with safe_open(file_path, framework="pt") as file:
                weight: torch.Tensor = file.get_tensor(stored)
                # a copy, out of the mapped file
                return weight.float() + self.config.family.norm_offset if "norm" in name else weight.clone()
        except (OSError, SafetensorError) as error:
            raise BadInputError(f"{file_path}: weight {name!r} cannot be read: {error}") from error

    def blocks(self, name: str) -> None:
        """None: only GGUF files have them."""


def open_model(model: str | Path) -> GgufSource | SafetensorsSource:
    """Opens what :func:`~backends.models.finding.find_model` finds; reads the header only.

    Raises:
        BadInputError: there is no such model (the message says how to get it), or it is of an unsupported kind.
    """
    path = find_model(model)
    return SafetensorsSource(path) if path.is_dir() else GgufSource(path)


def fingerprint(source: GgufSource | SafetensorsSource) -> str:
    """Tells models apart without reading them whole: a hash of the configuration and of 256 blocks of each weight file.

    Stages and head compare it, for equal text needs equal weights. Two models that differ in a few weights alone may
    look alike.
    """
    digest = hashlib.blake2b(repr(source.config).encode(), digest_size=16)
    files = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    for file_path in files:
        size = file_path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file_path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * max(0, size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path} is missing: the folder holds no Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{path} must hold a JSON object")
    return content
