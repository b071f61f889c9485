"""A hook of mkdocs: troubleshooting.md's list of every error message, read from the code."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "<!-- every message, by docs/errors.py -->"
KINDS = ("TypeError", "ValueError", "RuntimeError", "FileNotFoundError", "NotImplementedError", "ImportError", "CommandError")


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(MARK, listing()) if MARK in markdown else markdown


def listing() -> str:
    """A heading for each file that raises, and its messages."""
    lines = []
    for file in sorted((ROOT / "lora_kernels").rglob("*.py")):
        found = messages(ast.parse(file.read_text(encoding="utf-8")))
        if found:
            lines += [f"### `{file.relative_to(ROOT)}`", "", *(f"- {kind}: `` {text} ``" for kind, text in found), ""]
    return "\n".join(lines)


def messages(tree: ast.AST) -> list[tuple[str, str]]:
    """(exception, message) of each `raise` with a text; what is filled in is `<expression>`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            message = text(node.exc.args[0]) if node.exc.args else ""
            if node.exc.func.id in KINDS and " " in message:
                found.append((node.exc.func.id, " ".join(message.split())))
    return found


def text(node: ast.expr) -> str:
    """A string as its reader sees it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return f"<{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}>"
