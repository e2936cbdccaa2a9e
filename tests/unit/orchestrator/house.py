"""What the tests of the orchestrator's calls share: a house of real parts, and the calls in a line each."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc import aio

from fermata.running_hash import hash_ids
from fermata.v1 import common_pb2
from services.common import rpc
from services.common.errors import FermataError
from services.orchestrator.v1 import orchestrator_pb2 as pb
from tests.unit.orchestrator.fake_shard import FakeShard, expected_output
from tests.unit.orchestrator.system import CONTEXT, SEED, Orchestrator, Reading, Starter, open_request
from tests.valkey import Valkey

EXPECTED = expected_output(CONTEXT, SEED, 400)


class House:
    """A Valkey, a fake shard, and orchestrators."""

    def __init__(self, folder: Path, valkey: Valkey, shard: FakeShard, starter: Starter) -> None:
        self.folder, self.valkey, self.shard, self.starter = folder, valkey, shard, starter

    async def orchestrator(self, *more_shards: FakeShard, **settings: float) -> Orchestrator:
        addresses = [shard.address for shard in (self.shard, *more_shards)]
        return await self.starter.start(self.folder, self.valkey.url, addresses, **settings)


async def open_generation(orchestrator: Orchestrator, **changes: object) -> pb.Name:
    opened = await orchestrator.stub.Open(open_request(**changes))
    return pb.Name(tenant="default", generation_id=opened.generation_id)


async def read_all(orchestrator: Orchestrator, name: pb.Name, choices: int = 1) -> Reading:
    return await (await Reading(orchestrator, name).start()).until(choices=choices)


async def failure(call: object) -> FermataError:
    """The error that a call ends with."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    error = rpc.from_call_error(caught.value)
    assert error is not None, caught.value
    return error


def cursor(count: int, ids: list[int] | None = None, choice: int = 0) -> common_pb2.Cursor:
    return common_pb2.Cursor(choice=choice, count=count, running_hash=hash_ids(ids[:count]) if ids else b"")
