"""Scheduler under load for long: everything ends right, the books balance after every step, and nothing piles up.

A seeded sample. `make soak` runs ten thousand choices (`FERMATA_SOAK_CHOICES`).
"""

from __future__ import annotations

import os

from tests.unit.shard.soak import Soak

CHOICES = int(os.environ.get("FERMATA_SOAK_CHOICES", "400"))

SEEN = {
    "ends": 0.5,
    "cancels": 0.03,
    "forks": 0.1,
    "copied blocks": 0.05,
    "take-overs": 0.03,
    "lost links": 0.001,
    "preemptions": 0.05,
    "prefix hits": 1.0,
}
"""What must have happened at least, per choice."""


def test_everything_ends_right_and_nothing_piles_up() -> None:
    report = Soak(CHOICES, seed=1).run()
    print(f"{CHOICES} choices in {report.steps} steps: {dict(report.events)}; memory blocks {report.allocated}")
    assert {name: report.events[name] for name in SEEN if report.events[name] < SEEN[name] * CHOICES} == {}
    assert report.retained == 0
    early, late = max(report.allocated[1:5]), max(report.allocated[5:])
    assert late <= early + 2000, "memory that grows with the choices that were"
