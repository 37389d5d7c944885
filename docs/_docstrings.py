"""Examples in docstrings, under the heading that the reader of docstrings knows."""

import re
import textwrap

from griffe import Extension


def _headed(match):
    return f"\n\nExamples:\n{textwrap.indent(match[1], '    ')}"


class Examples(Extension):
    """Makes `Examples:` of `Example:`, and of lines that begin with >>> without any heading."""

    def on_object(self, *, obj, **others):
        """Called for every object that was read."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("Example:\n", "Examples:\n")
            obj.docstring.value = re.sub(r"\n\n(>>> (?:.+\n?)+)", _headed, text)
