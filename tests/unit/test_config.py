"""Settings: where they come from and which are refused."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.config import (
    OrchestratorConfig,
    ShardConfig,
    SystemConfig,
    TokenizerConfig,
    load,
    to_arguments,
)

KINDS = (ShardConfig, OrchestratorConfig, TokenizerConfig, SystemConfig)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flag_before_environment_before_file_before_default(folder: Path) -> None:
    def window(*arguments: str, **environment: str) -> int:
        return load(OrchestratorConfig, arguments, environment=environment)[0].window

    assert window() == 32
    (folder / "fermata.toml").write_text('window = 5\nmodel = "/m"\n')
    assert window() == 5
    assert window(FERMATA_WINDOW="6") == 6
    assert window("--window", "7", FERMATA_WINDOW="6") == 7


def test_the_session_store_may_come_from_the_usual_variable(folder: Path) -> None:
    def url(*arguments: str, **environment: str) -> str:
        return load(SystemConfig, arguments, environment=environment)[0].redis_url

    assert url() == ""
    assert url(REDIS_URL="redis://a") == "redis://a"
    (folder / "fermata.toml").write_text('redis_url = "redis://b"\n')
    assert url(REDIS_URL="redis://a") == "redis://b"
    assert url(REDIS_URL="redis://a", FERMATA_REDIS_URL="redis://c") == "redis://c"
    assert url("--redis-url=redis://d", REDIS_URL="redis://a", FERMATA_REDIS_URL="redis://c") == "redis://d"
    assert url("--redis-url=", REDIS_URL="redis://a") == "", "a flag can ask for the embedded one"


def test_values_of_all_types(folder: Path) -> None:
    config, _ = load(
        OrchestratorConfig,
        ["--shards", " a:1, b:2,", "--park-after=0.5", "--testing"],
        environment={"FERMATA_SESSION_TTL": "60"},
    )
    assert config.shards == ("a:1", "b:2")
    assert (config.park_after, config.session_ttl, config.testing) == (0.5, 60.0, True)
    (folder / "fermata.toml").write_text('shards = ["c:3"]\ntesting = true\npark_after = 1\n')
    config, _ = load(OrchestratorConfig, ["--no-testing"], environment={})
    assert (config.shards, config.park_after, config.testing) == (("c:3",), 1.0, False)


@pytest.mark.parametrize("text", ["1", "true", "Yes"])
def test_truth_in_the_environment(text: str) -> None:
    assert load(ShardConfig, [], environment={"FERMATA_TESTING": text})[0].testing
    assert not load(ShardConfig, [], environment={"FERMATA_TESTING": "no"})[0].testing


@pytest.mark.parametrize(
    ("kind", "arguments", "environment", "reason"),
    [
        (ShardConfig, ["--threads=many"], {}, "threads"),
        (ShardConfig, [], {"FERMATA_TESTING": "perhaps"}, "'perhaps' is not a truth value"),
        (ShardConfig, ["--thread=1"], {}, "unrecognized arguments"),
        (SystemConfig, ["--replicas=tokenizer=2,proxy=1"], {}, "'proxy=1': want SERVICE=COUNT"),
        (SystemConfig, [], {"FERMATA_REPLICAS": "shard=0"}, "'shard=0': want SERVICE=COUNT"),
        (SystemConfig, ["--replicas=shard"], {}, "'shard': want SERVICE=COUNT"),
        (SystemConfig, ["--replicas=shard=²"], {}, "want SERVICE=COUNT"),
    ],
)
def test_what_does_not_parse_is_a_usage_error(
    kind: type[object],
    arguments: list[str],
    environment: dict[str, str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        load(kind, arguments, environment=environment)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("text", "reason"), [("window = \n", "Invalid value"), ("windows = 3\n", "named windows")])
def test_a_file_that_means_nothing_is_a_usage_error(
    text: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fermata.toml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        load(ShardConfig, [], environment={})
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "fermata.toml: " in error
    assert reason in error


def test_replicas() -> None:
    assert SystemConfig().replica_counts() == {"shard": 1, "orchestrator": 1, "tokenizer": 1}
    config = SystemConfig(replicas=("tokenizer=2", " shard = 3 "))
    assert config.replica_counts() == {"shard": 3, "orchestrator": 1, "tokenizer": 2}


def test_further_arguments_are_handed_back() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detach", action="store_true")
    config, options = load(SystemConfig, ["--detach", "--port=0"], environment={}, parser=parser)
    assert options.detach
    assert config.port == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_says_what_it_is(kind: type[object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(kind, ["--help"], environment={})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        assert item.metadata["help"]
        assert f"--{item.name.replace('_', '-')}" in text


_words = st.text(st.characters(codec="utf-8", exclude_characters="\0,"), min_size=1)
_names = _words.map(str.strip).filter(bool)


@given(
    model=_words,
    host=_words,
    port=st.integers(),
    shards=st.lists(_names).map(tuple),
    park_after=st.floats(allow_nan=False),
    testing=st.booleans(),
)
def test_a_child_gets_the_very_same_settings(
    *, model: str, host: str, port: int, shards: tuple[str, ...], park_after: float, testing: bool
) -> None:
    config = OrchestratorConfig(
        model=model, host=host, port=port, shards=shards, park_after=park_after, testing=testing
    )
    assert load(OrchestratorConfig, to_arguments(config), environment={"FERMATA_PORT": "7"})[0] == config


@pytest.mark.parametrize("kind", [ShardConfig, SystemConfig])
def test_what_shards_compute_with_is_checked(kind: type[ShardConfig | SystemConfig]) -> None:
    for dtype, device in (("int8", "cpu"), ("auto", "cuda"), ("bfloat16", "cuda:1")):
        assert load(kind, ["--dtype", dtype, "--device", device], environment={})[0].dtype == dtype
    for wrong in ({"dtype": "float16"}, {"device": "gpu"}, {"device": "cuda:"}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"^{name}: "):
            kind(**wrong)  # type: ignore[arg-type]
