from cases import Case

# alpha is large: three plain gradient steps from E = 0, with A and B of 0.02, make a small update.
SETTINGS = [
    {"init_rank": 3, "target_rank": 2, "alpha": 400.0},
    {
        "init_rank": 4,
        "target_rank": 1,
        "alpha": 500.0,
        "orthogonality": 0.2,
        "targets": ("all-linear",),
        "layers_to_transform": (0, 2),
        "bias": "lora_only",
        "modules_to_save": ("pooler",),
    },
]
CASES = {
    "adalora": Case(
        "AdaLoraConfig",
        {
            "init_r": 5,
            "target_r": 2,
            "lora_alpha": 7,
            "total_step": 10,
            "target_modules": ["query", "output.dense"],
        },
        {
            "init_rank": 5,
            "target_rank": 2,
            "alpha": 7.0,
            "targets": ("query", "attention.output", "mlp.down"),
        },
    ),
}
for peft, ours in (("all", "lora_only"), ("lora_only", "all")):
    CASES[f"adalora_bias_{peft}"] = Case(
        "AdaLoraConfig",
        {"init_r": 3, "total_step": 10, "target_modules": ["value"], "bias": peft},
        {"init_rank": 3, "targets": ("mlp.down",), "layers_to_transform": (0, 2), "bias": ours},
        families=("bert",),
        golden=False,
    )
