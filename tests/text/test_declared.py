"""Special tokens that are declared beside tokenizer.json are applied, with a warning."""

import json

import pytest
import tokenizers
from tokenizers import processors

from moe_jax.config.schema import SamplingConfig
from moe_jax.engine.request import execution_of, make_requests
from moe_jax.text import chat, declared
from moe_jax.text.documents import Document
from moe_jax.text.framing import outer_ids
from moe_jax.text.tokenizer import TextStream, encode_documents, load_tokenizer
from tests import chained_model, tiny_model

BOS, EOS = 258, 256
TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
HI = chained_model.byte_level().encode("Hi").ids
FRAMES = {
    "nothing": None,
    "begin": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)]),
    "both": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> <|im_end|> $A <|endoftext|>",
                special_tokens=[("<s>", BOS), ("<|im_end|>", 257), ("<|endoftext|>", EOS)],
            ),
        ]
    ),
}


def folder_of(path, frame="nothing", tokenizer=None, **files):
    """A folder with a tokenizer.json that adds tokens around a text, and other files by their names without suffix."""
    tokenizer = tokenizer or chained_model.byte_level()
    if FRAMES[frame] is not None:
        tokenizer.post_processor = FRAMES[frame]
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, fields in files.items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("frame", "fields", "before", "after"),
    [
        ("nothing", {}, [], []),
        ("nothing", {"add_bos_token": True, "add_eos_token": False}, [BOS], []),
        ("nothing", {"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
        ("nothing", {"add_eos_token": True}, [], [EOS]),
        ("nothing", {"add_bos_token": None}, [], []),
        ("begin", {"add_bos_token": True}, [BOS], []),
        ("begin", {"add_eos_token": True}, [BOS], [EOS]),
        ("begin", {"add_bos_token": False}, [], []),
        ("both", {}, [BOS, 257], [EOS]),
        ("both", {"add_bos_token": True, "add_eos_token": True}, [BOS, 257], [EOS]),
        ("both", {"add_bos_token": False}, [257], [EOS]),
        ("both", {"add_eos_token": False}, [BOS, 257], []),
    ],
)
def test_tokens_around_a_text_are_those_that_the_folder_declares(tmp_path, caplog, frame, fields, before, after):
    folder = folder_of(tmp_path / "a", frame, tokenizer_config={**TOKENS, **fields})
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hi").ids == [*before, *HI, *after]
    assert loaded.encode("Hi", add_special_tokens=False).ids == HI
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (plain.encode("Hi").ids == loaded.encode("Hi").ids) == (caplog.text == "")
    if caplog.text == "":
        assert loaded.to_str() == plain.to_str()
    warnings = len(caplog.records)
    load_tokenizer(folder)
    assert len(caplog.records) == warnings  # once


def test_other_post_processing_stays(tmp_path):
    """Byte-level tokenizers leave the space before a word out of its offsets."""
    folder = folder_of(tmp_path / "a", "both", tokenizer_config={**TOKENS, "add_bos_token": False})
    offsets = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a b").offsets
    assert offsets[0] == (0, 0) and load_tokenizer(folder).encode("a b").offsets == offsets[1:]


def test_prompts_and_documents_begin_with_it(tmp_path):
    fields = {**TOKENS, "add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    loaded = load_tokenizer(folder_of(tmp_path / "a", tokenizer_config=fields))
    execution = execution_of(chained_model.ARCHITECTURE)
    [request] = make_requests(["Hi"], loaded, execution, sampling=SamplingConfig(1))
    assert list(request.ids) == [BOS, *HI]
    plain, special = encode_documents(
        loaded, [Document("here", "a", "Hi"), Document("here", "b", "<s>Hi", special_tokens=True)]
    )
    assert plain.tolist() == special.tolist() == [BOS, *HI]
    again = load_tokenizer(folder_of(tmp_path / "b", tokenizer=loaded, tokenizer_config=fields))
    assert again.encode("Hi").ids == [BOS, *HI]


def test_tokens_of_the_map_are_used_if_the_configuration_names_none(tmp_path):
    token_map = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|im_end|>"}
    fields = {"add_bos_token": True, "bos_token": None, "eos_token": "<|endoftext|>"}
    folder = folder_of(tmp_path / "a", tokenizer_config=fields, special_tokens_map=token_map)
    (folder / "chat_template.jinja").write_text("x")
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hi").ids == [BOS, *HI]
    assert declared.read_named(folder) == TOKENS == chat.load_template(folder)[1]
    assert outer_ids(folder, loaded, {}) == (BOS, EOS)


# tokens that tokenizer.json does not know as special


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "ab"}},
        {"tokenizer_config": {"additional_special_tokens": ["c", {"content": "ab"}]}},
        {"tokenizer_config": {"extra_special_tokens": {"end_of_turn": "ab"}}},
        {"tokenizer_config": {"image_token": "ab"}},
        {"tokenizer_config": {"added_tokens_decoder": {"259": {"content": "ab", "special": True}}}},
        {"special_tokens_map": {"pad_token": {"content": "ab"}}},
        {"added_tokens": {"ab": 259}, "special_tokens_map": {"additional_special_tokens": ["ab"]}},
    ],
)
def test_a_token_of_the_vocabulary_may_be_declared_special(tmp_path, caplog, files):
    tokenizer = chained_model.byte_level()
    tokenizer.add_tokens(["ab"])  # the id 259, not a special token
    loaded = load_tokenizer(folder_of(tmp_path / "a", tokenizer=tokenizer, **files))
    ids = loaded.encode("aabb").ids
    assert ids[1] == 259 and len(ids) == 3
    assert loaded.decode(ids).replace("c", "") == "ab"
    assert "'ab' is a special token, as declared outside tokenizer.json" in caplog.text
    assert "".join(map(TextStream(loaded).push, ids)) == "ab"


def test_tokens_may_be_new(tmp_path):
    decoder = {
        "260": {"content": "<think>", "special": False},
        "259": {"content": "<|user|>", "special": True, "lstrip": False},
        "256": {"content": "<|endoftext|>", "special": True},
    }
    loaded = load_tokenizer(folder_of(tmp_path / "a", tokenizer_config={"added_tokens_decoder": decoder}))
    assert loaded.encode("<|user|>a<think>").ids == [259, *loaded.encode("a").ids, 260]
    assert loaded.decode([259, 260, 256]) == "<think>"


def test_a_folder_that_agrees_with_its_tokenizer_changes_nothing(tmp_path, caplog):
    files = {
        "tokenizer_config": {
            **TOKENS,
            "pad_token": "not there",
            "add_bos_token": False,
            "added_tokens_decoder": {"257": {"content": "<|im_end|>", "special": True}},
        },
        "special_tokens_map": TOKENS,
        "added_tokens": {"<s>": BOS},
    }
    folder = folder_of(tmp_path / "a", **files)
    assert load_tokenizer(folder).to_str() == chained_model.byte_level().to_str()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token = true and bos_token = null: expected a token"),
        ({"tokenizer_config": {"add_eos_token": True, "eos_token": "no"}}, 'eos_token = "no": expected a token'),
        ({"tokenizer_config": {**TOKENS, "add_bos_token": "yes"}}, 'add_bos_token = "yes": expected true or false'),
        ({"added_tokens": {"<s>": 7}}, "'<s>' is declared as the token 7: tokenizer.json has it, or the next .* 258"),
        ({"added_tokens": {"new": 300}}, "'new' is declared as the token 300: .* at 259"),
        ({"added_tokens": {"new": "x"}}, '"new" is declared as the token'),
        ({"tokenizer_config": {"added_tokens_decoder": {"259": 3}}}, "3 is declared as the token '259': expected one"),
        ({"tokenizer_config": {"added_tokens_decoder": [3]}}, "added_tokens_decoder is not an object"),
        ({"special_tokens_map": [3]}, "special_tokens_map.json holds a JSON list: expected an object"),
    ],
)
def test_impossible_declarations_are_refused(tmp_path, files, words):
    with pytest.raises(ValueError, match=words) as refused:
        load_tokenizer(folder_of(tmp_path / "a", **files))
    assert "\n" not in str(refused.value)


def test_our_own_tokenizer_is_unchanged(tmp_path):
    tiny_model.save_tokenizer(tiny_model.tokenizer(), tmp_path, 32)
    assert load_tokenizer(tmp_path).to_str() == tiny_model.tokenizer().to_str()
