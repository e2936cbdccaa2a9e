"""`python -m services.tokenizer`: one tokenizer as a plain process."""

from __future__ import annotations

import asyncio
import sys

from services.common import failpoints, logs, process
from services.common.directory import StaticDirectory
from services.config import TokenizerConfig, load, process_environment
from services.tokenizer.serving import serve


async def run(config: TokenizerConfig) -> None:
    """Serves until a signal."""
    host = process.SignalHost(config.ready_fd)
    await serve(config, host, StaticDirectory(config.orchestrators), StaticDirectory(config.endpoints))


def main() -> int:
    """Runs the process; returns its exit status."""
    config, _ = load(TokenizerConfig)
    failpoints.configure(process_environment(), testing=config.testing)
    logs.configure_logging("tokenizer", json=config.log_format == "json")
    try:
        asyncio.run(run(config))
    except (OSError, ValueError) as error:
        print(f"tokenizer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
