"""Prints conversations of the corpus as JSON lines, to be looked at or measured with.

python -m infra.models.tiny.corpus --count 10                           # what is trained on
python -m infra.models.tiny.corpus --count 200 --held-out > held.jsonl  # what is not; `fermata drift held.jsonl`
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import islice

from infra.models.tiny.corpus import conversations


def main(arguments: list[str] | None = None) -> None:
    """Prints as many conversations as are asked for."""
    parser = argparse.ArgumentParser(description="Prints conversations of the corpus as JSON lines.")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="of the part that is never trained on")
    options = parser.parse_args(arguments)
    stream = conversations.held_out if options.held_out else conversations.training
    with_turns = (item for item in stream(options.seed) if item.messages[0].role != "text")
    for conversation in islice(with_turns, options.count):
        print(json.dumps({"messages": [asdict(message) for message in conversation.messages]}))


if __name__ == "__main__":
    main()
