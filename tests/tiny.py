"""Tiny models in Hugging Face directories, and batches for them: what the tests run on.

Dimensions are unlike one another wherever the architecture lets them, so that no transposed or
mixed-up axis goes unnoticed.
"""

import functools
import importlib.metadata
import json

import jax
import numpy as np
import tokenizers
import transformers
from safetensors.numpy import save_file

from bmft import models, names, peft, tree
from bmft.models import weights

FAMILIES = ("bert", "roberta", "distilbert")
OUTPUTS = 5
# Most of the time of the tests goes into compiling programs that run a few times. XLA of jax 0.10
# can do it 2.5 times as quickly, but then rounds otherwise from program to program: not for outputs
# that are compared to the bit. Later ones refuse the option.
IN_HASTE = {"xla_llvm_disable_expensive_passes": True}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    IN_HASTE["xla_cpu_use_fusion_emitters"] = False


def hasty(function, **options):
    """The function jitted, where a tolerance is what results are compared with."""
    return jax.jit(function, compiler_options=IN_HASTE, **options)


def config_json(family, **changes):
    """A config.json (dict) of a tiny model, without dropout."""
    if family == "distilbert":
        sizes = {
            "vocab_size": 53,
            "dim": 24,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 40,
            "max_position_embeddings": 22,
            "activation": "gelu",
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        }
    else:
        sizes = {
            "vocab_size": 53,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "hidden_act": "gelu",
            "max_position_embeddings": 22,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-5,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 1 if family == "roberta" else 0,
        }
    return {"model_type": family, "initializer_range": 0.02, **sizes, **changes}


def directory(folder, family="bert", seed=0, **changes):
    """A model directory with random weights of a size that makes every part matter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(family, **changes)))
    model = models.find(str(folder), outputs=OUTPUTS)
    rng, shapes = np.random.default_rng(seed), tree.flatten(weights.shapes(model))
    tensors = {}
    for leaf in model.names.leaves:
        for layer in model.names.layers_of(leaf.path):
            shape = shapes[leaf.path].shape[0 if layer is None else 1 :]
            array = rng.normal(0, 0.2, shape) + leaf.path.endswith("scale")
            array = names.to_file(leaf.layout, array)
            name = model.names.written(leaf).format(layer)
            tensors[name] = np.ascontiguousarray(array, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def batch(rows=4, tokens=20, examples=3, seed=0, outputs=OUTPUTS, virtual=()):
    """A packed batch: `examples` segments of different lengths a row, and some padding. virtual:
    ids of the virtual tokens that each begins with, in columns that are added for them."""
    rng = np.random.default_rng(seed)
    shape = rows, tokens + examples * len(virtual)
    segments, positions, before = np.zeros((3, *shape), np.int32)
    first = np.zeros((rows, examples), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(2, tokens), examples, replace=False))
        for slot, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False)):
            start, end = start + slot * len(virtual), end + (slot + 1) * len(virtual)
            before[row, start : start + len(virtual)] = virtual
            segments[row, start:end] = slot + 1
            positions[row, start:end] = np.arange(end - start)
            first[row, slot] = start
    real = segments > 0
    weights = np.ones((rows, examples), np.float32)
    weights[-1, -1] = 0.0
    words, types = rng.integers(3, 53, shape), rng.integers(0, 2, shape)
    words, types = (np.where(real, array, 0).astype(np.int32) for array in (words, types))
    return {
        "input_ids": np.where(before > 0, before, words),
        "token_types": np.where(before > 0, 0, types),
        "segments": segments,
        "positions": positions,
        "first": first,
        "labels": rng.integers(0, outputs, (rows, examples)).astype(np.int32),
        "weights": weights,
    }


@functools.partial(hasty, static_argnums=0)
def plain(module, params, batch):
    """Outputs of a model without methods: one program for all tests of it."""
    return module.apply({"params": params}, batch)


def loss(forward, batch, key):
    """Cross-entropy as (sum, weight), {} of a batch."""
    logits = jax.nn.log_softmax(forward(batch, train=True))
    picked = jax.nn.one_hot(batch["labels"], logits.shape[-1])
    each = -(logits * picked).sum(-1)
    return ((each * batch["weights"]).sum(), batch["weights"].sum()), {}


class Fitted:
    """A tiny model with methods in it: what an experiment builds, in short."""

    def __init__(self, folder, methods, groups=None, **find):
        self.model = models.find(str(folder), outputs=OUTPUTS, **find)
        self.groups = groups or {}
        self.methods = peft.build(self.model, tuple(methods), self.groups)
        self.loaded = weights.load(self.model, jax.random.key(0))
        self.add, apply = peft.attach(self.methods, self.model)
        self._apply, self._quick = apply, hasty(apply, static_argnames=("train", "adapter"))
        added = hasty(self.add)(jax.random.key(1), self.loaded.variables())
        self.variables = self.loaded.variables() | added
        paths = [path for path in tree.flatten(self.variables) if peft.may_move(path)]
        self.claims = peft.claims(
            self.methods, paths, heads=self.model.heads, fresh=self.loaded.fresh
        )
        self.moving, self.frozen = tree.split(self.variables, lambda path: path in self.claims)

    def apply(self, variables, batch, **how):
        """Outputs; compiled in haste, but inside of another program as that one is."""
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((variables, batch)))
        return (self._apply if traced else self._quick)(variables, batch, **how)

    def batch(self):
        """A batch with the virtual tokens of the methods."""
        return batch(virtual=peft.virtual_ids(self.methods, self.model))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", *(f"w{i}" for i in range(47))]


def tokenizer(folder):
    """A tokenizer of one word a token, beside a model's weights."""
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    fast.save_pretrained(folder)
    return folder


def texts(count, seed):
    """(text, label) of texts in which one word says the label."""
    rng = np.random.default_rng(seed)
    for label in rng.integers(0, 2, count):
        words = [f"w{i}" for i in rng.integers(0, 47, rng.integers(1, 9))]
        words.insert(rng.integers(0, len(words) + 1), ["bad", "good"][label])
        yield " ".join(words), ["neg", "pos"][label]


def data(folder):
    """--config.data.* of files with such texts."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--config.data.name=files", "--config.data.max_length=20"]
    for number, (split, count) in enumerate((("train", 96), ("validation", 40), ("test", 21))):
        rows = [f"{text}\t{label}\n" for text, label in texts(count, number)]
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "".join(rows))
        arguments.append(f"--config.data.{split}={folder / split}.tsv")
    return arguments
