"""Makes what tests/test_adapterhub.py compares with, and lets AdapterHub read what we write.

AdapterHub's package needs another transformers than the rest of this repository, so it has an
environment of its own:

    python3.11 -m venv ENV
    ENV/bin/pip install adapters==1.3.0 transformers==4.57.6 torch==2.13.0

    ENV/bin/python tests/goldens/make_adapterhub.py make         the goldens
    python tests/goldens/make_adapterhub.py write DIR            what we write, and our logits of it
    ENV/bin/python tests/goldens/make_adapterhub.py check DIR    the package's logits of that

`make` trains adapters on the tiny models of make_goldens.py, of which the RoBERTa is the
XLM-RoBERTa, too; `check` fails where one of its logits is not ours to 1e-5.
"""

import json
import pathlib
import shutil
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

import examples  # noqa: E402

LENGTHS, OUTPUTS = (13, 5, 9, 2), 5
TYPES = {"bert": 2, "roberta": 2, "xlm-roberta": 2, "distilbert": 0}
PADDING = {"bert": 0, "roberta": 1, "xlm-roberta": 1, "distilbert": 0}
# AdapterModel's heads of the same function as ours; a class of transformers has its own, STATIC.
STATIC, POOLED = None, {"layers": 1, "activation_function": None, "use_pooler": True}
TANH, RELU = ({"layers": 2, "activation_function": name} for name in ("tanh", "relu"))
GELU = {"non_linearity": "Gelu_New"}  # the package takes any case
# name, which begins with the family -> (config, its arguments, head)
TRAINED = {
    "bert-double_seq_bn": ("DoubleSeqBnConfig", {"reduction_factor": 5}, STATIC),
    "bert-seq_bn": ("SeqBnConfig", {"reduction_factor": {"1": 7, "default": 7.5}}, TANH),
    "bert-par_bn": ("ParBnConfig", {"dropout": 0.1}, POOLED),
    "bert-left_out": ("SeqBnConfig", {"leave_out": [1], "reduction_factor": 4.0} | GELU, STATIC),
    "roberta-double_seq_bn": ("DoubleSeqBnConfig", {"scaling": 2.5, "reduction_factor": 5}, TANH),
    "roberta-par_bn": ("ParBnConfig", {"non_linearity": "gelu"}, STATIC),
    "distilbert-double_seq_bn": (
        "DoubleSeqBnConfig",
        {"non_linearity": "tanh", "reduction_factor": 6},
        STATIC,
    ),
    "distilbert-seq_bn": ("SeqBnConfig", {"reduction_factor": 0.5 * 16}, RELU),
    "distilbert-par_bn": ("ParBnConfig", {"leave_out": [0]}, STATIC),
    "xlm-roberta-seq_bn": ("SeqBnConfig", {"reduction_factor": 6, "leave_out": [2]}, STATIC),
    "xlm-roberta-double_seq_bn": ("DoubleSeqBnConfig", {"reduction_factor": 7}, TANH),
}
HOULSBY = {"kind": "houlsby", "norms": False}
# name -> (group of our method, base paths that move as if no file had them)
WRITTEN = {
    "bert-houlsby": (HOULSBY | {"reduction": 5, "nonlinearity": "gelu_new"}, ()),
    "bert-pfeiffer": ({"kind": "pfeiffer", "leave_out": (0, 2)}, ()),
    "bert-pooler": ({"kind": "parallel"}, ("pooler/kernel", "pooler/bias")),
    "roberta-houlsby": (HOULSBY | {"scaling": 0.5}, ()),
    "roberta-parallel": ({"kind": "parallel", "leave_out": (1,)}, ()),
    "distilbert-houlsby": (HOULSBY | {"nonlinearity": "swish"}, ()),
    "distilbert-pfeiffer": ({"kind": "pfeiffer", "reduction": 100}, ()),
    "distilbert-parallel": ({"kind": "parallel", "reduction": 3, "init": "bert"}, ()),
    "xlm-roberta-houlsby": (HOULSBY | {"reduction": 4}, ()),
    "xlm-roberta-parallel": ({"kind": "parallel", "reduction": 5}, ()),
}


def tokens(family):
    return examples.tokens(LENGTHS, 50, TYPES[family])


def family_of(name):
    return name.rpartition("-")[0]


# --- AdapterHub's side -----------------------------------------------------------------------


def batch_of(family):
    import torch

    batch = examples.padded(tokens(family), PADDING[family])
    if family == "distilbert":
        del batch["token_type_ids"]
    return {key: torch.tensor(value) for key, value in batch.items()}


def base_of(family, flexible):
    """The tiny model, as transformers' classifier or as AdapterHub's with heads to choose."""
    import adapters
    import torch
    import transformers

    if flexible:
        model = adapters.AutoAdapterModel.from_pretrained(FOLDER / family, dtype=torch.float32)
        for head in list(model.heads):
            model.delete_head(head)
        return model
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(FOLDER / family, dtype=torch.float32)
    adapters.init(model)
    return model


def logits_of(model, family):
    import torch

    with torch.no_grad():
        return model.eval()(**batch_of(family)).logits.numpy()


def train(name, config, settings, head):
    """Some steps of training, saved; the logits after them."""
    import adapters
    import torch

    torch.manual_seed(0)
    family = family_of(name)
    model = base_of(family, head is not STATIC)
    model.add_adapter("golden", config=getattr(adapters, config)(**settings))
    if head is not STATIC:
        names = {i: f"class {i}" for i in range(OUTPUTS)}
        model.add_classification_head("golden", num_labels=OUTPUTS, id2label=names, **head)
    model.train_adapter("golden")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch_of(family), labels=torch.tensor([0, 4, 2, 1])).loss.backward()
        optimizer.step()
    folder = FOLDER / "adapterhub" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_adapter(str(folder), "golden", use_safetensors=True)
    for file in folder.glob("*_config.json"):  # the path of the model on this machine
        fields = json.loads(file.read_text()) | {"model_name": f"tests/goldens/{family}"}
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    still = [key for key, p in model.named_parameters() if p.requires_grad and not p.any()]
    assert not still, f"{name}: nothing was learnt in {still}"
    return logits_of(model, family)


def make_xlm_roberta():
    """The tiny RoBERTa as an XLM-RoBERTa: they are one architecture."""
    folder, weights = FOLDER / "xlm-roberta", "model.safetensors"
    folder.mkdir(exist_ok=True)
    fields = json.loads((FOLDER / "roberta" / "config.json").read_text())
    named = {"architectures": ["XLMRobertaForSequenceClassification"], "model_type": folder.name}
    (folder / "config.json").write_text(json.dumps(fields | named, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(FOLDER / "roberta" / weights, folder / weights)


def make():
    make_xlm_roberta()
    logits = {name: train(name, *case) for name, case in TRAINED.items()}
    np.savez(FOLDER / "adapterhub.npz", **logits)


def load(folder, flexible):
    """The package's logits of an adapter directory; every tensor of it is loaded and used."""
    family, loading = family_of(folder.name), {}
    model = base_of(family, flexible)
    about = {"loading_info": loading, "use_safetensors": True, "set_active": True}
    name = model.load_adapter(str(folder), load_as="ours" if flexible else None, **about)
    assert not any(loading.values()), f"{folder}: {loading}"
    if flexible:
        assert model.active_head == name == "ours", f"{folder}: the head was not loaded"
    return logits_of(model, family)


def check(folder):
    wanted = np.load(folder / "logits.npz")
    for name in WRITTEN:
        head = json.loads((folder / name / "head_config.json").read_text())
        for flexible in (False, True):
            if flexible or head["model_class"].endswith("ForSequenceClassification"):
                worst = abs(load(folder / name, flexible) - wanted[name]).max()
                how = "AdapterModel" if flexible else head["model_class"]
                print(f"{name:<24} {how:<40} logits differ by {worst:.1e}")
                assert worst < 1e-5


# --- ours ------------------------------------------------------------------------------------


def write(folder):
    import jax
    from trained import Trained

    from bmft import models, peft, tree
    from bmft.models import weights
    from bmft.peft import adapterhub, files

    logits = {}
    for name, (group, fresh) in WRITTEN.items():
        family = family_of(name)
        model = models.find(str(FOLDER / family), outputs=OUTPUTS)
        base = weights.load(model, jax.random.key(0)).variables()
        trained = Trained(model, base["params"], {"adapter": group}, fresh)
        flat = tree.flatten(trained.moving)
        adapter = files.Adapter(
            trained.methods, ("adapter",), trained.groups, flat, {}, tuple("abcde"), None, {}
        )
        about = {"base": f"tests/goldens/{family}", "fingerprint": weights.fingerprint(model)}
        adapterhub.write(folder / name, adapter, model, **about)
        apply = jax.jit(peft.attach(trained.methods, model).apply)
        both = apply(trained.variables, examples.both(tokens(family)))
        logits[name] = examples.of_both(np.asarray(both))[1]
    np.savez(folder / "logits.npz", **logits)


if __name__ == "__main__":
    mode, *where = sys.argv[1:]
    {"make": make, "write": write, "check": check}[mode](*map(pathlib.Path, where))
