"""The training loop: steps, evaluations, metrics and checkpoints; a killed run resumes bit-identically."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from absl import logging
from tqdm import tqdm

from moe_jax import files
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config import gin
from moe_jax.config.schema import Config
from moe_jax.model.finite import NotFiniteError
from moe_jax.routing.policies import Settings
from moe_jax.text.batches import Packed, batches
from moe_jax.training.optimizer import learning_rate
from moe_jax.training.step import Fixed, State, Step

METRICS = "metrics.jsonl"  # a line per logged step or evaluation

# May differ when a run is resumed: they change what is written, not what is learned.
_FREE_SETTINGS = ("checkpoint_every", "checkpoints_kept", "log_every")
_FREE_SECTIONS = ("sampling", "evaluation", "benchmark", "sweep", "mesh")  # training does not read them, or may move
_CAPACITY = "mesh.capacity"  # fixed; where slots may be dropped, which ones depends on the whole mesh


class TrainingTask(NamedTuple):
    """What a run trains, on what, and how it is evaluated."""

    state: State  # before the first step
    fixed: Fixed
    step: Step
    live: Callable[[int], Settings]  # step number, from 0 on -> policy settings
    judge: Callable[[State], float]  # held-out bits per byte
    packed: Packed
    digests: dict[str, str]  # setting -> digest of what it names; must not change when a run is resumed
    keep_best: bool = False  # whether to keep the best evaluated state as well as the last
    patience: int = 0  # evaluations without improvement after which a run ends; 0: never


class Outcome(NamedTuple):
    """How a run ended."""

    state: State  # the best, without its optimizer, if it was kept; else the last
    step: int  # of that state
    steps: int  # steps of the run


class _Best(NamedTuple):
    """The best evaluation so far."""

    step: int = 0
    bits_per_byte: float = math.inf
    since: int = 0  # evaluations since


def require_same_run(config: Config, folder: pathlib.Path) -> None:
    """Checks that a run in the folder, if there is one, was started with the same configuration.

    Raises:
        ValueError: a setting differs; the message names it.
    """
    path = folder / "run.gin"
    if not path.exists():
        return

    def fixed_settings(config: Config):
        free = dict.fromkeys(_FREE_SETTINGS, 1)
        training = dataclasses.replace(config.training, **free)
        return {
            f"{section}.{name}": value
            for section, settings in dataclasses.asdict(dataclasses.replace(config, training=training)).items()
            for name, value in settings.items()
            if section not in _FREE_SECTIONS
            or f"{section}.{name}" == _CAPACITY
            or (section == "mesh" and config.mesh.capacity)
        }

    before, now = fixed_settings(gin.read_config(path)), fixed_settings(config)
    different = [name for name in before if name in now and before[name] != now[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"{name} = {now[name]!r}: the run in {folder} was started with {before[name]!r}; "
            "give the same, or another --out"
        )


def median_tokens_per_s(folder: pathlib.Path) -> float:
    """The median speed of the run in a folder, from its `metrics.jsonl`."""
    lines = map(json.loads, (folder / METRICS).read_text().splitlines())
    return statistics.median(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)


def overflow_slots(folder: pathlib.Path) -> int | None:
    """The slots that the run in a folder has dropped, from its `metrics.jsonl`; None if none can be dropped."""
    lines = map(json.loads, (folder / METRICS).read_text().splitlines())
    return next((int(line["overflow_slots"]) for line in reversed([*lines]) if "overflow_slots" in line), None)


class _Log:
    """Metrics as JSON lines. Resuming drops the lines written after the last checkpoint."""

    def __init__(self, path: pathlib.Path, step: int, wait: Callable[[], None]):
        self._path, self._wait = path, wait
        kept = []
        if path.exists():
            try:
                lines = path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} is damaged ({error}): repair it, or remove it and lose its steps") from error
        files.write_atomically(path, "".join(kept))
        self._file = open(path if files.is_first() else os.devnull, "ab", buffering=0)  # noqa: SIM115  closed by `close`

    def write(self, **figures) -> None:
        line = json.dumps(figures).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._wait()  # if a checkpoint could not be written either, its error says which ones are kept
            raise OSError(f"{self._path} could not be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _interruption_deferred() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs, and raises the first one after it.

    A step donates its state, so an exception in the middle of a step would leave nothing to save.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


class _Begun(NamedTuple):
    """Where a run stands."""

    state: State
    done: int  # steps
    best: _Best
    dropped: int  # slots


def _begin(task: TrainingTask, checkpoints: Checkpoints, folder: pathlib.Path, stream) -> _Begun:
    """From the last checkpoint, if there is one."""
    done = checkpoints.latest_step or 0
    if not done:
        return _Begun(task.state, 0, _Best(), 0)
    state, place = checkpoints.restore(done, task.state)
    for setting, digest in task.digests.items():
        if place["digests"].get(setting) != digest:
            raise ValueError(
                f"{setting}: its contents changed since the run in {folder} was started; "
                "restore those files, or give another --out"
            )
    stream.set_state(place["stream"])
    return _Begun(state, done, _Best(*place["best"]), place.get("dropped", 0))


def run(config: Config, folder: pathlib.Path, task: TrainingTask) -> Outcome:
    """Trains to the last step, from the last checkpoint if there is one.

    Writes `run.gin`, `checkpoints/`, `best/` and `metrics.jsonl` into the folder. A run that is killed at any moment
    and started again with the same configuration goes through bit-identical states.

    Raises:
        ValueError: the folder holds another run; its text or model has changed; the loss or the gradient is not finite;
            or no evaluation is. The last good checkpoint stays.
        KeyboardInterrupt: SIGINT or SIGTERM, after saving a checkpoint if this is the only process.
    """
    training = config.training
    require_same_run(config, folder)
    if not (folder / "run.gin").exists():
        files.write_atomically(folder / "run.gin", gin.to_gin(config))
    stream = iter(batches(task.packed, training.batch_size * training.accumulation, config.run.seed))
    checkpoints = Checkpoints(folder / "checkpoints", training.checkpoints_kept)
    best_kept = Checkpoints(folder / "best", 2) if task.keep_best else None
    state, done, best, dropped = _begin(task, checkpoints, folder, stream)
    if best_kept is not None:
        best_kept.forget_after(best.step)  # a killed run may have saved a best state that no checkpoint names
    metrics = _Log(folder / METRICS, done, checkpoints.wait)
    bar = tqdm(total=training.steps, initial=done, unit="step", file=sys.stderr, disable=None)

    def save():
        place = {"digests": task.digests, "stream": stream.get_state(), "best": list(best), "dropped": dropped}
        checkpoints.save(done, state, place)

    def is_over():
        return done >= training.steps or 0 < task.patience <= best.since

    def evaluate():
        try:
            bits_per_byte = task.judge(state)
        except NotFiniteError as error:
            logging.warning("held-out text after step %d: %s", done, error)
            metrics.write(step=done, bits_per_byte=None)
            return best._replace(since=best.since + 1)
        metrics.write(step=done, bits_per_byte=bits_per_byte)
        if not bits_per_byte < best.bits_per_byte:  # NaN is no better
            return best._replace(since=best.since + 1)
        if best_kept is not None:
            best_kept.save(done, state._replace(optimizer=None), {})
            best_kept.wait()  # a checkpoint must not name a best state that is not on disk
        return _Best(done, bits_per_byte)

    try:
        with _interruption_deferred() as interrupted:
            rate = learning_rate(training)
            since, tokens = time.perf_counter(), 0
            while not is_over() and not interrupted:
                batch = next(stream)._asdict()
                state, measured = task.step(state, task.fixed, batch, task.live(done))
                measured = {name: float(value) for name, value in measured.items()}
                if not all(map(math.isfinite, measured.values())):
                    raise ValueError(
                        f"step {done + 1} is not finite ({measured}); the last good checkpoint is that of step "
                        f"{checkpoints.latest_step or 0}; lower training.learning_rate"
                    )
                if "overflow_slots" in measured:
                    dropped += int(measured["overflow_slots"])
                    measured["overflow_slots"] = dropped
                done += 1
                tokens += int((batch["segments_BT"] > 0).sum())
                bar.update()
                last = done == training.steps
                if done % training.log_every == 0 or last or done % training.evaluate_every == 0:
                    now = time.perf_counter()
                    tokens_per_s, since, tokens = tokens / (now - since), now, 0
                    bar.set_postfix_str(f"loss {measured['loss']:.3f}, {tokens_per_s:,.0f} tokens/s")
                    extra = {"learning_rate": float(rate(done - 1)), "tokens_per_s": round(tokens_per_s, 1)}
                    metrics.write(step=done, **measured, **extra)
                if done % training.evaluate_every == 0 or last:
                    began = time.perf_counter()
                    best = evaluate()
                    since += time.perf_counter() - began
                if done % training.checkpoint_every == 0 or is_over():
                    save()
            # several processes are interrupted at different steps: the last checkpoint that all wrote stays
            if not is_over() and done != checkpoints.latest_step and jax.process_count() == 1:
                save()
        if best_kept is None:
            return Outcome(state, done, done)
        if not best.step:
            raise ValueError(f"no evaluation of the {done} steps was finite: lower training.learning_rate")
        kept, _ = best_kept.restore(best.step, state._replace(optimizer=None))
        return Outcome(kept, best.step, done)
    finally:
        bar.close()
        metrics.close()
        checkpoints.close()
        if best_kept is not None:
            best_kept.close()
