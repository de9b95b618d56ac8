"""Figures without pyplot, so that nobody's backend or settings change."""
import contextlib
import io
import os
import pathlib
import textwrap

# matplotlib cannot be imported if a notebook's MPLBACKEND is not installed.
chosen = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402
import matplotlib.figure  # noqa: E402
import numpy as np  # noqa: E402

from .rundir import write_atomically, write_json  # noqa: E402
from .statistics import BOUNDS, nan_to_none  # noqa: E402

if chosen:
    os.environ["MPLBACKEND"] = chosen
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = chosen

# Okabe and Ito's colours, for colour-blind readers
BLACK, BLUE, SKY, ORANGE = "#000000", "#0072B2", "#56B4E9", "#E69F00"
RED, GREEN, PINK = "#D55E00", "#009E73", "#CC79A7"
RC_PARAMS = {
    "font.size": 8, "axes.titlesize": 7, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False,
    "pdf.fonttype": 42, "legend.frameon": False}


def subplots(count, columns=2, height=3.3, width=3.375, **options):
    """Returns a figure and its axes, each of these inches."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = matplotlib.figure.Figure((width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flat
    for axis in axes[count:]:
        axis.axis("off")
    return figure, list(axes[:count])


def plot_means(axis, x, bounds, style, n=3, bars=False, **options):
    """Draws means and 95% intervals, as a band or as bars; returns the numbers for JSON.

    Student's interval of two values is 13 times as wide as they are apart and would hide all else,
    so only intervals of more are drawn.

    Args:
        bounds: (5, points), from statistics.mean_ci.
        style: (colour, line style, marker).
        n: The number of values in each mean, one number or (points,).
    """
    (mean, low, high, *_), (colour, line, marker) = bounds, style
    low, high = (np.where(np.asarray(n) > 2, bound, np.nan) for bound in (low, high))
    if bars:
        axis.vlines(x, low, high, color=colour, lw=0.9)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    points = {"marker": marker, "ms": 3} if bars or len(x) == 1 else {}  # one point is no line
    axis.plot(x, mean, **{"ls": line, "color": colour, "lw": 1} | points | options)
    return {name: nan_to_none(values) for name, values in zip(BOUNDS, bounds)}


def mark_drops(axis, curves):
    """Limits an axis to what separates its curves, and marks how deep pruning took each of them.

    Marked is the deepest event that leaves the panel; marks in one place are stacked.

    Args:
        curves: [(values before each pruning event, else NaN, values after, colour)].
    """
    means = [np.array(after) for _, after, _ in curves]
    top = max(map(np.max, means))
    floor = min(np.percentile(mean[len(mean) // 4:], 15) for mean in means)
    floor -= 0.15 * (top - floor) or 1
    axis.set_ylim(floor, top + 0.1 * (top - floor))
    marks, drawn = [], []  # (x, depth, colour); (x, level), level 0 being the lowest
    for (before, _, colour), mean in zip(curves, means):
        drop = (before - mean) / (top - floor)
        below = np.flatnonzero((before >= floor) & (mean < floor) & (drop > 0.1))
        if len(below):
            deepest = below[mean[below].argmin()]
            marks.append((deepest + 1, mean[deepest], colour))
    for x, depth, colour in sorted(marks):
        near = {level for other, level in drawn if x - other < 0.12 * max(map(len, means))}
        level = min(set(range(len(near) + 1)) - near)
        drawn.append((x, level))
        axis.annotate(f"{depth:.0f}%", (x, floor), (0, 2 + 10 * level), color=colour, fontsize=7,
                      textcoords="offset points", ha="center",
                      bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8})


def legend_below(axis, title=None, columns=1):
    """Puts the legend, if there is one, below the axis and its label of any number of lines."""
    if not axis.get_legend_handles_labels()[0]:
        return
    lines = 1 + axis.get_xlabel().count("\n")
    axis.legend(title=title, title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0),
                borderaxespad=3 + 1.4 * lines, ncol=columns)


def legend_outside(figure, axes, name=str):
    """Puts one legend below all axes; `name` makes an entry of a label."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(name(label), handle)
    figure.legend(entries.values(), entries, loc="outside lower center",
                  ncol=max(2, int(figure.get_figwidth() / 1.9)))


def add_titles(figure, title, notes):
    """Writes a title above the panels, and notes (lines) below them."""
    width = int(13 * figure.get_figwidth())

    def wrapped(lines):  # a name in another encoding cannot be drawn
        text = "\n".join(textwrap.fill(line, width) for line in lines)
        return text.encode("utf-8", "backslashreplace").decode()

    figure.suptitle(wrapped(title.splitlines()), fontsize=8, parse_math=False)
    if notes and figure.legends:
        figure.legends[0].set_title(wrapped(notes), {"size": 7})
    elif notes:
        figure.supxlabel(wrapped(notes), fontsize=7, parse_math=False)


def save(figure, path, numbers):
    """Writes `path`.pdf, .png and .json."""
    for _ in range(2):  # the first layout can change tick labels
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # each file would repeat it
    for kind in ("pdf", "png"):
        content = io.BytesIO()  # on a full disk the PDF writer fails in its own ways
        metadata = {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(content, format=kind, dpi=200, metadata=metadata)
        write_atomically(pathlib.Path(f"{path}.{kind}"), content.getbuffer())
    write_json(pathlib.Path(f"{path}.json"), numbers)
