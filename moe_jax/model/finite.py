"""Refuses NaN and infinity at run time, since any result made from them would be meaningless."""

from typing import Any

import numpy as np

from moe_jax.model.decoder import Params
from moe_jax.model.dtypes import dtype_of

_REMEDIES = {
    "float16": "float16, whose largest number is 65504: expected model.dtype=bfloat16 or float32",
    "bfloat16": "bfloat16: expected model.dtype=float32 or, if that gives the same, other weights",
    "float32": "float32, so they come from its weights: expected other weights",
}


class NotFiniteError(ValueError):
    """What a model computed is NaN or infinite, though its weights are finite.

    Attributes:
        completions: while generating, the text so far for each prompt; `finish_reason` is None for unfinished ones.
    """

    completions: tuple[Any, ...] = ()


def require_finite(values: np.ndarray, what: str, params: Params) -> None:
    """Checks what a model computed.

    Args:
        values: an array of any shape.
        what: names them in the message.
        params: the model's weights; the message names their dtype.

    Raises:
        NotFiniteError: some are NaN or infinite.
    """
    if values.size and not np.isfinite([values.min(), values.max()]).all():  # min and max propagate NaN
        raise NotFiniteError(
            f"{what}: not finite (NaN or infinity); the model runs in {_REMEDIES[dtype_of(params).name]}"
        )
