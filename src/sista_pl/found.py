"""What is registered under which name, read from the source: nothing is imported, so that `sista list` is at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from sista_pl import packaged


def registered(registry: str) -> list[tuple[str, str]]:
    """Return (name, first line of the docstring) of what our package and the plug-ins' register by a decorator.

    A name that is made while a module is imported is not seen; `sista list losses` and `encoders` import.

    Args:
        registry: name of the registry in the source, as `LOSSES`.
    """
    own = Path(__file__).parent
    found: dict[str, str] = {}
    for folder in [own, *packaged.plugin_folders()]:
        for file in sorted(folder.rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if f"@{registry}.register(" in text:
                for name, summary in _decorated(text, registry):
                    found.setdefault(name, summary)
    return sorted(found.items())


def _decorated(text: str, registry: str) -> Iterator[tuple[str, str]]:
    try:
        statements = ast.parse(text).body
    except SyntaxError:  # a plug-in's, of which its import will tell
        return
    for node in statements:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        for call in node.decorator_list:
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != f"{registry}.register":
                continue
            if call.args and isinstance(call.args[0], ast.Constant):
                yield str(call.args[0].value), (ast.get_docstring(node) or "").split("\n")[0]
