"""Draw ``docs/run.svg``, the way of a run: python -m tests.made_pages"""

#: Colours of the light and the dark theme.
COLOURS = {
    "ground": ("#ffffff", "#0d1117"),
    "box": ("#f6f8fa", "#1b222c"),
    "line": ("#8c959f", "#656c76"),
    "text": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9ba3ad"),
    "mortal": ("#bc4c00", "#f0883e"),
    "disk": ("#ddf4ff", "#10263f"),
    "accent": ("#0969da", "#4493f8"),
}
STYLE = """
text { font: 14px system-ui, sans-serif; fill: var(--text); text-anchor: middle }
.small { font-size: 12px; fill: var(--quiet) }
.mortal { fill: none; stroke: var(--mortal); stroke-dasharray: 6 4 }
text.mortal { fill: var(--mortal); stroke: none; font-size: 12px }
.box { fill: var(--box); stroke: var(--line) }
.disk { fill: var(--disk); stroke: var(--accent) }
.way { fill: none; stroke: var(--line); stroke-width: 1.5; marker-end: url(#head) }
.head { fill: var(--line) }
.dot { fill: var(--accent) }
text.number { fill: var(--ground); font-size: 12px; font-weight: 600 }
"""
DESCRIPTION = (
    "A client sends a request to a server process, which checks it. The engine writes the run to the store and starts "
    "the agent. The agent calls models, tools and people, and each result is written to the store. The client gets the "
    "answer. If the process dies, the next one reads the store and continues."
)


def picture() -> str:
    """Return the picture as SVG, for light and dark pages."""
    light, dark = ("".join(f"--{name}: {pair[theme]}; " for name, pair in COLOURS.items()) for theme in (0, 1))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 410" role="img">',
        f"<title>The way of a run</title><desc>{DESCRIPTION}</desc>",
        f"<style>svg {{ {light}}}\n@media (prefers-color-scheme: dark) {{ svg {{ {dark}}} }}{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 Z"/></marker>',
        '<rect width="820" height="410" rx="10" fill="var(--ground)"/>',
        *_box(20, 58, 124, 156, "client", "curl, your app", kind="mortal"),
        '<rect class="mortal" x="206" y="24" width="396" height="224" rx="8"/>',
        '<text class="mortal" x="508" y="94">a server process</text>',
        *_box(226, 58, 154, 60, "checks", "key, size, inputs"),
        *_box(226, 154, 154, 60, "engine", "queue, slots, time"),
        *_box(432, 154, 154, 60, "agent", "code around its calls"),
        *_box(664, 74, 136, 60, "model", "a provider", kind="mortal"),
        *_box(664, 154, 136, 60, "tool", "a function, MCP", kind="mortal"),
        *_box(664, 234, 136, 60, "person", "approves, answers", kind="mortal"),
        *_store(226, 290, 360, 100),
        *_box(20, 306, 124, 68, "next process", "reads the store", kind="mortal"),
        '<text class="mortal" x="732" y="352">dashed: may go away</text>',
        '<text class="mortal" x="732" y="370">at any moment</text>',
        *_way(1, (182, 88), "M144 88 H224", "M303 118 V152"),
        *_way(2, (303, 266), "M303 214 V292"),
        *_way(3, (403, 184), "M380 184 H430"),
        *_way(4, (618, 184), "M586 184 H662", "M634 184 V104 H662", "M634 184 V264 H662"),
        *_way(5, (509, 266), "M509 214 V292"),
        *_way(6, (182, 184), "M226 184 H146"),
        *_way(7, (182, 340), "M226 340 H146"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _box(x: int, y: int, width: int, height: int, title: str, more: str, kind: str = "box") -> list[str]:
    middle = x + width // 2
    return [
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>',
        f'<text x="{middle}" y="{y + height // 2 - 3}">{title}</text>',
        f'<text class="small" x="{middle}" y="{y + height // 2 + 15}">{more}</text>',
    ]


def _store(x: int, y: int, width: int, height: int) -> list[str]:
    left, right, bottom, middle = x, x + width, y + height, x + width // 2
    rx, ry = width // 2, 14
    return [
        f'<path class="disk" d="M{left} {y + ry} V{bottom - ry} A{rx} {ry} 0 0 0 {right} {bottom - ry} V{y + ry}"/>',
        f'<ellipse class="disk" cx="{middle}" cy="{y + ry}" rx="{rx}" ry="{ry}"/>',
        f'<text x="{middle}" y="{y + 56}">the store, on disk</text>',
        f'<text class="small" x="{middle}" y="{y + 76}">runs · steps · calls, the journal of a step</text>',
    ]


def _way(number: int, at: tuple[int, int], *paths: str) -> list[str]:
    x, y = at
    return [
        *(f'<path class="way" d="{path}"/>' for path in paths),
        f'<circle class="dot" cx="{x}" cy="{y}" r="10"/>',
        f'<text class="number" x="{x}" y="{y + 4}">{number}</text>',
    ]
