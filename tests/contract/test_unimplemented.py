"""What this version of the contract does not do, as one list that can only shrink.

Every call is made with a good request and every option is set to a good value. Whatever answers UNIMPLEMENTED must be
in the list, and whatever is in the list must answer so: neither a new call without its implementation nor a list that
was not shortened passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from fermata.v1 import (
    chat_pb2,
    common_pb2,
    generation_pb2,
    model_pb2,
    sampling_pb2,
    session_pb2,
    telemetry_pb2,
    text_pb2,
)
from fermata.v1.generation_pb2_grpc import GenerationServiceStub
from fermata.v1.model_pb2_grpc import ModelServiceStub
from tests.contract.statuses import error_info
from tests.pipeline.house import House

pytestmark = pytest.mark.timeout(60)

NOT_YET_SUPPORTED = {
    "fermata.v1.GenerationService.ListGenerations",
    "fermata.v1.GenerationService.Score",
    "fermata.v1.SessionService.ForkSession",
    "fermata.v1.SessionService.UpdateSession",
    "fermata.v1.SessionService.DeleteSession",
    "fermata.v1.OutputOptions.prompt_logprobs",
    "fermata.v1.OutputOptions.stages",
}

ROOT = Path(__file__).resolve().parents[2]
PROTOS, README = ROOT / "protos" / "fermata" / "v1", ROOT / "README.md"
SERVICES = [
    service
    for module in (generation_pb2, session_pb2, text_pb2, model_pb2, telemetry_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
CHAT = chat_pb2.ChatInput(
    messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="hello")])]
)

# A good value for every option of a request; those that name something that exists are in `requests_of_options`.
SAMPLING = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {7: 1.0},
    "allowed_token_ids": common_pb2.TokenIds(ids=range(5, 50)),
    "bad_words": ["sky"],
    "seed": 7,
}
STOP = {
    "max_tokens": 2,
    "min_tokens": 1,
    "strings": ["sky"],
    "token_ids": [9],
    "ignore_eos": True,
    "include_stop_string": True,
}
OUTPUT = {
    "logprobs": True,
    "top_logprobs": 3,
    "prompt_logprobs": True,
    "stages": True,
    "timings": True,
    "final_only": True,
}
REQUEST = {
    "request_id": "of this test",
    "chat": CHAT,
    "prompt": "hello",
    "token_ids": common_pb2.TokenIds(ids=[9, 10]),
    "sampling": sampling_pb2.SamplingParams(temperature=0.0),
    "n": 2,
    "stop": sampling_pb2.StoppingParams(max_tokens=2),
    "output": sampling_pb2.OutputOptions(logprobs=True),
    "durability": common_pb2.DURABILITY_COMMITTED,
    "detach": True,
    "time_limit": Duration(seconds=30),
    "exact": True,
    "priority": 5,
    "user": "somebody",
    "labels": {"key": "value"},
}


async def outcome(call: Any, request: Message) -> str:
    """OK, or the status with the reason."""
    try:
        answer = call(request)
        if isinstance(answer, aio.UnaryStreamCall):
            async for _ in answer:
                pass
        else:
            await answer
    except aio.AioRpcError as error:
        return f"{error.code().name} {error_info(error).reason}"
    return "OK"


def small_request() -> generation_pb2.GenerationRequest:
    return generation_pb2.GenerationRequest(prompt="hello", stop=sampling_pb2.StoppingParams(max_tokens=1))


def good_calls(ended: generation_pb2.GenerateResponse) -> dict[str, Message]:
    """A request that every call can serve, by its name, about a generation that has ended."""
    session_id = ended.started.session_id
    name = generation_pb2.GenerationName(generation_id=ended.started.generation_id)
    return {
        "Generate": generation_pb2.GenerateRequest(generation=small_request()),
        "StreamGenerate": generation_pb2.StreamGenerateRequest(generation=small_request()),
        "Resume": generation_pb2.ResumeRequest(generation=name),
        "Cancel": generation_pb2.CancelRequest(generation=name),
        "GetGeneration": generation_pb2.GetGenerationRequest(generation=name),
        "ListGenerations": generation_pb2.ListGenerationsRequest(),
        "Score": generation_pb2.ScoreRequest(prompt="hello", text=" there"),
        "GetSession": session_pb2.GetSessionRequest(session_id=session_id),
        "ListSessions": session_pb2.ListSessionsRequest(),
        "ForkSession": session_pb2.ForkSessionRequest(session_id=session_id),
        "UpdateSession": session_pb2.UpdateSessionRequest(session_id=session_id, labels={"key": "value"}),
        "ApplyChatTemplate": text_pb2.ApplyChatTemplateRequest(chat=CHAT),
        "Tokenize": text_pb2.TokenizeRequest(text="hello"),
        "Detokenize": text_pb2.DetokenizeRequest(token_ids=common_pb2.TokenIds(ids=[9, 10])),
        "ListModels": model_pb2.ListModelsRequest(),
        "GetModel": model_pb2.GetModelRequest(),
        "GetTrace": telemetry_pb2.GetTraceRequest(generation=name),
        "GetStatistics": telemetry_pb2.GetStatisticsRequest(),
        "DeleteSession": session_pb2.DeleteSessionRequest(session_id=session_id),  # the last one: it takes the session
    }


def requests_of_options(model: str, ended: generation_pb2.GenerateResponse) -> Iterable[tuple[str, Message]]:
    """A request for every option, by the option's full name."""
    started = ended.started
    session = {"session_id": started.session_id}
    place = session | {"continue_from": {"generation_id": started.generation_id}}
    position = started.prompt_tokens + ended.choices[0].finished.count
    named: dict[str, dict[str, Any]] = {
        "model": {"model": model},
        "session_id": session,
        "continue_from": place,
        "expected_position": place | {"expected_position": position},
    }
    requests = named | {option: {option: value} for option, value in REQUEST.items()}
    requests |= {f"sampling.{option}": {"sampling": {option: value}} for option, value in SAMPLING.items()}
    requests |= {f"stop.{option}": {"stop": {option: value}} for option, value in STOP.items()}
    requests |= {f"output.{option}": {"output": {option: value}} for option, value in OUTPUT.items()}
    for path, fields in requests.items():
        request = small_request()
        request.MergeFrom(generation_pb2.GenerationRequest(**fields))
        parent, _, option = path.rpartition(".")
        kind: type[Message] = type(getattr(request, parent)) if parent else type(request)
        yield kind.DESCRIPTOR.fields_by_name[option].full_name, generation_pb2.GenerateRequest(generation=request)


@pytest.mark.asyncio(loop_scope="module")
async def test_exactly_this_is_not_supported_yet(house: House) -> None:
    outcomes: dict[str, str] = {}
    async with aio.insecure_channel(house.address) as channel:
        generate = GenerationServiceStub(channel).Generate
        model = await ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())
        ended = await generate(generation_pb2.GenerateRequest(generation=small_request()))
        for option, request in requests_of_options(model.model.model, ended):
            outcomes[option] = await outcome(generate, request)
        calls = good_calls(ended)
        for method in (method for service in SERVICES for method in service.methods):
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            call: Any = make(
                f"/{method.containing_service.full_name}/{method.name}",
                request_serializer=lambda message: bytes(message.SerializeToString()),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            outcomes[method.full_name] = await outcome(call, calls[method.name])
    refused = {name for name, said in outcomes.items() if said.startswith(grpc.StatusCode.UNIMPLEMENTED.name)}
    assert refused == NOT_YET_SUPPORTED
    assert {outcomes[name] for name in refused} == {"UNIMPLEMENTED NOT_YET_SUPPORTED"}
    assert {name: said for name, said in outcomes.items() if said != "OK" and name not in refused} == {}
    kinds = (generation_pb2.GenerationRequest, sampling_pb2.SamplingParams, sampling_pb2.StoppingParams)
    options = {field.full_name for kind in (*kinds, sampling_pb2.OutputOptions) for field in kind.DESCRIPTOR.fields}
    assert options <= outcomes.keys()  # an option that is new in the contract needs a good value above


def test_the_contract_says_so_where_it_is_so() -> None:
    said = set()
    for path in PROTOS.glob("*.proto"):
        inside, note = "", False
        for line in map(str.strip, path.read_text().splitlines()):
            if opened := re.match(r"(?:service|message) (\w+) \{", line):
                inside = opened[1]
            declared = re.match(r"rpc (\w+)\(|(?:optional |repeated )?[\w.<>, ]+ (\w+) = \d+;", line)
            if declared and note:
                said.add(f"fermata.v1.{inside}.{declared[1] or declared[2]}")
            note = line.startswith("//") and (note or "Not supported yet" in line)
    assert said == NOT_YET_SUPPORTED


def test_the_table_of_calls_is_the_contract() -> None:
    table: dict[str, tuple[set[str], set[str]]] = {}
    for row in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", README.read_text(), re.MULTILINE):
        table[row[0]] = set(re.findall(r"`(\w+)`", row[1])), set(re.findall(r"`(\w+)`", row[2]))
    expected: dict[str, tuple[set[str], set[str]]] = {}
    for service in SERVICES:
        missing = {method.name for method in service.methods if method.full_name in NOT_YET_SUPPORTED}
        expected[service.name] = {method.name for method in service.methods} - missing, missing
    assert table == expected
