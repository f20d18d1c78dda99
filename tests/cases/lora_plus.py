# In PEFT's files it is a LoRA: its tests against PEFT are in tests/parity/test_lora_family.py
SETTINGS = [{"rank": 3, "alpha": 7.0, "ratio": 4.0, "targets": ("query", "up")}]
