"""What a run shows and records: a table at the start, a bar or lines, metrics.jsonl, curves.png.

metrics.jsonl has a row a line, `{"step": 20, "split": "train", "loss": 0.51, ..., "time": ...}`.
But for `time` it is a function of the config: nothing measured with a clock goes into it.
"""

import errno
import hashlib
import json
import os
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from bmft.errors import Mistake
from bmft.run import cannot_write, finite, warn, write_whole

LINE_WIDTH = 120  # of tables where the output is no terminal


class Log:
    """The log of one run; a context manager. With directory None (other processes) it is silent.

    options: the config's group `log`; total: steps of the run; console: a rich Console.
    Raises Mistake where a file cannot be written, or wandb is wanted and missing.
    """

    def __init__(self, directory, options, total, console=None):
        self.directory = directory
        self.total = total
        self._options = options
        self._console = console or _console()
        self._rows = self._board = self._wandb = self._bar = None

    def begin(self, step, evaluated):
        """Drop the rows beyond `step`, evaluations beyond `evaluated`, and open for what follows.

        The test split's rows go too, as it is evaluated at each end of a run.
        """
        if self.directory is None:
            return
        path = self.directory / "metrics.jsonl"
        _cut_back(path, step, evaluated)
        try:
            # Without a buffer a row is in the file once it is written.
            self._rows = open(path, "ab", buffering=0)  # noqa: SIM115, closed on leaving
        except OSError as error:
            raise cannot_write(path, error) from error
        if self._options.tensorboard:
            from tensorboardX import SummaryWriter  # 1 to 2 s to import

            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=step + 1)
        if self._options.wandb:
            self._wandb = _start_wandb(self.directory)
        if self._options.progress and self._console.is_terminal:
            self._start_bar(step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._bar is not None:
            self._bar.stop()
        for destination in (self._rows, self._board):
            if destination is not None:
                destination.close()
        if self._wandb is not None:
            self._wandb.finish()

    def row(self, step, split, values, pace=""):
        """Record `values`, {name: float}, of a split; pace: what the line shows beside them."""
        if self.directory is None:
            return
        values = finite(values)
        row = {"step": step, "split": split, **values, "time": round(time.time(), 3)}
        line = json.dumps(row).encode() + b"\n"
        try:
            if self._rows.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self._rows.name, error) from error
        numbers = {f"{split}/{name}": value for name, value in values.items() if value is not None}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._bar is None or split != "train":
            shown = "  ".join(f"{name} {_number(value)}" for name, value in values.items())
            parts = (f"step {step}/{self.total}", split, shown, pace)
            self.say("  ".join(part for part in parts if part))

    def tick(self, step, loss, pace):
        """Move the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=_number(loss), pace=pace)

    def say(self, text):
        """Print a line, above the bar."""
        if self.directory is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def draw_curves(self):
        """Draw what metrics.jsonl holds as curves.png."""
        if self.directory is not None:
            draw_curves(self.directory / "metrics.jsonl", self.directory / "curves.png")

    def _start_bar(self, step):
        texts = ("{task.completed}/{task.total}", "loss {task.fields[loss]}", "{task.fields[pace]}")
        columns = [TextColumn(text) for text in texts]
        self._bar = Progress(columns[0], BarColumn(), *columns[1:], console=self._console)
        self._task = self._bar.add_task("", total=self.total, completed=step, loss="", pace="")
        self._bar.start()


def show_leaves(rows, console=None):
    """Print the start table, and what share of all numbers moves.

    rows: (path, shape, dtype, status, rule, count) with status `moved`, `added`, `measured`
    (running statistics), `quantized` or `frozen total`; shares are those of the sum of all counts.
    """
    console = console or _console()
    total = sum(row[-1] for row in rows)
    moving = sum(row[-1] for row in rows if row[3] not in ("frozen total", "quantized"))
    quantized = [row[-1] for row in rows if row[3] == "quantized"]
    table = Table(title_justify="left")
    for name in ("leaf", "shape", "dtype", "status", "rule"):
        table.add_column(name, overflow="fold")
    for name in ("numbers", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for path, shape, dtype, status, rule, count in rows:
        shape = " x ".join(map(str, shape)) if shape else ""
        if status == "frozen total":
            table.add_section()
        cells = (path, shape, dtype, status, rule, f"{count:,}", f"{count / total:.3%}")
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    console.print(table, markup=False)
    console.print(f"{moving:,} of {total:,} numbers move ({moving / total:.3%})", highlight=False)
    if quantized:
        kernels = f"{sum(quantized):,} numbers of {len(quantized)} stacks of kernels"
        console.print(f"{kernels} are quantized ({sum(quantized) / total:.3%})", highlight=False)


def show_table(columns, rows, console=None):
    """Print rows of texts under the names of their columns; long ones are folded."""
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    (console or _console()).print(table, markup=False)


def draw_curves(metrics, picture):
    """Draw metrics.jsonl (a path) as a PNG: losses on the left, evaluation metrics on the right."""
    from matplotlib.figure import Figure  # 1 s to import

    curves = {"loss": {}, "metrics": {}}
    for row in read_rows(metrics):
        for name, value in row.items():
            if name in ("step", "split", "time") or value is None:
                continue
            if name == "loss" or row["split"] != "train":
                label = f"{row['split']} {name}"
                panel = curves["loss" if name == "loss" else "metrics"]
                panel.setdefault(label, []).append((row["step"], value))
    panels = {name: panel for name, panel in curves.items() if panel}
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 4), layout="constrained", dpi=120)
    for place, (name, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place, xlabel="step", title=name)
        for label, points in panel.items():
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else "." if len(points) < 30 else None
            axes.plot(steps, values, label=label, marker=marker)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
    unfinished = picture.with_name("." + picture.name)
    try:
        figure.savefig(unfinished)
        os.replace(unfinished, picture)
    except OSError as error:
        raise cannot_write(picture, error) from error


def _console():
    console = Console()
    return console if console.is_terminal else Console(width=LINE_WIDTH)


def _number(value):
    return "nan" if value is None else f"{value:.4g}"


def read_rows(path):
    """The rows of a metrics.jsonl, without a line that was torn when a process was killed."""
    return [row for _, row in _read_lines(path)]


def _read_lines(path):
    """[(line, row)] of the lines that are whole."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from error
    whole = []
    for number, line in enumerate(lines, 1):
        try:
            whole.append((line, json.loads(line)))
        except json.JSONDecodeError:
            if number < len(lines):  # only the last can be torn
                warn(f"{path}:{number} is no JSON and is left out")
    return whole


def _cut_back(path, step, evaluated):
    lines = _read_lines(path)
    kept = [
        line
        for line, row in lines
        if row["step"] <= (step if row["split"] == "train" else evaluated)
        and not row["split"].startswith("test")
    ]
    content = "".join(f"{line}\n" for line in kept)
    if path.exists() and path.read_bytes() != content.encode():
        write_whole(path, content)


def _start_wandb(directory):
    """A wandb run that a continued run continues."""
    try:
        import wandb
    except ImportError:
        raise Mistake("log.wandb needs the package 'wandb': pip install wandb") from None
    digest = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:12]
    return wandb.init(
        project="bmft", name=directory.name, dir=str(directory), id=digest, resume="allow"
    )
