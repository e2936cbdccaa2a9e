"""A service that does nothing but what the supervisor sees: listens where it is told, says so, and ends at SIGTERM.

Its first line of log is its command line as JSON. `FAKE_FAILS=shard` makes shards end before they are ready,
`FAKE_STUBBORN=shard` makes them ignore SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys

MODULES = dict.fromkeys(("shard", "orchestrator", "tokenizer"), "fake_service")


def accepts(address: str) -> bool:
    """Whether somebody listens on HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Listens as a gRPC server does."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        server.bind((host, port))
        server.listen()
    except OSError:
        server.close()
        raise
    return server


def kind(options: argparse.Namespace, others: list[str]) -> str:
    """Which service it stands for, by what it is told."""
    if options.public_port is not None:
        return "tokenizer"
    return "orchestrator" if any(flag.startswith("--shards=") for flag in others) else "shard"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--public-port", type=int)
    options, others = parser.parse_known_args()
    service = kind(options, others)
    print(json.dumps({**vars(options), "flags": others, "environment": dict(os.environ)}), file=sys.stderr, flush=True)
    if os.environ.get("FAKE_FAILS") == service:
        sys.exit("cannot load the model")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("FAKE_STUBBORN") == service else signal.SIG_DFL)
    listening = [listen(options.host, options.port)]
    ports = [options.port]
    if options.public_port is not None:
        listening.append(listen(options.host, options.public_port, shared=True))
        ports.insert(0, options.public_port)
    with os.fdopen(options.ready_fd, "w") as pipe:
        pipe.write(" ".join(map(str, ports)) + "\n")
    while True:  # whoever connects is hung up on
        for server in select.select(listening, [], [])[0]:
            server.accept()[0].close()


if __name__ == "__main__":
    main()
