"""Text to token ids and back: tokenizers of GGUF files and Hugging Face folders, chat templates, streaming."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from backends.models.loading import GgufSource, ModelSource
from pipesim.errors import BadInputError

_PATIENCE = 8  # tokens that may wait for the rest of a character: one has four bytes at most, special tokens none
_CONTROL_TOKEN = 3  # GGUF token types
_USER_DEFINED_TOKEN = 4
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
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

    def stream(self) -> "TextStream":
        """A fresh detokenizer for one generation."""
        return TextStream(self)


class TextStream:
    """Turns tokens into text as they come, never showing half a character: ``feed``, ``feed``, ..., ``finish``."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders may join tokens with what stands before, so the last shown tokens stay in front as context.
        self._context: list[int] = []
        self._waiting: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete, however they are cut; incomplete characters wait for the next tokens.

        What still looks incomplete after more than 8 tokens is none, but U+FFFD or bytes that are no text.
        """
        return "".join(self._add(token) for token in ids)  # one at a time: the same text, however runs group them

    def _add(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._piece()
        if piece and not piece.endswith("\ufffd"):
            return self._show(piece, len(self._waiting))
        if len(self._waiting) <= _PATIENCE:
            return ""
        # only the last character can still change: the longest part that ends before it is shown
        for cut in range(len(self._waiting) - 1, 0, -1):
            beginning = self._piece(cut)
            if beginning and piece[:-1].startswith(beginning):
                return self._show(beginning, cut)
        return self._show(piece, len(self._waiting))

    def _show(self, piece: str, tokens: int) -> str:
        if piece:
            self._context = self._waiting[:tokens]
        self._waiting = self._waiting[tokens:]
        return piece

    def finish(self) -> str:
        """Whatever still waits, an unfinished character as U+FFFD."""
        piece = self._piece()
        self._context, self._waiting = [], []
        return piece

    def _piece(self, tokens: int | None = None) -> str:
        """What the first ``tokens`` that wait (None: all) add to the text."""
        shown = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting[:tokens])[len(shown) :]


def open_tokenizer(source: ModelSource) -> ModelTokenizer:
    """The tokenizer that comes with a model.

    Raises:
        BadInputError: there is none, or it is of an unsupported kind.
    """
    return _from_gguf(source) if isinstance(source, GgufSource) else _from_folder(source)


def _from_gguf(source: GgufSource) -> ModelTokenizer:
    metadata = source.file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise BadInputError(
            f"{source.path}: tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2'): "
            "use the model's safetensors folder with its tokenizer.json"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    words = metadata.get("tokenizer.ggml.pre", "gpt-2")
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=words == "llama-bpe")
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(str(words), source.path)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind != 1]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, k in added if k == _CONTROL_TOKEN])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == _USER_DEFINED_TOKEN])
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return ModelTokenizer(
        tokenizer,
        source.config.eos_ids,
        bos_id=ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", words == "llama-bpe") else None,
        chat_template=metadata.get("tokenizer.chat_template"),
        specials={f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
    )


def _pre_tokenizer(words: str, path: Path) -> pre_tokenizers.PreTokenizer:
    if words == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if words in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise BadInputError(
        f"{path}: pre-tokenizer {words!r} is not supported (only smollm, gpt-2, llama-bpe): "
        "use the model's safetensors folder with its tokenizer.json"
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
