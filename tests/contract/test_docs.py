"""What the documents say is so: their examples run, the errors are explained, the tables are those of the contract.

That every service, call, message, field and enum value has a comment is checked by `buf lint` (`make check`).
"""

from __future__ import annotations

import asyncio
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from fermata.v1 import errors_pb2
from fermata.v1 import generation_pb2 as pb
from tests.contract.raw_reader import RawReader
from tests.pipeline.house import House

ROOT = Path(__file__).resolve().parents[2]
RESUME = ROOT / "clients" / "RESUME.md"
DOCUMENTS = [
    ROOT / "clients" / "python" / "README.md",
    ROOT / "clients" / "python" / "fermata" / "__init__.py",
    ROOT / "README.md",
]

pytestmark = pytest.mark.timeout(60)


def examples(document: Path) -> Iterator[str]:
    """The Python examples: fenced blocks of a page, indented blocks of a module's docstring."""
    text = document.read_text()
    if document.suffix == ".md":
        yield from re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    else:
        docstring = text.split('"""')[1]
        for block in re.findall(r"(?:^    .*\n|^\n)+", docstring, re.MULTILINE):
            if block.strip():
                yield textwrap.dedent(block)


ALL_EXAMPLES = [
    pytest.param(example, id=f"{document.relative_to(ROOT)} {number}")
    for document in DOCUMENTS
    for number, example in enumerate(examples(document), 1)
]


def test_every_document_has_examples() -> None:
    for document in DOCUMENTS:
        assert list(examples(document)), document


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("example", ALL_EXAMPLES)
async def test_examples_run(built_in_house: House, example: str) -> None:
    runner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contract.run_example", built_in_house.address),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    printed, complaints = await runner.communicate(example.encode())
    assert (runner.returncode, complaints.decode()) == (0, ""), example
    assert bool(printed.strip()) == ("print(" in example)


def test_every_reason_is_explained() -> None:
    """To readers in any language, or by the class that the Python client raises."""
    said = RESUME.read_text() + (ROOT / "clients" / "python" / "fermata" / "errors.py").read_text()
    words = set(re.findall(r"\b[A-Z_]+\b", said))
    reasons = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert reasons - words == set()


def test_reasons_on_the_page_exist() -> None:
    """What the table of the protocol quotes is a reason of the contract."""
    quoted = set(re.findall(r"^\| .*\|$", RESUME.read_text(), re.MULTILINE))
    names = {name for row in quoted for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}
    assert names
    assert {f"ERROR_REASON_{name}" for name in names} <= set(errors_pb2.ErrorReason.keys())


def test_the_example_of_the_protocol_can_be_read() -> None:
    """Its lines are messages of the contract, and a reader by the page gets from them what it says."""
    page = RESUME.read_text()
    example = page[page.index("## An example") :].replace(",\n" + " " * 15, ", ")
    reader = RawReader("", request=pb.GenerationRequest(prompt="Once"))
    asked: list[Message] = []
    for mark, what, text in re.findall(r"^    ([→←✗]) (?:(\w+)(?:  |, ErrorInfo ))?(\{.*\})$", example, re.MULTILINE):
        if mark == "←":
            reader.take(json_format.Parse(text, pb.ResumeResponse()).event)
        elif mark == "✗":
            info = json_format.Parse(text, error_details_pb2.ErrorInfo())
            assert (what, info.domain, info.reason) == ("FAILED_PRECONDITION", "fermata", "NEED_FROM")
            reader.need_from(info)
        elif what == "Resume":
            asked.append(json_format.Parse(text, pb.ResumeRequest()))
            assert asked[-1] == reader.resume_request()
        else:
            asked.append(json_format.Parse(text, pb.StreamGenerateRequest()))
    assert [type(request) for request in asked] == [pb.StreamGenerateRequest, pb.ResumeRequest, pb.ResumeRequest]
    assert reader.complete
    assert f'The text is "{reader.choices[0].text}"' in page
    assert reader.choices[0].count == 4
