"""What a run shows and records."""

import io
import json
import struct
import sys
import types

import pytest
from matplotlib.image import imread
from ml_collections import FrozenConfigDict
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from bmft.errors import Mistake
from bmft.log import Log, draw_curves, show_leaves

LEAVES = [
    ("params/classifier/kernel", (384, 3), "float32", "added", "head", 1152),
    ("params/classifier/bias", (3,), "float32", "added", "head", 3),
    ("peft/layers/attention/query/lora_a", (6, 384, 8), "float32", "added", "lora", 18432),
    ("params/layers/output/bias", (6, 384), "float32", "moved", "bitfit", 2304),
    ("everything else", None, "bfloat16", "frozen total", None, 22_713_216),
]


def options(**values):
    return FrozenConfigDict({"tensorboard": False, "wandb": False, "progress": True} | values)


def console(terminal=False, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def written(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl


def test_rows_are_lines_at_once(tmp_path):
    shown = console()
    with Log(tmp_path, options(), 300, shown) as log:
        log.begin(0, 0)
        log.row(10, "train", {"loss": 0.69314, "grad_norm": 2.0}, "85 examples/s  1:20 left")
        assert len(written(tmp_path)) == 1
        log.row(10, "validation", {"accuracy": 0.5, "f1": float("nan")})
    first, second = written(tmp_path)
    assert list(first) == ["step", "split", "loss", "grad_norm", "time"]
    assert first["loss"] == 0.69314
    assert second["f1"] is None
    assert shown.file.getvalue().splitlines() == [
        "step 10/300  train  loss 0.6931  grad_norm 2  85 examples/s  1:20 left",
        "step 10/300  validation  accuracy 0.5  f1 nan",
    ]


def test_what_lies_beyond_the_restored_step_is_cut(tmp_path, capsys):
    rows = [
        {"step": 10, "split": "train", "loss": 1.0},
        {"step": 10, "split": "validation", "loss": 1.0},
        {"step": 20, "split": "train", "loss": 0.5},
        {"step": 20, "split": "validation", "loss": 0.5},
        {"step": 10, "split": "test", "loss": 0.5},
        {"step": 30, "split": "train", "loss": 0.2},
    ]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "metrics.jsonl"

    def cut(step, evaluated, tail=""):
        path.write_text("".join(f"{line}\n" for line in lines) + tail)
        with Log(tmp_path, options(), 300, console()) as log:
            log.begin(step, evaluated)
        return path.read_text().splitlines()

    assert cut(20, 20) == lines[:4]
    assert cut(20, 10) == lines[:3]  # saved by SIGTERM before its evaluation
    assert cut(20, 20, '{"step": 30, "sp') == lines[:4]
    assert cut(0, 0) == []
    assert cut(30, 20, '{"step": 40, "split": "validation"}\n') == lines[:4] + lines[5:]
    assert capsys.readouterr().err == ""
    lines.insert(1, "garbage")
    assert cut(20, 20) == [lines[0], *lines[2:5]]
    assert capsys.readouterr().err == f"warning: {path}:2 is no JSON and is left out\n"


def test_a_row_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Log(tmp_path, options(), 300, console()) as log:
        log._rows = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, the log closes it
        with pytest.raises(Mistake, match="cannot write /dev/full: No space left on device"):
            log.row(10, "train", {"loss": 1.0})


def test_a_log_that_cannot_be_opened(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with (
        Log(tmp_path, options(), 300) as log,
        pytest.raises(Mistake, match=r"metrics\.jsonl: Is a"),
    ):
        log.begin(0, 0)


def test_other_processes_are_silent(tmp_path):
    shown = console(terminal=True)
    with Log(None, options(tensorboard=True), 300, shown) as log:
        log.begin(0, 0)
        log.tick(10, 0.5, "")
        log.row(10, "train", {"loss": 1.0})
        log.say("hello")
        log.draw_curves()
    assert shown.file.getvalue() == ""


# The terminal


def test_bar(tmp_path):
    shown = console(terminal=True)
    with Log(tmp_path, options(), 300, shown) as log:
        log.begin(100, 100)
        log.tick(120, 0.51234, "85.3 examples/s  1:20 left")
        log.row(120, "train", {"loss": 0.5})
        log.row(120, "validation", {"accuracy": 0.8125})
    text = shown.file.getvalue()
    assert "120/300" in text
    assert "loss 0.5123 85.3 examples/s  1:20 left" in text
    assert "step 120/300  validation  accuracy 0.8125" in text
    assert "train" not in text  # the bar has said it


def test_lines_instead_of_the_bar(tmp_path):
    shown = console(terminal=True)
    with Log(tmp_path, options(progress=False), 300, shown) as log:
        log.begin(0, 0)
        log.tick(10, 0.5, "")
        log.row(10, "train", {"loss": 0.5})
    assert shown.file.getvalue() == "step 10/300  train  loss 0.5\n"


def test_start_table():
    shown = console(width=120)
    show_leaves(LEAVES, shown)
    lines = shown.file.getvalue().splitlines()
    row = next(line for line in lines if "lora_a" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == [
        "peft/layers/attention/query/lora_a",
        "6 x 384 x 8",
        "float32",
        "added",
        "lora",
        "18,432",
        "0.081%",
    ]
    assert "22,713,216" in next(line for line in lines if "everything else" in line)
    assert lines[-1] == "21,891 of 22,735,107 numbers move (0.096%)"


# Pictures and boards


def test_curves(tmp_path):
    rows = [
        {"step": step, "split": "train", "loss": 1 / step, "grad_norm": 9.0} for step in (5, 10)
    ]
    rows += [{"step": step, "split": "validation", "loss": 0.2, "f1": 0.5} for step in (5, 10)]
    rows += [{"step": 10, "split": "test", "loss": 0.3, "f1": None}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row | {"time": 1.0}) + "\n" for row in rows))
    draw_curves(path, tmp_path / "curves.png")
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (480, 1320)  # two panels
    assert len({tuple(color) for color in picture.reshape(-1, picture.shape[-1])}) > 20
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    draw_curves(path, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[:2] == (480, 660)
    path.write_text("")
    draw_curves(path, tmp_path / "curves.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def events(directory):
    """{(tag, step): value} of the event files."""
    found = {}
    for path in (directory / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def test_tensorboard(tmp_path):
    with Log(tmp_path, options(tensorboard=True), 300, console()) as log:
        log.begin(0, 0)
        log.row(10, "train", {"loss": 0.5})
        log.row(10, "validation", {"accuracy": 0.25, "f1": float("nan")})
    assert events(tmp_path) == {("train/loss", 10): 0.5, ("validation/accuracy", 10): 0.25}


def test_wandb(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **arguments: calls.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (10, 20):
        with Log(tmp_path, options(wandb=True), 300, console()) as log:
            log.begin(step - 10, 0)
            log.row(step, "train", {"loss": 0.5})
    first, row, end, second, *_ = calls
    assert (row, end) == ((10, {"train/loss": 0.5}), "end")
    assert first == second  # a continued run continues
    assert first["name"] == tmp_path.name


def test_wandb_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    expected = "needs the package 'wandb': pip install wandb"
    with Log(tmp_path, options(wandb=True), 300) as log, pytest.raises(Mistake, match=expected):
        log.begin(0, 0)
