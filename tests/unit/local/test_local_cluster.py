"""What is deployed on Ray Serve, and in which environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from services.app import DEPLOYMENTS, application
from services.config import SystemConfig, TokenizerConfig
from services.local import cluster

INFRA = Path(__file__).resolve().parents[3] / "infra"


def schema(environment: dict[str, str] | None = None, **settings: Any) -> dict[str, Any]:
    return cluster.schema(SystemConfig(**settings), 7433, "unix:///x.sock", Path("/logs"), environment or {})


def arguments(environment: dict[str, str] | None = None, **settings: Any) -> dict[str, Any]:
    told: dict[str, Any] = schema(environment, **settings)["applications"][0]["args"]
    return told


def test_every_service_is_a_deployment_of_as_many_replicas_as_asked_for() -> None:
    deployments = schema(replicas=("tokenizer=2", "shard=3"))["applications"][0]["deployments"]
    counts = {item["name"]: item["num_replicas"] for item in deployments}
    assert counts == {"Tokenizer": 2, "Orchestrator": 1, "Shard": 3}
    assert cluster.DEPLOYMENTS == DEPLOYMENTS


def test_settings_come_from_the_environment_and_the_system_knows_better() -> None:
    told = arguments(
        {"FERMATA_BLOCK_SIZE": "32", "FERMATA_PUBLIC_PORT": "1", "FERMATA_REDIS_URL": "no"}, threads=2, dtype="int8"
    )
    assert told["shard"]["block_size"] == 32
    assert (told["shard"]["threads"], told["shard"]["dtype"]) == (2, "int8")
    assert told["tokenizer"]["public_port"] == 7433
    assert told["orchestrator"]["redis_url"] == "unix:///x.sock"
    assert not {"port", "ready_fd", "shards"} & {*told["orchestrator"], *told["shard"]}


def test_the_application_takes_what_is_planned() -> None:
    assert application(arguments(model="/m")) is not None


def test_the_file_in_infra_says_what_up_deploys() -> None:
    """The same deployments and the same settings of Serve; of the services' settings some, all of which exist."""
    file, planned = yaml.safe_load((INFRA / "serve.yaml").read_text()), schema()
    assert {name: value for name, value in file.items() if name != "applications"} == {
        name: value for name, value in planned.items() if name != "applications"
    }
    (there,), (here,) = file["applications"], planned["applications"]
    assert {**there, "args": None} == {**here, "args": None}
    for service, settings in there["args"].items():
        assert settings.keys() <= here["args"][service].keys()
    assert there["args"]["tokenizer"]["public_port"] == TokenizerConfig().public_port


def test_a_cluster_has_a_token_of_its_own_and_is_nobody_elses() -> None:
    inherited = {"PATH": "/bin", "RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "known", "FERMATA_FAILPOINTS": "x=y"}
    one, other = (cluster.environment_of(inherited, testing=False) for _ in range(2))
    assert one["PATH"] == "/bin"
    assert "RAY_ADDRESS" not in one
    assert len({one["RAY_AUTH_TOKEN"], other["RAY_AUTH_TOKEN"], "known"}) == 3


def test_the_head_listens_where_it_is_told() -> None:
    program = cluster.head_program((11, 12, 13), Path("/tmp/ray"), {})
    options = {"--port=11", "--ray-client-server-port=12", "--metrics-export-port=13", "--temp-dir=/tmp/ray", "--block"}
    assert options <= set(program.command)
    assert program.address == "127.0.0.1:11"
