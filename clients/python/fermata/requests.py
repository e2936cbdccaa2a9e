"""Plain Python arguments in, request messages out: the one place where both clients build them.

Knows the messages only. Ranges are the server's business; here it is refused only what no message can say.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from google.protobuf import duration_pb2, struct_pb2

from fermata.v1 import chat_pb2, common_pb2, generation_pb2, sampling_pb2

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": "system" | "user" | "assistant" | "tool", "content": str | list of parts}`, optionally with
`name` and `tool_call_id`. A part is a string or `{"type": "text", "text": str}`."""

_ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
    "tool": chat_pb2.ROLE_TOOL,
}
_DURABILITIES = {"async": common_pb2.DURABILITY_ASYNC, "committed": common_pb2.DURABILITY_COMMITTED}
_MESSAGE_KEYS = {"role", "content", "name", "tool_call_id"}

# Options that are a field of the same name in one of the messages.
_SAMPLING_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOPPING_SCALARS = ("max_tokens", "min_tokens", "ignore_eos", "include_stop_string")
_OUTPUT_SCALARS = ("logprobs", "top_logprobs", "prompt_logprobs", "stages", "timings", "final_only")
_REQUEST_SCALARS = ("model", "session_id", "expected_position", "n", "detach", "exact", "priority", "user", "labels")


class Options(TypedDict, total=False):
    """What `generate` and `stream` take besides the prompt; what is left out takes the model's own default."""

    messages: Messages
    """A conversation instead of a prompt; with `session_id` its new messages alone."""
    token_ids: Iterable[int]
    """Token ids as they are instead of a prompt."""
    tools: Sequence[Mapping[str, Any]]
    """Tools offered to the model, as JSON schema objects."""
    template_arguments: Mapping[str, Any]
    """Further arguments of the chat template."""
    continue_final_message: bool
    """The model continues the last message."""
    request_id: str
    """Makes the request idempotent; a random one is made when it is left out."""
    model: str
    """Name of the model; the only one when left out."""
    session_id: str
    """Goes on from this session."""
    continue_from: tuple[str, int]
    """The (generation_id, choice) of the session to go on from."""
    expected_position: int
    """Refuses the request unless the session's id sequence has this length."""
    temperature: float
    """0 chooses the most probable token."""
    top_k: int
    """Keep exactly the k most probable tokens; 0 keeps all."""
    top_p: float
    """Keep the most probable tokens while the mass before each is below."""
    min_p: float
    """Keep tokens whose probability is at least this times the highest."""
    repetition_penalty: float
    """On tokens that occur anywhere before; 1 is off."""
    presence_penalty: float
    """On tokens that occur in this generation's output; 0 is off."""
    frequency_penalty: float
    """Times the number of occurrences in this generation's output; 0 is off."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these ids."""
    allowed_token_ids: Iterable[int]
    """Only these ids may be chosen."""
    bad_words: Sequence[str]
    """Texts whose token sequences are never completed."""
    seed: int
    """Seed of the noise; drawn when left out."""
    n: int
    """Number of choices."""
    max_tokens: int
    """Most output tokens per choice; the rest of the context when left out."""
    min_tokens: int
    """No stop before this many output tokens."""
    stop: str | Sequence[str]
    """Texts that end the choice."""
    stop_token_ids: Sequence[int]
    """Ids that end the choice, besides the model's own."""
    ignore_eos: bool
    """Do not stop at the model's own end tokens."""
    include_stop_string: bool
    """Keep the stop string in the text."""
    logprobs: bool
    """Return the raw log-probability of each output token."""
    top_logprobs: int
    """Return this many most probable tokens at each position."""
    prompt_logprobs: bool
    """Return the raw log-probability of each prompt token."""
    stages: bool
    """Return the distribution after every sampling stage."""
    timings: bool
    """Return where the time of each token went."""
    final_only: bool
    """Send no tokens; the end of each choice carries the whole text."""
    durability: Literal["async", "committed"]
    """Whether tokens are shown at once or after the session store has them."""
    detach: bool
    """Go on when the last reader leaves. Closing such a stream leaves it; it does not cancel it."""
    time_limit: float
    """Ends the generation after this many seconds, whoever reads."""
    exact: bool
    """Refuse to go on, after a failure, on a replica with another fingerprint."""
    priority: int
    """Higher ones are admitted first, -100 to 100."""
    user: str
    """The end user, for logs and quotas."""
    labels: Mapping[str, str]
    """Kept with the session."""


def generation_request(prompt: str | None, options: Options) -> generation_pb2.GenerationRequest:
    """Builds a request; without a `request_id` it gets a random one.

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: not exactly one of prompt, messages and token_ids is given, or a value fits no field.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = generation_pb2.GenerationRequest(
        request_id=given.get("request_id") or new_request_id(),
        sampling=_sampling(given),
        stop=_stopping(given),
        output=sampling_pb2.OutputOptions(**_pick(given, _OUTPUT_SCALARS)),
        **_pick(given, _REQUEST_SCALARS),
    )
    _set_input(request, prompt, given)
    if "continue_from" in given:
        generation_id, choice = given["continue_from"]
        request.continue_from.generation_id, request.continue_from.choice = generation_id, choice
    if "durability" in given:
        request.durability = _look_up(_DURABILITIES, given["durability"], "durability")
    if "time_limit" in given:
        request.time_limit.CopyFrom(_duration(given["time_limit"]))
    return request


def new_request_id() -> str:
    """128 random bits as 32 hex digits."""
    return secrets.token_hex(16)


def chat_input(
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    template_arguments: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
) -> chat_pb2.ChatInput:
    """Builds a conversation.

    Raises:
        ValueError: a message has an unknown role, key or part.
    """
    chat = chat_pb2.ChatInput(continue_final_message=continue_final_message)
    chat.messages.extend(_message(message) for message in messages)
    chat.tools.extend(_struct(tool) for tool in tools)
    if template_arguments is not None:
        chat.template_arguments.CopyFrom(_struct(template_arguments))
    return chat


def generation_name(generation_id: str, request_id: str = "", session_id: str = "") -> generation_pb2.GenerationName:
    """Names a generation by its id or, when that is empty, by its request's (R14)."""
    if generation_id:
        return generation_pb2.GenerationName(generation_id=generation_id)
    return generation_pb2.GenerationName(request_id=request_id, session_id=session_id)


def _set_input(request: generation_pb2.GenerationRequest, prompt: str | None, given: Mapping[str, Any]) -> None:
    inputs = [name for name in ("messages", "token_ids") if name in given] + (["prompt"] if prompt is not None else [])
    if len(inputs) != 1:
        found = " and ".join(inputs) or "none"
        raise ValueError(f"exactly one of prompt, messages and token_ids is needed, not {found}")
    chat_options = _pick(given, ("tools", "template_arguments", "continue_final_message"))
    if chat_options and inputs != ["messages"]:
        raise ValueError(f"{', '.join(chat_options)} go with messages")
    if inputs == ["messages"]:
        request.chat.CopyFrom(chat_input(given["messages"], **chat_options))
    elif inputs == ["token_ids"]:
        request.token_ids.CopyFrom(common_pb2.TokenIds(ids=given["token_ids"]))
    elif prompt is not None:
        request.prompt = prompt


def _sampling(given: Mapping[str, Any]) -> sampling_pb2.SamplingParams:
    sampling = sampling_pb2.SamplingParams(
        **_pick(given, _SAMPLING_SCALARS), **_pick(given, ("logit_bias", "bad_words"))
    )
    if "allowed_token_ids" in given:
        sampling.allowed_token_ids.CopyFrom(common_pb2.TokenIds(ids=given["allowed_token_ids"]))
    return sampling


def _stopping(given: Mapping[str, Any]) -> sampling_pb2.StoppingParams:
    stop = given.get("stop", ())
    return sampling_pb2.StoppingParams(
        strings=[stop] if isinstance(stop, str) else stop,
        token_ids=given.get("stop_token_ids", ()),
        **_pick(given, _STOPPING_SCALARS),
    )


def _message(message: Mapping[str, Any]) -> chat_pb2.Message:
    unknown = message.keys() - _MESSAGE_KEYS
    if unknown or "role" not in message:
        raise ValueError(f"a message has role and content, optionally name and tool_call_id, not {sorted(message)}")
    content = message.get("content") or ()
    parts = [content] if isinstance(content, str) else content
    return chat_pb2.Message(
        role=_look_up(_ROLES, message["role"], "role"),
        content=[chat_pb2.ContentPart(text=_part_text(part)) for part in parts],
        name=message.get("name", ""),
        tool_call_id=message.get("tool_call_id", ""),
    )


def _part_text(part: str | Mapping[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"a content part is a string or {{'type': 'text', 'text': ...}}, not {part!r}")
    return str(part["text"])


def _struct(value: Mapping[str, Any]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(dict(value))
    return struct


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _look_up(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"{what} is one of {', '.join(table)}, not {name!r}")
    return table[name]


def _pick(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}
