"""Fine-tunes the tiny model with the launcher, and makes lines of text for that."""

import io
import json
import random

from moe_jax import command
from moe_jax.config.gin import read_config
from tests import launcher_module, tiny_training

IDLE = 5  # an expert that no token chooses, which LoRA does not change


def finetune(model, sources, out, **settings):
    """Calls the launcher's main; returns the output folder."""
    config = read_config(None, tiny_training.finetuning_overrides(sources, model, **settings))
    out.mkdir(exist_ok=True)
    launcher_module.import_launcher("finetune").main(command.Command("finetune", config, out, False, io.StringIO()))
    return out


def write_lines(path, lines):
    """Writes a file of JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))


def texts(count, words=150):
    """Texts without common sequences of words."""
    known = [a + b for a in "bcdfglmnprst" for b in ("ake", "ing", "ound", "ly", "est", "ool")]
    return [" ".join(random.Random(number).choices(known, k=words)) for number in range(count)]
