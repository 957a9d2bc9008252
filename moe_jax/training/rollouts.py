"""Rollouts: text sampled from the full model, to train on.

At inference a model continues its own text, so training on such text matches use. arXiv 2605.18643 found that this
matters for skipping experts; benchmarks/results/recovery has our measurement.
"""

import hashlib
import pathlib
import sys

import numpy as np
import tokenizers
from tqdm import tqdm

from moe_jax.config.schema import SamplingConfig
from moe_jax.engine.generate import Engine
from moe_jax.engine.request import make_requests
from moe_jax.evaluation.journal import Journal
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.text.batches import Packed, pack
from moe_jax.training.trainable import digest

PROMPT = 16  # tokens of training text that each rollout continues
_AT_ONCE = 64  # rollouts per batch, and per part kept in the folder


def write(
    params: Params,
    tokenizer: tokenizers.Tokenizer,
    end_ids: list[int],
    execution: Execution,
    packed: Packed,
    *,
    count: int,
    seed: int,
    folder: pathlib.Path,
) -> Packed:
    """Samples `count` texts of one row's length, each a continuation of the beginning of a training row.

    The temperature is 1: the teacher's own distribution. Finished parts are kept in the folder, so that a killed run
    resumes.

    Args:
        params: the full model's weights.
        tokenizer: the model's tokenizer.
        end_ids: ids that end a text.
        execution: static settings of the full model.
        packed: the training text; the rollouts are as long as its rows.
        count: number of texts.
        seed: the seed of the choice of rows and of the sampling.
        folder: the folder of the parts.

    Returns:
        The texts, packed as the training text is.
    """
    begin_id = int(packed.tokens[-1])
    random = np.random.default_rng(seed)
    chosen = random.choice(packed.num_rows, count, replace=count > packed.num_rows)
    engine = Engine(params, tokenizer, end_ids)
    sampling = SamplingConfig(packed.sequence_length + 1 - PROMPT, temperature=1.0)  # the last token is a label
    depends_on = {"model": digest(params), "text": hashlib.sha256(packed.tokens.tobytes()).hexdigest()}
    journal = Journal(folder, depends_on | {"count": count, "seed": seed, "length": packed.sequence_length})
    texts = []
    with tqdm(total=count, desc="rollouts", unit="text", file=sys.stderr, disable=None) as bar:
        for first in range(0, count, _AT_ONCE):
            prompts = [_beginning(packed, row, begin_id) for row in chosen[first : first + _AT_ONCE]]

            def compute(prompts=prompts, first=first):
                seeds = [(seed + first + number) % 2**32 for number in range(len(prompts))]
                requests = make_requests(prompts, tokenizer, execution, sampling=sampling, seed=seeds)
                made = engine.run(requests, execution).completions
                ids = [[*prompt, *completion.ids] for prompt, completion in zip(prompts, made)]
                return {"ids": np.concatenate(ids).astype(np.int32), "lengths": list(map(len, ids))}

            part = journal.once(f"rollouts-{first:06d}", compute)
            texts += np.split(part["ids"], np.cumsum(part["lengths"])[:-1])
            bar.update(len(prompts))
    return pack(texts, packed.sequence_length, begin_id, closed=True)


def _beginning(packed: Packed, row: int, begin_id: int) -> list[int]:
    """The first tokens of a row's first text, with the token that begins a text in front."""
    made = packed.row(int(row))
    piece = made.tokens_BT[: int((made.segments_BT[:PROMPT] == 1).sum())].tolist()
    return piece if piece[:1] == [begin_id] else [begin_id, *piece][:PROMPT]
