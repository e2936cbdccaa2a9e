"""Exposure bias: how texts are read and encoded, how errors are counted and shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fermata import AsyncClient, cli
from fermata.aio_drift import encode
from fermata.drift import DriftComparison, DriftCurve, DriftIds, DriftText, missed, read_texts
from fermata.printing import Printer, drift_json, drift_rows, drift_summary
from fermata.v1 import chat_pb2, common_pb2, text_pb2
from tests.unit.clients.fake_server import FakeServer, Log

ASKED = {"role": "user", "content": "hello"}
ANSWERED = {"role": "assistant", "content": "hi"}
END, NEXT = 2, 7


def line(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


def test_what_was_not_said_is_missed() -> None:
    assert missed([5, 6, 7, 8], [5, 9, 7]) == (False, True, False, True)
    assert missed([5], [5, 6]) == (False,)
    assert missed([5], []) == (True,)


def test_the_curve_counts_each_offset_and_joins_ranges() -> None:
    long = DriftComparison((False,) * 4 + (True,) * 6, (False,) * 2 + (True,) * 8)
    short = DriftComparison((True, False), (True, True))
    curve = DriftCurve.of([long, short])
    assert [span.tokens for span in curve.offsets] == [2, 2, *[1] * 8]
    assert [(span.first, span.last, span.tokens) for span in curve.ranges()] == [
        (0, 0, 2),
        (1, 3, 4),
        (4, 7, 4),
        (8, 9, 2),
    ]
    assert [span.teacher_forced for span in curve.ranges()] == [0.5, 0.0, 1.0, 1.0]
    assert [span.free_running for span in curve.ranges()] == [0.5, 0.75, 1.0, 1.0]
    assert (curve.total.first, curve.total.last, curve.total.tokens, curve.texts) == (0, 9, 12, 2)
    assert curve.total.gap == pytest.approx(10 / 12 - 7 / 12)


def test_ranges_double() -> None:
    curve = DriftCurve.of([DriftComparison((False,) * 70, (False,) * 70)])
    assert [(span.first, span.last) for span in curve.ranges()] == [
        (0, 0), (1, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 69),
    ]  # fmt: skip


def test_a_curve_of_nothing_is_refused() -> None:
    for comparisons in ([], [DriftComparison((), ())]):
        with pytest.raises(ValueError, match="no token"):
            DriftCurve.of(comparisons)


def test_the_curve_is_shown_as_table_words_and_json() -> None:
    curve = DriftCurve.of(
        [DriftComparison((False, False), (False, True)), DriftComparison((True, False), (True, True))]
    )
    output = io.StringIO()
    Printer(output, io.StringIO()).table(("A", "B", "C", "", "D", "", "E"), drift_rows(curve))
    assert [row.split() for row in output.getvalue().splitlines()[1:]] == [
        ["0", "2", "50.0%", "█████", "50.0%", "█████", "+0.0%"],
        ["1", "2", "0.0%", "100.0%", "██████████", "+100.0%"],
    ]
    assert drift_summary(curve) == (
        "of 4 tokens in 2 texts the model misses 25.0% when it is given the text so far "
        "and 75.0% when it goes on from its own: a gap of +50.0%"
    )
    found = json.loads(drift_json(curve))
    assert (found["texts"], found["total"]["gap"]) == (2, 0.5)
    assert found["offsets"][1] == {
        "offset": 1, "tokens": 2, "teacher_forced_errors": 0, "free_running_errors": 2,
        "teacher_forced": 0.0, "free_running": 1.0, "gap": 1.0,
    }  # fmt: skip


def test_a_small_share_can_be_seen() -> None:
    (row,) = drift_rows(DriftCurve.of([DriftComparison((index == 0,), (False,)) for index in range(1000)]))
    assert (row[2].strip(), row[3], row[5]) == ("0.1%", "▏", "")


def test_progress_is_for_terminals() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for errors, shown in ((Terminal(), "\r1 of 2\r\x1b[K"), (io.StringIO(), "")):
        printer = Printer(io.StringIO(), errors)
        printer.progress(1, 2)
        printer.end_progress()
        assert errors.getvalue() == shown


def test_texts_are_read_from_lines() -> None:
    lines = [line(ASKED, ANSWERED), "\n", '{"prompt": "a", "completion": "b", "source": 1}', "not looked at"]
    assert read_texts(lines, limit=2) == [DriftText([ASKED], "hi"), DriftText("a", "b")]


BAD_LINES = {
    "line 1: it is not JSON": "{",
    "line 2: messages are needed, or prompt and completion as texts": "\n[]",
    "line 1: its prompt or its completion is empty": '{"prompt": "a", "completion": " "}',
    "line 2: messages must be two or more objects": line(ASKED, ANSWERED) + "\n" + line(ANSWERED),
    "line 1: messages must be": line(ASKED, {"role": "assistant", "content": None}),
    "line 1: role is one of": line({"role": "poet", "content": "x"}, ANSWERED),
    "line 1: a message has role and content": line(ASKED, {**ANSWERED, "colour": "red"}),
    "line 2: there is no reference": line(ASKED, ANSWERED) + "\n" + line(ASKED, ANSWERED, ASKED),
    "line 1: there is no reference": line(ASKED, {**ANSWERED, "content": ""}),
    "there is no text in it": "\n\n",
}


@pytest.mark.parametrize("said", BAD_LINES)
def test_bad_files_are_usage_errors(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(BAD_LINES[said])
    assert cli.main(["drift", str(path)]) == 2
    assert f"fermata: {path}: {said}" in capsys.readouterr().err


def test_other_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "missing.jsonl"
    assert cli.main(["drift", str(path)]) == 2
    assert f"{path}: No such file" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("no"))
    assert cli.main(["drift", "-"]) == 2
    assert "fermata: -: line 1: it is not JSON" in capsys.readouterr().err
    path.write_bytes(b"\xff\n")
    assert cli.main(["drift", str(path)]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    for arguments in ((), ("x", "--longest", "0"), ("x", "--limit", "0")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["drift", *arguments])


class TemplateServer(FakeServer):
    """A character is an id; `heads` opens an answer, in a prompt and as it is shown later; `end` closes one."""

    heads = ("A:", "A:")
    end = chr(END)

    async def ApplyChatTemplate(
        self, request: text_pb2.ApplyChatTemplateRequest, context: Any
    ) -> text_pb2.ApplyChatTemplateResponse:
        chat = request.chat
        text = ""
        for message in chat.messages:
            head = self.heads[1] if message.role == chat_pb2.ROLE_ASSISTANT else "U:"
            text += head + message.content[0].text + self.end + chr(NEXT)
        if chat.continue_final_message:
            text = text.removesuffix(self.end + chr(NEXT))
        else:
            text += self.heads[0]
        return text_pb2.ApplyChatTemplateResponse(token_ids=common_pb2.TokenIds(ids=map(ord, text)))

    async def Tokenize(self, request: text_pb2.TokenizeRequest, context: Any) -> text_pb2.TokenizeResponse:
        marked = "^" * request.add_special + request.text
        return text_pb2.TokenizeResponse(
            # "th" is one token, so a text that ends in t is not the beginning of one that goes on with h.
            tokens=[text_pb2.TokenPiece(token_id=ord(letter)) for letter in marked.replace("th", "T")]
        )


async def encoded(text: DriftText, **template: Any) -> tuple[str, str]:
    async with TemplateServer(Log.of("x")) as server, AsyncClient(server.address) as client:
        for name, value in template.items():
            setattr(server, name, value)
        ids = await encode(client, text, {END})
    assert isinstance(ids, DriftIds)
    return "".join(map(chr, ids.context)), "".join(map(chr, ids.reference))


async def test_a_reference_ends_as_the_template_ends_it() -> None:
    text = DriftText([ASKED], "hi")
    asked = f"U:hello{chr(END)}{chr(NEXT)}"
    assert await encoded(text) == (asked + "A:", f"hi{chr(END)}")
    # A template without an end token, and one that shows answers later otherwise than it opens them.
    assert await encoded(text, end="") == (f"U:hello{chr(NEXT)}A:", "hi")
    assert await encoded(text, heads=("A:?", "A:")) == (asked + "A:?", f"hi{chr(END)}")
    assert await encoded(text, heads=("A:?", "A:"), end="") == (f"U:hello{chr(NEXT)}A:?", "hi")


async def test_a_completion_follows_its_prompt() -> None:
    assert await encoded(DriftText("a", "th")) == ("^a", "T")
    assert await encoded(DriftText("t", "hth")) == ("^t", "hT")
