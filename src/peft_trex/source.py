"""Reads the source of a class of modules: what its forward does with the modules in it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn


def methods_of_forward(kind: type[nn.Module]) -> Iterator[ast.AST]:
    """The methods that a class's forward is made of, as syntax trees."""
    names, seen = ["forward"], {"forward"}
    while names:
        function = _tree_of(getattr(kind, names.pop(), None))
        if function is None:
            continue
        yield function
        for node in ast.walk(function):
            name = called_on_self(node)
            if name and name not in seen and inspect.isfunction(getattr(kind, name, None)):
                seen.add(name)
                names.append(name)


def _tree_of(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or none that stands alone
        return None


def attribute_of_self(node: ast.AST) -> str | None:
    """The name of `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def called_on_self(node: ast.AST) -> str | None:
    """The name in a call `self.name(...)`."""
    return attribute_of_self(node.func) if isinstance(node, ast.Call) else None


def weight_of(node: ast.AST) -> str | None:
    """The name of `self.name.weight`, where that is read."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
        return attribute_of_self(node.value)
    return None
