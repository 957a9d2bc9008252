"""Files and folders that appear whole or not at all, and where those lie that can be made again.

Everything is written beside its destination under a hidden name that ends in `.partial`, flushed to the disk, and
renamed. A process killed half-way leaves the destination as it was, and at worst a `.partial` entry beside it.
"""

import contextlib
import ctypes
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def cache_folder() -> pathlib.Path:
    """Where what can be made again is kept between runs; it need not exist."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return pathlib.Path(os.path.expanduser(caches)) / "moe_jax"


def partial_sibling(path: pathlib.Path) -> pathlib.Path:
    """A new hidden name beside a path, for what is renamed to it once it is whole."""
    return path.parent / f".{uuid.uuid4().hex}.partial"


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: pathlib.Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(parent, name))
        _sync(parent)


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file in one step for every reader, replacing what was there; text is written as UTF-8.

    Missing parent folders are made. The file's mode follows the umask.

    Raises:
      OSError: The file could not be written; what was at `path` is untouched. It names `path`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_sibling(path)
    try:
        with open(partial, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk names nothing, and the partial file is gone
        raise
    _sync(path.parent)


@contextlib.contextmanager
def replaced_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty folder that becomes `path` when the block ends, and is removed when the block raises.

    A folder that was at `path` is replaced as a whole, and keeps its place until then. On Linux the two are exchanged
    in one step; on a file system that cannot, `path` is missing for an instant between two renames. Missing parent
    folders are made. A link is followed: the folder it points to is replaced.

    Raises:
      NotADirectoryError: `path` is a file.
      OSError: The folder could not be written or renamed; what was at `path` is untouched.
    """
    path = pathlib.Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(20, "is a file where a folder is to be written", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_sibling(path)
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        _put_in_place(partial, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Renames `partial` to `path`; a folder that was there ends up at `partial`."""
    if not path.exists():
        os.rename(partial, path)
        return
    if _exchange(partial, path):
        return
    old = partial_sibling(path)
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(old, path)
        raise
    os.rename(old, partial)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
