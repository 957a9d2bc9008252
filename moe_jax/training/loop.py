"""Training from the first step to the last, through any number of kills."""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import psutil
import tokenizers
from absl import logging
from tqdm import tqdm

from moe_jax import files
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config import gin
from moe_jax.config.schema import Config
from moe_jax.evaluation import likelihood
from moe_jax.model import decoder
from moe_jax.routing.policies import base as policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.text import corpus as corpora
from moe_jax.text.batches import Packed, batches, pack
from moe_jax.text.tokenizer import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from moe_jax.training.optimizer import learning_rate
from moe_jax.training.step import make_step, start

# May differ between the starts of one run: they change what is written, never what is learned.
_FREE_SETTINGS = ("checkpoint_every", "checkpoints_kept", "evaluate_every", "evaluate_bytes", "log_every")


def require_memory(config: Config) -> None:
    """Raises ValueError where training cannot fit in memory, before anything is read or made.

    Counted are weights, gradients and two moments in float32, and the input of every layer for every token of a batch;
    there is more, so what passes may still be too large.
    """
    decoder, training = config.decoder, config.training
    rules = FAMILIES["glm4_moe"].rules(config.architecture)
    parameters = sum(
        math.prod(rule.stored_shape(config.architecture)) * rule.num_tensors(config.architecture) for rule in rules
    )
    weights_bytes = 16 * parameters
    batch_bytes = 4 * training.batch_size * training.sequence_length * decoder.d_model * decoder.num_layers
    available_bytes = sum(_memory_bytes(device) for device in jax.local_devices())
    if weights_bytes + batch_bytes > available_bytes:
        raise ValueError(
            f"{parameters / 1e6:,.1f} M parameters need {weights_bytes / 1e9:,.1f} GB to train, and a batch of "
            f"training.batch_size = {training.batch_size} at least {batch_bytes / 1e9:,.1f} GB: wanted at most the "
            f"{available_bytes / 1e9:,.1f} GB available"
        )


def _memory_bytes(device: jax.Device) -> int:
    """What a device has, or what the machine has left where the device does not tell (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit") or psutil.virtual_memory().available


class Text(NamedTuple):
    """The training text, packed, and the held-out text, encoded."""

    tokenizer: tokenizers.Tokenizer
    packed: Packed
    corpus: corpora.Corpus
    held_out: Sequence[corpora.Document]
    held_out_tokens: Sequence[np.ndarray]


def prepare_text(config: Config, folder: pathlib.Path) -> Text:
    """Collects the text, and trains the tokenizer unless the folder or the configuration already has one."""
    held_out = corpora.load_held_out(config.text.held_out)
    corpus = corpora.collect(config.text.sources, held_out)
    logging.info("%d documents, %.1f MB of training text", len(corpus.documents), corpus.num_bytes / 1e6)
    own = folder / "tokenizer"
    if config.text.tokenizer:
        tokenizer = load_tokenizer(config.text.tokenizer)
    elif own.exists():
        tokenizer = load_tokenizer(own)
    else:
        tokenizer = train_tokenizer((document.text for document in corpus.documents), config.text.vocab_size)
        with files.replaced_folder(own) as partial:
            save_tokenizer(tokenizer, partial, config.decoder.max_context)
    if tokenizer.get_vocab_size() > config.decoder.vocab_size:
        raise ValueError(
            f"decoder.vocab_size = {config.decoder.vocab_size}: wanted at least the tokenizer's "
            f"{tokenizer.get_vocab_size()}"
        )
    packed = pack(encode_documents(tokenizer, corpus.documents), config.training.sequence_length)
    logging.info("%.2f M tokens, rows filled to %.1f%%", packed.num_tokens / 1e6, 100 * packed.fill_fraction)
    return Text(tokenizer, packed, corpus, held_out, encode_documents(tokenizer, held_out))


def _require_same_run(config: Config, folder: pathlib.Path) -> None:
    """Refuses to go on with another configuration than the run was started with."""
    path = folder / "run.gin"
    if not path.exists():
        files.write_atomically(path, gin.to_gin(config))
        return

    def essence(config: Config):
        free = dict.fromkeys(_FREE_SETTINGS, 1)
        training = dataclasses.replace(config.training, **free)
        return {
            f"{section}.{name}": value
            for section, settings in dataclasses.asdict(dataclasses.replace(config, training=training)).items()
            if section not in ("sampling", "evaluation", "model")
            for name, value in settings.items()
        }

    before, now = essence(gin.read_config(path)), essence(config)
    different = [name for name in before if before[name] != now[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"{name} = {now[name]!r}: the run in {folder} was started with {before[name]!r}; "
            "give the same, or another --out"
        )


class _Log:
    """Metrics as JSON lines. What a killed run wrote behind its last checkpoint is dropped when it goes on."""

    def __init__(self, path: pathlib.Path, step: int):
        kept = []
        if path.exists():
            try:
                lines = path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} is damaged ({error}): mend or remove it, and its steps are lost") from error
        files.write_atomically(path, "".join(kept))
        self._file = open(path, "a")  # noqa: SIM115  closed by `close`

    def write(self, **figures) -> None:
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _interruption_deferred() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs, and delivers the first one behind it.

    A step donates its state: an exception in the middle of one would leave nothing to save.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def _bits_per_byte(params: decoder.Params, config: Config, text: Text, execution: decoder.Execution) -> float:
    """Of the first held-out documents, `training.evaluate_bytes` in all, with the model's own k."""
    sizes = np.array([len(document.text.encode()) for document in text.held_out])
    count = int(np.searchsorted(np.cumsum(sizes), config.training.evaluate_bytes)) + 1
    [scored] = likelihood.score_documents(
        params,
        text.held_out_tokens[:count],
        [MODEL_OWN],
        execution,
        context=config.training.sequence_length,
        batch_size=config.evaluation.batch_size,
    )
    return float(scored.bits_J.sum() / sizes[:count].sum())


def train(config: Config, folder: pathlib.Path, text: Text, execution: decoder.Execution) -> decoder.Params:
    """Trains to the last step, from the last checkpoint where there is one.

    Writes `run.gin`, `checkpoints/` and `metrics.jsonl` into the folder. Killed at any moment and started again with
    the same configuration, it goes through bit-identical states.

    Returns:
        The parameters behind the last step.

    Raises:
        ValueError: the folder holds another run, its text has changed, or the loss or gradient is not finite: then
            the last good checkpoint stays.
        KeyboardInterrupt: on SIGINT or SIGTERM, after saving where it stands.
    """
    training = config.training
    _require_same_run(config, folder)
    state = start(execution, training, config.run.seed)
    stream = iter(batches(text.packed, training.batch_size, config.run.seed))
    checkpoints = Checkpoints(folder / "checkpoints", training.checkpoints_kept)
    done = checkpoints.latest_step or 0
    if done:
        state, place = checkpoints.restore(done, state)
        if place["corpus_sha256"] != text.corpus.sha256:
            raise ValueError(
                f"text.sources: the text differs from what the run in {folder} was started with; "
                "restore those files, or give another --out"
            )
        stream.set_state(place["stream"])
    metrics = _Log(folder / "metrics.jsonl", done)
    bar = tqdm(total=training.steps, initial=done, unit="step", file=sys.stderr, disable=None)

    def save():
        checkpoints.save(done, state, {"corpus_sha256": text.corpus.sha256, "stream": stream.get_state()})

    try:
        with _interruption_deferred() as interrupted:
            step = make_step(execution, training)
            live = policies.settings([MODEL_OWN] * training.batch_size, execution.architecture, execution.k_max)
            rate = learning_rate(training)
            since, tokens = time.perf_counter(), 0
            while done < training.steps and not interrupted:
                batch = next(stream)._asdict()
                state, measured = step(state, batch, live)
                measured = {name: float(value) for name, value in measured._asdict().items()}
                if not all(map(math.isfinite, measured.values())):
                    raise ValueError(
                        f"step {done + 1} is not finite ({measured}); the last good checkpoint is that of step "
                        f"{checkpoints.latest_step or 0}; lower training.learning_rate"
                    )
                done += 1
                tokens += int((batch["segments_BT"] > 0).sum())
                bar.update()
                if done % training.log_every == 0 or done == training.steps:
                    now = time.perf_counter()
                    tokens_per_s, since, tokens = tokens / (now - since), now, 0
                    bar.set_postfix_str(f"loss {measured['loss']:.3f}, {tokens_per_s:,.0f} tokens/s")
                    extra = {"learning_rate": float(rate(done - 1)), "tokens_per_s": round(tokens_per_s, 1)}
                    metrics.write(step=done, **measured, **extra)
                if done % training.evaluate_every == 0 or done == training.steps:
                    began = time.perf_counter()
                    metrics.write(step=done, bits_per_byte=_bits_per_byte(state.whole(), config, text, execution))
                    since += time.perf_counter() - began
                if done % training.checkpoint_every == 0 or done == training.steps:
                    save()
            if done < training.steps and done != checkpoints.latest_step:
                save()
    finally:
        bar.close()
        metrics.close()
        checkpoints.close()
    return state.whole()
