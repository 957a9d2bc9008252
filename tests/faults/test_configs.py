"""Two hundred wrong configurations, each refused in one line by a launcher that never imports JAX."""

import hypothesis
import pytest
from hypothesis import strategies

from moe_jax.config import gin
from tests.faults import bad_configs, launched


@pytest.fixture
def no_jax(tmp_path):
    """A folder for PYTHONPATH in which importing JAX fails with a traceback."""
    folder = tmp_path / "no_jax"
    folder.mkdir()
    (folder / "jax.py").write_text('raise RuntimeError("JAX is imported before the configuration has been checked")\n')
    return folder


def refused_by_launchers(tmp_path, no_jax, configs):
    """Runs a launcher on each; returns those that were not refused correctly."""

    def run(numbered):
        number, config = numbered
        folder = tmp_path / str(number)
        folder.mkdir()
        config.write(folder)
        launcher = ("infer", "train", "finetune")[number % 3]
        before = launched.entries(folder)
        ended = launched.run(launcher, *config.flags(), "--out=out", folder=folder, path=[no_jax], timeout=30)
        problem = launched.not_refused(ended)
        if launched.entries(folder) != before:
            problem += f"; written: {launched.entries(folder) - before}"
        return f"{number} {launcher} ({config.reason}): {problem}" if problem else ""

    return [problem for problem in launched.two_at_a_time(run, enumerate(configs)) if problem]


@pytest.mark.processes
def test_twenty_wrong_configurations_are_refused_before_jax_is_imported(tmp_path, no_jax):
    configs = bad_configs.sample(20)
    assert len({config.reason for config in configs}) > 12
    assert refused_by_launchers(tmp_path, no_jax, configs) == []


@pytest.mark.slow
def test_two_hundred_wrong_configurations_are_refused_before_jax_is_imported(tmp_path, no_jax):
    assert refused_by_launchers(tmp_path, no_jax, bad_configs.sample(200)) == []


@pytest.mark.parametrize("kind", bad_configs.KINDS)
def test_the_reader_refuses_in_one_line(tmp_path_factory, monkeypatch, kind):
    """In this process, for many more configurations: only ValueError is raised."""

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(bad_configs.KINDS[kind])
    def refused(config):
        folder = tmp_path_factory.mktemp("configs")
        config.write(folder)
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError) as refusal:
            gin.read_config(config.config or None, config.overrides)
        message = str(refusal.value)
        assert len(message.splitlines()) == 1 and len(message) < 2000, message

    refused()


GOOD = strategies.lists(strategies.sampled_from(bad_configs.GOOD_LINES), max_size=4).map("".join)


@hypothesis.given(text=GOOD)
def test_the_lines_around_them_are_good(tmp_path_factory, text):
    """Otherwise a configuration might be refused because of the lines around the wrong one."""
    path = tmp_path_factory.mktemp("configs") / "main.gin"
    path.write_text(text)
    gin.read_config(path)
