from cases import Case

MANY = tuple(range(49, 3, -3))
SETTINGS = [
    {"tokens": (9, 4, 50, 31)},
    {"tokens": (13, 4, 9), "targets": ("embeddings.position", "word_embeddings")},
]
CASES = {
    "token_rows": Case("TrainableTokensConfig", {"token_indices": list(MANY)}, {"tokens": MANY}),
    "token_rows_two_tables": Case(
        "TrainableTokensConfig",
        {
            "token_indices": [1, 9, 4, 13, 21],
            "target_modules": ["word_embeddings", "position_embeddings"],
        },
        {"tokens": (1, 9, 4, 13, 21), "targets": ("word", "position")},
        families=("bert",),
        golden=False,
    ),
}
