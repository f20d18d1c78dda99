from cases import Case

SETTINGS = [
    {},
    {
        "targets": ("re:layers.[01].attention.output", "key", "mlp.up", "pooler"),
        "feedforward": ("layers.1.attention.output", "mlp.up"),
    },
]
CASES = {
    "ia3": Case(
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
        {"targets": ("key", "mlp.up", "mlp.down"), "feedforward": ("mlp.down",)},
    )
}
