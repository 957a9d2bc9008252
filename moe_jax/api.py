"""The public Python interface: load a model, compute logits, generate text, save it."""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint
from moe_jax.checkpoint import Checkpoint
from moe_jax.config.mesh import MeshConfig
from moe_jax.config.schema import SamplingConfig
from moe_jax.engine import cache as caches
from moe_jax.engine.generate import Completion, Engine
from moe_jax.engine.request import AnyPolicy, execution_of, make_requests, policy_of_each
from moe_jax.model import decoder, dtypes
from moe_jax.model.finite import require_finite
from moe_jax.model.sharding import Layout, layout_of, on_all, sharding_of, whole
from moe_jax.routing import policies


class Model:
    """A model in memory, on one device or a mesh. `load` makes one.

    Attributes:
        checkpoint: everything in its folder but the weights.
        architecture: its shape, from `config.json`.
        tokenizer: None if its folder has none.
        calibration: measurements that the policies `median` and `reroute` need; None if there are none.
        engine: generates text.
        layout: where its parameters lie on a mesh; None: on one device.
    """

    def __init__(self, checkpoint: Checkpoint, params: decoder.Params, layout: Layout | None = None):
        self.checkpoint = checkpoint
        self.layout = layout
        self.architecture = checkpoint.architecture
        self.tokenizer = checkpoint.tokenizer
        self.calibration = checkpoint.calibration
        self.engine = Engine(params, checkpoint.tokenizer, checkpoint.end_ids)

    @property
    def params(self) -> decoder.Params:
        """The weights, a nested dict of arrays, for anything that `moe_jax` does not do itself."""
        return self.engine.params

    def logits(self, tokens_BT, *, policy: AnyPolicy | Sequence[AnyPolicy] = None, k_max: int = 0) -> np.ndarray:
        """Computes the logits of the next token at every position.

        Lengths and numbers of rows are rounded up to buckets; shapes in one bucket share a compiled program. A
        batch-aware policy acts as if the rows were decoded together, one position at a time.

        Args:
            tokens_BT: integer ids; position t sees positions 0 to t of its row.
            policy: which experts run: a spec such as "topk:4", a policy, None for the model's own k, or a sequence with
                one of these for each row.
            k_max: static slots per token, at least the most that any policy keeps; 0: the model's own k.

        Returns:
            logits_BTV float32.

        Raises:
            ValueError: an id is outside the vocabulary, rows are longer than the context, or a policy does not fit.
            NotFiniteError: a logit is NaN or infinite; this is a ValueError too.
        """
        tokens_BT = np.asarray(tokens_BT)
        trunk = self.architecture.decoder
        if tokens_BT.ndim != 2 or not tokens_BT.size or not np.issubdtype(tokens_BT.dtype, np.integer):
            raise ValueError(f"tokens_BT is {tokens_BT.dtype}{list(tokens_BT.shape)}: expected whole numbers [B, T]")
        batch, length = tokens_BT.shape
        if length > trunk.max_context:
            raise ValueError(f"tokens_BT has {length} positions: expected at most the model's {trunk.max_context}")
        if tokens_BT.min() < 0 or tokens_BT.max() >= trunk.vocab_size:
            wrong = tokens_BT.min() if tokens_BT.min() < 0 else tokens_BT.max()
            raise ValueError(f"tokens_BT has the token {wrong}: expected 0 to {trunk.vocab_size - 1}")
        execution = self._execution(k_max)
        policy_B = policy_of_each(policy, batch, self.calibration)
        rows = caches.round_up(batch, execution.data_parts)
        padding = ((0, rows - batch), (0, caches.length_bucket(length, trunk.max_context) - length))
        live = policies.settings(policy_B + policy_B[:1] * (rows - batch), self.architecture, execution.k_max)
        segments_BT = np.pad(np.ones_like(tokens_BT, np.int32), padding)
        tokens_BT = np.pad(tokens_BT.astype(np.int32), padding)
        given = on_all((tokens_BT, segments_BT, live), self.layout)
        logits_BTV = np.asarray(_logits(self.params, *given, execution=execution))
        require_finite(logits_BTV[:batch, :length], "logits", self.params)
        return logits_BTV[:batch, :length]

    def _execution(self, k_max: int) -> decoder.Execution:
        settings = {"dtype": dtypes.experts_dtype(self.params), "expert_dtype": dtypes.eight_bits_of(self.params)}
        return execution_of(self.architecture, k_max, layout=self.layout, **settings)

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

        Changing policies or sampling settings compiles nothing, nor does another prompt length or number of prompts
        within the same bucket. Only the set of batch-aware policies in a batch is part of the compiled program.

        Args:
            prompts: texts, or token ids, which are used as they are.
            max_new_tokens: for each prompt; a completion also ends at the model's context.
            policy: which experts run: a spec such as "topk:4", a policy, None for the model's own k, or a sequence with
                one of these for each prompt.
            temperature: logits are divided by it before sampling; 0: greedy.
            top_k: sample from the k most likely tokens; 0: from all.
            top_p: sample from the most likely tokens whose probabilities add up to this.
            seed: the seed of sampling; one for all, or one for each prompt. A completion depends on its own seed, not
                on the other prompts; for two different samples of one prompt, give two seeds.
            stop: strings that end a completion, which does not include them; may be special tokens, such as
                "<|im_end|>".
            k_max: static slots per token, at least the most that any policy keeps; 0: the model's own k.
            on_text: called with a prompt's index and the next piece of its text, as soon as that is final.

        Returns:
            A completion for each prompt, in order.

        Raises:
            ValueError: an argument is invalid, the model has no tokenizer, or the cache does not fit in memory.
            NotFiniteError: a token's log-probability is NaN or infinite; this is a ValueError too.
        """
        if self.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer.json: expected one, to generate text")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p, stop)
        execution = self._execution(k_max)
        settings = {"sampling": sampling, "policy": policy, "seed": seed, "calibration": self.calibration}
        requests = make_requests(prompts, self.tokenizer, execution, **settings)
        return self.engine.run(requests, execution, on_text).completions

    def save(self, path: str | os.PathLike, *, dtype: str = "auto") -> None:
        """Writes a folder in Hugging Face layout that `load` and other programs read.

        Everything else in the model's folder is kept: the tokenizer, chat templates, all fields of config.json and
        generation_config.json, code, licences, and any other file of at most 100 MB.

        Args:
            path: the new folder; it must not exist yet, or be empty.
            dtype: the dtype of the weights. "auto": as they are in memory.

        Raises:
            ValueError: `path` is taken, a weight is not finite in that dtype, or the experts are placed.
        """
        if self.layout is not None and self.layout.placement is not None:
            raise ValueError("the experts are placed by mesh.placement: expected a model that was loaded without it")
        self.checkpoint.save(path, self.params, dtype=dtype)


def load(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    expert_dtype: str = "auto",
    calibration: str | os.PathLike | None = "",
    mesh: jax.sharding.Mesh | MeshConfig | None = None,
) -> Model:
    """Loads a model onto the default device, or onto a mesh of devices.

    Args:
        path: a folder in Hugging Face layout, a stacked folder from `launch/convert.py`, whose weights are mapped, or
            the name of a model on a hub: "organisation/name" or "organisation/name@revision".
        dtype: the dtype of weights and activations: "float32", "bfloat16", "float16", or "auto": as stored.
        expert_dtype: of the routed experts' weights. "auto": eight bits if they are stored so, as DeepSeek-V3's are,
            otherwise, and on a GPU, `dtype`; "model": always `dtype`; "float8_e4m3fn" or "int8": quantised while they
            are read.
        calibration: a file that `launch/calibrate.py` wrote for this model, for policies that need one; "":
            calibration.npz in the folder, if there is one; None: none.
        mesh: has axes among `data` (rows), `expert` (experts) and `tensor` (heads, hidden widths, vocabulary); each
            device gets its own slices of the weights, and a process reads only those of its devices. As a
            `moe_jax.config.mesh.MeshConfig` it also says how tokens reach their experts, without a capacity. None: one
            device.

    Raises:
        ValueError: there is no such model, it is not supported, a file is damaged, it does not fit in the memory that
            is available, the calibration is of another model, or the mesh does not divide the model.
    """
    opened = checkpoint.open(path, calibration=calibration)
    layout = layout_of(mesh, opened.architecture)
    if layout is not None and layout.capacity:
        raise ValueError(f"mesh.capacity = {layout.capacity}: expected 0; launch/infer.py counts the slots it drops")
    placement = None if layout is None else layout.placement
    return Model(opened, opened.load(dtype, sharding_of(layout), placement, expert_dtype), layout)


@functools.partial(jax.jit, static_argnames="execution")
def _logits(params, tokens_BT, segments_BT, live, *, execution):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    rows = (tokens_BT, positions_BT, segments_BT)
    settings = {"side_by_side": True, "in_stacks": True, "prefixes": False}
    x_BTD, _ = decoder.hidden(params, *rows, live, execution, **settings)
    return whole(decoder.logits(params, x_BTD, execution.kernels.projection), execution.layout)
