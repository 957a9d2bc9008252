"""Reads command lines as their launchers do, without running them.

Standard input: a JSON list of command lines, each a script of the repository and its arguments. Standard output: a JSON
list of the error of each, "" if there is none. A script runs until its call of `command.run`, so its own flags and
default config are used.
"""

import contextlib
import io
import json
import pathlib
import runpy
import sys

from absl import flags

from moe_jax import command
from moe_jax.command import hosts
from moe_jax.command.flags import define_flags, parse_flags
from moe_jax.config import gin
from moe_jax.routing.policies.parse import parse


def read(
    main,
    *,
    default_config=None,
    default_out=None,
    huge_pages=False,
    on_mesh=False,
    elsewhere=False,
    virtual_devices=None,
):
    """Does what `command.run` does before it calls `main`; policies are parsed too."""
    define_flags(default_config, default_out)
    if on_mesh:
        hosts.define_flags()
    parse_flags(sys.argv)
    config = gin.read_config(flags.FLAGS["config"].value, flags.FLAGS["set"].value)
    for spec in (config.policy.spec, *config.evaluation.policies, *config.sweep.policies):
        parse(spec)
    if config.sweep.timed_config:
        gin.read_config(config.sweep.timed_config)


def problem(script, *arguments):
    """The error of a command line, "" if there is none."""
    sys.argv = [script, *arguments]
    known, modules = set(flags.FLAGS), set(sys.modules)
    stderr = io.StringIO()
    sys.path.insert(0, str(pathlib.Path(script).parent))
    try:
        with contextlib.redirect_stderr(stderr):
            runpy.run_path(script, run_name="__main__")
    except ValueError as error:
        return str(error)
    except SystemExit:
        return stderr.getvalue() or "exits"
    finally:
        del sys.path[0]
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        for name in set(sys.modules) - modules:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(
                str(pathlib.Path("benchmarks").resolve())
            ):
                del sys.modules[name]
    return ""


command.run = read
print(json.dumps([problem(*line) for line in json.load(sys.stdin)]))
