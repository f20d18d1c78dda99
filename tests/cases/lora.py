from cases import Case
from cases.token_rows import MANY

# alpha is unlike rank, and targets include layers that are not square; 24 wide, three layers.
SETTINGS = [
    {"rank": 3, "alpha": 7.0},
    {"rank": 3, "alpha": 7.0, "rslora": True, "targets": ("all-linear",)},
    {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("attention.output", "intermediate.dense"),
        "bias": "all",
        "trainable_token_indices": (9, 4, 50, 31),
    },
    {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("query", "mlp.down"),
        "rank_pattern": ("layer.1.*query=4",),
        "alpha_pattern": ("down=9",),
        "layers_to_transform": (1, 2),
        "bias": "lora_only",
        "modules_to_save": ("pooler",),
    },
    {"rank": 3, "alpha": 7.0, "targets": ("embeddings.word", "position_embeddings", "up")},
]
CASES = {
    "lora_embedding": Case(
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 7,
            "lora_dropout": 0.1,
            "target_modules": ["word_embeddings", "position_embeddings", "value"],
            "rank_pattern": {"word_embeddings": 5},
        },
        {
            "rank": 3,
            "alpha": 7.0,
            "targets": ("embeddings.word", "position", "value"),
            "alpha_pattern": ("word=4",),
        },
    ),
    "lora_tokens": Case(
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["query", "intermediate.dense"],
            "bias": "lora_only",
            "trainable_token_indices": list(MANY),
        },
        {
            "rank": 3,
            "alpha": 7.0,
            "targets": ("query", "up", "position"),
            "modules_to_save": ("embeddings.norm",),
            "trainable_token_indices": MANY,
        },
        families=("bert",),
        golden=False,
    ),
}
