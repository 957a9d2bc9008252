"""Each line of JSON is one document, and a damaged one is named."""

import gzip
import json
import lzma
import random

import pytest

from moe_jax.text import chat, corpus, jsonl
from moe_jax.text.documents import Document
from moe_jax.text.held_out import load_held_out
from tests.chat_templates import CHATML, INST

WORDS = ["red", "green", "blue", "value", "count", "index", "merge", "split", "left", "right", "token"]
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def render(messages):
    return chat.render_conversation(CHATML, {}, messages)


def unrelated(seed, words=60):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def write(path, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def test_every_kind_of_line(tmp_path):
    path = write(
        tmp_path / "mixed.jsonl",
        {"text": "one\u2028still one", "id": 7},
        "",
        {"messages": MESSAGES, "text": None},
        {"text": "<|im_end|>", "messages": None},
        '  {"text": "é\x85"}\r',
    )
    found = corpus.collect([path], (), render)
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
    assert found.documents == (
        Document(path, "mixed.jsonl:1", "one\u2028still one"),
        Document(path, "mixed.jsonl:3", rendered, special_tokens=True),
        Document(path, "mixed.jsonl:4", "<|im_end|>"),
        Document(path, "mixed.jsonl:5", "é\x85"),
    )
    assert found.statistics[path].files == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.jsonl.xz"])
def test_packed_files_and_byte_order_marks(name, tmp_path):
    write(tmp_path / name, '\ufeff{"text": "one"}', {"text": "two"}, {"text": "\ufeff"})
    lines = list(jsonl.read_lines(tmp_path / name))
    assert lines == [(1, "one", False), (2, "two", False), (3, "\ufeff", False)]
    assert jsonl.is_jsonl(name)
    assert not any(jsonl.is_jsonl(other) for other in ("jsonl", "a.json", "a.jsonl.txt", "a.xz"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": one}', "line 2 is not JSON: Expecting value at character 10"),
        ("{", "line 2 is not JSON: "),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["text"]', r'line 2 = \["text"\]: expected an object with text or messages'),
        ('{"prompt": "one"}', "line 2 has neither text nor messages: expected one of the two"),
        ('{"text": null}', "line 2 has neither text nor messages"),
        ({"text": "one", "messages": MESSAGES}, "line 2 has text and messages: expected one of the two"),
        ('{"text": ["one"]}', r'line 2: text = \["one"\]: expected a string'),
        (r'{"text": "\ud83d"}', "line 2 holds half of a surrogate pair"),
        ('{"messages": "one"}', 'line 2: messages = "one": expected a list of one message or more'),
        ('{"messages": []}', r"line 2: messages = \[\]: expected a list"),
        ('{"messages": ["one"]}', r'line 2: messages\[0\] = "one": expected an object'),
        ({"messages": [*MESSAGES, {"content": "one"}]}, r"line 2: messages\[2\]\.role = null: expected a string"),
        ({"messages": [{"role": "user", "content": 1}]}, r"line 2: messages\[0\]\.content = 1: expected a string"),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', "line 2 holds half of a surrogate pair"),
    ],
)
def test_damaged_lines_are_refused(line, words, tmp_path):
    path = write(tmp_path / "lines.jsonl", {"text": "one"}, line, {"text": "three"})
    for source in (path, str(tmp_path)):
        with pytest.raises(ValueError, match=rf"lines\.jsonl, {words}") as error:
            corpus.collect([source], (), render)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"text": "one"}\n{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2 is not JSON in UTF-8"):
        list(jsonl.read_lines(tmp_path / "latin.jsonl"))
    for suffix in ("gz", "xz"):
        path = tmp_path / f"cut.jsonl.{suffix}"
        write(path, *({"text": unrelated(seed)} for seed in range(200)))
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=rf"cut\.jsonl\.{suffix} is unreadable after line \d+: "):
            list(jsonl.read_lines(path))
        path.write_bytes(b"no archive")
        with pytest.raises(ValueError, match=rf"cut\.jsonl\.{suffix} is unreadable after line 0: "):
            list(jsonl.read_lines(path))


def test_conversations_need_a_template_that_takes_them(tmp_path):
    path = write(tmp_path / "chat.jsonl", {"messages": MESSAGES})
    for read in (lambda: corpus.collect([path], ()), lambda: load_held_out(path)):
        with pytest.raises(ValueError, match=r"chat\.jsonl, line 1 has messages, but the model's folder has no chat"):
            read()
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: the chat template cannot be applied: .*Roles must alt"):
        write(tmp_path / "chat.jsonl", {"messages": MESSAGES[1:]})
        corpus.collect([path], (), lambda messages: chat.render_conversation(INST, {}, messages))


def test_a_folder_of_mixed_files(tmp_path):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    write(folder / "b.jsonl", {"text": "short"}, {"text": " "}, {"text": "1 2 3 4"}, {"text": "short"})
    write(folder / "more" / "c.jsonl.xz", *({"text": f"line {number}"} for number in range(11)))
    (folder / "a.txt").write_text(unrelated(1))
    (folder / "tiny.txt").write_text("short text")
    (folder / ".hidden.jsonl").write_text("{")
    found = corpus.collect([str(folder)], ())
    lines = [f"more/c.jsonl.xz:{number}" for number in range(1, 12)]
    assert [document.name for document in found.documents] == ["a.txt", "b.jsonl:1", "b.jsonl:3", *lines]
    assert found.statistics[str(folder)].left_out == {"duplicate": 1, "empty": 1, "tiny": 1}


def test_the_digest_of_a_corpus_includes_whether_special_tokens_are_encoded(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "Why?"})
    plain = corpus.collect([path], ())
    write(tmp_path / "a.jsonl", {"messages": MESSAGES})
    meant = corpus.collect([path], (), lambda messages: "Why?")
    assert plain.documents[0].text == meant.documents[0].text and plain.sha256 != meant.sha256


def test_held_out_lines_are_excluded_wherever_they_are(tmp_path):
    question = [{"role": "user", "content": unrelated(1)}, {"role": "assistant", "content": unrelated(2)}]
    path = write(tmp_path / "held_out.jsonl", {"text": unrelated(3)}, {"messages": question}, {"text": "Short, too."})
    held_out = load_held_out(path, render)
    assert [document.special_tokens for document in held_out] == [False, True, False]
    changed = unrelated(3).split()
    changed[10] = changed[30] = "changed"
    folder = tmp_path / "data"
    folder.mkdir()
    write(
        folder / "a.jsonl",
        {"text": unrelated(3)},
        {"text": " ".join(changed)},
        {"text": "Short, too."},
        {"messages": question},
        {"messages": [{"role": "user", "content": f"Go on: {unrelated(2)}"}]},
        {"text": unrelated(4)},
        {"messages": [{"role": "user", "content": unrelated(5)}]},
    )
    (folder / "b.txt").write_text(unrelated(6, 100) + unrelated(1))
    (folder / "c.txt").write_text(unrelated(7))
    found = corpus.collect([str(folder)], held_out, render)
    assert [document.name for document in found.documents] == ["a.jsonl:6", "a.jsonl:7", "c.txt"]
    assert found.statistics[str(folder)].left_out == {"held_out": 6}
    with pytest.raises(ValueError, match=r"no training text left in .*held_out\.jsonl \(left out: 3 held out\)"):
        corpus.collect([path], held_out, render)
