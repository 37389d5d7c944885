"""The command line: flags and a config file in, one run out, every mistake one line.

    python -m megajax.run --config experiments/digits.py
    python -m megajax.run --config exp.py --config.evolution.population_size=64 --workdir DIR

A config file is a Python program: run only those you trust. A mistake in it, in a flag or in the
data is one line on the standard error and exit code 2. What a run does is in `megajax.pipeline`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from megajax import pipeline
from megajax.config import Config, from_dict
from megajax.errors import ConfigError, MegajaxError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m megajax.run`.

    Args:
        argv: program name and arguments; None takes the command line's.

    Returns:
        The exit code: 0; 2 for a mistake that could be named; 130 when interrupted.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        config, folder = _parse(list(sys.argv if argv is None else argv))
        pipeline.run(config, folder, Console())
    except MegajaxError as error:
        errors.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return 0


def _parse(argv: list[str]) -> tuple[Config, Path]:
    """Reads the flags and the config file that they name."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Python file with get_config().",
        lock_config=False,
        accept_new_attributes=True,  # so that all unknown fields are named by from_dict
        flag_values=values,
        sys_argv=argv,
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; runs/NAME-seedSEED if absent.", flag_values=values
    )
    flags.DEFINE_bool("help", False, "Shows this help.", short_name="h", flag_values=values)
    try:
        rest = values(argv)
        if values.help:
            print(f"{__doc__}\n{values.main_module_help()}")
            raise SystemExit(0)
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is no flag; see --help")
        if values["config"].value is None:
            raise ConfigError("--config FILE is missing; see --help")
        file = Path(values["config"].config_filename.split(":")[0])
        if not file.exists():
            raise ConfigError(f"config file {file} does not exist")
        chosen = values.config
        if not isinstance(chosen, ConfigDict):
            raise ConfigError(
                f"get_config() returned {type(chosen).__name__}: start from "
                "megajax.config.default_config() and return it"
            )
        config = from_dict(chosen.to_dict())
    except (MegajaxError, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a config file or a flag may raise
        raise ConfigError(_describe(error)) from None
    return config, Path(values.workdir or Path("runs") / f"{file.stem}-seed{config.seed}")


def _describe(error: Exception) -> str:
    """One line on what went wrong, with the place in the config file where there is one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, flags.Error):
        return message
    if isinstance(error, AttributeError) and "'get_config'" in message:
        return "the config file has no function get_config()"
    packages = (str(Path(module.__file__ or "").parent) for module in (flags, config_flags, jax))
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if last.filename.startswith(tuple(packages)) else f"{last.filename}, line "
    where += f"{last.lineno}: " if where else ""
    return f"{where}{type(error).__name__}: {message}"


if __name__ == "__main__":
    sys.exit(main())
