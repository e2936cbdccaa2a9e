"""What the documents of the clients say is so."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from fermata import AsyncClient, Client, Options, errors
from fermata.resume import DIAL_TIMEOUT, FIRST_BACKOFF, GIVE_UP_AFTER, LONGEST_BACKOFF, SILENCE, Recovery
from fermata.running_hash import hash_ids

CLIENTS = Path(__file__).resolve().parents[3] / "clients"
PROTOCOL = (CLIENTS / "RESUME.md").read_text()
README = (CLIENTS / "python" / "README.md").read_text()


def test_running_hashes_of_the_protocol() -> None:
    (ids,) = re.findall(r"After the ids ([\d, ]+) in turn", PROTOCOL)
    token_ids = [int(token_id) for token_id in ids.split(",")]
    expected = [hash_ids(token_ids[: count + 1]).hex() for count in range(len(token_ids))]
    assert "  ".join(expected) in PROTOCOL


def test_example_of_the_protocol() -> None:
    seen: list[int] = []
    pattern = r'"first_offset": (\d+), "token_ids": \[(\d+)\], "text": "[^"]*", "running_hash": "([^"]*)"'
    for offset, token_id, running_hash in re.findall(pattern, PROTOCOL):
        assert int(offset) == len(seen)
        seen.append(int(token_id))
        assert base64.b64decode(running_hash) == hash_ids(seen)
    assert len(seen) == 4
    assert f'"count": 4, "running_hash": "{base64.b64encode(hash_ids(seen)).decode()}"' in PROTOCOL


def test_times_of_the_protocol() -> None:
    assert (SILENCE, DIAL_TIMEOUT, FIRST_BACKOFF, LONGEST_BACKOFF, GIVE_UP_AFTER) == (3.0, 1.0, 0.05, 1.0, 60.0)
    for sentence in ("no message for 3 s", "1 s to be made", "after 50 ms, doubling up to 1 s", "Give up after 60 s"):
        assert sentence in " ".join(PROTOCOL.split())


@pytest.mark.parametrize("reason", sorted(errors.BY_REASON))
def test_table_of_the_protocol_is_what_the_library_does(reason: str) -> None:
    """Every reason: the table says what to do, or leaves it to its last row."""
    table = PROTOCOL[PROTOCOL.index("| what | what to do |") : PROTOCOL.index('"Try again" is')]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    actions = [action.strip() for what, action in rows if f"`{reason}`" in what]
    action = actions[0] if actions else "give up"
    index = next((index for index, (what, _) in enumerate(rows) if f"`{reason}`" in what), -1)
    while action.startswith("the same"):
        index -= 1
        action = rows[index][1].strip()
    try:
        Recovery().remedy(errors.BY_REASON[reason]("x"), started=True, now=0.0)
    except errors.FermataError:
        assert action.startswith("give up")
    else:
        assert action.startswith(("try again", "see above", "the link is dead"))


def test_readme_names_what_there_is() -> None:
    for client in (Client, AsyncClient):
        for method in set(re.findall(r"client\.(\w+)\(", README)):
            assert hasattr(client, method)
    for option in re.findall(r"(\w+)=", re.sub(r"\w+ = .*\.resume.*|end=|flush=|timeout=", "", README)):
        assert option in Options.__annotations__
    for name in re.findall(r"(\w+\.py)", README):
        assert (CLIENTS / "python" / "fermata" / name).exists()
