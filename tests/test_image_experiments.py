"""The image experiment as a user runs it, on tiny models: what it leaves, predicts, refuses."""

import json
import pathlib
import re

import numpy as np
import pytest
import tiny_images
from PIL import Image
from safetensors.numpy import load_file

import bmft
from bmft import loop, predict
from bmft.errors import Stopped, command
from experiments import image_classification

CLASSES = ("blue", "green", "red")
BERT = pathlib.Path(__file__).parent / "goldens" / "bert"


def picture(rng, label, size=(20, 20)):
    """uint8 [h, w, 3]: noise in which one channel says the label."""
    pixels = rng.integers(0, 150, (*size, 3))
    pixels[..., 2 - label] += 90
    return pixels.astype(np.uint8)


def folders(where, counts, seed=0):
    """A folder of PNG files a class and split."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for label, name in enumerate(CLASSES):
            (where / split / name).mkdir(parents=True)
            for i in range(count):
                size = (20 + i % 3, 21)
                Image.fromarray(picture(rng, label, size)).save(where / split / name / f"{i}.png")
    return where


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """What every run here has in common: a tiny ResNet, and folders of pictures."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_images.directory(folder / "model", "resnet_basic")
    data = folders(folder / "data", {"train": 12, "validation": 5, "test": 4})
    return [
        *(f"--config.model.name={folder / 'model'}", "--config.task.image_size=20"),
        *("--config.data.name=folders", f"--config.data.dir={data}"),
        *("--config.peft.lora.rank=2", "--config.peft.lora.alpha=5"),
        *("--config.train.steps=20", "--config.train.batch_size=8", "--config.eval.every=10"),
        *("--config.optim.learning_rate=0.02", "--config.log.tensorboard=False"),
    ]


def end(arguments, capsys, status=0):
    """Runs the experiment in this process; returns what it printed."""
    capsys.readouterr()
    assert command(image_classification.main, arguments) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def report(workdir):
    return json.loads((workdir / "report.json").read_text())


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "finished"
    policy = ["--config.model.batch_norm=update", "--config.task.flip=True"]
    merged = ["--config.export.merged=True", "--config.peft.lora.targets=convolution"]
    run = [*arguments, f"--workdir={workdir}", *policy, *merged]
    assert command(image_classification.main, run) == 0
    return workdir, run


def test_what_a_run_leaves(finished):
    workdir, _ = finished
    for name in ("curves.png", "confusion.png", "per_class.csv", "adapter", "model"):
        assert (workdir / name).exists(), name
    lines = (workdir / "per_class.csv").read_text().splitlines()
    assert lines[0] == "label,precision,recall,f1,support"
    assert [line.split(",")[0] for line in lines[1:]] == list(CLASSES)
    assert (workdir / "confusion.png").read_bytes().startswith(b"\x89PNG")
    found = report(workdir)["metrics"]
    assert found["test"]["accuracy"] > 0.6  # a third by chance
    assert found["train"]["loss"] < 1.0


def test_running_statistics_are_exported(finished, arguments):
    workdir, _ = finished
    base = load_file(arguments[0].partition("=")[2] + "/model.safetensors")
    merged = load_file(workdir / "model" / "model.safetensors")
    assert base.keys() == {name for name in merged if "num_batches" not in name}
    moved = [name for name in base if name.endswith("running_var")]
    assert moved and all(np.abs(base[name] - merged[name]).max() > 1e-3 for name in moved)


def test_adapter_and_merged_model_answer_alike(finished):
    workdir, _ = finished
    rng = np.random.default_rng(5)
    pictures = [picture(rng, label) for label in (0, 1, 2, 2, 1)]
    one = bmft.load(workdir).predict(pictures)
    other = bmft.load(workdir / "model").predict(pictures)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a["logits"], b["logits"], atol=2e-4)
    assert {answer["label"] for answer in one} <= set(CLASSES)


def test_predictions_are_those_of_the_evaluation(finished, arguments):
    """The files of the test split give the accuracy of the report."""
    workdir, _ = finished
    where = arguments[3].partition("=")[2]
    files, labels = [], []
    for name in CLASSES:
        for i in range(4):
            files.append(f"{where}/test/{name}/{i}.png")
            labels.append(name)
    answers = bmft.load(workdir).predict(files)
    right = np.mean(
        [answer["label"] == label for answer, label in zip(answers, labels, strict=True)]
    )
    assert right == pytest.approx(report(workdir)["metrics"]["test"]["accuracy"])


def test_predict_command(finished, tmp_path, capsys):
    workdir, _ = finished
    Image.fromarray(picture(np.random.default_rng(0), 1)).save(tmp_path / "a.png")
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": str(tmp_path / "a.png")}) + "\n")
    for given in ([f"--image={tmp_path}/a.png"], [f"--input={tmp_path}/in.jsonl"]):
        assert command(predict.main, [f"--run={workdir}", *given]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["image"].endswith("a.png") and set(answer["scores"]) == set(CLASSES)


WRONG_USE = [
    (["--text", "x"], "takes image: give --image, not --text"),
    (["--image", "nothing.png"], "nothing.png: cannot be read"),
    (["--image", "GREY"], "mode L (grey), not RGB"),
]


@pytest.mark.parametrize("given, says", WRONG_USE)
def test_what_predict_refuses(finished, given, says, tmp_path, capsys):
    workdir, _ = finished
    Image.new("L", (20, 20)).save(tmp_path / "grey.png")
    given = [str(tmp_path / "grey.png") if word == "GREY" else word for word in given]
    assert command(predict.main, [f"--run={workdir}", *given]) == 2
    assert says in capsys.readouterr().err


def test_a_finished_run_says_so(finished, capsys):
    workdir, run = finished
    assert "is a finished run" in end(run, capsys)


def test_kept_features_change_nothing(arguments, tmp_path, capsys):
    """A probe with its features from disk: the same rows of the log, to rounding."""
    probe = [*arguments[:4], *arguments[6:], "--config.peft.methods=linear_probe"]
    kept = end([*probe, f"--workdir={tmp_path / 'a'}"], capsys)
    assert re.search(r"train: features \[36, .*\] of the first \d pieces are reused", kept)
    again = end([*probe, f"--workdir={tmp_path / 'b'}"], capsys)
    anew = [*probe, f"--workdir={tmp_path / 'c'}", "--config.train.reuse_features=False"]
    assert "computed in every epoch" in end(anew, capsys)
    assert "are reused" in again and rows(tmp_path / "a") == rows(tmp_path / "b")
    for one, other in zip(rows(tmp_path / "a"), rows(tmp_path / "c"), strict=True):
        assert one.keys() == other.keys()
        numbers = [key for key in one if isinstance(one[key], float)]
        for key in numbers:
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), key


REASONS = [
    (["--config.task.flip=True"], "the images are augmented"),
    (["--config.model.batch_norm=update"], "model.batch_norm='update'"),
    (["--config.peft.methods=full"], "in the first piece of the model something moves"),
    (["--config.train.steps=4"], "the run is no longer than an epoch"),
]


@pytest.fixture
def untrained(monkeypatch):
    """Where all is said before the first step: a run that is stopped there, with status 75."""

    def stop(*_, **__):
        raise Stopped("before the first step")

    monkeypatch.setattr(loop, "run", stop)


@pytest.mark.parametrize("given, says", REASONS)
@pytest.mark.usefixtures("untrained")
def test_when_features_are_not_kept(arguments, given, says, tmp_path, capsys):
    probe = [*arguments[:4], *arguments[6:], "--config.peft.methods=linear_probe"]
    names = {word.partition("=")[0] for word in given}
    probe = [word for word in probe if word.partition("=")[0] not in names]
    run = [*probe, *given, f"--workdir={tmp_path / 'run'}"]
    assert command(image_classification.main, run) == 75
    assert f"features are computed in every epoch: {says}" in capsys.readouterr().out


def broken(folder, what):
    """Spoils a copy of the pictures; returns what the message must say."""
    data = folders(folder, {"train": 3, "test": 1})
    victim = data / "train" / "green" / "1.png"
    if what == "truncated":
        victim.write_bytes(victim.read_bytes()[:200])
        return "green/1.png: truncated"
    if what == "empty class":
        (data / "train" / "yellow").mkdir()
        return "yellow"
    mode = {"grey": "L", "transparent": "RGBA"}[what]
    Image.new(mode, (20, 20)).save(victim)
    return f"mode {mode}"


@pytest.mark.parametrize("what", ["truncated", "grey", "transparent", "empty class"])
@pytest.mark.usefixtures("untrained")
def test_bad_images_end_with_one_line(arguments, what, tmp_path, capsys):
    says = broken(tmp_path / "data", what)
    run = [word for word in arguments if "data.dir" not in word]
    run += [f"--config.data.dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    printed = end(run, capsys, status=2)
    assert says in printed and len(printed.strip().splitlines()) == 1
    if what == "empty class":
        return
    assert command(image_classification.main, [*run, "--config.data.skip_bad=True"]) == 75
    assert "train: 8 images; 1 image left out" in capsys.readouterr().out
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 1 and listed[0].startswith("train\t") and "green/1.png" in listed[0]


MISTAKES = [
    (["--config.model.batch_norm=updated"], "did you mean 'update'"),
    (["--config.task.crop=padd"], "did you mean 'pad'"),
    (["--config.task.standardize=images"], "did you mean 'image'"),
    (["--config.task.flipp=True"], "did you mean"),
    (["--config.data.text=a"], "data.text"),
    (["--config.data.name=folder"], "did you mean 'folders'"),
    (["--config.peft.lora.targets=convolutoin"], "did you mean 'convolution'"),
    ([f"--config.model.name={BERT}"], "takes no images"),
]


@pytest.mark.parametrize("given, says", MISTAKES)
def test_mistakes_end_with_one_line(arguments, given, says, tmp_path, capsys):
    names = {word.partition("=")[0] for word in given}
    run = [word for word in arguments if word.partition("=")[0] not in names]
    printed = end([*run, *given, f"--workdir={tmp_path / 'run'}"], capsys, status=2)
    assert says in printed and len(printed.strip().splitlines()) == 1
