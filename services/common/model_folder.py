"""Where a model is: a local folder, or a snapshot of the hub's; and what identifies it there.

Every service that needs files of the model finds them here. Knows no weights and opens no tokenizer.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
"""No code and no pickles are downloaded."""


def find_model(model: str) -> Path:
    """The folder of a model: a local one, or a snapshot of the hub's, which is downloaded if it is not there yet.

    Raises:
        ValueError: there is neither a folder nor a model of this name.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model: no folder {model}")
    # Importing the hub's client takes a second that local models need not wait.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"model: neither a folder nor a model that can be downloaded: {model} ({error})") from error


def model_name(folder: Path) -> str:
    """Name of a folder; of a snapshot in the hub's cache (`models--OWNER--NAME/snapshots/REVISION`) `OWNER/NAME`."""
    folder = folder.resolve()
    cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/")
    return folder.name


def hash_tokenizer(folder: Path) -> str:
    """SHA-256 of `tokenizer.json`; empty without one."""
    path = folder / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
