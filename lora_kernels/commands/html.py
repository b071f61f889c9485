"""One self-contained HTML page: no script, nothing from elsewhere, one column on a phone, light or dark as the system is.

A str is text, which is escaped: prompts, a model's words and file names are anybody's. Html is markup, and a type of its own.
"""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NewType

from .tables import TEXT_COLUMNS

Html = NewType("Html", str)

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser runs and fetches nothing, whatever the page should hold
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1c1e; --quiet: #5c5c63; --line: #d8d8dd; --ours: #0b66c3;
  --other: #8a8a93; --second: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --page: #131316; --text: #ececf0; --quiet: #a5a5ae; --line: #3a3a42;
  --ours: #5aa9f5; --other: #83838d; --second: #fb923c; } }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3, figcaption, .quiet { font-size: .875rem; font-weight: normal; color: var(--quiet); margin: .75rem 0 .25rem; }
figure, pre { margin: 0; }
pre { padding: .5rem .75rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  font: .875rem/1.5 ui-monospace, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: normal; } .number { text-align: right; white-space: nowrap; }
.bar { margin: .375rem 0; } .bar p { display: flex; justify-content: space-between; gap: 1rem; margin: 0; font-size: .875rem; }
.bar div { height: .625rem; min-width: 1px; border-radius: 2px; background: var(--other); }
.bar .ours { background: var(--ours); }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--quiet); }
svg polyline { fill: none; stroke: var(--ours); stroke-width: 2; } svg .faint { stroke-width: 1; opacity: .4; }
svg .second { stroke: var(--second); } svg circle { fill: var(--second); } svg line { stroke: var(--line); }
.key { color: var(--ours); } .key.faint { opacity: .5; } .key.second { color: var(--second); }
"""


@dataclass(frozen=True)
class Bar:
    """A value with its name, and as people read it; ours: in the colour of this package."""

    name: str
    value: float
    label: str
    ours: bool


def text(value: Any) -> Html:
    """`value` as it reads: no tag, and nothing that a file cannot hold (half a surrogate pair, control characters)."""
    whole = str(value).encode("utf-8", "replace").decode()
    return Html(html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", whole)))


def page(title: str, *parts: Html) -> str:
    """The document."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def section(heading: str, *parts: Html) -> Html:
    """`parts` under a heading."""
    return Html("\n".join([f"<section>\n<h2>{text(heading)}</h2>", *parts, "</section>"]))


def paragraph(content: str, quiet: bool = False) -> Html:
    """Prose; quiet: smaller and paler, as a caption is."""
    return Html(f"<p{_class('quiet' if quiet else '')}>{text(content)}</p>")


def quotation(heading: str, content: str) -> Html:
    """Words of others under their heading, line breaks and blanks as they are; each with a direction of its own."""
    return Html(f'<h3>{text(heading)}</h3>\n<pre dir="auto">\n{text(content)}</pre>')


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Html:
    """Columns as in a terminal, all of them: what is wider than the page scrolls in its own box."""
    number = [_class("" if i == 0 or name in TEXT_COLUMNS else "number") for i, name in enumerate(columns)]
    lines = ["".join(f"<th{kind}>{text(name)}</th>" for kind, name in zip(number, columns, strict=True))]
    lines += ["".join(f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(number, row, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return Html(f'<div class="scroll" tabindex="0"><table>\n{body}\n</table></div>')


def bars(caption: str, values: Sequence[Bar]) -> Html:
    """A bar for each value, the largest as wide as the page."""
    most = max((bar.value for bar in values), default=0) or 1
    drawn = [
        f'<div class="bar"><p><span>{text(bar.name)}</span> <span>{text(bar.label)}</span></p>'
        f'<div{_class("ours" if bar.ours else "")} style="width:{100 * bar.value / most:.1f}%"></div></div>'
        for bar in values
    ]
    return Html("\n".join([f"<figure>\n<figcaption>{text(caption)}</figcaption>", *drawn, "</figure>"]))


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
