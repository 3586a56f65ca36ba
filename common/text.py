"""Numbers, names and small tables as text, for the screen and for documents."""

from typing import Any


def spaced(name: str) -> str:
    """A readable class name: aquarium_fish -> aquarium fish."""
    return name.replace("_", " ")


def flops_text(flops: float) -> str:
    """1.9e14, not 1.9e+14."""
    return f"{flops:.1e}".replace("e+", "e")


def machine_text(machine: dict[str, Any], precision: str) -> str:
    """Processor, threads and speed, from the `machine` of a result.json."""
    speed = machine[f"conv3x3_{precision}_gflops"]
    return (f"{machine['processor']}, {machine['threads']} threads, {precision} "
            f"({speed:.0f} GFLOP/s in one 3x3 convolution)")


def printable(text: str) -> str:
    """`text` on one line: a file name may contain line breaks, terminal commands and bytes that are not text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def overfit_table(losses: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the `losses` in an overfit.json, where null means not finite."""
    lines = ["| loss | first | last | lowest | images memorized | verdict |", "|---|---:|---:|---:|---:|---|"]
    for outcome in losses.values():
        values = (outcome[key] for key in ("first", "last", "lowest"))
        shown = " | ".join("not finite" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"| {outcome['title']} | {shown} | {outcome['memorized']} of {outcome['batch_size']} "
                     f"| {'PASS' if outcome['passed'] else 'FAIL'} |")
    return "\n".join(lines)
