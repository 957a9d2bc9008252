"""The demo with a TPU's kernels, interpreted on a CPU: logits, decode steps and gradients are those of the CPU's."""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax import checkpoint
from moe_jax.engine import cache as caches
from moe_jax.kernels import chooser
from moe_jax.kernels.causal_attention import api as causal_attention
from moe_jax.kernels.causal_attention import splash
from moe_jax.kernels.expert_ffn import api as expert_ffn
from moe_jax.kernels.grouped_matmul import pallas_tpu
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse

TOLERANCE = 1e-4  # of the largest value
BATCH, LENGTH, PROMPT = 1, 9, 7
TOKENS_BT = np.random.default_rng(0).integers(0, 4096, (BATCH, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def demo():
    opened = checkpoint.open(pathlib.Path(__file__).parents[2] / "assets" / "demo")
    return opened.architecture, opened.load("float32")


def interpreting(function):
    def run(*arguments, **settings):
        with pltpu.force_tpu_interpret_mode():
            return function(*arguments, **settings)

    return run


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for a TPU run on this CPU; splash attention has an interpreter of its own."""
    mix = functools.partial(splash.mix, interpret=True)
    monkeypatch.setitem(causal_attention.IMPLEMENTATIONS, "splash", types.SimpleNamespace(mix=mix, PREFIXES=False))
    monkeypatch.setitem(expert_ffn.GATED, "pallas_tpu", interpreting(pallas_tpu.gated))
    for name in ("forward", "backward"):
        monkeypatch.setattr(pallas_tpu, name, interpreting(getattr(pallas_tpu, name)))


@functools.cache
def execution(architecture, platform):
    return decoder.Execution(architecture, 8, chooser.resolve(platform, architecture, "float32"))


def whole_sequences(params, architecture, platform):
    live = policies.settings([parse("topk:3")], architecture, 8)
    positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS_BT.shape)
    rows = TOKENS_BT, positions_BT, np.ones_like(TOKENS_BT)
    x_BTD, _ = decoder.hidden(params, *rows, live, execution(architecture, platform), prefixes=False)
    return decoder.logits(params, x_BTD)


def decoded(params, architecture, platform):
    """A prompt, then single steps: the logits of the last positions."""
    live = policies.settings([parse("topk:3")], architecture, 8)
    cache = caches.allocate(architecture, BATCH, LENGTH, jnp.float32)

    @jax.jit
    def extend(cache, tokens_BT, start_B):
        run = execution(architecture, platform)
        x_BTD, cache, _ = decoder.extend(params, cache, tokens_BT, start_B, jnp.ones_like(tokens_BT, bool), live, run)
        return decoder.logits(params, x_BTD[:, -1:]), cache

    logits_BTV, cache = extend(cache, TOKENS_BT[:, :PROMPT], np.zeros(BATCH, np.int32))
    steps = [logits_BTV]
    for at in range(PROMPT, LENGTH):
        logits_BTV, cache = extend(cache, TOKENS_BT[:, at : at + 1], np.full(BATCH, at, np.int32))
        steps.append(logits_BTV)
    return jnp.concatenate(steps, axis=1)


def gradients(params, architecture, platform):
    def loss(params):
        return jax.nn.logsumexp(whole_sequences(params, architecture, platform), axis=-1).mean()

    return jax.jit(jax.grad(loss))(params)


RUNS = [whole_sequences, *(pytest.param(run, marks=pytest.mark.interpreted) for run in (decoded, gradients))]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_tpu_gives_what_a_cpu_gives(demo, interpreted, run):
    architecture, params = demo
    kernels = execution(architecture, "tpu").kernels
    assert (kernels.grouped_matmul, kernels.causal_attention) == ("pallas_tpu", "splash")
    expected, got = (run(params, architecture, platform) for platform in ("cpu", "tpu"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()
