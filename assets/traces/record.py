"""Records the demo's routing on held-out text: `python assets/traces/record.py` writes assets/traces/demo.npz.

Each of `DOCUMENTS` held-out files, in a seeded order, is read from its beginning; the experts of its tokens
`FIRST` to `LAST` are kept, where the model has long had context.
"""

import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import policies, trace
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.text.held_out import load_held_out

ROOT = pathlib.Path(__file__).parents[2]
SEED = 0
DOCUMENTS = 64
FIRST, LAST = 256, 384  # tokens of each document
ROWS = 16  # documents read at once


def documents_of(model: moe_jax.Model) -> np.ndarray:
    """tokens_JT: the beginnings of documents that are long enough."""
    documents = list(load_held_out(ROOT / "assets" / "text"))
    random.Random(SEED).shuffle(documents)
    ids = [model.tokenizer.encode(document.text).ids for document in documents]
    return np.array([one[:LAST] for one in ids if len(one) >= LAST][:DOCUMENTS], np.int32)


def record(model: moe_jax.Model, tokens_BT: np.ndarray) -> np.ndarray:
    """expert_LBTK of every token."""
    execution = execution_of(model.architecture)
    live = policies.settings([MODEL_OWN] * len(tokens_BT), model.architecture, execution.k_max)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    rows = (tokens_BT, positions_BT, jnp.ones_like(positions_BT))
    traffic = jax.jit(lambda params: decoder.hidden(params, *rows, live, execution)[1])(model.params)
    return np.asarray(traffic.chosen_NK).reshape(len(traffic.chosen_NK), *tokens_BT.shape, execution.k_max)


def main() -> None:
    """Records and writes."""
    model = moe_jax.load(ROOT / "assets" / "demo", dtype="float32")
    tokens_JT = documents_of(model)
    parts = [record(model, tokens_JT[first : first + ROWS]) for first in range(0, DOCUMENTS, ROWS)]
    expert_LJTK = np.concatenate(parts, axis=1)[:, :, FIRST:LAST].astype(np.uint8)
    path = pathlib.Path(__file__).parent / "demo.npz"
    trace.save(path, trace.Trace(expert_LJTK, model.architecture.moe.num_experts))
    print(f"{path.name}: {'x'.join(map(str, expert_LJTK.shape))}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
