"""Specs parse to what they say, print as they parse, and are refused in words."""

import pytest

from moe_jax.routing.policies import base
from moe_jax.routing.policies.parse import parse


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [("model", [8, 8, 8]), ("topk:3", [3, 3, 3]), ("layers:1,2,8", [1, 2, 8]), (" topk:3 ", [3] * 3)],
)
def test_parse(spec, wanted):
    policy = parse(spec)
    assert policy.experts_per_layer(3, 8).tolist() == wanted
    assert parse(policy.spec) == policy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk:0", "at least 1"),
        ("topk:-2", "at least 1"),
        ("topk:two", "whole numbers"),
        ("topk:2,3", "whole numbers"),
        ("topk", "whole numbers"),
        ("model:3", "whole numbers"),
        ("layers:", "whole numbers"),
        ("top_k:3", 'did you mean "topk:4"'),
        ("", "wanted one of the forms"),
    ],
)
def test_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


def test_refused_by_the_model():
    with pytest.raises(ValueError, match=r"topk:9.*wanted 1 to 8 experts.*policy.k_max"):
        base.settings([parse("topk:9")], 3, 8, 8)
    with pytest.raises(ValueError, match=r"2 layers; wanted one number for each of the model's 3"):
        base.settings([parse("layers:1,2")], 3, 8, 8)
