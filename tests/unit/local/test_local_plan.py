"""Which programs run and what each is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from services.config import OrchestratorConfig, ServiceConfig, ShardConfig, SystemConfig, TokenizerConfig, load
from services.local.keeper import Program
from services.local.plan import Addresses, service_programs

ADDRESSES = Addresses(
    public=7433, shards=[11, 12], orchestrators=[21, 22], tokenizers=[31, 32, 33, 34, 35], redis_url="unix:///x.sock"
)
SHARDS, ORCHESTRATORS = ("127.0.0.1:11", "127.0.0.1:12"), ("127.0.0.1:21", "127.0.0.1:22")

Config = TypeVar("Config", bound=ServiceConfig)


def planned(environment: Mapping[str, str] | None = None, **settings: object) -> list[Program]:
    return service_programs(SystemConfig(**settings), ADDRESSES, environment or {})  # type: ignore[arg-type]


def settings_of(programs: list[Program], service: str, kind: type[Config]) -> list[Config]:
    """What the programs themselves will read from their command lines, whatever their environment says."""
    misleading = {"FERMATA_PORT": "1", "FERMATA_HOST": "nowhere", "FERMATA_THREADS": "7", "FERMATA_MODEL": "wrong"}
    mine = [program for program in programs if program.service == service]
    assert [program.index for program in mine] == list(range(len(mine)))
    return [load(kind, program.command[4:], environment=misleading)[0] for program in mine]


def test_each_is_told_of_those_behind_it() -> None:
    programs = planned(model="/m", host="0.0.0.0", threads=2, dtype="int8", device="cuda:1")
    shards = settings_of(programs, "shard", ShardConfig)
    assert shards == [ShardConfig(model="/m", port=port, threads=2, dtype="int8", device="cuda:1") for port in (11, 12)]
    orchestrators = settings_of(programs, "orchestrator", OrchestratorConfig)
    assert orchestrators == [
        OrchestratorConfig(model="/m", port=port, shards=SHARDS, redis_url="unix:///x.sock") for port in (21, 22)
    ]
    tokenizers = settings_of(programs, "tokenizer", TokenizerConfig)
    assert [item.port for item in tokenizers] == ADDRESSES.tokenizers
    assert {(item.model, item.host, item.public_port, item.orchestrators) for item in tokenizers} == {
        ("/m", "0.0.0.0", 7433, ORCHESTRATORS)
    }


def test_only_tokenizers_listen_where_the_public_is() -> None:
    """Until safety is there, nothing inside listens beyond this machine (R19)."""
    addresses = [program.address for program in planned(host="0.0.0.0")]
    assert addresses[:4] == [*SHARDS, *ORCHESTRATORS]
    assert addresses[4:] == [f"0.0.0.0:{port}" for port in ADDRESSES.tokenizers]


@pytest.mark.parametrize(("host", "environment"), [("a", {}), ("0.0.0.0", {"FERMATA_ADVERTISED_HOST": "a"})])
def test_a_tokenizer_tells_of_at_most_three_others(host: str, environment: dict[str, str]) -> None:
    """R18."""
    tokenizers = settings_of(planned(environment, host=host), "tokenizer", TokenizerConfig)
    assert tokenizers[0].endpoints == ("a:32", "a:33", "a:34")
    assert tokenizers[3].endpoints == ("a:35", "a:31", "a:32")
    assert all(f"a:{item.port}" not in item.endpoints for item in tokenizers)


def test_settings_of_a_service_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fermata.toml").write_text("step_tokens = 128\nwindow = 8\n")
    programs = planned({"FERMATA_STEP_TOKENS": "256"})
    assert settings_of(programs, "shard", ShardConfig)[0].step_tokens == 256
    assert settings_of(programs, "orchestrator", OrchestratorConfig)[0].window == 8


def test_a_wrong_setting_of_a_service_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        planned({"FERMATA_STEP_TOKENS": "many"})
    assert "step_tokens" in capsys.readouterr().err


def test_failpoints_are_for_the_first_life_of_a_system_under_test() -> None:
    environment = {"FERMATA_FAILPOINTS": "x:kill@3", "FERMATA_PLANT": "bug", "PATH": "/bin"}
    ordinary = planned(environment)[0]
    assert ordinary.environment == ordinary.restart_environment == {"PATH": "/bin"}
    tested = planned(environment, testing=True)[0]
    assert tested.environment == environment
    assert tested.restart_environment == {"PATH": "/bin", "FERMATA_PLANT": "bug"}


def test_a_folder_named_services_in_the_working_directory_does_not_matter() -> None:
    assert planned()[0].command[1:4] == ["-P", "-m", "services.shard"]
