"""Models of transformers for the parity tests: random, in which every part matters, and saved."""

import copy

import butterfly
import numpy as np
import peft as hf
import torch
import transformers

butterfly.install()
SIZES = {"vocab_size": 53, "max_position_embeddings": 22, "num_labels": 5}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "type_vocab_size": 2,
    **SIZES,
}
CONFIGS = {
    "bert": transformers.BertConfig(**BERT),
    "roberta": transformers.RobertaConfig(**BERT | {"type_vocab_size": 1}, layer_norm_eps=1e-5),
    "xlm-roberta": transformers.XLMRobertaConfig(**BERT, layer_norm_eps=1e-5),
    "camembert": transformers.CamembertConfig(**BERT, layer_norm_eps=1e-5),
    "distilbert": transformers.DistilBertConfig(
        dim=24, n_layers=3, n_heads=4, hidden_dim=40, **SIZES
    ),
}
FAMILIES = ("bert", "roberta", "distilbert")


def random_model(config, kind=transformers.AutoModelForSequenceClassification, seed=0):
    config = copy.deepcopy(config)  # a model writes its dtype into it, which other tests would load
    model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            one = "norm" in name.lower() and name.endswith("weight")
            weight.copy_(torch.tensor(rng.normal(0, 0.2, weight.shape) + one))
    return model.eval()


def logits(model, batch):
    """float32 [n, outputs] of a padded batch (NumPy)."""
    batch = {key: torch.tensor(np.asarray(value)) for key, value in batch.items()}
    if model.config.model_type == "distilbert":
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**batch).logits.numpy()


def trained_by_peft(base, config, batch, outputs=5, steps=4):
    """Some of PEFT's own training steps, so that nothing is as it started."""
    torch.manual_seed(0)
    model = hf.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    batch = {key: torch.tensor(np.asarray(value)) for key, value in batch.items()}
    if base.config.model_type == "distilbert":
        del batch["token_type_ids"]
    labels = torch.arange(len(batch["input_ids"])) % outputs
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()
