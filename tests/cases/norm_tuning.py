from cases import Case

CASES = {
    "norm_tuning": Case(
        "LNTuningConfig",
        {"target_modules": ["attention.output.LayerNorm", "output.LayerNorm"]},
        {"targets": ("mlp_norm",)},
        families=("bert",),
    ),
    "norm_tuning_distilbert": Case(
        "LNTuningConfig",
        {"target_modules": ["sa_layer_norm"]},
        {"targets": ("mlp_norm",)},
        families=("distilbert",),
    ),
}
