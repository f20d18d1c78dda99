from cases import Case

SETTINGS = [
    {"n_frequency": 90, "scaling": 30.0, "targets": ("key", "mlp.up", "pooler")},
    {
        "n_frequency": 40,
        "scaling": 50.0,
        "targets": ("query", "mlp.down"),
        "n_frequency_pattern": ("layer.1.*query=110",),
        "layers_to_transform": (1, 2),
        "init_weights": True,
        "bias": "all",
    },
]
CASES = {
    "fourierft": Case(
        "FourierFTConfig",
        {
            "n_frequency": 70,
            "scaling": 40.0,
            "target_modules": ["query", "intermediate.dense", "output.dense"],
        },
        {"n_frequency": 70, "scaling": 40.0, "targets": ("query", "mlp.up", "mlp.down")},
    ),
    "fourierft_pattern": Case(
        "FourierFTConfig",
        {
            "n_frequency": 30,
            "scaling": 25.0,
            "random_loc_seed": 4,
            "target_modules": ["query", "intermediate.dense"],
            # PEFT's `query` fits all queries, though a whole name stands before it.
            "n_frequency_pattern": {
                "bert.encoder.layer.0.attention.self.query": 11,
                "query": 50,
                "1.intermediate.dense": 8,
            },
            "layers_to_transform": [0, 1],
            "bias": "fourier_only",
        },
        {
            "n_frequency": 30,
            "scaling": 25.0,
            "random_loc_seed": 4,
            "targets": ("query", "mlp.up"),
            "n_frequency_pattern": ("layers.0.*=12", "query=50"),
            "layers_to_transform": (0, 1),
            "bias": "all",
            "modules_to_save": ("pooler",),
        },
        families=("bert",),
        golden=False,
    ),
    "fourierft_biases": Case(
        "FourierFTConfig",
        {"n_frequency": 30, "scaling": 25.0, "target_modules": ["value"], "bias": "all"},
        {"n_frequency": 30, "scaling": 25.0, "targets": ("down",), "bias": "fourier_only"},
        families=("bert",),
        golden=False,
    ),
}
