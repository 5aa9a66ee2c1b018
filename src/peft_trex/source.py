"""Reads the source of a class of modules: what its forward does with the modules in it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

from torch import nn

# A call `self.name(...)`.
CALLED = re.compile(r"\bself\.(\w+)\(")


def code_of_forward(kind: type[nn.Module]) -> str:
    """The code of a class's forward and of its methods that this calls; empty without a source.

    It has no comments, and each statement stands on one line, with spaces as Python's `ast.unparse` sets them.
    """
    parts, names = [], ["forward"]
    for name in names:
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(kind, name))))
            parts.append(ast.unparse(ast.parse(source)))
        except (AttributeError, OSError, TypeError, SyntaxError, ValueError):  # no source, or none that stands alone
            continue
        called = dict.fromkeys(CALLED.findall(parts[-1]))
        names += [each for each in called if each not in names and inspect.isfunction(getattr(kind, each, None))]
    return "\n".join(parts)
