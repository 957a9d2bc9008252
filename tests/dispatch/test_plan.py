"""The plan sorts kept slots by expert, loses none, and its positions invert it."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import plan as plan_part
from moe_jax.routing.selection import Selection


def random_selection(num_tokens, k_max, num_experts, keep_share, seed):
    rng = np.random.default_rng(seed)
    expert_NK = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1)[:, :k_max].astype(np.int32)
    keep_NK = rng.random((num_tokens, k_max)) < keep_share
    return Selection(jnp.asarray(expert_NK), jnp.asarray(keep_NK, jnp.float32), jnp.asarray(keep_NK))


@pytest.mark.parametrize("how", [plan_part.sort, plan_part.compare])
@hypothesis.given(
    num_tokens=st.sampled_from([1, 2, 13, 30]),
    k_max=st.sampled_from([1, 4, 6]),
    keep_share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=20, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_plan(monkeypatch, how, num_tokens, k_max, keep_share, seed):
    monkeypatch.setattr(plan_part, "sort", how)  # what a CPU runs
    num_experts = 8
    selection = random_selection(num_tokens, k_max, num_experts, keep_share, seed)
    plan = plan_part.plan(selection, num_experts)
    expert_S, keep_S = (np.asarray(part).reshape(-1) for part in (selection.expert_NK, selection.keep_NK))

    # the expected order: a plain stable sort of kept slots by expert, then the dropped ones
    expected = sorted(range(num_tokens * k_max), key=lambda s: (not keep_S[s], expert_S[s] if keep_S[s] else 0, s))
    np.testing.assert_array_equal(plan.token_S, np.array(expected) // k_max)
    np.testing.assert_array_equal(np.argsort(np.asarray(plan.position_NK).reshape(-1)), expected)
    np.testing.assert_array_equal(plan.group_sizes_E, np.bincount(expert_S[keep_S], minlength=num_experts))
    assert int(plan.group_sizes_E.sum()) == keep_S.sum()
