"""Keeps the finished parts of a long measurement, so that it can resume after it was killed."""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config.schema import Config
from moe_jax.files import is_first, write_atomically
from moe_jax.model.sharding import holds_in_all


class Journal:
    """A folder of finished parts; a part is a dict of arrays and appears whole or not at all.

    The parts of one measurement are in a folder named by a digest of everything that they depend on, so that a
    measurement with another configuration, model or text does not use them.

    Args:
        folder: made with the first part; None: nothing is kept.
        identity: JSON of everything that the parts depend on.
    """

    def __init__(self, folder: pathlib.Path | None, identity: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._folder = None if folder is None else folder / digest[:16]

    def once(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a part: read if it is finished, else computed and written.

        Of several processes, all read it or all compute it: one may see the disk later than another.
        """
        if self._folder is None:
            return _arrays(compute())
        path = self._folder / f"{name}.npz"
        kept = _read(path)
        if holds_in_all(kept is not None):
            return kept
        arrays = _arrays(compute())
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getvalue())
        return arrays

    def forget(self) -> None:
        """Removes the parts, once the measurement's results are written elsewhere."""
        if self._folder is not None and is_first():
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._folder.parent.is_dir() and not any(self._folder.parent.iterdir()):
                self._folder.parent.rmdir()


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a part; None if it is not finished."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as part:
            return dict(part)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and this part is computed again") from error


def identity(config: Config, paths: Sequence[str | os.PathLike], implementations: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the parts of a measurement depend on.

    Args:
        config: all settings.
        paths: of files, and of folders whose files count, each by its size and time of modification; "": none.
        implementations: by operation.
    """
    files = {}
    for path in map(pathlib.Path, filter(None, paths)):
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            if file.is_file():
                files[str(file)] = [file.stat().st_size, file.stat().st_mtime_ns]
    versions = {"moe_jax": importlib.metadata.version("moe_jax"), "jax": jax.__version__}
    return dataclasses.asdict(config) | {"files": files, "versions": versions, "implementations": implementations}


def _arrays(part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in part.items()}
