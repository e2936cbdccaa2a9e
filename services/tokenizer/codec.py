"""A model's tokenizer and what its folder says about it: text to ids and back, limits, end tokens, sampling defaults.

Control tokens are encoded as such only where the caller says so. For a rendered prompt that is done with *stand-ins*:
a second copy of the tokenizer treats control tokens' names as text, and has for each of them an ordinary added token
whose text nobody can guess. The prompt is encoded in one piece with the stand-ins in place of the template's control
tokens, so that everything around them (prefix spaces, stripping, splitting) is as the tokenizer itself does it.

Knows no conversation, no session and no stream.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from services.common.errors import InvalidRequest
from services.common.model_folder import hash_tokenizer, model_name
from services.common.vocabulary import Vocabulary
from services.tokenizer.chat_template import ChatTemplate, Piece

_SPECIAL_VARIABLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_STAND_IN_BASE = 0x100000
_LONG_TEXT = 4096
"""Characters from which on encoding frees the interpreter (`encode` holds it, `encode_batch` does not)."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What is used where a request sets nothing; fields as in `SamplingParams`.

    From the model's generation_config, else neutral. Its `do_sample` says what `transformers` does by itself (arg-max
    unless true); it does not change the temperature here, so that a request without one samples at the model's own.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Takes what the file sets; null counts as unset."""
        given = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        if given.get("top_k", 0) < 0:  # some files write -1 for "off"
            given["top_k"] = 0
        return cls(**given)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's folder says.

    Attributes:
        name: of the model.
        vocabulary_size: number of ids that a request may name.
        context_length: most tokens of a sequence.
        eos_token_ids: ids that end a generation.
        sampling: defaults.
        tokenizer_hash: SHA-256 of tokenizer.json as hex, which is what fingerprints have (R20).
        beginning: name of the token that begins a text, empty when there is none.
    """

    name: str
    vocabulary_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingDefaults
    tokenizer_hash: str
    beginning: str = ""


class Codec:
    """The text side of one model.

    Attributes:
        facts: see `ModelFacts`.
        vocabulary: bytes of each id.
        template: the chat template, None where the model has none.
    """

    def __init__(self, tokenizer: Tokenizer, facts: ModelFacts, template: ChatTemplate | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.facts = facts
        self.template = template
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, facts.vocabulary_size)
        self._tokenizer = tokenizer
        self._marks = _Marks(self.vocabulary.special)
        self._literal = _reading_marks(tokenizer, self._marks)
        self._id_of = {self._literal.token_to_id(mark): token_id for token_id, mark in self._marks.stand_ins.items()}
        self._mark_of = {name: self._marks.stand_ins[token_id] for token_id, name in self.vocabulary.special.items()}

    @classmethod
    def load(cls, folder: Path) -> Codec:
        """Loads a model's folder.

        Raises:
            OSError: a file is missing.
            ValueError: a file does not say what is needed, or the chat template does not compile.
        """
        tokenizer = Tokenizer.from_file(str(_existing(folder / "tokenizer.json")))
        config = _read_json(_existing(folder / "config.json"))
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        generation_config = _read_json(folder / "generation_config.json")
        specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        variables = _special_variables(tokenizer_config)
        source = _template_source(folder, tokenizer_config)
        facts = ModelFacts(
            name=model_name(folder),
            vocabulary_size=_text_config(config).get("vocab_size") or tokenizer.get_vocab_size(),
            context_length=_context_length(config),
            eos_token_ids=_eos_token_ids(generation_config, config, tokenizer, variables),
            sampling=SamplingDefaults.from_generation_config(generation_config),
            tokenizer_hash=hash_tokenizer(folder),
            beginning=variables.get("bos_token", ""),
        )
        return cls(tokenizer, facts, ChatTemplate(source, specials, variables) if source is not None else None)

    def encode(
        self, text: str, *, parse_special: bool = False, add_special: bool = False, continues: bool = False
    ) -> list[int]:
        """Encodes a text that somebody wrote.

        Args:
            text: the text.
            parse_special: control tokens' names in it become control tokens; otherwise they are text.
            add_special: put the tokens at both ends that the tokenizer itself adds.
            continues: as in `encode_marked`; without the two others.

        Raises:
            InvalidRequest: as in `mark`, or the tokenizer's model itself makes a control token of the text.
        """
        if parse_special:
            return _encode(self._tokenizer, text, add_special=add_special)
        self._marks.refuse_in(text)
        if continues:
            return self.encode_marked(text, continues=True)
        token_ids = _encode(self._literal, text)
        self._refuse_control(token_ids)
        return _encode(self._literal, text, add_special=True) if add_special else token_ids

    def mark(self, pieces: Iterable[Piece]) -> str:
        """Writes a rendered prompt with stand-ins, the form that `encode_marked` takes.

        Raises:
            InvalidRequest: the text has a stand-in in it, which nobody but this process can know.
        """
        marked = []
        for piece in pieces:
            if piece.control:
                marked.append(self._mark_of[piece.text])
            else:
                self._marks.refuse_in(piece.text)
                marked.append(piece.text)
        return "".join(marked)

    def encode_marked(self, marked: str, *, continues: bool = False) -> list[int]:
        """Encodes text with stand-ins for control tokens.

        Args:
            marked: as `mark` wrote it, or a part of that.
            continues: the text follows other tokens, so what a tokenizer does to the beginning of a text (a prefix
                space, say) is left out.
        """
        token_ids = _encode(self._literal, self._marks.joint + marked if continues else marked)
        self._refuse_control(token_ids)
        return [self._id_of.get(token_id, token_id) for token_id in (token_ids[1:] if continues else token_ids)]

    def _refuse_control(self, token_ids: list[int]) -> None:
        """Text must not become a control token, whatever the tokenizer's model makes of its letters."""
        if not self.vocabulary.special.keys().isdisjoint(token_ids):
            raise InvalidRequest("the model's tokenizer would read a control token from the text")

    def marked_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The text of ids as bytes, with stand-ins for control tokens: comparable with what `mark` writes."""
        stand_ins, bytes_of = self._marks.stand_ins, self.vocabulary.bytes_of
        return b"".join(
            mark.encode() if (mark := stand_ins.get(token_id)) is not None else bytes_of((token_id,))
            for token_id in token_ids
        )

    def piece(self, token_id: int) -> tuple[bytes, bool]:
        """Bytes of one id, a control token's name, and whether it is one."""
        name = self.vocabulary.special.get(token_id)
        return (self.vocabulary.bytes_of((token_id,)), False) if name is None else (name.encode(), True)

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Id sequences of texts that must not be completed: each text as it stands and after a blank."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, f" {word.lstrip()}"):
                token_ids = self.encode(text, continues=True)
                if token_ids:
                    sequences[tuple(token_ids)] = None
        return [list(sequence) for sequence in sequences]


class _Marks:
    """The stand-ins of one process.

    Attributes:
        joint: stands for nothing; text after it is not the beginning of a text.
        stand_ins: by id of the control token.
    """

    def __init__(self, special: Mapping[int, str]) -> None:
        # 48 random bits that are never shown to anybody.
        self._prefix = "".join(chr(_STAND_IN_BASE + secrets.randbelow(0xF000)) for _ in range(3))
        self.joint = f"{self._prefix}{chr(_STAND_IN_BASE)}"
        self.stand_ins = {
            token_id: f"{self._prefix}{chr(_STAND_IN_BASE + 1 + index)}" for index, token_id in enumerate(special)
        }

    def refuse_in(self, text: str) -> None:
        """Raises InvalidRequest if a text could hold a stand-in."""
        if self._prefix in text:
            raise InvalidRequest("the text holds private-use characters that are reserved")


def _reading_marks(tokenizer: Tokenizer, marks: _Marks) -> Tokenizer:
    """A copy of a tokenizer that takes control tokens' names for text, and knows the stand-ins."""
    added = tokenizer.get_added_tokens_decoder()
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens([AddedToken(marks.joint, special=False, normalized=False)])
    copy.add_tokens(
        [
            AddedToken(
                mark,
                special=False,
                normalized=False,
                lstrip=added[token_id].lstrip,
                rstrip=added[token_id].rstrip,
                single_word=added[token_id].single_word,
            )
            for token_id, mark in marks.stand_ins.items()
        ]
    )
    copy.encode_special_tokens = True
    return copy


def _encode(tokenizer: Tokenizer, text: str, *, add_special: bool = False) -> list[int]:
    if len(text) < _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the model has no {path.name} in {path.parent}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models that also see or hear have the settings of their language model one level deeper."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _context_length(config: Mapping[str, Any]) -> int:
    settings = _text_config(config)
    length = next((settings[key] for key in _CONTEXT_KEYS if settings.get(key)), None)
    if not isinstance(length, int) or length < 2:
        raise ValueError("config.json does not say how long a sequence may be")
    return length


def _special_variables(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; files write them as text or as an object with the text in `content`."""
    values = {name: tokenizer_config.get(name) for name in _SPECIAL_VARIABLES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_source(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template of the model: a file of its own, else in tokenizer_config.json, there also as named templates."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("the chat template of tokenizer_config.json is not text")
    return template


def _eos_token_ids(
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    variables: Mapping[str, str],
) -> tuple[int, ...]:
    """The first of generation_config, config and tokenizer_config that names some."""
    for candidate in (generation_config.get("eos_token_id"), _text_config(config).get("eos_token_id")):
        if isinstance(candidate, int):
            return (candidate,)
        if candidate:
            return tuple(candidate)
    token_id = tokenizer.token_to_id(variables["eos_token"]) if "eos_token" in variables else None
    return () if token_id is None else (token_id,)
