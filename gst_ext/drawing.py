"""Canvases, bands, legends and files of figures, without pyplot: nobody's backend or settings change."""
import contextlib
import os

chosen = os.environ.pop("MPLBACKEND", None)  # every notebook exports its own; where that is not installed, this fails:
import matplotlib  # noqa: E402
import matplotlib.figure  # noqa: E402
import numpy as np  # noqa: E402

from . import files  # noqa: E402
from .statistics import BOUNDS, floats  # noqa: E402

if chosen:
    os.environ["MPLBACKEND"] = chosen
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = chosen

LOOK = {"font.size": 8, "axes.titlesize": 7, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42, "legend.frameon": False}


def panels(count, columns=2, height=3.3, width=3.375, **more):
    """A canvas of `count` panels of these inches in so many columns: (canvas, [axis …])."""
    columns = min(count, columns)
    rows = -(-count // columns)
    canvas = matplotlib.figure.Figure((width * columns, height * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False, **more).flat
    for axis in axes[count:]:
        axis.axis("off")
    return canvas, list(axes[:count])


def table(rows):
    """A canvas of a table, rows a list of dicts with the same keys, which are its head."""
    canvas, (axis,) = panels(1, height=0.35 + 0.22 * (len(rows) + 1), width=6.75)
    axis.axis("off")
    cells = [list(row.values()) for row in rows]
    drawn = axis.table(cells, colLabels=list(rows[0]), loc="upper center", cellLoc="center")  # below the title
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(7)
    drawn.auto_set_column_width(list(range(len(rows[0]))))
    for (row, _), cell in drawn.get_celld().items():
        cell.visible_edges = "B" if row == 0 else ""
    return canvas


def means(axis, x, bounds, look, n=3, bars=False, **more):
    """Means and 95% intervals, bounds (5, points) as BOUNDS, as a band or bars; returns the numbers for a JSON.

    look: (colour, line style, marker); n: of how many values, one number or (points,). Student's interval of two is
    13 times as wide as they lie apart, and would hide all else: it is in the numbers only.
    """
    (mean, low, high, *_), (colour, line, marker) = bounds, look
    low, high = (np.where(np.asarray(n) > 2, bound, np.nan) for bound in (low, high))
    if bars:
        axis.vlines(x, low, high, color=colour, lw=0.9)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    marked = {"marker": marker, "ms": 3} if bars or len(x) == 1 else {}  # one point is no line
    axis.plot(x, mean, **{"ls": line, "color": colour, "lw": 1} | marked | more)
    return {name: floats(values) for name, values in zip(BOUNDS, bounds)}


def mark_drops(axis, curves):
    """Limits an axis of curves, [(values, colour) …], to what separates them, and marks a drop below with its depth.

    Marks that would hide each other stand on top of each other.
    """
    means = [np.array(mean) for mean, _ in curves]
    top, floor = max(mean.max() for mean in means), min(np.percentile(mean[len(mean) // 4:], 15) for mean in means)
    floor -= 0.15 * (top - floor) or 1
    axis.set_ylim(floor, top + 0.1 * (top - floor))
    found, places = [], []  # (x, depth, colour); (x, how many texts lie below)
    for mean, colour in curves:
        under = [i for i in range(1, len(mean)) if mean[i] < floor <= mean[i - 1]]
        found += [(i + 1, mean[i], colour) for i in sorted(under, key=lambda i: mean[i])[:1]]
    for x, depth, colour in sorted(found):
        taken = {height for other, height in places if x - other < 0.12 * max(map(len, means))}
        places.append((x, min(set(range(len(taken) + 1)) - taken)))
        axis.annotate(f"{depth:.0f}%", (x, floor), (0, 2 + 10 * places[-1][1]), textcoords="offset points", ha="center",
                      fontsize=7, color=colour, bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8})


def legend_below(axis, columns=2, title=None):
    axis.legend(title=title, title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=columns)


def legend_outside(canvas, axes, name=str):
    """One legend for all axes, below them; name makes an entry of a label."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(name(label), handle)
    columns = int(canvas.get_figwidth() / 1.5)
    canvas.legend(entries.values(), entries, loc="outside lower center", ncol=columns)


def save(canvas, name, numbers):
    """Writes name.pdf, name.png and name.json (name a Path), each atomically; raises UserError where it cannot."""
    for _ in range(2):  # the first layout can change the ticks' labels, which the second makes room for
        canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # it is laid out now, and would be again for every file
    for kind in ("pdf", "png"):
        partial = name.with_name(f"{name.name}.partial.{kind}")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            canvas.savefig(partial, dpi=200, metadata={"CreationDate": None} if kind == "pdf" else None)
            partial.replace(name.with_name(f"{name.name}.{kind}"))
        except OSError as error:
            raise files.UserError(f"cannot write {name}.{kind} ({error.strerror}): make room or name another --fig-dir",
                                  1) from None
    files.write_json(name.with_name(f"{name.name}.json"), numbers)
