"""A Griffe extension: [`name`] in a docstring links to the page of that public name, as PEFT's documentation does."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, GriffeLoader, Module

NAME = re.compile(r"\[`(\w+)`\](?!\[)")


class Links(Extension):
    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        public = set(pkg.exports or ())
        _link(pkg, {str(name) for name in public})


def _link(member: Any, public: set[str]) -> None:
    if member.is_alias:
        return
    if member.docstring is not None:
        member.docstring.value = NAME.sub(
            lambda match: f"[`{match[1]}`][peft_trex.{match[1]}]" if match[1] in public else f"`{match[1]}`",
            member.docstring.value,
        )
    for each in member.members.values():
        _link(each, public)
