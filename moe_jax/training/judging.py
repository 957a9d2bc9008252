"""Judges a model in training by the bits per byte of held-out text."""

from collections.abc import Sequence

import numpy as np

from moe_jax.config.schema import Config
from moe_jax.evaluation import likelihood
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.routing.policies import Policy
from moe_jax.text.held_out import HeldOut


def bits_per_byte(
    config: Config, params: Params, held_out: HeldOut, compared: Sequence[Policy], execution: Execution
) -> float:
    """Bits per byte of the held-out text, in windows of a training row; the mean over policies.

    Args:
        config: reads `training.sequence_length` and `evaluation.batch_size`.
        params: from `decoder.split`.
        held_out: all of it is read.
        compared: the policies.
        execution: the static half of the step; no slot is dropped, whatever its capacity.

    Raises:
        NotFiniteError: a token's log-probability is NaN or infinite.
    """
    likelihoods = likelihood.score_documents(
        params,
        held_out.tokens,
        compared,
        execution.exact,
        context=config.training.sequence_length,
        batch_size=config.evaluation.batch_size,
    )
    return float(np.mean([scored.bits_J.sum() for scored in likelihoods]) / held_out.bytes_J.sum())
