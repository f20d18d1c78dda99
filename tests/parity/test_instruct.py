"""What experiments/instruct_lora.py leaves, in transformers and PEFT (PyTorch, float32)."""

import json

import hugging
import jax
import numpy as np
import peft as hf
import pytest
import tiny
import tiny_causal
import tiny_dialogs
import torch
import transformers

import bmft
from bmft import models, peft, predict
from bmft.data.dialogs import Turn
from bmft.errors import command
from bmft.models import weights
from bmft.peft import files
from experiments import instruct_lora

assert hugging  # its stand-in for PEFT's extension is installed
ASKED = tuple((Turn("user", question),) for question in tiny_dialogs.ANSWERS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and its model with an adapter that says something."""
    folder = tmp_path_factory.mktemp("instruct")
    model, data = tiny_dialogs.model(folder / "model"), tiny_dialogs.data(folder / "data")
    arguments = [*tiny_dialogs.arguments(model, data), f"--workdir={folder / 'run'}"]
    arguments += ["--config.export.merged=True", "--config.peft.lora.targets=all-linear"]
    assert command(instruct_lora.main, arguments) == 0
    return folder


def test_adapter_and_merged_model(run):
    """The same logits, of prompts in a chat, by the same ids."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    adapted = hf.PeftModel.from_pretrained(theirs, run / "run" / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "run" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "run" / "model")
    writer = bmft.load(run / "run")
    with torch.no_grad():
        for turns in ASKED:
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            about = {"add_generation_prompt": True, "return_dict": False}
            ids = tokenizer.apply_chat_template(messages, **about)
            assert ids == writer.ids(turns)
            one, other = (model(torch.tensor([ids])).logits[0] for model in (adapted, merged))
            np.testing.assert_allclose(one, other, atol=1e-4)
            np.testing.assert_allclose(other, logits(run / "run", ids), atol=1e-4)
    with adapted.disable_adapter(), torch.no_grad():
        assert (adapted(torch.tensor([ids])).logits[0] - other).abs().max() > 0.1


def logits(folder, ids):
    """Ours: of the base with the adapter."""
    name = json.loads((folder / "config.json").read_text())["config"]["model"]["name"]
    model = models.find(name)
    read = files.read(folder / "adapter", model, fingerprint=weights.fingerprint(model))
    base = weights.load(model, jax.random.key(0)).variables()
    batch = tiny_causal.asked(tiny_causal.packed([ids], padding=24 - len(ids)))
    apply = tiny.hasty(peft.attach(read.methods, model).apply)
    return np.asarray(apply(files.insert(read, base), batch))[0, : len(ids)]


def test_answers_are_those_of_generate(run):
    """By the base with its adapter, by the merged model, and by transformers' generate."""
    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "run" / "model")
    writer = bmft.load(run / "run")
    want = []
    for turns in ASKED:
        ids = writer.ids(turns)
        how = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [2, 4]}
        made = merged.generate(torch.tensor([ids]), **how)[0, len(ids) :]
        want.append(writer.tokenizer.decode(made, skip_special_tokens=True))
    asked = [turns[0].content for turns in ASKED]
    assert [one["answer"] for one in writer.predict(asked)] == want
    again = predict.load(run / "run" / "model", tokens=6).predict(asked)
    assert [one["answer"] for one in again] == want
