"""Full disks: a small file system if the kernel lets us mount one, else a limit on file sizes."""

import contextlib
import dataclasses
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

TMPFS, LIMIT = "tmpfs", "limit"
FULL = "No space left on device|File too large"  # the second is the error of a limit
_LIMITED = "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); "
_LIMITED += "os.execvp(sys.argv[2], sys.argv[2:])"


@dataclasses.dataclass
class SmallDisk:
    """A folder of limited size.

    Attributes:
        folder: its path for processes that are started with `within`.
        seen: its path for this process.
        within: the prefix of a command line.
    """

    folder: pathlib.Path
    seen: pathlib.Path
    within: list[str]
    is_tmpfs: bool

    def grow(self) -> None:
        """Frees space."""
        if self.is_tmpfs:
            subprocess.run([*self.within, "mount", "-o", "remount,size=100m", str(self.folder)], check=True)
        else:
            self.within = []


def best_way() -> str:
    """`TMPFS` if a process may mount one in its own namespace without being root, else `LIMIT`."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "mount")))
    mounted = tools and subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=60
    )
    return TMPFS if mounted and mounted.returncode == 0 else LIMIT


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size_bytes: int, way: str) -> Iterator[SmallDisk]:
    """Makes an empty folder that holds `size_bytes` in all or, with a limit, in each file."""
    folder.mkdir()
    if way == LIMIT:
        yield SmallDisk(folder, folder, [sys.executable, "-c", _LIMITED, str(size_bytes)], False)
        return
    mount = f'mount -t tmpfs -o size={size_bytes} tmpfs "$0" && echo mounted && exec sleep infinity'
    with subprocess.Popen(["unshare", "-Urm", "sh", "-c", mount, str(folder)], stdout=subprocess.PIPE) as keeper:
        try:
            assert keeper.stdout.readline() == b"mounted\n"
            within = ["nsenter", f"--target={keeper.pid}", "--user", "--mount", "--preserve-credentials"]
            yield SmallDisk(folder, pathlib.Path(f"/proc/{keeper.pid}/root{folder}"), within, True)
        finally:
            keeper.kill()
