"""Settings of every service, and the only reader of the environment.

Each service has one frozen dataclass; each field is a flag (`--step-tokens 256`), an environment variable
(`FERMATA_STEP_TOKENS=256`) and a key of `fermata.toml` (`step_tokens = 256`), in this order of precedence. Values that
are discovered (ports that were bound, the number of KV blocks) are not settings and live elsewhere.
Few options on purpose: what has one right value is a constant where it is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from services.common.telemetry import TelemetrySettings

BUILT_IN_MODEL = str(Path(__file__).resolve().parent.parent / "infra" / "models" / "tiny")
ENVIRONMENT_PREFIX = "FERMATA_"
CONFIGURATION_FILE = "fermata.toml"
_OF_OTHERS = {"redis_url": "REDIS_URL", "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}
"""Variables that other tools of the field read, too."""
DTYPES = ("auto", "float32", "bfloat16", "int8")
KERNELS = ("auto", "native", "plain")
REPLICATED_SERVICES = ("shard", "orchestrator", "tokenizer")


def setting(default: Any, description: str) -> Any:
    """A dataclass field whose description becomes the help text of its flag."""
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What every service has."""

    model: str = setting(BUILT_IN_MODEL, "folder of the model, or its name on the hub")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(0, "port to listen on; 0 takes a free one")
    ready_fd: int = setting(-1, "file descriptor that is told the bound port when the service is ready")
    testing: bool = setting(False, "allow failpoints and planted bugs")
    otlp_endpoint: str = setting(
        "", "collector of spans and metrics (OTLP over gRPC), http://HOST:PORT; empty has none"
    )
    metrics_host: str = setting("127.0.0.1", "address of the Prometheus endpoint")
    metrics_port: int = setting(0, "port of the Prometheus endpoint; 0 takes a free one, -1 has none")
    metrics_targets: str = setting("", "folder in which the process says where, for file_sd_configs of Prometheus")
    trace_memory: int = setting(32 << 20, "bytes of spans that are remembered for `fermata trace`")
    trace_share: float = setting(1.0, "share of the requests whose spans the collector gets, 0 to 1")
    waterfall_share: float = setting(0.01, "share of these that have a span for each token")
    slow_token: float = setting(0.25, "seconds between two tokens from which on all have theirs")
    slow_first_token: float = setting(2.0, "seconds to the first token from which on all have theirs")
    log_format: str = setting("text", "text, or json for one object per line")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            ValueError: says which setting.
        """
        if self.log_format not in ("text", "json"):
            raise ValueError(f"log_format: {self.log_format!r} is neither text nor json")
        for name in ("trace_share", "waterfall_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig(ServiceConfig):
    """A model with its KV cache."""

    block_size: int = setting(64, "tokens per KV block, which is also the page of attention")
    step_tokens: int = setting(512, "most tokens computed in a step")
    step_sequences: int = setting(64, "most sequences in a step")
    step_time: float = setting(
        50.0,
        "milliseconds of a step that prompts may take beside running sequences, whose tokens are at most this, a step "
        "without prompts, and the time of 16 prompt tokens apart; 0 sets no limit",
    )
    kv_memory: int = setting(0, "bytes of the KV pool; 0 takes 25 %% of the free memory, at most 1 GiB")
    threads: int = setting(0, "compute threads; 0 takes one for a small model, else one per core")
    dtype: str = setting("auto", "auto (as stored), float32, bfloat16 or int8")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    kernels: str = setting("auto", "auto (native where they can be had), native or plain")
    prefix_cache: bool = setting(True, "find the KV of equal prefixes again")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            ValueError: says which setting.
        """
        ServiceConfig.__post_init__(self)
        _check_compute(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorConfig(ServiceConfig):
    """The owner of generations."""

    shards: tuple[str, ...] = setting((), "addresses of the shards, HOST:PORT separated by commas")
    redis_url: str = setting("", "session store; redis:// or unix://")
    window: int = setting(32, "tokens that a shard may run ahead; renewed at half")
    park_after: float = setting(2.0, "seconds without a reader after which a generation is parked")
    session_ttl: float = setting(3600.0, "seconds that an unused session is kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig(ServiceConfig):
    """The public face."""

    orchestrators: tuple[str, ...] = setting((), "addresses of the orchestrators, HOST:PORT separated by commas")
    public_port: int = setting(7433, "port that all tokenizers of a node share; 0 takes a free one")
    advertised_host: str = setting("", "host that clients are told; empty takes the one that is listened on")
    endpoints: tuple[str, ...] = setting((), "further public addresses that clients are told")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """The whole system on one machine, as `fermata-server up` runs it."""

    model: str = setting(BUILT_IN_MODEL, "folder of the model, or its name on the hub")
    host: str = setting("127.0.0.1", "public address to listen on")
    port: int = setting(7433, "public port; 0 takes a free one")
    state_dir: str = setting(".fermata", "folder of logs, sockets and the embedded session store")
    redis_url: str = setting("", "session store to use instead of the embedded one")
    replicas: tuple[str, ...] = setting((), "replicas per service, like tokenizer=2,shard=2")
    testing: bool = setting(False, "allow failpoints and planted bugs")
    threads: int = setting(0, "compute threads of each shard; 0 takes one for a small model, else one per core")
    dtype: str = setting("auto", "what shards compute in: auto (as stored), float32, bfloat16 or int8")
    device: str = setting("cpu", "what shards compute on: cpu, cuda or cuda:N")
    kernels: str = setting("auto", "what shards compute with: auto (native where they can be had), native or plain")
    local: bool = setting(False, "run the services as plain processes, without Ray")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, replicas that do not parse among it.

        Raises:
            ValueError: says which setting.
        """
        _check_compute(self)
        self.replica_counts()

    def replica_counts(self) -> dict[str, int]:
        """Replicas of every service, 1 where the setting says nothing."""
        counts = dict.fromkeys(REPLICATED_SERVICES, 1)
        for entry in self.replicas:
            service, _, count = (part.strip() for part in entry.partition("="))
            if service not in counts or not count.isdecimal() or int(count) < 1:
                raise ValueError(f"replicas: {entry!r}: want SERVICE=COUNT with {', '.join(counts)} and at least 1")
            counts[service] = int(count)
        return counts


def _check_compute(config: ShardConfig | SystemConfig) -> None:
    for name, accepted in (("dtype", DTYPES), ("kernels", KERNELS)):
        if getattr(config, name) not in accepted:
            raise ValueError(f"{name}: {getattr(config, name)!r} is none of {', '.join(accepted)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"device: {config.device!r} is neither cpu nor cuda nor cuda:N")


Config = TypeVar("Config")


def load(
    kind: type[Config],
    arguments: Sequence[str] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    parser: argparse.ArgumentParser | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Builds a configuration: flag > environment > `fermata.toml` in the working directory > default.

    Args:
        kind: one of the dataclasses above.
        arguments: command line without the program; None takes the process's own.
        environment: None takes the process's own.
        parser: a parser that may have further arguments; they are in the returned namespace.

    Returns:
        The configuration and the parsed command line.

    Raises:
        SystemExit: a value does not parse (status 2, with the reason on standard error).
    """
    environment = os.environ if environment is None else environment
    parser = parser or argparse.ArgumentParser(allow_abbrev=False)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    types = typing.get_type_hints(kind)
    for item in fields:
        name = item.name.replace("_", "-")
        if types[item.name] is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=item.metadata["help"])
        else:
            parser.add_argument(f"--{name}", help=f"{item.metadata['help']} (default: {item.default})")
    namespace = parser.parse_args(arguments)
    try:
        from_file = _read_file(Path(CONFIGURATION_FILE))
    except ValueError as error:
        parser.error(f"{CONFIGURATION_FILE}: {error}")
    values: dict[str, Any] = {}
    for item in fields:
        variable = ENVIRONMENT_PREFIX + item.name.upper()
        candidates = [getattr(namespace, item.name), environment.get(variable), from_file.get(item.name)]
        if item.name in _OF_OTHERS:
            candidates.append(environment.get(_OF_OTHERS[item.name]))
        given = next((value for value in candidates if value is not None), None)
        if given is not None:
            try:
                values[item.name] = _convert(given, types[item.name])
            except ValueError as error:
                parser.error(f"{item.name}: {error}")
    try:
        return kind(**values), namespace
    except ValueError as error:
        parser.error(str(error))


def from_mapping(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a configuration from named values alone, as a configuration file of another program has them.

    Raises:
        ValueError: no setting has such a name, or a value does not parse.
    """
    types = typing.get_type_hints(kind)
    if unknown := values.keys() - {item.name for item in dataclasses.fields(kind)}:  # type: ignore[arg-type]
        raise ValueError(f"no setting is named {', '.join(sorted(unknown))}")
    return kind(**{name: _convert(value, types[name]) for name, value in values.items()})


def to_arguments(config: Any) -> list[str]:
    """Inverse of `load`: the flags that give a child process this configuration."""
    arguments = []
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), item.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={','.join(value) if isinstance(value, tuple) else value}")
    return arguments


def telemetry_settings(config: ServiceConfig) -> TelemetrySettings:
    """What a service's settings say of its telemetry."""
    return TelemetrySettings(
        otlp_endpoint=config.otlp_endpoint,
        metrics_host=config.metrics_host,
        metrics_port=config.metrics_port,
        metrics_targets=config.metrics_targets,
        recorded_bytes=config.trace_memory,
        trace_share=config.trace_share,
        waterfall_share=config.waterfall_share,
        slow_token=config.slow_token,
        slow_first_token=config.slow_first_token,
    )


def process_environment() -> Mapping[str, str]:
    """The environment, for the few who hand it on (failpoints, child processes)."""
    return os.environ


def _read_file(path: Path) -> dict[str, Any]:
    """The file's settings; a name that no service has is a mistake, not a wish for the default."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        values = tomllib.load(file)
    kinds = (ShardConfig, OrchestratorConfig, TokenizerConfig, SystemConfig)
    if unknown := values.keys() - {item.name for kind in kinds for item in dataclasses.fields(kind)}:
        raise ValueError(f"no setting is named {', '.join(sorted(unknown))}")
    return values


def _convert(given: Any, kind: type | UnionType) -> Any:
    """Turns text (or a TOML value) into a field's type."""
    if kind is bool:
        if isinstance(given, str):
            if given.lower() not in ("0", "1", "true", "false", "yes", "no"):
                raise ValueError(f"{given!r} is not a truth value")
            return given.lower() in ("1", "true", "yes")
        return bool(given)
    if kind in (int, float, str):
        return kind(given)  # type: ignore[operator]
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return tuple(given)
