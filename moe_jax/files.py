"""Writing files and folders atomically, and the location of the cache.

Everything is written under a hidden name that ends in `.partial` beside its destination, flushed to the disk, and then
renamed. A process killed half-way leaves the destination unchanged, and at worst a `.partial` entry beside it.
"""

import contextlib
import ctypes
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

_is_first = True  # of several processes, the first writes
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def cache_folder() -> pathlib.Path:
    """The folder for files that can be made again, kept between runs; it may not exist yet."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return pathlib.Path(os.path.expanduser(caches)) / "moe_jax"


def leave_to_first() -> None:
    """Makes this module write nothing from now on: of several processes that share a disk, the first writes."""
    global _is_first
    _is_first = False


def is_first() -> bool:
    """Whether this process writes."""
    return _is_first


def partial_sibling(path: pathlib.Path) -> pathlib.Path:
    """A new hidden path beside `path`, to write to before renaming."""
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
    """Writes or replaces a file, so that readers see the old or the new content; text is written as UTF-8.

    Creates missing parent folders. The file's mode follows the umask.

    Raises:
        OSError: The file could not be written; `path` is unchanged. The error names `path`.
    """
    if not _is_first:
        return
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
            error.filename, error.filename2 = str(path), None  # the error of a full disk has no name
        raise
    _sync(path.parent)


@contextlib.contextmanager
def replaced_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty folder that becomes `path` when the block ends, and is removed if the block raises.

    An existing folder at `path` stays until then, and is replaced as a whole. On Linux the two are exchanged in one
    step; where the file system cannot do that, `path` is missing for an instant between two renames. Creates missing
    parent folders. Follows a link: the folder that it points to is replaced.

    Raises:
        NotADirectoryError: `path` is a file.
        OSError: The folder could not be written or renamed; `path` is unchanged.
    """
    if not _is_first:
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
        return
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
    """Renames `partial` to `path`; an existing folder at `path` ends up at `partial`."""
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
    """Swaps two folders in one step; False if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
