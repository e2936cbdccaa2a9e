"""Bytes of ids, and text as a pure function of ids, against the tokenizers library."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from services.common.vocabulary import IncrementalText, Vocabulary, pending_bytes

SAMPLE = ["The fox jumps over the lantern. Größe, naïve, 漢字, 🦊🏮!", "one two three 123 456\n\ttabs"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        *((f"<0x{byte:02X}>", -10.0) for byte in range(256)),
        ("\u2581fox", -1.0),
        ("\u2581", -2.0),
    ]
    pieces += [(character, -3.0) for character in "abcdefghijklmnopqrstuvwxyz"]
    specification = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True},
    }
    return Tokenizer.from_str(json.dumps(specification))


@given(st.text())
def test_any_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    vocabulary = Vocabulary.from_tokenizer(byte_level)
    assert vocabulary.decode(byte_level.encode(text).ids) == text


@given(st.lists(st.integers(0, 330), max_size=20))
def test_any_ids_decode_as_the_library_decodes_them(byte_level: Tokenizer, token_ids: list[int]) -> None:
    vocabulary = Vocabulary.from_tokenizer(byte_level)
    token_ids = [token_id for token_id in token_ids if token_id < byte_level.get_vocab_size(with_added_tokens=False)]
    assert vocabulary.decode(token_ids) == byte_level.decode(token_ids, skip_special_tokens=True)


def test_control_tokens_have_no_text_and_added_tokens_have_theirs(byte_level: Tokenizer) -> None:
    vocabulary = Vocabulary.from_tokenizer(byte_level, size=1000)
    end, think = byte_level.token_to_id("<|end|>"), byte_level.token_to_id("<think>")
    assert end is not None
    assert think is not None
    assert (vocabulary.table[end], vocabulary.table[think]) == (b"", b"<think>")
    assert vocabulary.decode_with_special([end, think]) == "<|end|><think>"
    assert len(vocabulary) == 1000
    assert vocabulary.decode([999, 5000]) == ""


def test_sentencepiece_like_tokenizers(metaspace: Tokenizer) -> None:
    vocabulary = Vocabulary.from_tokenizer(metaspace)
    ids = metaspace.encode(" fox é").ids
    assert vocabulary.decode(ids) == " fox é"
    assert vocabulary.decode(ids) == metaspace.decode(ids)


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_cuts_never_show_in_the_text(data: bytes, cuts: list[int]) -> None:
    text, parts, first = IncrementalText(), [], 0
    for cut in sorted({*cuts, len(data)}):
        parts.append(text.extend(data[first:cut]))
        first = max(first, min(cut, len(data)))
    assert "".join(parts) + text.finish() == data.decode(errors="replace")


@given(st.binary(max_size=40), st.data())
def test_pending_bytes_continue_where_the_text_stood(data: bytes, draw: st.DataObject) -> None:
    cursor = draw.draw(st.integers(0, len(data)))
    held = draw.draw(st.integers(0, cursor))
    before = IncrementalText()
    shown = before.extend(data[:cursor], held)
    after = IncrementalText(pending_bytes(data[:cursor], held))
    assert shown + after.extend(data[cursor:]) + after.finish() == data.decode(errors="replace")


def test_cut_bytes_are_not_shown() -> None:
    text = IncrementalText()
    assert text.extend(b"one STOP", held=4) == "one "
    assert text.finish(cut_bytes=4) == ""
