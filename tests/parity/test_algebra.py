"""Combinations, and several adapters in one batch, against Hugging Face PEFT 0.21.2."""

import json
import warnings

import examples
import hugging
import jax
import numpy as np
import peft as hf
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from trained import Trained

from bmft import models, peft, tree
from bmft.models import weights
from bmft.peft import combining, converting, files, several, updates

LENGTHS = (13, 3, 8, 10)
LORA = {"rank": 3, "alpha": 7.0, "targets": ("query", "mlp.down")}
OTHER = {"rank": 3, "alpha": 4.0, "targets": ("query", "mlp.up"), "rslora": True}
WEIGHTS = (0.7, -0.4)
HOWS = [
    {"how": "linear"},
    {"how": "cat"},
    {"how": "svd", "rank": 2},
    {"how": "svd"},
    {"how": "ties", "density": 0.4},
    {"how": "ties", "density": 0.6, "sign": "frequency"},
    {"how": "ties_svd", "density": 0.3, "rank": 4},
    {"how": "magnitude_prune", "density": 0.5},
    {"how": "magnitude_prune_svd", "density": 0.5, "rank": 5},
    {"how": "dare_linear", "density": 1.0},
    {"how": "dare_ties_svd", "density": 1.0},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, model, variables)"""
    folder = tmp_path_factory.mktemp("bert")
    hugging.random_model(hugging.CONFIGS["bert"]).save_pretrained(folder)
    model = models.find(str(folder), outputs=5)
    return folder, model, weights.load(model, jax.random.key(0)).variables()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Directories of adapters, no two leaves alike."""
    found = {}
    for number, (name, groups) in enumerate(
        {
            "a": {"lora": LORA},
            "b": {"lora": OTHER},
            "low": {"lora": LORA | {"rank": 2}},
            "factors": {"ia3": {"targets": ("key", "mlp.down"), "feedforward": ("mlp.down",)}},
            "others": {"ia3": {"targets": ("key", "mlp.down"), "feedforward": ("mlp.down",)}},
        }.items()
    ):
        trained = Trained(base[1], base[2]["params"], groups, size=0.1)
        rng = np.random.default_rng(number)
        trained.moving = jax.tree.map(
            lambda leaf, rng=rng: leaf * (1 + rng.normal(0, 0.5, leaf.shape)), trained.moving
        )
        found[name] = trained.write(tmp_path_factory.mktemp("adapters") / name)
    return found


def without_head(folder, to):
    """The adapter alone: PEFT refuses to combine what is trained whole."""
    to.mkdir(parents=True)
    fields = json.loads((folder / files.CONFIG).read_text())
    fields |= {"task_type": None, "modules_to_save": None}
    (to / files.CONFIG).write_text(json.dumps(fields))
    tensors = load_file(folder / files.TENSORS)
    save_file({k: t for k, t in tensors.items() if "lora" in k}, to / files.TENSORS)
    return to


def in_peft(folder, adapters):
    auto = transformers.AutoModelForSequenceClassification
    names = list(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = auto.from_pretrained(folder).eval()
        model = hf.PeftModel.from_pretrained(plain, adapters[names[0]], names[0])
        for name in names[1:]:
            model.load_adapter(adapters[name], name)
    return model.eval()


@pytest.mark.parametrize("options", HOWS, ids=lambda options: "-".join(map(str, options.values())))
def test_combinations(base, folders, tmp_path, options):
    two = {name: folders[name] for name in "ab"}
    model = in_peft(base[0], {name: without_head(d, tmp_path / name) for name, d in two.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0 is")
        model.add_weighted_adapter(
            list(two),
            list(WEIGHTS),
            "both",
            combination_type=options["how"],
            svd_rank=options.get("rank"),
            density=options.get("density"),
            majority_sign_method=options.get("sign", "total"),
        )
    adapters = {name: files.read(folder, base[1]) for name, folder in two.items()}
    ours = combining.combine(adapters, WEIGHTS, base[1], heads="first", **options)
    seen, wrong, norms = 0, 0.0, 0.0
    for (path, layer), part in updates.of(ours.adapter, "ours").items():
        name = "base_model.model." + base[1].names.called(path, layer)[1]
        module = model.get_submodule(name)
        delta = module.get_delta_weight("both").detach().numpy().T
        np.testing.assert_allclose(updates.dense(part)[0], delta, atol=1e-5, err_msg=name)
        pairs = zip(two, WEIGHTS, strict=True)
        exact = [
            weight * module.get_delta_weight(one).detach().numpy().T
            for one, weight in pairs
            if one in module.lora_A
        ]
        norms += np.square(sum(exact)).sum()
        wrong += np.square(delta - sum(exact)).sum()
        seen += 1
    layers = [m for m in model.modules() if isinstance(m, hf.tuners.lora.LoraLayer)]
    assert seen == len(layers) == 9
    assert ours.error == pytest.approx(np.sqrt(wrong / norms), abs=1e-5)


def test_a_mixed_batch(base, folders):
    """PEFT's adapter_names: each example's LoRA, of ranks unlike, and head; packed, and one a row.

    PEFT has no IA3 there, and fails where one adapter trains a module whole and another does not.
    """
    _, model, variables = base
    names = ["a", "low", "b"]
    theirs = in_peft(base[0], {name: folders[name] for name in names})
    chosen = examples.tokens(LENGTHS, 53, model.config.types)
    batch = {k: torch.tensor(v) for k, v in examples.padded(chosen, model.config.pad_id).items()}
    with torch.no_grad():
        each = ["low", "__base__", "b", "a"]
        want = theirs(**batch, adapter_names=each).logits.numpy()
    adapters = {name: files.read(folders[name], model) for name in names}
    found = several.attach(adapters, model, variables)
    index = [found.index(None if name == "__base__" else name) for name in each]
    both = examples.both(chosen)
    numbers = np.zeros_like(both["first"])
    numbers[0], numbers[1:, 0] = index, index
    got = jax.jit(found.apply)(found.variables, both | {"adapters": numbers})
    for ours in examples.of_both(np.asarray(got)):
        np.testing.assert_allclose(ours, want, atol=1e-5)
    plain = peft.attach((), model).apply(variables, examples.packed(chosen))[0]
    assert (np.abs(want - plain).max(1) > 0.05).tolist() == [True, False, True, True]


@pytest.mark.parametrize("names", [("a", "b"), ("factors", "others")])
def test_switching(base, folders, names):
    _, model, variables = base
    theirs = in_peft(base[0], {name: folders[name] for name in names})
    chosen = examples.tokens(LENGTHS, 53, model.config.types)
    padded, packed = examples.padded(chosen, model.config.pad_id), examples.packed(chosen)
    adapters = {name: files.read(folders[name], model) for name in names}
    found = several.attach(adapters, model, variables)
    apply, seen = jax.jit(found.apply), []
    for name in names:
        theirs.set_adapter(name)
        seen.append(apply(found.variables, found.choose(packed, name))[0])
        np.testing.assert_allclose(seen[-1], hugging.logits(theirs, padded), atol=1e-5)
    assert apply._cache_size() == 1
    assert np.abs(seen[0] - seen[1]).max() > 0.05


def test_a_tuned_model_as_lora_read_by_peft(base, tmp_path):
    """Kernels as LoRA of full rank; biases, norms and embeddings as they are: the same logits."""
    folder, model, variables = base
    tuned = Trained(model, variables["params"], {"full": {}}, size=0.05).variables["params"]
    before, after = (
        {path: np.asarray(leaf, np.float32) for path, leaf in tree.flatten(params).items()}
        for params in (variables["params"], tuned)
    )
    made = converting.to_lora(before, after, model, 24).adapter
    updates.write(tmp_path / "lora", made, model, base="tiny", fingerprint="f" * 64)
    theirs = in_peft(folder, {"default": tmp_path / "lora"})
    chosen = examples.tokens(LENGTHS, 53, model.config.types)
    padded, packed = examples.padded(chosen, model.config.pad_id), examples.packed(chosen)
    want = jax.jit(peft.attach((), model).apply)({"params": tuned}, packed)[0]
    np.testing.assert_allclose(hugging.logits(theirs, padded), want, atol=2e-5)
