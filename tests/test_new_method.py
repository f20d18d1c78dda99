"""A method is one file: tests/example_method.py, put beside the others, is found, has its config
group, and keeps the contract of tests/test_methods.py, with no other file touched."""

import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from bmft import config, models, peft
from bmft.errors import Mistake
from bmft.peft import portable

TESTS = pathlib.Path(__file__).resolve().parent
EXAMPLE, NAME = TESTS / "example_method.py", "steering"
CONTRACT = """
import sys, pytest, bmft.peft
bmft.peft.__path__.append(sys.argv[1])
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", sys.argv[2], "-k", sys.argv[3]]))
"""


@pytest.fixture
def folder(tmp_path):
    shutil.copy(EXAMPLE, tmp_path / f"{NAME}.py")
    return tmp_path


@pytest.fixture
def beside(folder, monkeypatch):
    """The example as a file of bmft/peft/."""
    monkeypatch.setattr(peft, "__path__", [*peft.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop(f"bmft.peft.{NAME}", None)
    vars(peft).pop(NAME, None)


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 40


def test_readme_shows_it():
    assert EXAMPLE.read_text() in (TESTS.parent / "README.md").read_text()


def test_it_is_found_with_its_config_group(beside, tmp_path):
    assert NAME in peft.names()
    assert config.signature(peft.get(NAME)) == {"last": (int, 0)}
    with pytest.raises(Mistake, match="did you mean 'steering'"):
        peft.get("stering")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(tiny.config_json("bert")))
    model = models.find(str(tmp_path / "bert"), outputs=tiny.OUTPUTS)
    methods = peft.build(model, (NAME,), {NAME: {"last": 2}})
    path, added = "peft/layers/mlp_norm/steering", portable.expected(methods, model)[1]
    assert {path: leaf.shape for path, leaf in added.items()} == {path: (3, 24)}
    np.testing.assert_array_equal(peft.moving_rows(methods, path), [False, True, True])


def test_it_keeps_the_contract(folder):
    done = subprocess.run(
        [sys.executable, "-c", CONTRACT, folder, TESTS / "test_methods.py", NAME],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.search(r"\b6 passed", done.stdout)
