"""Tells Prometheus where this process can be read: a file per process, as `file_sd_configs` takes them.

A process that is killed leaves its file behind; whoever comes next removes what is left of the dead. Knows files and
processes of this machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def announce_target(folder: Path, service: str, address: str) -> Path:
    """Writes the file of this process, and removes those of processes that are gone.

    Args:
        folder: made when it is not there.
        service: tokenizer, orchestrator or shard.
        address: HOST:PORT where the metrics are.

    Returns:
        The file; to be removed at the end.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.glob("*-*.json"):
        pid = other.stem.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            other.unlink(missing_ok=True)
    file = folder / f"{service}-{os.getpid()}.json"
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps([{"targets": [address], "labels": {"service": service, "instance": address}}]))
    fresh.replace(file)
    return file
