"""benchmarks/loads.py on a tiny model: a line for each policy, kept if a later group fails; then the chart."""

import io
import json

import pytest

from moe_jax import command
from moe_jax.config import gin
from moe_jax.study import speed
from tests import launcher_module

TINY = {
    **{"decoder.vocab_size": 96, "decoder.d_model": 32, "decoder.num_layers": 3, "decoder.max_context": 64},
    **{"training.sequence_length": 64, "attention.num_heads": 2, "attention.num_kv_heads": 1, "attention.head_dim": 16},
    **{"moe.expert_hidden": 16, "model.dtype": "float32", "benchmark.decode_batches": "(8,)"},
    **{"benchmark.prompt_length": 8, "benchmark.rounds": 2, "benchmark.decode_steps": 4},
    "sweep.policies": "('topk:8', 'budget:20', 'topk:2')",
}

loads = launcher_module.import_launcher("loads", "benchmarks")
chart = launcher_module.import_launcher("loads_chart", "benchmarks")


def run_in(folder, **settings):
    overrides = [f"{name}={value}" for name, value in {**TINY, **settings}.items()]
    loads.main(command.Command("loads", gin.read_config(None, overrides), folder, False, io.StringIO()))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "loads.jsonl").read_text().splitlines()]


def test_each_policy_has_a_line_and_its_figures(tmp_path):
    run_in(tmp_path)
    lines = lines_of(tmp_path)
    by_policy = {line["policy"]: line for line in lines}
    assert [*by_policy] == ["topk:8", "topk:2", "budget:20"]
    assert [by_policy[policy]["experts_per_token"] for policy in by_policy] == [8, 2, 8]
    assert by_policy["budget:20"]["distinct_experts"] == 20 < by_policy["topk:8"]["distinct_experts"] <= 64
    assert 2 < by_policy["topk:2"]["distinct_experts"] <= 16
    for line in lines:
        first_ms, third_ms = line["quartiles_ms"]
        assert line["load"] == 8 and first_ms <= line["ms"] <= third_ms
        assert line["tokens_per_s"] == pytest.approx(1e3 * line["load"] / line["ms"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["policy"] for row in result["rows"]] == ["topk:8", "budget:20", "topk:2"]
    assert result["figures"]["decode_8_ms"]["value"] == by_policy["topk:8"]["ms"]
    chart.main(tmp_path)
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_stays_if_the_rest_fails(tmp_path, monkeypatch):
    take = speed.take_turns

    def fail_later(cases, steps):
        if "budget" in cases[0].name:
            raise RuntimeError("the device is gone")
        return take(cases, steps)

    monkeypatch.setattr(speed, "take_turns", fail_later)
    with pytest.raises(RuntimeError):
        run_in(tmp_path)
    assert [line["policy"] for line in lines_of(tmp_path)] == ["topk:8", "topk:2"]
    assert not (tmp_path / "result.json").exists()


def test_a_policy_that_cannot_be_replayed_is_refused_before_weights_are_made(tmp_path, monkeypatch):
    from moe_jax.study import random_model

    monkeypatch.setattr(random_model, "random_params", None)
    with pytest.raises(ValueError, match=r"mass:0\.5 compares weights"):
        run_in(tmp_path, **{"sweep.policies": "('topk:8', 'mass:0.5')"})
