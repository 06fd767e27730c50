"""HTML and SVG built from values, so that text is always escaped and nothing from outside becomes markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias


class Markup(str):
    """Text that is markup already; any other string is escaped when it is put inside an element."""

    __slots__ = ()


Node: TypeAlias = str | float | Iterable[Any] | None  # an iterable of nodes; beartype knows no recursive alias
Attribute: TypeAlias = str | float | bool | None

_VOID = frozenset({"meta", "img", "br", "hr", "col"})


def element(name: str, /, *children: Node, **attributes: Attribute) -> Markup:
    """`<name attributes>children</name>`.

    Args:
        children: markup, text and numbers (escaped), or any nesting of iterables of these; None adds nothing.
        attributes: underscores become hyphens and a trailing one falls away (`class_`); None and False are left out.
    """
    written = attributes_text(attributes)
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(nodes: Node) -> Markup:
    """One piece of markup from any nesting of nodes."""
    if nodes is None:
        return Markup("")
    if isinstance(nodes, Markup):
        return nodes
    if isinstance(nodes, str | int | float):
        return Markup(html.escape(str(nodes), quote=False))
    return Markup("".join(join(node) for node in nodes))


def attributes_text(attributes: Mapping[str, Attribute]) -> str:
    """` a="b" c="d"` with values escaped."""
    parts = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(f' {name}="{html.escape(_short(value), quote=True)}"')
    return "".join(parts)


def _short(value: Attribute) -> str:
    """Coordinates need no more than a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
