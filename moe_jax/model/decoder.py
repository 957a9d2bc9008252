"""The decoder, dense and MoE layers: whole sequences for training and scoring, prefill and decode with a cache."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture
from moe_jax.config.layer_order import Block, Layer
from moe_jax.kernels import chooser
from moe_jax.model import attention, latent_attention, parameters, rope
from moe_jax.model.attention import Cache
from moe_jax.model.dtypes import dtype_of, experts_dtype
from moe_jax.model.execution import Execution
from moe_jax.model.layers import Stacked, feed_forward, one_layer, project, rms_norm
from moe_jax.model.low_rank import KEPT, holds_any, merge
from moe_jax.model.moe import ExpertUse, moe_layer
from moe_jax.model.sharding import Layout, constrained, gathered
from moe_jax.model.spread_attention import spread_over
from moe_jax.routing import policies
from moe_jax.routing.policies import Context, Settings
from moe_jax.routing.policies.parse import MODEL_OWN

ATTENTION = {"grouped": attention, "latent": latent_attention}  # by `attention.kind`
Params = dict[str, Any]  # nested dicts of arrays, as `split` gives them


class Weights(nnx.Module):
    """A group of parameters: a stack of layers, or a part of one."""


class Decoder(Weights):
    """All parameters of a model as a Flax module, randomly initialised as `parameters.TABLE` says.

    Each kind of parameter has its own type. `split` gives the parameters to the functions below. Calling the module
    runs whole sequences with the model's own number of experts.
    """

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.architecture = architecture
        for parameter in parameters.of(architecture):
            owner = self
            for module in parameter.modules:
                if not hasattr(owner, module):
                    setattr(owner, module, Weights())
                owner = getattr(owner, module)
            setattr(owner, parameter.path.rsplit("/", 1)[-1], parameter.initialize(architecture, rngs))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """float32 logits_BTV of whole texts, with the model's own number of experts; differentiable."""
        architecture, (batch, length) = self.architecture, tokens_BT.shape
        params = split(self)
        kernels = chooser.resolve(jax.default_backend(), architecture, experts_dtype(params))
        execution = Execution(architecture, architecture.moe.k, kernels)
        live = policies.settings([MODEL_OWN] * batch, architecture, architecture.moe.k)
        positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        rows = (tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        x_BTD, _ = hidden(params, *rows, live, execution, prefixes=False)
        return logits(params, x_BTD)


def split(decoder: Decoder) -> Params:
    """Returns the parameters as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(decoder))


def _one_layer(weights: Params, modules: tuple[str, ...], layer: jax.Array | int, projection: str = "") -> Params:
    """Takes one layer out of every stack, dropping the L of its name.

    Args:
        weights: stacks.
        modules: their path in the tree of all parameters.
        layer: index into the stacks.
        projection: the implementation that reads matrices within their stacks, which are then not taken out; "": all
            are taken out.
    """

    def take(name, value):
        if isinstance(value, dict):
            return _one_layer(value, (*modules, name), layer, "" if name == "router" else projection)
        if projection and value.ndim > 2 and parameters.find((*modules, name)).kind is parameters.Matrix:
            return Stacked(value, layer, projection)
        return jax.tree.map(lambda stack: one_layer(stack, layer), value)  # a `LowRank` is three stacks

    return {name.replace("_L", "_"): take(name, value) for name, value in weights.items()}


def _layer(x_BTD, weights, cos_sin, core, ffn, execution):
    """One pre-norm layer; `core` mixes positions, `ffn` gets tokens normed and as they are; what both report."""
    architecture = execution.architecture
    eps = architecture.decoder.norm_eps
    with jax.named_scope("attention"):
        normed = rms_norm(x_BTD, weights["attention_norm_D"], eps)
        kind, attention_weights = ATTENTION[architecture.attention.kind], weights["attention"]
        mixed_BTHX, from_core = core(kind.heads(normed, attention_weights, cos_sin, architecture.attention, eps))
        x_BTD = x_BTD + project(mixed_BTHX, attention_weights[kind.OUTPUT], 2)
    with jax.named_scope("ffn"):
        normed = rms_norm(x_BTD, weights["ffn_norm_D"], eps)
        y_ND, from_ffn = ffn(*(x.reshape(-1, x.shape[-1]) for x in (normed, x_BTD)))
    return constrained(x_BTD + y_ND.reshape(x_BTD.shape), "BTD", execution.layout), from_core, from_ffn


def _dense_ffn(weights):
    return lambda x_ND, _: (feed_forward(x_ND, weights["ffn"]), None)


def _moe_ffn(weights, experts, layer: Layer, live, context, execution):
    """A MoE feed-forward; the `ExpertUse` of a layer with fewer experts than the largest is padded to that size."""
    most, moe = execution.architecture.moe.num_experts, layer_order.moe_of(execution.architecture, layer.stack)
    k_max = min(execution.k_max, moe.num_experts)

    def run(x_ND, _):
        kernel, how = execution.kernels.grouped_matmul, execution.dispatch.of(len(x_ND))
        y_ND, use = moe_layer(x_ND, weights, experts, layer.index, live, context, moe, k_max, kernel, how)
        if moe.num_experts == most:
            return y_ND, use
        load_E = jnp.pad(use.load_E, (0, most - moe.num_experts))
        chosen_NK = jnp.pad(use.chosen_NK, ((0, 0), (0, execution.k_max - k_max)), constant_values=-1)
        return y_ND, use._replace(load_E=load_E, chosen_NK=chosen_NK)

    return run


def _context(column: jax.Array, valid_BT: jax.Array, steps: int) -> Context:
    batch, length = valid_BT.shape
    return Context(column, jnp.repeat(jnp.arange(batch), length), valid_BT.reshape(-1), steps)


def _embed(params: Params, tokens_BT: jax.Array, layout: Layout | None) -> jax.Array:
    embedding_VD = _top(params, "embedding_VD", layout)
    return constrained(embedding_VD[tokens_BT].astype(dtype_of(params)), "BTD", layout)


def _top(params: Params, name: str, layout: Layout | None) -> jax.Array:
    """A matrix outside of all layers, whole along D."""
    return gathered({name: params[name]}, (), layout)[name]


def hidden(
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    live: Settings,
    execution: Execution,
    *,
    side_by_side: bool = False,
    in_stacks: bool = False,
    remat: bool = False,
    prefixes: bool = True,
) -> tuple[jax.Array, ExpertUse]:
    """Runs whole sequences, for training and scoring; `logits` applies the output head to the result.

    Args:
        params: as `split` gives them; matrices of attention and experts may be `LowRank`.
        tokens_BT: int32 ids.
        positions_BT: int32, counted within each segment.
        segments_BT: int32; a position sees its own segment and negative segments, which are shared prefixes of their
            row; 0 is padding, which is sent to no expert.
        live: settings of the policy.
        execution: the static half.
        side_by_side: whether all rows at one position form a decode step, in which batch-aware policies act; otherwise
            rows are read like prompts.
        in_stacks: whether weights are read within their stacks; this has no gradient. Otherwise each layer is copied
            out of its stack, so its gradient is only as large as the layer. Ignored if some weights are `LowRank`.
        remat: whether the backward pass recomputes each layer of a loop from its input instead of keeping its
            activations: only the input of each layer is kept, at a third more time.
        prefixes: whether some segments may be negative; without them more implementations of attention can run.

    Returns:
        normed x_BTD, and the `ExpertUse` of the MoE layers stacked, L first.
    """
    rows = (tokens_BT, positions_BT, segments_BT)
    settings = {"side_by_side": side_by_side, "in_stacks": in_stacks, "remat": remat, "prefixes": prefixes}
    x_BTD, use, _ = _whole(params, *rows, live, execution, lambda *inputs: None, **settings)
    return rms_norm(x_BTD, params["norm_D"], execution.architecture.decoder.norm_eps), use


def moe_inputs(params: Params, tokens_BT: jax.Array, live: Settings, execution: Execution) -> tuple[jax.Array, ...]:
    """The inputs of every MoE layer on whole sequences: normed x_LND, and before the norm, the residual stream.

    Padding may follow a sequence: it changes no input before it, and has inputs itself.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    rows = (tokens_BT, positions_BT, jnp.ones_like(positions_BT))
    return _whole(params, *rows, live, execution, lambda *inputs: inputs, in_stacks=True)[2]


def _whole(
    params,
    tokens_BT,
    positions_BT,
    segments_BT,
    live,
    execution,
    observe,
    *,
    side_by_side=False,
    in_stacks=False,
    remat=False,
    prefixes=False,
):
    """Runs all layers over whole sequences: x_BTD, the use of experts, and `observe` of each MoE layer's inputs."""
    architecture = execution.architecture
    cos_sin = rope.angles(positions_BT, architecture.attention)
    x_BTD = _embed(params, tokens_BT, execution.layout)

    mix = spread_over(execution)

    def core(heads):
        return heads.causal(segments_BT, mix, prefixes=prefixes), None

    adapted = holds_any(params)
    spread = execution.layout is not None and execution.layout.fsdp
    by_layer = adapted or spread or not in_stacks  # each layer is taken out of its stack
    projection = "" if by_layer else execution.kernels.projection
    steps = tokens_BT.shape[1] if side_by_side else 0

    def run(layer, x_BTD, stack):
        if by_layer:
            stack = gathered(merge(stack), (layer.stack,), execution.layout)
        others = {name: part for name, part in stack.items() if name != "experts"}
        weights = _one_layer(others, (layer.stack,), layer.index, projection)
        if not layer.is_moe:
            x_BTD, _, _ = _layer(x_BTD, weights, cos_sin, core, _dense_ffn(weights), execution)
            return x_BTD, None
        context = _context(layer.column, segments_BT != 0, steps)
        ffn = _moe_ffn(weights, stack["experts"], layer, live, context, execution)

        def observed_ffn(*inputs):
            y_ND, use = ffn(*inputs)
            return y_ND, (use, observe(*inputs))

        x_BTD, _, seen = _layer(x_BTD, weights, cos_sin, core, observed_ffn, execution)
        return x_BTD, seen

    def recomputed(layer):  # the layer, with the part that the backward pass recomputes
        if remat:
            return jax.checkpoint(functools.partial(run, layer))
        return jax.checkpoint(functools.partial(run, layer), policy=KEPT) if adapted else functools.partial(run, layer)

    def one_pass(block, x_BTD, scanned):
        time, own = scanned
        seen = []
        for layer, place in zip(block.at(time), block.places, strict=True):
            stack = params[layer.stack]
            if by_layer:  # as a stack of one
                stack, layer = _alone(own[layer.stack], place), layer._replace(index=jnp.int32(0))
            x_BTD, seen_here = recomputed(layer)(x_BTD, stack)
            seen += [seen_here] if layer.is_moe else []
        return x_BTD, seen[0] if len(seen) == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *seen)

    seen = []
    for block in layer_order.blocks(architecture):
        if not block.is_moe:
            for layer in itertools.chain(*map(block.at, range(block.times))):
                stack = params[layer.stack]
                if by_layer:
                    stack, layer = _alone(stack, layer.index), layer._replace(index=0)
                x_BTD, _ = recomputed(layer)(x_BTD, stack)
            continue
        own = {stack: _by_pass(params[stack], stack, block) for stack in block.stacks} if by_layer else None
        times = jnp.arange(block.times, dtype=jnp.int32)
        x_BTD, seen_in_block = lax.scan(functools.partial(one_pass, block), x_BTD, (times, own))
        if block.num_moe > 1:
            seen_in_block = jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), seen_in_block)
        seen.append(seen_in_block)
    use, observed = seen[0] if len(seen) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)
    return x_BTD, use, observed


def _alone(stack: Params, index: int) -> Params:
    """One layer of a stack, as a stack of one."""
    return jax.tree.map(lambda weight: weight[index : index + 1], stack)


def _by_pass(weights: Params, stack: str, block: Block) -> Params:
    """The layers of a stack that run in a block, with leading axes: passes of the block, layers of one pass."""
    first, count = block.first(stack), block.stride(stack)

    def split_passes(weight):
        return weight[first : first + block.times * count].reshape(block.times, count, *weight.shape[1:])

    return jax.tree.map(split_passes, weights)


def head(params: Params, layout: Layout | None = None) -> jax.Array:
    """The output projection [V, D], whole along D; the embedding if they are tied."""
    return _top(params, "head_VD" if "head_VD" in params else "embedding_VD", layout)


def logits(params: Params, x_BTD: jax.Array, projection: str = "") -> jax.Array:
    """float32 logits_BTV from the result of `hidden` or `extend`.

    `projection` is the implementation of the product; "": one that has a gradient.
    """
    head_VD = head(params)
    return project(x_BTD, Stacked(head_VD[None], 0, projection) if projection else head_VD, dtype=jnp.float32)


def extend(
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    start_B: jax.Array | None,
    valid_BT: jax.Array,
    live: Settings,
    execution: Execution,
) -> tuple[jax.Array, Cache, ExpertUse]:
    """Appends tokens to cached sequences: a prompt or the next part of one (prefill), or one token each (decode).

    Experts are read from the whole stack by layer index; no layer's experts are copied out of it.

    Args:
        params: as `split` gives them.
        cache: keys and values of the earlier positions.
        tokens_BT: int32 ids; rows may be padded at their end. T > 1 is a prefill, in which no policy is batch-aware.
        start_B: int32, the position of each row's first token; the cache has room for T from there on. None: a prefill
            of empty sequences, which does not read the cache.
        valid_BT: bool, False for padding and for finished rows.
        live: settings of the policy.
        execution: the static half.

    Returns:
        normed x_BTD, the cache with these positions in it, and the `ExpertUse` of the MoE layers, L first.
    """
    architecture = execution.architecture
    batch, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens_BT.shape)
    if start_B is not None:
        positions_BT = start_B[:, None] + positions_BT
    is_step = start_B is not None and length == 1
    cos_sin = rope.angles(positions_BT, architecture.attention)
    x_BTD = _embed(params, tokens_BT, execution.layout)

    mix = spread_over(execution)

    def core(layer, cache):
        def run(heads):
            if is_step:
                return heads.step(cache, layer, start_B, execution.kernels.cached_attention)
            # padding writes to the cache too; the tokens that follow overwrite it before it is read
            if start_B is not None:
                return heads.extend(cache, layer, start_B, mix)
            mixed_BTHX = heads.causal(None, mix, prefixes=False)
            return mixed_BTHX, cache.opened(heads.kept, layer)

        return run

    def one_pass(block, time, carried):
        for layer in block.at(time):
            x_BTD, cache, use = carried
            others = {name: part for name, part in params[layer.stack].items() if name != "experts"}
            weights = _one_layer(others, (layer.stack,), layer.index, execution.kernels.projection)
            ffn = _dense_ffn(weights)
            if layer.is_moe:
                context = _context(layer.column, valid_BT, 1 if is_step else 0)
                ffn = _moe_ffn(weights, params[layer.stack]["experts"], layer, live, context, execution)
            x_BTD, cache, new = _layer(x_BTD, weights, cos_sin, core(layer.number, cache), ffn, execution)
            if layer.is_moe:
                put = functools.partial(lax.dynamic_update_index_in_dim, index=layer.column, axis=0)
                use = jax.tree.map(put, use, new)
            carried = x_BTD, cache, use
        return carried

    num_moe = architecture.decoder.num_moe_layers
    zeros = ExpertUse(
        jnp.zeros((num_moe, architecture.moe.num_experts), jnp.int32),
        jnp.zeros(num_moe, jnp.float32),
        jnp.zeros(num_moe, jnp.float32),
        jnp.zeros((num_moe, batch * length, execution.k_max), jnp.int32),
        jnp.zeros(num_moe, jnp.int32),
    )
    carried = x_BTD, cache, zeros
    for block in layer_order.blocks(architecture):
        if block.is_moe:
            carried = lax.fori_loop(0, block.times, functools.partial(one_pass, block), carried)
        else:
            for time in range(block.times):
                carried = one_pass(block, time, carried)
    x_BTD, cache, use = carried
    return rms_norm(x_BTD, params["norm_D"], architecture.decoder.norm_eps), cache, use
