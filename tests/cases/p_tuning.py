from cases import Case

SETTINGS = [{"tokens": 3, "hidden": 7}, {"tokens": 3, "encoder": "lstm", "hidden": 5}]
# For DistilBERT PEFT has to be told the width and the heads.
MLP = {
    "num_virtual_tokens": 4,
    "token_dim": 24,
    "num_attention_heads": 4,
    "encoder_hidden_size": 7,
}
LSTM = MLP | {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}
CASES = {
    "p_tuning": Case("PromptEncoderConfig", MLP, {"tokens": 4, "hidden": 7}),
    "p_tuning_lstm": Case(
        "PromptEncoderConfig",
        LSTM,
        {"tokens": 4, "hidden": 7, "encoder": "lstm", "layers": 3},
        ("roberta",),
        golden=False,
    ),
}
