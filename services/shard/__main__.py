"""`python -m services.shard --model FOLDER --port 0 --ready-fd N`: a shard as a plain process."""

from __future__ import annotations

import asyncio
import logging
import sys

from services.common import failpoints, logs, process
from services.config import ShardConfig, load, process_environment
from services.shard.serving import serve

log = logging.getLogger("services.shard")


async def run(config: ShardConfig) -> None:
    """Serves until a signal."""
    await serve(config, process.SignalHost(config.ready_fd))


def main() -> int:
    """Reads the settings and serves. Returns the exit status."""
    config, _ = load(ShardConfig)
    logs.configure_logging("shard", json=config.log_format == "json")
    try:
        failpoints.configure(process_environment(), testing=config.testing)
        asyncio.run(run(config))
    except (OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
