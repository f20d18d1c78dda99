from cases import Case

SETTINGS = [
    {"rank": 7, "d_initial": 0.7, "targets": ("key", "mlp.up", "mlp.down", "pooler")},
    {
        "rank": 5,
        "d_initial": 2.0,
        "targets": ("query", "mlp.down"),
        "layers_to_transform": (0, 2),
        "bias": "vera_only",
        "modules_to_save": ("attention.output",),
    },
]
CASES = {
    # Modules of other sizes than the largest use a part of A and B.
    "vera": Case(
        "VeraConfig",
        {
            "r": 9,
            "d_initial": 0.5,
            "target_modules": ["query", "intermediate.dense", "output.dense"],
        },
        {"rank": 9, "targets": ("query", "mlp.up", "mlp.down"), "d_initial": 0.5},
    ),
    "vera_layers": Case(
        "VeraConfig",
        {
            "r": 4,
            "target_modules": ["key", "intermediate.dense"],
            "layers_to_transform": [0, 2],
            "modules_to_save": ["attention.output.dense"],
            "vera_dropout": 0.1,
            "bias": "vera_only",
        },
        {
            "rank": 4,
            "targets": ("key", "mlp.up"),
            "layers_to_transform": (0, 2),
            "modules_to_save": ("attention.output",),
            "dropout": 0.1,
            "bias": "all",
        },
        families=("bert",),
        golden=False,
    ),
    "vera_biases": Case(
        "VeraConfig",
        {"r": 4, "target_modules": ["value"], "bias": "all"},
        {"rank": 4, "targets": ("value", "down"), "bias": "vera_only"},
        families=("bert",),
        golden=False,
    ),
}
