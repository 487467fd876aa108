"""The SQL of the package, found by a rule: text that begins with a verb of SQL in capitals."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import aioworker

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(aioworker.__file__).parent
RESERVED = Path(__file__).parent / "data/reserved"
# What no statement of ours names: text, comments, the driver's parameters, variables.
_NOT_NAMES = re.compile(r"'[^']*'|/\*.*?\*/|%\(\w+\)s|@@?[\w.]+", re.DOTALL)
_STATEMENT = re.compile(
    r"\s*(ALTER|CREATE|DELETE|DROP|GRANT|INSERT|KILL|REPLACE|SELECT|SET|SHOW|UPDATE|WITH)\s"
)


class Statement(NamedTuple):
    """A statement, or the beginning of one.

    Args:
        where: The module and the line.
        text: The statement; what only a call puts into it is left out.
    """

    where: str
    text: str

    @property
    def names(self) -> set[str]:
        """Its words in small letters: our SQL writes keywords, functions and types in capitals."""
        return set(re.findall(r"\b[a-z_][a-z_0-9]*\b", _NOT_NAMES.sub(" ", self.text)))


def statements() -> list[Statement]:
    """Return every statement of the package."""
    modules = sorted(PACKAGE.rglob("*.py"))
    return [one for module in modules for one in _statements(module)]


def reserved(server: str) -> set[str]:
    """Return the words that a kind of server, `mariadb` or `mysql`, takes for no name."""
    return set((RESERVED / f"{server}.txt").read_text().split())


def _statements(path: Path) -> Iterator[Statement]:
    inside = path.relative_to(PACKAGE.parent).with_suffix("")
    module = ".".join(inside.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        text = _text(node, module)
        if text is not None and _STATEMENT.match(text):
            yield Statement(
                f"{module.removeprefix('aioworker.')}:{getattr(node, 'lineno', 0)}", text
            )


def _text(node: ast.AST, module: str) -> str | None:
    """Return a string of the source, the module's own constants put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_part(part, module) for part in node.values)
    return None


def _part(node: ast.expr, module: str) -> str:
    if not isinstance(node, ast.FormattedValue):
        return _text(node, module) or ""
    found: object = None
    for name in ast.unparse(node.value).split("."):
        found = (
            getattr(importlib.import_module(module), name, None)
            if found is None
            else getattr(found, name, None)
        )
    return str(found) if isinstance(found, str | int) else " "
