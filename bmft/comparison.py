"""What the runs of several methods on one task came to: a line each, a table, a picture.

    results.jsonl          a run a line, written when it ends; `FIELDS` says what it holds
    table.md, table.csv    a method a row, over its seeds, the best first
    plot.png               the metric against the numbers that move

The three others are made of results.jsonl alone, so there may be some of an unfinished comparison.
"""

import csv
import io
import json
import os
import statistics
from typing import NamedTuple

from bmft import processes
from bmft.log import read_rows
from bmft.run import cannot_write, finite, write_whole

FIELDS = {
    "method": "name of the entry",
    "seed": "of the run",
    "metrics": "{split: {name: value}}, of the state that a run exports",
    "value": "the one that is compared",
    "learning_rate": "the peak",
    "moving_parameters": "numbers that move, the task's head included",
    "total_parameters": "of the model with the method in it",
    "step_seconds": "median over the steps, compilation left out",
    "temporary_bytes": "that the compiled step asks for beside its arguments, a device",
    "checkpoint_bytes": "of an Orbax checkpoint on disk: what moves and the optimizer's state",
}


class Results:
    """The lines of a results.jsonl, {(method, seed): row}; `add` writes one."""

    def __init__(self, path):
        self.path = path
        self.rows = {}
        rows = read_rows(path)
        if rows and processes.index() == 0:  # without the line that a kill has torn
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self.rows[row["method"], row["seed"]] = row

    def add(self, row):
        """Write a run's line, whole, before anything else happens. Raises Mistake, KeyError."""
        if missing := [name for name in FIELDS if name not in row]:
            raise KeyError(f"a result needs {', '.join(missing)}")
        row = finite(row)
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.rows[row["method"], row["seed"]] = row


class Summary(NamedTuple):
    """A method over its seeds."""

    method: str
    seeds: int
    mean: float | None  # None: no run's value is finite
    spread: float | None  # standard deviation of a sample; None of fewer than two
    learning_rate: float
    moving: int
    share: float
    step_seconds: float | None
    temporary_bytes: int | None
    checkpoint_bytes: int


def summarise(rows, direction="max"):
    """The `Summary`s of the rows, the best mean first, as `direction` (max, min) says."""
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    found = [_summary(method, runs) for method, runs in by_method.items()]
    sign = -1 if direction == "max" else 1
    return sorted(found, key=lambda one: (one.mean is None, sign * (one.mean or 0.0), one.method))


def _summary(method, runs):
    values = [run["value"] for run in runs if run["value"] is not None]
    times = [run["step_seconds"] for run in runs if run["step_seconds"] is not None]
    first = runs[0]
    return Summary(
        method,
        len(runs),
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
        first["learning_rate"],
        first["moving_parameters"],
        first["moving_parameters"] / first["total_parameters"],
        statistics.median(times) if times else None,
        first["temporary_bytes"],
        round(statistics.fmean(run["checkpoint_bytes"] for run in runs)),
    )


def write(folder, rows, *, metric, direction, title):
    """table.md, table.csv and plot.png of the rows; metric: name of what is compared; title: what
    all runs have in common."""
    summaries = summarise(rows, direction)
    write_whole(folder / "table.csv", _csv(summaries, metric))
    write_whole(folder / "table.md", _markdown(summaries, metric, title))
    _draw(folder / "plot.png", summaries, metric, title)


def _csv(summaries, metric):
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = list(Summary._fields)
    names[names.index("mean")] = f"{metric.replace(' ', '_')}_mean"
    names[names.index("moving")] = "moving_parameters"
    table.writerow(names)
    table.writerows(summaries)  # None: an empty cell
    return text.getvalue()


NOTES = """
Spread: standard deviation over the seeds. Moving: numbers that move, the head included. Step:
median, compilation left out. Temporaries: of the compiled step, a device. Checkpoint: Orbax's
files on disk, of what moves and the optimizer's state.
"""


def _markdown(summaries, metric, title):
    names = (
        *("method", metric, "spread", "seeds", "moving", "share", "step, ms"),
        *("temporaries, MB", "checkpoint, MB", "learning rate"),
    )
    lines = [title, "", _line(names), _line(["---"] + ["---:"] * (len(names) - 1))]
    for one in summaries:
        cells = (
            one.method,
            _number(one.mean, ".4f"),
            _number(one.spread, ".4f"),
            str(one.seeds),
            f"{one.moving:,}",
            f"{one.share:.3%}",
            _number(one.step_seconds, ".0f", 1e3),
            _number(one.temporary_bytes, ".1f", 1e-6),
            _number(one.checkpoint_bytes, ".2f", 1e-6),
            f"{one.learning_rate:g}",
        )
        lines.append(_line(cells))
    return "\n".join(lines) + "\n" + NOTES


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _number(value, form, scale=1.0):
    return "" if value is None else format(value * scale, form)


# --- the picture -----------------------------------------------------------------------------


def _draw(picture, summaries, metric, title):
    """The mean of each method over the numbers it moves, with its spread and its name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 1 s to import
    from matplotlib.figure import Figure

    shown = [one for one in summaries if one.mean is not None]
    figure = Figure(figsize=(11, 7), dpi=120)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.93)
    axes = figure.add_subplot(xscale="log", xlabel="numbers that move", ylabel=metric)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if len({one.moving for one in shown}) == 1:  # a scale of one number has no width
        axes.set_xlim(shown[0].moving / 2, shown[0].moving * 2)
    axes.errorbar(
        [one.moving for one in shown],
        [one.mean for one in shown],
        yerr=[one.spread or 0.0 for one in shown],
        fmt="o", markersize=5, elinewidth=1, ecolor="0.75", zorder=3,
    )  # fmt: skip
    axes.margins(x=0.12, y=0.08)
    points = [(one.moving, one.mean) for one in shown]
    _label(figure, axes, [one.method for one in shown], points)
    unfinished = picture.with_name("." + picture.name)
    try:
        figure.savefig(unfinished)
        os.replace(unfinished, picture)
    except OSError as error:
        raise cannot_write(picture, error) from error


DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
DISTANCES = range(8, 200, 8)  # pixels from a point to its name


def _label(figure, axes, labels, points):
    """Write each label beside its point, as near as no other label or point is in the way; a thin
    line leads to those that had to go far."""
    if not points:
        return
    figure.draw_without_rendering()  # before, the axes have no limits
    renderer = figure.canvas.get_renderer()
    pixels = axes.transData.transform(points)
    frame = axes.get_window_extent(renderer).extents
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    to_points = 72.0 / figure.dpi
    for label, point, (x, y) in zip(labels, points, pixels, strict=True):
        text = axes.text(*point, label, fontsize=8)
        box = text.get_window_extent(renderer)
        text.remove()
        places = list(_places(x, y, box.width, box.height))
        free = (at for at in places if _inside(at, frame) and not any(_meet(at, b) for b in taken))
        chosen = next(free, places[0])
        taken.append(chosen)
        across, up = (chosen[0] + chosen[2]) / 2 - x, (chosen[1] + chosen[3]) / 2 - y
        far = max(abs(across) - box.width / 2, abs(up) - box.height / 2) > DISTANCES[0]
        axes.annotate(
            label, point, (across * to_points, up * to_points), textcoords="offset points",
            ha="center", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if far else None,
        )  # fmt: skip


def _places(x, y, width, height):
    """Boxes of that size around a point, the nearest first: (left, bottom, right, top)."""
    for distance in DISTANCES:
        for right, up in DIRECTIONS:
            left = x - width / 2 + right * (width / 2 + distance)
            low = y - height / 2 + up * (height / 2 + distance)
            yield left, low, left + width, low + height


def _inside(box, frame):
    return all(box[i] >= frame[i] and box[i + 2] <= frame[i + 2] for i in (0, 1))


def _meet(one, other):
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))
