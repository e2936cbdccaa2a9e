"""The outer end of a measured engine: its process, and the two things that are asked of it.

Knows the lines of `worker.py`; neither what an engine is asked for nor what the times mean.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

from tests.bench.peers import prepare
from tests.bench.peers.registry import Engine

START_SECONDS = 900.0
"""Some engines compile the model first."""
ANSWER_SECONDS = 600.0


class EngineFailed(Exception):
    """A worker ended or did not answer; the message says where its log is."""


class HostedEngine:
    """A worker, starting from the constructor on.

    Attributes:
        engine: which one.
        pid: of its process, which leads a session of its own.
        version: of its package, once it is ready.
    """

    def __init__(
        self, engine: Engine, precision: str, *, model: Path, vocabulary_size: int, threads: int, logs: Path
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.engine = engine
        self.version = ""
        self._log = logs / f"{engine.name}-{precision}.log"
        command = [str(engine.programs / "python"), "-m", f"tests.bench.peers.{engine.module}", str(model), precision]
        command += ["--threads", str(threads), "--vocabulary-size", str(vocabulary_size)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=prepare.ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
                text=True,
            )
        self.pid = self._process.pid

    def wait_until_ready(self) -> None:
        """Waits until the model is loaded.

        Raises:
            EngineFailed: it cannot be.
        """
        self.version = str(self._answer(START_SECONDS)["version"])

    def generate(self, *, batch: int, prompt: int, tokens: int, seed: int) -> tuple[float, list[list[int]]]:
        """Generates greedily for so many random prompts of so many tokens.

        Returns:
            Seconds, and the first ids of each sequence.

        Raises:
            EngineFailed: it did not.
        """
        request = {"batch": batch, "prompt": prompt, "seed": seed, "tokens": tokens}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineFailed(f"{self.engine.name} has ended, see {self._log}") from error
        answer = self._answer(ANSWER_SECONDS)
        return answer["seconds"], answer["token_ids"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line; there is never more than one on its way."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise EngineFailed(f"{self.engine.name} {'has ended' if ready else 'does not answer'}, see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer
