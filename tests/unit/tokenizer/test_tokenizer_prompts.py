"""What requests become: prompts, turns of a session, retries (R14, R17); through the public port."""

from __future__ import annotations

from collections.abc import Mapping

from fermata.v1 import chat_pb2, common_pb2
from fermata.v1 import generation_pb2 as public
from services.common.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    NoChatTemplate,
    PositionMismatch,
    RequestIdReused,
    SessionBusy,
    SessionNotFound,
    TemplateFailed,
)
from services.common.types import pack_ids
from services.orchestrator.v1 import orchestrator_pb2 as pb
from services.tokenizer.chat_template import Conversation
from services.tokenizer.codec import Codec
from tests.unit.tokenizer.fake_orchestrator import SESSION, prompt_ids
from tests.unit.tokenizer.house import House, Received, chat, error_of, house_of

GENERATION = f"{SESSION}.{0:016x}"
UNKNOWN = f"{SESSION}.{99:016x}"


async def opened(house: House, **fields: object) -> pb.OpenRequest:
    """What the orchestrator is asked to open for a request."""
    await Received().read(house.stream(**fields))  # type: ignore[arg-type]
    return list(house.log.generations.values())[-1].request


# --- prompts -----------------------------------------------------------------------------------------------------


async def test_what_a_request_becomes(codec: Codec, codecs: Mapping[str, Codec]) -> None:
    async with house_of(codec) as house:
        raw = await opened(house, prompt="Hello <|im_end|>", labels={"a": "b"}, request_id="mine")
        ids = await opened(house, token_ids=common_pb2.TokenIds(ids=[1, 2, 3]))
        turn = await opened(house, chat=chat("Hello"))
    assert prompt_ids(raw) == codec.encode("Hello <|im_end|>")
    assert (raw.tenant, raw.request_id, dict(raw.labels), raw.messages) == ("default", "mine", {"a": "b"}, b"")
    assert not raw.HasField("generation_count")
    assert not raw.HasField("parent")
    assert prompt_ids(ids) == [1, 2, 3]
    assert len(ids.request_id) > 32
    assert chat_pb2.ChatInput.FromString(turn.messages) == chat("Hello")
    shown = codec.vocabulary.decode_with_special(prompt_ids(turn))
    assert shown == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    async with house_of(codecs["llama3"]) as house:
        begun = await opened(house, prompt="Hello")
    assert codecs["llama3"].vocabulary.decode_with_special(prompt_ids(begun)) == "<|begin_of_text|>Hello"


async def test_a_prompt_of_which_nothing_is_left_or_too_much_is_there(codec: Codec) -> None:
    async with house_of(codec) as house:
        limit = codec.facts.context_length
        fits = await opened(house, token_ids=common_pb2.TokenIds(ids=[1] * (limit - 1)))
        assert len(prompt_ids(fits)) == limit - 1
        error = await error_of(house.stream(token_ids=common_pb2.TokenIds(ids=[1] * limit)))
        assert isinstance(error, ContextLengthExceeded)
        assert error.metadata == {"prompt_tokens": str(limit), "context_length": str(limit)}
        long = await error_of(house.stream(prompt="word " * 100_000))
        assert isinstance(long, ContextLengthExceeded)
        assert isinstance(await error_of(house.stream(prompt="")), InvalidRequest)
        assert isinstance(await error_of(house.stream(expected_position=1)), PositionMismatch)
        assert prompt_ids(await opened(house, prompt="a", expected_position=0)) == codec.encode("a")


async def test_the_models_own_refusals(codecs: Mapping[str, Codec]) -> None:
    async with house_of(codecs["gemma"]) as house:
        error = await error_of(house.stream(chat=chat("a", "b")))
        assert isinstance(error, TemplateFailed)
        assert error.violations[0].field == "generation.chat"
        assert "alternate" in error.violations[0].description
    plain = Codec(codecs["chatml"]._tokenizer, codecs["chatml"].facts)
    async with house_of(plain) as house:
        error = await error_of(house.stream(chat=chat("a")))
        assert isinstance(error, NoChatTemplate)
        assert error.metadata == {"model": plain.facts.name}


# --- turns -------------------------------------------------------------------------------------------------------


def encoded(codec: Codec, *said: tuple[str, str], answer: bool = True) -> list[int]:
    """Ids of a whole rendered conversation."""
    assert codec.template is not None
    messages = [{"role": role, "content": text} for role, text in said]
    return codec.encode_marked(codec.mark(codec.template.render(Conversation(messages))))


def turn_of(
    codec: Codec, index: int, texts: chat_pb2.ChatInput | None, ids: list[int], output: list[int], **more: object
) -> pb.Turn:
    parent = pb.Branch() if index == 0 else pb.Branch(generation_id=f"{SESSION}.{index - 1:016x}", **more)  # type: ignore[arg-type]
    return pb.Turn(
        generation_id=f"{SESSION}.{index:016x}",
        parent=parent,
        prompt_token_ids=pack_ids(ids),
        messages=texts.SerializeToString() if texts is not None else b"",
        output_token_ids=pack_ids(output),
    )


async def test_a_second_turn_keeps_the_first_ones_ids(codec: Codec) -> None:
    first = encoded(codec, ("user", "Hello"))
    (end,) = codec.facts.eos_token_ids
    # Not the ids that encoding the answer again would give.
    output = [*(token_id for letter in "I am fine" for token_id in codec.encode(letter)), end]
    async with house_of(codec) as house:
        house.log.turns = [turn_of(codec, 0, chat("Hello"), first, output)]
        request = await opened(house, session_id=SESSION, chat=chat("And you?"), expected_position=len(first + output))
    assert request.parent == pb.Branch(generation_id=GENERATION, choice=0, count=len(output))
    assert (request.generation_count, request.expected_position) == (1, len(first + output))
    added = codec.vocabulary.decode_with_special(prompt_ids(request))
    assert added == "\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
    whole = codec.vocabulary.decode_with_special([*first, *output, *prompt_ids(request)])
    assert whole == codec.vocabulary.decode_with_special(
        encoded(codec, ("user", "Hello"), ("assistant", "I am fine"), ("user", "And you?"))
    )
    assert chat_pb2.ChatInput.FromString(request.messages) == chat("And you?")


async def test_reasoning_that_the_template_drops_makes_a_branch(codec: Codec) -> None:
    first = encoded(codec, ("user", "Hello"))
    output = [*codec.encode("<think>\nhm\n</think>\n\nFine."), *codec.facts.eos_token_ids]
    async with house_of(codec) as house:
        house.log.turns = [turn_of(codec, 0, chat("Hello"), first, output)]
        request = await opened(house, session_id=SESSION, chat=chat("And you?"))
    assert request.parent == pb.Branch(generation_id=GENERATION, choice=0, count=0)
    expected = encoded(codec, ("user", "Hello"), ("assistant", "Fine."), ("user", "And you?"))
    assert [*first, *prompt_ids(request)] == expected


async def test_turns_that_are_replaced_are_told_again_in_the_new_one(codec: Codec) -> None:
    """The branch falls into the second turn's prompt: its messages would be lost with it."""
    (end,) = codec.facts.eos_token_ids
    first = encoded(codec, ("user", "Hello"))
    answer = [*codec.encode("Fine."), end]
    whole = encoded(codec, ("user", "Hello"), ("assistant", "Fine."), ("user", "Go"))
    second = [*whole[len(first) + len(answer) :], *codec.encode("<think>\n")]  # opened with a template that adds this
    async with house_of(codec) as house:
        house.log.turns = [
            turn_of(codec, 0, chat("Hello"), first, answer),
            turn_of(codec, 1, chat("Go"), second, [*codec.encode("hm\n</think>\n\nGone."), end], count=len(answer)),
        ]
        request = await opened(house, session_id=SESSION, chat=chat("Now?"))
    assert request.parent == pb.Branch(generation_id=GENERATION, choice=0, count=len(answer))
    texts = [
        part.text for message in chat_pb2.ChatInput.FromString(request.messages).messages for part in message.content
    ]
    # The template looks for "</think>" in what was said, as it was said.
    assert texts == ["Go", "hm\n</think>\n\nGone.", "Now?"]
    expected = encoded(
        codec,
        ("user", "Hello"),
        ("assistant", "Fine."),
        ("user", "Go"),
        ("assistant", "Gone."),
        ("user", "Now?"),
    )
    assert [*first, *answer, *prompt_ids(request)] == expected


async def test_what_was_cut_off_a_stop_is_not_part_of_the_conversation(codec: Codec) -> None:
    first = encoded(codec, ("user", "Hello"))
    turn = turn_of(codec, 0, chat("Hello"), first, codec.encode("Fine. STOP"))
    turn.cut_bytes = len(" STOP")
    async with house_of(codec) as house:
        house.log.turns = [turn]
        request = await opened(house, session_id=SESSION, chat=chat("And you?"))
    whole = [*first, *codec.encode("Fine. STOP")[: request.parent.count], *prompt_ids(request)]
    assert whole == encoded(codec, ("user", "Hello"), ("assistant", "Fine."), ("user", "And you?"))


async def test_the_last_answer_is_continued(codec: Codec) -> None:
    first = encoded(codec, ("user", "Hello"))
    output = codec.encode("I am")
    more = chat(continue_final_message=True)
    async with house_of(codec) as house:
        house.log.turns = [turn_of(codec, 0, chat("Hello"), first, output)]
        going_on = await opened(house, session_id=SESSION, chat=more)
        assert (going_on.parent.count, prompt_ids(going_on)) == (len(output), [])
        house.log.turns.append(turn_of(codec, 1, more, [], codec.encode(" fine"), count=len(output)))
        request = await opened(house, session_id=SESSION, chat=chat("Good."))
    added = codec.vocabulary.decode_with_special(prompt_ids(request))
    assert added == "<|im_end|>\n<|im_start|>user\nGood.<|im_end|>\n<|im_start|>assistant\n"


async def test_raw_input_is_appended_as_it_is_and_a_chat_can_follow(codecs: Mapping[str, Codec]) -> None:
    codec = codecs["llama3"]
    raw, output = codec.encode("Once upon", add_special=True), codec.encode(" a time")
    async with house_of(codec) as house:
        house.log.turns = [turn_of(codec, 0, None, raw, output)]
        end = pb.Branch(generation_id=GENERATION, choice=2, count=len(output))
        parent = public.ContinueFrom(generation_id=GENERATION, choice=2)
        text = await opened(house, session_id=SESSION, prompt=" there", continue_from=parent)
        ids = await opened(house, session_id=SESSION, token_ids=common_pb2.TokenIds(ids=[9]), continue_from=parent)
        talk = await opened(house, session_id=SESSION, chat=chat("Go on"), continue_from=parent)
    assert [text.parent, ids.parent, talk.parent] == [end] * 3
    assert prompt_ids(text) == codec.encode(" there")
    assert prompt_ids(ids) == [9]
    assert codec.vocabulary.decode_with_special(prompt_ids(talk)).startswith("<|start_header_id|>system")


async def test_positions_and_sessions_that_are_not_there(codec: Codec) -> None:
    first, output = encoded(codec, ("user", "Hello")), codec.encode("Fine.")
    async with house_of(codec) as house:
        house.log.turns = [turn_of(codec, 0, chat("Hello"), first, output)]
        error = await error_of(house.stream(session_id=SESSION, chat=chat("x"), expected_position=3))
        assert isinstance(error, PositionMismatch)
        assert error.metadata == {"position": str(len(first + output))}
        house.first.errors = [SessionNotFound("none", metadata={"session_id": SESSION})]
        assert isinstance(await error_of(house.stream(session_id=SESSION, chat=chat("x"))), SessionNotFound)
        house.first.errors = []
        house.log.turns[0].output_token_ids = pack_ids([5] * codec.facts.context_length)
        assert isinstance(await error_of(house.stream(session_id=SESSION, prompt="x")), ContextLengthExceeded)


async def test_a_retry_within_a_session_finds_its_own(codecs: Mapping[str, Codec]) -> None:
    """R14: on a retry the session holds the generation of the first attempt, and the template may refuse that."""
    codec = codecs["gemma"]
    first = encoded(codec, ("user", "Hello"))
    async with house_of(codec) as house:
        house.log.turns = [turn_of(codec, 0, chat("Hello"), first, codec.encode("Fine."))]
        fields = {"session_id": SESSION, "chat": chat("Go"), "request_id": "mine", "expected_position": len(first) + 3}
        house.log.turns[0].output_token_ids = pack_ids(codec.encode("Fine.")[:3])
        one = await Received().read(house.stream(**fields))  # type: ignore[arg-type]
        house.log.turns.append(turn_of(codec, 1, chat("Go"), [7], [8], count=3))
        again = await Received().read(house.stream(**fields))  # type: ignore[arg-type]
        assert one.started[0].generation_id == again.started[0].generation_id
        assert len(house.log.generations) == 1
        house.first.errors = [RequestIdReused("other body")]
        assert isinstance(await error_of(house.stream(prompt="x", request_id="mine")), RequestIdReused)
        fields["request_id"] = "another"
        assert isinstance(await error_of(house.stream(**fields)), PositionMismatch)  # type: ignore[arg-type]


async def test_what_the_orchestrator_refuses(codec: Codec) -> None:
    busy = SessionBusy("busy", metadata={"generation_id": GENERATION})
    async with house_of(codec, orchestrators=2) as house:
        for fake in house.orchestrators:
            fake.errors = [busy]
        error = await error_of(house.stream())
        assert isinstance(error, SessionBusy)
        assert error.metadata == {"generation_id": GENERATION}
        assert sum(fake.calls.count("Open") for fake in house.orchestrators) == 1
