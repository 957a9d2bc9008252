"""Compiles C++ kernels for the CPU with the system's compiler, at first use and for this machine, and caches them.

A kernel is one source file that exports a handler of XLA's foreign function interface, whose headers are part of
jaxlib. It may have headers of its own beside it; all kernels share `native.h`. `open_library` gives access to other
C++ code.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jaxlib.version

from moe_jax import files
from moe_jax.config.architecture import Architecture

_SHARED = pathlib.Path(__file__).with_name("native.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


@functools.cache
def compiler() -> str | None:
    """The C++ compiler named by the environment (CXX) or found on PATH; None if there is none."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why compiled kernels do not run here; "" if they do."""
    return "" if compiler() else "needs a C++ compiler (c++) on PATH"


@functools.cache
def register(source: pathlib.Path, symbol: str) -> str:
    """Registers a handler for `jax.ffi.ffi_call`; returns its name there.

    Raises:
        ValueError: there is no compiler, or it refuses the source.
    """
    handler = getattr(open_library(source), symbol)
    jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(handler), platform="cpu")
    return symbol


@functools.cache
def open_library(source: pathlib.Path) -> ctypes.CDLL:
    """Compiles a source, or takes it from the cache, and loads it.

    Raises:
        ValueError: there is no compiler, or it refuses the source.
    """
    return ctypes.CDLL(str(_compile(source)))


def _compile(source: pathlib.Path) -> pathlib.Path:
    """The path of the compiled source; its name in the cache is a hash of everything that it depends on."""
    cxx = compiler()
    if cxx is None:
        raise ValueError(f"{source.name} needs a C++ compiler: expected one as c++ on PATH, or its name in CXX")
    command = [cxx, *_FLAGS, f"-I{jax.ffi.include_dir()}", f"-I{_SHARED.parent}"]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    headers = sorted(source.parent.glob("*.h"))
    depends_on = (
        *(part.read_text() for part in (source, *headers, _SHARED)),
        " ".join(command),
        version,
        jaxlib.version.__version__,
        _processor(),
    )
    key = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    library = files.cache_folder() / "kernels" / f"{source.stem}-{key}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=library.parent)
    except OSError:  # the cache cannot be written: use a temporary folder
        folder = tempfile.mkdtemp()
        library = pathlib.Path(folder) / library.name
    partial = pathlib.Path(folder) / "partial.so"
    done = subprocess.run([*command, str(source), "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(folder)
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise ValueError(f"{cxx} cannot compile {source.name}: {reason[:500]}; expected g++ 12 (on ARM 13) or clang 15")
    os.replace(partial, library)
    if library.parent != pathlib.Path(folder):
        os.rmdir(folder)
    return library


def _processor() -> str:
    """The processor's name and features: code for one may be illegal instructions on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
