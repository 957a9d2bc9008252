import json
import os
import pathlib

from moe_jax.config import gin
from tests.command.ended import finished


def test_results_are_written_and_replay(start):
    status, stdout, stderr = finished(start("--set", "moe.k=3", "--set", "run.seed=7", "--out=runs/a", jax="real"))
    assert (status, stdout) == (0, "progress\nspeed 2.5 tokens/s\n"), stderr
    assert sorted(os.listdir("runs/a")) == ["config.gin", "result.json"]
    assert gin.read_config("runs/a/config.gin") == gin.read_config(None, ["moe.k=3", "run.seed=7"])
    result = json.loads(pathlib.Path("runs/a/result.json").read_text())
    assert list(result) == [
        *("command", "config", "versions", "device", "seed", "implementations", "seconds", "peak_memory_bytes"),
        *("figures", "rows"),
    ]
    assert (result["command"], result["config"]["moe"]["k"], result["seed"]) == ("probe", 3, 7)
    assert set(result["versions"]) == {"jax", "jaxlib", "flax", "numpy", "python", "moe_jax"}
    assert set(result["device"]) == {"platform", "kind", "count", "cores"}
    assert result["implementations"] == {"expert_ffn": "blocked"}
    assert list(result["seconds"]) == ["run"] and 0 <= result["seconds"]["run"] < 60
    assert 10**7 < result["peak_memory_bytes"] < 10**11
    assert result["figures"] == {"speed": {"value": 2.5, "unit": "tokens/s"}, "loss": {"value": None, "unit": "nats"}}
    assert result["rows"] == [{"policy": "topk:3", "figures": result["figures"]}]


def test_json_prints_the_result_alone(start):
    status, stdout, stderr = finished(start("--json", "--set=moe.k=3", jax="real"))
    assert status == 0
    assert json.loads(stdout)["config"]["moe"]["k"] == 3
    assert "progress" in stderr
