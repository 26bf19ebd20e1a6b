"""Score store: what was measured, on disk, found again by its content. A killed run resumes from it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ScoreStore:
    """Named arrays in a folder, addressed by everything that they depend on.

    A key is the SHA-256 of a JSON description: weights, data, layers, formats, loss, estimator, options and seed. If
    any of them changes, so does the key: a stale entry can't be found. Files are written whole or not at all, and one
    that does not hold its own key is ignored. Several processes may share a folder.

    Attributes:
        folder: Where the files are; made when the first one is written.
        context: Description that all keys share.
    """

    folder: Path
    context: Mapping[str, Any] = field(default_factory=dict)

    def within(self, **context: Any) -> ScoreStore:
        """The same folder with more of a description that all keys share."""
        return ScoreStore(Path(self.folder), {**self.context, **context})

    def key(self, **about: Any) -> str:
        """Address of an entry."""
        text = json.dumps([self.context, about], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, **about: Any) -> Arrays | None:
        """An entry, or None where it is missing or damaged."""
        key = self.key(**about)
        try:
            with safe_open(self._path(key), "numpy") as f:
                if (f.metadata() or {}).get("key") != key:
                    return None
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, arrays: Arrays, **about: Any) -> None:
        """Write an entry."""
        key = self.key(**about)
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file under another name first: a process that is killed leaves nothing that could be read.
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary, {"key": key})
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return Path(self.folder) / key[:2] / f"{key}.safetensors"
