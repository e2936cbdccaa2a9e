"""The application: which deployments there are, what each hosts, and how Serve keeps them.

    serve run infra/serve.yaml

The arguments of the application are the settings of the services, by service, as in `infra/serve.yaml`; numbers of
replicas, resources and all else that Serve decides are the file's `deployments`. Knows what each service needs to find,
and nothing of what it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from services.config import OrchestratorConfig, ShardConfig, TokenizerConfig, from_mapping
from services.replica import Replica

APPLICATION = "fermata"
DEPLOYMENTS = {"shard": "Shard", "orchestrator": "Orchestrator", "tokenizer": "Tokenizer"}
"""Name of each service's deployment."""
GRACE = 13.0
"""Seconds that a replica has to drain: the 10 of every service, and what an exit takes."""


def application(arguments: Mapping[str, Any]) -> Application:
    """Builds the application.

    Args:
        arguments: `shard`, `orchestrator`, `tokenizer`: settings of each service; `logs`: folder for their logs.

    Raises:
        ValueError: a setting does not exist or does not parse.
    """
    if unknown := arguments.keys() - {*DEPLOYMENTS, "logs"}:
        raise ValueError(f"no arguments are named {', '.join(sorted(unknown))}")
    logs = str(arguments.get("logs", ""))
    shards = _deployment("shard").bind("shard", from_mapping(ShardConfig, arguments.get("shard", {})), logs)
    orchestrators = _deployment("orchestrator").bind(
        "orchestrator", from_mapping(OrchestratorConfig, arguments.get("orchestrator", {})), logs, shards=shards
    )
    return _deployment("tokenizer").bind(
        "tokenizer", from_mapping(TokenizerConfig, arguments.get("tokenizer", {})), logs, orchestrators=orchestrators
    )


def _deployment(service: str) -> serve.Deployment:
    """What all deployments have in common; the configuration file may say otherwise."""
    return serve.deployment(
        name=DEPLOYMENTS[service],
        num_replicas=1,
        max_ongoing_requests=1000,  # nothing is routed but the look-up of a directory
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=GRACE,
        request_router_config=RequestRouterConfig(
            request_router_class="services.replica:DirectoryRouter",  # type: ignore[arg-type]  # typed wrong
        ),
    )(Replica)
