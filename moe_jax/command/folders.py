"""The folders that a launcher reads from and writes to."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).parents[2]  # of the repository


def in_repository(path: str, setting: str = "model.path") -> pathlib.Path:
    """A path as given or, if nothing is there, relative to the repository; error messages name `setting`."""
    if not path:
        raise ValueError(f"{setting} = '': expected a folder")
    return pathlib.Path(path) if os.path.exists(path) or not (_ROOT / path).exists() else _ROOT / path


def open_folder(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Makes a folder and checks by writing that it is writable; returns it and the folders made for it.

    Permission bits would not do: they do not bind root, and a disk may be read-only.
    """
    path = pathlib.Path(name)
    made = []
    folder = path
    while not os.path.lexists(folder) and folder != folder.parent:
        made.append(folder)
        folder = folder.parent
    expected = "expected a folder that exists or can be made, and can be written to"
    try:
        if not name:
            raise ValueError(f"{name!r}: {expected}")
        if not folder.is_dir():
            raise ValueError(f"{name!r}: {folder} is not a folder; {expected}")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex}.partial"
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        remove_empty(made)
        raise ValueError(f"{name!r}: {error.strerror}; {expected}") from error
    return path, made


def remove_empty(made: Sequence[pathlib.Path]) -> None:
    """Removes those of the folders that are empty."""
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()
