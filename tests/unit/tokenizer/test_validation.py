"""Every rule for requests: what is refused, under which name, and that all violations are told at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import json_format

from fermata.v1 import chat_pb2, common_pb2, sampling_pb2
from fermata.v1 import generation_pb2 as public
from services.common.errors import (
    FermataError,
    GenerationNotFound,
    InvalidRequest,
    ModelNotFound,
    NotYetSupported,
    SessionNotFound,
)
from services.tokenizer import validation
from services.tokenizer.codec import ModelFacts, SamplingDefaults

FACTS = ModelFacts("tiny", 1000, 512, (2,), SamplingDefaults(), "")
SESSION = "a2" * 13
GENERATION = f"{SESSION}.0123456789abcdef"
NAN, INFINITY = math.nan, math.inf
USER = {"role": "ROLE_USER", "content": [{"text": "hi"}]}


def request_of(**fields: Any) -> public.GenerationRequest:
    if not {"chat", "prompt", "token_ids"} & fields.keys():
        fields["prompt"] = "hi"
    return json_format.ParseDict(
        {key: value for key, value in fields.items() if value is not None}, public.GenerationRequest()
    )


def fields_of(request: public.GenerationRequest) -> list[str]:
    with pytest.raises(InvalidRequest) as failure:
        validation.check_generation(request, FACTS)
    return [violation.field for violation in failure.value.violations]


def sampling(**values: Any) -> public.GenerationRequest:
    return public.GenerationRequest(prompt="hi", sampling=sampling_pb2.SamplingParams(**values))


GOOD: list[dict[str, Any]] = [
    {},
    {"model": "tiny"},
    {"chat": {"messages": [USER] * 256}},
    {"chat": {"messages": [USER], "template_arguments": {"enable_thinking": False, "x": [1, {"y": None}]}}},
    {"chat": {"continue_final_message": True}, "session_id": SESSION},
    {"token_ids": {"ids": [0, 999]}},
    {"n": 8, "priority": -100, "time_limit": "0.001s", "user": "u" * 128, "request_id": "ü" * 64},
    {"session_id": SESSION, "continue_from": {"generation_id": GENERATION, "choice": 7}},
    {"labels": {f"{index}": "v" * 256 for index in range(16)}},
    {"sampling": {"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 100, "presence_penalty": -100}},
    {"sampling": {"temperature": 100, "top_k": 4294967295, "top_p": 1e-6, "min_p": 1, "seed": 2**64 - 1}},
    {"sampling": {"logit_bias": {str(index): 100 for index in range(1000)}, "bad_words": ["x" * 256] * 64}},
    {"sampling": {"allowed_token_ids": {"ids": [999]}}},
    {"stop": {"max_tokens": 1, "min_tokens": 1, "strings": ["ü" * 128] * 16, "token_ids": [999] * 64}},
    {"stop": {"max_tokens": 4294967295, "min_tokens": 4294967295}},
    {"output": {"top_logprobs": 20}, "durability": "DURABILITY_COMMITTED"},
]


@pytest.mark.parametrize("fields", GOOD)
def test_what_is_allowed(fields: dict[str, Any]) -> None:
    validation.check_generation(request_of(**fields), FACTS)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "generation.prompt"),
    ({"chat": {}}, "generation.chat.messages"),
    ({"chat": {"continue_final_message": True}}, "generation.chat.messages"),
    ({"chat": {"messages": [USER] * 257}}, "generation.chat.messages"),
    ({"chat": {"messages": [USER, {"content": []}]}}, "generation.chat.messages[1].role"),
    ({"chat": {"messages": [{"role": 5}]}}, "generation.chat.messages[0].role"),
    ({"chat": {"messages": [{"role": 1, "content": [{"text": "a"}, {}]}]}}, "generation.chat.messages[0].content[1]"),
    (
        {"chat": {"messages": [USER], "template_arguments": {"messages": []}}},
        "generation.chat.template_arguments.messages",
    ),
    ({"chat": {"messages": [USER], "template_arguments": {"_x": 1}}}, "generation.chat.template_arguments._x"),
    ({"chat": {"messages": [USER], "template_arguments": {"a b": 1}}}, "generation.chat.template_arguments.a b"),
    ({"token_ids": {}}, "generation.token_ids.ids"),
    ({"token_ids": {"ids": [1, 1000]}}, "generation.token_ids.ids[1]"),
    ({"token_ids": {"ids": [2**32 - 1]}}, "generation.token_ids.ids[0]"),
    ({"n": 0}, "generation.n"),
    ({"n": 9}, "generation.n"),
    ({"n": 2**31}, "generation.n"),
    ({"priority": 101}, "generation.priority"),
    ({"priority": -101}, "generation.priority"),
    ({"time_limit": "0s"}, "generation.time_limit"),
    ({"time_limit": "-1s"}, "generation.time_limit"),
    ({"time_limit": "0.0009s"}, "generation.time_limit"),
    ({"time_limit": "100000000s"}, "generation.time_limit"),
    ({"user": "ü" * 65}, "generation.user"),
    ({"request_id": "x" * 129}, "generation.request_id"),
    ({"durability": 7}, "generation.durability"),
    ({"labels": {f"{index}": "" for index in range(17)}}, "generation.labels"),
    ({"labels": {"": "x"}}, "generation.labels[]"),
    ({"labels": {"k": "x" * 257}}, "generation.labels[k]"),
    ({"continue_from": {"generation_id": GENERATION}}, "generation.continue_from.generation_id"),
    (
        {"session_id": "b" * 26, "continue_from": {"generation_id": GENERATION}},
        "generation.continue_from.generation_id",
    ),
    (
        {"session_id": SESSION, "continue_from": {"generation_id": GENERATION, "choice": 8}},
        "generation.continue_from.choice",
    ),
    ({"sampling": {"allowed_token_ids": {}}}, "generation.sampling.allowed_token_ids.ids"),
    ({"sampling": {"allowed_token_ids": {"ids": [1000]}}}, "generation.sampling.allowed_token_ids.ids[0]"),
    ({"sampling": {"logit_bias": {"1000": 1}}}, "generation.sampling.logit_bias[1000]"),
    ({"sampling": {"logit_bias": {"1": 101}}}, "generation.sampling.logit_bias[1]"),
    ({"sampling": {"logit_bias": {str(index): 1 for index in range(1025)}}}, "generation.sampling.logit_bias"),
    ({"sampling": {"bad_words": ["a", ""]}}, "generation.sampling.bad_words[1]"),
    ({"sampling": {"bad_words": ["a"] * 65}}, "generation.sampling.bad_words"),
    ({"stop": {"max_tokens": 0}}, "generation.stop.max_tokens"),
    ({"stop": {"max_tokens": 3, "min_tokens": 4}}, "generation.stop.min_tokens"),
    ({"stop": {"min_tokens": 513}}, "generation.stop.min_tokens"),
    ({"stop": {"strings": [""]}}, "generation.stop.strings[0]"),
    ({"stop": {"strings": ["ü" * 129]}}, "generation.stop.strings[0]"),
    ({"stop": {"strings": ["x"] * 17}}, "generation.stop.strings"),
    ({"stop": {"token_ids": [5, 1000]}}, "generation.stop.token_ids[1]"),
    ({"stop": {"token_ids": [5] * 65}}, "generation.stop.token_ids"),
    ({"output": {"top_logprobs": 21}}, "generation.output.top_logprobs"),
]


@pytest.mark.parametrize(("fields", "path"), BAD)
def test_what_is_refused_and_where(fields: dict[str, Any], path: str) -> None:
    assert fields_of(request_of(**fields)) == [path]


@pytest.mark.parametrize("name", [rule.name for rule in validation.SAMPLING_RANGES])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, -100.5, 100.5])
def test_numbers_out_of_range_or_no_numbers(name: str, value: float) -> None:
    assert fields_of(sampling(**{name: value})) == [f"generation.sampling.{name}"]


@pytest.mark.parametrize("name", ["top_p", "repetition_penalty"])
def test_open_ends_of_ranges(name: str) -> None:
    assert fields_of(sampling(**{name: 0.0})) == [f"generation.sampling.{name}"]
    validation.check_generation(sampling(**{name: 1e-9}), FACTS)


def test_a_bias_that_is_no_number() -> None:
    assert fields_of(sampling(logit_bias={3: NAN})) == ["generation.sampling.logit_bias[3]"]


def test_numbers_in_json_that_are_none() -> None:
    chat = chat_pb2.ChatInput(messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER)])
    chat.tools.add().update({"a": [{"b": INFINITY}]})
    chat.template_arguments.update({"x": NAN})
    paths = fields_of(public.GenerationRequest(chat=chat))
    assert paths == ["generation.chat.tools[0]", "generation.chat.template_arguments"]


def test_no_input_at_all() -> None:
    assert fields_of(public.GenerationRequest()) == ["generation.input"]


def test_all_violations_are_told_at_once_but_not_more_than_fit() -> None:
    request = request_of(prompt="", n=9, sampling={"top_p": 2, "bad_words": [""]}, stop={"strings": ["", "x", ""]})
    assert fields_of(request) == [
        "generation.prompt",
        "generation.sampling.top_p",
        "generation.sampling.bad_words[0]",
        "generation.stop.strings[0]",
        "generation.stop.strings[2]",
        "generation.n",
    ]
    many = sampling(logit_bias=dict.fromkeys(range(1000, 2024), 1.0))
    assert len(fields_of(many)) == validation.MAX_REPORTED


ELSE: list[tuple[dict[str, Any], type[FermataError]]] = [
    ({"model": "huge"}, ModelNotFound),
    ({"model": "huge", "n": 9}, ModelNotFound),
    ({"output": {"prompt_logprobs": True}}, NotYetSupported),
    ({"output": {"stages": True}}, NotYetSupported),
    ({"session_id": "x"}, SessionNotFound),
    ({"session_id": SESSION.upper()}, SessionNotFound),
    ({"session_id": SESSION, "continue_from": {"generation_id": "nonsense"}}, GenerationNotFound),
    ({"session_id": SESSION, "continue_from": {"generation_id": f"{SESSION}.xyz"}}, GenerationNotFound),
]


@pytest.mark.parametrize(("fields", "kind"), ELSE)
def test_other_refusals(fields: dict[str, Any], kind: type[FermataError]) -> None:
    with pytest.raises(kind) as failure:
        validation.check_generation(request_of(**fields), FACTS)
    assert type(failure.value) is kind


NAMES: list[tuple[dict[str, str], type[FermataError] | None]] = [
    ({"generation_id": GENERATION}, None),
    ({"generation_id": GENERATION, "session_id": SESSION}, None),
    ({"request_id": "r"}, None),
    ({"request_id": "r", "session_id": SESSION}, None),
    ({}, InvalidRequest),
    ({"request_id": ""}, InvalidRequest),
    ({"request_id": "x" * 129}, InvalidRequest),
    ({"generation_id": GENERATION, "session_id": "b" * 26}, InvalidRequest),
    ({"generation_id": ""}, GenerationNotFound),
    ({"generation_id": GENERATION[:-1]}, GenerationNotFound),
    ({"generation_id": f"{GENERATION}\n"}, GenerationNotFound),
    ({"request_id": "r", "session_id": "x"}, SessionNotFound),
]


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_names_of_generations(name: dict[str, str], kind: type[FermataError] | None) -> None:
    message = public.GenerationName(**name)  # type: ignore[arg-type]
    if kind is None:
        validation.check_name(message)
        return
    with pytest.raises(kind):
        validation.check_name(message)


def cursor(choice: int = 0, count: int = 3, running_hash: bytes = b"12345678") -> common_pb2.Cursor:
    return common_pb2.Cursor(choice=choice, count=count, running_hash=running_hash)


def tail(choice: int = 0, first_offset: int = 1, ids: tuple[int, ...] = (5, 6)) -> common_pb2.Tail:
    return common_pb2.Tail(choice=choice, first_offset=first_offset, token_ids=ids)


RESUMES: list[tuple[list[common_pb2.Cursor], list[common_pb2.Tail], list[str]]] = [
    ([], [], []),
    ([cursor()], [tail()], []),
    ([cursor(running_hash=b"")], [tail(first_offset=3, ids=())], []),
    ([cursor(choice=8)], [], ["cursors[0].choice"]),
    ([cursor(), cursor()], [], ["cursors[1].choice"]),
    ([cursor(running_hash=b"1")], [], ["cursors[0].running_hash"]),
    ([cursor(choice=index) for index in range(8)] + [cursor()], [], ["cursors"]),
    ([], [tail()], ["tails[0].choice", "tails[0].token_ids"]),
    ([cursor()], [tail(), tail()], ["tails[1].choice"]),
    ([cursor()], [tail(ids=(5,))], ["tails[0].token_ids"]),
    ([cursor()], [tail(ids=(5, 1000))], ["tails[0].token_ids[1]"]),
    ([cursor()], [tail(first_offset=2**32 - 1)], ["tails[0].token_ids"]),
]


@pytest.mark.parametrize(("cursors", "tails", "paths"), RESUMES)
def test_where_readers_go_on(cursors: list[common_pb2.Cursor], tails: list[common_pb2.Tail], paths: list[str]) -> None:
    name = public.GenerationName(generation_id=GENERATION)
    request = public.ResumeRequest(generation=name, cursors=cursors, tails=tails)
    if not paths:
        validation.check_resume(request, FACTS)
        return
    with pytest.raises(InvalidRequest) as failure:
        validation.check_resume(request, FACTS)
    assert [violation.field for violation in failure.value.violations] == paths


def test_pages() -> None:
    assert [validation.check_page_size(size) for size in (0, 1, 1000)] == [50, 1, 1000]
    for size in (-1, 1001):
        with pytest.raises(InvalidRequest):
            validation.check_page_size(size)
