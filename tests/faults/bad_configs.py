"""Random configurations that are wrong, each for a known reason.

Only the names of settings come from the schema: the tables below list by hand which values are out of range, and why a
combination is impossible. A few good lines surround the bad one.
"""

import dataclasses
import os
import pathlib
import random

import hypothesis
from hypothesis import strategies

# What a path can be other than a text file.
FOLDER, PIPE, ENDLESS, LOOP, HUGE = "folder", "pipe", "endless", "loop", "huge"
SCALARS = {
    "int": ["decoder.num_layers", "moe.k", "attention.num_heads", "sampling.top_k", "training.steps", "policy.k_max"],
    "float": ["decoder.norm_eps", "sampling.temperature", "training.learning_rate", "attention.rope_theta"],
    "bool": ["moe.normalize", "attention.qk_norm", "decoder.tie_embeddings"],
    "str": ["model.path", "model.dtype", "text.tokenizer", "kernels.grouped_matmul"],
    "list": ["text.sources", "evaluation.policies", "sampling.stop"],
}
KIND_OF = {name: kind for kind, names in SCALARS.items() for name in names}
WRONG_TYPES = {
    "int": ["1.5", "2.0", "'3'", "True", "None", "[1]", "(1,)", "{}", "{'a': 1}", "1j", "b'3'", "1e3", "''"],
    "float": ["'0.5'", "True", "None", "[0.5]", "1j", "{0.5: 1}", "'nan'", "b''", "()"],
    "bool": ["0", "1", "'True'", "None", "1.0", "[True]"],
    "str": ["1", "None", "True", "['a']", "1.5", "{'a': 'b'}", "b'a'"],
    "list": ["'model'", "1", "[1]", "[None]", "[['a']]", "['a', 2]", "(('a',),)", "{'a': 1}", "None"],
}
OUT_OF_RANGE = {
    **{name: ["0", "-1"] for name in ["decoder.vocab_size", "decoder.d_model", "decoder.max_context"]},
    **{name: ["0", "-3"] for name in ["attention.num_heads", "attention.num_kv_heads", "attention.head_dim"]},
    **{name: ["0", "-64"] for name in ["moe.num_experts", "moe.k", "moe.expert_hidden", "moe.num_groups"]},
    **{name: ["0", "-2"] for name in ["training.steps", "training.batch_size", "training.checkpoint_every"]},
    **{
        name: ["0.0", "-1e-5", "-0.0"]
        for name in ["decoder.norm_eps", "attention.rope_theta", "training.learning_rate"]
    },
    **{name: ["-0.1", "1.1", "5"] for name in ["training.adam_b1", "training.adam_b2"]},
    "decoder.num_layers": ["0", "-1"],
    "decoder.num_dense_layers": ["-1", "8"],
    "decoder.dense_layers": ["(8,)", "(-1,)", "(1, 2)"],
    "attention.clip_qkv": ["-1.0"],
    "moe.num_experts_of_layers": ["(64,)", "(0,)"],
    "attention.rope_fraction": ["-0.5", "1.5", "0.05"],
    "moe.num_shared_experts": ["-1"],
    "moe.score": ["'sigmod'", "''", "'Softmax'"],
    "model.dtype": ["'int8'", "'float64'", "''"],
    "model.expert_dtype": ["'int4'", "'bfloat16'", "''"],
    "evaluation.expert_dtypes": ["('int4',)", "('int8', 'int8')"],
    "policy.spec": ["''", "'  '"],
    "policy.k_max": ["-1"],
    "text.sources": ["[]", "()"],
    "text.vocab_size": ["319", "0", "65537"],
    "evaluation.policies": ["()"],
    "sampling.temperature": ["-0.1"],
    "sampling.top_k": ["-1"],
    "sampling.top_p": ["0", "0.0", "-1.0", "1.001"],
    "sampling.stop": ["['']", "('a', '')"],
    "sampling.max_new_tokens": ["0", "-200"],
    "run.seed": ["-1", "4294967296"],
    "training.accumulation": ["0", "-1"],
    "training.weights": ["'float16'", "''"],
    "objective.direction": ["'backward'", "''"],
    **{name: ["-1.0", "-0.001"] for name in ["objective.distillation", "objective.hidden", "objective.sparsity"]},
    "objective.temperature": ["0.0", "-2.0"],
    "finetune.train": ["'routers'", "'LoRA'", "''"],
    "evaluation.context": ["3", "-1"],
    "finetune.k_drawn_per": ["'token'", "''"],
    **{name: ["0", "-1"] for name in ["finetune.lora_rank", "finetune.lora_alpha", "finetune.k_min"]},
    "finetune.k_weights": ["[0.0]", "(0.0, 0.0)", "(1.0, -1.0)"],
    "finetune.patience": ["-1"],
    "finetune.held_out_fraction": ["-0.1", "1.5"],
}
IMPOSSIBLE = [
    ("moe.k = 9\nmoe.num_experts = 8", "more experts chosen than there are"),
    ("moe.num_experts = 10\nmoe.num_groups = 3\nmoe.k = 1", "groups of unequal size"),
    ("moe.num_groups = 4\nmoe.num_groups_kept = 5", "more groups kept than there are"),
    ("moe.num_groups = 8\nmoe.num_groups_kept = 1\nmoe.k = 9", "more experts chosen than the kept group has"),
    ("attention.num_heads = 6\nattention.num_kv_heads = 4", "heads that no kv head serves"),
    ("attention.num_heads = 2\nattention.num_kv_heads = 4", "more kv heads than heads"),
    ("attention.head_dim = 6\nattention.rope_fraction = 0.5", "an odd number of rotated channels"),
    ("decoder.num_layers = 2\ndecoder.num_dense_layers = 2", "no MoE layer"),
    ("decoder.num_dense_layers = 1\ndecoder.dense_hidden = 0", "a dense layer without width"),
    ("training.steps = 10\ntraining.warmup_steps = 10", "a warm-up as long as the run"),
    ("objective.language_model = 0.0\nobjective.sparsity = 1.0", "nothing that says what is right"),
]
BROKEN_LINES = [
    *("moe.k", "moe.k =", "= 3", "moe.k == 3", "moe.k = = 3", "moe.k = 3 4", "moe.k = 1 +", "moe.k = 1 + 1"),
    *("moe.k: 3", "moe.k = [1", "moe.k = 1]", "moe.k = (1", "moe.k = {1", "moe.k = 'a", "moe.k = '''a", 'moe.k = "'),
    *("moe.k = (,)", "import os", "from a import b", "include", "include 3", "include a.gin", "include 'a' 'b' ="),
    *("include 'x.gin", "[moe]", "a/moe.k = 3", "a/b/moe.k = 3", "moe.k = @f", "moe.k = @f()", "moe.k = @"),
    *("moe.k = %", "moe.k = % K", "moe.k() = 3", "moe.k.x = 3", ".k = 3", "moe. = 3", "moe..k = 3", "moe k = 3"),
    *("moe-k = 3", "3moe.k = 3", "$moe.k = 3", "moe.k = $3", "moe:\n  k 3", "moe:\nk = 3\n  k = 4"),
    *("moe:\n    k = 3\n  k = 4", "  moe.k = 3\n moe.k = 3", "moe:", "\\", "\\x", "?", "moe.k = three"),
    *("moe.k = nan", "moe.k = inf", "moe.k = -inf", "moe.k = NaN", "moe.k = 0x", "moe.k = 1__0", "moe.k = 08"),
    *("moe.k = f'3'", "model.path = '\\d'", "model.path = '\\u12'", "moe.k = lambda: 3", "moe.k = __import__('os')"),
    *("{", "}", "moe.k = 3;", "moe.k = 3; moe.k = 4", "moe.k := 3", "moe.k = 3 if True else 4", "moe.k += 1"),
    *("del moe.k", "pass", "None"),
]
GOOD_LINES = ["# a comment\n", "\n", "run.seed = 7\n", "evaluation.batch_size = 4\n", "text.held_out = 'naïve'\n"]
ODD_PATHS = ["x" * 300, "a/b/c.gin", "/", "..", "é\n"]
ODD_OVERRIDES = ["", "=", "k=3", "moe.k", "moe=3", ".=3", "moe.k.k=3", "a/moe.k=3", "%K=3", "=moe.k", "moe .k=3"]
names = strategies.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


@dataclasses.dataclass(frozen=True)
class BadConfig:
    """Files by name (text, bytes, or one of the kinds above), overrides, and the reason for refusing them."""

    reason: str
    files: tuple[tuple[str, str | bytes], ...] = ()
    overrides: tuple[str, ...] = ()
    config: str = "main.gin"  # what --config gets; "": nothing

    def __repr__(self) -> str:  # some have a hundred thousand characters
        files = ", ".join(f"{name}: {content[:60]!r}" for name, content in self.files[:3])
        return f"BadConfig({self.reason}; {files}; {[override[:60] for override in self.overrides]})"

    def write(self, folder: pathlib.Path) -> None:
        """Makes the files."""
        for name, content in self.files:
            path = folder / name
            match content:
                case "folder":
                    path.mkdir()
                case "pipe":
                    os.mkfifo(path)
                case "endless":
                    path.symlink_to("/dev/zero")
                case "loop":
                    path.symlink_to(path.name)
                case "huge":
                    with open(path, "wb") as file:
                        file.truncate(10**12)  # zeros that take no disk space
                case _:
                    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    def flags(self) -> list[str]:
        """The flags that give it to a launcher, from the folder of its files."""
        config = [f"--config={self.config}"] if self.config else []
        return config + [f"--set={override}" for override in self.overrides]


@strategies.composite
def placed(draw, bad: str, reason: str, also_as_override: bool = True) -> BadConfig:
    """Bad lines among good ones: in the file, in one that it includes, or in overrides where they are one."""
    before, after = (draw(strategies.lists(strategies.sampled_from(GOOD_LINES), max_size=3)) for _ in range(2))
    text = "".join(before) + bad + "\n" + "".join(after)
    place = draw(strategies.sampled_from(["file", "included"] + ["override"] * also_as_override))
    if place == "file":
        return BadConfig(reason, (("main.gin", text),))
    if place == "included":
        return BadConfig(reason, (("main.gin", "".join(after) + "include 'bad.gin'\n"), ("bad.gin", text)))
    overrides = tuple(line.replace(" = ", "=", 1) for line in bad.split("\n"))
    return BadConfig(reason, (("main.gin", "".join(before)),), overrides)


@strategies.composite
def unknown_names(draw):
    """An unknown section or field: no name of the schema contains `zz`."""
    section, field, unknown = draw(strategies.sampled_from(sorted(KIND_OF))).split(".") + [draw(names) + "zz"]
    name = draw(strategies.sampled_from([f"{unknown}.{field}", f"{section}.{unknown}", f"{unknown}.{unknown}"]))
    return draw(placed(f"{name} = 1", f"nothing is called {name}"))


@strategies.composite
def wrong_types(draw):
    """A literal of another type. After --set, the text of a string setting is taken as it is."""
    setting = draw(strategies.sampled_from(sorted(KIND_OF)))
    literal = draw(strategies.sampled_from(WRONG_TYPES[KIND_OF[setting]]))
    return draw(placed(f"{setting} = {literal}", f"{setting} is not a {KIND_OF[setting]}", KIND_OF[setting] != "str"))


@strategies.composite
def out_of_range(draw):
    """A value outside the setting's range."""
    setting = draw(strategies.sampled_from(sorted(OUT_OF_RANGE)))
    literal = draw(strategies.sampled_from(OUT_OF_RANGE[setting]))
    return draw(placed(f"{setting} = {literal}", f"{setting} is out of range"))


@strategies.composite
def impossible(draw):
    """Values that are possible by themselves but not together."""
    return draw(placed(*draw(strategies.sampled_from(IMPOSSIBLE))))


@strategies.composite
def broken_grammar(draw):
    """Text outside gin's grammar, or outside the part of it that we accept."""
    line = draw(strategies.sampled_from(BROKEN_LINES))
    return draw(placed(line, "not the grammar", also_as_override=False))


@strategies.composite
def bad_includes(draw):
    """Cycles and chains of includes, very many includes, and includes of things that are not files."""
    kind = draw(strategies.sampled_from(["cycle", "missing", "chain", "crowd", FOLDER, PIPE, ENDLESS, LOOP, HUGE]))
    reason, length = f"include: {kind}", draw(strategies.integers(1, 5))
    included = [(f"f{i}.gin", f"include 'f{i + 1}.gin'\n") for i in range(length)]
    if kind == "cycle":
        included[-1] = (f"f{length - 1}.gin", "include 'main.gin'\n")
    elif kind == "chain":
        included = [(f"f{i}.gin", f"include 'f{i + 1}.gin'\n") for i in range(999)] + [("f999.gin", "moe.k = 3\n")]
    elif kind == "crowd":  # 2**40 files
        included = [(f"f{i}.gin", f"include 'f{i + 1}.gin'\n" * 2) for i in range(40)] + [("f40.gin", "moe.k = 3\n")]
    elif kind != "missing":
        included.append((f"f{length}.gin", kind))
    return BadConfig(reason, (("main.gin", "include 'f0.gin'\n"), *included))


@strategies.composite
def bad_macros(draw):
    """Macros that are undefined, circular, unused, or that grow without bound."""
    name = draw(names).upper()
    length, last = draw(strategies.integers(0, 4)), f"{name}_0"
    chain = "".join(f"{name}_{i} = %{name}_{i + 1}\n" for i in range(length))
    long = "".join(f"{name}_{i} = %{name}_{i + 1}\n" for i in range(2000)) + f"{name}_2000 = 3\n"
    doubled = "".join(f"{name}_{i} = [%{name}_{i + 1}, %{name}_{i + 1}]\n" for i in range(40)) + f"{name}_40 = 'a'\n"
    bad, reason = draw(
        strategies.sampled_from(
            [
                (f"{chain}moe.k = %{name}_0", "an undefined macro"),
                (f"{chain}{name}_{length} = %{name}_0\nmoe.k = %{last}", "a macro defined by itself"),
                (f"{name} = 3", "a macro that nothing uses"),
                (f"text.sources = ['a', %{name}]", "an undefined macro in a list"),
                (f"{long}moe.k = %{last}", "a chain of 2000 macros"),
                (f"{doubled}text.sources = %{last}", "a list doubled 40 times"),
                (f"{name} = 'three'\nmoe.k = %{name}", "a macro of another type"),
            ]
        )
    )
    return draw(placed(bad, reason, also_as_override=False))


@strategies.composite
def huge_values(draw):
    """Huge numbers, deeply nested brackets, and lines of a hundred thousand characters."""
    setting = draw(strategies.sampled_from(SCALARS["int"] + SCALARS["float"] + SCALARS["list"]))
    kind, size = KIND_OF[setting], draw(strategies.sampled_from([100, 1000, 10_000, 100_000]))
    opening, closing = draw(strategies.sampled_from(["[]", "()", ("{1:", "}")]))
    literal, reason = draw(
        strategies.sampled_from(
            [
                (opening * size + "1" + closing * size, "brackets"),
                (opening * size, "brackets that stay open"),
                ("1" + "0" * (size + 300), "too many digits"),
                ("0x" + "f" * (size + 300), "too many hexadecimal digits"),
                ("~" * size, "operators"),
                (f"'{'a' * size}'" if kind != "list" else "['" + "a" * size + "', 1]", "a long string"),
                (draw(strategies.sampled_from(["1e999", "-1e999"])), "infinite"),
                ("nan", "not a literal"),
                (f"{'x' * size}zz", "a long name"),
            ]
        )
    )
    return draw(placed(f"{setting} = {literal}", reason, also_as_override=size < 100_000))


@strategies.composite
def not_text(draw):
    """Bytes that are not UTF-8, zero bytes, and foreign letters in names."""
    line = draw(strategies.sampled_from(["moe.k = 3\n", "# nothing\n", "run.seed = 1\n"]))
    noise = draw(strategies.binary(max_size=200))
    foreign = draw(strategies.sampled_from(["mоe.k", "moe.κ", "moe.k\u0301", "\u202emoe.k", "moe\u200b.k", "ｍoe.kzz"]))
    kinds = {
        "not UTF-8": line.encode() + b"\xff" + noise,
        "UTF-16": ("\ufeff" + line).encode("utf-16-le"),
        "a zero byte": line.encode() + b"\0" + line.encode(),
        "a surrogate": f"model.path = '{chr(0xD800)}'\n".encode("utf-8", "surrogatepass"),
        "an image": b"\x89PNG\r\n\x1a\n" + noise,
        "foreign letters": f"{line}{foreign} = 3\n".encode(),
        "a zero byte, escaped": line.encode() + b"model.path = 'a\\0'\n",
    }
    reason = draw(strategies.sampled_from(sorted(kinds)))
    return BadConfig(reason, (("main.gin", kinds[reason]),))


@strategies.composite
def no_file(draw):
    """--config names something that is not a file, is missing, or cannot exist."""
    kind = draw(strategies.sampled_from([FOLDER, PIPE, ENDLESS, LOOP, HUGE]))
    named = draw(names.map(lambda name: name + ".gin") | strategies.sampled_from(ODD_PATHS))
    overrides = tuple(draw(strategies.lists(strategies.sampled_from(["moe.k=3", "run.seed=1"]), max_size=2)))
    if draw(strategies.booleans()):
        return BadConfig(f"--config is a {kind}", (("main.gin", kind),), overrides)
    return BadConfig("--config is not there", (), overrides, config=named)


@strategies.composite
def bad_overrides(draw):
    """Overrides that are not of the form section.field=value."""
    override = draw(
        strategies.sampled_from(ODD_OVERRIDES)
        | names.map(lambda name: f"{name}zz")
        | strategies.text(strategies.characters(exclude_characters="\0=.", exclude_categories=["Cs"]), max_size=40)
    )
    return BadConfig("not an override", (), (override,), config="")


KINDS = {
    strategy.__name__: strategy()
    for strategy in (
        *(unknown_names, wrong_types, out_of_range, impossible, broken_grammar, bad_includes, bad_macros),
        *(huge_values, not_text, no_file, bad_overrides),
    )
}


def _examples(strategy: strategies.SearchStrategy[BadConfig], count: int) -> list[BadConfig]:
    found: list[BadConfig] = []

    @hypothesis.settings(max_examples=count, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(strategy)
    def collect(config):
        if config not in found:
            found.append(config)

    collect()
    random.Random(count).shuffle(found)  # hypothesis generates the simplest first
    return found


def sample(count: int) -> list[BadConfig]:
    """`count` different configurations, equally many of each kind, and the same at every call."""
    each_count = -(-count // len(KINDS))
    by_kind = [_examples(strategy, 5 * each_count + 15) for strategy in KINDS.values()]
    assert min(map(len, by_kind)) >= each_count, "sample more of each kind"
    return [found[turn] for turn in range(each_count) for found in by_kind][:count]
