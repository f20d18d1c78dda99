from cases import Case

SETTINGS = [
    {"block_size": 8, "targets": ("query", "mlp.down", "pooler"), "bias": "boft_only"},
    {
        "block_size": 2,
        "factors": 3,
        "targets": ("re:layers.[02].mlp.down", "value"),
        "modules_to_save": ("pooler",),
    },
]


def _case(settings, group, **about):
    common = {"target_modules": ["query", "output.dense"], **settings}
    targets = {"targets": ("query", "attention.output", "mlp.down"), **group}
    return Case("BOFTConfig", common, targets, **about)


CASES = {
    "boft": _case({}, {}),
    "boft_num": _case(
        {"boft_block_size": 0, "boft_block_num": 4, "bias": "boft_only"},
        {"blocks": 4, "bias": "boft_only"},
        families=("bert",),
    ),
    "boft_butterfly": _case(
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3, "bias": "all"},
        {"block_size": 2, "factors": 3, "bias": "all"},
    ),
    "boft_wide_butterfly": _case(
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "boft_dropout": 0.3},
        {"block_size": 4, "factors": 2, "dropout": 0.3},
        golden=False,
    ),
}
