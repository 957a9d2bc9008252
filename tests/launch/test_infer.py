"""launch/infer.py: in its own process where that matters, otherwise `main` is called here."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import moe_jax
from moe_jax.config import gin
from tests import chained_model, launcher_module, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = {
    *("prefill_tokens_per_s", "time_to_first_token_s", "decode_tokens_per_s"),
    *("experts_per_token", "distinct_experts_per_layer_step"),
}
SHORT = ["--set=sampling.max_new_tokens=6", "--set=policy.spec=topk:3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without an end-of-text token: it generates as many tokens as asked for."""
    architecture = tiny_model.changed(decoder={"max_context": 128})
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", architecture, token_ids={})


@pytest.fixture(scope="module")
def infer():
    """The launcher as a module."""
    return launcher_module.import_launcher("infer")


@pytest.fixture
def main(folder, tmp_path, monkeypatch):
    """Runs `main` with flags and settings; returns what it printed."""
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "out").mkdir()

    def main(*arguments, **settings):
        settings = {"model.path": str(folder), "sampling.max_new_tokens": 6, **settings}
        return launcher_module.run_main("infer", settings, tmp_path / "out", *arguments)

    return main


def start(folder, *arguments, **options):
    """Runs the launcher as a user does, from a folder that is not the repository."""
    command_line = [sys.executable, str(ROOT / "launch" / "infer.py"), f"--set=model.path={folder}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command_line, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=600, **options
    )


def test_without_a_prompt_and_a_terminal_it_shows_a_continuation_and_how_fast(folder):
    done = start(folder, *SHORT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import numpy as np\n\n\ndef normalize(x, axis=None):\n")
    for part in ("load ", "compile ", "prefill ", "decode ", "tokens/s", "3.00 experts per token"):
        assert part in done.stdout
    assert f"grouped_matmul {tiny_model.KERNELS.grouped_matmul}" in done.stdout


def test_json_is_alone_on_standard_output(folder):
    done = start(folder, *SHORT, "--json", "--out=out", input="The quick\n")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((folder.parent / "out" / "result.json").read_text())
    assert set(result["figures"]) == FIGURES and result["command"] == "infer"
    assert result["figures"]["experts_per_token"] == {"value": 3, "unit": "experts"}
    assert result["implementations"] == tiny_model.KERNELS._asdict()
    assert set(result["seconds"]) == {"load", "compile", "run", "prefill", "decode"}
    (line,) = (folder.parent / "out" / "completions.jsonl").read_text().splitlines()
    completion = json.loads(line)
    assert completion["prompt"] == "The quick\n" and len(completion["ids"]) == 6
    assert completion["text"] in done.stderr


def test_a_refusal_is_one_line_and_status_2(folder):
    done = start(folder, "--set=policy.spec=topk:0", "--prompt=The", "--out=refused", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: policy 'topk:0': expected")
    assert not (folder.parent / "refused").exists()


def test_several_prompts_run_as_a_batch(main, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("said the fox")
    text = main("--prompt=The quick", "--prompt=lazy", f"--prompt_file={tmp_path / 'prompt.txt'}")
    lines = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["The quick", "lazy", "said the fox"]
    assert all(len(line["ids"]) == 6 for line in lines)
    expected = [f"--- {n} of 3\n{line['prompt']}{line['text']}\n" for n, line in enumerate(lines, start=1)]
    assert capsys.readouterr().out == "".join(expected) + "\n"
    assert "18 tokens generated (length, length, length)" in text


def test_a_chat_model_reads_messages_within_its_template(main, folder, tmp_path, capsys):
    chatting = tmp_path / "chatting"
    shutil.copytree(folder, chatting)
    (chatting / "chat_template.jinja").write_text("{{ messages[0].content | upper }}:{{ add_generation_prompt }}")
    main("--chat", "--prompt=fox", "--prompt=lazy", **{"model.path": str(chatting)})
    asked = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in asked] == ["fox", "lazy"]
    expected = [f"--- {n} of 2\n{line['prompt']}\n{line['text']}\n" for n, line in enumerate(asked, start=1)]
    assert capsys.readouterr().out == "".join(expected) + "\n"
    loaded = moe_jax.load(chatting)
    ids = loaded.tokenizer.encode("FOX:True", add_special_tokens=False).ids
    assert asked[0]["text"] == loaded.generate([ids], max_new_tokens=6)[0].text


def test_one_token_leaves_no_nan_in_json(main, tmp_path):
    main("--prompt=The", **{"sampling.max_new_tokens": 1})
    completion = json.loads((tmp_path / "out" / "completions.jsonl").read_text())
    assert completion["distinct_experts_per_layer_step"] is None
    assert json.loads((tmp_path / "out" / "result.json").read_text())["figures"]["decode_tokens_per_s"]["value"] is None


def test_non_finite_values_are_named_and_finished_text_is_kept(main, tmp_path):
    folder = chained_model.write(tmp_path / "large", chain=[*range(256)], gain=40_000)
    with pytest.raises(ValueError, match=r"prompt 1, 'model': not finite .* expected model\.dtype=bfloat16 or float32"):
        main("--prompt=ab", "--prompt=hello there", **{"model.path": str(folder), "model.dtype": "float16"})
    completions = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [one["finish_reason"] for one in completions] == ["not finite"] * 2
    assert [one["prompt"] for one in completions] == ["ab", "hello there"]
    assert not (tmp_path / "out" / "result.json").exists()


def test_an_interruption_saves_finished_text(main, capsys, tmp_path, monkeypatch):
    """Ctrl-C after the third token."""
    from moe_jax.engine import generate

    taken = []
    append = generate.RunningRequest.append

    def interrupted(self, *arguments):
        taken.append(self)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return append(self, *arguments)

    monkeypatch.setattr(generate.RunningRequest, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main("--prompt=The")
    completion = json.loads((tmp_path / "out" / "completions.jsonl").read_text())
    assert completion["finish_reason"] == "interrupted"
    assert capsys.readouterr().out == "The" + completion["text"] and completion["text"]


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        (["--prompt="], {}, "prompt 1 is empty"),
        (["--prompt=" + "fox " * 200], {}, r"prompt 1 has \d+ tokens: expected at most 127"),
        (["--prompt_file=nowhere.txt"], {}, "--prompt_file = 'nowhere.txt': No such file"),
        (["--prompt_file=."], {}, "--prompt_file = '.': Is a directory"),
        (["--prompt_file=binary"], {}, "--prompt_file = 'binary': byte 1 is not UTF-8; expected text"),
        (["--prompt_file=zeros"], {}, "'zeros': byte 2 is 0; expected text"),
        (["--prompt_file=empty"], {}, "'empty' is empty"),
        (["--chat", "--prompt=The"], {}, "tiny has no chat template: expected chat_template.jinja"),
        ([], {"model.path": "nowhere"}, "model.path = 'nowhere' does not exist"),
        ([], {"model.path": ""}, "model.path = '': expected a folder"),
        ([], {"policy.spec": "topk:9"}, "expected 1 to 8 experts in every layer; more need a larger policy.k_max"),
        ([], {"policy.spec": "tpok:2"}, 'did you mean "topk:4"'),
        ([], {"policy.k_max": 17}, "policy.k_max = 17: expected 0"),
        ([], {"moe.k": 3}, "moe.k = 3: expected the model's own, 8; for fewer active experts: policy.spec"),
        ([], {"kernels.grouped_matmul": "fast"}, "kernels.grouped_matmul = 'fast'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_settings_are_refused_before_the_weights_are_read(
    main, tmp_path, monkeypatch, arguments, settings, expected
):
    from moe_jax.checkpoint import reading

    def refuse(*arguments):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(reading, "read", refuse)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("binary").write_bytes(b"a\xff\xfe")
    pathlib.Path("zeros").write_bytes(b"ab\0")
    pathlib.Path("empty").write_bytes(b"")
    with pytest.raises(ValueError, match=expected):
        main(*arguments, **settings)


def piped(data):
    """Standard input as a pipe, which stays open if `data` is None."""
    reading, writing = os.pipe()
    if data is not None:
        os.write(writing, data)
        os.close(writing)
    return open(reading, encoding="utf-8"), writing


@pytest.mark.parametrize("data", [b"", b" \n", None])
def test_a_pipe_without_text_gives_the_default_prompt(infer, monkeypatch, data):
    stdin, writing = piped(data)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(infer, "WAIT_S", 0.01)
    with flagsaver.flagsaver(), stdin:
        flags.FLAGS(["infer"])
        assert infer.read_prompts() == [infer.DEFAULT_PROMPT]
    if data is None:
        os.close(writing)


def test_piped_text_is_a_prompt_unless_flags_give_one(infer, monkeypatch):
    stdin, _ = piped("naïve\n".encode())
    monkeypatch.setattr(sys, "stdin", stdin)
    with flagsaver.flagsaver(), stdin:
        flags.FLAGS(["infer", "--prompt=a"])
        assert infer.read_prompts() == ["a"]
        flags.FLAGS["prompt"].unparse()
        assert infer.read_prompts() == ["naïve\n"]


def test_the_demo_config_is_ready_to_run():
    config = gin.read_config(ROOT / "configs" / "infer_demo.gin")
    assert (config.model.path, config.model.dtype, config.policy.spec) == ("assets/demo", "float32", "model")
