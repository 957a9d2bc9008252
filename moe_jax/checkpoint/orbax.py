"""Saves training state with Orbax, in the background, and restores it.

Orbax keeps no checksum of arrays, so a bit that flips on the disk would go unnoticed. A digest of the state is
therefore saved with it, and compared when it is restored.
"""

import hashlib
import logging
import pathlib
import sys
import threading
import traceback
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from moe_jax.model.sharding import pieces_on_host

_STATE, _PLACE, _DIGEST = "state", "place", "state_sha256"


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Lets only warnings of Orbax through, and nothing of asyncio.

    Orbax logs dozens of lines for each save at the level of our own lines; its errors are raised as well. asyncio,
    which only Orbax uses, logs them once more for each write that was not awaited.
    """
    is_orbax = "orbax" in pathlib.Path(record.pathname).parts
    return record.name != "asyncio" and (not is_orbax or record.levelno == logging.WARNING)


def _suppress_background_tracebacks() -> None:
    """Suppresses tracebacks of errors in Orbax's background threads, which `wait` and `save` raise anyway.

    Orbax closes its event loop at the first error; later calls of TensorStore into it then fail within asyncio.
    """

    def without_orbax(hook):
        def filtered(arguments):
            files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(arguments.exc_traceback)]
            unfinished = getattr(getattr(arguments, "object", None), "cr_code", None)  # a coroutine that is thrown away
            files += [unfinished.co_filename] if unfinished else []
            parts = [pathlib.Path(file).parts for file in files]
            if not any("orbax" in part for part in parts) and not (parts and all("asyncio" in part for part in parts)):
                hook(arguments)

        return filtered

    threading.excepthook, sys.unraisablehook = without_orbax(threading.excepthook), without_orbax(sys.unraisablehook)


def _digest(state: Any) -> str:
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(state):
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        for piece in pieces_on_host(array):
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run: a folder with one entry per saved step.

    An entry appears whole or not at all: Orbax writes it under a temporary name and renames it.
    """

    def __init__(self, folder: pathlib.Path, kept: int | None):
        handler = absl_logging.get_absl_handler()
        if _is_worth_logging not in handler.filters:
            handler.addFilter(_is_worth_logging)
            _suppress_background_tracebacks()
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        """The last step that is completely on disk; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, place: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once the arrays are copied.

        Args:
            step: its name; an existing checkpoint of this step is left alone.
            state: a pytree of arrays.
            place: JSON values, such as the place in the stream of batches.

        Raises:
            OSError: this or the previous checkpoint could not be written; earlier ones are unchanged.
        """
        if step in self._manager.all_steps():  # by a run that was killed right after writing it
            return
        place = {**place, _DIGEST: _digest(state)}
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(state), _PLACE: ocp.args.JsonSave(place)})
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise self._not_written(error) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
            step: a saved step.
            like: arrays with the structure, shapes and dtypes of the state; their values do not matter.

        Returns:
            The state and the place that were saved.

        Raises:
            ValueError: the checkpoint is damaged, or of another shape.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract), _PLACE: ocp.args.JsonRestore()})
        try:
            restored = self._manager.restore(step, args=items)
            state, place = restored[_STATE], dict(restored[_PLACE])
            if place.pop(_DIGEST) != _digest(state):
                raise ValueError("its arrays are not those that were saved")
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise ValueError(self._damaged(step, error)) from error
        return state, place

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, which a run that resumes from this step writes again."""
        for later in [number for number in self._manager.all_steps() if number > step]:
            self._manager.delete(later)

    def _damaged(self, step: int, error: Exception) -> str:
        earlier = max((other for other in self._manager.all_steps() if other < step), default=None)
        instead = "begin again" if earlier is None else f"go on from step {earlier}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"{self._manager.directory / str(step)} is damaged: remove it to {instead} ({reason})"

    def _not_written(self, error: Exception) -> OSError:
        reason = " ".join(str(error).split())
        for known in ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system"):
            if known in reason:
                reason = known
        last = self._manager.latest_step()
        kept = "there is none before it" if last is None else f"the last good one is that of step {last}"
        return OSError(f"{self._manager.directory}: a checkpoint could not be written: {reason[:300]}; {kept}")

    def wait(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
            OSError: one could not be written; earlier ones are unchanged.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Waits as `wait` does, and closes the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()
