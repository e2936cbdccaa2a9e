"""The tokenizer of the built-in model: how it is trained, and how conversations become ids.

A byte-level BPE in which every digit and every space between words is a token of its own, with ChatML's control tokens.
Knows no tensor.

    python -m infra.models.tiny.tokenizer        # writes tokenizer.json and tokenizer_config.json beside this file
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from infra.models.tiny.corpus import conversations, words
from infra.models.tiny.corpus.conversations import Conversation

FOLDER = Path(__file__).resolve().parent
VOCABULARY_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
"""Control tokens in the order of their ids, from 0. A conversation ends with the first, a turn with the last."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_PIECES = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+ ?|\s+"
"""What merges stay within. A word is without the space before it, so that it is the same token at the beginning of an
answer as within a question: a model that repeats words then copies tokens. It makes texts a third longer."""

_WORD_LIST_WEIGHT = 20
"""How often the list of words is read besides the corpus, so that rarely told words become tokens, too."""


def train(seed: int = 0, count: int = 40_000, size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Learns a vocabulary of `size` ids from `count` conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    talk = map(_without_control_tokens, islice(conversations.training(seed), count))
    tokenizer.train_from_iterator(chain(talk, [" ".join(words.ALL_WORDS)] * _WORD_LIST_WEIGHT), trainer)
    return tokenizer


def render(conversation: Conversation) -> str:
    """The text of a whole conversation, as the chat template writes it, and its end."""
    if conversation.messages[0].role == "text":
        return conversation.messages[0].content + END_OF_TEXT
    turns = (f"{TURN_START}{message.role}\n{message.content}{TURN_END}\n" for message in conversation.messages)
    return "".join(turns) + END_OF_TEXT


class ConversationEncoder:
    """Turns conversations into ids and marks those that a model should learn to write."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start, self._end = control_id(tokenizer, TURN_START), control_id(tokenizer, TURN_END)
        self._header: list[int] = [self._start, *tokenizer.encode("assistant\n").ids]

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Ids, and for each whether the assistant wrote it (the end of its turn included; all of a plain text)."""
        token_ids: list[int] = self._tokenizer.encode(render(conversation)).ids
        if conversation.messages[0].role == "text":
            return token_ids, [True] * len(token_ids)
        written = [False] * len(token_ids)
        for first in self._assistant_turns(token_ids):
            last = token_ids.index(self._end, first)
            written[first : last + 1] = [True] * (last + 1 - first)
        return token_ids, written

    def _assistant_turns(self, token_ids: list[int]) -> Iterator[int]:
        """Index of the first id that the assistant writes, turn by turn."""
        for index, token_id in enumerate(token_ids):
            if token_id == self._start and token_ids[index : index + len(self._header)] == self._header:
                yield index + len(self._header)


def control_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a control token.

    Raises:
        ValueError: the tokenizer has none of this name.
    """
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {token}")
    return token_id


def configuration(context_length: int) -> dict[str, object]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "chat_template": CHAT_TEMPLATE,
    }


def load(folder: Path = FOLDER) -> Tokenizer:
    """Reads `tokenizer.json` of a model's folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _without_control_tokens(conversation: Conversation) -> str:
    return "\n".join(f"{message.role}\n{message.content}" for message in conversation.messages)


def main() -> None:
    """Trains the tokenizer and writes its file."""
    tokenizer = train()
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    sizes = [
        len(tokenizer.encode(render(conversation)).ids) for conversation in islice(conversations.training(1), 1000)
    ]
    print(json.dumps({"vocabulary": tokenizer.get_vocab_size(), "tokens_per_conversation": sum(sizes) / len(sizes)}))


if __name__ == "__main__":
    main()
