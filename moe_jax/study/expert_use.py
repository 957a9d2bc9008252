"""What a policy does with experts, by the policy's own code on recorded routing.

The scores that a trained model's routers give to tokens of a text are recorded once. Policies choose from them for
decode steps of any number of rows, which are tokens far apart in the text, as the requests of a server are.

They may stand in for the routing of another model. If that has P times as many experts, each of its layers is P
recorded layers side by side, scaled so that a token chooses about as much from each; layers repeat in turn, each time
with other tokens. So skew, and how sure the routers are, are those of the recorded model. Limits to groups of experts
are not applied.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture, MoEConfig
from moe_jax.model import decoder
from moe_jax.model.finite import require_finite
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.routing.router import route
from moe_jax.routing.selection import Routing
from moe_jax.study.calibrate import ROWS

TOKENS = 512  # that choose in one call: the rows of several decode steps
_PREFILLS = (1, 4, 16, 64, 256, TOKENS)  # tokens read together; more are taken to touch as many experts


class RecordedRouting(NamedTuple):
    """Scores of all experts, for N tokens in the order of the text."""

    score_LNE: np.ndarray  # float32, for choosing
    mix_LNE: np.ndarray  # float32, for weighting


@dataclasses.dataclass(frozen=True)
class RecordedDemand:
    """A `load_model.ExpertDemand`: measured at some numbers of tokens, and interpolated over their logarithm."""

    rows: tuple[int, ...]  # ascending, of decode steps
    kept: tuple[float, ...]  # slots of one row, summed over MoE layers
    distinct: tuple[float, ...]  # experts of a step, summed over MoE layers
    prefill_kept: float  # slots of one token of a prompt
    prefill_distinct: tuple[float, ...]  # at `_PREFILLS`

    def decode(self, rows: int) -> tuple[float, float]:
        """See `load_model.ExpertDemand`."""
        kept, distinct = (np.interp(np.log(rows), np.log(self.rows), known) for known in (self.kept, self.distinct))
        return float(rows * kept), float(distinct)

    def prefill(self, tokens: int) -> tuple[float, float]:
        """See `load_model.ExpertDemand`."""
        distinct = np.interp(np.log(tokens), np.log(_PREFILLS), self.prefill_distinct)
        return tokens * self.prefill_kept, float(distinct)


def record(params: decoder.Params, tokens_JT: np.ndarray, first: int, execution: decoder.Execution) -> RecordedRouting:
    """Reads rows of tokens with the full model and records the routing of those from position `first` on.

    Args:
        params: from `decoder.split`.
        tokens_JT: a multiple of `calibrate.ROWS` rows.
        first: tokens of each row that give context alone.
        execution: static settings of the full model.

    Raises:
        ValueError: MoE layers differ in their number of experts.
        NotFiniteError: a score is NaN or infinite.
    """
    architecture = execution.architecture
    if len({*architecture.num_experts_L}) > 1:
        raise ValueError("predict.routing: expected a model whose MoE layers have the same number of experts")
    live = policies.settings([MODEL_OWN] * ROWS, architecture, execution.k_max)
    inputs, routed = jax.jit(decoder.moe_inputs, static_argnums=3), jax.jit(route, static_argnums=3)
    layers = [layer for layer in layer_order.layers(architecture) if layer.is_moe]
    ungrouped = dataclasses.replace(architecture.moe, num_groups=1, num_groups_kept=1)
    parts: list[list[Routing]] = [[] for _ in layers]
    for start in range(0, len(tokens_JT), ROWS):
        x_LND, _ = inputs(params, tokens_JT[start : start + ROWS], live, execution)
        x_LBTD = x_LND.reshape(len(layers), ROWS, -1, x_LND.shape[-1])[:, :, first:]
        for part, x_BTD, (stack, index, _, _) in zip(parts, x_LBTD, layers):
            router = {name: value[index] for name, value in params[stack]["router"].items()}
            x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
            part.append(jax.device_get(routed(x_ND, router["weight_LED"], router.get("bias_LE"), ungrouped)))
    joined = [[np.concatenate(field) for field in zip(*part)] for part in parts]
    recorded = RecordedRouting(*map(np.stack, zip(*joined)))
    require_finite(recorded.score_LNE, "the scores of experts", params)
    return recorded


def require_stand_in(recorded: Architecture, served: Architecture) -> None:
    """Checks that recorded routing can stand in for that of another model.

    Raises:
        ValueError: the other model has no multiple of the recorded number of experts, or too many.
    """
    own, layers = recorded.moe.num_experts, recorded.decoder.num_moe_layers
    for experts in {*served.num_experts_L}:
        if experts % own or experts > own * layers:
            raise ValueError(
                f"moe.num_experts = {experts}: expected a multiple of the {own} experts of predict.routing, at most "
                f"{own * layers}; or another predict.routing"
            )


def demand(
    policy: policies.Policy, recorded: RecordedRouting, architecture: Architecture, concurrencies: Sequence[int]
) -> RecordedDemand:
    """Runs a policy on recorded routing, in decode steps of one row and of each number of rows, and in prompts.

    Args:
        policy: of every row.
        recorded: the routing, which may be another model's: see `require_stand_in`.
        architecture: of the model that is predicted.
        concurrencies: numbers of rows.

    Raises:
        ValueError: the policy does not fit the model.
    """
    moe, layers = architecture.moe, architecture.decoder.num_moe_layers
    rows = sorted({1, *concurrencies})
    count = max(TOKENS, rows[-1])
    probe = policies.settings([policy], architecture, architecture.moe.num_experts)
    k_max = max(moe.k, int(np.asarray(probe.columns_BL["k"]).max()))
    live = policies.settings([policy] * count, architecture, k_max)

    def counted(together: int, decoding: bool) -> tuple[float, float]:
        """Kept slots of a token and distinct experts of `together` tokens, both summed over layers."""
        steps = count // together
        row_N, step_N = np.arange(count) % together, np.arange(count) // together
        valid_N = step_N < steps
        kept, distinct = 0.0, 0.0
        for layer in range(layers):
            ring = recorded.score_LNE.shape[1]
            spread_N = (row_N * steps + step_N) * ring // (steps * together)
            place_N = ((spread_N if decoding else np.arange(count)) + layer) % ring
            routing = _stand_in(recorded, layer, place_N, architecture)
            acting = live._replace(group_B=jnp.asarray(step_N, jnp.int32))
            kept_and_touched = _counted(routing, acting, np.int32(layer), valid_N, moe, k_max, decoding)
            kept += int(kept_and_touched[0]) / (steps * together)
            distinct += int(kept_and_touched[1]) / steps
        return kept, distinct

    kept, distinct = zip(*(counted(number, True) for number in rows))
    prefill_kept, prefill_distinct = zip(*(counted(number, False) for number in _PREFILLS))
    return RecordedDemand(tuple(rows), kept, distinct, float(np.mean(prefill_kept)), prefill_distinct)


def _stand_in(recorded: RecordedRouting, layer: int, place_N: np.ndarray, architecture: Architecture) -> Routing:
    """The routing of some tokens in one layer of the model that is predicted."""
    own_layers, _, own = recorded.score_LNE.shape
    parts = architecture.num_experts_L[layer] // own
    slots = -(-architecture.k_L[layer] // parts)  # of a token in one part
    scores, mixes = [], []
    for part in range(parts):
        score_NE, mix_NE = (array_LNE[(layer * parts + part) % own_layers, place_N] for array_LNE in recorded)
        scale = 1.0 if parts == 1 else 1 / np.sort(score_NE, axis=1)[:, -slots].mean()
        scores.append(scale * score_NE)
        mixes.append(scale * mix_NE)
    return Routing(np.concatenate(scores, axis=1), np.concatenate(mixes, axis=1))


@functools.partial(jax.jit, static_argnames=("moe", "k_max", "decoding"))
def _counted(
    routing: Routing, live: policies.Settings, layer, valid_N, moe: MoEConfig, k_max: int, decoding: bool
) -> tuple[jax.Array, jax.Array]:
    """The slots that valid tokens keep, and the distinct experts of each group of tokens, summed over groups."""
    count, experts = routing.score_NE.shape
    context = policies.Context(layer, jnp.arange(count), valid_N, int(decoding))
    chosen = policies.select(routing, live, context, moe, k_max)
    touched_NE = jnp.zeros((count, experts), bool).at[live.group_B[:, None], chosen.expert_NK].max(chosen.keep_NK)
    return chosen.keep_NK.sum(), touched_NE.sum()
