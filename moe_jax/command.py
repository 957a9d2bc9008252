"""What all launchers share: flags, one-line errors, interruption, timings and result.json.

A launcher is a docstring (its `--help`), a `main(run)` and one call:

    if __name__ == "__main__":
        command.run(main, default_config="configs/infer_demo.gin")

It imports JAX, and modules that need JAX, inside `main`, so that a wrong flag is refused at once.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging as standard_logging
import math
import os
import pathlib
import platform
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging

from moe_jax import files, interruption
from moe_jax.config import gin, schema
from moe_jax.config.architecture import Architecture

if TYPE_CHECKING:
    from moe_jax import api, checkpoint
    from moe_jax.model import decoder

REFUSED = 2  # exit status for wrong flags, settings or files
_ROOT = pathlib.Path(__file__).parents[1]  # of the repository
_READER_GONE = 128 + signal.SIGPIPE  # as the shell reports a process ended by SIGPIPE

flags.disclaim_key_flags()  # the flags below count as the launcher's own, which `--help` lists


@dataclasses.dataclass
class Command:
    """One run of a launcher: its configuration, and where its results go."""

    name: str  # of the launcher's file, without suffix
    config: schema.Config  # resolved: files, then overrides
    out: pathlib.Path | None  # the output folder, which exists and is writable
    as_json: bool
    output: Any  # standard output; with --json, what `main` prints itself goes to standard error
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    implementations: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's duration to `seconds[phase]`, even if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def open_model(self, *, calibrated: bool = True) -> "tuple[checkpoint.Checkpoint, decoder.Execution]":
        """Opens the model of `model.path` and checks it against the configuration, without reading weights.

        Args:
            calibrated: whether to read the calibration of `policy.calibration`, or of the model's folder.
        """
        from moe_jax import checkpoint

        calibration = self.config.policy.calibration if calibrated else None
        opened = checkpoint.open(in_repository(self.config.model.path), calibration=calibration)
        refuse_other_shape(self.config, opened.architecture)
        return opened, self.execution_of(opened.architecture)

    def execution_of(self, architecture: Architecture) -> "decoder.Execution":
        """How a model of this architecture runs here; the chosen implementations go into the result."""
        from moe_jax.engine.request import execution_of

        execution = execution_of(architecture, self.config.policy.k_max, self.config.kernels)
        self.implementations |= execution.implementations
        return execution

    def load(self, opened: "checkpoint.Checkpoint") -> "api.Model":
        """Loads a model in `model.dtype`, timed."""
        from moe_jax import api

        with self.timed("load"):
            return api.Model(opened, opened.load(self.config.model.dtype))

    def finish(
        self,
        figures: Mapping[str, Mapping[str, Any]],
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        implementations: Mapping[str, str] | None = None,
        text: str = "",
    ) -> None:
        """Writes `result.json` and `config.gin` into the output folder, then prints the result.

        With several hosts only the first one writes and prints.

        Args:
            figures: name -> {`value`, `unit`, and `ci95` for estimates}, of the configured policy. Values that are not
                finite become null, since JSON cannot hold them.
            rows: {`policy`, `figures`} for each policy, if there are several.
            implementations: operation -> name of the implementation that ran, added to `self.implementations`.
            text: The result for people, printed unless `--json` is given.
        """
        import jax

        if jax.process_index() != 0:
            return
        result = {
            "command": self.name,
            "config": dataclasses.asdict(self.config),
            **provenance(),
            "seed": self.config.run.seed,
            "implementations": {**self.implementations, **(implementations or {})},
            "seconds": self.seconds,
            "peak_memory_bytes": _peak_memory_bytes(),
            "figures": figures,
            "rows": rows,
        }
        result_json = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if self.out is not None:
            files.write_atomically(self.out / "config.gin", gin.to_gin(self.config))
            files.write_atomically(self.out / "result.json", result_json.encode(errors="backslashreplace"))
        if self.as_json:
            self.output.write(result_json)
        elif text:
            self.output.write(text.rstrip("\n") + "\n")
        self.output.flush()


def run(
    main: Callable[[Command], int | None],
    *,
    default_config: str | os.PathLike | None = None,
    default_out: str | os.PathLike | None = None,
    huge_pages: bool = False,
) -> NoReturn:
    """Reads the command line, runs `main`, and exits.

    Exit status: 0, or what `main` returns. 2: `ValueError` or `OSError` from the command line or `main`; the last line
    is `error: ...`, and `--verbosity=1` shows the traceback. 130 or 143: SIGINT or SIGTERM, which `main` sees as a
    KeyboardInterrupt and may use to save; a second signal, a second or more later, ends the process at once. 141: the
    reader of the output is gone. 1: any other exception, which is a bug, with its traceback.

    Args:
        main: The launcher's work.
        default_config: The config file without `--config`. None: the schema's defaults.
        default_out: The output folder without `--out`. None: nothing is written.
        huge_pages: Whether to restart the process with huge pages where possible, see `_use_huge_pages`.
    """
    if huge_pages:
        _use_huge_pages()
    received = interruption.raise_on_signals()
    default_config = None if default_config is None else os.fspath(default_config)
    default_out = None if default_out is None else os.fspath(default_out)
    flags.DEFINE_string("config", default_config, "The configuration: a gin file.")
    flags.DEFINE_multi_string("set", [], "section.field=value: overrides one setting; repeat it for more.")
    flags.DEFINE_string("out", default_out, "The folder for result.json, config.gin and other outputs.")
    flags.DEFINE_bool("json", False, "Print result.json instead of text.")
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app.run(lambda _: _status_of(main, received), flags_parser=_parse_flags)
    except KeyboardInterrupt:
        _leave(received)


def in_repository(path: str, setting: str = "model.path") -> pathlib.Path:
    """A path as given or, if nothing is there, relative to the repository; error messages name `setting`."""
    if not path:
        raise ValueError(f"{setting} = '': expected a folder")
    return pathlib.Path(path) if os.path.exists(path) or not (_ROOT / path).exists() else _ROOT / path


def refuse_other_shape(config: schema.Config, architecture: Architecture) -> None:
    """Refuses shape settings that contradict the model's own, since they would be ignored."""
    for section in ("decoder", "attention", "moe"):
        given, own = getattr(config, section), getattr(architecture, section)
        for field in dataclasses.fields(given):
            value, expected = getattr(given, field.name), getattr(own, field.name)
            if value not in (field.default, expected):
                hint = "; for fewer active experts: policy.spec=topk:4" if field.name == "k" else ""
                raise ValueError(f"{section}.{field.name} = {value!r}: expected the model's own, {expected!r}{hint}")


def _use_huge_pages() -> None:
    """Restarts the process, once, with huge pages in glibc's allocator (Linux, glibc 2.35 or newer).

    On a CPU, XLA allocates and frees gigabytes in every step. With 4 KiB pages, the kernel's work for that takes about
    half the time of memory-bound operations. glibc reads the setting only when a process starts.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _parse_flags(arguments: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(_refuse(error))
    except SystemExit:  # absl ends with status 1 after --help
        sys.exit(0)
    if len(rest) > 1:
        hint = "--set " if "=" in rest[1] else "a flag, as in --config "
        sys.exit(_refuse(ValueError(f"{rest[1]!r}: unexpected argument; expected {hint}{rest[1]}")))
    return rest


def _status_of(main: Callable[[Command], int | None], received: list[int]) -> int:
    try:
        status = _run_main(main)
        interruption.ignore()
        if received:
            _leave(received)
        return status
    except BaseException as error:
        interruption.ignore()
        if received or isinstance(error, KeyboardInterrupt):  # handlers may have turned it into another error
            _leave(received)
        _discard_output()
        if isinstance(error, BrokenPipeError):
            return _READER_GONE
        if isinstance(error, (ValueError, OSError)):
            return _refuse(error)
        raise


def _leave(received: list[int]) -> NoReturn:
    """Ends an interrupted process at once: a normal exit would tear XLA down while steps are still running."""
    interruption.ignore()
    _discard_output()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + (received[0] if received else signal.SIGINT))


def _run_main(main: Callable[[Command], int | None]) -> int:
    values = flags.FLAGS
    config = gin.read_config(values["config"].value, values["set"].value)
    out, made = None, []
    if values["out"].value is not None:
        try:
            out, made = _open_folder(values["out"].value)
        except ValueError as error:
            raise ValueError(f"--out = {error}") from error
    try:
        configure_jax()
        _require_device()
        as_json = values["json"].value
        redirected = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        name = pathlib.Path(sys.argv[0]).stem
        run = Command(name, config, out, as_json, sys.stdout or io.StringIO())  # None: closed by the caller
        with redirected:
            status = main(run)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status or 0
    finally:
        _remove_empty(made)


def _refuse(error: Exception) -> int:
    """Prints an error in one line, with `--verbosity=1` after its traceback; returns the exit status."""
    logging.debug("refused", exc_info=error)
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    one_line = " ".join(line.strip() for line in message.splitlines() if line.strip())
    print(f"error: {one_line or type(error).__name__}", file=sys.stderr, flush=True)
    return REFUSED


def _discard_output() -> None:
    """Flushes standard output, or drops what cannot be written, so that the interpreter does not fail on it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _open_folder(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
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
        _remove_empty(made)
        raise ValueError(f"{name!r}: {error.strerror}; {expected}") from error
    return path, made


def _remove_empty(folders: Sequence[pathlib.Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def configure_jax() -> None:
    """Imports JAX and turns on its compilation cache, if its folder is writable."""
    import jax

    for library in ("jax", "matplotlib", "httpx", "httpx2"):
        standard_logging.getLogger(library).setLevel(standard_logging.WARNING)
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(files.cache_folder() / "xla")
    if "://" not in folder:
        try:
            _open_folder(folder)
        except ValueError as error:
            logging.warning("compiled programs are not kept for the next run: %s", error)
            folder = None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # of any size


def _require_device() -> None:
    """Raises ValueError if JAX finds no device of the platforms in JAX_PLATFORMS."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: jaxlib knows the platform but has no plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())
        raise ValueError(
            f"JAX_PLATFORMS = {asked!r}: JAX finds no such device; expected cpu, or the extra of requirements that "
            f"brings it, as in pip install -e .[cuda13]{f' ({reason})' if reason else ''}"
        ) from error


def provenance() -> dict[str, Any]:
    """What figures were measured with: package versions and the device."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "moe_jax")}
    return {"versions": {**packages, "python": platform.python_version()}, "device": _device()}


def _device() -> dict[str, Any]:
    import jax

    from moe_jax.cost import hardware

    count = {"count": jax.device_count(), "cores": os.cpu_count()}
    return {"platform": jax.devices()[0].platform, "kind": hardware.kind()} | count


def _peak_memory_bytes() -> int:
    """Peak memory of the fullest local device, or of this process if devices do not report it (CPU)."""
    import jax

    device_bytes = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(device_bytes) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plain(value):
    """Converts a value for JSON: arrays to lists and numbers, paths to text, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
