from cases import Case

SETTINGS = [{"tokens": 3}, {"tokens": 2, "init": "vocabulary"}]
# For DistilBERT PEFT has to be told the width and the heads.
PLAIN = {"num_virtual_tokens": 4, "token_dim": 24, "num_attention_heads": 4}
CASES = {
    "prompt_tuning": Case("PromptTuningConfig", PLAIN, {"tokens": 4}),
    "prompt_tuning_roberta": Case(
        "PromptTuningConfig",
        PLAIN | {"modules_to_save": ["encoder.layer.1.output.dense"]},
        {"tokens": 4, "modules_to_save": ("encoder.layer.1.output.dense",)},
        ("roberta",),
        golden=False,
    ),
}
