"""`bmft.adapters` as a user calls it: what it prints, what it leaves, what it refuses."""

import json
import re

import jax
import numpy as np
import pytest
import tiny
import tiny_dialogs
from safetensors.numpy import load_file, save_file
from trained import LABELS, Trained

from bmft import adapters, models, predict, tree, writing
from bmft.data import chat
from bmft.errors import command
from bmft.models import weights
from bmft.peft import files

LORA = {"rank": 3, "alpha": 7.0, "targets": ("query", "mlp.down"), "layers_to_transform": (0, 2)}
TEXTS = ["good w1", "bad w2 w3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.directory(tmp_path_factory.mktemp("base"))
    return tiny.tokenizer(folder)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """(groups, seed) -> a directory"""
    model = models.find(str(base), outputs=tiny.OUTPUTS)
    params, fingerprint = weights.load(model, jax.random.key(0)).params, weights.fingerprint(model)

    def make(groups, seed=0, **changes):
        trained = Trained(model, params, groups, size=0.1)
        rng = np.random.default_rng(seed)
        trained.moving = jax.tree.map(
            lambda leaf: leaf * (1 + rng.normal(0, 0.5 * (seed > 0), leaf.shape)), trained.moving
        )
        told = {"base": str(base), "fingerprint": fingerprint} | changes
        return str(trained.write(tmp_path_factory.mktemp("adapter") / f"of{seed}", **told))

    return make


@pytest.fixture(scope="module")
def lora(adapter):
    return adapter({"lora": LORA})


def run(capsys, *argv):
    """(status, what it printed, what it complained of)"""
    status = command(adapters.main, [str(word) for word in argv])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def succeed(capsys, *argv):
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    return out


def logits(where, base=None):
    return [one["logits"] for one in predict.load(where, base=base).predict(TEXTS)]


def params(folder):
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    return tree.flatten(weights.load(model, jax.random.key(0)).params)


def row_of(out, *words):
    """The first row of a table that has these words."""
    rows = (line for line in out.splitlines() if line.startswith("│"))
    return next(row for row in rows if all(word in row for word in words))


# --- show ------------------------------------------------------------------------------------


def test_show_needs_no_base(capsys, lora, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        text = (files.Path(lora) / name).read_bytes()
        (moved / name).write_bytes(text.replace(b"/base", b"/gone"))
    out = succeed(capsys, "show", moved)
    facts = dict(line.split(None, 1) for line in out.splitlines() if line[0] not in "┏┃┡│└ ")
    assert facts["peft_type"] == "LORA" and facts["lora_alpha"] == "7" and facts["r"] == "3"
    assert facts["head"] == ", ".join(LABELS)
    numbers = 2 * 3 * (24 + 24) + 2 * 3 * (24 + 40) + 24 * 5 + 5
    assert facts["numbers"] == f"{numbers:,} moved"
    size = sum(path.stat().st_size for path in moved.iterdir())
    assert facts["tensors"] == f"10 in {size:,} bytes"
    assert len(facts["fingerprint"]) == 64
    tensors = load_file(moved / "adapter_model.safetensors")
    key = "base_model.model.bert.encoder.layer.2.output.dense.lora_{}.weight"
    norm = 7 / 3 * np.linalg.norm(tensors[key.format("B")] @ tensors[key.format("A")])
    row = row_of(out, "output.dense")
    assert "bert.encoder.layer.{}.output.dense" in row and "24 x 40" in row
    assert float(re.search(r"2: (\S+)", row)[1]) == pytest.approx(norm, rel=0.01)
    assert "1: " not in row


def test_show_of_our_own_layout(capsys, adapter, lora):
    groups = {"lora": LORA, "bitfit": {}}
    out = succeed(capsys, "show", adapter(groups))
    assert "BMFT_LORA_BITFIT" in out and "never moved" in out
    ours = row_of(out, "mlp/down", "update")
    theirs = row_of(succeed(capsys, "show", lora), "output.dense")
    assert ours.count(": ") == theirs.count(": ") == 2
    assert "24 x 40" in ours
    bias = row_of(out, "mlp/down", "bias")
    assert bias.count(": ") == 3


def test_show_of_other_tensors(capsys, adapter):
    out = succeed(capsys, "show", adapter({"ia3": {}}))
    row = row_of(out, "self.key")
    assert "ia3_l" in row and "24 x 1" in row and row.count(": ") == 3


# --- merge -----------------------------------------------------------------------------------


def test_merge_and_back(capsys, base, lora, tmp_path):
    merged, back = tmp_path / "merged", tmp_path / "back"
    out = succeed(capsys, "merge", "--adapter", lora, "--output", merged)
    assert float(re.search(r"differ by (\S+) from", out)[1]) < 1e-4
    np.testing.assert_allclose(logits(merged), logits(lora), atol=1e-4)
    assert (merged / "tokenizer.json").is_file()
    undo = ("merge", "--undo", "--adapter", lora, "--base", merged, "--output", back)
    out = succeed(capsys, *undo)
    assert float(re.search(r"differ by (\S+) ", out)[1]) < 1e-6
    assert "holds them whole: classifier/out" in out
    found, want = params(back), params(base)
    for path in want:
        if not path.startswith("classifier"):
            np.testing.assert_allclose(found[path], want[path], atol=1e-6)
    labels = json.loads((back / "config.json").read_text())["id2label"]
    assert tuple(labels.values()) == LABELS


# --- combine, convert ------------------------------------------------------------------------


def test_combine(capsys, base, adapter, lora, tmp_path):
    other = adapter({"lora": LORA | {"targets": ("query",), "rank": 2}}, 1)
    out = succeed(
        capsys, "combine", "--adapter", f"{lora}:0.75", "--adapter", f"{other}:0.25", "--rank", 9,
        "--output", tmp_path / "exact",
    )  # fmt: skip
    assert float(re.search(r"relative error (\S+) against", out)[1]) < 1e-6
    found, one, two = (
        load_file(f"{folder}/adapter_model.safetensors")
        for folder in (tmp_path / "exact", lora, other)
    )
    head = "base_model.model.classifier.weight"
    np.testing.assert_allclose(found[head], 0.75 * one[head] + 0.25 * two[head], atol=1e-6)
    card = files.card(tmp_path / "exact")
    assert (card.base, card.labels) == (str(base), LABELS) and card.fingerprint
    assert np.abs(np.subtract(logits(tmp_path / "exact"), logits(lora))).max() > 1e-3
    out = succeed(
        capsys, "combine", "--adapter", lora, "--adapter", other, "--how", "dare_ties_svd",
        "--density", 0.5, "--seed", 3, "--heads", "first", "--output", tmp_path / "ties",
    )  # fmt: skip
    assert float(re.search(r"relative error (\S+) against", out)[1]) > 0.1
    tied = load_file(tmp_path / "ties" / "adapter_model.safetensors")
    np.testing.assert_array_equal(tied[head], one[head])


def test_convert_an_adapter_and_a_tuned_model(capsys, base, adapter, tmp_path):
    ia3 = adapter({"ia3": {}})
    out = succeed(capsys, "convert", "--rank", 24, "--adapter", ia3, "--output", tmp_path / "lora")
    assert float(re.search(r"relative error (\S+) against", out)[1]) < 1e-6
    np.testing.assert_allclose(logits(tmp_path / "lora"), logits(ia3), atol=1e-4)
    full = adapter({"full": {}})
    succeed(capsys, "merge", "--adapter", full, "--output", tmp_path / "tuned")
    out = succeed(
        capsys, "convert", "--rank", 2, "--from", tmp_path / "tuned", "--base", base,
        "--output", tmp_path / "cut",
    )  # fmt: skip
    assert float(re.search(r"relative error (\S+) against", out)[1]) > 0.1
    assert re.search(r"carried as they are, [\d,]+ numbers, .*embeddings/word", out)
    assert "layers/{}/attention/query" in out and "2: " in out
    assert files.card(tmp_path / "cut").peft_type == "LORA"
    assert predict.load(tmp_path / "cut").predict(TEXTS)[0]["label"] in LABELS


def test_mistakes_are_one_line(capsys, base, adapter, lora, tmp_path):
    gone = adapter({"lora": LORA}, base="/nowhere")
    other = adapter({"lora": LORA}, fingerprint="0" * 64)
    plain = adapter({"adapter": {}})
    out = ("--output", str(tmp_path / "out"))
    for argv, message in (
        (["show", base], "is no adapter directory"),
        (["show"], "required: directory; see --help"),
        (["shwo"], "invalid choice: 'shwo'"),
        (["merge", "--adapter", lora], "required: --output"),
        (["merge", "--adapter", lora, "--output", lora], "is what is read"),
        (["merge", "--adapter", plain, *out], "method 'adapter' cannot be merged"),
        (["merge", "--adapter", gone, *out], "no directory or file '/nowhere'"),
        (["merge", "--adapter", other, *out], "was trained on another base"),
        (["merge", "--undo", "--adapter", lora, *out], "give --base MERGED"),
        (["combine", "--adapter", f"{lora}:x", *out], "'x' is no weight"),
        (["combine", "--adapter", lora, "--adapter", f"{lora}:2", *out], "is given twice"),
        (["combine", "--adapter", lora, "--adapter", gone, *out], "if these are one model, give"),
        (["combine", "--adapter", lora, "--how", "tise", *out], "did you mean 'ties'?"),
        (["convert", "--rank", "2", *out], "give one of --adapter DIR, --from TUNED"),
        (["convert", "--rank", "2", "--from", base, *out], "give --base MODEL"),
        (["convert", "--rank", "x", "--adapter", lora, *out], "invalid int value: 'x'"),
    ):
        status, printed, err = run(capsys, *argv)
        assert status == 2, argv
        assert err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()
    tensors = load_file(f"{lora}/adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), f"{other}/adapter_model.safetensors")
    assert run(capsys, "merge", "--adapter", other, *out)[0] == 2


# --- of a language model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """(the folder of a tiny llama, {rank: that of a LoRA on it})"""
    base = tiny_dialogs.model(tmp_path_factory.mktemp("llama"))
    model = models.find(str(base))
    params = weights.load(model, jax.random.key(0)).params
    about = {"base": str(base), "fingerprint": weights.fingerprint(model), "labels": None}
    made = {}
    for rank, targets in ((3, ("q_proj", "mlp.down")), (2, ("q_proj",))):
        lora = {"rank": rank, "alpha": 7.0, "targets": targets}
        trained = Trained(model, params, {"lora": lora}, size=0.1)
        made[rank] = str(trained.write(tmp_path_factory.mktemp("adapter"), **about))
        style = writing.Beside(models.tokenizer(model), chat.Style("plain", " "))
        style.save_pretrained(made[rank])
    return base, made


def test_adapters_of_a_language_model(capsys, spoken, tmp_path):
    base, lora = spoken
    merged, back, cut, both = (tmp_path / name for name in ("merged", "back", "cut", "both"))
    out = succeed(capsys, "show", lora[3])
    assert re.search(r"head +its base's", out) and re.search(r"task_type +CAUSAL_LM", out)
    assert "model.layers.{}.self_attn.q_proj" in row_of(out, "q_proj")
    out = succeed(capsys, "merge", "--adapter", lora[3], "--output", merged)
    assert float(re.search(r"relative (\S+)", out)[1]) < 1e-5
    settings = json.loads((merged / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((merged / writing.STYLE).read_text())["template"] == "plain"
    undo = ("merge", "--undo", "--adapter", lora[3], "--base", merged, "--output", back)
    assert float(re.search(r"differ by (\S+) ", succeed(capsys, *undo))[1]) < 1e-6
    found, want = load_file(back / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(found[name], want[name], atol=1e-6)
    tuned = ("convert", "--rank", 3, "--from", merged, "--base", base, "--output", cut)
    out = succeed(capsys, *tuned)
    assert float(re.search(r"relative error (\S+) against", out)[1]) < 1e-5
    assert files.card(cut).task_type == "CAUSAL_LM"
    assert json.loads((cut / writing.STYLE).read_text())["template"] == "plain"
    config = files.Path(lora[2]) / files.CONFIG  # PEFT's need not say what they are for
    config.write_text(config.read_text().replace('"CAUSAL_LM"', "null"))
    added = ("--adapter", f"{lora[3]}:0.5", "--adapter", f"{lora[2]}:2", "--output", both)
    out = succeed(capsys, "combine", "--how", "cat", *added)
    assert float(re.search(r"relative error (\S+) against", out)[1]) < 1e-6
    q, a = "base_model.model.model.layers.0.self_attn.q_proj", "lora_A.weight"
    assert len(load_file(both / "adapter_model.safetensors")[f"{q}.{a}"]) == 5
