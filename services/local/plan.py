"""The plan of a system on one machine: which programs run, where each listens, and whom it is told of.

Decides and starts nothing. The settings of a service come from the same environment and file as if it were started by
hand; the plan sets what only the whole system knows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from services.config import OrchestratorConfig, ServiceConfig, ShardConfig, SystemConfig, TokenizerConfig, load
from services.config import to_arguments as to_flags
from services.local import valkey
from services.local.keeper import Probe, Program, ReadyPipe

STORE, SHARD, ORCHESTRATOR, TOKENIZER = "valkey", "shard", "orchestrator", "tokenizer"
HEAD, DEPLOYER = "ray", "serve"
TIERS = (STORE, HEAD, DEPLOYER, SHARD, ORCHESTRATOR, TOKENIZER)
"""All that runs; each needs those before it. Plain processes need no Ray, and Ray keeps the services by itself."""
MODULES: Mapping[str, str] = {service: f"services.{service}" for service in (SHARD, ORCHESTRATOR, TOKENIZER)}
"""The Python module of each service."""

INSIDE_HOST = "127.0.0.1"
_FAILPOINTS, _PLANT = "FERMATA_FAILPOINTS", "FERMATA_PLANT"
_MOST_ENDPOINTS = 3  # further addresses that a tokenizer tells its clients (R18)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where everything listens, known before anything has started.

    Attributes:
        public: port that all tokenizers share.
        shards, orchestrators: ports of the replicas.
        tokenizers: the ports that the replicas have of their own (R18).
        redis_url: the session store.
    """

    public: int
    shards: Sequence[int]
    orchestrators: Sequence[int]
    tokenizers: Sequence[int]
    redis_url: str


def store_program(server: Path, socket_path: Path, store: Path, environment: Mapping[str, str]) -> Program:
    """The embedded session store."""
    return Program(
        service=STORE,
        index=0,
        address=valkey.url(socket_path),
        command=valkey.command(server, socket_path, store),
        environment=environment,
        restart_environment=environment,
        readiness=lambda: Probe(lambda: valkey.answers(socket_path)),
    )


def service_programs(
    config: SystemConfig,
    addresses: Addresses,
    environment: Mapping[str, str],
    modules: Mapping[str, str] = MODULES,
) -> list[Program]:
    """The services.

    Args:
        config: settings of the system.
        addresses: where the services shall listen.
        environment: of this process; the services' settings are read from it and it is handed on.
        modules: name of each service's Python module.

    Raises:
        SystemExit: a setting of a service does not parse.
    """
    settings = {
        SHARD: shard_settings(config, addresses, environment),
        ORCHESTRATOR: orchestrator_settings(config, addresses, environment),
        TOKENIZER: tokenizer_settings(config, addresses, environment),
    }
    first, later = child_environments(environment, testing=config.testing)
    return [
        Program(
            service=service,
            index=index,
            address=f"{item.host}:{item.port}",
            # -P: the working directory may hold a folder `services` of somebody else.
            command=[sys.executable, "-P", "-m", modules[service], *to_flags(item)],
            environment=first,
            restart_environment=later,
            readiness=_ReadyLine(f"{addresses.public} {item.port}" if service == TOKENIZER else str(item.port)),
        )
        for service, replicas in settings.items()
        for index, item in enumerate(replicas)
    ]


def shard_settings(
    config: SystemConfig, addresses: Addresses, environment: Mapping[str, str]
) -> Sequence[ServiceConfig]:
    """One per shard."""
    common = replace(
        load(ShardConfig, [], environment=environment)[0],
        model=config.model,
        host=INSIDE_HOST,
        threads=config.threads,
        dtype=config.dtype,
        device=config.device,
        kernels=config.kernels,
        testing=config.testing,
    )
    return [replace(common, port=port) for port in addresses.shards]


def orchestrator_settings(
    config: SystemConfig, addresses: Addresses, environment: Mapping[str, str]
) -> Sequence[ServiceConfig]:
    """One per orchestrator; each is told of all shards."""
    common = replace(
        load(OrchestratorConfig, [], environment=environment)[0],
        model=config.model,
        host=INSIDE_HOST,
        shards=_joined(INSIDE_HOST, addresses.shards),
        redis_url=addresses.redis_url,
        testing=config.testing,
    )
    return [replace(common, port=port) for port in addresses.orchestrators]


def tokenizer_settings(
    config: SystemConfig, addresses: Addresses, environment: Mapping[str, str]
) -> Sequence[ServiceConfig]:
    """One per tokenizer; each is told of all orchestrators, and of the tokenizers beside it for its clients."""
    common = replace(
        load(TokenizerConfig, [], environment=environment)[0],
        model=config.model,
        host=config.host,
        public_port=addresses.public,
        orchestrators=_joined(INSIDE_HOST, addresses.orchestrators),
        testing=config.testing,
    )
    endpoints = _joined(common.advertised_host or config.host, addresses.tokenizers)
    return [
        replace(common, port=port, endpoints=(endpoints[index + 1 :] + endpoints[:index])[:_MOST_ENDPOINTS])
        for index, port in enumerate(addresses.tokenizers)
    ]


def child_environments(environment: Mapping[str, str], *, testing: bool) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The environment of a process's first start and of its later ones.

    Failpoints are for the first life: one that kills a process at its third token would kill every successor there,
    too. Planted bugs stay. Without `testing` neither is handed on.
    """
    harmless = {name: value for name, value in environment.items() if name not in (_FAILPOINTS, _PLANT)}
    if not testing:
        return harmless, harmless
    planted = {_PLANT: environment[_PLANT]} if _PLANT in environment else {}
    return dict(environment), harmless | planted


def _joined(host: str, ports: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{host}:{port}" for port in ports)


@dataclass(frozen=True, slots=True)
class _ReadyLine:
    """Makes the pipe of each start."""

    expected: str

    def __call__(self) -> ReadyPipe:
        return ReadyPipe(self.expected)
