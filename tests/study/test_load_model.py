"""The load model against published throughputs, against counts by hand, and against a simulation of a closed loop."""

import dataclasses
import pathlib

import numpy as np
import pytest

from moe_jax.config import gin
from moe_jax.cost.roofline import Machine
from moe_jax.study import load_model, measured_table, prediction, simulation
from moe_jax.study.load_model import Constants, EvenDemand, LoadModel, Served, Workload
from tests import tiny_model

ROOT = pathlib.Path(__file__).parents[2]
A800 = Machine(2.039e12, 312e12)
LITE = gin.read_config(ROOT / "configs" / "models" / "deepseek_v2_lite.gin").architecture
WORKLOAD = Workload(1024, 1024, 8192)


@pytest.fixture(scope="module")
def fits():
    """Name of a config -> its fits."""
    found = {}
    for name in ("predict_v2_lite", "predict_v3"):
        config = gin.read_config(ROOT / "configs" / f"{name}.gin")
        tables = [(path, column, measured_table.read(ROOT / path)) for path, column in columns(config.predict)]
        found[name] = [
            prediction.fit_table(table, path, column, config.architecture, config.predict)
            for path, column, table in tables
        ]
    return found


def columns(predict):
    return zip(predict.measured, predict.columns)


def test_from_six_experts_alone_the_load_model_predicts_two_to_five(fits):
    active, _ = fits["predict_v2_lite"]
    assert active.column == "k6" and set(active.errors) == {"k6", "k5", "k4", "k3", "k2"}
    assert all(median < 0.04 for median, _ in active.errors.values())


def test_its_constants_are_those_that_one_a800_can_have(fits):
    for fit in fits["predict_v2_lite"]:
        reached = fit.constants.reached(Machine(2 * A800.bytes_per_s, 2 * A800.flops_per_s))
        assert 1e12 < reached.bytes_per_s < 2.04e12 and 1e14 < reached.flops_per_s < 312e12
        assert 1e-3 < fit.constants.step_s < 1e-2 and 1e-5 < fit.constants.row_s < 1e-3


def test_fewer_active_experts_gain_at_low_and_at_high_load_and_least_between(fits):
    active, _ = fits["predict_v2_lite"]
    for rates in (active.predicted, active.measured):
        for k in (2, 3, 4, 5):
            gain = np.divide(rates[f"k{k}"], rates["k6"])
            least = int(gain.argmin())
            assert 64 <= active.concurrency[least] <= 256
            assert gain[:4].max() > gain[-1] > gain[least] > 1


def test_v3_is_predicted_from_eight_experts(fits):
    [active] = fits["predict_v3"]
    assert active.column == "k8" and all(median < 0.08 for median, _ in active.errors.values())


def test_fewer_experts_in_total_are_predicted_from_all(fits):
    _, total = fits["predict_v2_lite"]
    below = np.array(total.concurrency) < 192
    assert total.column == "e64" and len(total.relative) == 8 and below.sum() == 13
    assert all(np.median(abs(relative[below])) < 0.10 for relative in total.relative.values())


def lite_step(rows, new, cached, k=6):
    """Bytes and operations of a step of V2-Lite, from its shapes as its report gives them."""
    tokens, experts = rows * new, 64 * (1 - (1 - k / 64) ** (rows * new))
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    expert, norms = 3 * 2048 * 1408, 27 * (2 * 2048 + 512) + 2048
    always = 27 * attention + 3 * 2048 * 10944 + 26 * (2 * expert + 64 * 2048)
    numbers = always + norms + 102400 * 2048 + tokens * 2048 + 26 * experts * expert + 27 * 576 * (cached + tokens)
    mixing = 16 * (2 * 512 + 64) * (cached + tokens) if new == 1 else rows * 16 * 320 * new * (new + 1) / 2
    products = tokens * (always + k * 26 * expert) + rows * 102400 * 2048 + 27 * mixing
    return 2 * numbers, 2 * products


def peak_s(bytes_and_flops):
    return bytes_and_flops[0] / A800.bytes_per_s + bytes_and_flops[1] / A800.flops_per_s


@pytest.mark.parametrize("concurrency", [1, 8, 20])
def test_a_wave_by_hand(concurrency):
    """All prompts, eight at once, then 1023 steps whose caches grow."""
    constants = Constants(0.5, 0.003, 0.0001)
    reads = [8] * (concurrency // 8) + [concurrency % 8] * (concurrency % 8 > 0)
    seconds = sum(2 * peak_s(lite_step(rows, 1024, 0)) + 0.003 + 0.0001 * rows for rows in reads)
    for done in range(1023):
        cached = concurrency * (1024 + done)
        seconds += 2 * peak_s(lite_step(concurrency, 1, cached)) + 0.003 + 0.0001 * concurrency
    model = LoadModel(Served(LITE, EvenDemand(LITE), A800, 2, 2), constants)
    assert model.closed_loop(WORKLOAD, concurrency) == pytest.approx(concurrency * 2048 / seconds, rel=1e-9)


@pytest.mark.parametrize("concurrency", [1, 5, 8, 50, 200])
def test_the_simulation_of_a_closed_loop_agrees(concurrency):
    model = LoadModel(Served(LITE, EvenDemand(LITE), A800, 2, 2), Constants(0.8, 0.003, 0.0001))
    count = 3 * concurrency
    requests = simulation.Requests(np.zeros(count), np.full(count, 1024), np.full(count, 1024))
    times = simulation.simulate(requests, model, simulation.Limits(concurrency, 8192), clients=concurrency)
    assert count * 2048 / times.last_J.max() == pytest.approx(model.closed_loop(WORKLOAD, concurrency), rel=0.03)


def test_open_arrivals_at_the_limit_of_a_closed_loop():
    """More arrivals than can be served: all rows are always taken, and throughput is that of as many clients."""
    model = LoadModel(Served(LITE, EvenDemand(LITE), A800, 2, 2), Constants(0.8, 0.003, 0.0001))
    arrival_J = simulation.arrivals(100.0, 400, 4.0, np.random.default_rng(0))
    requests = simulation.Requests(arrival_J, np.full(400, 1024), np.full(400, 1024))
    times = simulation.simulate(requests, model, simulation.Limits(20, 8192))
    assert 400 * 2048 / times.last_J.max() == pytest.approx(model.closed_loop(WORKLOAD, 20), rel=0.03)


def test_a_fit_finds_the_constants_that_made_the_figures():
    served = Served(LITE, EvenDemand(LITE), A800, 2, 2)
    constants, clients = Constants(0.7, 0.004, 0.0002), [1, 3, 9, 40, 300]
    rates = [LoadModel(served, constants).closed_loop(WORKLOAD, rows) for rows in clients]
    np.testing.assert_allclose(load_model.fit(served, WORKLOAD, clients, rates, "made"), constants, rtol=1e-6)


def test_rate_and_time_per_row_cannot_both_be_fitted_to_one_column():
    """Why one efficiency serves both peaks: operations of a wave are proportional to its rows."""
    endless = dataclasses.replace(A800, bytes_per_s=float("inf"))
    served = Served(LITE, EvenDemand(LITE), endless, 2, 2)
    waves = [load_model.wave(served, WORKLOAD, clients) for clients in (2, 16, 128, 768)]
    per_row = np.array([wave.peak_s / wave.rows for wave in waves])
    np.testing.assert_allclose(per_row, per_row[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("rates", "expected"), [([1e5, 2e5, 4e5], "of the peak"), ([100, 90, 80], "per row"), ([100, 90], "three")]
)
def test_figures_that_no_constants_explain_are_refused(rates, expected):
    served = Served(LITE, EvenDemand(LITE), A800, 2, 2)
    with pytest.raises(ValueError, match=expected):
        load_model.fit(served, WORKLOAD, [2, 4, 8][: len(rates)], rates, "table")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "its head is ''"),
        ("clients,k6\n1,2\n", "concurrency,k6,k4"),
        ("concurrency,six\n1,2\n", "concurrency,k6,k4"),
        ("concurrency,k6,k6\n1,2,3\n", "concurrency,k6,k4"),
        ("concurrency,k6\n1,2\n2,x\n3,4\n", "could not convert"),
        ("concurrency,k6\n1,2\n2,3,4\n3,4\n", "number"),
        ("concurrency,k6\n1,2\n2,3\n", "three lines or more"),
        ("concurrency,k6\n1,2\n2,0\n3,4\n", "positive numbers"),
        ("concurrency,k6\n1,2\n2,nan\n3,4\n", "positive numbers"),
        ("concurrency,k6\n1,2\n4,3\n3,4\n", "ascending"),
        ("concurrency,k6\n1.5,2\n4,3\n5,4\n", "whole"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, text, expected):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as refusal:
        measured_table.read(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_column_changes_the_model():
    fewer = measured_table.architecture_of("e4", tiny_model.ARCHITECTURE)
    assert (fewer.moe.num_experts, fewer.moe.k) == (4, 4)
    assert measured_table.architecture_of("k3", tiny_model.ARCHITECTURE).k_L == (3, 3)
    with pytest.raises(ValueError, match=r"column k17 of predict.measured: moe.k = 17"):
        measured_table.architecture_of("k17", tiny_model.ARCHITECTURE)
