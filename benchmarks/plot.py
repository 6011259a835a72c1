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


def speedups(results: Path, picture: Path, title: str) -> None:
    """Draw torch's time over ours for each size: a bar a mode, a tick at its target.

    Args:
        results: CSV with the columns T, B, I, H, mode, status, ratio, target.
        picture: the file to write; its suffix gives the format.
        title: what was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    about, rows = read_results(results)
    sizes = list(dict.fromkeys((r["T"], r["B"], r["I"], r["H"]) for r in rows))
    modes = [mode for mode in COLOURS if any(r["mode"] == mode for r in rows)]
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(sizes)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / len(modes)
    longest = max([float(r["ratio"] or 0) for r in rows] + [float(r["target"]) for r in rows])
    for row in rows:
        mode = row["mode"]
        size = (row["T"], row["B"], row["I"], row["H"])
        y = sizes.index(size) + (modes.index(mode) - (len(modes) - 1) / 2) * height
        target = float(row["target"])
        axes.plot([target] * 2, [y - height / 2, y + height / 2], color="black", lw=2, zorder=3)
        if row["status"] != "ok":
            axes.text(0.05, y, "wrong", va="center", color="red", fontsize=8)
            continue
        ratio = float(row["ratio"])
        axes.barh(y, ratio, height * 0.92, color=COLOURS[mode])
        # Inside the bar, where no tick can be taken for what the number belongs to.
        inside = ratio > 0.08 * longest
        axes.text(
            ratio + (-0.01 if inside else 0.01) * longest,
            y,
            f"{ratio:.2f}",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=8,
        )
    axes.axvline(1, color="gray", ls="--", lw=1)
    for mode in modes:
        axes.barh(0, 0, color=COLOURS[mode], label=WORDS[mode])
    axes.plot([], [], color="black", lw=2, label="target")
    axes.plot([], [], color="gray", ls="--", lw=1, label="as fast as torch")
    figure.legend(loc="outside lower center", ncols=2 + len(modes), frameon=False, fontsize=8)
    axes.set_yticks(range(len(sizes)), [", ".join(size) for size in sizes])
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.1)
    axes.set_ylabel("T, B, I, H")
    axes.set_xlabel("times as fast as torch.nn.LSTM (median)")
    axes.spines[["top", "right"]].set_visible(False)
    facts = [about.get("cpu", ""), f"{about.get('threads')} threads", about.get("isa", "")]
    axes.set_title(f"{title}, float32\n", fontsize=11)
    axes.text(
        0.5,
        1.02,
        ", ".join([*facts, f"torch {about.get('torch')}"]),
        transform=axes.transAxes,
        ha="center",
        fontsize=7,
        color="gray",
    )
    with atomic_write(picture) as temporary:
        figure.savefig(temporary)
