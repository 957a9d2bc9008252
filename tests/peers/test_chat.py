"""Chat templates against transformers: the same text and the same tokens.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import pytest

from moe_jax.text import chat
from moe_jax.text.tokenizer import load_tokenizer, save_tokenizer
from tests import tiny_model
from tests.chat_templates import MESSAGE, RENDERED

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("template", RENDERED)
def test_text_and_tokens_equal_the_peers(tmp_path, template, in_config):
    import transformers

    save_tokenizer(tiny_model.tokenizer(), tmp_path, 64)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    peer.chat_template = template
    peer.save_pretrained(tmp_path, save_jinja_files=not in_config)
    assert (tmp_path / "chat_template.jinja").exists() != in_config
    messages = [{"role": "user", "content": MESSAGE}]
    text = chat.render(*chat.load_template(tmp_path), MESSAGE)
    assert text == peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(tmp_path).encode(text, add_special_tokens=False).ids == ids
