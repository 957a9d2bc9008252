"""Generation against its plain definition: score the whole sequence again for every token, and take the best."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.schema import SamplingConfig
from moe_jax.engine import batch, cache, generate, steps
from moe_jax.engine.batch import group_by_length, pad_prompts
from moe_jax.engine.generate import Engine
from moe_jax.engine.request import execution_of, make_requests, policy_of_each
from moe_jax.engine.stopping import StoppingText
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from tests import tiny_model

EXECUTION = execution_of(tiny_model.ARCHITECTURE)
PROMPTS = ["The quick brown", "a walk through the woods, said the", "lazy"]  # 16 tokens at most: one bucket


@pytest.fixture(scope="module")
def params():
    return jax.device_put(tiny_model.random_params())


@pytest.fixture(scope="module")
def engine(params):
    return Engine(params, tiny_model.tokenizer(), end_ids=())


@pytest.fixture
def compilations():
    """A list that grows by one for each program that XLA compiles."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def requests(prompts=PROMPTS, policy=None, seed=0, execution=EXECUTION, **sampling):
    settings = SamplingConfig(**{"max_new_tokens": 12, **sampling})
    tokenizer = tiny_model.tokenizer()
    return make_requests(prompts, tokenizer, execution, sampling=settings, policy=policy, seed=seed)


def run(engine, *args, on_text=lambda index, piece: None, **kwargs):
    return engine.run(requests(*args, **kwargs), EXECUTION, on_text)


@jax.jit
def log_probabilities(params, tokens_BT, live):
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    x_BTD, _ = decoder.hidden(params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), live, EXECUTION)
    return jax.nn.log_softmax(decoder.logits(params, x_BTD))


def best_continuation(params, ids, k, count):
    """The best tokens and their log-probabilities; the whole sequence is scored again for each."""
    padded_BT = np.zeros((1, 32), np.int32)
    padded_BT[0, : len(ids)] = ids
    best, log_probability = [], []
    live = policies.settings([parse(f"topk:{k}")], EXECUTION.architecture, EXECUTION.k_max)
    for at in range(len(ids), len(ids) + count):
        log_V = np.asarray(log_probabilities(params, padded_BT, live)[0, at - 1])
        best.append(int(log_V.argmax()))
        log_probability.append(log_V.max())
        padded_BT[0, at] = best[-1]
    return tuple(best), log_probability


def test_greedy_completions_are_the_best_tokens_of_the_whole_sequence(engine, params):
    """Three ragged prompts in a batch of four rows, each with its own policy."""
    policy = ["topk:2", None, parse("topk:5")]
    completions, measured = run(engine, policy=policy)
    for request, k, completion in zip(requests(), (2, 8, 5), completions):
        best, log_probability = best_continuation(params, request.ids, k, 12)
        assert completion.ids == best
        np.testing.assert_allclose(completion.log_probabilities, log_probability, rtol=1e-4, atol=1e-5)
        assert completion.text == tiny_model.tokenizer().decode(best)
        assert (completion.finish_reason, completion.experts_per_token) == ("length", k)
    assert measured.prefill_tokens == sum(len(request.ids) for request in requests())
    assert (measured.decode_steps, measured.decode_tokens) == (11, 33)
    assert measured.kept_slots == 11 * (2 + 8 + 5)  # none for the fourth row


def test_within_a_bucket_nothing_compiles(engine, compilations):
    execution = execution_of(tiny_model.ARCHITECTURE, k_max=10)  # which no other test compiles for

    def compiled_by(*args, **kwargs):
        before = len(compilations)
        completions, _ = engine.run(requests(*args, execution=execution, **kwargs), execution)
        return len(compilations) - before, completions[0].experts_per_token

    prompts = [[1] * 5, [2] * 9, [3]]
    assert compiled_by(prompts) == (2, 8)  # a prefill and a decode step
    assert compiled_by(prompts, policy="topk:2") == (0, 2)
    assert compiled_by(prompts, policy=["layers:1,10", "topk:8", "model"]) == (0, 5.5)
    assert compiled_by(prompts, policy=["mass:0.7+renormalize:none", "ratio:0.5,min=2", "layers:1,3"])[0] == 0
    assert (
        compiled_by(prompts, policy=["opportunistic:2", "topk:3", "opportunistic:2"])[0] == 2
    )  # another kind of policy
    assert compiled_by(prompts, policy=["mass:0.5+opportunistic:1", "opportunistic:4", "ratio:0.3"])[0] == 0
    assert compiled_by(prompts, temperature=0.7, top_k=5, top_p=0.9, seed=[1, 2, 3], stop=("x",)) == (0, 8)
    assert compiled_by([*prompts, [4] * 16], max_new_tokens=16) == (0, 8)
    assert compiled_by([[5] * 17] * 3, policy="topk:10") == (1, 10)  # the prefill of another bucket


def test_a_prompt_read_in_chunks_is_continued_as_one_read_at_once(params, engine, monkeypatch):
    """Prompts that end in each chunk and at the end of one, each with its own policy, and a row without a request."""
    prompts = [list(range(5, 5 + length)) for length in (3, 26, 16)]
    settings = {"policy": ["topk:3", None, "layers:2,5"], "max_new_tokens": 6}
    expected, at_once = run(engine, prompts, **settings)
    monkeypatch.setattr(cache, "CHUNK", 8)
    got, in_chunks = run(Engine(params, tiny_model.tokenizer(), end_ids=()), prompts, **settings)
    for one, other in zip(got, expected, strict=True):
        assert (one.ids, one.experts_per_token) == (other.ids, other.experts_per_token)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=1e-5, atol=1e-5)
    assert in_chunks.kept_slots == at_once.kept_slots
    first, _ = run(Engine(params, tiny_model.tokenizer(), end_ids=()), prompts, **settings | {"max_new_tokens": 1})
    assert [one.experts_per_token for one in first] == [3, 8, 3.5]  # of the prompt


def test_a_long_prompt_beside_short_ones_pads_none_of_them(params, engine, monkeypatch):
    """Prompts that are read in groups and inserted into slots give the same tokens as when read together."""
    prompts = [[1, 2, 3], [4] * 26, [5, 6], [7] * 25, [8]]
    settings = {"policy": ["topk:3", None, "opportunistic:2", "topk:2", "opportunistic:2"], "max_new_tokens": 6}
    expected, together = run(engine, prompts, **settings)
    assert len(group_by_length(requests(prompts, **settings), EXECUTION).groups) == 1
    monkeypatch.setattr(cache, "CHUNK", 32)
    monkeypatch.setattr(cache, "SHORTEST", 4)
    grouping = group_by_length(requests(prompts, **settings), EXECUTION)
    assert grouping == (8, 32, (((1, 3), (2, 32, 32)), ((0, 2, 4), (4, 4, 4))))
    got, in_groups = run(Engine(params, tiny_model.tokenizer(), end_ids=()), prompts, **settings)
    for one, other in zip(got, expected, strict=True):
        assert (one.ids, one.experts_per_token) == (other.ids, other.experts_per_token)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=1e-5, atol=1e-5)
    assert (in_groups.kept_slots, in_groups.distinct_experts) == (together.kept_slots, together.distinct_experts)


def test_no_group_reads_more_tokens_at_once_than_memory_is_for(engine, monkeypatch):
    monkeypatch.setattr(batch, "MOST_TOKENS", 32)
    monkeypatch.setattr(cache, "SHORTEST", 4)
    asked = requests([[number] * 5 for number in range(1, 8)], max_new_tokens=2)
    grouping = group_by_length(asked, EXECUTION)
    assert grouping == (8, 8, (((0, 1, 2, 3), (4, 8, 8)), ((4, 5, 6), (4, 8, 8))))
    got = engine.run(asked, EXECUTION).completions
    for request, completion in zip(asked, got, strict=True):
        [alone] = engine.run([request], EXECUTION).completions
        assert completion.ids == alone.ids


def test_several_steps_in_a_call_give_the_tokens_of_single_steps(engine, params, monkeypatch):
    """Rows end at a token and at their limit within a call; the policy is batch-aware, so a row too many would show."""
    whole = run(engine, temperature=1.0, policy="opportunistic:1").completions
    ending = Engine(params, tiny_model.tokenizer(), end_ids=[whole[2].ids[2]])
    settings = {"temperature": 1.0, "policy": "opportunistic:1"}

    def by(count):
        monkeypatch.setattr(generate, "steps_at_once", lambda seconds, most: count)
        return run(ending, **settings)

    one, five = by(1), by(5)
    assert {completion.finish_reason for completion in one.completions} == {"length", "end"}
    assert repr(five.completions) == repr(one.completions)  # NaN, where nothing was decoded, does not equal itself
    for name in ("decode_steps", "decode_tokens", "kept_slots", "distinct_experts"):
        assert getattr(five.measured, name) == getattr(one.measured, name)


def test_a_stop_string_ends_a_row_before_the_next_step(engine, monkeypatch):
    """Only the host finds it; tokens sampled after it are dropped, and other rows' experts are counted without them."""
    monkeypatch.setattr(generate, "steps_at_once", lambda seconds, most: 8)
    stop = run(engine, ["The"], max_new_tokens=16).completions[0].text[4:6]
    (alone,), measured = run(engine, ["The"], max_new_tokens=16, stop=(stop,))
    assert alone.finish_reason == "stop" and measured.decode_steps == len(alone.ids) - 1
    calls = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda *args: [calls.append(args[2]), step(*args)][1])
    with_other = run(engine, ["The", "lazy"], max_new_tokens=16, stop=(stop,)).completions
    assert with_other[0].ids == alone.ids and set(calls) == {1}


def test_routing_is_returned_on_request(engine):
    read = pad_prompts(requests(policy="topk:3"), EXECUTION)
    program = engine.prefill_program(read, EXECUTION, routing=True)
    result, _ = program(engine.params, read.tokens_BT, read.length_B, read.budget_B, engine.end_I, read.live)
    chosen_LBTK = np.asarray(result.chosen_LNK).reshape(2, *read.tokens_BT.shape, -1)
    kept_B = [np.count_nonzero(chosen_LBTK[:, row] >= 0) for row in range(4)]
    assert kept_B == result.kept_B.tolist() == [2 * 3 * length for length in read.length_B]
    assert int(result.distinct) == sum(len(np.unique(chosen_BTK[chosen_BTK >= 0])) for chosen_BTK in chosen_LBTK)
    assert engine.prefill(read, EXECUTION)[0].chosen_LNK is None


def test_a_longer_prompt_does_not_make_a_longer_program(params):
    context = 16 * cache.CHUNK
    architecture = tiny_model.changed(decoder={"max_context": context})
    execution = execution_of(architecture)

    def lines(length):
        read = pad_prompts(requests([[1] * length], execution=execution, max_new_tokens=1), execution)
        given = (params, read.tokens_BT, read.length_B, read.budget_B, np.zeros(0, np.int32), read.live)
        static = {"execution": execution, "memory": read.shape.memory, "chunk": cache.CHUNK, "routing": False}
        return len(steps.prefill.lower(*given, **static).as_text().splitlines())

    assert lines(context - 1) <= 1.05 * lines(2 * cache.CHUNK)


def test_a_request_samples_the_same_tokens_alone_and_in_a_batch(engine):
    settings = {"temperature": 1.3, "top_k": 50, "top_p": 0.95}
    policy, seed = ["topk:3", "topk:8", "topk:1"], [5, 6, 7]
    together = run(engine, policy=policy, seed=seed, **settings).completions
    backwards = run(engine, PROMPTS[::-1], policy[::-1], seed[::-1], **settings).completions
    for index in range(3):
        (alone,) = run(engine, [PROMPTS[index]], policy[index], seed[index], **settings).completions
        assert alone.ids == together[index].ids == backwards[2 - index].ids
    begun = [*requests()[1].ids, *together[1].ids[:3]]
    (rest,) = run(engine, [begun], policy[1], seed[1], **settings, max_new_tokens=9).completions
    assert (
        rest.ids == together[1].ids[3:]
    )  # a sample depends on its position in the text, not on where the prompt ended
    others = run(engine, policy=policy, seed=[8, 9, 10], **settings).completions
    assert all(one.ids != other.ids for one, other in zip(together, others))


def test_completions_end_at_a_stop_string_the_end_of_text_or_the_limit(engine, params):
    whole = run(engine, temperature=1.0).completions
    stop, end_id = whole[1].text[2:4], whole[2].ids[2]
    pieces = [[], [], []]

    def on_text(index, piece):
        pieces[index].append(piece)

    ending = Engine(params, tiny_model.tokenizer(), end_ids=[end_id])
    completions, measured = run(ending, temperature=1.0, stop=(stop,), on_text=on_text)
    expected = [cut(one.ids, stop, end_id) for one in whole]
    assert [(one.ids, one.text, one.finish_reason) for one in completions] == expected
    assert [one.finish_reason for one in completions][1:] == ["stop", "end"]
    assert [one.text for one in completions] == ["".join(parts) for parts in pieces]
    assert all(itertools.chain(*pieces))  # no empty pieces
    assert measured.decode_tokens == sum(len(one.ids) for one in completions) - 3
    assert measured.kept_slots == 8 * measured.decode_tokens  # finished rows keep no experts


def cut(ids, stop, end_id):
    """The part of an unstopped completion that remains."""
    text, shown = StoppingText(tiny_model.tokenizer(), [stop]), ""
    for count, token in enumerate(ids, start=1):
        shown += text.flush() if token == end_id else text.push(token)
        if text.stopped or token == end_id:
            return ids[:count], shown, "stop" if text.stopped else "end"
    return ids, shown + text.flush(), "length"


def test_the_context_ends_a_completion(engine):
    (completion,) = run(engine, [[*range(1, 17)]], max_new_tokens=99).completions
    assert (len(completion.ids), completion.finish_reason) == (32 - 16, "length")


def test_experts_are_counted_per_layer_and_step(engine):
    (alone,), measured = run(engine, ["The"], "layers:3,6", max_new_tokens=16)
    assert (alone.experts_per_token, alone.distinct_experts_per_layer_step) == (4.5, 4.5)  # one token: all distinct
    figures = {name: figure["value"] for name, figure in measured.figures().items()}
    assert figures["experts_per_token"] == figures["distinct_experts_per_layer_step"] == 4.5
    assert figures["prefill_tokens_per_s"] == measured.prefill_tokens / figures["time_to_first_token_s"]
    assert figures["decode_tokens_per_s"] == 15 / measured.decode_s
    triplets, _ = run(engine, ["The"] * 3, "topk:4", max_new_tokens=16)
    assert [one.distinct_experts_per_layer_step for one in triplets] == [4] * 3  # the same tokens, the same experts
    several, _ = run(engine, policy="topk:4")
    assert 4 < several[0].distinct_experts_per_layer_step <= 12


def test_one_token_takes_no_decode_step(engine):
    (completion,), measured = run(engine, [[1] * 16], max_new_tokens=1)
    assert (len(completion.ids), measured.decode_steps) == (1, 0)
    assert math.isnan(completion.distinct_experts_per_layer_step)
    assert math.isnan(measured.figures()["decode_tokens_per_s"]["value"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prompts": []}, "expected a sequence of at least one prompt"),
        ({"prompts": "The"}, "expected a sequence of at least one prompt"),
        ({"prompts": ["a", ""]}, "prompt 2 is empty"),
        ({"prompts": [[]]}, "prompt 1 is empty"),
        ({"prompts": [[1, 512]]}, "prompt 1 has the token 512: expected 0 to 511"),
        ({"prompts": [[-1]]}, "prompt 1 has the token -1"),
        ({"prompts": ["a\udcff"]}, "prompt 1 is not text"),
        ({"prompts": [[1] * 32]}, "prompt 1 has 32 tokens: expected at most 31"),
        ({"policy": "topk:0"}, "expected whole numbers of at least 1"),
        ({"policy": "topk:9"}, "expected 1 to 8 experts in every layer; more need a larger policy.k_max"),
        ({"policy": "layers:8"}, "expected one number for each of the model's 2 MoE layers"),
        ({"policy": "topq:4"}, "did you mean"),
        ({"policy": ["topk:4"] * 2}, "one for each of the 3 rows, got 2"),
        ({"seed": -1}, "seed = -1: expected"),
        ({"seed": [1, 2]}, "or one for each prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_run_is_refused_before_it_does(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        requests(**arguments)


@pytest.mark.parametrize("k_max", [-1, 9])
def test_k_max_stays_within_the_experts_of_the_kept_groups(k_max):
    grouped = tiny_model.changed(moe={"num_groups": 4, "num_groups_kept": 2})
    assert execution_of(grouped, 8).k_max == execution_of(grouped).k_max == 8
    with pytest.raises(ValueError, match=r"expected 0 \(the model's own 8\) to 8 experts"):
        execution_of(grouped, k_max)


def test_a_policy_for_all_or_for_each():
    assert policy_of_each("topk:3", 2) == [parse("topk:3")] * 2
    assert [policy.spec for policy in policy_of_each([None, parse("topk:2")], 2)] == ["model", "topk:2"]
