"""Text to token ids and back: the tokenizers that come with models, and their chat templates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from backends.gguf_tokenizer import tokenizer_from_gguf, wants_bos
from backends.models.loading import GgufSource, ModelSource
from backends.text_stream import TextStream
from pipesim.errors import BadInputError

_EXTENSIONS = ("jinja2.ext.loopcontrols",)  # templates use break and continue


class ModelTokenizer:
    """A model's tokenizer with its special tokens; ``eos_ids`` end a text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        bos_id: int | None = None,
        chat_template: str | None = None,
        specials: Mapping[str, str] | None = None,
    ) -> None:
        self.eos_ids = tuple(eos_ids)
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._chat_template = chat_template
        self._specials = dict(specials or {})

    @property
    def vocabulary(self) -> int:
        """Token ids, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def conflict(self, other: "ModelTokenizer") -> str | None:
        """Why tokens of one are not tokens of the other, if they differ: ids that both have must mean the same.

        One may have more ids than the other: special tokens at the end, which the other never proposes.
        """
        mine, theirs = (one._tokenizer.get_vocab(with_added_tokens=True) for one in (self, other))
        for token, index in sorted(mine.items(), key=lambda entry: entry[1]):
            if theirs.get(token, index) != index:
                return f"token {token!r} has id {index} in one and {theirs[token]} in the other"
            if token not in theirs and (there := other._tokenizer.id_to_token(index)) is not None:
                return f"id {index} is token {token!r} in one and {there!r} in the other"
        return None

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the tokens that the model wants at its beginning."""
        ids = list(self._tokenizer.encode(text, add_special_tokens=True).ids)
        return ids if self._bos_id is None else [self._bos_id, *ids]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids that ask the model to answer ``messages`` (``role`` and ``content`` each).

        Raises:
            BadInputError: the model has no chat template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise BadInputError("chat: this model has no chat template, give a plain prompt")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(self._chat_template)
            text = template.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **self._specials)
        except TemplateError as error:
            raise BadInputError(f"chat: the model's chat template refuses the messages: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A fresh detokenizer for one generation, which ends before the first of the ``stop`` strings."""
        return TextStream(self.decode, stop)


def open_tokenizer(source: ModelSource) -> ModelTokenizer:
    """The tokenizer that comes with a model.

    Raises:
        BadInputError: there is none, or it is of an unsupported kind.
    """
    return _from_gguf(source) if isinstance(source, GgufSource) else _from_folder(source)


def _from_gguf(source: GgufSource) -> ModelTokenizer:
    metadata = source.file.metadata
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return ModelTokenizer(
        tokenizer_from_gguf(metadata, str(source.path)),
        source.config.eos_ids,
        bos_id=ids["bos"] if wants_bos(metadata) else None,
        chat_template=metadata.get("tokenizer.chat_template"),
        specials={f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
    )


def _from_folder(source: ModelSource) -> ModelTokenizer:
    file = source.path / "tokenizer.json"
    if not file.exists():
        raise BadInputError(f"{file} is missing: copy it from where the model came from")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BadInputError(f"{file} cannot be read: {error}") from error
    settings = _optional_json(source.path / "tokenizer_config.json")
    ends = _end_tokens(source.path / "generation_config.json")
    template = _optional_text(source.path / "chat_template.jinja")
    if template is None:
        template = settings.get("chat_template")
    if isinstance(template, list):  # several, by purpose
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return ModelTokenizer(
        tokenizer,
        tuple(dict.fromkeys([*source.config.eos_ids, *ends])),
        chat_template=template if isinstance(template, str) else None,
        specials={name: _content(settings[name]) for name in ("bos_token", "eos_token") if settings.get(name)},
    )


def _end_tokens(path: Path) -> list[int]:
    ends = _optional_json(path).get("eos_token_id")
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int for end in listed):
        raise BadInputError(f"{path}: eos_token_id = {ends!r} must be a token id or a list of them")
    return listed


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_optional_text(path) or "{}")
    except ValueError as error:
        raise BadInputError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _optional_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from error


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _refuse(message: str) -> None:
    raise TemplateError(message)
