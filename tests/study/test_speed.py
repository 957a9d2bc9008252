"""Timed steps equal the engine's, and a replayed step runs exactly the experts of the trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import memory
from moe_jax.config.schema import SamplingConfig
from moe_jax.cost import roofline
from moe_jax.engine import cache as caches
from moe_jax.engine.generate import Engine
from moe_jax.engine.request import execution_of, make_requests
from moe_jax.model import decoder, parameters
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.trace import Trace
from moe_jax.study import random_model, speed
from moe_jax.study.timing import timing_of
from tests import tiny_model

ARCHITECTURE = tiny_model.ARCHITECTURE
EXECUTION = execution_of(ARCHITECTURE)
LAYERS = ARCHITECTURE.decoder.num_moe_layers


@pytest.fixture(scope="module")
def engine():
    return Engine(jax.device_put(tiny_model.random_params()), tiny_model.tokenizer(), ())


@pytest.fixture(scope="module")
def trace():
    """A trace of a model with 16 experts that prefers the first ones."""
    random = np.random.default_rng(0)
    preference = random.gumbel(size=(LAYERS, 6, 12, 16)) - np.arange(16) / 4
    return Trace(np.argsort(-preference, axis=3)[..., :8].astype(np.uint8), 16)


def tokens(rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, ARCHITECTURE.decoder.vocab_size, (rows, length))


def load_of(experts):
    return np.bincount(experts.ravel(), minlength=16)


@pytest.mark.parametrize(("policy", "k"), [("model", 8), ("topk:3", 3)])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_each_decode_step_runs_the_experts_of_the_next_recorded_token(engine, trace, monkeypatch, policy, k, rows):
    model = speed.TimedModel(engine, EXECUTION, policy, SamplingConfig(), trace, routing=True)
    case = speed.Decode(model, tokens(rows, 9), prompt_length=5)
    monkeypatch.setattr(speed, "steps_at_once", lambda seconds, most: 3)
    samples = case.take(4) + case.take(4)
    assert len(samples) == 4
    expert_LBTK = trace.replay(LAYERS, 16, 8, rows, 9)
    for number, sample in enumerate(samples):
        expected_LE = np.stack([load_of(layer[:, 5 + number, :k]) for layer in expert_LBTK])
        np.testing.assert_array_equal([load_of(layer[layer >= 0]) for layer in sample.chosen_LNK], expected_LE)
        distinct = int(np.count_nonzero(expected_LE))
        assert sample.step == roofline.Step([5 + number] * rows, [1] * rows, rows * k * LAYERS, distinct)
        assert sample.seconds > 0


@pytest.mark.parametrize(("policy", "k"), [("model", 8), ("topk:3", 3)])
@pytest.mark.parametrize("length", [16, 21])
def test_a_prefill_runs_the_experts_of_its_tokens(engine, trace, policy, k, length):
    model = speed.TimedModel(engine, EXECUTION, policy, SamplingConfig(), trace, routing=True)
    [sample] = speed.Prefill(model, tokens(1, length)[0]).take(1)
    expert_LBTK = trace.replay(LAYERS, 16, 8, 1, length)
    expected_LE = np.stack([load_of(layer[..., :k]) for layer in expert_LBTK])
    np.testing.assert_array_equal([load_of(layer[layer >= 0]) for layer in sample.chosen_LNK], expected_LE)
    assert sample.step == roofline.Step([0], [length], length * k * LAYERS, np.count_nonzero(expected_LE))


def test_a_prefill_in_chunks_runs_the_experts_of_its_tokens(engine, trace, monkeypatch):
    monkeypatch.setattr(caches, "CHUNK", 8)
    model = speed.TimedModel(
        Engine(engine.params, None, ()), EXECUTION, "topk:3", SamplingConfig(), trace, routing=True
    )
    [sample] = speed.Prefill(model, tokens(1, 21)[0]).take(1)
    expert_LBTK = trace.replay(LAYERS, 16, 8, 1, 21)
    np.testing.assert_array_equal(sample.chosen_LNK[:, :21, :3], expert_LBTK[:, 0, :, :3])
    assert sample.step.kept_slots == 21 * 3 * LAYERS


def test_decode_steps_are_those_of_the_engine(engine, monkeypatch):
    """With the engine's tokens as input they route like the engine; replaying that routing changes no token."""
    prompts = [[5, 6, 7, 8, 9], [300, 4, 88, 17, 2]]
    sampling = SamplingConfig(max_new_tokens=8)
    ran = engine.run(make_requests(prompts, None, EXECUTION, sampling=sampling), EXECUTION)
    tokens_BT = np.array([prompt + list(one.ids) for prompt, one in zip(prompts, ran.completions)])
    case = speed.Decode(speed.TimedModel(engine, EXECUTION, None, SamplingConfig()), tokens_BT, prompt_length=5)
    monkeypatch.setattr(speed, "steps_at_once", lambda seconds, most: 3)
    drawn = []
    call = case._rows._call
    monkeypatch.setattr(case._rows, "_call", lambda *given: [result := call(*given), drawn.append(result[1])][0])
    steps = [case.take(1)[0].step for _ in range(4)] + [sample.step for sample in case.take(3)]
    assert sum(step.distinct_experts for step in steps) / LAYERS == pytest.approx(ran.measured.distinct_experts)
    [untimed, *drawn] = drawn
    np.testing.assert_array_equal(untimed.token_SB[0], drawn[0].token_SB[0])
    assert [int(one.count) for one in drawn] == [1, 1, 1, 1, 3]
    got_TB = np.concatenate([one.token_SB[: int(one.count)] for one in drawn])
    np.testing.assert_array_equal(got_TB.T, tokens_BT[:, 6:])


@pytest.mark.parametrize("at_once", [1, 2])
def test_policies_on_the_same_rows_wake_the_experts_recorded_for_each_step(engine, at_once):
    random, cached, count = np.random.default_rng(2), 14 - at_once, 3  # as many steps as 16 positions have room for
    engine = Engine(engine.params, None, ())  # whose programs take steps of one length
    rows = speed.Rows.of_zeros(engine, EXECUTION, count, cached, at_once)
    chosen_PSLBK = np.argsort(random.random((2, 4, LAYERS, count, 16)))[..., :6]
    chosen_PSLBK[random.random(chosen_PSLBK.shape) < 0.3] = -1
    cases = [
        speed.Replay(rows, cached, parse(spec), one, at_once) for spec, one in zip(("model", "topk:3"), chosen_PSLBK)
    ]
    cases[0].compile()
    for samples, chosen_SLBK in zip(speed.take_turns(cases, [4, 4]), chosen_PSLBK, strict=True):
        for number, (sample, chosen_LBK) in enumerate(zip(samples, chosen_SLBK, strict=True)):
            distinct = sum(len({*layer[layer >= 0].tolist()}) for layer in chosen_LBK)
            at = cached + number % at_once
            step = roofline.Step([at] * count, [1] * count, int((chosen_LBK >= 0).sum()), distinct)
            assert sample.step == speed.replayed_step(chosen_LBK, at) == step
            assert sample.seconds > 0


def test_cases_take_turns(engine):
    model = speed.TimedModel(engine, EXECUTION, None, SamplingConfig())
    cases = [speed.Prefill(model, tokens(1, 16)[0]), speed.Decode(model, tokens(2, 12), prompt_length=4)]
    samples = {case.name: [] for case in cases}
    for number in (1, 2, 3):
        for case, taken in zip(cases, speed.take_turns(cases, [1, 2])):
            samples[case.name] += taken
        assert {name: len(taken) for name, taken in samples.items()} == {"prefill_16": number, "decode_2": 2 * number}


def test_a_timing_compares_medians_with_floors(engine):
    model = speed.TimedModel(engine, EXECUTION, "topk:4", SamplingConfig())
    case = speed.Decode(model, tokens(2, 12), prompt_length=4)
    steps = [roofline.Step([n, n], [1, 1], 2 * 4 * LAYERS, 6 * LAYERS) for n in (4, 5, 6)]
    samples = [speed.Sample(seconds, step) for seconds, step in zip((0.002, 0.004, 0.010), steps)]
    machine = roofline.Machine(1e9, 1e30)
    timing = timing_of(case, samples, EXECUTION, machine, 4)
    work = roofline.work(ARCHITECTURE, steps[1], 4)
    assert timing.quartiles_ms == pytest.approx((3, 4, 7))
    assert (timing.bytes, timing.flops) == (work.bytes, work.flops)
    assert timing.floor_ms == pytest.approx(work.bytes / 1e6)
    assert timing.over_floor == pytest.approx(4 / timing.floor_ms)
    assert timing.tokens_per_s == pytest.approx(500)
    assert timing.distinct_experts == 6
    assert timing.independent_experts == pytest.approx(16 * (1 - (1 - 4 / 16) ** 2))


def test_a_program_beyond_the_memory_is_refused(engine, monkeypatch):
    model = speed.TimedModel(engine, EXECUTION, None, SamplingConfig())
    monkeypatch.setattr(caches, "require_memory", lambda *arguments: None)
    monkeypatch.setattr(memory, "device_bytes", lambda: 1)
    with pytest.raises(ValueError, match=r"prefill_16 needs 0.0 GB of memory, 0.0 GB available: expected fewer"):
        speed.Prefill(model, tokens(1, 16)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_weights_have_the_shapes_of_the_model(dtype):
    params = random_model.random_params(ARCHITECTURE, dtype, seed=3)
    expected = jax.eval_shape(lambda: decoder.split(decoder.Decoder(ARCHITECTURE, nnx.Rngs(0))))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert (params["norm_D"] == 1).all() and (params["moe"]["router"]["bias_LE"] == 0).all()
    drawn = [
        np.asarray(leaf, np.float32).ravel() for leaf in (params["embedding_VD"], *params["moe"]["experts"].values())
    ]
    for one in drawn:
        assert (one.mean(), one.std()) == (pytest.approx(0, abs=2e-3), pytest.approx(64**-0.5, rel=0.02))
        assert abs(np.corrcoef(one[:-64], one[64:])[0, 1]) < 0.02  # between neighbouring rows
    assert abs(np.corrcoef(drawn[0][:30000], drawn[1][:30000])[0, 1]) < 0.02


def test_random_weights_beyond_the_memory_are_refused(monkeypatch):
    expected = 4 * parameters.count(ARCHITECTURE)
    monkeypatch.setattr(memory, "device_bytes", lambda: expected)
    random_model.random_params(ARCHITECTURE, jnp.float32, 0)
    monkeypatch.setattr(memory, "device_bytes", lambda: expected - 1)
    with pytest.raises(
        ValueError, match=r"the model needs 0.0 GB of memory, 0.0 GB available: expected a smaller decoder.num_layers"
    ):
        random_model.random_params(ARCHITECTURE, jnp.float32, 0)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_steps_with_non_finite_results_are_not_timed(engine, monkeypatch, kind):
    model = speed.TimedModel(engine, EXECUTION, "model", SamplingConfig())
    case = speed.Prefill(model, tokens(1, 5)[0]) if kind == "prefill" else speed.Decode(model, tokens(3, 9), 5)
    if kind == "prefill":
        program = case._program
        monkeypatch.setattr(case, "_program", lambda *given: (made_of_nan(program(*given)[0]), None))
    else:
        call = case._rows._call
        monkeypatch.setattr(case._rows, "_call", lambda *given: (1.0, made_of_nan(call(*given)[1])))
    with pytest.raises(ValueError, match=rf"a step of {kind}_\d: not finite"):
        case.take(1)


def made_of_nan(drawn):
    [name] = [name for name in drawn._fields if name.startswith("log_probability")]
    return drawn._replace(**{name: jnp.full_like(getattr(drawn, name), jnp.nan)})
