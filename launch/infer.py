"""Generates text with a model and any number of active experts, and measures the speed.

    python launch/infer.py --prompt "import unittest" --set policy.spec=layers:8,8,4,4,2

Prompts come from --prompt and --prompt_file or, without both, from standard input. Completions are printed as they are
generated; several prompts run as one batch. With --out they are also written to OUT/completions.jsonl. With --chat,
each prompt is a user's message, put into the model's chat template.
"""

import dataclasses
import json
import os
import pathlib
import select
import sys

from absl import flags

from moe_jax import command, files

ROOT = pathlib.Path(__file__).parents[1]
DEFAULT_PROMPT = """import numpy as np


def normalize(x, axis=None):
    \"\"\"Scales an array to unit length.\"\"\"
    x = np.asarray(x)
    if"""
MOST_BYTES = 10_000_000  # of one prompt: more than any context holds
WAIT_S = 5.0  # for the first byte of a pipe: some callers leave one open and never write

PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "A text to continue; repeat it for a batch. Default: a Python function."
)
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file that holds one prompt, UTF-8; repeat it for more.")
CHAT = flags.DEFINE_bool("chat", False, "Put each prompt into the model's chat template, as a user's message.")


def main(run: command.Command) -> None:
    """Checks flags and configuration, then loads, compiles and generates."""
    prompts = read_prompts()

    from moe_jax.engine.request import make_requests
    from moe_jax.model.finite import NotFiniteError

    config = run.config
    opened, execution = run.open_model()
    settings = {"sampling": config.sampling, "policy": config.policy.spec, "seed": config.run.seed}
    settings["calibration"] = opened.calibration
    tokenizer = opened.require_tokenizer()
    asked = chat_ids(opened.folder, tokenizer, prompts) if CHAT.value else prompts
    requests = make_requests(asked, tokenizer, execution, **settings)
    gap = "\n" if CHAT.value else ""  # between a message and its answer

    model = run.load(opened)
    with run.timed("compile"):
        model.engine.compile(requests, execution)

    made = ["" for _ in prompts]

    def show(index: int, piece: str) -> None:
        made[index] += piece
        if index == 0:
            print(piece, end="", flush=True)

    print(heading(0, prompts) + prompts[0] + gap, end="", flush=True)
    try:
        with run.timed("run"):
            completions, measured = model.engine.run(requests, execution, show)
    except NotFiniteError as error:
        parts = [dataclasses.asdict(completion) for completion in error.completions]
        for part in parts:
            part["finish_reason"] = part["finish_reason"] or "not finite"
        write_completions(run.out, prompts, parts)
        raise
    except KeyboardInterrupt:
        parts = [{"text": text, "finish_reason": "interrupted"} for text in made]
        write_completions(run.out, prompts, parts)
        raise
    print()
    for index in range(1, len(prompts)):
        print(heading(index, prompts) + prompts[index] + gap + completions[index].text)
    print(flush=True)

    write_completions(run.out, prompts, [dataclasses.asdict(completion) for completion in completions])
    run.seconds |= {"prefill": measured.prefill_s, "decode": measured.decode_s}
    figures = measured.figures()
    run.finish(figures, text=summary(run, figures, completions))


def chat_ids(folder: pathlib.Path, tokenizer, messages: list[str]) -> list[list[int]]:
    """Each message in the model's chat template, as tokens; the template includes the special tokens."""
    from moe_jax.text import chat

    template, special_tokens = chat.load_template(folder)
    texts = [chat.render(template, special_tokens, message) for message in messages]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def read_prompts() -> list[str]:
    """The prompts of the flags, then of the files; without either, standard input; without that, the default."""
    import jax

    prompts = list(PROMPT.value)
    for name in PROMPT_FILE.value:
        try:
            prompts.append(as_text(read_file(pathlib.Path(name)), f"--prompt_file = {name!r}"))
        except OSError as error:
            raise ValueError(f"--prompt_file = {name!r}: {error.strerror}") from error
    if not prompts:
        piped = read_piped() if jax.process_count() == 1 else b""  # of several processes, not all have it
        prompts = [as_text(piped, "standard input") if piped.strip() else DEFAULT_PROMPT]
    return prompts


def read_file(path: pathlib.Path) -> bytes:
    """A file's first `MOST_BYTES + 1` bytes; ValueError for a pipe or a device, which may never end."""
    if "\0" in str(path) or (path.exists() and not path.is_file() and not path.is_dir()):
        raise ValueError(f"--prompt_file = {str(path)!r} is not a regular file; pipe to standard input instead")
    with open(path, "rb") as file:
        return file.read(MOST_BYTES + 1)


def read_piped() -> bytes:
    """Standard input; empty if it is a terminal, closed, or a pipe that nobody writes to."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return b""
    if os.name == "posix" and not select.select([sys.stdin], [], [], WAIT_S)[0]:
        print(f"nothing on standard input within {WAIT_S:.0f} s: using the default prompt", file=sys.stderr)
        return b""
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def as_text(data: bytes, name: str) -> str:
    """Decodes UTF-8; ValueError, with the source's name, for anything else."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES} bytes: expected a prompt")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not UTF-8; expected text") from error
    if "\0" in text:
        raise ValueError(f"{name}: byte {data.index(0)} is 0; expected text")
    if not text:
        raise ValueError(f"{name} is empty: expected text")
    return text


def heading(index: int, prompts: list[str]) -> str:
    """The line before a prompt, if there are several."""
    return f"--- {index + 1} of {len(prompts)}\n" if len(prompts) > 1 else ""


def write_completions(out: pathlib.Path | None, prompts: list[str], completions: list[dict]) -> None:
    """Writes one line of JSON per prompt; NaN and infinity become null, since JSON cannot hold them."""
    if out is None:
        return
    lines = []
    for prompt, completion in zip(prompts, completions):
        line = command.plain({"prompt": prompt, **completion})
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    files.write_atomically(out / "completions.jsonl", "".join(lines).encode(errors="backslashreplace"))


def summary(run: command.Command, figures: dict, completions: list) -> str:
    """The figures for people."""
    value = {name: figure["value"] for name, figure in figures.items()}
    seconds = ", ".join(f"{phase} {run.seconds[phase]:.2f} s" for phase in ("load", "compile", "prefill", "decode"))
    names = ", ".join(f"{operation} {name}" for operation, name in run.implementations.items())
    tokens = sum(len(completion.ids) for completion in completions)
    reasons = ", ".join(completion.finish_reason for completion in completions)
    return (
        f"{seconds}\n"
        f"prefill {value['prefill_tokens_per_s']:.0f} tokens/s, first token after "
        f"{value['time_to_first_token_s']:.3f} s, decode {value['decode_tokens_per_s']:.1f} tokens/s\n"
        f"{value['experts_per_token']:.2f} experts per token, {value['distinct_experts_per_layer_step']:.2f} distinct "
        f"experts per layer and step\n"
        f"{tokens} tokens generated ({reasons}); {names}"
    )


if __name__ == "__main__":
    command.run(main, default_config=os.path.relpath(ROOT / "configs" / "infer_demo.gin"), on_mesh=True)
