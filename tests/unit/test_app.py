"""The application: three deployments that know each other's directories, and settings that exist."""

from __future__ import annotations

from typing import Any

import pytest

from services.app import DEPLOYMENTS, application


def test_the_tokenizer_is_in_front_and_reaches_the_others() -> None:
    tokenizer: Any = application({"tokenizer": {"public_port": 7433}})._bound_deployment
    orchestrator = tokenizer.init_kwargs["orchestrators"]._bound_deployment
    shard = orchestrator.init_kwargs["shards"]._bound_deployment
    assert [item.name for item in (shard, orchestrator, tokenizer)] == list(DEPLOYMENTS.values())
    assert tokenizer.init_args[1].public_port == 7433


@pytest.mark.parametrize("arguments", [{"router": {}}, {"shard": {"speed": 3}}, {"shard": {"threads": "many"}}])
def test_a_setting_that_does_not_exist_is_refused(arguments: dict[str, dict[str, object]]) -> None:
    with pytest.raises(ValueError, match=r"."):
        application(arguments)
