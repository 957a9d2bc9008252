"""Converts checkpoints: a Hugging Face folder, a training run or Orbax parameters, to one of the first and the last.

A folder of Orbax parameters holds what a Hugging Face folder does, but for the weights: those lie in `params/`, beside
`params.json`, the dtype of each.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.checkpoint import filling, huggingface
from moe_jax.checkpoint.beside import Beside, read_beside
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config import gin
from moe_jax.config.architecture import Architecture
from moe_jax.engine.request import execution_of
from moe_jax.files import replaced_folder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from moe_jax.text.tokenizer import END_OF_TEXT_ID, load_tokenizer, tokenizer_files
from moe_jax.training.step import start

LAYOUTS = ("huggingface", "orbax")
_PARAMS, _DTYPES, _RUN = "params", "params.json", "run.gin"


class Held(NamedTuple):
    """A model as any layout holds it."""

    architecture: Architecture
    params: Mapping[str, Any]
    beside: Beside


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layout: str = "huggingface",
    dtype: str = "auto",
    policy: str = "model",
    shard_bytes: int = huggingface.SHARD_BYTES,
) -> Held:
    """Reads a checkpoint of any layout and writes it in another.

    Args:
        source: a Hugging Face folder, the folder of a training run, whose last checkpoint is taken, or one of Orbax
            parameters that this function wrote.
        destination: where; it must not exist yet, or be an empty folder.
        layout: one of `LAYOUTS`.
        dtype: of the weights; "auto": as they are.
        policy: becomes the model's own k, so it is the same k in every layer.
        shard_bytes: as `write_checkpoint` takes it.

    Returns:
        What was written.

    Raises:
        ValueError: the source is damaged or unknown, the destination is taken, or the policy is not one k.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: wanted one of {', '.join(LAYOUTS)}")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"{destination} exists already, and nothing is overwritten: choose another path")
    if (source / _RUN).is_file():
        architecture = gin.read_config(source / _RUN).architecture
    else:
        architecture = huggingface.read_architecture(source)
    changed = with_k(architecture, policy)
    if (source / _RUN).is_file():
        held = _read_run(source)
    elif (source / _PARAMS).is_dir():
        held = _read_orbax(source)
    else:
        architecture, params = huggingface.read_checkpoint(source, dtype)
        held = Held(architecture, params, read_beside(source))
    if changed != architecture:
        held = Held(changed, held.params, held.beside.without_calibration())
    if layout == "huggingface":
        options = {"dtype": dtype, "shard_bytes": shard_bytes, **held.beside.options()}
        huggingface.write_checkpoint(destination, changed, held.params, **options)
    else:
        _write_orbax(destination, held, dtype)
    return held


def with_k(architecture: Architecture, policy: str) -> Architecture:
    """The architecture with a policy's k for its own; ValueError where that depends on the token."""
    changed = policies.with_own(parse(policy), architecture)
    if changed is None:
        raise ValueError(
            f"policy.spec = {policy!r}: a checkpoint has one k for all tokens, as topk:4 or layers:8,4 have"
        )
    return changed


def _read_run(folder: pathlib.Path) -> Held:
    config = gin.read_config(folder / _RUN)
    tokenizer = load_tokenizer(config.text.tokenizer or folder / "tokenizer")
    execution = execution_of(config.architecture)
    like = jax.eval_shape(lambda: start(execution, config.training, config.run.seed))
    state, _ = _restore(folder / "checkpoints", like)
    token_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT_ID)
    files = tokenizer_files(tokenizer, config.decoder.max_context)
    return Held(config.architecture, state.whole(), Beside("glm4_moe", token_ids, files))


def _read_orbax(folder: pathlib.Path) -> Held:
    architecture = huggingface.read_architecture(folder)
    held = Held(architecture, {}, read_beside(folder))
    path = folder / _DTYPES
    try:
        dtypes = json.loads(path.read_text(encoding="utf-8"))
        like = {
            rule.parameter: jax.ShapeDtypeStruct(rule.shape(architecture), np.dtype(dtypes[rule.parameter]))
            for rule in FAMILIES[held.beside.model_type].rules(architecture)
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged: wanted the dtype of each parameter ({error!r})") from error
    params, _ = _restore(folder / _PARAMS, like)
    return held._replace(params=huggingface.nested(params))


def _restore(folder: pathlib.Path, like: Any) -> tuple[Any, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: wanted a folder of checkpoints")
    checkpoints = Checkpoints(folder, kept=None)
    try:
        if checkpoints.latest_step is None:
            raise ValueError(f"{folder} holds no checkpoint")
        return checkpoints.restore(checkpoints.latest_step, like)
    finally:
        checkpoints.close()


def _write_orbax(folder: pathlib.Path, held: Held, dtype: str) -> None:
    family, beside = FAMILIES[held.beside.model_type], held.beside
    arrays, params = dict(huggingface.flattened(held.params)), {}
    for rule in family.rules(held.architecture):
        given = np.asarray(arrays[rule.parameter])
        wanted = np.dtype(np.float32 if rule.float32 else given.dtype if dtype == "auto" else dtype)
        if given.dtype != wanted:
            values, given = given, filling.allocate(given.shape, wanted)
            filling.cast_into(given, values)
        filling.require_finite(given, rule.parameter)
        params[rule.parameter] = given
    fields = huggingface.config_fields(family, held.architecture)
    most = np.dtype(max(params.values(), key=lambda array: array.size).dtype)
    texts = huggingface.config_texts(fields, most, beside.token_ids, beside.config, beside.generation_config)
    texts[_DTYPES] = json.dumps({name: array.dtype.name for name, array in params.items()}, indent=2) + "\n"
    with replaced_folder(folder) as partial:
        for name, data in {**texts, **beside.files}.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(data.encode() if isinstance(data, str) else data)
        checkpoints = Checkpoints(partial / _PARAMS, kept=None)
        try:
            checkpoints.save(0, params, {})
        finally:
            checkpoints.close()
