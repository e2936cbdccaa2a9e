"""What tests of several folders share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.random_model import write_serving_model


def pytest_configure() -> None:
    """Lets Ctrl-C and a closed terminal mean something: a shell and nohup ignore them for what they start, and that is
    inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that can be served and chatted with."""
    return write_serving_model(tmp_path_factory.mktemp("models") / "random")
