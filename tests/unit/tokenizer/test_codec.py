"""Text to ids and back, and what a model's folder says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from services.common.errors import InvalidRequest
from services.tokenizer.chat_template import Piece
from services.tokenizer.codec import Codec, ModelFacts, SamplingDefaults
from tests.unit.tokenizer.models import KINDS, byte_level, write_json, write_model

TEXTS = ["Hello world", " two  blanks ", "Zwölf 日本語 🎵", "a\n\nb", "", "x" * 9000]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_the_tokenizer_does(kind: str, text: str, model_folders: Mapping[str, Path]) -> None:
    codec = Codec.load(model_folders[kind])
    reference = Tokenizer.from_file(str(model_folders[kind] / "tokenizer.json"))
    assert codec.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert codec.encode(text, add_special=True) == reference.encode(text).ids
    assert codec.vocabulary.decode(codec.encode(text)).removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_are_parsed_only_when_asked(kind: str, codecs: Mapping[str, Codec]) -> None:
    codec, names = codecs[kind], KINDS[kind].special
    text = "a" + "b".join(names)
    parsed = codec.encode(text, parse_special=True)
    assert [codec.vocabulary.special[token_id] for token_id in parsed if token_id in codec.vocabulary.special] == list(
        names
    )
    plain = codec.encode(text)
    assert codec.vocabulary.special.keys().isdisjoint(plain)
    assert codec.vocabulary.decode(plain).removeprefix(" ") == text


def test_what_continues_gets_no_beginning(codecs: Mapping[str, Codec]) -> None:
    codec = codecs["mistral"]
    assert codec.vocabulary.decode(codec.encode("Hello")) == " Hello"
    assert codec.vocabulary.decode(codec.encode("Hello", continues=True)) == "Hello"
    assert codec.encode("", continues=True) == []


def test_pieces_are_marked_and_read_back(codecs: Mapping[str, Codec]) -> None:
    codec = codecs["chatml"]
    pieces = [Piece("<|im_start|>", True), Piece("user\n<|im_end|>", False), Piece("<|im_end|>", True)]
    marked = codec.mark(pieces)
    ids = codec.encode_marked(marked)
    assert codec.marked_bytes(ids).decode() == marked
    assert codec.vocabulary.decode_with_special(ids) == "<|im_start|>user\n<|im_end|><|im_end|>"
    assert [token_id for token_id in ids if token_id in codec.vocabulary.special] == [ids[0], ids[-1]]


def test_a_stand_in_in_text_is_refused(codecs: Mapping[str, Codec]) -> None:
    codec = codecs["chatml"]
    stand_in = codec.mark([Piece("<|im_end|>", True)])
    with pytest.raises(InvalidRequest):
        codec.mark([Piece(f"a{stand_in}", False)])
    with pytest.raises(InvalidRequest):
        codec.encode(f"a{stand_in}")
    assert codec.encode(stand_in[-1], continues=True)  # its last character alone is text like any other


def test_blanks_that_a_control_token_swallows_are_swallowed_in_prompts_too() -> None:
    """Phi's control tokens take the white space after them."""
    tokenizer = byte_level(())
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)])
    codec = Codec(tokenizer, facts(tokenizer))
    pieces = [Piece("a", False), Piece("<|end|>", True), Piece("\n b", False)]
    expected = tokenizer.encode("a<|end|>\n b", add_special_tokens=False).ids
    assert codec.encode_marked(codec.mark(pieces)) == expected
    assert codec.vocabulary.decode_with_special(expected) == "a<|end|>b"


def test_a_tokenizer_that_reads_control_tokens_from_letters_is_refused_the_text() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    tokenizer.decoder = byte_level(()).decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    codec = Codec(tokenizer, facts(tokenizer))
    for continues in (False, True):
        with pytest.raises(InvalidRequest):
            codec.encode("<s>", continues=continues)


def test_bad_words_are_forbidden_at_the_beginning_and_behind_a_blank(codecs: Mapping[str, Codec]) -> None:
    codec = codecs["chatml"]
    sequences = codec.bad_word_ids(["fox", " fox", "日"])
    assert [codec.vocabulary.decode(ids) for ids in sequences] == ["fox", " fox", "日", " 日"]


def facts(tokenizer: Tokenizer) -> ModelFacts:
    return ModelFacts("m", tokenizer.get_vocab_size(), 64, (), SamplingDefaults(), "")


def test_facts_of_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "name-of-model", "llama3", temperature=0.6, top_p=0.9, do_sample=False)
    codec = Codec.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert codec.facts.name == "name-of-model"
    assert codec.facts.vocabulary_size == tokenizer.get_vocab_size() + 8 == len(codec.vocabulary)
    assert codec.facts.context_length == 512
    (end,) = codec.facts.eos_token_ids
    assert end == tokenizer.token_to_id("<|eot_id|>")
    assert codec.facts.sampling == SamplingDefaults(temperature=0.6, top_p=0.9)
    assert codec.facts.beginning == "<|begin_of_text|>"
    assert codec.piece(end) == (b"<|eot_id|>", True)
    assert codec.facts.tokenizer_hash == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": None, "top_k": -1}, SamplingDefaults()),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, SamplingDefaults(temperature=0.7, top_k=20)),
        ({"do_sample": False, "temperature": 0.0}, SamplingDefaults(temperature=0.0)),
        ({"min_p": 0.1, "repetition_penalty": 1.2, "x": 1}, SamplingDefaults(min_p=0.1, repetition_penalty=1.2)),
    ],
)
def test_sampling_defaults(config: dict[str, Any], expected: SamplingDefaults) -> None:
    assert SamplingDefaults.from_generation_config(config) == expected


@pytest.mark.parametrize("form", ["jinja", "list", "dict", "none"])
def test_where_templates_are_found(form: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "chatml")
    config: dict[str, Any] = {"eos_token": {"content": "<|im_end|>"}}
    if form == "jinja":
        config["chat_template"] = "wrong"
        (folder / "chat_template.jinja").write_text("right")
    elif form == "list":
        config["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "default", "template": "right"}]
    elif form == "dict":
        config["chat_template"] = {"rag": "x", "default": "right"}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {})
    codec = Codec.load(folder)
    assert (codec.template is None) == (form == "none")
    assert [codec.vocabulary.special[token_id] for token_id in codec.facts.eos_token_ids] == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", {"vocab_size": 500}, "how long"),
        ("tokenizer_config.json", [], "object"),
        ("tokenizer_config.json", {"chat_template": 1}, "not text"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "compile"),
    ],
)
def test_folders_that_do_not_say_what_is_needed(tmp_path: Path, file: str, content: object, reason: str) -> None:
    folder = write_model(tmp_path, "chatml")
    write_json(folder / file, content)
    with pytest.raises(ValueError, match=reason):
        Codec.load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path, "chatml")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        Codec.load(folder)


def test_settings_of_a_nested_text_model_are_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "chatml")
    write_json(folder / "config.json", {"text_config": {"vocab_size": 999, "max_position_embeddings": 77}})
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 4]})
    codec = Codec.load(folder)
    assert (codec.facts.vocabulary_size, codec.facts.context_length, codec.facts.eos_token_ids) == (999, 77, (3, 4))
