"""Random numbers of experts: equal for the same step, within their limits, as frequent as their weights."""

import numpy as np
import pytest

from moe_jax.config.finetuning import FinetuneConfig
from moe_jax.training.elastic import KSampler
from tests.tiny_model import ARCHITECTURE

ROWS = 64


def sampled(step=0, seed=0, **settings):
    return np.asarray(
        KSampler(FinetuneConfig(elastic=True, **settings), ARCHITECTURE, ROWS, seed).live(step).columns_BL["k"]
    )


@pytest.mark.parametrize("per", ["step", "row", "layer"])
def test_each_step_has_its_own_numbers_which_are_reproducible(per):
    steps = [sampled(step, k_min=2, k_drawn_per=per) for step in range(40)]
    assert all(k_BL.shape == (ROWS, ARCHITECTURE.decoder.num_moe_layers) for k_BL in steps)
    assert min(map(np.min, steps)) == 2 and max(map(np.max, steps)) == 8
    assert np.array_equal(steps[7], sampled(7, k_min=2, k_drawn_per=per))
    assert not np.array_equal(steps[7], steps[8]) or per == "step"
    assert any(not np.array_equal(steps[0], other) for other in steps[1:])
    within_step = {len(np.unique(k_BL)) for k_BL in steps}
    within_row = max(len(np.unique(row)) for k_BL in steps for row in k_BL)
    assert (within_step == {1}) == (per == "step")
    assert (within_row == 1) == (per != "layer")


def test_k_is_sampled_as_often_as_it_is_weighted():
    k = np.stack([sampled(step, k_min=5, k_weights=(4.0, 0.0, 1.0, 3.0)) for step in range(20)])
    shares = [(k == number).mean() for number in (5, 6, 7, 8)]
    np.testing.assert_allclose(shares, [0.5, 0.0, 0.125, 0.375], atol=0.03)


def test_settings_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match=r"finetune.k_min = 9: expected at most the model's own 8"):
        sampled(k_min=9)
    with pytest.raises(ValueError, match=r"finetune.k_weights has 2 numbers: expected 8, one for each k from"):
        sampled(k_weights=(1.0, 2.0))
    for wrong in ((0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(ValueError, match=r"finetune\.k_weights"):
            FinetuneConfig(k_weights=wrong)
