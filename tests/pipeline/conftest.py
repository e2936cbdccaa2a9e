"""One house for the tests of a module; each test finds it whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.common import failpoints
from services.config import BUILT_IN_MODEL
from tests.pipeline.house import House


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_house(tmp_path_factory: pytest.TempPathFactory, random_model_folder: Path) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("store")
    async with House(folder, model=str(random_model_folder), settings={"park_after": 0.5}) as house:
        yield house


@pytest_asyncio.fixture(loop_scope="module")
async def house(shared_house: House) -> AsyncIterator[House]:
    yield shared_house
    failpoints.configure({}, testing=False)
    await shared_house.repair()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built_in_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """A house whose model ends its answers by itself, and whose text is encoded as it was generated."""
    async with House(tmp_path_factory.mktemp("store"), model=BUILT_IN_MODEL) as house:
        yield house
