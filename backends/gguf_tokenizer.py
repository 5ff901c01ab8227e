"""Builds the tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece's BPE with scores."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipesim.errors import BadInputError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types
_SPACE = "\u2581"  # how SentencePiece writes a space
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _WORDS.replace("DIGITS", r"\p{N}{1,3}")
_QWEN2_WORDS = _WORDS.replace("DIGITS", r"\p{N}")


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a file with ``metadata``; ``where`` names the file in errors.

    Raises:
        BadInputError: it is of an unsupported kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, where)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise BadInputError(
            f"{where}: tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2') and SentencePiece "
            "('llama'): use the model's safetensors folder with its tokenizer.json"
        )
    typed = list(zip(metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", []), strict=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == _USER_DEFINED])
    return tokenizer


def wants_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt begins with the token for that; most files say so."""
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    words = str(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(words, where)
    tokenizer.decoder = decoders.ByteLevel()
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(words: str, where: str) -> pre_tokenizers.PreTokenizer:
    if words == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if words in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words in ("llama-bpe", "qwen2"):
        split = Regex(_QWEN2_WORDS if words == "qwen2" else _LLAMA3_WORDS)
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise BadInputError(
        f"{where}: pre-tokenizer {words!r} is not supported (only smollm, gpt-2, llama-bpe, qwen2): "
        "use the model's safetensors folder with its tokenizer.json"
    )


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece joins the neighbours whose union scores best: BPE whose merges are ordered by that score."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    merges: list[tuple[str, str]] = []
    by_score = sorted(zip(metadata["tokenizer.ggml.scores"], tokens, types, strict=True), key=lambda entry: -entry[0])
    for _, token, kind in by_score:
        if kind == _NORMAL:
            pairs = ((token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1))
            merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token=unknown, fuse_unk=True))
    spaces, text = normalizers.Replace(" ", _SPACE), [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*text, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence([*text, decoders.Fuse()])
    return tokenizer
