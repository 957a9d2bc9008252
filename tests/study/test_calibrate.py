"""A calibration against plain loops, and refused for other models."""

import dataclasses

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.engine.request import execution_of
from moe_jax.routing import calibration as calibrations
from moe_jax.study import calibrate
from tests import tiny_model

ARCHITECTURE = tiny_model.ARCHITECTURE
PARAMS = tiny_model.random_params(ARCHITECTURE)


@pytest.fixture(scope="module")
def measured():
    tokens_JT = np.random.default_rng(0).integers(0, 512, (16, 12), dtype=np.int32)
    return tokens_JT, calibrate.measure(PARAMS, tokens_JT, execution_of(ARCHITECTURE))


def moe_inputs(tokens_JT, monkeypatch):
    """Normed inputs of both MoE layers, recorded at the router, layer by layer, without compilation."""
    from moe_jax.model import moe

    seen = []
    route = moe.route
    monkeypatch.setattr(moe, "route", lambda x_ND, *rest: [seen.append(np.asarray(x_ND)), route(x_ND, *rest)][1])
    with jax.disable_jit():
        moe_jax.Model(checkpoint.new(ARCHITECTURE, tiny_model.tokenizer()), PARAMS).logits(tokens_JT)
    return seen


def test_ratios_and_similarities_equal_plain_loops(measured, monkeypatch):
    tokens_JT, found = measured
    stack = jax.tree.map(np.float64, PARAMS["moe"])
    first, second = (tokens_JT[rows] for rows in (slice(0, 8), slice(8, 16)))
    inputs = [moe_inputs(rows, monkeypatch) for rows in (first, second)]
    for layer in range(2):
        ratios, outputs = [], []
        for rows in inputs:
            x_ND = np.float64(rows[layer].reshape(8, -1, 64)[:, :12].reshape(96, 64))
            mix_NE = 1 / (1 + np.exp(-x_ND @ stack["router"]["weight_LED"][layer].T))
            score_NE = mix_NE + stack["router"]["bias_LE"][layer]
            for mix, score in zip(mix_NE, score_NE):
                w = sorted((mix[e] for e in np.argsort(-score)[:8]), reverse=True)
                ratios += [one / w[0] for one in w[1:]]
            for x in x_ND[np.linspace(0, 95, 64).astype(int)]:
                gate_EF, up_EF = np.einsum("eifd,d->ief", stack["experts"]["gate_up_LEIFD"][layer], x)
                hidden_EF = gate_EF / (1 + np.exp(-gate_EF)) * up_EF
                outputs.append(np.einsum("edf,ef->ed", stack["experts"]["down_LEDF"][layer], hidden_EF))
        assert found.median_ratio_L[layer] == pytest.approx(np.median(ratios), rel=1e-5)
        laid_ED = np.concatenate(outputs, axis=1)
        norm_E = np.linalg.norm(laid_ED, axis=1)
        expected_EE = laid_ED @ laid_ED.T / norm_E[:, None] / norm_E
        np.testing.assert_allclose(found.similarity_LEE[layer], expected_EE, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip_and_found_beside_the_model(measured, tmp_path, dtype):
    _, found = measured
    folder = tiny_model.write_model(tmp_path / "model")
    assert moe_jax.load(folder).calibration is None
    calibrations.save(folder / calibrations.NAME, found)
    model = moe_jax.load(folder, dtype=dtype)  # the model is recognised
    np.testing.assert_array_equal(model.calibration.median_ratio_L, found.median_ratio_L)
    np.testing.assert_allclose(model.calibration.similarity_LEE, found.similarity_LEE, atol=1e-3)
    tokens_BT = np.arange(12).reshape(2, 6)
    for spec in ("median", "reroute:1,-1.0"):
        assert not np.array_equal(model.logits(tokens_BT, policy=spec), model.logits(tokens_BT))


def test_another_model_is_refused(measured, tmp_path):
    _, found = measured
    other = tiny_model.write_model(tmp_path / "other", params=tiny_model.random_params(seed=1))
    calibrations.save(tmp_path / "found.npz", found)
    with pytest.raises(ValueError, match=r"policy\.calibration is of another model"):
        moe_jax.load(other, calibration=tmp_path / "found.npz")


@pytest.mark.parametrize("damage", ["nothing", "text", "half", "flipped", "array", "lacking", "shape"])
def test_damaged_files_are_refused(measured, tmp_path, damage):
    _, found = measured
    path = tmp_path / "found.npz"
    calibrations.save(path, dataclasses.replace(found, similarity_LEE=found.similarity_LEE[:1]))
    if damage == "nothing":
        path.unlink()
    elif damage == "text":
        path.write_text("no calibration")
    elif damage == "half":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    elif damage == "array":
        with open(path, "wb") as file:
            np.save(file, found.median_ratio_L)
    elif damage == "lacking":
        np.savez(path, median_ratio_L=found.median_ratio_L)
    with pytest.raises(ValueError, match=r"policy\.calibration = ") as refusal:
        calibrations.read(path)
    assert "\n" not in str(refusal.value)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"^text.x: expected at least 8 documents of 10 tokens or more, got 3"):
        calibrate.rows_of([np.arange(10)] * 3 + [np.arange(9)] * 10, 10, 64, "text.x")
