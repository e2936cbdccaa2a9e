"""Runs one example of a document as a program of its own: `python -m tests.contract.run_example ADDRESS < EXAMPLE`.

The example may await at its top level, as in a notebook, and may use what a document has introduced before it: a
`client`, and a generation that was read in part. A stream that it leaves in `stream` is read to its end.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from typing import Any

from fermata import Client, Stream
from fermata.dialing import DEFAULT_SERVER


def run(source: str, address: str) -> None:
    """Runs the example against the server at `address` instead of the one that it names.

    Raises:
        Exception: whatever the example raises.
    """
    with Client(address) as client:
        begun = client.generate("Once upon a time", max_tokens=8, ignore_eos=True)
        names: dict[str, Any] = {
            "client": client,
            "generation_id": begun.generation_id,
            "ids_seen_so_far": list(begun.choices[0].token_ids[:4]),
        }
        source = source.replace(DEFAULT_SERVER, address)
        code = compile(source, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.iscoroutine(result):
            asyncio.run(_finish(result))
        stream = names.get("stream")
        if isinstance(stream, Stream) and not stream.complete:
            assert list(stream)
            assert stream.complete


async def _finish(coroutine: Any) -> None:
    await coroutine


if __name__ == "__main__":
    run(sys.stdin.read(), sys.argv[1])
