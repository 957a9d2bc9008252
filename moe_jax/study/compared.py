"""The policies of `evaluation.policies`, which are compared on the likelihood of held-out text."""

from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import EvaluationConfig
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies import Policy
from moe_jax.routing.policies.parse import parse


def parse_compared(
    config: EvaluationConfig, architecture: Architecture, k_max: int, calibration: Calibration | None = None
) -> list[Policy]:
    """Parses the policies and checks that they can be compared on whole texts, before hours of work.

    Args:
        config: reads `policies`.
        architecture: the model's architecture.
        k_max: static slots per token.
        calibration: the model's calibration, for policies that need one.

    Raises:
        ValueError: a policy does not parse or does not fit the model, or it looks at all rows of a decode step, of
            which the likelihood of a whole text has none.
    """
    compared = [parse(spec, calibration) for spec in config.policies]
    policies.settings(compared, architecture, k_max)
    for policy in compared:
        if policy.batch_aware:
            raise ValueError(
                f"evaluation.policies has {policy.spec!r}, which looks at all rows of a decode step: expected policies "
                "that look at one row; launch/sweep.py measures the others at every concurrency"
            )
    return compared
