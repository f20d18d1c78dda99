"""The weights of smollm2's GGUF file in transformers' own model: it must speak English."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bmft import models
from bmft.models import gguf_settings, gguf_tokenizer, tensors

TEXT = (
    "The United States of America is a country primarily located in North America. It is a federal "
    "republic of 50 states, with its capital in Washington, D.C."
)


def test_smollm2_speaks():
    path = models.locate("smollm2")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**gguf_settings.settings(path))).eval()
    params = model.state_dict()
    left = set(params) - {"lm_head.weight"}  # tied
    with tensors.opened(path) as file, torch.no_grad():
        for name, shape in file.shapes().items():
            whole = tuple(slice(0, size) for size in shape)
            params[name].copy_(torch.from_numpy(np.array(file.read(name, whole))))
            left.remove(name)
    assert not left
    tokenizer = gguf_tokenizer.tokenizer(path)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        # 1.84 a token; 2.87 with the query and key rows in llama.cpp's order
        assert model(ids, labels=ids).loss < 1.9
        ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
        said = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris."
