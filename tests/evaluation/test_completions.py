"""Completion parse rate: which headers are asked for, and which bodies count."""

import pytest

import moe_jax
from moe_jax.engine.request import execution_of
from moe_jax.evaluation import completions
from moe_jax.evaluation.completions import Header, parses
from moe_jax.routing.policies.parse import parse
from moe_jax.text.documents import Document
from tests import tiny_model

TEXT = """import os


class Fox:
    def __init__(self, name):
        self.name = name

    async def jump(self,
                   over="dog"):
        return over


def short(): return 1


def lazy(x):
    # a remark
    \"\"\"Sleeps.\"\"\"
    return x
"""
DOCUMENTS = [Document("test", "fox.py", TEXT), Document("test", "old.py", "print 'fox'\n")]


def test_headers_end_where_their_body_begins():
    found = completions.make_headers(DOCUMENTS, tiny_model.tokenizer(), 3)
    by_name = {header.text.split("(")[0].split()[-1]: header for header in found}
    assert set(by_name) == {"__init__", "jump", "lazy"}  # `short` has no body of its own lines
    assert by_name["jump"].text == '    async def jump(self,\n                   over="dog"):\n        '
    assert [by_name[name].column for name in ("jump", "lazy")] == [4, 0]
    for header in found:
        text = tiny_model.tokenizer().decode(list(header.ids))
        assert text.endswith(header.text) and text in TEXT and len(header.ids) <= completions.PROMPT
    with pytest.raises(ValueError, match="has 3 headers of functions: expected 4"):
        completions.make_headers(DOCUMENTS, tiny_model.tokenizer(), 4)


TOP, METHOD = Header(0, (), "def f(x):\n    ", 0), Header(0, (), "    def f(x):\n        ", 4)


@pytest.mark.parametrize(
    ("header", "text", "finished", "expected"),
    [
        (TOP, "return x\n", True, True),
        (TOP, "return (x\n", True, False),
        (TOP, "return x\n\n\ndef g(:\n", True, True),  # text after the function is not judged
        (TOP, "return x\n    if x", False, True),  # an incomplete last line is not judged if the budget ran out
        (TOP, "return x\n    if x", True, False),
        (TOP, "return x", False, False),  # an empty body
        (TOP, "if x:\n        y = 1\n    return", True, True),
        (TOP, "if x:\n    return", True, False),
        (METHOD, "return x\n\n    def g(self:\n", True, True),
        (METHOD, "for y in x:\n        pass\n", True, False),
        (METHOD, "return x\n# left\n", True, True),
        (TOP, "return '\\d'\n", True, True),  # a warning is not an error
        (TOP, "x = '\0'\n", True, False),
    ],
)
def test_which_bodies_parse(header, text, finished, expected):
    assert parses(header, text, finished) is expected


def test_every_policy_completes_every_header_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "BATCH", 4)
    architecture = tiny_model.changed(decoder={"max_context": 256})
    model = moe_jax.load(tiny_model.write_model(tmp_path / "model", architecture))
    headers = completions.make_headers(DOCUMENTS, model.tokenizer, 3)
    compared = [parse("topk:8"), parse("topk:2")]
    asked = []

    def judge(header, text, finished):
        asked.append((header, text))
        return len(asked) % 3 == 0

    monkeypatch.setattr(completions, "parses", judge)
    settings = {"max_new_tokens": 6, "seed": 3}
    found = completions.complete(
        model.engine, model.tokenizer, headers, compared, execution_of(architecture), **settings
    )
    assert len(asked) == 12
    assert [header for header, _ in asked] == headers * 4
    assert found.reshape(-1).tolist() == [n % 3 == 2 for n in range(12)]
    prompts = [list(header.ids) for header in headers]
    expected = [
        one.text
        for spec in ("topk:8", "topk:2")
        for temperature in (0.0, completions.SAMPLED_TEMPERATURE)
        for one in model.generate(prompts, max_new_tokens=6, policy=spec, temperature=temperature, seed=[3, 4, 5])
    ]
    assert [text for _, text in asked] == expected
