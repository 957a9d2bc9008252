"""Next-line choice: valid questions, and scores against one sequence per option."""

import jax
import numpy as np
import pytest

from moe_jax.evaluation import choices
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from moe_jax.text.documents import Document
from tests import tiny_model

ARCHITECTURE = tiny_model.changed(decoder={"max_context": 256})
EXECUTION = decoder.Execution(ARCHITECTURE, 8, tiny_model.KERNELS)
WORDS = ["cake", "ring", "mound", "dly", "fox", "lazy", "brown", "walk", "woods"]


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)

    def line():
        return " " * rng.integers(3) + " ".join(rng.choice(WORDS, 4)) + f" {rng.integers(10**6)}"

    lines = [[line() for _ in range(30)] for _ in range(3)]
    for one in lines:
        one[3] = one[20] = "the same everywhere"
    return [Document("test", f"{number}.py", "\n".join(one)) for number, one in enumerate(lines)]


@pytest.fixture(scope="module")
def questions(documents):
    return choices.make_questions(documents, tiny_model.tokenizer(), 20, seed=1)


def test_questions_are_four_lines_of_one_file_the_true_one_first(documents, questions):
    tokenizer = tiny_model.tokenizer()
    assert len({(one.document, one.option_ids[0], one.prefix_ids) for one in questions}) == 20
    assert {one.document for one in questions} == {0, 1, 2}
    for question in questions:
        text = documents[question.document].text
        texts = [tokenizer.decode([*question.prefix_ids, *ids]) for ids in question.option_ids]
        assert texts[0] in text and not any(other in text for other in texts[1:])
        lines = [one.rsplit("\n", 1)[1] for one in texts]
        assert len(set(lines)) == 4 and all(line in text.split("\n") for line in lines)
        assert "the same everywhere" not in lines
        assert list(question.option_bytes) == [len(line.encode()) for line in lines]
        places = [text.split("\n").index(line) for line in lines]
        assert min(places) == places[0] >= choices.EARLIEST_LINE
        assert len(question.prefix_ids) + sum(map(len, question.option_ids)) <= choices.ROW


def test_too_many_questions_are_refused(documents):
    with pytest.raises(ValueError, match="next-line questions: expected 10000"):
        choices.make_questions(documents, tiny_model.tokenizer(), 10_000)


@pytest.mark.parametrize("spec", ["model", "topk:2"])
def test_options_in_one_row_are_scored_as_sequences_of_their_own(questions, spec):
    params = tiny_model.random_params(ARCHITECTURE)
    compared = [parse("topk:8"), parse(spec)]
    scored = choices.score_options(params, questions, compared, EXECUTION, batch_size=8)[1]
    hidden = jax.jit(decoder.hidden, static_argnums=5)
    live = policies.settings([parse(spec)], ARCHITECTURE, 8)
    for question, got in zip(questions, scored):
        per_byte = []
        for ids, size in zip(question.option_ids, question.option_bytes):
            tokens = np.zeros(256, np.int32)
            sequence = [*question.prefix_ids, *ids]
            tokens[: len(sequence)] = sequence
            segments = (np.arange(256) < len(sequence)).astype(np.int32)
            x_BTD, _ = hidden(params, tokens[None], np.arange(256)[None], segments[None], live, EXECUTION)
            log_TV = jax.nn.log_softmax(decoder.logits(params, x_BTD)[0], axis=1)
            end = len(question.prefix_ids)
            per_byte.append(-sum(float(log_TV[end - 1 + n, token]) for n, token in enumerate(ids)) / size)
        np.testing.assert_allclose(got, per_byte, rtol=1e-4)


def test_the_likeliest_line_is_the_answer():
    per_byte = np.array([[[1.0, 2.0, 3.0, 1.5], [2.0, 1.9, 3.0, 4.0], [1.0, 1.0, 2.0, 3.0]]])
    assert choices.is_right(per_byte).tolist() == [[True, False, False]]
