"""Tokenizers: the same ids as transformers, chat templates, and streaming that never shows half a character."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from backends.models.loading import ModelSource, open_model
from backends.tokenizer import ModelTokenizer, open_tokenizer
from pipesim.errors import BadInputError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 3.14159 and 1,000,000 differ; x2y3 too.",
    "naïve café, Straße, Ελληνικά, русский, 中文字符, 日本語, 한국어",
    "emoji: 🙂👩‍👩‍👧‍👦🇩🇪 and \u200bzero width",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [1, 2]}\n\n\n# done\r\n",
    "  leading, trailing   \n \n\t mixed\t\twhitespace   ",
    "it's they'll WE'RE don't",
    "<|im_start|>user\nhello<|im_end|>\n<repo_name>x",
    "",
    "a\u0301 combining, ﬁ ligature, ﷽",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelSource) -> ModelTokenizer:
    return open_tokenizer(smollm2)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    """A folder's tokenizer.json with one token per byte: every non-ASCII character is cut into pieces."""
    folder = save_tiny(tmp_path_factory.mktemp("bytes"), vocab_size=258)
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(["<s>", "</s>"])
    bytes_only.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    return open_tokenizer(open_model(folder))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.model
def test_ids_equal_transformers(smollm2: ModelSource, tokenizer: ModelTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    messages = [{"role": "user", "content": "Hi, 2 words?"}]
    assert (
        tokenizer.encode_chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
    assert tokenizer.eos_ids == (theirs.eos_token_id,)
    assert tokenizer.vocabulary == len(theirs) == smollm2.config.vocabulary


@pytest.mark.model
def test_digits_are_cut_apart_before_words_are(tokenizer: ModelTokenizer) -> None:
    # The model was trained with digits split off first: two blanks before a digit stay one token.
    # (transformers leaves this step out when it converts a GGUF file.)
    assert len(tokenizer.encode("x  7")) == 3


@pytest.mark.model
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), max_size=40))
def test_text_survives_the_round_trip(tokenizer: ModelTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 5), max_size=60))
def test_streaming_shows_whole_characters_and_all_of_the_text(
    byte_tokenizer: ModelTokenizer, text: str, cuts: list[int]
) -> None:
    ids, stream, pieces = byte_tokenizer.encode(text), byte_tokenizer.stream(), []
    for cut in [*cuts, len(ids)]:
        if ids:
            pieces.append(stream.feed(ids[:cut]))
            ids = ids[cut:]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == text


def test_an_unfinished_character_appears_only_at_the_end(byte_tokenizer: ModelTokenizer) -> None:
    stream = byte_tokenizer.stream()
    assert stream.feed(byte_tokenizer.encode("né")[:2]) == "n"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_is_never_going_to_be_text_does_not_wait_for_ever(byte_tokenizer: ModelTokenizer, size: int) -> None:
    invalid = byte_tokenizer.encode("\u00e9")[:1]
    for ids in (
        byte_tokenizer.encode("\ufffd" * 40 + "\U0001f642n"),
        invalid * 50,
        [1] * 50 + byte_tokenizer.encode("n"),
    ):
        stream = byte_tokenizer.stream()
        shown, text = "", byte_tokenizer.decode(ids)
        for start in range(0, len(ids), size):
            shown += stream.feed(ids[start : start + size])
            assert len(byte_tokenizer.decode(ids[: start + size])) - len(shown) <= 8
            assert text.startswith(shown)
        assert shown + stream.finish() == text


def test_special_tokens_do_not_show(byte_tokenizer: ModelTokenizer) -> None:
    stream = byte_tokenizer.stream()
    assert stream.feed([*byte_tokenizer.encode("ok"), 1]) + stream.finish() == "ok"


def test_a_folder_brings_its_chat_template_and_end_tokens(byte_tokenizer: ModelTokenizer) -> None:
    ids = byte_tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids[0] == 0
    assert byte_tokenizer.decode(ids) == "[user]hi>"
    assert byte_tokenizer.eos_ids == (2, 1)
    with pytest.raises(BadInputError, match="no such role"):
        byte_tokenizer.encode_chat([{"role": "bad", "content": ""}])


def test_the_default_of_several_templates_is_taken_and_loops_may_break(tmp_path: Path) -> None:
    folder = _with_tokenizer(tmp_path)
    listed = [
        {"name": "tool_use", "template": "b"},
        {"name": "default", "template": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "aa"}]
    assert open_tokenizer(open_model(folder)).encode_chat(messages) == [0]


def test_tokenizers_conflict_where_an_id_means_two_things() -> None:
    def tokenizer(**vocabulary: int) -> ModelTokenizer:
        return ModelTokenizer(Tokenizer(models.WordLevel(vocabulary, unk_token="a")), ())

    small, larger = tokenizer(a=0, b=1), tokenizer(a=0, b=1, c=2)
    assert small.conflict(small) is small.conflict(larger) is larger.conflict(small) is None
    assert larger.conflict(tokenizer(a=0, b=2, c=1)) == "token 'b' has id 1 in one and 2 in the other"
    assert larger.conflict(tokenizer(a=0, d=1)) == "id 1 is token 'b' in one and 'd' in the other"


def test_missing_tokenizers_and_templates_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"tokenizer\.json is missing"):
        open_tokenizer(open_model(save_tiny(tmp_path / "bare")))
    plain = ModelTokenizer(Tokenizer(models.BPE({"a": 0}, [])), ())
    with pytest.raises(BadInputError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"], ids=["folder", "not UTF-8"])
def test_files_beside_the_tokenizer_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = _with_tokenizer(tmp_path)
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(BadInputError, match=re.escape(f"{folder / name} cannot be read")):
        open_tokenizer(open_model(folder))


@pytest.mark.parametrize("ends", ["x", [2, "x"], 1.5, True, {}])
def test_end_tokens_must_be_token_ids(tmp_path: Path, ends: object) -> None:
    folder = _with_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(BadInputError, match=r"generation_config\.json: eos_token_id = "):
        open_tokenizer(open_model(folder))


def test_no_end_tokens_are_fine(tmp_path: Path) -> None:
    folder = _with_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    model = open_model(folder)
    assert open_tokenizer(model).eos_ids == model.config.eos_ids


def _with_tokenizer(folder: Path) -> Path:
    save_tiny(folder, vocab_size=258)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    return folder
