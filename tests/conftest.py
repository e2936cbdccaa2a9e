"""What tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.random_model import write_serving_model


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that can be served and chatted with."""
    return write_serving_model(tmp_path_factory.mktemp("models") / "random")
