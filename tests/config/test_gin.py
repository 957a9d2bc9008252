import dataclasses
import pathlib
import typing

import hypothesis
import pytest
from hypothesis import strategies

from moe_jax.config import gin, schema
from moe_jax.config.architecture import MoEConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="a.gin"):
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def refusal(path, overrides=()):
    with pytest.raises(ValueError) as caught:
        gin.read_config(path, overrides)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


def test_no_file_gives_the_defaults():
    assert gin.read_config(None) == schema.Config()


def test_bindings_blocks_includes_and_macros(write):
    write("WIDTH = 128\ndecoder.d_model = %WIDTH\nmoe.k = 2\nmoe.k = 3\n", "models/base.gin")
    write("include 'sizes.gin'\nattention.head_dim = 32\n", "models/tiny.gin")
    write("include 'base.gin'\n", "models/sizes.gin")
    path = write(
        "# comment\r\ninclude 'models/tiny.gin'\r\nWIDTH = 96\r\nmoe.k = 4  # wins\r\n"
        "sampling:\n  temperature = 1\n  stop = [%END, 'b']\nEND = 'a'\ntext.sources = ('x',)\n"
    )
    config = gin.read_config(path)
    assert config.decoder.d_model == 96
    assert config.attention.head_dim == 32
    assert config.moe.k == 4
    assert (config.sampling.temperature, type(config.sampling.temperature)) == (1.0, float)
    assert config.sampling.stop == ("a", "b")
    assert config.text.sources == ("x",)


def test_an_include_may_name_a_path_from_the_working_folder(write):
    write("moe.k = 2\n", "models/a.gin")
    assert gin.read_config(write("include 'models/a.gin'\n", "runs/b.gin")).moe.k == 2


def test_a_macro_of_an_overwritten_binding_is_not_unused(write):
    assert gin.read_config(write("K = 2\nmoe.k = %K\nmoe.k = 3\n")).moe.k == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("moe.k=4", 4),
        (" moe.k = 4 ", 4),
        ("model.path=out/x", "out/x"),
        ("model.path=8", "8"),
        ("model.path='8'", "8"),
        ("model.path='it''s", "'it''s"),
        ("model.path=a=b", "a=b"),
        ("model.path=", ""),
        ("policy.spec=topk:3", "topk:3"),
        ('policy.spec="ratio:0.3,min=2"', "ratio:0.3,min=2"),
        ("moe.normalize=False", False),
        ("sampling.stop=['a', 'b']", ("a", "b")),
        ("sampling.temperature=1", 1.0),
        ("training.learning_rate=1e-4", 1e-4),
    ],
)
def test_overrides_are_read_by_the_type_of_their_field(override, expected):
    section, field = override.split("=")[0].strip().split(".")
    value = getattr(getattr(gin.read_config(None, [override]), section), field)
    assert (value, type(value)) == (expected, type(expected))


def test_overrides_win_over_files_and_later_ones_over_earlier(write):
    assert gin.read_config(write("moe.k = 2\n"), ["moe.k=3", "moe.k=4"]).moe.k == 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("moe.k = 2\nmoe.kk = 3\n", ["a.gin:2: moe.kk", "nearest: moe.k;", "num_experts"]),
        ("mo.k = 3", ["a.gin:1: mo.k", "unknown section 'mo'", "nearest: moe.k;", "decoder"]),
        ("model.temperature = 1", ["nearest: sampling.temperature"]),
        ("moe.K = 3", ["nearest: moe.k;"]),
        ("samplng:\n  top_k = 1\n", ["a.gin:1: samplng", "nearest: sampling"]),
        ("sampling:\n  topk = 1\n", ["a.gin:2: sampling.topk", "nearest: sampling.top_k"]),
        ("a.moe.k = 3", ["a.gin:1", "'a.moe'", "nearest: moe.k"]),
        ("\nk = 3", ["a.gin:2: k", "nothing uses", "nearest: moe.k"]),
        ("moe.k = %KK\nK = 2", ["a.gin:1: %KK", "nearest: %K;"]),
        ("moe.k = %K", ["a.gin:1: %K", "no macro is defined", "K = literal"]),
        ("moe.k = %A\nA = %B\nB = [%A]", ["%A: defined by itself, through A > B"]),
        ("moe.k = True", ["a.gin:1: moe.k = True: expected an integer"]),
        ("moe.k = 4.0", ["moe.k = 4.0: expected an integer"]),
        ("moe.k = None", ["moe.k = None: expected an integer"]),
        ("moe.normalize = 1", ["moe.normalize = 1: expected True or False"]),
        ("decoder.norm_eps = '1'", ["decoder.norm_eps = '1': expected a number"]),
        ("training.weight_decay = 1" + "0" * 400, ["training.weight_decay = 1", "...", "at most 1.8e308"]),
        ("policy.spec = 3", ["policy.spec = 3: expected a string"]),
        ("sampling.stop = 'a'", ["sampling.stop = 'a': expected a list of strings"]),
        ("sampling.stop = ['a', 1]", ["sampling.stop = ['a', 1]: expected a list of strings"]),
        ("moe.k = 100\n", ["a.gin:1: moe.k = 100: expected at most moe.num_experts = 64"]),
        ("run.seed = 1\nmoe.num_experts = 4\n", ["a.gin:2: moe.k = 8: expected at most moe.num_experts = 4"]),
        ("training.steps = 16\n", ["a.gin:1: training.warmup_steps = 100"]),
        ("import os\n", ["a.gin:1: `import os`: imports are not accepted"]),
        ("from moe_jax import api as b\n", ["`from moe_jax import api as b`"]),
        ("train/moe.k = 3", ["a.gin:1: scope 'train'"]),
        ("moe.k = @f()", ["a.gin:1: @f: references are not accepted"]),
        ("sampling.stop = ['a', @f]", ["a.gin:1: @f"]),
        ("moe.k = 3\npolicy.spec = topk:3\n", ["a.gin:2: cannot parse 'policy.spec = topk:3'", "strings in quotes"]),
        ("moe.k = 3 4\n", ["a.gin:1: cannot parse"]),
        ("moe.k =", ["a.gin:1: cannot parse"]),
        ("moe.k", ["a.gin:1: cannot parse"]),
        ("sampling.stop = ['a',\n", ["a.gin:", "cannot parse"]),
        ("policy.spec = 'a\n", ["a.gin:1: cannot parse"]),
        ("policy.spec = '\\d'\n", ["a.gin:1: cannot parse"]),
        ("moe:\n  k = 3\n num_experts = 4\n", ["a.gin:3: cannot parse"]),
        ("sampling.stop = " + "[" * 5000, ["a.gin:1: cannot parse"]),
        ("include 3", ["a.gin:1: cannot parse"]),
        ("include 'b.gin'", ["a.gin:1: include 'b.gin': no such file; nearest: a.gin"]),
        ("include 'x/b.gin'", ["there is no folder x"]),
        ("include '.'", [": cannot be read: Is a directory"]),
        ("include 'a.gin'", ["a.gin:1: include 'a.gin': includes itself"]),
        (b"moe.k = 3\n# \xff\n", ["a.gin: is not UTF-8 text (byte 12)"]),
        (b"moe.k = 3\n\0", ["a.gin: is not text"]),
    ],
)
def test_refusals_of_files(write, text, parts):
    message = refusal(write(text))
    assert [part for part in parts if part not in message] == [], message


def test_include_cycle_through_another_file(write):
    write("moe.k = 2\ninclude '../a.gin'\n", "sub/b.gin")
    assert "sub/b.gin:2: include '../a.gin': includes itself, through a.gin > b.gin" in refusal(
        write("include 'sub/b.gin'\n")
    )


def test_a_missing_config_file_offers_the_nearest(write):
    write("", "configs/infer_demo.gin")
    write("", "configs/sweep_demo.gin")
    assert refusal("configs/infr_demo.gin").endswith("nearest: configs/infer_demo.gin")
    assert refusal("config/infer_demo.gin").endswith("there is no folder config")
    pathlib.Path("empty").mkdir()
    assert refusal("empty/a.gin").endswith("empty has no *.gin file")
    assert "cannot be read: Is a directory" in refusal("configs")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("moe.kk=3", ["--set moe.kk=3: moe.kk", "nearest: moe.k;"]),
        ("k=3", ["--set k=3: expected section.field=value", "nearest:"]),
        ("moe.k", ["--set moe.k: expected section.field=value; nearest: moe.k"]),
        ("", ["expected section.field=value"]),
        ("moe.k=abc", ["--set moe.k=abc: moe.k = 'abc': expected an integer"]),
        ("moe.k=4.0", ["moe.k = 4.0: expected an integer"]),
        ("moe.normalize=true", ["moe.normalize = 'true': expected True or False"]),
        ("text.sources=stdlib", ["text.sources = 'stdlib': expected a list of strings, as in ['a', 'b']"]),
        ("moe.k=100", ["--set moe.k=100: moe.k = 100: expected at most"]),
        ("policy.spec=\n", ["policy.spec = '': expected a policy"]),
    ],
)
def test_refusals_of_overrides(override, parts):
    message = refusal(None, [override])
    assert [part for part in parts if part not in message] == [], message


def test_every_annotation_of_the_schema_can_be_read():
    for name, kind in gin._setting_types().items():
        assert gin._wanted(kind), name


ODD_TEXT = strategies.text(strategies.characters(exclude_characters="\0")) | strategies.sampled_from(
    ["\r\n", "'\"", "%K", "@f", "\\", "\ud800", "\u2028"]
)
FLOATS = strategies.floats(allow_nan=False, allow_infinity=False) | strategies.integers(-9, 9).map(float)
VALUES = {
    bool: strategies.booleans(),
    int: strategies.integers(-(2**63) + 1, 2**63 - 1),
    float: FLOATS,
    str: ODD_TEXT,
    tuple[str, ...]: strategies.lists(ODD_TEXT, max_size=3).map(tuple),
    tuple[int, ...]: strategies.lists(strategies.integers(-(2**63) + 1, 2**63 - 1), max_size=3).map(tuple),
    tuple[float, ...]: strategies.lists(FLOATS, max_size=3).map(tuple),
}


@strategies.composite
def configs(draw):
    """Any configuration that can be written, even if the schema would refuse its values."""
    config = object.__new__(schema.Config)
    for section, section_type in typing.get_type_hints(schema.Config).items():
        drawn = object.__new__(section_type)
        for field, kind in typing.get_type_hints(section_type).items():
            object.__setattr__(drawn, field, draw(VALUES[kind]))
        object.__setattr__(config, section, drawn)
    return config


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(config=configs())
def test_written_gin_reads_back_equal(tmp_path, config):
    path = tmp_path / "config.gin"
    path.write_text(gin.to_gin(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for section_type in typing.get_type_hints(schema.Config).values():
            if "__post_init__" in vars(section_type):
                patch.setattr(section_type, "__post_init__", lambda self: None)
        read = gin.read_config(path)
    assert read == config
    assert repr(read) == repr(config)  # 1 == 1.0 == True, so compare the text too


@hypothesis.settings(max_examples=300, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    text=strategies.text()
    | strategies.lists(
        strategies.sampled_from([*"'\"[](){}=:.,%@/-\\#\n\n 3é", "\n  ", "moe", "k", "include", "import", "1.5"])
    ).map("".join)
)
def test_any_text_is_read_or_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.gin"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        assert isinstance(gin.read_config(path), schema.Config)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(str(path))


def test_resolved_configuration_replays(write):
    path = write("moe.k = 4\ntraining.weight_decay = 1e300\n")
    config = gin.read_config(path, ["policy.spec=topk:3", "model.path=a 'b'"])
    assert gin.read_config(write(gin.to_gin(config), "config.gin")) == config
    assert config != dataclasses.replace(config, moe=MoEConfig())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.gin")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_parses_and_opens_with_comments(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    gin.read_config(path.relative_to(CONFIGS.parent))
    # The command, the hardware, the duration, the result; a file that others include has its subject.
    comments = 4 if path.parent == CONFIGS else 1
    assert all(line.startswith("# ") for line in path.read_text().splitlines()[:comments])
