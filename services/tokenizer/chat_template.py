"""A conversation as the model wants to read it: renders the model's own chat template (Jinja) and keeps what the
template wrote apart from what people wrote.

Control tokens never come from user text. Templates are programs that cut, join and compare strings, so origin cannot
be tracked through them; instead every place in a user's string that could become (part of) a control token's name is
disarmed before rendering: one character of it is replaced by an alias from a private-use plane, one for one, so that
lengths and everything else that templates look at stay as they are. In the rendered text a name of a control token
without an alias in it was written by the template; all else is text, and gets its characters back.

Rendering follows `transformers`' `apply_chat_template` (environment, filters, variables, final message).
Pure; knows no tokenizer, no token id and no session.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.errors import FieldViolation, TemplateFailed

if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
    raise ImportError("jinja2 before 3.1.6 has known ways out of its sandbox")

RESERVED_ARGUMENTS = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
        "raise_exception",
        "strftime_now",
        "range",
        "dict",
        "lipsum",
        "cycler",
        "joiner",
        "namespace",
        "loop",
        "self",
        "super",
        "caller",
        "varargs",
        "kwargs",
    }
)
"""Names that a request's template arguments must not have: the template's own variables and functions."""

OUTPUT_FACTOR, OUTPUT_ALLOWANCE = 4, 64 << 10
"""A rendering has at most this many characters per character of input, and so many more."""

_ALIAS_PLANES = range(0xF0000, 0x10FFFE)
_ALIAS_BLOCK = 0x400
_SHORTEST_HALVED = 8
"""Halves of shorter names ("nk>" of "<unk>") are too common to disarm: templates look for "</think>"."""

_CONTINUATION_MARK = "\U0010fffd "
"""Stands at the end of the message to be continued; the blank shows whether the template trims."""

_compile = functools.lru_cache(maxsize=256)(re.compile)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given.

    Attributes:
        messages: dictionaries with `role`, `content` and, where given, `name` and `tool_call_id`.
        tools: JSON schema objects.
        arguments: further variables of the template.
        continue_final_message: leave the last message open instead of opening a new one.
    """

    messages: Sequence[Mapping[str, str]]
    tools: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False


class Piece(NamedTuple):
    """A run of the rendered prompt: text, or the name of one control token that the template wrote."""

    text: str
    control: bool


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, control_tokens: Iterable[str], variables: Mapping[str, str]) -> None:
        """Compiles a template.

        Args:
            source: the template.
            control_tokens: names of the model's control tokens, as templates write them.
            variables: `bos_token` and the like.

        Raises:
            ValueError: the template is not valid Jinja.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template does not compile: {error}") from error
        self._variables = dict(variables)
        self._control = _ControlNames(control_tokens)

    def render(self, conversation: Conversation, *, field_name: str = "chat") -> list[Piece]:
        """Renders a conversation.

        Args:
            conversation: what to render; unless it is continued the template opens a new message of the model.
            field_name: what an error names as its cause.

        Raises:
            TemplateFailed: the template refuses the conversation, fails, or writes far more than it was given.
        """
        try:
            aliases = self._control.aliases(_strings(conversation))
            rendered = self._render(conversation, aliases)
        except Exception as error:  # templates are programs: anything may come out of them
            reason = str(error) or type(error).__name__
            raise TemplateFailed(
                f"the chat template refused the conversation: {reason}",
                violations=[FieldViolation(field_name, reason[:500])],
            ) from error
        return self._control.split(rendered, aliases)

    def _render(self, conversation: Conversation, aliases: _Aliases) -> str:
        """Renders with disarmed strings."""
        messages = [
            {key: value if key == "role" else aliases.disarm(value, whole=True) for key, value in message.items()}
            for message in conversation.messages
        ]
        if conversation.continue_final_message:
            messages[-1]["content"] += _CONTINUATION_MARK
        chunks: list[str] = []
        room = OUTPUT_FACTOR * sum(map(len, _strings(conversation))) + OUTPUT_ALLOWANCE
        for chunk in self._template.generate(
            **self._variables,
            **{name: aliases.disarm_all(value) for name, value in conversation.arguments.items()},
            messages=messages,
            tools=[aliases.disarm_all(tool) for tool in conversation.tools] or None,
            documents=None,
            add_generation_prompt=not conversation.continue_final_message,
        ):
            chunks.append(chunk)
            room -= len(chunk)
            if room < 0:
                raise ValueError("it writes more text than is allowed")
        rendered = "".join(chunks)
        return _cut_at_mark(rendered) if conversation.continue_final_message else rendered


def text_of(pieces: Iterable[Piece]) -> str:
    """The prompt as text, control tokens by their names."""
    return "".join(piece.text for piece in pieces)


def _cut_at_mark(rendered: str) -> str:
    """What comes before the end of the message that is to be continued."""
    place = rendered.rfind(_CONTINUATION_MARK.rstrip())
    if place < 0:
        raise ValueError("it does not show the end of the message that is to be continued")
    # Without its blank the mark was trimmed, so the message without the mark would have been trimmed, too.
    return rendered[:place] if rendered.startswith(_CONTINUATION_MARK, place) else rendered[:place].rstrip()


class _Aliases:
    """The disarming of one conversation's strings."""

    def __init__(self, names: _ControlNames, base: int) -> None:
        self._names = names
        self._there = {character: chr(base + index) for index, character in enumerate(names.alphabet)}
        self.back = str.maketrans({alias: character for character, alias in self._there.items()})

    def disarm(self, text: str, *, whole: bool = False) -> str:
        """Replaces one character of each part of `text` that could become a control token's name.

        Args:
            text: what a user wrote.
            whole: also when the text as a whole could be the middle of a name. Not for what templates compare with
                words of their own (arguments, fields of tools).
        """
        places = self._names.places(text, whole=whole)
        if not places:
            return text
        characters = list(text)
        for place in places:
            characters[place] = self._there[characters[place]]
        return "".join(characters)

    def disarm_all(self, value: Any) -> Any:
        """As `disarm`, for all strings in a JSON value, the names of fields included."""
        if isinstance(value, str):
            return self.disarm(value)
        if isinstance(value, Mapping):
            return {self.disarm(key): self.disarm_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.disarm_all(item) for item in value]
        return value


class _ControlNames:
    """The names of the control tokens, and how to find them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted({name for name in names if name}, key=len, reverse=True)
        self.alphabet = sorted(set("".join(self._names)))
        fragments = set(self._names)
        for name in self._names:
            if len(name) >= _SHORTEST_HALVED:
                half = (len(name) + 1) // 2
                # A name that a template puts together from two pieces of a message has one of its halves in one.
                fragments |= {name[:half], name[-half:]}
        self._name = _compile(_alternatives(self._names))
        # A look-ahead, so that overlapping places are all found.
        self._fragment = _compile(f"(?={_alternatives(fragments)})")
        self._beginnings = {name[:end] for name in self._names for end in range(1, len(name))}
        self._ends = {name[start:] for name in self._names for start in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)

    def aliases(self, strings: Iterable[str]) -> _Aliases:
        """Chooses aliases that occur in none of the strings.

        Raises:
            ValueError: the strings use all private-use characters.
        """
        used = {ord(character) // _ALIAS_BLOCK for text in strings if not text.isascii() for character in set(text)}
        step = _ALIAS_BLOCK * (1 + len(self.alphabet) // _ALIAS_BLOCK)
        for base in range(_ALIAS_PLANES.start, _ALIAS_PLANES.stop - step, step):
            if used.isdisjoint(range(base // _ALIAS_BLOCK, (base + step) // _ALIAS_BLOCK)):
                return _Aliases(self, base)
        raise ValueError("it uses too many private-use characters")

    def places(self, text: str, *, whole: bool) -> set[int]:
        """Indices of the characters of `text` to replace."""
        if not self._names:
            return set()
        places = {match.start() for match in self._fragment.finditer(text)}
        # Templates trim, and put their own text directly before and after.
        core = text.strip()
        if not core:
            return places
        start = text.index(core)
        end = start + len(core)
        reach = range(1, min(self._longest, len(core) + 1))
        if any(core[:length] in self._ends for length in reach) or (
            whole and len(core) < self._longest and any(core in name for name in self._names)
        ):
            places.add(start)
        places.update(end - length for length in reach if core[-length:] in self._beginnings)
        return places

    def split(self, rendered: str, aliases: _Aliases) -> list[Piece]:
        """Splits a rendering at the control tokens, and gives the text its characters back."""
        pieces: list[Piece] = []
        position = 0
        for match in self._name.finditer(rendered) if self._names else ():
            if match.start() > position:
                pieces.append(Piece(rendered[position : match.start()].translate(aliases.back), False))
            pieces.append(Piece(match[0], True))
            position = match.end()
        if position < len(rendered):
            pieces.append(Piece(rendered[position:].translate(aliases.back), False))
        return pieces


def _alternatives(texts: Iterable[str]) -> str:
    """A pattern of the texts, the longest first, as tokenizers match them."""
    return f"(?:{'|'.join(re.escape(text) for text in sorted(texts, key=len, reverse=True))})"


def _strings(value: object) -> Iterator[str]:
    """All strings of a conversation that users wrote."""
    if isinstance(value, Conversation):
        yield from _strings([value.messages, value.tools, value.arguments])
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates of models are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's words for training; here it shows its content."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # of the extension, not of an instance

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Takes the block for its content, in a scope of its own as a block has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
