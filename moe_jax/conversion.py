"""Converts checkpoints between layouts.

Reads Hugging Face folders, stacked folders, training runs and Orbax parameters; writes any of these but runs. A folder
of Orbax parameters has the files of a Hugging Face folder, but its weights are in `params/`, and `params.json` gives
the dtype of each.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import checkpoint
from moe_jax.checkpoint import Checkpoint, huggingface, stacked
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config import gin
from moe_jax.config.architecture import Architecture
from moe_jax.engine.request import execution_of
from moe_jax.files import replaced_folder
from moe_jax.kernels import quantized
from moe_jax.model import parameters
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from moe_jax.text.tokenizer import load_tokenizer
from moe_jax.training.step import start

LAYOUTS = (*checkpoint.LAYOUTS, "orbax")
_PARAMS, _DTYPES, _RUN = "params", "params.json", "run.gin"


class ModelWithWeights(NamedTuple):
    """A model and its weights, read from any layout."""

    checkpoint: Checkpoint
    params: Mapping[str, Any]


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layout: str = "huggingface",
    dtype: str = "auto",
    expert_dtype: str = "auto",
    policy: str = "model",
    shard_bytes: int = huggingface.SHARD_BYTES,
) -> ModelWithWeights:
    """Reads a checkpoint of any layout and writes it in another.

    Args:
        source: what `checkpoint.open` takes, the folder of a training run, whose last checkpoint is used, or a folder
            of Orbax parameters that this function wrote.
        destination: the new folder; it must not exist yet, or be empty.
        layout: one of `LAYOUTS`.
        dtype: the dtype of the weights; "auto": as they are.
        expert_dtype: of the routed experts, as `Checkpoint.load` takes it; "auto": eight bits if they are stored so,
            the layout has a form for them, and no dtype is asked for.
        policy: its k becomes the model's own; the k may differ between layers, but not between tokens.
        shard_bytes: as `write_checkpoint` takes it.

    Returns:
        What was written.

    Raises:
        ValueError: the source is damaged or unknown, the destination is taken, or the policy is not one k.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: expected one of {', '.join(LAYOUTS)}")
    huggingface.require_free(destination)
    if (source / _RUN).is_file():
        with_k(gin.read_config(source / _RUN).architecture, policy)
        model = _read_run(source)
    else:
        opened = checkpoint.open(source)
        with_k(opened.architecture, policy)
        is_orbax = (opened.folder / _PARAMS).is_dir()
        if expert_dtype == "auto" and (layout != "huggingface" or dtype != "auto"):
            expert_dtype = "model"
        model = _read_orbax(opened) if is_orbax else ModelWithWeights(opened, opened.read(dtype, expert_dtype))
        if quantized.holds_any(model.params):
            dtype = "auto"  # the other weights have theirs
    architecture = with_k(model.checkpoint.architecture, policy)
    model = model._replace(checkpoint=model.checkpoint.with_architecture(architecture))
    if layout == "orbax":
        _write_orbax(destination, model, dtype)
    else:
        model.checkpoint.save(destination, model.params, layout=layout, dtype=dtype, shard_bytes=shard_bytes)
    return model


def with_k(architecture: Architecture, policy: str) -> Architecture:
    """The architecture with a policy's k as its own; ValueError if the k depends on the token."""
    changed = policies.with_own(parse(policy), architecture)
    if changed is None:
        raise ValueError(
            f"policy.spec = {policy!r}: a checkpoint has one k for all tokens: expected a policy such as topk:4 or "
            "layers:8,4"
        )
    return changed


def _read_run(folder: pathlib.Path) -> ModelWithWeights:
    config = gin.read_config(folder / _RUN)
    tokenizer = load_tokenizer(config.text.tokenizer or folder / "tokenizer")
    execution = execution_of(config.architecture)
    like = jax.eval_shape(lambda: start(execution, config.training, config.run.seed))
    state, _ = _restore(folder / "checkpoints", like)
    return ModelWithWeights(checkpoint.new(config.architecture, tokenizer), state.all_params())


def _read_orbax(opened: Checkpoint) -> ModelWithWeights:
    path, architecture = opened.folder / _DTYPES, opened.architecture
    try:
        dtypes = json.loads(path.read_text(encoding="utf-8"))
        like = {
            parameter.path: jax.ShapeDtypeStruct(parameter.shape(architecture), np.dtype(dtypes[parameter.path]))
            for parameter in parameters.of(architecture)
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged: expected the dtype of each parameter ({error!r})") from error
    params, _ = _restore(opened.folder / _PARAMS, like)
    return ModelWithWeights(opened, huggingface.nested(params))


def _restore(folder: pathlib.Path, like: Any) -> tuple[Any, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: expected a folder of checkpoints")
    checkpoints = Checkpoints(folder, kept=None)
    try:
        if checkpoints.latest_step is None:
            raise ValueError(f"{folder} holds no checkpoint")
        return checkpoints.restore(checkpoints.latest_step, like)
    finally:
        checkpoints.close()


def _write_orbax(folder: pathlib.Path, model: ModelWithWeights, dtype: str) -> None:
    params = dict(stacked.in_dtype(model.params, model.checkpoint.architecture, dtype))
    most = np.dtype(max(params.values(), key=lambda array: array.size).dtype)
    dtypes = json.dumps({name: array.dtype.name for name, array in params.items()}, indent=2) + "\n"
    with replaced_folder(folder) as partial:
        files = {**model.checkpoint.texts(most), **model.checkpoint.files, _DTYPES: dtypes}
        huggingface.write_files(partial, files)
        checkpoints = Checkpoints(partial / _PARAMS, kept=None)
        try:
            checkpoints.save(0, params, {})
        finally:
            checkpoints.close()
