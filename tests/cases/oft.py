from cases import Case

SETTINGS = [
    {"blocks": 4, "targets": ("query", "mlp.down", "pooler"), "bias": "oft_only"},
    {
        "block_size": 8,
        "neumann": False,
        "block_share": True,
        "targets": ("re:layers.[02].mlp.down", "value"),
        "modules_to_save": ("pooler",),
    },
]


def _case(settings, group, **about):
    common = {"target_modules": ["query", "output.dense"], **settings}
    targets = {"targets": ("query", "attention.output", "mlp.down"), **group}
    return Case("OFTConfig", common, targets, **about)


CASES = {
    # By default the other of r and oft_block_size is not zero in PEFT's configuration.
    "oft": _case({"oft_block_size": 8}, {"block_size": 8}),
    "oft_r": _case(
        {"r": 4, "oft_block_size": 0, "bias": "all"},
        {"blocks": 4, "bias": "all"},
        families=("bert",),
    ),
    "oft_exact": _case(
        {"oft_block_size": 8, "use_cayley_neumann": False, "bias": "oft_only"},
        {"block_size": 8, "neumann": False, "bias": "oft_only"},
    ),
    "oft_shared": _case(
        {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 3},
        {"block_size": 4, "block_share": True, "terms": 3},
        families=("bert",),
    ),
    "oft_long_series": _case(
        {"oft_block_size": 4, "num_cayley_neumann_terms": 7},
        {"block_size": 4, "terms": 7},
        golden=False,
    ),
    "oft_constrained": _case(
        {"oft_block_size": 8, "coft": True, "eps": 0.4},
        {"block_size": 8, "coft": True, "eps": 0.4},
        families=("bert",),
    ),
}
