"""lm-evaluation-harness through our adapter: against its own Hugging Face model, our likelihood, and plain logits.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import itertools
import json
import pathlib

import numpy as np
import pytest

import moe_jax
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.text.documents import Document
from moe_jax.text.held_out import load_held_out
from moe_jax.text.tokenizer import encode_documents, load_tokenizer
from tests import chained_model
from tests.chat_templates import CHATML
from tests.peers import peer

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # the harness and its imports raise many
ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"
TOLERANCE = 1e-5  # relative; against the peer also in nats, since a likely token's are a small difference of logits
LONG = (DEMO / "MODEL_CARD.md").read_text() * 2


@pytest.fixture(scope="module")
def model():
    return moe_jax.load(DEMO, dtype="float32")


@pytest.fixture(scope="module")
def adapt(model):
    """Makes our adapter, with a folder's tokenizer and template and the demo's weights."""
    from moe_jax.evaluation.harness import LanguageModel

    def adapt(policy="model", folder=DEMO, **settings):
        execution = execution_of(model.architecture)
        return LanguageModel(folder, model.engine, load_tokenizer(folder), execution, policy=policy, **settings)

    return adapt


@pytest.fixture(scope="module")
def requests():
    """Makes the requests that the harness passes to a model."""
    from lm_eval.api.instance import Instance

    def make(kind, *arguments):
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    return make


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[ROOT / "assets" / "tasks"], include_defaults=False)


@pytest.fixture(scope="module")
def evaluate(adapt, manager):
    """Runs one bundled task through `simple_evaluate`: its figures, and its samples in order."""
    import lm_eval

    def run(task, policy, limit=None, chosen=None):
        which = {"limit": limit, "samples": chosen and {task: chosen}}
        result = lm_eval.simple_evaluate(adapt(policy), tasks=[task], task_manager=manager, **which)
        return result["results"][task], sorted(result["samples"][task], key=lambda one: one["doc_id"])

    return run


def log_probabilities(model, ids, policy):
    """Log-probabilities of every token but the first: float64 [len - 1]."""
    logits_TV = model.logits(np.array([ids[:-1]]), policy=policy)[0].astype(np.float64)
    log_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    return log_TV[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("policy", ["model", "topk:2"])
def test_choices_by_plain_logits(model, evaluate, policy):
    figures, samples = evaluate("held_out_next_line", policy, 6)
    right = []
    for sample in samples:
        doc, sums = sample["doc"], []
        context = model.tokenizer.encode(doc["before"]).ids
        for option in doc["options"]:
            whole = model.tokenizer.encode(f"{doc['before']}\n{option}").ids
            assert whole[: len(context)] == context
            sums.append(log_probabilities(model, whole, policy)[len(context) - 1 :].sum())
        found = [response[0][0] for response in sample["resps"]]
        np.testing.assert_allclose(found, sums, rtol=TOLERANCE)
        right.append(np.argmax(sums) == doc["answer"])
    assert len(samples) == 6 and figures["acc,none"] == np.mean(right)


@pytest.mark.parametrize("policy", ["model", "topk:2"])
def test_bits_per_byte_by_our_likelihood(model, evaluate, manager, policy):
    """For files within one window, where both cut at the same places."""
    context = model.architecture.decoder.max_context
    texts = manager.load(["held_out_bits"])["tasks"]["held_out_bits"].eval_docs["text"]
    tokens = encode_documents(model.tokenizer, [Document("", "", text) for text in texts])
    short = [number for number, ids in enumerate(tokens) if len(ids) <= context + 1][:5]
    assert len(short) == 5
    _, samples = evaluate("held_out_bits", policy, chosen=short)
    [expected] = score_documents(
        *(
            model.params,
            [tokens[number] for number in short],
            [moe_jax.policies.parse(policy)],
            execution_of(model.architecture),
        ),
        context=context,
        batch_size=4,
    )
    for sample, bits in zip(samples, expected.bits_J):
        nats, size = sample["bits_per_byte"]
        assert size == len(sample["doc"]["text"].encode())
        assert -nats / np.log(2) == pytest.approx(bits, rel=TOLERANCE)


def test_bits_per_byte_of_the_task(evaluate):
    figures, samples = evaluate("held_out_bits", "model", 5)
    nats, sizes = np.array([sample["bits_per_byte"] for sample in samples]).T
    assert figures["bits_per_byte,none"] == pytest.approx(-nats.sum() / sizes.sum() / np.log(2))
    names = {f"{one.source}/{one.name}" for one in load_held_out(ROOT / "assets" / "text")}
    assert {sample["doc"]["name"] for sample in samples} < names


@pytest.mark.parametrize("policy", ["model", "topk:2"])
def test_line_ends_by_generate(model, evaluate, policy):
    figures, samples = evaluate("held_out_line_end", policy, 6)
    for sample in samples:
        [expected] = model.generate([sample["doc"]["before"]], max_new_tokens=32, policy=policy, stop="\n")
        assert sample["resps"] == [[expected.text]]
    assert figures["exact_match,none"] == np.mean([one["resps"][0][0] == one["doc"]["end"] for one in samples])


PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("def add(a, b):\n    return ", "a + b"),  # the space moves to the continuation
    ("import numpy", " as np"),
    ("import numpy", " as pd"),
    ("", "import os\n"),
    ("x = 'naïve", " café'\n"),
    ("for i in", " range"),
    ("    ", "pass"),  # nothing but spaces
    ("class A", ":\n    def f(self):\n        pass"),
    (LONG, " import os"),
    (LONG, LONG[:1200]),
    (f"{LONG}\n\n  ", "return x"),
]


@pytest.fixture(scope="module", params=[8, 2])
def both(request, adapt):
    """The harness's own Hugging Face model with some number of experts, and ours."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    k = request.param
    theirs = HFLM(
        pretrained=peer.load_model(transformers, DEMO, num_experts_per_tok=k),
        tokenizer=transformers.AutoTokenizer.from_pretrained(DEMO),
        batch_size=1,
        device="cpu",
        max_length=512,
    )
    return theirs, adapt(f"topk:{k}", batch_size=4)


def test_loglikelihood_of_the_peer(both, requests):
    theirs, ours = both
    expected, found = (one.loglikelihood(requests("loglikelihood", *PAIRS)) for one in (theirs, ours))
    np.testing.assert_allclose(
        *([answer[0] for answer in answers] for answers in (found, expected)), rtol=TOLERANCE, atol=TOLERANCE
    )
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert {type(one) for one in itertools.chain(*found)} == {float, bool}
    assert ours.num_truncated == 3


def test_tokens_of_the_peer(both):
    theirs, ours = both
    for context, continuation in PAIRS:
        assert ours.tok_encode(context) == theirs.tok_encode(context)
        if context:
            assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    assert ours.max_length == theirs.max_length


def test_loglikelihood_rolling_of_the_peer(both, requests, monkeypatch):
    """Texts of no, one and several windows. The peer is kept from scoring the first token, which ours never scores."""
    theirs, ours = both
    monkeypatch.setattr(theirs, "add_bos_token", False)
    asked = requests("loglikelihood_rolling", ("import os\n",), (LONG,), ("",), (LONG[:700],))
    expected, found = theirs.loglikelihood_rolling(asked), ours.loglikelihood_rolling(asked)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
    assert found[2] == 0


GREEDY = [
    ("import numpy as", {"until": ["\n"], "max_gen_toks": 12}),
    ("def add(a, b):\n    return", {"until": ["\n\n", "def "], "max_gen_toks": 24, "do_sample": False}),
    ("", {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0}),
    (LONG, {"until": ["\n"], "max_gen_toks": 40}),
]


def test_generate_until_of_the_peer(both, requests):
    theirs, ours = both
    asked = requests("generate_until", *GREEDY[:2], GREEDY[3])
    assert ours.generate_until(asked) == theirs.generate_until(asked)


NAMED = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
UNTIL_SPECIAL = {  # how "ab" continues, and where a task stops it
    "a special token": (["cdef", "<|im_end|>", "ghijk"], ["Question:", "</s>", "<|im_end|>"]),
    "with text": (["cd\n", "<|im_end|>", "\nefg"], ["\n<|im_end|>"]),
    "the tokenizer's own end": (["cdef", "<s>", "ghijk"], ["Question:"]),
}


@pytest.mark.parametrize("case", UNTIL_SPECIAL)
def test_special_tokens_stop_as_with_the_peer(tmp_path, requests, case):
    from lm_eval.models.huggingface import HFLM

    from moe_jax.evaluation.harness import LanguageModel

    parts, until = UNTIL_SPECIAL[case]
    tokenizer = chained_model.byte_level()
    chain = [number for part in ("ab", *parts) for number in tokenizer.encode(part, add_special_tokens=False).ids]
    config = NAMED | ({"eos_token": "<s>"} if case == "the tokenizer's own end" else {})
    folder = chained_model.write(tmp_path / "model", chain, tokenizer, config)
    asked = requests("generate_until", ("ab", {"until": until, "max_gen_toks": 9, "do_sample": False}))
    model = moe_jax.load(folder)
    ours = LanguageModel(folder, model.engine, model.tokenizer, execution_of(model.architecture))
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=64)
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_continuation_begins_as_the_peer_decodes_it(tmp_path, requests):
    """Without its context: the decoder strips its space."""
    from lm_eval.models.huggingface import HFLM

    from moe_jax.evaluation.harness import LanguageModel

    tokenizer = chained_model.sentencepiece_like()
    chain = [tokenizer.encode("ha").ids[-1], *map(tokenizer.token_to_id, ("▁be", "▁c", "</s>"))]
    config = NAMED | {"eos_token": "</s>"}
    folder = chained_model.write(tmp_path / "model", chain, tokenizer, config, token_ids={"eos_token_id": 2})
    asked = requests("generate_until", ("ha", {"until": ["Q"], "max_gen_toks": 5, "do_sample": False}))
    model = moe_jax.load(folder)
    ours = LanguageModel(folder, model.engine, model.tokenizer, execution_of(model.architecture))
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=64)
    assert ours.generate_until(asked) == theirs.generate_until(asked) == ["be c"]


def test_generate_until_by_generate(model, adapt, requests):
    """Requests of different lengths and settings in one batch; contexts that are too long lose their beginning."""
    ours = adapt("topk:2", batch_size=3)
    found = ours.generate_until(requests("generate_until", *GREEDY))
    for text, (context, settings) in zip(found, GREEDY):
        budget = settings["max_gen_toks"]
        ids = model.tokenizer.encode(context).ids[-(512 - budget) :]
        [expected] = model.generate([ids], max_new_tokens=budget, policy="topk:2", stop=settings["until"])
        assert text == expected.text
    assert ours.num_truncated == 1 and any(found)


def test_samples_depend_on_the_request_alone(model, adapt, requests):
    drawn = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    asked = requests("generate_until", *[("def f(x):\n    return", drawn)] * 5)
    first, second = (adapt(batch_size=size, seed=3).generate_until(asked) for size in (2, 5))
    assert first == second and len(set(first)) > 1
    assert adapt(seed=4).generate_until(asked) != first
    [expected] = model.generate([asked[1].args[0]], max_new_tokens=16, temperature=0.9, top_p=0.95, seed=4)
    assert first[1] == expected.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_gen_toks": 512}, "max_gen_toks = 512: expected fewer than the model's context, 512"),
        ({"repetition_penalty": 1.1}, "repetition_penalty = 1.1 is not supported: expected until, max_gen_toks"),
        ({"num_beams": 4}, "num_beams = 4 is not supported"),
    ],
)
def test_unsupported_generation_is_refused(adapt, requests, settings, words):
    with pytest.raises(ValueError, match=words):
        adapt().generate_until(requests("generate_until", ("x", settings)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (256, 0.0, 0, 1.0, ())),
        ({"until": "\n", "max_new_tokens": 5, "num_beams": 1}, (5, 0.0, 0, 1.0, ("\n",))),
        ({"do_sample": False, "temperature": 0.7}, (256, 0.0, 0, 1.0, ())),
        ({"temperature": 0.7, "top_k": 40, "until": ["a", ""]}, (256, 0.7, 40, 1.0, ("a",))),
        ({"do_sample": True}, (256, 1.0, 0, 1.0, ())),
    ],
)
def test_what_generation_settings_mean(arguments, expected):
    from moe_jax.config.schema import SamplingConfig
    from moe_jax.evaluation.harness import sampling_of

    assert sampling_of(arguments) == SamplingConfig(*expected)


def test_partial_results_are_cached(adapt, requests):
    """What `simple_evaluate(use_cache=...)` keeps of an interrupted run."""
    kept = {}

    class Hook:
        def add_partial(self, name, arguments, answer):
            kept[name, json.dumps(arguments)] = answer

    ours = adapt(batch_size=2)
    ours.set_cache_hook(Hook())
    for name, asked in {
        "loglikelihood": PAIRS[:3],
        "loglikelihood_rolling": [("import os\n",)],
        "generate_until": GREEDY[:1],
    }.items():
        found = getattr(ours, name)(requests(name, *asked))
        assert [kept[name, json.dumps(arguments)] for arguments in asked] == found
    assert len(kept) == 5


@pytest.fixture
def chatting(tmp_path):
    """The demo's tokenizer in a folder with a chat template."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return tmp_path


def test_conversations_of_the_peer(adapt, chatting):
    import transformers

    theirs, ours = transformers.AutoTokenizer.from_pretrained(chatting), adapt(folder=chatting)
    messages = [
        {"role": "user", "content": "Why do experts specialise?"},
        {"role": "assistant", "content": "They share"},
        {"role": "user", "content": "Since when? "},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.apply_chat_template(messages) == expected
    begun = [*messages[:2], {"role": "assistant", "content": "They share"}]
    expected = theirs.apply_chat_template(begun, continue_final_message=True, tokenize=False)
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == expected


def test_a_text_with_its_own_first_token_gets_no_second_one(adapt, tmp_path):
    """If the characters of a special token are encoded as that token, as in a chat template."""
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    config = json.loads((DEMO / "tokenizer_config.json").read_text()) | {"split_special_tokens": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    plain = adapt().tok_encode("import os")
    assert plain[0] == 0 and adapt().tok_encode("import os", add_special_tokens=False) == plain[1:]
    assert adapt(folder=tmp_path).tok_encode("<|endoftext|>import os") == plain
    assert adapt().tok_encode("<|endoftext|>import os")[0] == 0 != adapt().tok_encode("<|endoftext|>import os")[1]


def test_a_checkpoint_without_outer_tokens_is_refused(adapt, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    config = json.loads((DEMO / "config.json").read_text())
    nameless = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(nameless))
    with pytest.raises(ValueError, match="names no token that begins or ends a text: expected bos_token or eos_token"):
        adapt(folder=tmp_path)


def test_policies_that_do_not_fit_are_refused(adapt):
    with pytest.raises(ValueError, match="expected 1 to 8 experts"):
        adapt("topk:9")
