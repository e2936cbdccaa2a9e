"""Prometheus finds the processes that live."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from services.common.targets import announce_target
from services.common.telemetry import Telemetry, TelemetrySettings


def test_the_files_of_the_dead_are_removed_and_all_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (f"shard-{gone.pid}.json", f"shard-{os.getppid()}.json", "by-hand.json"):
        (folder / name).write_text("[]")
    file = announce_target(folder, "shard", "127.0.0.1:9")
    assert {item.name for item in folder.iterdir()} == {
        f"shard-{os.getpid()}.json",
        f"shard-{os.getppid()}.json",
        "by-hand.json",
    }
    labels = {"service": "shard", "instance": "127.0.0.1:9"}
    assert json.loads(file.read_text()) == [{"targets": ["127.0.0.1:9"], "labels": labels}]


def test_a_process_announces_the_port_that_it_took(tmp_path: Path) -> None:
    telemetry = Telemetry("shard", TelemetrySettings(metrics_port=0, metrics_targets=str(tmp_path)))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())[0]["targets"] == [f"127.0.0.1:{telemetry.metrics_port}"]
    telemetry.close()
    assert not list(tmp_path.iterdir())
