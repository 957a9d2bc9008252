"""Tile sizes are timed and kept: rehearsed on a CPU, where the kernels of a GPU are interpreted."""

import json

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.kernels.grouped_matmul import pallas_gpu, tuned
from moe_jax.kernels.grouped_matmul.pallas_gpu import Tiles
from moe_jax.study import tiles
from tests import launcher_module

ARCHITECTURE = Architecture(
    DecoderConfig(vocab_size=64, d_model=128, num_layers=1, num_dense_layers=0, tie_embeddings=False, max_context=64),
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope_fraction=1.0),
    MoEConfig(4, 2, 64, num_shared_experts=0, score="softmax", selection_bias=False),
)
CHOICES = Tiles(64, 128, 64, 2), Tiles(64, 128, 128, 2)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text("[]")
    monkeypatch.setattr(tuned, "TABLE", path)
    return path


def test_the_fastest_is_kept_and_looked_up(table, monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels ask for jax 0.11")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(pallas_gpu, "NUM_CORES", 2)
    monkeypatch.setattr(pallas_gpu, "CANDIDATES", {pallas_gpu.FEW: CHOICES})
    with plgpu.force_gpu_interpret_mode():
        timed = list(tiles.tune(ARCHITECTURE, "bfloat16", (3,), (), rounds=2, seed=0))
    assert [candidates[0].case.product for candidates in timed] == ["gated", "forward"]
    for candidates in timed:
        assert {one.tiles for one in candidates} == {tuple(choice) for choice in CHOICES}
        assert candidates[0].microseconds == min(one.microseconds for one in candidates)
    rows, weights = jnp.zeros((6, 64), jnp.bfloat16), jnp.zeros((1, 4, 128, 64), jnp.bfloat16)
    assert pallas_gpu.choose_tiles("forward", rows, weights) == timed[1][0].tiles
    assert pallas_gpu.choose_tiles("forward", rows[:, :32], weights[..., :32]) == pallas_gpu.FEW  # not measured
    assert len(json.loads(table.read_text())) == 2


def test_an_entry_is_replaced_by_the_next_measurement(table):
    case = tuned.TileKey("a device", "pallas_gpu", "forward", "bfloat16", 64, 2048, 1024, tuned.rows_class(511, 64))
    other = tuned.TileKey("a device", "pallas_gpu", "forward", "bfloat16", 64, 2048, 1024, tuned.rows_class(512, 64))
    tuned.write(case, (64, 128, 128, 4), 20.0, "2026-01-01", "0.11.2")
    assert tuned.lookup(case) == (64, 128, 128, 4) and tuned.lookup(other) is None
    tuned.write(other, (64, 256, 64, 4), 30.0, "2026-01-01", "0.11.2")
    tuned.write(case, (64, 64, 128, 6), 19.0, "2026-01-02", "0.12.0")
    assert tuned.lookup(case) == (64, 64, 128, 6) and tuned.lookup(other) == (64, 256, 64, 4)
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


def test_measured_tiles_are_candidates_of_the_kernels():
    entries = json.loads(tuned.TABLE.read_text())
    for entry in entries:
        case = tuned.TileKey(**entry["case"])
        choices = pallas_gpu.candidates(case.product, case.rows_class * case.experts, case.experts)
        assert tuned.lookup(case) in choices


def test_where_nothing_can_be_tuned_the_launcher_says_so(tmp_path):
    launcher_module.import_launcher("benchmark")
    with pytest.raises(ValueError, match=r"--tune: kernels\.grouped_matmul is 'native' here, .* expected pallas_gpu"):
        launcher_module.run_main("benchmark", {"kernels.grouped_matmul": "native"}, tmp_path, "--tune")
