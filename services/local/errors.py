"""What can keep a system from starting or being reached, each with a message for the person at the terminal.

LocalError
├── StateDirectoryBusy    another `up` runs in the state directory
├── PortTaken             somebody listens on the public port
├── NoSessionStore        no Valkey and no Redis server was found
├── StartFailed           a process ended before it was ready, twice
├── Interrupted           a signal came while the system was starting
├── NothingRuns           there is no system to work on
└── RestartFailed         replicas were not replaced
"""

from __future__ import annotations


class LocalError(Exception):
    """Base of all; its text is one sentence, or one with the end of a log behind it."""


class StateDirectoryBusy(LocalError):
    """Another `up` runs in the state directory."""


class PortTaken(LocalError):
    """The public port cannot be bound."""


class NoSessionStore(LocalError):
    """No server binary for the embedded session store."""


class StartFailed(LocalError):
    """A process cannot start."""


class Interrupted(LocalError):
    """The start was called off."""


class NothingRuns(LocalError):
    """No system runs in the state directory."""


class RestartFailed(LocalError):
    """Replicas were not replaced in time."""
