"""How the results of verify are printed: a row for each group of cases, or groups against backends."""

from __future__ import annotations

from .runner import FAIL, GAP, PASS, SKIP, Result

__all__ = ["print_groups", "print_table", "summary"]


def _group(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]


def print_table(results: list[Result], *, wide: bool) -> None:
    """Print a row for each group of cases, or for each case; what failed always has its own."""
    header = f"{'case':52} {'backend':9} {'dtype':9} {'error':>9} {'allowed':>9} {'steps':>5}  verdict"
    print(header + "\n" + "-" * len(header))
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        if wide or r.verdict in (FAIL, GAP):
            _print_row(r.case, r)
        else:
            groups.setdefault((_group(r.case), r.backend, r.dtype), []).append(r)
    for (name, _, _), rows in groups.items():
        ran = [r for r in rows if r.verdict == PASS]
        if not ran:
            continue
        worst = max(ran, key=lambda r: r.error / r.tolerance if r.tolerance else 0.0)
        steps = [r.steps for r in ran if r.steps is not None]
        _print_row(f"{name} ({len(ran)})", worst._replace(steps=max(steps) if steps else None))


def _print_row(name: str, r: Result) -> None:
    error = "equal" if r.error == 0 else f"{r.error:.1e}"
    allowed = "-" if r.tolerance == 0 else f"{r.tolerance:.1e}"
    steps = "" if r.steps is None else str(r.steps)
    more = f"  {r.detail}" if r.detail else ""
    print(f"{name:52} {r.backend:9} {r.dtype:9} {error:>9} {allowed:>9} {steps:>5}  {r.verdict}{more}")


def summary(results: list[Result], wanted: list[str], absent: dict[str, str], seconds: float) -> str:
    """Return a line for each backend that was asked for, and one for all."""
    lines = [""]
    for name in wanted:
        if name in absent:
            lines.append(f"{name:9} absent: {absent[name]}")
            continue
        mine = [r for r in results if r.backend == name]
        counts = {v: sum(r.verdict == v for r in mine) for v in (PASS, FAIL, GAP, SKIP)}
        ran = len(mine) - counts[SKIP]
        text = f"{name:9} {counts[PASS]} of {ran} cases pass in {sum(r.seconds for r in mine):.1f} s"
        text += f", {counts[FAIL]} fail" if counts[FAIL] else ""
        text += f", {counts[GAP]} known gaps" if counts[GAP] else ""
        text += f"; {counts[SKIP]} left to --full, for the time that compiling takes" if counts[SKIP] else ""
        lines.append(text)
    failed = sum(r.verdict == FAIL for r in results)
    end = "nothing was run" if not results else f"{failed} FAILED" if failed else "all pass"
    return "\n".join([*lines, f"{end} ({seconds:.0f} s)"])


def print_groups(results: list[Result], wanted: list[str]) -> None:
    """Print a Markdown table: for each group and backend how many cases passed, and the worst error over its tolerance.

    Errors of cases that allow none are zero where they pass, and do not count.
    """
    names = [name for name in wanted if any(r.backend == name for r in results)]
    heads = list(dict.fromkeys(r.case.split("/")[0] for r in results))
    print("| cases | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for head in [*heads, ""]:
        cells = []
        for name in names:
            ran = [r for r in results if r.backend == name and r.verdict != SKIP and r.case.startswith(head)]
            ran = ran if not head else [r for r in ran if r.case.split("/")[0] == head]
            passed = [r for r in ran if r.verdict == PASS]
            worst = max((r.error / r.tolerance for r in passed if r.tolerance), default=0.0)
            count = f"{len(passed)}" if len(passed) == len(ran) else f"{len(passed)} of {len(ran)}"
            cells.append(f"{count}, {worst:.0e}" if worst else count if ran else "")
        print(f"| {head or 'all'} | " + " | ".join(cells) + " |")
