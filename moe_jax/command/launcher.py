"""One run of a launcher: its command line, the call of its `main`, and its end."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags

from moe_jax import files
from moe_jax.command import devices, errors, folders, hosts, interruption, results
from moe_jax.command.flags import define_flags, parse_flags
from moe_jax.command.huge_pages import use_huge_pages
from moe_jax.config import gin, schema
from moe_jax.config.architecture import Architecture

if TYPE_CHECKING:
    from moe_jax import api, checkpoint
    from moe_jax.model import decoder, sharding

flags.disclaim_key_flags()  # `run` defines flags on behalf of the launcher that calls it


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
    layouts: "dict[Architecture, sharding.Layout | None]" = dataclasses.field(default_factory=dict)  # made once each

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's duration to `seconds[phase]`, even if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def open_model(
        self, *, calibrated: bool = True, dtype: str = "", training: bool = False, expert_dtype: str = ""
    ) -> "tuple[checkpoint.Checkpoint, decoder.Execution]":
        """Opens the model of `model.path` and checks it against the configuration, without reading weights.

        Args:
            calibrated: whether to read the calibration of `policy.calibration`, or of the model's folder.
            dtype: in which the weights will be loaded; "": `model.dtype`.
            training: whether it will be trained.
            expert_dtype: of the routed experts, as it will be loaded; "": `model.expert_dtype`.
        """
        from moe_jax import checkpoint

        calibration = self.config.policy.calibration if calibrated else None
        opened = checkpoint.open(folders.in_repository(self.config.model.path), calibration=calibration)
        _refuse_other_shape(self.config, opened.architecture)
        self._layout_of(opened.architecture)  # refuses a mesh before "auto" opens the weights
        dtype = dtype or self.config.model.dtype
        dtype = opened.expected_dtype if dtype == "auto" else dtype
        expert_dtype = expert_dtype or self.config.model.expert_dtype
        if training and self.config.model.eight_bits:
            raise ValueError(
                f"model.expert_dtype = {expert_dtype!r}: weights in eight bits have no gradient: expected auto or "
                "model, with which they are trained in training.weights"
            )
        expert_dtype = opened.eight_bits("model" if training else expert_dtype)
        return opened, self.execution_of(opened.architecture, dtype, training, expert_dtype)

    def execution_of(
        self, architecture: Architecture, dtype: str, training: bool = False, expert_dtype: str = ""
    ) -> "decoder.Execution":
        """How a model runs here, its weights in `dtype`; the chosen implementations go into the result.

        `expert_dtype` is that of the routed experts' weights if they are in eight bits.
        """
        from moe_jax.engine.request import execution_of

        layout = self._layout_of(architecture)
        settings = {"dtype": dtype, "layout": layout, "training": training, "expert_dtype": expert_dtype}
        execution = execution_of(architecture, self.config.policy.k_max, self.config.kernels, **settings)
        self.implementations |= execution.implementations
        return execution

    def load(self, opened: "checkpoint.Checkpoint", expert_dtype: str = "") -> "api.Model":
        """Loads a model in `model.dtype` onto the mesh, timed; experts in `model.expert_dtype` unless one is given."""
        from moe_jax import api
        from moe_jax.model.sharding import sharding_of

        layout = self._layout_of(opened.architecture)
        placement = None if layout is None else layout.placement
        with self.timed("load"):
            expert_dtype = expert_dtype or self.config.model.expert_dtype
            params = opened.load(self.config.model.dtype, sharding_of(layout), placement, expert_dtype)
        return api.Model(opened, params, layout)

    def _layout_of(self, architecture: Architecture) -> "sharding.Layout | None":
        from moe_jax.model.sharding import layout_of

        if architecture not in self.layouts:
            mesh = self.config.mesh
            if mesh.placement:
                mesh = dataclasses.replace(mesh, placement=str(folders.in_repository(mesh.placement, "mesh.placement")))
            self.layouts[architecture] = layout_of(mesh, architecture)
        return self.layouts[architecture]

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
            **results.provenance(),
            "seed": self.config.run.seed,
            "implementations": {**self.implementations, **(implementations or {})},
            "seconds": self.seconds,
            "peak_memory_bytes": results.peak_memory_bytes(),
            "figures": figures,
            "rows": rows,
        }
        result_json = json.dumps(results.plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
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
    on_mesh: bool = False,
    elsewhere: bool = False,
    virtual_devices: Callable[[schema.Config], int] = lambda config: 0,
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
        huge_pages: Whether to restart the process with huge pages where possible, see `use_huge_pages`.
        on_mesh: Whether `main` can run on a mesh of devices and in several processes.
        elsewhere: Whether the mesh is of devices that are not here, which `main` checks; programs are not kept for the
            next run.
        virtual_devices: The number of devices to make on the CPU for a configuration; 0: the machine's own.
    """
    if huge_pages:
        use_huge_pages()
    received = interruption.raise_on_signals()
    define_flags(default_config, default_out)
    if on_mesh:
        hosts.define_flags()
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app.run(lambda _: _status_of(main, received, on_mesh, elsewhere, virtual_devices), flags_parser=parse_flags)
    except KeyboardInterrupt:
        _leave(received)


def _refuse_other_shape(config: schema.Config, architecture: Architecture) -> None:
    """Refuses shape settings that contradict the model's own, since they would be ignored."""
    for section in ("decoder", "attention", "moe"):
        settings, shape = getattr(config, section), getattr(architecture, section)
        for field in dataclasses.fields(settings):
            value, expected = getattr(settings, field.name), getattr(shape, field.name)
            if value not in (field.default, expected):
                hint = "; for fewer active experts: policy.spec=topk:4" if field.name == "k" else ""
                raise ValueError(f"{section}.{field.name} = {value!r}: expected the model's own, {expected!r}{hint}")


def _status_of(
    main: Callable[[Command], int | None],
    received: list[int],
    on_mesh: bool,
    elsewhere: bool,
    virtual_devices: Callable[[schema.Config], int],
) -> int:
    try:
        status = _run_main(main, on_mesh, elsewhere, virtual_devices)
        interruption.ignore()
        if received:
            _leave(received)
        return status
    except BaseException as error:
        interruption.ignore()
        if received or isinstance(error, KeyboardInterrupt):  # handlers may have turned it into another error
            _leave(received)
        errors.discard_output()
        if isinstance(error, BrokenPipeError):
            return errors.READER_GONE
        if isinstance(error, (ValueError, OSError)):
            return errors.refuse(error)
        raise


def _leave(received: list[int]) -> NoReturn:
    """Ends an interrupted process at once: a normal exit would tear XLA down while steps are still running."""
    interruption.ignore()
    errors.discard_output()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + (received[0] if received else signal.SIGINT))


def _run_main(
    main: Callable[[Command], int | None],
    on_mesh: bool,
    elsewhere: bool,
    virtual_devices: Callable[[schema.Config], int],
) -> int:
    values = flags.FLAGS
    config = gin.read_config(values["config"].value, values["set"].value)
    if not (on_mesh or elsewhere) and config.mesh != schema.MeshConfig():
        raise ValueError("mesh.data, mesh.expert or mesh.tensor is set: expected 1, this command runs on one device")
    out, made = None, []
    if values["out"].value is not None:
        try:
            out, made = folders.open_folder(values["out"].value)
        except ValueError as error:
            raise ValueError(f"--out = {error}") from error
    try:
        devices.configure_jax(virtual_devices(config), keep_programs=not elsewhere)
        if on_mesh:
            hosts.join()
        devices.require_device()
        if on_mesh:
            hosts.require_mesh(config.mesh)
        as_json = values["json"].value
        redirected = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        name = pathlib.Path(sys.argv[0]).stem
        run = Command(name, config, out, as_json, sys.stdout or io.StringIO())  # None: closed by the caller
        with redirected, hosts.first_prints():
            status = main(run)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status or 0
    finally:
        folders.remove_empty(made)
