"""Requests: prompts with their settings, checked before anything runs."""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import KernelsConfig, SamplingConfig
from moe_jax.dispatch.choose import choose
from moe_jax.dispatch.contract import Dispatch
from moe_jax.kernels import chooser
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import Layout
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import MODEL_OWN, parse

AnyPolicy = str | policies.Policy | None  # None: the model's own k


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and the settings of its continuation."""

    ids: tuple[int, ...]
    policy: policies.Policy
    sampling: SamplingConfig
    seed: int
    max_new_tokens: int  # as asked for, at most what the context leaves


def execution_of(
    architecture: Architecture,
    k_max: int = 0,
    kernels: KernelsConfig | None = None,
    dtype: str = "float32",
    layout: Layout | None = None,
    training: bool = False,
    platform: str = "",
    expert_dtype: str = "",
) -> Execution:
    """The static settings of the programs that run a model.

    Args:
        architecture: the model's architecture.
        k_max: static slots per token; 0: the model's own k.
        kernels: the implementation of each operation; None: by platform, device and model.
        dtype: in which the routed experts' products run; some kernels are for 16 bits only.
        layout: the mesh that it runs on, and how tokens reach their experts there; None: one device.
        training: whether its steps have a gradient.
        platform: "cpu", "gpu" or "tpu"; "": that of this process.
        expert_dtype: of the routed experts' weights if they are in eight bits; "": they are not.

    Raises:
        ValueError: the router cannot choose `k_max` experts, or an implementation is unknown or does not run here.
    """
    moe = architecture.moe
    reachable = moe.num_experts // moe.num_groups * moe.num_groups_kept
    if not 0 <= operator.index(k_max) <= reachable:
        raise ValueError(f"policy.k_max = {k_max}: expected 0 (the model's own {moe.k}) to {reachable} experts")
    asked = dataclasses.asdict(kernels or KernelsConfig())
    num_devices = 1 if layout is None else layout.mesh.size
    platform = platform or jax.default_backend()
    resolved = chooser.resolve(platform, architecture, dtype, asked, num_devices, expert_dtype)
    k_max = k_max or moe.k
    if layout is None:
        return Execution(architecture, k_max, resolved, expert_dtype=expert_dtype)
    dropping = {"capacity": layout.capacity, "drop": True} if layout.capacity else {}
    how = Dispatch(mesh=layout.mesh, expert_axes=layout.expert_axes, placement=layout.placement, **dropping)
    row_bytes = architecture.decoder.d_model * jnp.dtype(dtype).itemsize
    chosen = choose(how, layout.dispatch, k_max, row_bytes, platform, training)
    return Execution(architecture, k_max, resolved, chosen, layout, expert_dtype)


def policy_of_each(
    policy: AnyPolicy | Sequence[AnyPolicy], count: int, calibration: Calibration | None = None
) -> list[policies.Policy]:
    """Expands `policy`, one for all rows or one for each, to `count` parsed policies with the calibration.

    Raises:
        ValueError: a spec does not parse, or the sequence has another length.
    """
    each = list(policy) if isinstance(policy, (list, tuple)) else [policy] * count
    if len(each) != count:
        raise ValueError(f"expected one policy, or one for each of the {count} rows, got {len(each)}")
    return [_policy(given, calibration) for given in each]


def _policy(given: AnyPolicy, calibration: Calibration | None) -> policies.Policy:
    if given is None:
        return MODEL_OWN
    if isinstance(given, str):
        return parse(given, calibration)
    return given if given.calibration else dataclasses.replace(given, calibration=calibration)


def make_requests(
    prompts: Sequence[str | Sequence[int]],
    tokenizer: tokenizers.Tokenizer,
    execution: Execution,
    *,
    sampling: SamplingConfig,
    policy: AnyPolicy | Sequence[AnyPolicy] = None,
    seed: int | Sequence[int] = 0,
    calibration: Calibration | None = None,
) -> list[Request]:
    """Turns prompts into requests for `Engine.run`, and checks everything that can be wrong with them.

    Args:
        prompts: texts, or token ids.
        tokenizer: the model's tokenizer.
        execution: as `execution_of` returns it.
        sampling: sampling settings of all requests.
        policy: as `policy_of_each` takes it.
        seed: the seed of sampling, 0 to 2**32 - 1: one for all, or one for each prompt.
        calibration: the model's calibration, for policies that lack one.

    Raises:
        ValueError: there is no prompt; a prompt is empty, is not text, or fills the context; a policy or a seed is
            invalid.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts = {prompts!r}: expected a sequence of at least one prompt")
    trunk = execution.architecture.decoder
    policy_B = policy_of_each(policy, len(prompts), calibration)
    policies.settings(policy_B, execution.architecture, execution.k_max)
    seed_B = [seed] * len(prompts) if np.ndim(seed) == 0 else list(seed)
    if len(seed_B) != len(prompts) or not all(0 <= operator.index(value) < 2**32 for value in seed_B):
        raise ValueError(f"seed = {seed!r}: expected a whole number from 0 to 2**32 - 1, or one for each prompt")
    requests = []
    for number, prompt in enumerate(prompts, start=1):
        ids = _encode(prompt, tokenizer, trunk.vocab_size, f"prompt {number}")
        room = trunk.max_context - len(ids)
        if room < 1:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens: expected at most {trunk.max_context - 1}, one less than "
                "the model's context"
            )
        budget = min(sampling.max_new_tokens, room)
        requests.append(Request(ids, policy_B[number - 1], sampling, operator.index(seed_B[number - 1]), budget))
    return requests


def _encode(prompt, tokenizer, vocab_size: int, name: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not text: {error}") from error
        ids = tokenizer.encode(prompt).ids if prompt else []
    else:
        ids = [operator.index(token) for token in prompt]
    if not ids:
        raise ValueError(f"{name} is empty: expected at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(
            f"{name} has the token {min(ids) if min(ids) < 0 else max(ids)}: expected 0 to {vocab_size - 1}"
        )
    return tuple(ids)
