"""Plain arguments become exactly the request that they say."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, cast

import pytest
from google.protobuf import duration_pb2, struct_pb2

from fermata.dialing import parse_server
from fermata.requests import Options, chat_input, generation_name, generation_request
from fermata.v1 import chat_pb2, common_pb2, generation_pb2


def build(prompt: str | None = None, **options: Any) -> generation_pb2.GenerationRequest:
    return generation_request(prompt, cast(Options, options))


def test_nothing_is_set_that_was_not_given() -> None:
    request = build("hello")
    assert len(request.request_id) == 32
    request.ClearField("request_id")
    expected = generation_pb2.GenerationRequest(prompt="hello")
    for part in ("sampling", "stop", "output"):
        getattr(expected, part).SetInParent()
    assert request == expected
    assert build("hello").request_id != build("hello").request_id


def test_zero_is_not_unset() -> None:
    sampling = build("", temperature=0, top_k=0, min_p=0.0, seed=0).sampling
    assert all(sampling.HasField(name) for name in ("temperature", "top_k", "min_p", "seed"))
    assert not sampling.HasField("top_p")
    assert not build("", temperature=None).sampling.HasField("temperature")


# Option, value, field of the request, what must stand there when it is not the value itself.
FIELDS: list[tuple[str, Any, str, Any]] = [
    ("request_id", "mine", "request_id", None),
    ("model", "tiny", "model", None),
    ("session_id", "session", "session_id", None),
    ("continue_from", ("s.1", 2), "continue_from", generation_pb2.ContinueFrom(generation_id="s.1", choice=2)),
    ("expected_position", 12, "expected_position", None),
    ("temperature", 0.5, "sampling.temperature", None),
    ("top_k", 4, "sampling.top_k", None),
    ("top_p", 0.75, "sampling.top_p", None),
    ("min_p", 0.25, "sampling.min_p", None),
    ("repetition_penalty", 1.5, "sampling.repetition_penalty", None),
    ("presence_penalty", 0.5, "sampling.presence_penalty", None),
    ("frequency_penalty", -0.5, "sampling.frequency_penalty", None),
    ("logit_bias", {3: -1.0}, "sampling.logit_bias", None),
    ("allowed_token_ids", [1, 2], "sampling.allowed_token_ids", common_pb2.TokenIds(ids=[1, 2])),
    ("bad_words", ["no"], "sampling.bad_words", None),
    ("seed", 2**64 - 1, "sampling.seed", None),
    ("n", 3, "n", None),
    ("max_tokens", 5, "stop.max_tokens", None),
    ("min_tokens", 1, "stop.min_tokens", None),
    ("stop", "end", "stop.strings", ["end"]),
    ("stop", ["end", "over"], "stop.strings", None),
    ("stop_token_ids", [9], "stop.token_ids", None),
    ("ignore_eos", True, "stop.ignore_eos", None),
    ("include_stop_string", True, "stop.include_stop_string", None),
    ("logprobs", True, "output.logprobs", None),
    ("top_logprobs", 2, "output.top_logprobs", None),
    ("prompt_logprobs", True, "output.prompt_logprobs", None),
    ("stages", True, "output.stages", None),
    ("timings", True, "output.timings", None),
    ("final_only", True, "output.final_only", None),
    ("durability", "committed", "durability", common_pb2.DURABILITY_COMMITTED),
    ("durability", "async", "durability", common_pb2.DURABILITY_ASYNC),
    ("detach", True, "detach", None),
    ("time_limit", 1.5, "time_limit", duration_pb2.Duration(seconds=1, nanos=500_000_000)),
    ("exact", True, "exact", None),
    ("priority", -3, "priority", None),
    ("user", "me", "user", None),
    ("labels", {"team": "blue"}, "labels", None),
]


@pytest.mark.parametrize(("option", "value", "path", "expected"), FIELDS)
def test_option_finds_its_field(option: str, value: Any, path: str, expected: Any) -> None:
    request = build("hello", **{option: value})
    assert attrgetter(path)(request) == (value if expected is None else expected)
    # And nothing else is set by it.
    parent, _, name = path.rpartition(".")
    holder: Any = attrgetter(parent)(request) if parent else request
    holder.ClearField(name)
    plain = build("hello")
    request.request_id = plain.request_id
    assert request == plain


def test_every_option_is_tested() -> None:
    chat_options = {"messages", "token_ids", "tools", "template_arguments", "continue_final_message"}
    assert {option for option, *_ in FIELDS} | chat_options == Options.__annotations__.keys()


def test_inputs() -> None:
    assert list(build(token_ids=range(3)).token_ids.ids) == [0, 1, 2]
    assert build(token_ids=[]).WhichOneof("input") == "token_ids"
    assert build("").WhichOneof("input") == "prompt"
    chat = build(
        messages=[{"role": "user", "content": "hi"}], tools=[{"name": "f"}], template_arguments={"a": {"b": 1}}
    ).chat
    assert chat.messages[0].role == chat_pb2.ROLE_USER
    assert chat.tools[0]["name"] == "f"
    assert chat.template_arguments == struct_pb2.Struct(
        fields={"a": struct_pb2.Value(struct_value=struct_pb2.Struct(fields={"b": struct_pb2.Value(number_value=1)}))}
    )


def test_messages_have_parts_and_names() -> None:
    chat = chat_input(
        [
            {"role": "system", "content": ["a", {"type": "text", "text": "b"}]},
            {"role": "tool", "content": "42", "name": "f", "tool_call_id": "1"},
            {"role": "assistant", "content": None},
        ],
        continue_final_message=True,
    )
    assert [part.text for part in chat.messages[0].content] == ["a", "b"]
    assert (chat.messages[1].role, chat.messages[1].name, chat.messages[1].tool_call_id) == (
        chat_pb2.ROLE_TOOL,
        "f",
        "1",
    )
    assert not chat.messages[2].content
    assert chat.continue_final_message


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}),
        ("a", {"token_ids": [1]}),
        ("a", {"messages": []}),
        ("a", {"tools": [{}]}),
        ("a", {"durability": "perhaps"}),
        ("a", {"top_k": -1}),
        ("a", {"seed": 2**64}),
        (None, {"messages": [{"role": "robot", "content": "x"}]}),
        (None, {"messages": [{"content": "x"}]}),
        (None, {"messages": [{"role": "user", "content": "x", "image": "y"}]}),
        (None, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        (None, {"token_ids": [-1]}),
    ],
)
def test_what_no_message_can_say_is_refused_here(prompt: str | None, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        build(prompt, **options)


def test_unknown_options_and_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="max_token"):
        build("a", max_token=3)
    with pytest.raises(TypeError):
        build("a", temperature="hot")


def test_names() -> None:
    assert generation_name("s.g", "r", "s") == generation_pb2.GenerationName(generation_id="s.g")
    assert generation_name("", "r", "s") == generation_pb2.GenerationName(request_id="r", session_id="s")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("127.0.0.1:7433", "127.0.0.1:7433"),
        ("grpc://example.org:1/", "example.org:1"),
        ("grpc://[::1]:80", "[::1]:80"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
    ],
)
def test_addresses(given: str, address: str) -> None:
    assert parse_server(given) == address


@pytest.mark.parametrize("given", ["", "localhost", "localhost:", ":80", "http://x", "host:port"])
def test_addresses_without_a_port_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_server(given)
