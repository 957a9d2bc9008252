"""How a decoder runs: the static half of a compiled step."""

import dataclasses
from typing import Self

from moe_jax.config.architecture import Architecture
from moe_jax.dispatch.choose import DispatchByTokens
from moe_jax.kernels.cached_attention.api import channel_multiple
from moe_jax.kernels.chooser import Kernels
from moe_jax.model.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder runs: the static half of a compiled step."""

    architecture: Architecture
    k_max: int  # slots per token
    kernels: Kernels
    dispatch: DispatchByTokens = DispatchByTokens()
    layout: Layout | None = None  # the mesh that it runs on; None: one device
    expert_dtype: str = ""  # of the routed experts' weights if they are in eight bits

    @property
    def implementations(self) -> dict[str, str]:
        """Of the operations that have several, as results name them, and the dtype of experts in eight bits."""
        dispatch = {} if self.layout is None else {"dispatch": self.dispatch.name}
        return self.kernels._asdict() | dispatch | ({"expert_dtype": self.expert_dtype} if self.expert_dtype else {})

    @property
    def exact(self) -> Self:
        """The same with a dispatch that drops no slot, whatever the capacity."""
        return dataclasses.replace(self, dispatch=self.dispatch.exact)

    @property
    def channel_multiple(self) -> int:
        """Of cached latents, see `cached_attention.api`."""
        return channel_multiple(self.kernels.cached_attention)

    @property
    def data_parts(self) -> int:
        """The number of parts of a batch: its rows are a multiple."""
        return 1 if self.layout is None else self.layout.data_parts
