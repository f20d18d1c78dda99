"""The experiment as a user runs it, on a tiny model: what it leaves, resumes, predicts, refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import bmft
from bmft import predict
from bmft.errors import command
from experiments import glue_lora

ROOT = Path(__file__).resolve().parent.parent
# As a user has it: a device a core. Runs of the same program compile it once, and quickly.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": re.sub(r"--\S*device_count\S*", "", os.environ["XLA_FLAGS"]),
    "JAX_COMPILATION_CACHE_DIR": os.path.join(os.environ["BMFT_TESTS"], "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}
EXPERIMENT = [sys.executable, str(ROOT / "experiments" / "glue_lora.py")]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """What every run here has in common: a tiny model with dropout, and files of texts."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.directory(folder / "model", hidden_dropout_prob=0.1)
    tiny.tokenizer(folder / "model")
    return [
        *(f"--config.model.name={folder / 'model'}", "--config.train.steps=24"),
        *("--config.train.batch_size=12", "--config.log.every=4", "--config.eval.every=8"),
        *(
            "--config.peft.lora.rank=3",
            "--config.peft.lora.alpha=7",
            "--config.peft.lora.dropout=0.1",
        ),
        *("--config.optim.learning_rate=0.02", "--config.checkpoint.keep=3"),
        *tiny.data(folder / "data"),
    ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished run, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    done = run([*arguments, f"--workdir={workdir}", "--config.export.merged=True"])
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def run(arguments):
    command = [*EXPERIMENT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def rows(workdir):
    """metrics.jsonl without what a clock said."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def leaves(workdir):
    """The exported adapter, to the bit (the file's metadata come in any order)."""
    return tensors(workdir / "adapter" / "adapter_model.safetensors")


def tensors(file):
    return {name: array.tobytes() for name, array in load_file(file).items()}


def test_what_a_run_leaves(finished):
    workdir, printed = finished
    for name in ("config.json", "metrics.jsonl", "curves.png", "report.json", "adapter", "model"):
        assert (workdir / name).exists(), name
    report = json.loads((workdir / "report.json").read_text())
    assert report["steps"] == 24
    assert report["trainable_params"] == 2 * 3 * 3 * (24 + 24) + 24 * 2 + 2
    assert re.search(r"^test accuracy 0\.\d+", printed, re.MULTILINE)
    assert "lora_a" in printed  # the table of what moves
    assert (
        json.loads((workdir / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    )


def test_a_checkpoint_holds_what_moves_and_no_more(finished):
    workdir, _ = finished
    report = json.loads((workdir / "report.json").read_text())
    manifest = json.loads((workdir / "checkpoints" / "24" / "manifest.json").read_text())
    saved = {name: math.prod(shape) for name, (shape, _) in manifest["content"]["leaves"].items()}
    moving = sum(size for name, size in saved.items() if name.startswith("moving/"))
    assert moving == report["trainable_params"]
    assert sum(saved.values()) < 3 * moving + 10  # Adam's two moments, and a few scalars


def test_a_finished_run_says_so_and_exports_what_was_not_asked_for(arguments, finished, capsys):
    workdir, _ = finished
    before = leaves(workdir)
    assert command(glue_lora.main, [*arguments, f"--workdir={workdir}"]) == 0
    assert "is a finished run" in capsys.readouterr().out
    model = workdir / "model" / "model.safetensors"
    merged = tensors(model)
    for file in (workdir / "model").iterdir():
        file.unlink()
    (workdir / "model").rmdir()
    again = [*arguments, f"--workdir={workdir}", "--config.export.merged=True"]
    assert command(glue_lora.main, again) == 0
    assert tensors(model) == merged
    assert leaves(workdir) == before


def test_stopped_and_continued_is_as_if_it_had_not_been(arguments, finished, tmp_path):
    """SIGTERM after the first rows of the log: status 75, then the same end to the bit."""
    workdir = tmp_path / "stopped"
    command = [*EXPERIMENT, *arguments, f"--workdir={workdir}"]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    for _ in range(1000):
        if (workdir / "metrics.jsonl").exists() and rows(workdir):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    done = run([*arguments, f"--workdir={workdir}"])
    assert done.returncode == 0, done.stderr
    assert rows(workdir) == rows(finished[0])
    assert leaves(workdir) == leaves(finished[0])


def test_another_config_is_refused_with_the_keys(arguments, finished, capsys):
    other = [a for a in arguments if "rank" not in a] + ["--config.peft.lora.rank=4"]
    assert command(glue_lora.main, [*other, f"--workdir={finished[0]}"]) == 2
    assert "peft.lora.rank: 3 != 4" in capsys.readouterr().err


# --- predictions


TEXTS = ["w1 good w2", "bad w3", "w4 w5 w6 w7 good", "bad"]


@pytest.fixture(scope="module")
def predictions(finished):
    return bmft.load(finished[0]).predict(TEXTS)


def test_predictions_of_a_run(predictions):
    for one in predictions:
        assert set(one) == {"label", "scores", "logits"}
        assert sum(one["scores"].values()) == pytest.approx(1)
        assert one["label"] == max(one["scores"], key=one["scores"].get)


def test_predictions_have_the_accuracy_that_was_reported(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    texts, labels = zip(*tiny.texts(21, 2), strict=True)
    found = [one["label"] for one in bmft.load(finished[0]).predict(texts)]
    right = np.mean([a == b for a, b in zip(found, labels, strict=True)])
    assert report["metrics"]["test"]["accuracy"] == pytest.approx(right)


def test_adapter_and_merged_model_predict_the_same(arguments, finished, predictions):
    base = arguments[0].partition("=")[2]
    want = [one["logits"] for one in predictions]
    for where, over in ((finished[0] / "adapter", base), (finished[0] / "model", None)):
        found = [one["logits"] for one in bmft.load(where, base=over).predict(TEXTS)]
        np.testing.assert_allclose(found, want, atol=1e-5)


def test_prediction_command(finished, tmp_path, predictions, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    argv = ["--run", str(finished[0]), "--input", str(source), "--output", str(output)]
    assert command(predict.main, argv) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    assert [line["label"] for line in lines] == [one["label"] for one in predictions]
    capsys.readouterr()
    assert command(predict.main, ["--run", str(finished[0]), "--text", TEXTS[0]]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == TEXTS[0]
    np.testing.assert_allclose(printed["logits"], predictions[0]["logits"], atol=1e-5)


def test_a_prediction_does_not_depend_on_its_company(finished, predictions):
    """Packed with others or alone in its row."""
    alone = [bmft_one["logits"] for t in TEXTS for bmft_one in bmft.load(finished[0]).predict([t])]
    np.testing.assert_allclose(alone, [one["logits"] for one in predictions], atol=1e-5)


WRONG = [
    ([], "give --run"),
    (["--run", "nowhere", "--text", "x"], "no directory 'nowhere'"),
    (["--run", "RUN"], "give one of --input"),
    (["--run", "RUN", "--text", "x", "--input", "y"], "give one of --input"),
    (["--run", "RUN", "--input", "none.jsonl"], "none.jsonl"),
    (["--run", "RUN", "--adapter", "RUN/adapter", "--text", "x"], "give --run"),
    (["--run", "RUN", "--text", "x", "--text-pair", "y", "--text-pair", "z"], "1 --text but 2"),
    (["--ran", "RUN"], "--ran"),
    (["--base", "BASE", "--text", "x"], "no trained head"),
    (["--base", "BASE", "--adapter", "RUN", "--text", "x"], "is no adapter"),
]


@pytest.mark.parametrize("argv, says", WRONG)
def test_what_predict_refuses(arguments, finished, capsys, argv, says):
    base = arguments[0].partition("=")[2]
    argv = [a.replace("RUN", str(finished[0])).replace("BASE", base) for a in argv]
    assert command(predict.main, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert says in error


# --- mistakes that only the parts of a run can find


MISTAKES = [
    ("--config.peft.methods=lorra", "did you mean 'lora'"),
    ("--config.peft.lora.targets=quary", "did you mean 'query'"),
    ("--config.peft.lora.rank=0", "peft.lora.rank"),
    ("--config.data.max_length=23", "22 positions"),
    ("--config.data.text=txt", "did you mean 'text'"),
    ("--config.data.row_length=5", "data.row_length=5"),
    ("--config.eval.metric=acuracy", "did you mean 'accuracy'"),
    ("--config.task.class_weights=1,2,3", "2 classes"),
    ("--config.model.unroll=4", "1 to 3"),
    ("--config.model.name=minilmm", "minilmm"),
    ("--config.model.name=./minilm", "no directory or file './minilm'"),
    ("--config.mesh.data=3", "does not fit 8 devices"),
    ("--config.task.name=text_classifcation", "did you mean 'text_classification'"),
]


@pytest.mark.parametrize("argument, says", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(arguments, tmp_path, capsys, argument, says):
    key = argument.partition("=")[0]
    kept = [a for a in arguments if a.partition("=")[0] != key]
    assert command(glue_lora.main, [*kept, argument, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "methods, group",
    [
        ("full", []),
        ("lora,adapter", ["--config.peft.adapter.kind=parallel", "--config.train.accumulate=2"]),
    ],
)
def test_every_method_runs_and_comes_back(arguments, tmp_path, methods, group):
    """A short run of each; its adapter gives the logits of its merged model, if it has one."""
    kept = [a for a in arguments if ".lora." not in a and "train.steps" not in a]
    kept += [
        f"--config.peft.methods={methods}",
        "--config.train.steps=3",
        f"--workdir={tmp_path}/run",
    ]
    assert command(glue_lora.main, [*kept, *group]) == 0
    found = bmft.load(tmp_path / "run").predict(TEXTS)
    assert len({tuple(one["logits"]) for one in found}) == 4
    merged = [*kept, *group, "--config.export.merged=True"]
    if "adapter" in methods:
        assert command(glue_lora.main, merged) == 2
        return
    assert command(glue_lora.main, merged) == 0
    again = bmft.load(tmp_path / "run" / "model").predict(TEXTS)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-5)


def test_experiment_says_what_it_is():
    """Every experiment and config: what it shows and the command."""
    for file in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        text = file.read_text()
        assert text.startswith('"""'), file
        assert "./run.sh experiments/" in text.split('"""')[1], file
