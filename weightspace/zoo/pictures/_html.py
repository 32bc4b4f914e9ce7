"""HTML that is escaped by construction: text becomes markup in one place only."""

from __future__ import annotations

import html

VOID = ("meta", "br")


class Html(str):
    """Markup that may stand in a page as it is."""

    __slots__ = ()


def escaped(text: object) -> str:
    """Text for an element or an attribute."""
    return html.escape(str(text), quote=True)


def element(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not :class:`Html` are text, and escaped.

    A trailing underscore of an attribute's name is dropped (``class_``).

    Example:
        >>> element("p", "a < b", element("b", 1), class_="note")
        '<p class="note">a &lt; b<b>1</b></p>'
    """
    written = "".join(
        f' {key.rstrip("_")}="{escaped(value)}"' for key, value in attributes.items() if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    inner = "".join(child if isinstance(child, Html) else escaped(child) for child in children)
    return Html(f"<{name}{written}>{inner}</{name}>")


def joined(*parts: Html) -> Html:
    """Elements one after the other."""
    return Html("\n".join(part for part in parts if part))
