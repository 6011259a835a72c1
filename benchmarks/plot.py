"""Pictures of benchmark results, drawn from the CSV alone."""

from __future__ import annotations

import csv
from pathlib import Path

from fastseq._files import atomic_write

__all__ = ["read_results", "speedups"]

COLOURS = {"train": "#2a6f97", "inf": "#e07a2f"}
WORDS = {"train": "training (forward + backward)", "inf": "inference"}


def read_results(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What a results file says of the machine, and its rows."""
    lines = path.read_text().splitlines()
    comments = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {key: value for key, _, value in comments}, list(rows)


def _name(row: dict[str, str]) -> tuple[str, ...]:
    return row["cell"], row["group"], row["variant"], row["T"], row["B"], row["I"], row["H"]


def speedups(results: Path, picture: Path, title: str) -> None:
    """Draw the baseline's time over ours: a bar a mode, a tick at its target, cell by cell.

    Args:
        results: CSV with the columns cell, group, variant, T, B, I, H, mode, status, ratio, target.
        picture: the file to write; its suffix gives the format.
        title: what was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    about, rows = read_results(results)
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    names = {c: list(dict.fromkeys(_name(r) for r in rows if r["cell"] == c)) for c in cells}
    counts = [len(names[cell]) for cell in cells]
    figure = Figure(
        figsize=(8.5, 1.8 + 0.3 * sum(counts) + 0.4 * len(cells)), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(cells), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
    )[:, 0]
    values = [float(r[key]) for r in rows for key in ("ratio", "target") if r[key]]
    longest = max([1.0, *values])
    for axes, cell in zip(panels, cells, strict=True):
        for row in (r for r in rows if r["cell"] == cell):
            _bar(axes, row, names[cell].index(_name(row)))
        axes.axvline(1, color="gray", ls="--", lw=1)
        labels = [f"{v or g}: {', '.join(sizes)}" for _, g, v, *sizes in names[cell]]
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.set_xlim(0.5, longest * 1.4)
        axes.set_title(cell, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for mode in COLOURS:
        axes.barh(0, 0, color=COLOURS[mode], label=WORDS[mode])
    axes.plot([], [], color="black", lw=2, label="target")
    axes.plot([], [], color="gray", ls="--", lw=1, label="as fast as the baseline")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    axes.set_xlabel(
        "baseline's time over fastseq's (median of rounds); rows: group or variant: T, B, I, H"
    )
    facts = [about.get("cpu", ""), f"{about.get('threads')} threads", about.get("isa", "")]
    facts.append(f"torch {about.get('torch')}")
    figure.suptitle(f"{title}\n{', '.join(facts)}", fontsize=9)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary)


def _bar(axes: object, row: dict[str, str], place: int) -> None:
    height = 0.8 / len(COLOURS)
    y = place + (list(COLOURS).index(row["mode"]) - (len(COLOURS) - 1) / 2) * height
    if row["target"]:
        target = float(row["target"])
        axes.plot([target] * 2, [y - height / 2, y + height / 2], color="black", lw=2, zorder=3)
    if row["status"] != "ok":
        axes.text(0.55, y, "wrong", va="center", color="red", fontsize=6)
        return
    ratio = float(row["ratio"])
    axes.barh(y, ratio, height * 0.92, color=COLOURS[row["mode"]])
    # Beyond the tick too, so that it crosses no number.
    end = max(ratio, float(row["target"] or 0))
    axes.text(end * 1.07, y, f"{ratio:.2f}", va="center", fontsize=5.5)
