"""Training state to and from disk, written in the background, with Orbax."""

import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

_STATE, _PLACE = "state", "place"


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Orbax tells of every step of every save, dozens of lines, at the level of our own."""
    return record.levelno >= logging.WARNING or "orbax" not in pathlib.Path(record.pathname).parts


class Checkpoints:
    """The checkpoints of one run: a folder with one entry per saved step.

    An entry appears whole or not at all: Orbax writes it under another name and renames it.
    """

    def __init__(self, folder: pathlib.Path, kept: int):
        absl_logging.get_absl_handler().addFilter(_is_worth_saying)
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        """The last step that is wholly on disk; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, place: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once the arrays are copied.

        Args:
            step: its name.
            state: a pytree of arrays.
            place: what JSON can hold, such as the place in the stream of batches.
        """
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(state), _PLACE: ocp.args.JsonSave(place)})
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
            step: a saved step.
            like: the state's structure, shapes and dtypes; any arrays will do.

        Returns:
            The state and the place that were saved.

        Raises:
            ValueError: the checkpoint is damaged, or of another shape.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract), _PLACE: ocp.args.JsonRestore()})
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise whatever they meet
            where = self._manager.directory / str(step)
            raise ValueError(f"{where} cannot be read back: {error}; remove it to go on from an earlier one") from error
        return restored[_STATE], restored[_PLACE]

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()
