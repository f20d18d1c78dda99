"""Checkpoints: what comes back is what was saved, or it is refused; what is needed is kept."""

import errno
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bmft import storage
from bmft.checkpoint import Checkpoints, Saved
from bmft.errors import Mistake


class State(NamedTuple):
    step: Any
    key: Any
    moving: Any
    opt: Any
    stats: Any


def make_state(step, size=4):
    key = jax.random.fold_in(jax.random.key(3), step)
    moving = {
        "params": {
            "head": jax.random.normal(key, (size, 3)),
            "half": jnp.ones(5, jnp.bfloat16) / 3,
        },
        "peft": {},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt = tx.update(moving, tx.init(moving), moving)
    return State(jnp.int32(step), key, moving, opt, {})


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def fill(directory, steps=(10, 20, 30), best=None, **options):
    """Save `make_state(step)` with progress {"step": step} at each of `steps`."""
    with Checkpoints(directory, fingerprint="base", **options) as checkpoints:
        for step in steps:
            at = best(step) if best else None
            checkpoints.save(step, make_state(step), {"step": step}, at)


def found(directory):
    with Checkpoints(directory, fingerprint="base") as checkpoints:
        return checkpoints.newest()


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


# Saving and restoring


def test_everything_returns_exactly(tmp_path):
    fill(tmp_path)
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        assert checkpoints.newest() == Saved(30, {"step": 30})
        got = checkpoints.restore(30, make_state(0))
    assert_same(got, make_state(30))
    assert isinstance(got, State)


def test_onto_given_shardings(tmp_path):
    fill(tmp_path)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), make_state(0)
    )
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        got = checkpoints.restore(20, like)
    assert_same(got, make_state(20))
    assert {leaf.sharding for leaf in jax.tree.leaves(got)} == {sharding}


def test_the_next_steps_may_take_the_memory(tmp_path):
    """`save` returns before the files are written; what is donated meanwhile must not show."""
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5 + 1, state), donate_argnums=0)
    like = {"a": jnp.zeros((500, 1000)), "b": jnp.zeros((500, 1000))}
    state = {"a": jnp.ones((500, 1000)), "b": jax.random.normal(jax.random.key(0), (500, 1000))}
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        for step in (1, 2, 3):
            expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
            checkpoints.save(step, state, {})
            for _ in range(5):
                state = advance(state)
            assert_same(checkpoints.restore(step, like), expected)


def test_small(tmp_path):
    """A LoRA state: 150 thousand moving numbers with Adam's moments, 1.8 MB, in under 2 MB."""
    tx = optax.adamw(1e-3)
    keys = jax.random.split(jax.random.key(0), 8)
    names = [f"{name}/{part}" for name in ("query", "key", "value", "out") for part in "ab"]
    moving = {name: jax.random.normal(k, (6, 384, 8)) for name, k in zip(names, keys, strict=True)}
    _, opt = tx.update(jax.tree.map(jnp.sin, moving), tx.init(moving), moving)
    state = State(jnp.int32(1), keys[0], {"peft": moving}, opt, {})
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        checkpoints.save(1, state, {"step": 1})
    files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(files) < 2e6
    assert len(files) < 40


def test_the_same_step_again_replaces_the_progress_alone(tmp_path):
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        checkpoints.save(10, make_state(10), {"evaluated": 0})
        checkpoints.wait()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("10/state/**/*")}
        checkpoints.save(10, make_state(10), {"evaluated": 10}, 10)
    assert found(tmp_path) == Saved(10, {"evaluated": 10})
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("10/state/**/*")}


def test_keeps_the_newest_and_their_best(tmp_path):
    fill(tmp_path / "plain", range(10, 70, 10))
    assert steps_in(tmp_path / "plain") == [50, 60]
    best = {10: 10, 20: 10, 30: 10, 40: 40, 50: 40, 60: 40}.get
    fill(tmp_path / "best", (10, 20, 30, 40), best, keep=2)
    assert steps_in(tmp_path / "best") == [10, 30, 40]  # 10 is what 30 would need
    with Checkpoints(tmp_path / "best", fingerprint="base", keep=2) as checkpoints:
        checkpoints.newest()  # a second session knows what the first one did
        for step in (50, 60):
            checkpoints.save(step, make_state(step), {}, best(step))
    assert steps_in(tmp_path / "best") == [40, 50, 60]


def test_what_is_pending_is_finished_when_something_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        checkpoints.save(10, make_state(10), {})
        raise ZeroDivisionError
    assert found(tmp_path) == Saved(10, {})


def test_nothing_goes_before_its_successor_is_complete(tmp_path, monkeypatch):
    fill(tmp_path, keep=1)
    assert steps_in(tmp_path) == [30]

    def fail(self, step, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Checkpoints, "_seal", fail)
    with (
        pytest.raises(Mistake, match="No space left"),
        Checkpoints(tmp_path, fingerprint="base", keep=1) as checkpoints,
    ):
        checkpoints.newest()
        checkpoints.save(40, make_state(40), {})
    assert steps_in(tmp_path) == [30, 40]
    assert found(tmp_path) == Saved(30, {"step": 30})


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def newest_files(directory):
    return sorted(path for path in (directory / "30").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_any_damage_is_found_and_the_one_before_is_used(tmp_path, damage, capsys):
    fill(tmp_path / "whole")
    names = [path.relative_to(tmp_path / "whole") for path in newest_files(tmp_path / "whole")]
    assert len(names) > 8
    for name in names:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        damage(tmp_path / "copy" / name)
        with Checkpoints(tmp_path / "copy", fingerprint="base") as checkpoints:
            assert checkpoints.newest() == Saved(20, {"step": 20})
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {tmp_path}/copy/30 is ")
        assert str(name.relative_to("30")) in line
        assert line.endswith(f": going on from {tmp_path}/copy/20")


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    fill(tmp_path)
    flip(newest_files(tmp_path)[-1])
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        assert checkpoints.newest().step == 20
        checkpoints.save(25, make_state(25), {})
        checkpoints.wait()
        assert steps_in(tmp_path) == [20, 25, 30]
        checkpoints.save(30, make_state(30), {"again": True})
    assert found(tmp_path) == Saved(30, {"again": True})


def test_all_damaged_is_refused(tmp_path):
    fill(tmp_path)
    flip(tmp_path / "30" / "manifest.json")
    shutil.rmtree(tmp_path / "20" / "state" / "d")
    expected = (
        r"30 is damaged \(manifest.json.*\); .*20 is damaged \(state/d/.* is missing\): "
        "no checkpoint is left to go on from"
    )
    with pytest.raises(Mistake, match=expected):
        found(tmp_path)
    assert steps_in(tmp_path) == [20, 30]


def test_only_incomplete_ones_are_begun_anew(tmp_path, capsys):
    fill(tmp_path, (10,))
    (tmp_path / "10" / "manifest.json").unlink()
    (tmp_path / "20" / "state.orbax-checkpoint-tmp").mkdir(parents=True)  # as SIGKILL leaves it
    assert found(tmp_path) is None
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning"]
    assert "20 is incomplete (no manifest.json): none was ever complete" in lines[0]
    fill(tmp_path, (10, 20))
    assert found(tmp_path) == Saved(20, {"step": 20})
    assert found(tmp_path / "none") is None


def test_a_damaged_best_is_not_restored(tmp_path):
    fill(tmp_path)
    flip(newest_files(tmp_path)[-2])
    with (
        pytest.raises(Mistake, match=r"30 is damaged \(state/.*SHA-256 differs\)"),
        Checkpoints(tmp_path, fingerprint="base") as checkpoints,
    ):
        checkpoints.restore(30, make_state(0))


def test_a_manifest_that_is_not_ours(tmp_path, capsys):
    fill(tmp_path)
    for content in ("[]", "{}", "", json.dumps({"content": {}, "sha256": "0"})):
        (tmp_path / "30" / "manifest.json").write_text(content)
        assert found(tmp_path).step == 20
    assert capsys.readouterr().err.count("30 is damaged (manifest.json") == 4


def test_where_nothing_can_be_renamed(tmp_path, monkeypatch, capsys):
    """As in Cloud Storage, but for what Orbax does there, which only gs:// makes it do."""

    def fail(*paths):
        raise AssertionError("renamed")

    monkeypatch.setattr(storage, "in_cloud", lambda path: True)
    monkeypatch.setattr(os, "replace", fail)
    fill(tmp_path)
    assert steps_in(tmp_path) == [20, 30]
    flip(newest_files(tmp_path)[-2])
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        assert checkpoints.newest() == Saved(20, {"step": 20})
        assert "30 is damaged (state/" in capsys.readouterr().err
        checkpoints.save(30, make_state(30), {"again": True})
        assert_same(checkpoints.restore(30, make_state(0)), make_state(30))
    assert found(tmp_path) == Saved(30, {"again": True})


# Refusals


def test_another_base_is_refused(tmp_path):
    fill(tmp_path)
    with (
        pytest.raises(Mistake, match="30 was trained on another base: .*'base', not 'other'"),
        Checkpoints(tmp_path, fingerprint="other") as checkpoints,
    ):
        checkpoints.newest()


def test_other_leaves_are_refused(tmp_path):
    fill(tmp_path)
    like = make_state(0)
    params = like.moving["params"]
    others = {
        r"moving/params/head is float32\[4, 3\] there, float32\[5, 3\] here": make_state(0, 5),
        r"moving/params/half is bfloat16\[5\] there, float32\[5\] here": like._replace(
            moving={"params": params | {"half": jnp.ones(5)}, "peft": {}}
        ),
        r"moving/peft/a is nothing there, float32\[2\] here": like._replace(
            moving={"params": params, "peft": {"a": jnp.ones(2)}}
        ),
        r"moving/params/half is bfloat16\[5\] there, nothing here": like._replace(
            moving={"params": {"head": params["head"]}, "peft": {}}
        ),
    }
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        for message, other in others.items():
            with pytest.raises(Mistake, match=f"30 does not fit this run: {message}"):
                checkpoints.restore(30, other)


def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch):
    fill(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        checkpoints.newest()
        expected = "cannot write .*/40: No space left on device; the last good checkpoint is .*/30"
        with pytest.raises(Mistake, match=expected):
            checkpoints.save(40, make_state(40), {})
    assert steps_in(tmp_path) == [20, 30]


def test_a_directory_that_cannot_be(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "checkpoints", fingerprint="base") as checkpoints:
        assert checkpoints.newest() is None
        expected = "cannot write .*/checkpoints/10: Not a directory; no checkpoint is complete"
        with pytest.raises(Mistake, match=expected):
            checkpoints.save(10, make_state(10), {})
    assert capfd.readouterr().err == ""
