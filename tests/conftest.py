"""What tests of several folders share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.random_model import write_serving_model


def pytest_configure() -> None:
    """Lets Ctrl-C mean something: a shell ignores it for what it starts in the background, and that is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that can be served and chatted with."""
    return write_serving_model(tmp_path_factory.mktemp("models") / "random")
