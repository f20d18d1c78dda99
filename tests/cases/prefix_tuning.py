from cases import Case

SETTINGS = [{"tokens": 3}, {"tokens": 3, "projection": True, "hidden": 7}]
# transformers' DistilBERT takes no keys and values from before.
PLAIN = {"num_virtual_tokens": 4}
PROJECTED = PLAIN | {"prefix_projection": True, "encoder_hidden_size": 7}
CASES = {
    "prefix_tuning": Case("PrefixTuningConfig", PLAIN, {"tokens": 4}, ("bert",)),
    "prefix_tuning_roberta": Case(
        "PrefixTuningConfig", PLAIN, {"tokens": 4}, ("roberta",), golden=False
    ),
    "prefix_tuning_projected": Case(
        "PrefixTuningConfig",
        PROJECTED,
        {"tokens": 4, "projection": True, "hidden": 7},
        ("bert",),
    ),
}
