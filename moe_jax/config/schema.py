"""What can be configured: one frozen dataclass per section, validated together before any array is made.

A section is a field of `Config`; a setting is a field of its section, written `section.field` in a config file and
after `--set`. Every check here raises `ValueError` whose message names the setting as it is written there, what was
given, and what would be accepted.
"""

import dataclasses
import math

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("best_two", "best")
ATTENTION_KINDS = ("grouped", "latent")
NORM_SPANS = ("head", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _require(condition: bool, setting: str, given, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{setting} = {given!r}: wanted {wanted}")


def _require_positive(section: str, config, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value > 0 and math.isfinite(value), f"{section}.{field}", value, "a positive number")


def _require_fraction(section: str, config, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(0 <= value <= 1, f"{section}.{field}", value, "a number from 0 to 1")


def _require_one_of(section: str, config, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, field)
    _require(value in choices, f"{section}.{field}", value, f"one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which weights to run. Ignored where the model is made from scratch."""

    path: str = ""  # a checkpoint directory: Hugging Face layout
    dtype: str = "auto"  # of weights and activations; "auto": as stored

    def __post_init__(self):
        _require_one_of("model", self, "dtype", DTYPES)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The decoder's trunk: a dense prefix, then MoE layers."""

    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 8  # dense prefix included
    num_dense_layers: int = 1  # the prefix whose feed-forward is dense
    dense_hidden: int = 512  # F of those
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_context: int = 1024  # tokens: prompt and continuation together

    def __post_init__(self):
        _require_positive("decoder", self, "vocab_size", "d_model", "num_layers", "norm_eps", "max_context")
        _require(
            0 <= self.num_dense_layers < self.num_layers,
            "decoder.num_dense_layers",
            self.num_dense_layers,
            f"0 to decoder.num_layers - 1 = {self.num_layers - 1}",
        )
        if self.num_dense_layers:
            _require_positive("decoder", self, "dense_hidden")

    @property
    def num_moe_layers(self) -> int:
        """Layers behind the dense prefix: the columns of a policy."""
        return self.num_layers - self.num_dense_layers


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention with rotary positions: grouped queries, or a latent that all heads read (MLA, arXiv 2405.04434)."""

    kind: str = "grouped"
    num_heads: int = 4
    # of kind "grouped"; not read otherwise
    num_kv_heads: int = 2
    head_dim: int = 64
    qk_norm: bool = True  # RMS norm of queries and keys before rotation
    qk_norm_span: str = "head"  # what is normed at once: one head, or "all" heads of a token
    bias: bool = False  # on the query, key and value projections
    rope_fraction: float = 0.5  # of head_dim that rotates
    # of kind "latent"; not read otherwise
    query_rank: int = 0  # width of the latent that queries go through; 0: queries are projected directly
    latent_rank: int = 512  # width of the latent that keys and values are made of
    nope_head_dim: int = 128  # channels of a query and key head without position
    rope_head_dim: int = 64  # channels that rotate behind them; the key's are shared by all heads
    value_head_dim: int = 128
    latent_norm_eps: float = 1e-6  # of the norms of both latents
    # of both kinds
    rope_theta: float = 10000.0
    rope_interleaved: bool = False  # channel 2 i turns with 2 i + 1, rather than i with i + half
    yarn_factor: float = 1.0  # YaRN (arXiv 2309.00071) stretches the context by this; 1: it does nothing
    yarn_original_context: int = 4096  # tokens that the model was trained with before
    yarn_beta_fast: float = 32.0  # turns over that context from which a channel is left alone
    yarn_beta_slow: float = 1.0  # turns up to which it is stretched in full
    yarn_mscale: float = 0.0  # see `rope`; 0: as the paper has it
    yarn_mscale_all_dim: float = 0.0  # kind "latent" only

    def __post_init__(self):
        _require_one_of("attention", self, "kind", ATTENTION_KINDS)
        _require_one_of("attention", self, "qk_norm_span", NORM_SPANS)
        _require_positive("attention", self, "num_heads", "num_kv_heads", "head_dim", "rope_theta", "yarn_factor")
        _require_positive("attention", self, "latent_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        yarn = "yarn_original_context", "yarn_beta_fast", "yarn_beta_slow"
        _require_positive("attention", self, "latent_norm_eps", *yarn)
        for field in ("query_rank", "yarn_mscale", "yarn_mscale_all_dim"):
            _require(getattr(self, field) >= 0, f"attention.{field}", getattr(self, field), "0 or more")
        _require_fraction("attention", self, "rope_fraction")
        _require(self.yarn_factor >= 1, "attention.yarn_factor", self.yarn_factor, "1 (no stretching) or more")
        if self.yarn_factor > 1:
            _require(self.rope_theta > 1, "attention.rope_theta", self.rope_theta, "above 1 for YaRN")
        slow, fast = self.yarn_beta_slow, self.yarn_beta_fast
        _require(slow <= fast, "attention.yarn_beta_slow", slow, f"at most attention.yarn_beta_fast = {fast}")
        if self.kind == "latent":
            for field in ("qk_norm", "bias"):
                _require(not getattr(self, field), f"attention.{field}", True, 'False where attention.kind = "latent"')
            _require(self.rope_head_dim % 2 == 0, "attention.rope_head_dim", self.rope_head_dim, "an even number")
            return
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of attention.num_heads = {self.num_heads}",
        )
        _require(
            self.rope_dim % 2 == 0,
            "attention.rope_fraction",
            self.rope_fraction,
            f"an even number of rotated channels out of attention.head_dim = {self.head_dim}",
        )
        _require(
            self.yarn_mscale_all_dim == 0,
            "attention.yarn_mscale_all_dim",
            self.yarn_mscale_all_dim,
            '0 where attention.kind = "grouped"',
        )

    @property
    def rope_dim(self) -> int:
        """Channels of each head that rotate; the rest pass unchanged."""
        return self.rope_head_dim if self.kind == "latent" else int(self.head_dim * self.rope_fraction)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts, and how the router scores them."""

    num_experts: int = 64  # E
    k: int = 8  # experts per token that the model was trained with
    expert_hidden: int = 32  # F of one routed expert
    num_shared_experts: int = 1  # run as one feed-forward, beside the routed ones
    shared_hidden: int = 0  # F of that feed-forward; 0: num_shared_experts * expert_hidden
    shared_gate: bool = False  # a sigmoid of the token scales what the shared experts give
    score: str = "sigmoid"
    selection_bias: bool = True  # added to the scores for choosing, never for weighting
    num_groups: int = 1
    num_groups_kept: int = 1
    group_score: str = "best_two"  # what a group is worth: the sum of its two best scores, or its "best"
    normalize: bool = True  # mixing weights of the kept experts sum to one before scaling
    routed_scaling: float = 1.0

    def __post_init__(self):
        _require_positive("moe", self, "num_experts", "k", "expert_hidden", "num_groups", "num_groups_kept")
        _require_positive("moe", self, "routed_scaling")
        _require(self.num_shared_experts >= 0, "moe.num_shared_experts", self.num_shared_experts, "0 or more")
        _require(
            self.shared_hidden == 0 or (self.num_shared_experts > 0 and self.shared_hidden > 0),
            "moe.shared_hidden",
            self.shared_hidden,
            "0, or a positive number where moe.num_shared_experts is one too",
        )
        _require(
            self.num_shared_experts > 0 or not self.shared_gate,
            "moe.shared_gate",
            self.shared_gate,
            "False where moe.num_shared_experts = 0",
        )
        _require_one_of("moe", self, "group_score", GROUP_SCORES)
        _require_one_of("moe", self, "score", SCORES)
        _require(self.k <= self.num_experts, "moe.k", self.k, f"at most moe.num_experts = {self.num_experts}")
        _require(
            self.num_experts % self.num_groups == 0,
            "moe.num_groups",
            self.num_groups,
            f"a divisor of moe.num_experts = {self.num_experts}",
        )
        _require(
            self.num_groups_kept <= self.num_groups,
            "moe.num_groups_kept",
            self.num_groups_kept,
            f"at most moe.num_groups = {self.num_groups}",
        )
        reachable = self.num_experts // self.num_groups * self.num_groups_kept
        _require(self.k <= reachable, "moe.k", self.k, f"at most the {reachable} experts of the groups kept")

    @property
    def shared_width(self) -> int:
        """F of the feed-forward of all shared experts; 0 where there are none."""
        return self.shared_hidden or self.num_shared_experts * self.expert_hidden


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How many experts each token activates: the dial."""

    spec: str = "model"  # "model": the model's own k; else as `moe_jax.policies.parse` takes it
    k_max: int = 0  # static slots per token; 0: the model's own k

    def __post_init__(self):
        _require(bool(self.spec.strip()), "policy.spec", self.spec, 'a policy such as "topk:4"')
        _require(self.k_max >= 0, "policy.k_max", self.k_max, "0 (the model's own k) or more")


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Which implementation runs each operation; "auto" resolves by platform, once, and is logged."""

    grouped_matmul: str = "auto"


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The training text and its tokenizer."""

    # "stdlib", names of installed distributions, or paths of files and folders
    sources: tuple[str, ...] = ("stdlib",)
    held_out: str = "assets/text"  # the folder of the held-out archive
    tokenizer: str = ""  # a tokenizer.json to reuse; "": train one on the training text
    vocab_size: int = 4096  # of a tokenizer trained here

    def __post_init__(self):
        _require(len(self.sources) > 0, "text.sources", self.sources, "at least one source")
        _require(320 <= self.vocab_size <= 65536, "text.vocab_size", self.vocab_size, "320 to 65536")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimisation, and what is written when."""

    steps: int = 2000
    batch_size: int = 8  # sequences per step
    sequence_length: int = 1024  # tokens
    learning_rate: float = 3e-3  # at the peak
    final_learning_rate_fraction: float = 0.02  # of the peak, reached at the last step by a cosine
    warmup_steps: int = 100
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # of the global gradient
    balance_bias_rate: float = 1e-3  # step of the selection bias towards even loads
    balance_loss: float = 1e-3  # coefficient of the auxiliary load loss
    checkpoint_every: int = 100  # steps
    checkpoints_kept: int = 2
    evaluate_every: int = 200  # steps
    evaluate_bytes: int = 100_000  # of held-out text, as it goes; all of it at the end
    log_every: int = 10  # steps

    def __post_init__(self):
        _require_positive(
            "training",
            self,
            *("steps", "batch_size", "sequence_length", "learning_rate", "clip_norm"),
            *("checkpoint_every", "checkpoints_kept", "evaluate_every", "evaluate_bytes", "log_every"),
        )
        _require_fraction("training", self, "final_learning_rate_fraction", "adam_b1", "adam_b2")
        for field in ("weight_decay", "balance_bias_rate", "balance_loss"):
            _require(getattr(self, field) >= 0, f"training.{field}", getattr(self, field), "0 or more")
        _require(
            0 <= self.warmup_steps <= self.steps,
            "training.warmup_steps",
            self.warmup_steps,
            f"0 to training.steps = {self.steps}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the held-out text."""

    policies: tuple[str, ...] = ("model",)  # the first is what the others are compared with
    batch_size: int = 16  # windows, or questions, per step
    documents: int = 0  # the first so many of the held-out text; 0: all
    choice_questions: int = 512
    completion_headers: int = 208
    completion_tokens: int = 64  # of each function's body, at most

    def __post_init__(self):
        _require(len(self.policies) > 0, "evaluation.policies", self.policies, "at least one policy")
        _require(self.documents >= 0, "evaluation.documents", self.documents, "0 (all) or more")
        _require_positive(
            *("evaluation", self, "batch_size"), *("choice_questions", "completion_headers", "completion_tokens")
        )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    max_new_tokens: int = 200
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # tokens; 0: all
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        _require_positive("sampling", self, "max_new_tokens")
        _require(
            self.temperature >= 0 and math.isfinite(self.temperature),
            "sampling.temperature",
            self.temperature,
            "0 (greedy) or more",
        )
        _require(self.top_k >= 0, "sampling.top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0 and at most 1")
        _require(all(self.stop), "sampling.stop", self.stop, "strings that are not empty")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Which steps are timed."""

    decode_batches: tuple[int, ...] = (1, 8, 64)  # rows of each decode case
    prompt_length: int = 64  # tokens that lie in the cache when decoding is first timed
    prefill_lengths: tuple[int, ...] = (128, 512, 2048)  # tokens of each prefill case, one row
    rounds: int = 7  # in each, every case has its turn
    decode_steps: int = 8  # of a decode case in one turn; a prefill case has one
    trace: str = "assets/traces/demo.npz"  # routing to replay where weights are random; "": the routers' own

    def __post_init__(self):
        _require_positive("benchmark", self, "prompt_length", "rounds", "decode_steps")
        for field in ("decode_batches", "prefill_lengths"):
            given = getattr(self, field)
            _require(all(one > 0 for one in given), f"benchmark.{field}", given, "positive numbers")
            _require(len(set(given)) == len(given), f"benchmark.{field}", given, "each number once")
        cases = self.decode_batches + self.prefill_lengths
        _require(
            len(cases) > 0, "benchmark.decode_batches", self.decode_batches, "at least one case, or one of prefill"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every command shares."""

    seed: int = 0

    def __post_init__(self):
        _require(0 <= self.seed < 2**32, "run.seed", self.seed, "0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of one model: what a checkpoint's config.json also says."""

    decoder: DecoderConfig = DecoderConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections. A launcher reads the ones it needs; each has defaults."""

    model: ModelConfig = ModelConfig()
    decoder: DecoderConfig = DecoderConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    policy: PolicyConfig = PolicyConfig()
    kernels: KernelsConfig = KernelsConfig()
    text: TextConfig = TextConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self):
        _require(
            self.training.sequence_length <= self.decoder.max_context,
            "training.sequence_length",
            self.training.sequence_length,
            f"at most decoder.max_context = {self.decoder.max_context}",
        )

    @property
    def architecture(self) -> Architecture:
        """The sections that give the model its shape."""
        return Architecture(self.decoder, self.attention, self.moe)
