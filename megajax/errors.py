"""The exceptions that megajax raises for a mistake it can name.

Every one of them is a `MegajaxError` whose text is one line that names the thing at fault: the leaf
path, the config field or the file. The command line prints that line and exits with code 2.
"""

import difflib
import re
from collections.abc import Iterable


class MegajaxError(Exception):
    """Base class: catch this to catch every error that megajax raises on purpose.

    >>> issubclass(ParentsError, MegajaxError)
    True
    """


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text that is not empty, or else its kind.

    XLA's notes on a program, `[name='value']` at the end of the line, are left out.

    >>> first_line(ValueError("one\ntwo")), first_line(KeyError())
    ('one', 'KeyError')
    >>> first_line(RuntimeError("no memory. [executable_name='jit_step']"))
    'no memory.'
    """
    lines = (re.sub(r" \[[\w-]+='[^']*'\]", "", line).strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", prefix: str = "") -> str:
    """A hint for a name that is not known: the one that is most like it, or something else.

    >>> did_you_mean("lenght", ["length", "width"])
    'did you mean length?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


class ConfigError(MegajaxError, ValueError):
    """A config field (or an argument of the same name) has a value that cannot work."""


class DataError(MegajaxError, ValueError):
    """A data set is missing, empty, mislabelled or of the wrong shape."""


class InterchangeError(MegajaxError, ValueError):
    """A network's file cannot be read, is damaged, or does not hold the network that is wanted."""


class ParentsError(MegajaxError, ValueError):
    """The parents do not fit together, or their weights are not finite."""


class SymmetryError(MegajaxError, ValueError):
    """A permutation of hidden units that should leave the function alone does not."""


class WorkdirError(MegajaxError, OSError):
    """A workdir cannot be read or written, or belongs to another run."""


class SearchError(MegajaxError, ArithmeticError):
    """A search cannot go on: none of the networks of a generation has a finite fitness."""


class DeviceError(MegajaxError, RuntimeError):
    """The accelerator or the host ran out of memory, or the device was lost."""


class ProcessError(MegajaxError, RuntimeError):
    """Processes of one run do not find each other, or one of them cannot go on."""


class Interrupted(MegajaxError):  # noqa: N818 - nothing went wrong
    """A run was asked to stop, and did, after saving its state."""
