"""Keeps the finished parts of a long measurement, so that it can resume after it was killed."""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax import files
from moe_jax.config.schema import Config


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
        self.name = digest[:16]
        self._folder = None if folder is None else folder / self.name

    def once(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a part: read if it is finished, else computed and written."""
        if self._folder is None:
            return _arrays(compute())
        path = self._folder / f"{name}.npz"
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as part:
                return dict(part)
        except FileNotFoundError:
            pass
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and this part is computed again") from error
        arrays = _arrays(compute())
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_atomically(path, buffer.getvalue())
        return arrays

    def forget(self) -> None:
        """Removes the parts, once the measurement's results are written elsewhere."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._folder.parent.is_dir() and not any(self._folder.parent.iterdir()):
                self._folder.parent.rmdir()


def identity(config: Config, places: Sequence[pathlib.Path], implementations: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the parts of a measurement depend on.

    Args:
        config: all settings.
        places: files, and folders of files, identified by size and time of modification.
        implementations: by operation.
    """
    found = [file for place in places for file in ([place] if place.is_file() else sorted(place.iterdir()))]
    written = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in found if file.is_file()}
    versions = {"moe_jax": importlib.metadata.version("moe_jax"), "jax": jax.__version__}
    return dataclasses.asdict(config) | {"files": written, "versions": versions, "implementations": implementations}


def _arrays(part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in part.items()}
