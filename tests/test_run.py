"""The run directory: made, recognised, refused when it is another run's, finished."""

import errno
import importlib.util
import json
import os
import pathlib

import jax
import pytest
from etils import epath
from ml_collections import FrozenConfigDict

from bmft import storage
from bmft.errors import Mistake
from bmft.run import REPORT, default_workdir, open_run, write_whole
from configs import base


def make_config(**overrides):
    config = base.get_config()
    config.train.steps = 100
    config.peft.lora = {"rank": 8, "targets": ("query", "value")}
    config.update_from_flattened_dict(overrides)
    return FrozenConfigDict(config)


def opened(path, fingerprint="f1", name="glue_lora", **overrides):
    return open_run(make_config(**overrides), path, name, fingerprint)


def begun(path):
    """A directory in which a run has begun to train."""
    opened(path)
    (path / "metrics.jsonl").touch()


def finish(run, **values):
    run.finish(dict.fromkeys(REPORT, 0) | values)


def test_a_new_directory(tmp_path):
    run = opened(tmp_path / "runs" / "a")
    assert run.path == tmp_path / "runs" / "a"
    assert not run.finished
    record = json.loads((run.path / "config.json").read_text())
    assert record["experiment"] == "glue_lora"
    assert record["base_fingerprint"] == "f1"
    assert record["config"]["peft"]["lora"] == {"rank": 8, "targets": ["query", "value"]}
    assert record["versions"]["jax"] == jax.__version__
    assert "commit" in record
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json"]


def test_the_same_run_continues_and_finishes(tmp_path, capsys):
    opened(tmp_path)
    content = (tmp_path / "config.json").read_bytes()
    run = opened(tmp_path)
    assert not run.finished
    assert capsys.readouterr().out == ""
    finish(run, metrics={"test": {"accuracy": 0.5, "f1": float("nan")}})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"] == {"test": {"accuracy": 0.5, "f1": None}}
    assert opened(tmp_path).finished
    assert capsys.readouterr().out == f"{tmp_path} is a finished run: see {tmp_path}/report.json\n"
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_run_that_a_mistake_ended_before_it_trained_can_be_mended(tmp_path):
    opened(tmp_path, **{"peft.lora.rank": 4})
    opened(tmp_path, fingerprint="f2")
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["peft"]["lora"]["rank"] == 8
    assert record["base_fingerprint"] == "f2"


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    begun(tmp_path)
    expected = (
        r"holds another run \(peft\.lora\.rank: 8 != 4, seed: 0 != 1\): choose another --workdir"
    )
    with pytest.raises(Mistake, match=expected):
        opened(tmp_path, **{"peft.lora.rank": 4, "seed": 1})
    with pytest.raises(Mistake, match=r"base_fingerprint: 'f1' != 'f2'"):
        opened(tmp_path, fingerprint="f2")
    with pytest.raises(Mistake, match=r"experiment: 'glue_lora' != 'glue_full'"):
        opened(tmp_path, name="glue_full")


def test_groups_that_may_differ(tmp_path):
    finish(opened(tmp_path))
    differing = {
        "mesh.data": 2,
        "log.every": 3,
        "checkpoint.keep": 5,
        "eval.every": 9,
        "export.merged": True,
    }
    assert opened(tmp_path, **differing).finished
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["export"]["merged"] is True


def test_steps_may_grow_and_nothing_else_of_train(tmp_path):
    begun(tmp_path)
    finish(opened(tmp_path))
    run = opened(tmp_path, **{"train.steps": 200})
    assert not run.finished
    assert not (tmp_path / "report.json").exists()
    assert not opened(tmp_path, **{"train.steps": 200}).finished
    with pytest.raises(Mistake, match=r"\(train\.steps: 200 != 100\); train\.steps may only grow"):
        opened(tmp_path)
    with pytest.raises(Mistake, match=r"train\.batch_size: 32 != 16"):
        opened(tmp_path, **{"train.steps": 300, "train.batch_size": 16})
    with pytest.raises(Mistake, match=r"train\.epochs: None != 1\.0, train\.steps: 200 != None"):
        opened(tmp_path, **{"train.steps": None, "train.epochs": 1.0})


def test_checkpoints_in_a_folder_of_their_own(tmp_path, capsys):
    """What is there is gone on from, in an empty directory, too: it may be another machine's."""
    folder = {"checkpoint.folder": str(tmp_path / "bucket")}
    run = opened(tmp_path / "a", **folder)
    assert str(run.checkpoints) == str(tmp_path / "bucket" / "checkpoints")
    assert not run.continued
    records = [(tmp_path / home / "config.json").read_bytes() for home in ("a", "bucket")]
    assert records[0] == records[1]
    opened(tmp_path / "b", **folder, seed=1)  # nothing was computed yet
    opened(tmp_path / "a", **folder)
    assert capsys.readouterr().err == ""

    (tmp_path / "a" / "metrics.jsonl").touch()
    (tmp_path / "bucket" / "checkpoints" / "10").mkdir(parents=True)
    assert opened(tmp_path / "a", **folder).continued
    assert capsys.readouterr().err == ""
    assert not opened(tmp_path / "c", **folder).continued
    expected = f"warning: {tmp_path}/bucket holds checkpoints of this run, {tmp_path}/c nothing"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)
    with pytest.raises(Mistake, match=r"bucket holds another run \(seed: 0 != 1\)"):
        opened(tmp_path / "d", **folder, seed=1)
    opened(tmp_path / "c", **folder, **{"train.steps": 200})
    record = json.loads((tmp_path / "bucket" / "config.json").read_text())
    assert record["config"]["train"]["steps"] == 200


def test_checkpoints_are_looked_for_where_they_are(tmp_path):
    begun(tmp_path / "a")
    opened(tmp_path / "a")
    expected = r"a has its checkpoints in checkpoint\.folder=None, not '.*/b': give that one"
    with pytest.raises(Mistake, match=expected):
        opened(tmp_path / "a", **{"checkpoint.folder": str(tmp_path / "b")})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("workdir", "folder", "message"),
    [
        ("gs://bucket/x", None, r"--workdir=gs://bucket/x is no directory; checkpoint\.folder may"),
        ("run", "s3://bucket/x", "checkpoint.folder='s3://bucket/x': needs a directory or gs://"),
        ("run", "gs://", "checkpoint.folder='gs://': needs a directory or gs://bucket/path"),
        ("run", "gs://b/x", "'gs://b/x' needs the package 'gcsfs': .*-r requirements-gcs.txt$"),
    ],
)
def test_storage_that_cannot_be(tmp_path, monkeypatch, workdir, folder, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Mistake, match=message):
        opened(workdir, **{"checkpoint.folder": folder})
    assert list(tmp_path.iterdir()) == []


class Answer(Exception):
    """As gcsfs raises it."""

    __module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("Error [os_error_code='28']"), "No space left on device"),
        (
            ValueError("NOT_FOUND: gs://b/x [tensorstore_spec='{}'] [http_response_code='404']"),
            "NOT_FOUND: gs://b/x",
        ),
        (FileNotFoundError("b/bucket/o"), "no such bucket or object"),
        (Answer("Anonymous caller, 401"), "Answer: Anonymous caller, 401"),
        (OSError("Forbidden: b/bucket/o"), "Forbidden: b/bucket/o"),
    ],
)
def test_what_a_store_refuses_is_said_in_a_line(raised, expected):
    class Refusing(type(epath.Path())):
        def write_bytes(self, data):
            raise raised

    with pytest.raises(Mistake) as mistake:
        write_whole(Refusing("gs://b/x"), "content")
    assert str(mistake.value) == f"cannot write gs://b/x: {expected}"


def test_a_fault_of_our_own_is_none_of_the_store():
    with pytest.raises(ValueError, match="our own"), storage.os_errors():
        raise ValueError("our own")


def test_other_versions_are_a_warning(tmp_path, capsys):
    begun(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(record))
    opened(tmp_path)
    expected = (
        f"warning: {tmp_path} was begun with other versions: jax 0.0.1 -> {jax.__version__}\n"
    )
    assert capsys.readouterr().err == expected


def test_a_report_needs_its_names(tmp_path):
    run = opened(tmp_path)
    with pytest.raises(KeyError, match="tokens_per_second"):
        run.finish({name: 0 for name in REPORT if name != "tokens_per_second"})
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "bert"}'}, "config.json is no run's"),
        ({"config.json": '{"experiment": "gl'}, "config.json is damaged"),
        ({"config.json": b"\xff\xfe"}, "config.json is damaged"),
        ({"metrics.jsonl": ""}, "has metrics.jsonl but no config.json"),
    ],
)
def test_a_directory_of_something_else(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Mistake, match=message):
        opened(tmp_path)
    for name, content in files.items():  # untouched
        found = (tmp_path / name).read_bytes()
        assert found == (content if isinstance(content, bytes) else content.encode())


def test_a_directory_with_files_of_no_concern(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert not opened(tmp_path).finished


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match=r"cannot read .*file/config\.json: Not a directory"):
        opened(tmp_path / "file")


def test_a_directory_that_is_read_only(tmp_path, monkeypatch):
    def fail(*arguments, **options):  # root may write anywhere, so the system is played
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(pathlib.Path, "mkdir", fail)
    with pytest.raises(Mistake, match=r"cannot write .*/config\.json: Read-only file system"):
        opened(tmp_path / "run")


def test_a_file_is_written_as_a_whole_or_not(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def fail(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Mistake, match=f"cannot write {path}: No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_a_lock_is_free_again_after_use(tmp_path):
    run = opened(tmp_path)
    expected = "another process is training in "
    with run.lock(), pytest.raises(Mistake, match=expected), opened(tmp_path).lock():
        pass
    with run.lock():
        pass


def test_default_directories():
    assert default_workdir("glue_lora") == "runs/glue_lora"
    assert default_workdir("glue_lora", "sst2") == "runs/glue_lora-sst2"
    overrides = {
        "peft.lora.rank": 4,
        "peft.lora.targets": ("query", "value"),
        "export.merged": True,  # may differ: the same directory
        "model.name": "/data/models/my bert/",
        "optim.learning_rate": 0.001,
    }
    assert default_workdir("glue_lora", "sst2", overrides) == (
        "runs/glue_lora-sst2-rank=4-targets=query+value-name=my_bert-learning_rate=0.001"
    )
    both = {"task.name": "a", "model.name": "b"}
    assert default_workdir("x", None, both) == "runs/x-task.name=a-model.name=b"


def test_a_long_default_directory_is_cut_and_stays_different():
    names = {
        default_workdir("glue_lora", None, {"peft.lora.targets": ("query",) * 20, "seed": seed})
        for seed in range(3)
    }
    assert len(names) == 3
    assert all(len(name) <= len("runs/") + 80 for name in names)
