"""Activations beyond the range of a dtype are reported by every function that uses them."""

import numpy as np
import pytest

import moe_jax
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.continuations import Pair, score_continuations
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.model.finite import NotFiniteError, require_finite
from moe_jax.routing.policies.parse import parse
from moe_jax.study import calibrate
from tests import chained_model

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with weights that are finite in every dtype, and activations that overflow in float16."""
    folder = tmp_path_factory.mktemp("models") / "large"
    return chained_model.write(folder, chain=[*range(256)], gain=40_000)


@pytest.fixture(scope="module")
def overflowing(folder):
    return moe_jax.load(folder, dtype="float16")


def test_logits_are_refused_and_the_dtype_is_named(folder, overflowing):
    with pytest.raises(
        NotFiniteError, match=r"logits: not finite .* float16.*: expected model\.dtype=bfloat16 or float32"
    ):
        overflowing.logits(TOKENS_BT)
    assert np.isfinite(moe_jax.load(folder, dtype="bfloat16").logits(TOKENS_BT)).all()


def test_weights_whose_activations_overflow_float32_are_named(tmp_path):
    model = moe_jax.load(chained_model.write(tmp_path / "model", gain=1e38))
    with pytest.raises(NotFiniteError, match="float32, so they come from its weights: expected other weights"):
        model.logits(TOKENS_BT)


def test_an_error_in_generation_holds_the_finished_text(overflowing):
    pieces = {0: "", 1: ""}

    def on_text(index, piece):
        pieces[index] += piece

    with pytest.raises(ValueError, match=r"of token \d+ after prompt [12], 'topk:1': not finite") as raised:
        overflowing.generate(["ab", "hello there"], max_new_tokens=9, policy="topk:1", on_text=on_text)
    assert "\n" not in str(raised.value)
    made = raised.value.completions
    assert [one.text for one in made] == [pieces[0], pieces[1]] and {one.finish_reason for one in made} == {None}
    assert all(np.isfinite(one.log_probabilities).all() for one in made)


def test_a_likelihood_is_refused_and_the_policy_named(overflowing):
    execution, compared = execution_of(overflowing.architecture), [parse("topk:1"), parse("model")]
    sizes = {"context": 16, "batch_size": 2, "reference": 1}
    with pytest.raises(NotFiniteError, match="the log-probabilities of a text, 'topk:1': not finite"):
        score_documents(overflowing.params, [TOKENS_BT[0]], compared, execution, **sizes)
    with pytest.raises(NotFiniteError, match="the log-probabilities of a text, 'model': not finite"):
        score_continuations(overflowing.params, [Pair(TOKENS_BT[0], [1, 2])], parse("model"), execution, batch_size=2)


def test_a_calibration_is_refused(overflowing):
    with pytest.raises(NotFiniteError, match="the outputs of experts: not finite"):
        calibrate.measure(overflowing.params, TOKENS_BT, execution_of(overflowing.architecture))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_is_enough(value):
    params = {"a": np.zeros(2, np.float32)}
    require_finite(np.full((3, 4), 3e38, np.float32), "numbers", params)
    numbers = np.zeros((3, 4), np.float32)
    numbers[2, 3] = value
    with pytest.raises(NotFiniteError, match="numbers: not finite"):
        require_finite(numbers, "numbers", params)
