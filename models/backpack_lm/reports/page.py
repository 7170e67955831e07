"""The frame of every page: one HTML file with its style in it, that needs no server and no network."""

from __future__ import annotations

from html import escape

from backpack_lm.visible import visible

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #626b7a; --line: #e3e6eb;
  --ground: #fbfbfa; --card: #fff; --for: #0b7a6f; --against: #b4432f; --accent: #3556a8; --shade: 15, 130, 118;
  --shade-against: 190, 70, 48; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #97a1b0; --line: #2c333e; --ground: #14181e;
  --card: #1b2129; --for: #4fc3b5; --against: #ee8b74; --accent: #8fabf0; --shade: 60, 180, 165;
  --shade-against: 230, 120, 95; }
  figure { background: #fff; border-radius: 8px; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem 5rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .4rem; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
.lead { font-size: 1.1rem; color: var(--soft); max-width: 52rem; margin: 0 0 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: .92rem; }
th, td { text-align: left; padding: .42rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; padding: .5rem; overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
.notes { color: var(--soft); font-size: .92rem; margin-top: 2rem; padding-left: 1.1rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .85rem; }
code, .token { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .92em; }
.for { color: var(--for); } .against { color: var(--against); }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole document. `body`, `style` and `script` are markup of ours, with what came from outside escaped.

    What would reorder the text or hide in it is shown; in the data of a script that is up to who writes them.
    """
    title, body = visible(title), visible(body)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body><h1>{escape(title)}</h1>{body}"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )
