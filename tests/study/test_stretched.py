"""The searched schedules in configs/predict_*.gin are those of the demo's result, stretched as their comment says."""

import json
import pathlib
from fractions import Fraction

import pytest

from moe_jax.config import gin
from moe_jax.routing.policies.parse import parse

ROOT = pathlib.Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "study" / "schedule_search" / "result.json"


def stretched(k_L, own, layers, k):
    """Shares of k, linear between layers spread over depth, moved to the same mean; the largest fractions round up."""
    shares = []
    for layer in range(layers):
        place = Fraction(layer * (len(k_L) - 1), layers - 1)
        left = min(int(place), len(k_L) - 2)
        shares.append((k_L[left] + (k_L[left + 1] - k_L[left]) * (place - left)) / own)
    total = sum(k_L) * layers * k // (own * len(k_L))
    shift = Fraction(total, layers) - k * sum(shares) / layers
    exact = [k * share + shift for share in shares]
    whole = [int(one) for one in exact]
    for layer in sorted(range(layers), key=lambda layer: whole[layer] - exact[layer])[: total - sum(whole)]:
        whole[layer] += 1
    return tuple(whole)


@pytest.mark.parametrize("name", ["v2_lite", "qwen3_30b", "v3"])
def test_each_config_has_the_demos_schedules_over_its_own_layers(name):
    result = json.loads(RESULT.read_text())
    found = {row["budget"]: row["policy"] for row in result["rows"] if row["role"] == "searched"}
    config = gin.read_config(ROOT / "configs" / f"predict_{name}.gin")
    layers, k = config.decoder.num_moe_layers, config.moe.k
    given = [parse(spec).parts[0].k_L for spec in config.predict.policies if spec.startswith("layers:")]
    assert given == [stretched(parse(found[budget]).parts[0].k_L, 8, layers, k) for budget in (6, 5)]
    assert [sum(k_L) for k_L in given] == [6 * layers * k // 8, 5 * layers * k // 8]
