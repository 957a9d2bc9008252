"""The flags that every launcher has, and how a wrong command line is refused."""

import os
import sys
from collections.abc import Sequence

from absl import flags

from moe_jax.command import errors

flags.disclaim_key_flags()  # the flags below count as the launcher's own, which `--help` lists


def define_flags(default_config: str | os.PathLike | None, default_out: str | os.PathLike | None) -> None:
    """Defines `--config`, `--set`, `--out` and `--json`."""
    default_config = None if default_config is None else os.fspath(default_config)
    default_out = None if default_out is None else os.fspath(default_out)
    flags.DEFINE_string("config", default_config, "The configuration: a gin file.")
    flags.DEFINE_multi_string("set", [], "section.field=value: overrides one setting; repeat it for more.")
    flags.DEFINE_string("out", default_out, "The folder for result.json, config.gin and other outputs.")
    flags.DEFINE_bool("json", False, "Print result.json instead of text.")


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses a command line; ends the process if it is wrong, or after `--help`."""
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(errors.refuse(error))
    except SystemExit:  # absl ends with status 1 after --help
        sys.exit(0)
    if len(rest) > 1:
        hint = "--set " if "=" in rest[1] else "a flag, as in --config "
        sys.exit(errors.refuse(ValueError(f"{rest[1]!r}: unexpected argument; expected {hint}{rest[1]}")))
    return rest
