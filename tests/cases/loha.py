from cases import Case

# 24 and 40 wide: rank 2 is computed with the products of columns, rank 4 by the whole matrix.
SETTINGS = [
    {"rank": 2, "alpha": 7.0, "targets": ("query", "mlp.up", "pooler")},
    {
        "rank": 3,
        "alpha": 5.0,
        "targets": ("attention.output", "mlp.down"),
        "rank_pattern": ("layer.1.*=5",),
        "alpha_pattern": ("mlp.down=9",),
        "layers_to_transform": (1, 2),
        "modules_to_save": ("pooler",),
    },
]
CASES = {
    "loha": Case(
        "LoHaConfig",
        {
            "r": 2,
            "alpha": 7,
            "target_modules": ["query", "intermediate.dense"],
            "rank_dropout": 0.1,
            "module_dropout": 0.1,
        },
        {"rank": 2, "alpha": 7.0, "targets": ("query", "mlp.up")},
    ),
    "loha_patterns": Case(
        "LoHaConfig",
        {
            "r": 3,
            "alpha": 5,
            "target_modules": ["value", "output.dense"],
            "rank_pattern": {"layer.1.*": 5},
            "alpha_pattern": {"value": 9},
        },
        {
            "rank": 3,
            "alpha": 5.0,
            "targets": ("value", "mlp.down"),
            "rank_pattern": ("layer.1.*=5",),
            "alpha_pattern": ("value=9",),
            "layers_to_transform": (0, 1),
        },
        families=("bert",),
    ),
}
