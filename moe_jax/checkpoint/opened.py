"""An opened model: everything in its folder but the weights, read once and checked."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tokenizers

from moe_jax.checkpoint import beside, eight_bits, families, hub, huggingface, reading, stacked
from moe_jax.checkpoint.families import Family
from moe_jax.checkpoint.quantization import blocks_of
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.checkpoint.tables import read_json, read_tables
from moe_jax.config.architecture import Architecture
from moe_jax.dispatch.placement import ExpertPlacement
from moe_jax.kernels import quantized
from moe_jax.model.sharding import wait_for_all
from moe_jax.routing import calibration as calibrations
from moe_jax.routing.calibration import Calibration
from moe_jax.text.tokenizer import END_OF_TEXT_ID, load_tokenizer, tokenizer_files

LAYOUTS = ("huggingface", "stacked")


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model without its weights, which `read` and `load` return. `open` makes one.

    Attributes:
        architecture: its shape.
        family: the layout of its config.json and names of tensors.
        config: all fields of config.json.
        generation_config: all fields of generation_config.json.
        files: every other small file, by name.
        tokenizer: None if there is none.
        calibration: measurements that some policies need; None if there are none, or they were not requested.
        folder: holds its weights; None for a model that is not stored yet.
        fetch: fetches the weights into the folder, for a model of a hub.
        table: for a stacked folder, the locations of its parameters; None for any other.
    """

    architecture: Architecture
    family: Family
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    files: Mapping[str, bytes]
    tokenizer: tokenizers.Tokenizer | None = None
    calibration: Calibration | None = None
    folder: pathlib.Path | None = None
    fetch: Callable[[], None] | None = None
    table: Mapping[str, StoredTensor] | None = None

    @property
    def token_ids(self) -> dict[str, int | list[int]]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id`, where given."""
        return beside.token_ids_of(self.config, self.generation_config)

    @property
    def end_ids(self) -> list[int]:
        """The ids of tokens that end a text."""
        return np.atleast_1d(self.token_ids.get("eos_token_id", [])).tolist()

    @property
    def stored_dtype(self) -> str:
        """The most common dtype of its stored weights; bfloat16 if that has eight bits."""
        self._fetch_weights()
        return huggingface.most_common(read_tables(self.folder) if self.table is None else self.table).name

    @property
    def expected_dtype(self) -> str:
        """`stored_dtype`, but as config.json states it where the weights would have to be fetched first."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        return stated if stated and self.fetch is not None else self.stored_dtype

    def eight_bits(self, expert_dtype: str) -> str:
        """The dtype of the routed experts' weights in memory if they are in eight bits, otherwise "".

        As config.json states it where the weights would have to be fetched first.

        Args:
            expert_dtype: as `load` takes it.
        """
        eight_bits.require_expert_dtype(expert_dtype)
        if expert_dtype != "auto":
            return "" if expert_dtype == "model" else expert_dtype
        if blocks_of(self.config) is None or self.table is not None or not eight_bits.keeps_stored():
            return ""
        if self.fetch is not None:
            return quantized.FLOAT8
        found = huggingface.stacks_of(self.folder, self.config, self.family, self.architecture, "auto", "auto")
        return next((stack.dtype.name for stack in found if stack.block is not None), "")

    def _fetch_weights(self) -> None:
        if self.fetch is not None:
            self.fetch()

    def require_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer; ValueError if there is none."""
        if self.tokenizer is None:
            path = self.folder / "tokenizer.json"
            raise ValueError(f"{path} is missing: a model's folder holds the tokenizer that it was trained with")
        return self.tokenizer

    def read(self, dtype: str = "auto", expert_dtype: str = "model") -> dict[str, Any]:
        """Reads the weights into host memory.

        Args:
            dtype: as `load` takes it.
            expert_dtype: as `load` takes it.

        Returns:
            A nested dict of NumPy arrays (bfloat16 from `ml_dtypes`), or `Quantized` ones. Arrays of a stacked folder
            are mapped from its file.

        Raises:
            ValueError: as `load`.
        """
        stacks = self._stacks(dtype, expert_dtype)
        return huggingface.nested(reading.read_whole(self.folder, stacks, blocks_of(self.config)))

    def load(
        self,
        dtype: str = "auto",
        sharding_of: reading.ShardingOf = lambda parameter: None,
        placement: ExpertPlacement | None = None,
        expert_dtype: str = "model",
    ) -> dict[str, Any]:
        """Loads the weights onto devices.

        Args:
            dtype: the dtype of every parameter but those that always stay in float32; "auto": as stored. See
                `huggingface.stacks_of`.
            sharding_of: gives the sharding of a parameter; for each device only its own slices are read from the file.
                None: whole, on the default device.
            placement: of the experts, as `Layout` has it; None: each once, in order.
            expert_dtype: of the routed experts' weights, which are `Quantized` in eight bits. "model": those of any
                other parameter; "auto": "float8_e4m3fn" if all of them are stored so, otherwise, and on a GPU, "model";
                "int8" or "float8_e4m3fn": quantised tensor by tensor, unless they are stored so.

        Returns:
            A nested dict of arrays.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape, truncated, or not finite in that dtype; the
                model does not fit in the memory that is available; or the calibration is of another model.
        """
        stacks = [reading.place_experts(stack, placement) for stack in self._stacks(dtype, expert_dtype)]
        params = reading.load_onto_devices(self.folder, stacks, blocks_of(self.config), sharding_of)
        if self.calibration is not None:
            self.calibration.require(params["moe/router/weight_LED"])
        return huggingface.nested(params)

    def _stacks(self, dtype: str, expert_dtype: str = "model") -> list[reading.Stack]:
        huggingface.require_dtype(dtype)
        self._fetch_weights()
        if self.table is not None:
            stacks = stacked.stacks_of(self.table, self.architecture, dtype)
            return eight_bits.with_experts_in(expert_dtype, stacks, None)
        return huggingface.stacks_of(self.folder, self.config, self.family, self.architecture, dtype, expert_dtype)

    def save(
        self,
        path: str | os.PathLike,
        params: Mapping[str, Any],
        *,
        layout: str = "huggingface",
        dtype: str = "auto",
        replace: bool = False,
        shard_bytes: int = huggingface.SHARD_BYTES,
    ) -> None:
        """Writes a folder of this model with some weights; it appears whole, or not at all.

        Args:
            path: the new folder; it must not exist yet, or be empty.
            params: a nested dict of arrays, as `read` and `load` return it.
            layout: one of `LAYOUTS`; transformers and other servers load "huggingface".
            dtype: the dtype of the weights; "auto": as they are in memory.
            replace: whether to replace an existing folder, with everything in it.
            shard_bytes: as `huggingface.write_checkpoint` takes it.

        Raises:
            ValueError: `path` is taken, or a weight is not finite in that dtype.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout = {layout!r}: expected one of {', '.join(LAYOUTS)}")
        if layout == "stacked":
            stacked.write(path, self.architecture, params, self.texts, self.files, dtype=dtype, replace=replace)
        else:
            huggingface.write_checkpoint(
                path,
                self.architecture,
                params,
                dtype=dtype,
                model_type=self.family.model_type,
                token_ids=self.token_ids,
                config=self.config,
                generation_config=self.generation_config,
                extra_files=self.files,
                replace=replace,
                shard_bytes=shard_bytes,
            )
        wait_for_all(f"{path} is written")

    def texts(self, dtype: np.dtype) -> dict[str, str]:
        """The text of config.json and generation_config.json, for the dtype of most weights."""
        fields = huggingface.config_fields(self.family, self.architecture)
        return huggingface.config_texts(fields, dtype, self.token_ids, self.config, self.generation_config)

    def with_architecture(self, architecture: Architecture) -> "Checkpoint":
        """The same model with other numbers of experts, active or in total, without the calibration of the old one."""
        if architecture == self.architecture:
            return self
        files = beside.without_calibration(self.files)
        return dataclasses.replace(self, architecture=architecture, files=files, calibration=None)

    def for_new_weights(self) -> "Checkpoint":
        """The model for new weights: without the calibration of the old ones, and without pages about them."""
        files = beside.without_pages(beside.without_calibration(self.files))
        return dataclasses.replace(self, files=files, calibration=None, folder=None, fetch=None, table=None)


def open(
    path: str | os.PathLike, *, calibration: str | os.PathLike | None = "", setting: str = "model.path"
) -> Checkpoint:
    """Opens a model: reads each of its small files once, and checks it.

    Args:
        path: a folder in Hugging Face or stacked layout, or the name of a model on a hub, see `hub.find`, whose weights
            are fetched on first use.
        calibration: a file that `launch/calibrate.py` wrote for this model; "": calibration.npz in the folder, if
            there is one; None: none.
        setting: gave the path, for messages.

    Raises:
        ValueError: there is no such model, its type is not supported, one of its fields asks for something that is not
            implemented, or a file is damaged; the message says which.
    """
    folder, fetch = hub.find(path, setting)
    config, generation = read_json(folder / "config.json", setting), folder / "generation_config.json"
    generation_config = read_json(generation) if generation.exists() else {}
    try:
        family, architecture = huggingface.describe(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    try:
        beside.token_ids_of(config, generation_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Checkpoint(
        architecture,
        family,
        config,
        generation_config,
        beside.read_files(folder),
        load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None,
        None if calibration is None else calibrations.find(calibration, folder),
        folder,
        fetch,
        stacked.read_table(folder, architecture) if stacked.is_stacked(folder) else None,
    )


def new(architecture: Architecture, tokenizer: tokenizers.Tokenizer) -> Checkpoint:
    """A model that was trained here from scratch, with a tokenizer from `text.tokenizer`; it is not stored yet."""
    token_ids = dict.fromkeys(beside.TOKEN_IDS, END_OF_TEXT_ID)
    files = tokenizer_files(tokenizer, architecture.decoder.max_context)
    return Checkpoint(architecture, families.OWN, token_ids, {}, files, tokenizer)
