"""Makes the docstrings ready for mkdocstrings, which reads some habits of ours otherwise."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
ROLE = re.compile(r":(?:func|meth|class|mod|attr):(?=`)")


class Docstrings(griffe.Extension):
    """`Example:` is a section of its own only in the plural; roles are those of another tool."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub("", EXAMPLE.sub("Examples:", obj.docstring.value))

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """The help of a configuration's field stands in its `Field(description=...)`."""
        if not isinstance(attr.value, griffe.ExprCall) or str(attr.value.function) != "Field":
            return
        for argument in attr.value.arguments:
            if isinstance(argument, griffe.ExprKeyword) and argument.name == "description":
                text = argument.value
                if isinstance(text, griffe.ExprName):  # a constant of the module
                    text = attr.module.members[text.name].value
                attr.docstring = griffe.Docstring(ast.literal_eval(str(text)), parent=attr)
