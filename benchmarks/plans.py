"""The plans of the ready configs, benchmarks/plans/NAME.txt, made anew; and the counts checked.

    ./run.sh -m pip install -r requirements-tpu.txt
    ./run.sh benchmarks/plans.py [NAME ...]

Of each model only a config.json is needed, and written here as its makers publish it; the weights
are nowhere. A plan's compile time is that of this machine. `counts` is no plan but a table,
counts.txt: operations by formula against the compiler's own count on two layers that are unrolled
(which it counts whole); what an all-reduce of gradients carries against what moves; and how long 80
layers take to compile against two.
"""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from bmft import abstract, errors, operations, plan, topology
from bmft.config import read

FOLDER = Path(__file__).resolve().parent / "plans"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 1,
}


def llama(layers, width, mlp, heads):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp}
    return LLAMA | sizes | {"num_attention_heads": heads}


MODELS = {
    "Meta-Llama-3-8B-Instruct": llama(32, 4096, 14336, 32),
    "Meta-Llama-3-70B-Instruct": llama(80, 8192, 28672, 64),
    "vit-large-patch16-224-in21k": VIT,
    "roberta-large": ROBERTA,
    "two-layers": llama(2, 2048, 8192, 16),
    "eighty-layers": llama(80, 2048, 8192, 16),
}
CONFIG = "configs/tpu_slices.py"
QLORA = "configs/large_lora.py"
# name: (config, model, topology, further arguments)
PLANS = {
    "llama3_8b-v5e-16": (f"{CONFIG}:llama3_8b", "Meta-Llama-3-8B-Instruct", "v5e:4x4", ()),
    "llama3_8b-nf4-v5e-16": (f"{QLORA}:llama3_8b", "Meta-Llama-3-8B-Instruct", "v5e:4x4", ()),
    "llama3_70b-v6e-64": (f"{CONFIG}:llama3_70b", "Meta-Llama-3-70B-Instruct", "v6e:8x8", ()),
    "llama3_70b-v5e-128": (f"{CONFIG}:llama3_70b_v5e", "Meta-Llama-3-70B-Instruct", "v5e:8x16", ()),
    "vit_large-v5e-8": (
        f"{CONFIG}:vit_large",
        "vit-large-patch16-224-in21k",
        "v5e:2x4",
        ("--classes=10",),
    ),
    "roberta_large-mnli-v5e-8": (f"{CONFIG}:roberta_large_mnli", "roberta-large", "v5e:2x4", ()),
    "llama3_8b-h100x8": (
        f"{CONFIG}:llama3_8b",
        "Meta-Llama-3-8B-Instruct",
        "h100x8",
        ("--config.mesh.fsdp=8",),
    ),
}
EXAMPLES = 10_000  # of an epoch, where the config's data are the user's own


def main(argv):
    parser = errors.Parser("plans.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PLANS)}, counts")
    names = parser.parse_args(argv).names or [*PLANS, "counts"]
    for name in names:
        if name not in (*PLANS, "counts"):
            raise errors.Mistake(f"no plan {name!r}; {errors.nearest(name, [*PLANS, 'counts'])}")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for model, settings in MODELS.items():
            Path(model).mkdir()
            Path(model, "config.json").write_text(json.dumps(settings))
        for name in names:
            text = counts() if name == "counts" else made(*PLANS[name])
            (FOLDER / f"{name}.txt").write_text(text)
            print(text, flush=True)


def made(config, model, where, more):
    """What the command prints, below the command."""
    argv = [f"--config={config}", f"--config.model.name=./{model}", f"--topology={where}"]
    argv += [f"--examples={EXAMPLES}", *more]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        plan.main(argv)
    return f"$ ./run.sh -m bmft.plan {' '.join(argv)}\n\n{output.getvalue()}"


# --- counts ----------------------------------------------------------------------------------


def counts():
    """The table `counts`."""
    formula, compiler = two_layers()
    moving, reduced = gradients()
    few, many = (compile_seconds(f"./{name}-layers") for name in ("two", "eighty"))
    rows = (
        ("operations of a step, two layers, unrolled", "formula", "compiler", "ratio"),
        ("", f"{formula:.5g}", f"{compiler:.5g}", f"{formula / compiler:.4f}"),
        ("bytes, LoRA on a mesh of 16x1x1", "moving leaves", "all-reduced", "ratio"),
        ("", f"{moving:,.0f}", f"{reduced:,.0f}", f"{reduced / moving:.4f}"),
        ("seconds to compile", "2 layers", "80 layers", "ratio"),
        ("", f"{few:.1f}", f"{many:.1f}", f"{many / few:.2f}"),
    )
    return "\n".join(f"{a:<44} {b:>15} {c:>15} {d:>8}" for a, b, c, d in rows) + "\n"


def arguments(model, *more):
    argv = [f"--config={CONFIG}:llama3_8b", f"--config.model.name={model}"]
    argv += ["--config.train.steps=100", "--config.data.max_length=512", *more]
    return read(argv, None, abstract.groups).config


def two_layers():
    """(operations by formula, by the compiler) on one chip: products and all else, as it counts."""
    chip = ["--config.mesh.fsdp=1", "--config.train.batch_size=4", "--config.model.unroll=2"]
    # Its count of the head's loop is of one turn: one chunk holds all tokens of this batch.
    where = topology.find("v5e:1x1")
    config = arguments("./two-layers", *chip, "--config.model.remat=none")
    found = abstract.find(config, where.mesh(config), where.platform)
    found = abstract.with_module(found, chunk=4 * 512)
    step, shapes = found.program()
    traced = step.trace(*shapes)
    compiled = traced.lower().compile()
    return operations.count(traced.jaxpr).total, compiled.cost_analysis()["flops"]


def gradients():
    """(bytes of the moving leaves, bytes that are all-reduced in a step) with the batch split."""
    mesh = ["--config.mesh.data=16", "--config.mesh.fsdp=1"]
    where = topology.find("v5e:4x4")
    found = plan.make(arguments("./two-layers", *mesh), where, abstract.Told())
    sums = {one["kind"]: one["bytes"] for one in found["collectives"]}
    return found["arguments"]["moving"], sums["all-reduce"]


def compile_seconds(model):
    where = topology.find("v5e:4x4")
    return plan.make(arguments(model), where, abstract.Told())["seconds"]["compiling"]


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    raise SystemExit(errors.command(main))
