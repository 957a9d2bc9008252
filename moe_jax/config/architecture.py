"""The architecture of a model: the settings that a checkpoint's config.json also holds."""

import dataclasses

from moe_jax.config.checks import require, require_fraction, require_one_of, require_positive

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("best_two", "best")
ATTENTION_KINDS = ("grouped", "latent")
NORM_SPANS = ("head", "all")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The decoder: dense layers, usually the first ones, and MoE layers."""

    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 8  # including dense ones
    num_dense_layers: int = 1  # layers with a dense feed-forward
    dense_layers: tuple[int, ...] = ()  # their numbers, from 0; (): the first num_dense_layers
    dense_hidden: int = 512  # F of a dense layer
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_context: int = 1024  # tokens, prompt plus continuation

    def __post_init__(self):
        require_positive("decoder", self, "vocab_size", "d_model", "num_layers", "norm_eps", "max_context")
        require(
            0 <= self.num_dense_layers < self.num_layers,
            "decoder.num_dense_layers",
            self.num_dense_layers,
            f"0 to decoder.num_layers - 1 = {self.num_layers - 1}",
        )
        places = self.dense_layers
        require(
            not places or (len(places) == self.num_dense_layers and list(places) == sorted({*places})),
            "decoder.dense_layers",
            places,
            f"() or decoder.num_dense_layers = {self.num_dense_layers} different layers in ascending order",
        )
        require(
            not places or 0 <= places[0] <= places[-1] < self.num_layers,
            "decoder.dense_layers",
            places,
            f"layers from 0 to decoder.num_layers - 1 = {self.num_layers - 1}",
        )
        if self.num_dense_layers:
            require_positive("decoder", self, "dense_hidden")

    @property
    def num_moe_layers(self) -> int:
        """MoE layers; a policy has one column for each."""
        return self.num_layers - self.num_dense_layers


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention with rotary positions: grouped-query, or multi-head latent (MLA, arXiv 2405.04434)."""

    kind: str = "grouped"
    num_heads: int = 4
    # read only where kind = "grouped"
    num_kv_heads: int = 2
    head_dim: int = 64
    qk_norm: bool = True  # RMS norm of queries and keys, before rotation
    qk_norm_span: str = "head"  # "head": each head is normalized by itself; "all": all heads of a token together
    bias: bool = False  # on the query, key and value projections
    rope_fraction: float = 0.5  # share of head_dim that rotates
    clip_qkv: float = 0.0  # clips queries, keys and values to +- this, before rotation; 0: no clipping
    # read only where kind = "latent"
    query_rank: int = 0  # width of the query latent; 0: queries are projected directly
    latent_rank: int = 512  # width of the key-value latent
    nope_head_dim: int = 128  # channels of a query or key head that do not rotate
    rope_head_dim: int = 64  # channels after them that rotate; all heads share the key's
    value_head_dim: int = 128
    latent_norm_eps: float = 1e-6  # for the norms of both latents
    # read for both kinds
    rope_theta: float = 10000.0
    rope_interleaved: bool = False  # channel 2 i rotates with 2 i + 1; False: i with i + half
    yarn_factor: float = 1.0  # YaRN (arXiv 2309.00071): factor by which the context is extended; 1: no YaRN
    yarn_original_context: int = 4096  # context before the extension, in tokens
    yarn_beta_fast: float = 32.0  # channels with at least this many turns over that context stay unchanged
    yarn_beta_slow: float = 1.0  # channels with at most this many turns are interpolated in full
    yarn_mscale: float = 0.0  # see `rope`; 0: as in the paper
    yarn_mscale_all_dim: float = 0.0  # only where kind = "latent"

    def __post_init__(self):
        require_one_of("attention", self, "kind", ATTENTION_KINDS)
        require_one_of("attention", self, "qk_norm_span", NORM_SPANS)
        require_positive("attention", self, "num_heads", "num_kv_heads", "head_dim", "rope_theta", "yarn_factor")
        require_positive("attention", self, "latent_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        yarn = "yarn_original_context", "yarn_beta_fast", "yarn_beta_slow"
        require_positive("attention", self, "latent_norm_eps", *yarn)
        for field in ("query_rank", "yarn_mscale", "yarn_mscale_all_dim"):
            require(getattr(self, field) >= 0, f"attention.{field}", getattr(self, field), "0 or more")
        require_fraction("attention", self, "rope_fraction")
        require(self.clip_qkv >= 0, "attention.clip_qkv", self.clip_qkv, "0 (no clipping) or more")
        require(self.yarn_factor >= 1, "attention.yarn_factor", self.yarn_factor, "1 (no YaRN) or more")
        if self.yarn_factor > 1:
            require(self.rope_theta > 1, "attention.rope_theta", self.rope_theta, "above 1 for YaRN")
        slow, fast = self.yarn_beta_slow, self.yarn_beta_fast
        require(slow <= fast, "attention.yarn_beta_slow", slow, f"at most attention.yarn_beta_fast = {fast}")
        if self.kind == "latent":
            for field, none in (("qk_norm", False), ("bias", False), ("clip_qkv", 0.0)):
                value = getattr(self, field)
                require(value == none, f"attention.{field}", value, f'{none} where attention.kind = "latent"')
            require(self.rope_head_dim % 2 == 0, "attention.rope_head_dim", self.rope_head_dim, "an even number")
            return
        require(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of attention.num_heads = {self.num_heads}",
        )
        require(
            self.rope_dim % 2 == 0,
            "attention.rope_fraction",
            self.rope_fraction,
            f"an even number of rotated channels out of attention.head_dim = {self.head_dim}",
        )
        require(
            self.yarn_mscale_all_dim == 0,
            "attention.yarn_mscale_all_dim",
            self.yarn_mscale_all_dim,
            '0 where attention.kind = "grouped"',
        )

    @property
    def rope_dim(self) -> int:
        """Channels of each head that rotate."""
        return self.rope_head_dim if self.kind == "latent" else int(self.head_dim * self.rope_fraction)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts, and how the router scores experts."""

    num_experts: int = 64  # E
    k: int = 8  # experts per token that the model was trained with
    expert_hidden: int = 32  # F of one routed expert
    num_shared_experts: int = 1  # computed as one feed-forward, for every token
    shared_hidden: int = 0  # F of that feed-forward; 0: num_shared_experts * expert_hidden
    shared_gate: bool = False  # scales the shared experts' output by a sigmoid of the token
    score: str = "sigmoid"
    selection_bias: bool = True  # added to the scores that choose experts, not to their weights
    num_groups: int = 1
    num_groups_kept: int = 1
    group_score: str = "best_two"  # a group's score: the sum of its two best experts' scores, or the "best" alone
    normalize: bool = True  # weights of the kept experts sum to one before scaling
    routed_scaling: float = 1.0
    # one number per MoE layer, if layers differ, as in pruned models; num_experts and k are then the largest
    num_experts_of_layers: tuple[int, ...] = ()
    k_of_layers: tuple[int, ...] = ()

    def __post_init__(self):
        require_positive("moe", self, "num_experts", "k", "expert_hidden", "num_groups", "num_groups_kept")
        require_positive("moe", self, "routed_scaling")
        require(self.num_shared_experts >= 0, "moe.num_shared_experts", self.num_shared_experts, "0 or more")
        require(
            self.shared_hidden == 0 or (self.num_shared_experts > 0 and self.shared_hidden > 0),
            "moe.shared_hidden",
            self.shared_hidden,
            "0, or a positive number if moe.num_shared_experts is positive too",
        )
        require(
            self.num_shared_experts > 0 or not self.shared_gate,
            "moe.shared_gate",
            self.shared_gate,
            "False if moe.num_shared_experts = 0",
        )
        require_one_of("moe", self, "group_score", GROUP_SCORES)
        require_one_of("moe", self, "score", SCORES)
        require(self.k <= self.num_experts, "moe.k", self.k, f"at most moe.num_experts = {self.num_experts}")
        require(
            self.num_experts % self.num_groups == 0,
            "moe.num_groups",
            self.num_groups,
            f"a divisor of moe.num_experts = {self.num_experts}",
        )
        require(
            self.num_groups_kept <= self.num_groups,
            "moe.num_groups_kept",
            self.num_groups_kept,
            f"at most moe.num_groups = {self.num_groups}",
        )
        for name in ("num_experts", "k"):
            numbers, most = getattr(self, f"{name}_of_layers"), getattr(self, name)
            require(
                not numbers or (min(numbers) >= 1 and max(numbers) == most),
                f"moe.{name}_of_layers",
                numbers,
                f"numbers of at least 1, the largest of them moe.{name} = {most}",
            )
        unlike = len({*self.num_experts_of_layers}) > 1
        require(self.num_groups == 1 or not unlike, "moe.num_groups", self.num_groups, "1 if layers differ in experts")
        reachable = self.num_experts // self.num_groups * self.num_groups_kept
        require(self.k <= reachable, "moe.k", self.k, f"at most the {reachable} of moe.num_groups_kept groups")

    @property
    def shared_width(self) -> int:
        """F of the shared experts' feed-forward; 0: there are none."""
        return self.shared_hidden or self.num_shared_experts * self.expert_hidden


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sections that define a model's architecture."""

    decoder: DecoderConfig = DecoderConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    def __post_init__(self):
        layers, moe = self.decoder.num_moe_layers, self.moe
        for name in ("num_experts_of_layers", "k_of_layers"):
            numbers = getattr(moe, name)
            require(
                not numbers or len(numbers) == layers, f"moe.{name}", numbers, f"one for each of {layers} MoE layers"
            )
        if moe.num_experts_of_layers:
            for layer, (experts, k) in enumerate(zip(self.num_experts_L, self.k_L, strict=True)):
                remedy = "a smaller moe.k, or another for this layer in moe.k_of_layers"
                require(k <= experts, f"k of MoE layer {layer}", k, f"at most its {experts} experts: {remedy}")

    @property
    def num_experts_L(self) -> tuple[int, ...]:
        """Routed experts of each MoE layer."""
        return self.moe.num_experts_of_layers or (self.moe.num_experts,) * self.decoder.num_moe_layers

    @property
    def k_L(self) -> tuple[int, ...]:
        """Experts per token that each MoE layer was trained with."""
        return self.moe.k_of_layers or (self.moe.k,) * self.decoder.num_moe_layers
