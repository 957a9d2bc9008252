"""Numbers that are not finite at run time: refused at once, since all that is made of them would be made up."""

from typing import Any

import numpy as np

from moe_jax.model.decoder import Params, dtype_of

_REMEDIES = {
    "float16": "float16, which ends at 65504: expected model.dtype=bfloat16 or float32",
    "bfloat16": "bfloat16: expected model.dtype=float32 or, if that gives the same, other weights",
    "float32": "float32, so they come from its weights: expected others",
}


class NotFiniteError(ValueError):
    """What a model computed is NaN or infinite, though its weights are finite.

    Attributes:
        completions: where it generated, what had been made of each prompt so far; `finish_reason` is None where that
            was not finished.
    """

    completions: tuple[Any, ...] = ()


def require_finite(values: np.ndarray, what: str, params: Params) -> None:
    """Checks what a model computed.

    Args:
        values: of any shape.
        what: they are, for the message.
        params: of the model, whose dtype the message names.

    Raises:
        NotFiniteError: some are NaN or infinite.
    """
    if values.size and not np.isfinite([values.min(), values.max()]).all():  # NaN is both
        raise NotFiniteError(
            f"{what}: not finite (NaN or infinity); the model runs in {_REMEDIES[dtype_of(params).name]}"
        )
