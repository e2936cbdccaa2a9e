"""From requests to what the orchestrator is told: defaults, ids, hashes, conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from fermata.v1 import chat_pb2, common_pb2, sampling_pb2
from fermata.v1 import generation_pb2 as public
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer.codec import Codec
from services.tokenizer.requests import (
    conversation_of,
    internal_name,
    placement_key,
    request_hash,
    spec_of,
    with_inherited,
)
from tests.unit.tokenizer.models import write_model


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    folder: Path = tmp_path_factory.mktemp("defaults")
    return Codec.load(write_model(folder, "chatml", temperature=0.5, top_k=7))


def test_what_is_not_set_is_the_models(codec: Codec) -> None:
    spec = spec_of(public.GenerationRequest(prompt="x"), codec)
    assert spec.sampling == sampling_pb2.SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )
    assert not spec.sampling.HasField("seed")
    assert list(spec.stop.token_ids) == list(codec.facts.eos_token_ids)
    assert (spec.n, spec.durability, spec.model) == (1, common_pb2.DURABILITY_ASYNC, codec.facts.name)
    assert (spec.stop.max_tokens, spec.time_limit_ms, spec.priority) == (0, 0, 0)


def test_what_is_set_is_taken(codec: Codec) -> None:
    request = public.GenerationRequest(
        prompt="x",
        sampling=sampling_pb2.SamplingParams(
            temperature=0.0,
            seed=0,
            logit_bias={5: -1.0},
            allowed_token_ids=common_pb2.TokenIds(ids=[5]),
            bad_words=["a"],
        ),
        stop=sampling_pb2.StoppingParams(
            max_tokens=9, min_tokens=2, strings=["END"], token_ids=[7, 7], ignore_eos=True, include_stop_string=True
        ),
        output=sampling_pb2.OutputOptions(top_logprobs=3),
        n=2,
        durability=common_pb2.DURABILITY_COMMITTED,
        detach=True,
        exact=True,
        time_limit=Duration(seconds=1, nanos=2_999_999),
        priority=-4,
        user="me",
    )
    spec = spec_of(request, codec)
    assert spec.sampling.HasField("temperature")
    assert spec.sampling.temperature == 0.0
    assert spec.sampling.HasField("seed")
    assert dict(spec.sampling.logit_bias) == {5: -1.0}
    assert list(spec.sampling.allowed_token_ids.ids) == [5]
    assert [list(word.ids) for word in spec.bad_words] == codec.bad_word_ids(["a"])
    assert spec.stop == pb.StopRules(
        max_tokens=9, min_tokens=2, strings=["END"], token_ids=[7], ignore_eos=True, include_stop_string=True
    )
    assert spec.output.logprobs
    assert (spec.n, spec.durability, spec.detach, spec.exact) == (2, common_pb2.DURABILITY_COMMITTED, True, True)
    assert (spec.time_limit_ms, spec.priority, spec.user) == (1002, -4, "me")


def test_a_hash_is_of_everything_but_the_name() -> None:
    request = public.GenerationRequest(prompt="x", labels={"b": "1", "a": "2"}, request_id="one")
    again = public.GenerationRequest(prompt="x", labels={"a": "2", "b": "1"}, request_id="two")
    other = public.GenerationRequest(prompt="y", labels={"a": "2", "b": "1"}, request_id="one")
    assert request_hash(request) == request_hash(again) != request_hash(other)
    assert len(request_hash(request)) == 32
    assert request.request_id == "one"


def test_names_and_who_is_asked_first() -> None:
    by_id = internal_name(public.GenerationName(generation_id="s.g", session_id="s"))
    assert by_id == pb.Name(tenant="default", generation_id="s.g")
    by_request = internal_name(public.GenerationName(request_id="r", session_id="s"))
    assert by_request == pb.Name(tenant="default", request_id="r", session_id="s")
    assert [placement_key(name) for name in (by_id, by_request, pb.Name(request_id="r"))] == ["s", "s", "r"]


def chat_of(*texts: str, **arguments: Any) -> chat_pb2.ChatInput:
    chat = chat_pb2.ChatInput(
        messages=[
            chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=part) for part in text])
            for text in texts
        ]
    )
    if arguments:
        chat.template_arguments.update(arguments)
    return chat


def test_a_conversation_for_the_template(codecs: Mapping[str, Codec]) -> None:
    chat = chat_of("ab", x=3, y=0.5, z=[True, None, {"k": "v"}], big=1e300)
    chat.messages.add(role=chat_pb2.ROLE_TOOL, name="f", tool_call_id="c").content.add(text="r")
    chat.tools.add().update({"minimum": 1})
    conversation = conversation_of(chat, before=[chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM)])
    assert conversation.messages == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab"},
        {"role": "tool", "content": "r", "name": "f", "tool_call_id": "c"},
    ]
    assert conversation.tools == [{"minimum": 1}]
    assert repr(conversation.tools) == "[{'minimum': 1}]"  # an integer, as the template will write it
    assert conversation.arguments == {"x": 3, "y": 0.5, "z": [True, None, {"k": "v"}], "big": 1e300}


def test_a_turn_inherits_tools_and_arguments_unless_it_has_its_own() -> None:
    first, second = chat_of("a", thinking=True), chat_of("b")
    first.tools.add().update({"name": "one"})
    second.tools.add().update({"name": "two"})
    plain = with_inherited(chat_of("c"), [first, second])
    assert [tool["name"] for tool in plain.tools] == ["two"]
    assert plain.template_arguments["thinking"] is True
    own = with_inherited(chat_of("c", thinking=False), [first, second])
    assert own.template_arguments["thinking"] is False
    assert with_inherited(chat_of("c"), []) == chat_of("c")
