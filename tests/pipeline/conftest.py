"""One house for the tests of a module; each test finds it whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.common import failpoints
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
