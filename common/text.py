"""Numbers, names and small tables as text, for the screen and for documents."""

import codecs
import os
from pathlib import Path
from typing import Any

PLAIN = {"█": "#", "–": "-", "±": "+/-", "×": "x", "✓": "v"}  # for terminals and files without them


def spaced(name: str) -> str:
    """A readable class name: aquarium_fish -> aquarium fish."""
    return name.replace("_", " ")


def flops_text(flops: float) -> str:
    """1.9e14, not 1.9e+14."""
    return f"{flops:.1e}".replace("e+", "e")


def machine_text(machine: dict[str, Any], precision: str) -> str:
    """Processor, threads and speed, from the `machine` of a result.json."""
    return machines_text([machine], precision)


def machines_text(machines: list[dict[str, Any]], precision: str) -> str:
    """Processor, threads and speed of several machines; those that differ only in speed share one text."""
    speeds: dict[str, list[int]] = {}
    for machine in machines:
        name = f"{machine['processor']}, {machine['threads']} threads, {precision}"
        speeds.setdefault(name, []).append(round(machine[f"conv3x3_{precision}_gflops"]))
    ranges = {name: " to ".join(map(str, sorted({min(found), max(found)}))) for name, found in speeds.items()}
    return " or ".join(f"{name} ({speed} GFLOP/s in one 3x3 convolution)" for name, speed in ranges.items())


def short_path(path: Path) -> str:
    """`path` relative to the current folder, where that is possible: on Windows, not from another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def printable(text: str) -> str:
    """`text` on one line: a file name may contain line breaks, terminal commands and bytes that are not text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def degrade(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of codecs: plain characters for those that a stream's encoding lacks, else escapes."""
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] in PLAIN:
        return PLAIN[error.object[error.start]], error.start + 1
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1  # the next one may have a plain character
    return codecs.backslashreplace_errors(error)


def overfit_table(losses: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the `losses` in an overfit.json, where null means not finite."""
    lines = ["| loss | first | last | lowest | images memorized | verdict |", "|---|---:|---:|---:|---:|---|"]
    for outcome in losses.values():
        values = (outcome[key] for key in ("first", "last", "lowest"))
        shown = " | ".join("not finite" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"| {outcome['title']} | {shown} | {outcome['memorized']} of {outcome['batch_size']} "
                     f"| {'PASS' if outcome['passed'] else 'FAIL'} |")
    return "\n".join(lines)
