"""What a policy is: a spec that a user writes, and live settings that one compiled step takes as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import Architecture, MoEConfig
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies import batch_aware, capacity, threshold
from moe_jax.routing.policies.part import Model, Part
from moe_jax.routing.selection import Routing, Selection, Slots, top_slots, weigh

ROW_WISE = ("k", "ratio", "ratio_min", "mass", "mass_min", "renormalize")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A parsed spec, before it meets a model: parts that set different columns."""

    parts: tuple[Part, ...]
    # Of the model that it will meet, where a part asks for one; no part of what the policy is.
    calibration: Calibration | None = dataclasses.field(default=None, compare=False)

    @property
    def spec(self) -> str:
        """The text that parses to this policy."""
        return "+".join(part.spec for part in self.parts)

    @property
    def batch_aware(self) -> bool:
        """Whether what a row keeps in a decode step depends on the rows beside it."""
        return any(part.batch_aware for part in self.parts)


class Replay(NamedTuple):
    """Experts that stand in the slots of this step's tokens, in place of the best ones."""

    expert_LNK: jax.Array  # int32; -1: the router's own choice, kept as the policy says
    keep_LNK: jax.Array | None = None  # bool; None: as the policy says


class Settings(NamedTuple):
    """The live half of policies: one row per request, one column per MoE layer.

    Which names `of_BL` has is static. The row-wise ones are always there, at settings that drop nothing where a row's
    policy says nothing of them; those of a batch-aware kind where some row has that kind.
    """

    of_BL: dict[str, jax.Array]
    group_B: jax.Array  # int32: rows of a decode step whose batch-aware policies act together
    similarity_LEE: jax.Array | None = None  # float32, calibrated; where some row reroutes
    replay: Replay | None = None


class Context(NamedTuple):
    """Where a selection is made."""

    layer: jax.Array  # int32 scalar: column of the settings
    row_N: jax.Array  # int32: request of each token
    valid_N: jax.Array  # bool: False for padding and finished rows, which keep nothing
    steps: (
        int  # N = B * steps tokens, each position a decode step of B rows; 0: a prefill, where nothing is batch-aware
    )


def settings(
    policies: Sequence[Policy],
    architecture: Architecture,
    k_max: int,
    group_B: Sequence[int] | np.ndarray | None = None,
) -> Settings:
    """Binds one policy per request to a model.

    Args:
        policies: of each row.
        architecture: of the model.
        k_max: static slots per token.
        group_B: rows with the same number act together in a decode step; None: those with the same policy.

    Raises:
        ValueError: a policy asks for fewer than 1 or more than `k_max` experts, for another number of layers, or for a
            calibration that is not there.
    """
    unlike = {policy: number for number, policy in enumerate(dict.fromkeys(policies))}
    columns = {policy: _columns(policy, _model(architecture, policy)) for policy in unlike}
    for policy, own in columns.items():
        if own["k"].max() > k_max:
            raise ValueError(
                f"policy.spec = {policy.spec!r}: wanted 1 to {k_max} experts in every layer; more need a larger "
                "policy.k_max"
            )
    model = _model(architecture, policies[0])
    spoken_of = {name for own in columns.values() for name in own}
    neutral = threshold.neutral(model)
    for kind in (batch_aware.neutral(model), capacity.neutral(model)):
        neutral |= {name: column_L for name, column_L in kind.items() if name in spoken_of}
    names = [*ROW_WISE, *sorted(neutral.keys() - set(ROW_WISE))]
    of_BL = {
        name: jnp.asarray(np.stack([columns[policy].get(name, neutral.get(name)) for policy in policies]))
        for name in names
    }
    if group_B is None:
        group_B = [unlike[policy] for policy in policies]
    rerouting = [policy.calibration for policy in unlike if "reroute" in columns[policy]]
    similarity_LEE = jnp.asarray(rerouting[0].similarity_LEE) if rerouting else None
    return Settings(of_BL, jnp.asarray(group_B, jnp.int32), similarity_LEE)


def _model(architecture: Architecture, policy: Policy) -> Model:
    moe, num_layers = architecture.moe, architecture.decoder.num_moe_layers
    calibration = policy.calibration
    if calibration is not None and calibration.similarity_LEE.shape != (num_layers, moe.num_experts, moe.num_experts):
        raise ValueError("policy.calibration is of a model with other layers or experts")
    return Model(num_layers, moe.num_experts, moe.k, moe.normalize, calibration, moe.k_of_layers)


def _columns(policy: Policy, model: Model) -> dict[str, np.ndarray]:
    columns = {"k": model.own_k_L}
    for part in policy.parts:
        try:
            columns |= part.columns(model)
        except ValueError as error:
            raise ValueError(f"policy.spec = {policy.spec!r}: {part.spec}: {error}") from error
    return columns


def fixed_k(policy: Policy, architecture: Architecture) -> np.ndarray | None:
    """int32 [L]: how many slots the policy keeps of every token; None where it looks at tokens.

    Raises:
        ValueError: the policy does not fit the model.
    """
    columns = _columns(policy, _model(architecture, policy))
    k_L = columns.pop("k")
    return None if columns else k_L


def uniform_k(policy: Policy, architecture: Architecture) -> int | None:
    """The same where it is one number for all layers; None where there is none.

    Raises:
        ValueError: the policy does not fit the model.
    """
    k_L = fixed_k(policy, architecture)
    return int(k_L[0]) if k_L is not None and (k_L == k_L[0]).all() else None


def with_own(policy: Policy, architecture: Architecture) -> Architecture | None:
    """The architecture whose own k is what the policy keeps; None where that depends on the token.

    Raises:
        ValueError: the policy does not fit the model.
    """
    k_L = fixed_k(policy, architecture)
    if k_L is None:
        return None
    of_layers = () if (k_L == k_L[0]).all() else tuple(map(int, k_L))
    moe = dataclasses.replace(architecture.moe, k=int(k_L.max()), k_of_layers=of_layers)
    return dataclasses.replace(architecture, moe=moe)


def select(routing: Routing, live: Settings, context: Context, moe: MoEConfig, k_max: int) -> Selection:
    """Keeps slots of each valid token, as its request's policy says for this layer.

    The first k are dropped by weight; in a decode step, what remains passes through the batch-aware policies in the
    order of `_batch_aware`. Then the slots are weighted. Where routing is replayed, the given experts stand in the
    slots instead, at the mixing weights that the router gives them. The router and the policy choose all the same: a
    replayed step costs what the model's own costs.
    """
    expert_NK, mix_NK = top_slots(routing, max(k_max, moe.k))
    own_sum_N = mix_NK[:, : moe.k].sum(axis=1)
    of_N = {name: live.of_BL[name][context.row_N, context.layer] for name in ROW_WISE}
    keep_NK = (jnp.arange(k_max)[None, :] < of_N["k"][:, None]) & context.valid_N[:, None]
    slots = threshold.drop(Slots(expert_NK[:, :k_max], mix_NK[:, :k_max], keep_NK), of_N)
    if context.steps and len(live.of_BL) > len(ROW_WISE):
        slots = _batch_aware(slots, routing, live, context)
    if live.replay is not None:
        slots = _replayed(slots, routing, live.replay, context.layer)
    return weigh(slots, own_sum_N, of_N["renormalize"], moe)


def _batch_aware(slots: Slots, routing: Routing, live: Settings, context: Context) -> Slots:
    """Applies the kinds that are there to every decode step by itself."""
    of_B = {name: column_BL[:, context.layer] for name, column_BL in live.of_BL.items() if name not in ROW_WISE}
    alike_BB = live.group_B[:, None] == live.group_B[None, :]

    def one_step(slots: Slots, routing: Routing, valid_B: jax.Array) -> Slots:
        same_BB = alike_BB & valid_B[:, None] & valid_B[None, :]
        if "opportunistic" in of_B:
            slots = batch_aware.opportunistic(slots, routing, of_B["opportunistic"], same_BB)
        if "budget" in of_B:
            slots = batch_aware.budget(slots, routing, of_B["budget"], of_B["budget_floor"], same_BB)
        if "reroute" in of_B:
            similarity_EE = live.similarity_LEE[context.layer]
            slots = batch_aware.reroute(slots, routing, of_B["reroute"], of_B["reroute_above"], similarity_EE, same_BB)
        if "capacity" in of_B:
            slots = capacity.capacity(slots, routing, of_B["capacity"], of_B["overflow"], same_BB)
        return slots

    if context.steps == 1:
        return one_step(slots, routing, context.valid_N)
    by_step = jax.tree.map(
        lambda value: value.reshape(-1, context.steps, *value.shape[1:]), (slots, routing, context.valid_N)
    )
    chosen = jax.vmap(one_step, in_axes=1, out_axes=1)(*by_step)
    return jax.tree.map(lambda value: value.reshape(-1, value.shape[-1]), chosen)


def _replayed(slots: Slots, routing: Routing, replay: Replay, layer: jax.Array) -> Slots:
    given_NK = replay.expert_LNK[layer]
    expert_NK = jnp.where(given_NK >= 0, given_NK, slots.expert_NK)
    keep_NK = slots.keep_NK if replay.keep_LNK is None else replay.keep_LNK[layer]
    return Slots(expert_NK, jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1), keep_NK)
