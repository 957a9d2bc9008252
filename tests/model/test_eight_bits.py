"""The demo with experts in eight bits: near its own logits, routing held fixed; dropped slots read nothing."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import checkpoint
from moe_jax.engine.request import execution_of
from moe_jax.kernels.quantized import Quantized
from moe_jax.model import decoder, dtypes
from moe_jax.routing import policies
from moe_jax.routing.policies import Replayed
from moe_jax.routing.policies.parse import parse

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"
MOST = {"float8_e4m3fn": 0.04, "int8": 0.02}  # of the norm of the logits
ROWS, LENGTH = 4, 128


@pytest.fixture(scope="module")
def opened():
    return checkpoint.open(DEMO)


@pytest.fixture(scope="module")
def tokens_BT(opened):
    text = (ROOT / "moe_jax" / "api.py").read_text() + (ROOT / "moe_jax" / "files.py").read_text()
    return np.reshape(opened.tokenizer.encode(text).ids[: ROWS * LENGTH], (ROWS, LENGTH)).astype(np.int32)


def run(params, tokens_BT, architecture, replayed_LNK=None, spec="model"):
    """float32 logits_BTV and the expert of every slot; these are given ones if there are."""
    execution = execution_of(
        architecture, dtype=dtypes.experts_dtype(params), expert_dtype=dtypes.eight_bits_of(params)
    )
    live = policies.settings([parse(spec)] * len(tokens_BT), architecture, execution.k_max)
    live = live if replayed_LNK is None else Replayed(live, replayed_LNK)
    positions_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
    rows = (tokens_BT, positions_BT, np.ones_like(tokens_BT))

    @jax.jit
    def compute(params, rows, live):
        x_BTD, use = decoder.hidden(params, *rows, live, execution, in_stacks=True, prefixes=False)
        return decoder.logits(params, x_BTD, execution.kernels.projection), use.chosen_NK

    return map(np.asarray, compute(params, rows, live))


def difference(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("expert_dtype", MOST)
def test_logits_are_near_those_of_bfloat16_with_the_same_routing(opened, tokens_BT, expert_dtype):
    expected_BTV, chosen_LNK = run(opened.load("bfloat16"), tokens_BT, opened.architecture)
    params = opened.load("bfloat16", expert_dtype=expert_dtype)
    assert dtypes.eight_bits_of(params) == expert_dtype and dtypes.dtype_of(params) == jnp.bfloat16
    logits_BTV, replayed_LNK = run(params, tokens_BT, opened.architecture, chosen_LNK)
    np.testing.assert_array_equal(replayed_LNK, chosen_LNK)
    assert 0.002 < difference(logits_BTV, expected_BTV) < MOST[expert_dtype]


@pytest.mark.parametrize("expert_dtype", MOST)
def test_experts_of_dropped_slots_are_not_read(opened, tokens_BT, expert_dtype):
    """The scales of all experts that no kept slot has are NaN, which would spread."""
    params = opened.load("float32", expert_dtype=expert_dtype)
    tokens_BT = tokens_BT[:1, :2]
    expected_BTV, chosen_LNK = run(params, tokens_BT, opened.architecture, spec="topk:1")
    kept_LE = np.zeros((5, 64), bool)
    for layer, chosen_NK in enumerate(chosen_LNK):
        kept_LE[layer, chosen_NK[chosen_NK >= 0]] = True
    assert kept_LE.sum() <= 10
    experts = params["moe"]["experts"]
    for name, weight in experts.items():
        unread = ~kept_LE.reshape(*kept_LE.shape, *[1] * (weight.scale.ndim - 2))
        experts[name] = Quantized(weight.values, jnp.where(unread, jnp.nan, weight.scale))
    logits_BTV, _ = run(params, tokens_BT, opened.architecture, spec="topk:1")
    np.testing.assert_array_equal(logits_BTV, expected_BTV)
