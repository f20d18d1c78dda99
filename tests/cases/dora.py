from cases import Case
from cases.token_rows import MANY

SETTINGS = [
    {"rank": 3, "alpha": 7.0, "targets": ("all-linear",)},
    {
        "rank": 2,
        "alpha": 5.0,
        "rslora": True,
        "targets": ("query", "mlp.down"),
        "rank_pattern": ("layer.1.*query=4",),
        "layers_to_transform": (1, 2),
        "bias": "lora_only",
    },
]
CASES = {
    "dora": Case(
        "LoraConfig",
        {
            "use_dora": True,
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["query", "intermediate.dense", "output.dense"],
        },
        {"rank": 3, "alpha": 7.0, "targets": ("query", "up", "down")},
    ),
    "dora_patterns": Case(
        "LoraConfig",
        {
            "use_dora": True,
            "r": 3,
            "lora_alpha": 7,
            "lora_dropout": 0.2,
            "use_rslora": True,
            "bias": "lora_only",
            "target_modules": ["value", "intermediate.dense"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"layer.2.*": 5},
            "alpha_pattern": {"value": 2},
        },
        {
            "rank": 3,
            "alpha": 7.0,
            "rslora": True,
            "bias": "all",
            "targets": ("value", "up"),
            "layers_to_transform": (0, 2),
            "rank_pattern": ("layers.2.*up=5",),
            "alpha_pattern": ("value=2",),
        },
        families=("bert",),
    ),
    "dora_tokens": Case(
        "LoraConfig",
        {
            "use_dora": True,
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["value"],
            "trainable_token_indices": {"embeddings.word_embeddings": list(MANY)},
        },
        {"rank": 3, "alpha": 7.0, "targets": ("value",), "trainable_token_indices": MANY[::-1]},
        families=("bert",),
        golden=False,
    ),
}
