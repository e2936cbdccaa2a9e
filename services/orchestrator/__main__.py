"""`python -m services.orchestrator`: one orchestrator as a plain process."""

from __future__ import annotations

import asyncio
import sys

from services.common import failpoints, logs, process
from services.common.directory import StaticDirectory
from services.common.errors import SessionStoreUnavailable
from services.config import OrchestratorConfig, load, process_environment
from services.orchestrator.serving import serve


async def run(config: OrchestratorConfig) -> None:
    """Serves until a signal."""
    await serve(config, process.SignalHost(config.ready_fd), StaticDirectory(config.shards))


def main() -> int:
    """Runs the process; returns its exit status."""
    config, _ = load(OrchestratorConfig)
    failpoints.configure(process_environment(), testing=config.testing)
    logs.configure_logging("orchestrator", json=config.log_format == "json")
    status = 0
    try:
        asyncio.run(run(config))
    except* (OSError, ValueError, SessionStoreUnavailable) as group:
        print(f"orchestrator: {group.exceptions[0]}", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
