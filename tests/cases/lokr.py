from cases import Case

# 24 = 4 x 6, 40 = 5 x 8: a matrix of 6 x 6 stands whole from rank 3 on, one of 6 x 8 from rank 4.
SETTINGS = [
    {"rank": 3, "alpha": 7.0, "targets": ("query", "mlp.up", "pooler")},
    {
        "rank": 1,
        "alpha": 5.0,
        "decompose_both": True,
        "targets": ("attention.output", "mlp.down"),
        "rank_pattern": ("layer.1.*=2", "layer.2.*=9"),
        "alpha_pattern": ("mlp.down=9",),
        "layers_to_transform": (1, 2),
        "modules_to_save": ("pooler",),
    },
]
CASES = {
    "lokr_whole": Case(
        "LoKrConfig",
        {"r": 5, "alpha": 7, "target_modules": ["query", "intermediate.dense"]},
        {"rank": 5, "alpha": 7.0, "targets": ("query", "mlp.up")},
    ),
    "lokr_factored": Case(
        "LoKrConfig",
        {
            "r": 2,
            "alpha": 7,
            "target_modules": ["value", "output.dense"],
            "decompose_factor": 8,
            "rank_dropout": 0.1,
            "rank_dropout_scale": True,
            "module_dropout": 0.1,
        },
        {"rank": 2, "alpha": 7.0, "targets": ("value", "mlp.down"), "decompose_factor": 8},
    ),
    "lokr_both": Case(
        "LoKrConfig",
        {
            "r": 1,
            "alpha": 3,
            "target_modules": ["key", "intermediate.dense", "output.dense"],
            "decompose_both": True,
            "init_weights": "lycoris",
        },
        {
            "rank": 1,
            "alpha": 3.0,
            "targets": ("key", "mlp.up", "mlp.down"),
            "decompose_both": True,
        },
    ),
    # In a stack, some layers are factored, others not.
    "lokr_patterns": Case(
        "LoKrConfig",
        {
            "r": 1,
            "alpha": 3,
            "target_modules": ["query", "output.dense"],
            "decompose_both": True,
            "rank_pattern": {"layer.1.*": 2, "layer.2.*": 9},
            "alpha_pattern": {"query": 5},
        },
        {
            "rank": 1,
            "alpha": 3.0,
            "targets": ("query", "mlp.down"),
            "decompose_both": True,
            "rank_pattern": ("layer.1.*=2", "layer.2.*=9"),
            "alpha_pattern": ("query=5",),
        },
        families=("bert",),
    ),
}
