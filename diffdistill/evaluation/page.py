"""HTML of the report: the page with its style, and the few elements it consists of. No external resources."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

ABSENT = "\N{EN DASH}"
_STYLE = """
:root { color-scheme: light dark;
  --page: #f3f5f7; --card: #ffffff; --text: #24292f; --quiet: #5c6670; --line: #e3e6ea; --accent: #1f5fd0;
  --best: #e8f0fe; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0d1117; --card: #161b22; --text: #d5dbe3; --quiet: #97a1ac; --line: #30363d; --accent: #6ba4ff;
  --best: #1b2c47; --paper: #e9ecef; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.4rem; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.4rem 1rem 4rem; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0; max-width: 72ch; }
.quiet, figcaption, .tiles span, dt { color: var(--quiet); font-size: .86rem; }
.missing { color: var(--quiet); font-style: italic; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line); }
nav div { max-width: 1120px; margin: 0 auto; padding: .55rem 1rem; display: flex; gap: .4rem; overflow-x: auto; }
nav a { white-space: nowrap; padding: .2rem .7rem; border-radius: 99px; border: 1px solid var(--line);
  background: var(--card); color: var(--text); text-decoration: none; font-size: .86rem; }
nav a:hover, nav a:focus-visible { border-color: var(--accent); color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.2rem;
  margin-top: 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .8rem; margin-top: 1rem; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .7rem 1rem; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.figures.grids { grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); align-items: end; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.grids img { background: var(--paper); border-radius: 6px; margin: 0; }
figcaption { margin-bottom: .3rem; }
.scroll { overflow-x: auto; margin: .6rem -.2rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 400; position: sticky; left: 0; background: var(--card); }
thead th { font-weight: 600; color: var(--quiet); }
thead th:first-child { color: var(--quiet); }
tbody th.group { font-weight: 600; padding-top: .9rem; white-space: normal; }
tbody th.group span { font-weight: 400; color: var(--quiet); }
td.best { background: var(--best); font-weight: 600; }
tr.sum th, tr.sum td { font-weight: 600; }
tr:last-child > * { border-bottom: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: .7rem 1.6rem;
  margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
@media (max-width: 600px) { section { padding: .9rem .8rem; border-radius: 10px; } main { padding: 1rem .6rem 3rem; }
  th, td { padding: .3rem .45rem; } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""


def page(title: str, links: Iterable[tuple[str, str]], content: Iterable[str]) -> str:
    """A whole document; `links` are (anchor, text) of the bar that stays on top."""
    bar = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<nav><div>{bar}</div></nav>\n<main>\n"
        + "\n".join(part for part in content if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, *content: str) -> str:
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n' + "\n".join(content) + "\n</section>"


def paragraph(text: str, kind: str = "quiet") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def missing(text: str) -> str:
    return paragraph(text, "missing")


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Large numbers with a label below: (value, label)."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in values)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def figures(content: Sequence[str], kind: str = "") -> str:
    return f'<div class="{f"figures {kind}".strip()}">' + "".join(content) + "</div>"


def figure(png: bytes, alt: str, *, dark: bytes | None = None, width: int | None = None, caption: str = "") -> str:
    """An embedded picture, with a second one for dark pages where given; `width` in CSS pixels."""
    source = f'<source srcset="{_data(dark)}" media="(prefers-color-scheme: dark)">' if dark else ""
    size = f' width="{width}"' if width else ""
    picture = f'<picture>{source}<img src="{_data(png)}" alt="{escape(alt)}"{size}></picture>'
    return f"<figure>{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}{picture}</figure>"


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(cells: Sequence[str], *, best: Sequence[bool] = (), kind: str = "") -> str:
    """A line of a table: its name, then values; `best` marks values."""
    marks = list(best) or [False] * (len(cells) - 1)
    values = "".join(
        f'<td class="best">{escape(text)}</td>' if mark else f"<td>{escape(text)}</td>"
        for text, mark in zip(cells[1:], marks, strict=True)
    )
    return f"<tr{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}><th>{escape(cells[0])}</th>{values}</tr>"


def group(title: str, remark: str, columns: int) -> str:
    """A heading inside a table."""
    return f'<tr><th class="group" colspan="{columns}">{escape(title)} <span>{escape(remark)}</span></th></tr>'


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
