"""The calls of the public port but for streams: models, text, sessions, names, health and reflection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fermata.v1 import chat_pb2, common_pb2, model_pb2, sampling_pb2, session_pb2, text_pb2
from fermata.v1 import generation_pb2 as public
from services.common.directory import by_preference
from services.common.errors import (
    GenerationNotFound,
    InvalidRequest,
    ModelNotFound,
    NotYetSupported,
    OwnerElsewhere,
    SessionNotFound,
)
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer.chat_template import Conversation, text_of
from services.tokenizer.codec import Codec
from tests.unit.tokenizer.fake_orchestrator import SESSION, FakeGeneration
from tests.unit.tokenizer.house import Received, chat, error_of, house_of

GENERATION = f"{SESSION}.{0:016x}"
UNKNOWN = f"{SESSION}.{99:016x}"


# --- names, sessions ---------------------------------------------------------------------------------------------


async def test_cancel_follows_to_the_owner(codec: Codec) -> None:
    async with house_of(codec, [codec.encode("abc")], orchestrators=3) as house:
        await Received().read(house.stream())
        by_address = {fake.address: fake for fake in house.orchestrators}
        preferred, other, owner = (by_address[address] for address in by_preference(list(by_address), SESSION))
        preferred.errors = [OwnerElsewhere("there", metadata={"address": owner.address})]
        name = public.GenerationName(generation_id=GENERATION)
        response = await house.generation.Cancel(public.CancelRequest(generation=name))
        assert [finished.count for finished in response.finished] == [len(codec.encode("abc"))]
        assert response.finished[0].text == ""
        asked = [fake.calls.count("Cancel") for fake in (preferred, other, owner)]
        assert asked == [1, 0, 1]
        unknown = public.CancelRequest(generation=public.GenerationName(generation_id=UNKNOWN))
        assert isinstance(await error_of(house.generation.Cancel(unknown)), GenerationNotFound)


async def test_a_stored_generation_is_described(codec: Codec) -> None:
    outputs = [codec.encode("so far STOP"), codec.encode("and on and on STO")]

    def plan(request: pb.OpenRequest, generation_id: str) -> FakeGeneration:
        generation = FakeGeneration(generation_id, request, outputs, codec.vocabulary)
        generation.reason, generation.cut_bytes = common_pb2.FINISH_REASON_STOP_STRING, 4
        generation.log(len(outputs[0]), len(outputs[1]) - 1)
        return generation

    async with house_of(codec, plan) as house:
        stop = sampling_pb2.StoppingParams(strings=["on STOP"], max_tokens=50, token_ids=[7])
        call = house.stream(n=2, stop=stop, request_id="mine")
        await anext(aiter(call))
        name = public.GenerationName(request_id="mine")
        stored = await house.generation.GetGeneration(public.GetGenerationRequest(generation=name))
        call.cancel()
    assert stored.state == public.GENERATION_STATE_RUNNING
    assert [list(choice.token_ids) for choice in stored.choices] == [outputs[0], outputs[1][:-1]]
    assert stored.choices[0].text == "so far "
    assert stored.choices[0].finished.finish_reason == common_pb2.FINISH_REASON_STOP_STRING
    said = codec.vocabulary.decode(outputs[1][:-1])
    assert said.startswith(stored.choices[1].text)
    assert "on" not in said[len(stored.choices[1].text) :] or stored.choices[1].text == "and on and "
    assert not stored.choices[1].HasField("finished")
    assert stored.create_time.ToMilliseconds() == 1_700_000_000_123
    assert stored.started.stop == sampling_pb2.StoppingParams(
        strings=["on STOP"], max_tokens=50, token_ids=[7], min_tokens=0, ignore_eos=False, include_stop_string=False
    )


async def test_sessions_are_looked_at(codec: Codec) -> None:
    async with house_of(codec) as house:
        one = await house.session.GetSession(session_pb2.GetSessionRequest(session_id=SESSION))
        page = await house.session.ListSessions(session_pb2.ListSessionsRequest(page_token="t"))
        assert one.session.session_id == page.sessions[0].session_id == SESSION
        assert page.next_page_token == "t+50"
        bad = session_pb2.GetSessionRequest(session_id="nonsense")
        assert isinstance(await error_of(house.session.GetSession(bad)), SessionNotFound)
        over = session_pb2.ListSessionsRequest(page_size=1001)
        assert isinstance(await error_of(house.session.ListSessions(over)), InvalidRequest)
        assert house.first.calls == ["GetSession", "ListSessions"]


async def test_what_is_not_there_yet(codec: Codec) -> None:
    async with house_of(codec) as house:
        calls: list[grpc.aio.Call] = [
            house.generation.ListGenerations(public.ListGenerationsRequest()),
            house.generation.Score(public.ScoreRequest()),
            house.session.ForkSession(session_pb2.ForkSessionRequest()),
            house.session.UpdateSession(session_pb2.UpdateSessionRequest()),
            house.session.DeleteSession(session_pb2.DeleteSessionRequest()),
        ]
        for call in calls:
            assert isinstance(await error_of(call), NotYetSupported)


async def test_bad_names_never_reach_an_orchestrator(codec: Codec) -> None:
    async with house_of(codec) as house:
        empty, wrong = public.GenerationName(), public.GenerationName(generation_id="x.y")
        for name, kind in ((empty, InvalidRequest), (wrong, GenerationNotFound)):
            calls: list[grpc.aio.Call] = [
                house.generation.Resume(public.ResumeRequest(generation=name)),
                house.generation.Cancel(public.CancelRequest(generation=name)),
                house.generation.GetGeneration(public.GetGenerationRequest(generation=name)),
            ]
            for call in calls:
                assert isinstance(await error_of(call), kind)
        refused = house.generation.Generate(public.GenerateRequest())
        assert isinstance(await error_of(refused), InvalidRequest)
        assert house.first.calls == []
        assert house.first.attaches == []


# --- text, models ------------------------------------------------------------------------------------------------


async def test_text_to_ids_and_back(codecs: Mapping[str, Codec]) -> None:
    codec = codecs["llama3"]
    async with house_of(codec) as house:
        text = "Zwölf<|eot_id|>"
        plain = await house.text.Tokenize(text_pb2.TokenizeRequest(text=text))
        parsed = await house.text.Tokenize(
            text_pb2.TokenizeRequest(text=text, parse_special=True, add_special=True, model=codec.facts.name)
        )
        assert b"".join(token.piece for token in plain.tokens).decode() == text
        assert not any(token.special for token in plain.tokens)
        assert [token.piece for token in parsed.tokens if token.special] == [b"<|begin_of_text|>", b"<|eot_id|>"]
        ids = common_pb2.TokenIds(ids=[token.token_id for token in parsed.tokens])
        hidden = await house.text.Detokenize(text_pb2.DetokenizeRequest(token_ids=ids))
        shown = await house.text.Detokenize(text_pb2.DetokenizeRequest(token_ids=ids, show_special=True))
        assert (hidden.text, shown.text) == ("Zwölf", "<|begin_of_text|>Zwölf<|eot_id|>")
        long = await house.text.Tokenize(text_pb2.TokenizeRequest(text="ab " * 9000))
        assert b"".join(token.piece for token in long.tokens).decode() == "ab " * 9000
        over = text_pb2.DetokenizeRequest(token_ids=common_pb2.TokenIds(ids=[1, 10**6]))
        error = await error_of(house.text.Detokenize(over))
        assert [violation.field for violation in error.violations] == ["token_ids.ids[1]"]


async def test_a_template_is_applied(codec: Codec) -> None:
    async with house_of(codec) as house:
        request = text_pb2.ApplyChatTemplateRequest(chat=chat("Hello <|im_end|>"))
        response = await house.text.ApplyChatTemplate(request)
        assert codec.template is not None
        pieces = codec.template.render(Conversation([{"role": "user", "content": "Hello <|im_end|>"}]))
        assert response.prompt == text_of(pieces)
        assert list(response.token_ids.ids) == codec.encode_marked(codec.mark(pieces))
        assert list(response.token_ids.ids).count(codec.facts.eos_token_ids[0]) == 1
        empty = await error_of(house.text.ApplyChatTemplate(text_pb2.ApplyChatTemplateRequest()))
        assert [violation.field for violation in empty.violations] == ["chat.messages"]


async def test_other_models_are_not_found(codec: Codec) -> None:
    async with house_of(codec) as house:
        calls: list[grpc.aio.Call] = [
            house.text.Tokenize(text_pb2.TokenizeRequest(model="huge")),
            house.text.Detokenize(text_pb2.DetokenizeRequest(model="huge")),
            house.text.ApplyChatTemplate(text_pb2.ApplyChatTemplateRequest(model="huge")),
            house.model.GetModel(model_pb2.GetModelRequest(model="huge")),
            house.stream(model="huge"),
        ]
        for call in calls:
            error = await error_of(call)
            assert isinstance(error, ModelNotFound)
            assert error.metadata == {"model": "huge"}


async def test_the_model_is_described(codec: Codec) -> None:
    async with house_of(codec, orchestrators=2) as house:
        house.orchestrators[0].identity.fingerprint.weights = "w"
        await house.orchestrators[1].stop()
        (model,) = (await house.model.ListModels(model_pb2.ListModelsRequest())).models
        named = await house.model.GetModel(model_pb2.GetModelRequest(model=codec.facts.name))
        assert named.model == model
        assert house.orchestrators[0].calls == ["Identify"]  # believed for a second
        assert model.fingerprint.weights == "w"
        assert model.limits.context_length == 100  # the shards have less room than the model says
        assert {token.content: token.token_id for token in model.special_tokens} == {
            content: token_id for token_id, content in codec.vocabulary.special.items()
        }
        assert model.vocabulary_size == codec.facts.vocabulary_size
        assert model.default_sampling.temperature == 1.0
        assert model.has_chat_template


async def test_shards_with_another_tokenizer_are_noticed(codec: Codec, caplog: pytest.LogCaptureFixture) -> None:
    for theirs, complaints in ((codec.facts.tokenizer_hash, 0), ("other", 1)):
        async with house_of(codec) as house:
            house.first.identity.fingerprint.tokenizer = theirs
            await house.model.GetModel(model_pb2.GetModelRequest())
        assert sum("another tokenizer" in record.message for record in caplog.records) == complaints


async def test_the_model_is_described_without_orchestrators(codec: Codec) -> None:
    async with house_of(codec, orchestrators=0) as house:
        model = (await house.model.GetModel(model_pb2.GetModelRequest())).model
    assert not model.HasField("fingerprint")
    assert model.limits.context_length == codec.facts.context_length


# --- standard services -------------------------------------------------------------------------------------------


async def test_health(codec: Codec) -> None:
    async with house_of(codec) as house:
        stub = health_pb2_grpc.HealthStub(house.channel)
        for name in ("", "fermata.v1.GenerationService", "fermata.v1.ModelService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await house.tokenizer.drain()
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_on_both_ports(codec: Codec) -> None:
    async with house_of(codec) as house:
        for port in (house.tokenizer.public_port, house.tokenizer.own_port):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                asks = [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol="fermata.v1.GenerationService"),
                ]
                listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asks))]
        names = {service.name for service in listed.list_services_response.service}
        file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert names == {
        "fermata.v1.GenerationService",
        "fermata.v1.SessionService",
        "fermata.v1.TokenizerService",
        "fermata.v1.ModelService",
        "fermata.v1.TelemetryService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert file.name == "fermata/v1/generation.proto"


async def test_bad_requests_beside_healthy_streams(codec: Codec) -> None:
    """P11: a corpus of poison beside streams that go on."""
    output = codec.encode("all is well " * 30)
    poison = [
        {"prompt": "x", "n": 2**31},
        {"token_ids": common_pb2.TokenIds(ids=[2**32 - 1])},
        {"token_ids": common_pb2.TokenIds(ids=[1] * 900_000)},
        {"prompt": "x", "sampling": sampling_pb2.SamplingParams(temperature=float("nan"))},
        {"prompt": "x", "stop": sampling_pb2.StoppingParams(strings=["s" * 10_000] * 100)},
        {"chat": chat_pb2.ChatInput(messages=[chat_pb2.Message()] * 100_000)},
        {"prompt": "\U00100000" * 1000, "model": "no"},
        {"prompt": "x", "session_id": "../../etc"},
    ]
    async with house_of(codec, [output]) as house:
        healthy = [asyncio.create_task(Received().read(house.stream())) for _ in range(8)]
        for fields in itertools.islice(itertools.cycle(poison), 24):
            assert (await error_of(house.stream(**fields))).status in ("INVALID_ARGUMENT", "NOT_FOUND")  # type: ignore[arg-type]
        received = await asyncio.gather(*healthy)
    assert [one.ids[0] for one in received] == [output] * 8
