"""From a checked public request to what the orchestrator is told: defaults filled in, text turned into ids.

Pure functions over messages. Checks nothing (see `validation.py`) and calls nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf import struct_pb2

from fermata.v1 import chat_pb2, common_pb2, generation_pb2, sampling_pb2
from services.common.types import DEFAULT_TENANT
from services.orchestrator.v1 import orchestrator_pb2
from services.tokenizer.chat_template import Conversation
from services.tokenizer.codec import Codec, ModelFacts
from services.tokenizer.validation import time_limit_ms

ROLE_NAMES: Mapping[int, str] = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
    chat_pb2.ROLE_TOOL: "tool",
}
"""Roles as templates know them."""

_EXACT_INTEGERS = 2.0**53


def default_sampling(facts: ModelFacts) -> sampling_pb2.SamplingParams:
    """What is used where a request sets nothing."""
    return sampling_pb2.SamplingParams(
        temperature=facts.sampling.temperature,
        top_k=facts.sampling.top_k,
        top_p=facts.sampling.top_p,
        min_p=facts.sampling.min_p,
        repetition_penalty=facts.sampling.repetition_penalty,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )


def spec_of(request: generation_pb2.GenerationRequest, codec: Codec) -> orchestrator_pb2.GenerationSpec:
    """What the generation is to be, nothing unset but the seed, which the orchestrator draws."""
    facts = codec.facts
    sampling = default_sampling(facts)
    sampling.MergeFrom(request.sampling)
    stop, own = request.stop, facts.eos_token_ids
    stop_ids = [*(() if stop.ignore_eos else own), *stop.token_ids]
    output = sampling_pb2.OutputOptions()
    output.CopyFrom(request.output)
    output.logprobs = output.logprobs or output.top_logprobs > 0
    return orchestrator_pb2.GenerationSpec(
        sampling=sampling,
        bad_words=[common_pb2.TokenIds(ids=ids) for ids in codec.bad_word_ids(sampling.bad_words)],
        stop=orchestrator_pb2.StopRules(
            max_tokens=stop.max_tokens,
            min_tokens=stop.min_tokens,
            strings=stop.strings,
            token_ids=list(dict.fromkeys(stop_ids)),
            include_stop_string=stop.include_stop_string,
            ignore_eos=stop.ignore_eos,
        ),
        n=request.n or 1,
        output=output,
        durability=request.durability or common_pb2.DURABILITY_ASYNC,
        detach=request.detach,
        time_limit_ms=time_limit_ms(request.time_limit),
        exact=request.exact,
        priority=request.priority,
        user=request.user,
        model=facts.name,
    )


def request_hash(request: generation_pb2.GenerationRequest) -> bytes:
    """SHA-256 of a request without its request_id: a retry has the same (R14)."""
    body = generation_pb2.GenerationRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def internal_name(name: generation_pb2.GenerationName) -> orchestrator_pb2.Name:
    """A generation's name as the orchestrator takes it."""
    return orchestrator_pb2.Name(
        tenant=DEFAULT_TENANT,
        generation_id=name.generation_id,
        request_id=name.request_id,
        session_id=name.session_id if name.request_id else "",
    )


def placement_key(name: orchestrator_pb2.Name) -> str:
    """What decides which orchestrator is asked first: the session where it is known."""
    return name.session_id or name.generation_id.partition(".")[0] or name.request_id


def message_text(message: chat_pb2.Message) -> str:
    """What a message says: its parts, joined."""
    return "".join(part.text for part in message.content)


def template_message(message: chat_pb2.Message) -> dict[str, str]:
    """A message as templates know it; what is not set is not there."""
    fields = {"role": ROLE_NAMES[message.role], "content": message_text(message)}
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def conversation_of(chat: chat_pb2.ChatInput, before: Iterable[chat_pb2.Message] = ()) -> Conversation:
    """A chat as the template is given it, behind the messages of earlier turns."""
    return Conversation(
        messages=[template_message(message) for message in (*before, *chat.messages)],
        tools=[_plain_struct(tool) for tool in chat.tools],
        arguments=_plain_struct(chat.template_arguments),
        continue_final_message=chat.continue_final_message,
    )


def assistant_message(text: str) -> chat_pb2.Message:
    """What the model said, as a message."""
    return chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text=text)])


def with_inherited(chat: chat_pb2.ChatInput, earlier: Sequence[chat_pb2.ChatInput]) -> chat_pb2.ChatInput:
    """A turn's chat with the tools and template arguments of the turns before it, where it sets none itself.

    A turn gives its new messages alone; without this a second turn would take the tools out of the prompt's beginning.
    """
    complete = chat_pb2.ChatInput()
    complete.CopyFrom(chat)
    for previous in reversed(earlier):
        if not complete.tools:
            complete.tools.extend(previous.tools)
        if not complete.HasField("template_arguments") and previous.HasField("template_arguments"):
            complete.template_arguments.CopyFrom(previous.template_arguments)
    return complete


def _plain_struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A JSON object of plain values. Whole numbers are integers again: JSON has one kind of number, Jinja two."""
    return {key: _plain_value(value) for key, value in struct.fields.items()}


def _plain_value(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if abs(number) < _EXACT_INTEGERS and number == int(number) else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _plain_struct(value.struct_value)
        case "list_value":
            return [_plain_value(item) for item in value.list_value.values]
        case _:
            return None
