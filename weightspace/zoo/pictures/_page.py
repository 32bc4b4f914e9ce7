"""The frame of a report: one page, its style, its tables."""

from __future__ import annotations

from collections.abc import Sequence

from weightspace.zoo.pictures._html import Html, element, joined

STYLE_SHEET = """
:root { color-scheme: light dark; --ink: #1a1b1d; --muted: #5f6670; --paper: #ffffff; --card: #f4f5f7;
  --line: #d8dbe0; --link: #1f62a5; --up: 76, 139, 196; --down: 232, 131, 58; --other: 138, 143, 152; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --muted: #9aa2ad; --paper: #15171a; --card: #1e2125; --line: #363b42; --link: #8bbcf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .7rem; max-width: 75rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .86em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; margin: 0;
  overflow: auto; max-height: 32rem; }
figure { margin: .8rem 0 1.2rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .88rem; margin-top: .3rem; max-width: 75rem; }
.table { overflow: auto; max-height: 36rem; margin: .4rem 0 1rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .65rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
td:has(code) { white-space: normal; }
th.text { text-align: left; }
td:has(code) { text-align: left; min-width: 18rem; overflow-wrap: anywhere; }
.shade { display: block; margin: 0 -.4rem; padding: 0 .4rem; border-radius: 4px; }
.positive { background: color-mix(in srgb, rgb(var(--up)) calc(var(--share) * .7), transparent); }
.negative { background: color-mix(in srgb, rgb(var(--down)) calc(var(--share) * .7), transparent); }
.named { background: color-mix(in srgb, rgb(var(--other)) calc(var(--share) * .7), transparent); }
@media print {
  :root { --ink: #000; --muted: #444; --paper: #fff; --card: #f4f5f7; --line: #bbb; --link: #000; color-scheme: light; }
  main { max-width: none; padding: 0; } nav { display: none; }
  pre, .table { max-height: none; overflow: visible; } pre { white-space: pre-wrap; }
  table { font-size: 7.5pt; } th, td { white-space: normal; padding: .2rem .35rem; } td:has(code) { min-width: 0; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } th { position: static; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table whose cells are escaped, but for those that are elements.

    Example:
        >>> table(["name"], [["a < b"]])[-55:]
        '<tbody><tr><td>a &lt; b</td></tr></tbody></table></div>'
    """
    top = element(
        "thead",
        element(
            "tr", *(element("th", cell, class_="text" if cell == "architecture" else None) for cell in head)
        ),
    )
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", top, element("tbody", *body)), class_="table")


def page(title: str, lead: Html, sections: Sequence[tuple[str, Html]]) -> str:
    """A whole document; every section has a heading and is linked from the top."""
    names = [f"section-{number}" for number in range(1, len(sections) + 1)]
    links = [
        element("a", heading, href=f"#{name}") for name, (heading, _) in zip(names, sections, strict=True)
    ]
    parts = [
        element("section", element("h2", heading), body, id=name)
        for name, (heading, body) in zip(names, sections, strict=True)
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        Html(f"<style>{STYLE_SHEET}</style>"),
    )
    body = element(
        "body", element("main", element("h1", title), lead, element("nav", *links), joined(*parts))
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'
