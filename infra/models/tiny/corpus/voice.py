"""How users type: in lower case, without marks, with short forms and slips. Knows no kind of conversation."""

from __future__ import annotations

import random
import re

from infra.models.tiny.corpus.wording import QUOTED, Exchange

_OPENERS = (
    "Please",
    "Hey,",
    "So,",
    "Well,",
    "Now",
    "Hello!",
    "Hi,",
    "Okay,",
    "Tell me:",
    "Quick question:",
    "One more thing:",
    "Hmm,",
)
_SHORT_FORMS = {
    "you": "u",
    "are": "r",
    "your": "ur",
    "please": "pls",
    "thanks": "thx",
    "okay": "ok",
    "what is": "what's",
    "who is": "who's",
    "do not": "don't",
    "i am": "i'm",
    "going to": "gonna",
    "because": "cuz",
}
_SHORT_FORM = re.compile(rf"\b({'|'.join(sorted(_SHORT_FORMS, key=len, reverse=True))})\b", re.IGNORECASE)
_LONG_WORD = re.compile(r"[A-Za-z]{4,}")
_NEIGHBOURS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wqrewtyuoiposadfghkjlxzcvbnm"[:26], strict=True))


class Voice:
    """One user's way of typing, which lasts for a conversation."""

    def __init__(self, random_source: random.Random, slips: float | None = None) -> None:
        """Draws a way of typing; `slips` is the share of turns with a slip, which else is drawn, too."""
        self._random_source = random_source
        lazy = random_source.random() < 0.6
        self._lower = 0.92 if lazy else 0.08
        self._bare = 0.8 if lazy else 0.12
        self._plain = 0.7 if lazy else 0.05
        self._short = 0.3 if lazy and random_source.random() < 0.4 else 0.02
        drawn = 0.15 if random_source.random() < 0.25 else 0.0
        self._slip = drawn if slips is None else slips

    def say(self, exchange: Exchange) -> str:
        """The user's turn as it is typed; what is quoted stays as it is."""
        return self.type_out(exchange.user).replace(QUOTED, exchange.quoted)

    def type_out(self, text: str) -> str:
        """A well written text as it is typed."""
        chance = self._random_source.random
        if chance() < 0.07:
            text = self._opened(text)
        if chance() < self._short:
            text = _SHORT_FORM.sub(lambda match: _SHORT_FORMS[match[1].lower()], text)
        if chance() < self._slip:
            text = self._slipped(text)
        if chance() < self._lower:
            text = text.lower()
        if chance() < self._bare:
            text = text.rstrip(".!?") or text
        elif chance() < 0.05:
            text += self._random_source.choice("!?.") if not text.endswith(QUOTED) else ""
        if chance() < self._plain:
            text = text.replace("'", "").replace(",", "") or text
        return text

    def _opened(self, text: str) -> str:
        opener = self._random_source.choice(_OPENERS)
        keep = opener[-1] in "!:" or re.match(r"I\b|[A-Z]{2}", text)
        return f"{opener} {text if keep else text[:1].lower() + text[1:]}"

    def _slipped(self, text: str) -> str:
        """Hits a wrong key, swaps, doubles or leaves out a letter within a word."""
        found = list(_LONG_WORD.finditer(text))
        if not found:
            return text
        word = self._random_source.choice(found)
        at = self._random_source.randrange(word.start() + 1, word.end() - 1)
        kind = self._random_source.randrange(4)
        middle = (
            _NEIGHBOURS.get(text[at].lower(), text[at]),
            text[at + 1] + text[at],
            text[at] * 2,
            "",
        )[kind]
        return text[:at] + middle + text[at + (2 if kind == 1 else 1) :]
