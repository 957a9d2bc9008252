"""What can be configured: one frozen dataclass per section, validated together before any array is made.

A section is a field of `Config`; a setting is a field of its section, written `section.field` in a config file and
after `--set`. Every check raises a `ValueError` with the setting, its value and what was expected.
"""

import dataclasses
import math
import os
import pathlib

from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.config.checks import require, require_fraction, require_one_of, require_positive
from moe_jax.config.compile import CompileConfig
from moe_jax.config.finetuning import FinetuneConfig, ObjectiveConfig
from moe_jax.config.mesh import MeshConfig
from moe_jax.config.predict import PredictConfig
from moe_jax.config.pruning import PruneConfig
from moe_jax.config.search import SearchConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPERT_DTYPES = ("auto", "model", "float8_e4m3fn", "int8")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which weights to run. Not read by training from scratch."""

    path: str = ""  # a checkpoint folder in the Hugging Face layout
    dtype: str = "auto"  # of weights and activations; "auto": the dtype of the stored weights
    # of the routed experts' weights; "auto": eight bits if they are stored so, but not on a GPU, otherwise as "model",
    # which is model.dtype
    expert_dtype: str = "auto"

    def __post_init__(self):
        require_one_of("model", self, "dtype", DTYPES)
        require_one_of("model", self, "expert_dtype", EXPERT_DTYPES)

    @property
    def eight_bits(self) -> str:
        """The dtype of experts in eight bits, if it is asked for by name; "" otherwise."""
        return self.expert_dtype if self.expert_dtype not in ("auto", "model") else ""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How many experts each token activates."""

    spec: str = "model"  # "model": the model's own k; others: docs/policies.md
    k_max: int = 0  # slots per token, fixed in the compiled step; 0: the model's own k
    calibration: str = ""  # file written by launch/calibrate.py; "": calibration.npz in the model's folder, if any

    def __post_init__(self):
        require(bool(self.spec.strip()), "policy.spec", self.spec, 'a policy such as "topk:4"')
        require(self.k_max >= 0, "policy.k_max", self.k_max, "0 (the model's own k) or more")


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Which implementation runs each operation; "auto": chosen by platform, and logged."""

    grouped_matmul: str = "auto"  # each row times the matrix of its expert
    projection: str = "auto"  # all rows times one matrix of a layer
    cached_attention: str = "auto"  # one new token per row, against a cache
    causal_attention: str = "auto"  # many tokens per row


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The training text and its tokenizer."""

    # "stdlib", names of installed distributions, or paths of files and folders; each line of a .jsonl file
    # (.gz, .xz) is a document: {"text": ..} or {"messages": [..]}
    sources: tuple[str, ...] = ("stdlib",)
    held_out: str = "assets/text"  # the archive's folder, or any file or folder; "": part of the sources (finetune.py)
    tokenizer: str = ""  # tokenizer.json to reuse; "": train one on the training text
    vocab_size: int = 4096  # of a tokenizer trained here

    def __post_init__(self):
        require(len(self.sources) > 0, "text.sources", self.sources, "at least one source")
        require(320 <= self.vocab_size <= 65536, "text.vocab_size", self.vocab_size, "320 to 65536")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimisation, and how often things are logged, evaluated and saved."""

    steps: int = 2000
    batch_size: int = 8  # sequences per step
    sequence_length: int = 1024  # tokens
    learning_rate: float = 3e-3  # at the peak
    final_learning_rate_fraction: float = 0.02  # of the peak; cosine decay reaches it at the last step
    warmup_steps: int = 100
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # of the global gradient
    balance_bias_rate: float = 1e-3  # change of the selection bias per step, towards even loads
    balance_loss: float = 1e-3  # weight of the auxiliary load-balancing loss
    accumulation: int = 1  # batches per step, whose gradients are averaged
    weights: str = "float32"  # or "bfloat16", with stochastic rounding in each step; moments are always float32
    remat: bool = False  # recompute each MoE layer in the backward pass: less memory, a third more time
    checkpoint_every: int = 100  # steps
    checkpoints_kept: int = 2
    evaluate_every: int = 200  # steps
    evaluate_bytes: int = 100_000  # of held-out text, during training; all of it at the end
    log_every: int = 10  # steps

    def __post_init__(self):
        require_positive(
            "training",
            self,
            *("steps", "batch_size", "sequence_length", "learning_rate", "clip_norm", "accumulation"),
            *("checkpoint_every", "checkpoints_kept", "evaluate_every", "evaluate_bytes", "log_every"),
        )
        require_fraction("training", self, "final_learning_rate_fraction", "adam_b1", "adam_b2")
        require_one_of("training", self, "weights", ("float32", "bfloat16"))
        for field in ("weight_decay", "balance_bias_rate", "balance_loss"):
            require(getattr(self, field) >= 0, f"training.{field}", getattr(self, field), "0 or more")
        require(
            0 <= self.warmup_steps < self.steps,
            "training.warmup_steps",
            self.warmup_steps,
            f"0 or more, and less than training.steps = {self.steps}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the held-out text."""

    policies: tuple[str, ...] = ("model",)  # the others are compared with the first
    expert_dtypes: tuple[str, ...] = ()  # other values of model.expert_dtype, with which to measure the policies too
    batch_size: int = 16  # windows or questions per step; fewer if windows are long
    context: int = 0  # tokens per window of text; 0: the model's context, at most 2048
    documents: int = 0  # use the first n documents of the held-out text; 0: all
    half: str = ""  # "even" or "odd": only every second document; "": all
    choice_questions: int = 512  # choices among next lines; 0: none
    completion_headers: int = 208  # bodies to write for functions of the text, Python; 0: none
    completion_tokens: int = 64  # generated per function body, at most

    def __post_init__(self):
        require(len(self.policies) > 0, "evaluation.policies", self.policies, "at least one policy")
        given = self.expert_dtypes
        expected = f"some of {', '.join(EXPERT_DTYPES)}, each once"
        each_once = len({*given}) == len(given) and {*given} <= {*EXPERT_DTYPES}
        require(each_once, "evaluation.expert_dtypes", given, expected)
        require_one_of("evaluation", self, "half", ("", "even", "odd"))
        require(self.documents >= 0, "evaluation.documents", self.documents, "0 (all) or more")
        require(self.context == 0 or self.context > 3, "evaluation.context", self.context, "0, or 4 or more")
        for field in ("choice_questions", "completion_headers"):
            require(getattr(self, field) >= 0, f"evaluation.{field}", getattr(self, field), "0 (none) or more")
        require_positive("evaluation", self, "batch_size", "completion_tokens")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is sampled."""

    max_new_tokens: int = 200
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the n most likely tokens; 0: all
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        require_positive("sampling", self, "max_new_tokens")
        require(
            self.temperature >= 0 and math.isfinite(self.temperature),
            "sampling.temperature",
            self.temperature,
            "0 (greedy) or more",
        )
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "0 (all tokens) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0 and at most 1")
        require(all(self.stop), "sampling.stop", self.stop, "strings that are not empty")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Which steps are timed."""

    decode_batches: tuple[int, ...] = (1, 8, 64)  # rows, for each decode case
    prompt_length: int = 64  # tokens in the cache when the timing of decoding begins
    prefill_lengths: tuple[int, ...] = (128, 512, 2048)  # tokens of the one row, for each prefill case
    rounds: int = 7  # each round times every case once
    decode_steps: int = 8  # timed per round for a decode case; a prefill case has one step
    trace: str = "assets/traces/demo.npz"  # routing to replay if weights are random; "": the routers' own choice
    dispatch_slots: tuple[int, ...] = ()  # instead of timing: slots per token, with each of which to count what is sent

    def __post_init__(self):
        require_positive("benchmark", self, "prompt_length", "rounds", "decode_steps")
        for field in ("decode_batches", "prefill_lengths", "dispatch_slots"):
            given = getattr(self, field)
            require(all(one > 0 for one in given), f"benchmark.{field}", given, "positive numbers")
            require(len(set(given)) == len(given), f"benchmark.{field}", given, "each number once")
        cases = self.decode_batches + self.prefill_lengths
        require(len(cases) > 0, "benchmark.decode_batches", self.decode_batches, "at least one case, or one of prefill")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Policies by batch sizes: the quality of model.path under each policy, and the speed of a decode step."""

    policies: tuple[str, ...] = ("model", "topk:4")
    original: str = ""  # checkpoint that model.path was fine-tuned from; it becomes `model`, the baseline
    pruned: tuple[str, ...] = ()  # checkpoints of model.path with fewer experts, each measured with its own k
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # rows of a decode step
    windows: int = 128  # of held-out text, for measuring quality
    context: int = 512  # tokens per window
    timed_config: str = ""  # config of the model to time (random weights if it has no path); "": model.path
    cached_tokens: int = 64  # per row, in the cache of a timed step
    rounds: int = 5  # each round times every policy at every batch size
    steps: int = 2  # timed per policy and round with 16 rows or more; more steps for fewer rows, see `steps_at`

    def __post_init__(self):
        require(len(self.policies) > 0, "sweep.policies", self.policies, "at least one policy")
        require(len(set(self.policies)) == len(self.policies), "sweep.policies", self.policies, "each policy once")
        names = [folder_name(path) for path in self.pruned]
        require(len({*names}) == len(names), "sweep.pruned", self.pruned, "folders with different names")
        given = self.concurrencies
        require(len(given) > 0 and min(given) > 0, "sweep.concurrencies", given, "positive numbers")
        require(len(set(given)) == len(given), "sweep.concurrencies", given, "each number once")
        require_positive("sweep", self, "windows", "context", "cached_tokens", "rounds", "steps")
        for rows in map(side_by_side, given):
            expected = f"a multiple of the {rows} rows that are read side by side at one of sweep.concurrencies"
            require(self.windows % rows == 0, "sweep.windows", self.windows, expected)


def folder_name(path: str) -> str:
    """The name of a checkpoint's folder; of `NAME/model`, which fine-tuning writes, it is NAME."""
    folder = pathlib.PurePath(os.path.normpath(path))
    return folder.parent.name or folder.name if folder.name == "model" else folder.name


def steps_at(config: SweepConfig, concurrency: int) -> int:
    """Steps that one round times for a policy: more with few rows, since such steps are short."""
    return config.steps * max(1, 16 // concurrency)


def side_by_side(concurrency: int) -> int:
    """Rows scored in one step: several groups of few rows, or one group of many."""
    return concurrency * max(1, 16 // concurrency)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of every command."""

    seed: int = 0

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections, with defaults. A launcher reads those that it needs."""

    model: ModelConfig = ModelConfig()
    decoder: DecoderConfig = DecoderConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    policy: PolicyConfig = PolicyConfig()
    kernels: KernelsConfig = KernelsConfig()
    mesh: MeshConfig = MeshConfig()
    text: TextConfig = TextConfig()
    training: TrainingConfig = TrainingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    sweep: SweepConfig = SweepConfig()
    predict: PredictConfig = PredictConfig()
    prune: PruneConfig = PruneConfig()
    search: SearchConfig = SearchConfig()
    compile: CompileConfig = CompileConfig()
    run: RunConfig = RunConfig()

    @property
    def architecture(self) -> Architecture:
        """The sections that define the model's architecture."""
        return Architecture(self.decoder, self.attention, self.moe)
