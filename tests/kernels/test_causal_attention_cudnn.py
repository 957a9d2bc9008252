"""Attention by cuDNN: on a GPU against the plain loop; anywhere, what it hands to JAX, and what it refuses.

The function of JAX that it calls has an implementation in XLA, with the same contract and for every platform.
"""

import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.kernels.causal_attention import cudnn
from moe_jax.kernels.causal_attention.api import causal_attention
from tests import tiny_model
from tests.kernels import test_causal_attention as shared

CASES = [case for case in shared.CASES if case != "wide_values"]  # no multiple of 8
HERE = ["one_segment", "narrow_values", "padding", "segments_in_any_order", "every_row_from_elsewhere"]


def check(case, dtype):
    given = shared.random_inputs(case, dtype)
    segments_BM = None if shared.CASES[case][6] == "one" else given[3]
    shared.check(shared.run("cudnn", *given[:3], segments_BM, *given[4:]), given, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_plain_loop(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", HERE)
def test_masks_and_padding_say_what_queries_see(monkeypatch, case):
    monkeypatch.setattr(cudnn, "_IMPLEMENTATION", "xla")
    check(case, "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "channels", "reason"),
    [
        ("float32", 16, "cudnn takes bfloat16 and float16, not float32; blocked would run"),
        ("bfloat16", 12, "cudnn needs heads of a multiple of 8 and of at most 256 channels, not 12; blocked would run"),
        ("bfloat16", 264, "cudnn needs heads of a multiple of 8 and of at most 256 channels, not 264"),
    ],
)
def test_what_cudnn_lacks_is_refused(dtype, channels, reason):
    heads = jnp.ones((1, 4, 2, channels), dtype)
    with pytest.raises(ValueError, match=reason):
        causal_attention(heads, heads, heads, None, jnp.zeros(1, jnp.int32), 1.0, "cudnn", prefixes=False)


def test_gpus_before_hopper_take_narrower_heads(monkeypatch):
    heads = jnp.ones((1, 4, 2, 192), "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(ValueError, match="of at most 128 channels, not 192; blocked would run"):
        causal_attention(heads, heads, heads, None, jnp.zeros(1, jnp.int32), 1.0, "cudnn", prefixes=False)


def test_the_widest_head_of_a_model_counts():
    grouped = tiny_model.changed(attention={"head_dim": 128})
    latent = tiny_model.changed(attention={"kind": "latent", "qk_norm": False})  # 128 + 64 and 128 channels
    assert cudnn.lacks(grouped, "bfloat16") == cudnn.lacks(latent, "float16") == ""
    too_wide = tiny_model.changed(latent, attention={"value_head_dim": 512})
    assert cudnn.lacks(too_wide, "bfloat16").endswith("not 512")
    assert cudnn.lacks(grouped, "float32") == "takes bfloat16 and float16, not float32"
