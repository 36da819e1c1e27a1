"""Draw the figure of the method, ``python docs/method_figure.py``: one pool of gradients, chosen from by `ftw` itself.

Each dot is the gradient of one candidate in two dimensions. The picture is made of what the library returns; it
follows the reader's colour scheme.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ftw

PLACE = Path(__file__).parent / "_static" / "method.svg"
WIDTH, HEIGHT, SIDE, TOP, BELOW = 960, 356, 300, 52, 40
KEEP = 4
STYLE = (
    "text{font:14px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--ink)}"
    ".head{font-weight:650;font-size:16px}.soft{fill:var(--soft);font-size:13px}"
    "svg{--card:#fff;--ink:#16202c;--soft:#5a6776;--line:#d8dee6;--dot:#a9b3bf;--pick:#0d8a7b;--goal:#d0702a}"
    "@media(prefers-color-scheme:dark){svg{--card:#161d26;--ink:#e6ebf0;--soft:#a3afbc;--line:#3a4653;--dot:#5f6d7c;"
    "--pick:#34c9b5;--goal:#ee9a5a}}"
)


def gradients() -> tuple[np.ndarray, np.ndarray]:
    """Return candidates (n, 2) and the target's gradient (2,)."""
    rng = np.random.default_rng(3)
    twins = np.array([2.3, 1.75]) + 0.1 * rng.normal(size=(6, 2))  # the best scores, and all the same
    others = np.array([1.75, -1.0]) + 0.28 * rng.normal(size=(6, 2))
    harmful = np.array([-1.2, -0.4]) + 0.4 * rng.normal(size=(8, 2))
    useless = 0.35 * rng.normal(size=(8, 2)) + np.array([0.0, 0.9])
    return np.concatenate([twins, others, harmful, useless]), np.array([2.6, 0.35])


def choices() -> list[tuple[str, list[int], list[float], float]]:
    """Return (name, indices, weights, match) of the top scores and of Filter-then-Weight."""
    G, target = gradients()
    problem = {"w": ftw.Dense(G)}, {"w": target}, {"w": ftw.Scale(1.0)}
    found = []
    for name, options in (
        ("The top scores agree", {"filter": "top_k", "weight": "uniform"}),
        ("Filter, then weight", {}),
    ):
        s = ftw.filter_then_weight(*problem, keep=KEEP, guard=0.0, **options)
        found.append((name, s.indices.tolist(), s.weights.tolist(), float(s.match)))
    return found


def point(g: np.ndarray, left: float) -> tuple[float, float]:
    """Return where a gradient (2,) is drawn in the panel at ``left``."""
    return left + 112 + 48 * float(g[0]), TOP + 120 - 46 * float(g[1])


def arrow(g: np.ndarray, left: float, colour: str, width: float) -> str:
    """Return an arrow from the origin to a gradient (2,)."""
    (x0, y0), (x1, y1) = point(np.zeros(2), left), point(g, left)
    along = np.array([x1 - x0, y1 - y0]) / np.hypot(x1 - x0, y1 - y0)
    across = np.array([-along[1], along[0]])
    base = np.array([x1, y1]) - 11 * along
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x1, y1), base + 5.5 * across, base - 5.5 * across))
    line = f'<path d="M{x0:.1f} {y0:.1f}L{base[0]:.1f} {base[1]:.1f}" stroke="var(--{colour})" stroke-width="{width}"/>'
    return f'{line}<polygon points="{head}" fill="var(--{colour})"/>'


def panel(left: float, title: str, words: list[str], indices: list[int], weights: list[float]) -> str:
    """Return one panel: all candidates, those that are picked larger by their weight, and the arrows."""
    G, target = gradients()
    x, y = point(np.zeros(2), left)
    out = [f'<text class="head" x="{left}" y="28">{title}</text>']
    out.append(f'<path d="M{left} {y}H{left + SIDE - 12}M{x} {TOP}V{TOP + 236}" stroke="var(--line)"/>')
    for i, g in enumerate(G):
        a, b = point(g, left)
        picked = i in indices
        size = 4.0 + 14 * weights[indices.index(i)] if picked else 4.0
        colour = "pick" if picked else "dot"
        out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{size:.1f}" fill="var(--{colour})" fill-opacity=".8"/>')
    if indices:
        update = sum(w * G[i] for i, w in zip(indices, weights, strict=True))
        out.append(arrow(update, left, "pick", 3.5))
    out.append(arrow(target, left, "goal", 3.5))
    for place, line in enumerate(words):
        out.append(f'<text class="soft" x="{left}" y="{HEIGHT - BELOW - 2 + 19 * place}">{line}</text>')
    return "".join(out)


def figure() -> str:
    """Return the figure as SVG."""
    G, _ = gradients()
    top, ours = choices()
    words = (
        [f"{len(G)} candidates&#8217; gradients (dots), as", "the optimizer sees them; the target&#8217;s (arrow)"],
        [f"{KEEP} of {len(G)}, equal weights: the cosine of the", f"update with the target&#8217;s is {top[3]:.2f}"],
        ["each pick matches what is still unmatched,", f"then a QP weighs them: cosine {ours[3]:.2f}"],
    )
    panels = [
        panel(28, "A pool, and a target", words[0], [], []),
        panel(28 + 312, top[0], words[1], *top[1:3]),
        panel(28 + 624, ours[0], words[2], *ours[1:3]),
    ]
    title = (
        "A pool of gradients and the target's; the top scores; picks with weights whose sum is the target's direction"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" fill="none">'
        f"<title>{title}</title><style>{STYLE}</style>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="var(--card)"/>{"".join(panels)}</svg>\n'
    )


if __name__ == "__main__":
    PLACE.write_text(figure(), encoding="utf-8")
    for _, indices, weights, match in choices():
        print(indices, [round(w, 3) for w in weights], round(match, 4))
