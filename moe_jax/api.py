"""The public names: load a model, ask it for logits and completions, save it."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.beside import Beside, read_beside
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import SamplingConfig
from moe_jax.engine import cache as caches
from moe_jax.engine.generate import Completion, Engine
from moe_jax.engine.request import AnyPolicy, execution_of, make_requests, policy_of_each
from moe_jax.model import decoder
from moe_jax.model.finite import require_finite
from moe_jax.routing import calibration as calibrations
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.text.tokenizer import load_tokenizer


class Model:
    """A model in memory, on the default device. `load` makes one.

    Attributes:
        architecture: its shape, as `config.json` says.
        tokenizer: None where its folder has none.
        calibration: what `median` and `reroute` have to know of it; None where it was not measured.
        engine: what generates.
    """

    def __init__(
        self,
        architecture: Architecture,
        params: decoder.Params,
        tokenizer: tokenizers.Tokenizer | None,
        *,
        model_type: str,
        token_ids: Mapping[str, int | Sequence[int]],
        tokenizer_files: Mapping[str, bytes],
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        calibration: Calibration | None = None,
    ):
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.calibration = calibration
        files = dict(tokenizer_files)
        self._beside = Beside(model_type, dict(token_ids), files, dict(config or {}), dict(generation_config or {}))
        self.engine = Engine(params, tokenizer, np.atleast_1d(token_ids.get("eos_token_id", [])).tolist())

    @property
    def params(self) -> decoder.Params:
        """The weights, a nested dict of arrays: the seam for anything that `moe_jax` does not do itself."""
        return self.engine.params

    def logits(self, tokens_BT, *, policy: AnyPolicy | Sequence[AnyPolicy] = None, k_max: int = 0) -> np.ndarray:
        """Scores every next token behind every position.

        Lengths and rows are rounded up to buckets: within one, nothing is compiled anew. A batch-aware policy sees what
        it would see if the rows were decoded together, a position at a time.

        Args:
            tokens_BT: integer ids; position t sees positions 0 to t of its row.
            policy: which experts run: a spec such as "topk:4", a policy, None for the model's own k, or a sequence with
                one of these for each row.
            k_max: static slots per token, at least what any policy asks for; 0: the model's own k.

        Returns:
            logits_BTV float32.

        Raises:
            ValueError: ids are not of the vocabulary, a row is longer than the context, or a policy does not fit.
            NotFiniteError: a logit is NaN or infinite; a ValueError too.
        """
        tokens_BT = np.asarray(tokens_BT)
        trunk = self.architecture.decoder
        if tokens_BT.ndim != 2 or not tokens_BT.size or not np.issubdtype(tokens_BT.dtype, np.integer):
            raise ValueError(f"tokens_BT is {tokens_BT.dtype}{list(tokens_BT.shape)}: wanted whole numbers [B, T]")
        batch, length = tokens_BT.shape
        if length > trunk.max_context:
            raise ValueError(f"tokens_BT has {length} positions: wanted at most the model's {trunk.max_context}")
        if tokens_BT.min() < 0 or tokens_BT.max() >= trunk.vocab_size:
            wrong = tokens_BT.min() if tokens_BT.min() < 0 else tokens_BT.max()
            raise ValueError(f"tokens_BT has the token {wrong}: wanted 0 to {trunk.vocab_size - 1}")
        execution = execution_of(self.architecture, k_max)
        policy_B = policy_of_each(policy, batch, self.calibration)
        rows = caches.round_up(batch)
        padding = ((0, rows - batch), (0, caches.length_bucket(length, trunk.max_context) - length))
        live = policies.settings(policy_B + policy_B[:1] * (rows - batch), self.architecture, execution.k_max)
        segments_BT = np.pad(np.ones_like(tokens_BT, np.int32), padding)
        tokens_BT = np.pad(tokens_BT.astype(np.int32), padding)
        logits_BTV = np.asarray(_logits(self.params, tokens_BT, segments_BT, live, execution=execution))
        require_finite(logits_BTV[:batch, :length], "logits", self.params)
        return logits_BTV[:batch, :length]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int,
        policy: AnyPolicy | Sequence[AnyPolicy] = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        k_max: int = 0,
        on_text: Callable[[int, str], object] = lambda index, piece: None,
    ) -> list[Completion]:
        """Continues prompts, all in one batch.

        Policies and sampling settings are data: changing them compiles nothing, and neither does another prompt length
        or one more prompt within a bucket. Only which batch-aware kinds occur in a batch is part of the program.

        Args:
            prompts: texts, or token ids that are taken as they are.
            max_new_tokens: for each prompt; the model's context ends a completion earlier.
            policy: which experts run: a spec such as "topk:4", a policy, None for the model's own k, or a sequence with
                one of these for each prompt.
            temperature: 0 takes the best token; else what logits are divided by.
            top_k: draw among so many of the best tokens; 0: all.
            top_p: draw among the best tokens whose probabilities add up to this.
            seed: of the draws; one for all, or one for each prompt. A prompt's draws depend on its seed alone, not on
                what runs beside it: the same prompt twice wants two seeds.
            stop: strings that end a completion, itself left out; one may name special tokens, such as "<|im_end|>".
            k_max: static slots per token, at least what any policy asks for; 0: the model's own k.
            on_text: called with a prompt's index and the next piece of its text, as soon as that is certain.

        Returns:
            A completion for each prompt, in order.

        Raises:
            ValueError: an argument is refused, the model has no tokenizer, or the cache does not fit in memory.
            NotFiniteError: a token's log-probability is NaN or infinite; a ValueError too.
        """
        if self.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer.json: wanted one, to generate text")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p, stop)
        execution = execution_of(self.architecture, k_max)
        settings = {"sampling": sampling, "policy": policy, "seed": seed, "calibration": self.calibration}
        requests = make_requests(prompts, self.tokenizer, execution, **settings)
        return self.engine.run(requests, execution, on_text).completions

    def save(self, path: str | os.PathLike, *, dtype: str = "auto") -> None:
        """Writes a folder in Hugging Face layout that `load` and other programs read.

        Beside the weights it has what the model's folder had: the tokenizer, chat templates, all fields of config.json
        and generation_config.json, code, licences, and any other file of at most 100 MB.

        Args:
            path: where; it must not exist yet, or be an empty folder.
            dtype: of the weights. "auto": as they are in memory.

        Raises:
            ValueError: `path` is taken, or a weight is not finite in that dtype.
        """
        huggingface.write_checkpoint(path, self.architecture, self.params, dtype=dtype, **self._beside.options())


def load(path: str | os.PathLike, *, dtype: str = "auto", calibration: str | os.PathLike | None = "") -> Model:
    """Loads a model onto the default device.

    Args:
        path: a folder in Hugging Face layout.
        dtype: of weights and activations: "float32", "bfloat16", "float16", or "auto": as stored.
        calibration: a file that `launch/calibrate.py` wrote for this model, for the policies that want one; "":
            calibration.npz in the folder, where there is one; None: none.

    Raises:
        ValueError: there is no such folder, its model is not supported, a file is damaged or beyond the memory, or the
            calibration is of another model.
    """
    folder = pathlib.Path(path)
    huggingface.read_architecture(folder)  # what is quickly told is told first
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    calibrated = None if calibration is None else calibrations.find(calibration, folder)
    architecture, params = huggingface.read_checkpoint(folder, dtype)
    if calibrated is not None:
        calibrated.require(params["moe"]["router"]["weight_LED"])
    beside = read_beside(folder)
    return Model(
        architecture,
        _moved_to_device(params),
        tokenizer,
        model_type=beside.model_type,
        token_ids=beside.token_ids,
        tokenizer_files=beside.files,
        config=beside.config,
        generation_config=beside.generation_config,
        calibration=calibrated,
    )


def _moved_to_device(params: dict[str, Any]) -> decoder.Params:
    """Moves arrays one at a time, emptying the tree that held them: nothing but the largest is held twice.

    On a CPU nothing is: JAX takes over the memory in which `read_checkpoint` laid them.
    """
    moved = {}
    while params:
        name, value = params.popitem()
        if isinstance(value, dict):
            moved[name] = _moved_to_device(value)
        else:
            moved[name] = jax.device_put(value, may_alias=True).block_until_ready()
    return moved


@functools.partial(jax.jit, static_argnames="execution")
def _logits(params, tokens_BT, segments_BT, live, *, execution):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    rows = (tokens_BT, positions_BT, segments_BT)
    x_BTD, _ = decoder.hidden(params, *rows, live, execution, side_by_side=True, in_stacks=True)
    return decoder.logits(params, x_BTD, execution.kernels.projection)
