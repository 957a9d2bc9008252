import json

import pytest

from moe_jax.text import chat
from tests.chat_templates import CHATML, INST, MESSAGE, RENDERED

TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")


@pytest.mark.parametrize("template", RENDERED)
def test_rendered(template):
    assert chat.render(template, TOKENS, MESSAGE) == RENDERED[template]


def test_where_templates_are_found(tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template: expected chat_template\.jinja or chat_template in"):
        chat.load_template(tmp_path)
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": INST, **tokens}))
    assert chat.load_template(tmp_path) == (INST, {"bos_token": "<s>", "eos_token": "</s>"})
    both = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    config.write_text(json.dumps({"chat_template": both}))
    assert chat.load_template(tmp_path) == (CHATML, {})
    (tmp_path / "chat_template.jinja").write_text("own")
    assert chat.load_template(tmp_path) == ("own", {})
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        chat.load_template(tmp_path)


def test_whole_conversations(tmp_path):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because. "}]
    assert chat.load_renderer(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    render = chat.load_renderer(tmp_path)
    assert render(messages) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause. <|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text(INST)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    render = chat.load_renderer(tmp_path)
    assert render(messages) == "<|endoftext|>\n[INST] Why? [/INST]\nBecause. <|endoftext|>"
    with pytest.raises(ValueError, match="Roles must alternate user/assistant"):
        render(messages[1:])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[0].content / 2 }}", "TypeError"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(template, words):
    with pytest.raises(ValueError, match=f"the chat template cannot be applied: .*{words}"):
        chat.render(template, {}, MESSAGE)
