"""Models of all families, made once for the tests of this room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from services.tokenizer.codec import Codec
from tests.unit.tokenizer.models import KINDS, write_model


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A folder of each family."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def codecs(model_folders: Mapping[str, Path]) -> Mapping[str, Codec]:
    """A codec of each family."""
    return {kind: Codec.load(folder) for kind, folder in model_folders.items()}


@pytest.fixture
def codec(codecs: Mapping[str, Codec]) -> Codec:
    """One of them."""
    return codecs["chatml"]
