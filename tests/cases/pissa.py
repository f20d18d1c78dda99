# In PEFT's files it is a LoRA: its tests against PEFT are in tests/parity/test_lora_family.py
SETTINGS = [
    {"rank": 3, "alpha": 7.0, "targets": ("query", "up", "pooler")},
    {
        "rank": 2,
        "alpha": 5.0,
        "rslora": True,
        "targets": ("all-linear",),
        "rank_pattern": ("layer.1.*query=4",),
        "layers_to_transform": (1,),
    },
]
