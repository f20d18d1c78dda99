"""What a run of experiments/instruct_lora.py needs, as small as it can be: a llama with a tokenizer
of few words and a chat template, and files of dialogs."""

import json

import tiny_causal
import tiny_chat

ANSWERS = {"two?": "Yes, quite sure.", "one?": "No way.", "What is two?": "2", "short?": "no"}


def model(folder, template=tiny_chat.CHATML):
    tokenizer = tiny_chat.tokenizer(template, texts=f"{tiny_chat.TEXTS} {' '.join(ANSWERS)}")
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tiny_causal.directory(folder, vocab_size=len(tokenizer), max_position_embeddings=128, **ends)
    tokenizer.save_pretrained(folder)
    return folder


def rows(pairs=False):
    for question, answer in list(ANSWERS.items()) * 3:
        if pairs:
            yield {"prompt": question, "chosen": answer, "rejected": "It is two."}
        else:
            asked = {"role": "user", "content": question}
            yield {"messages": [asked, {"role": "assistant", "content": answer}]}


def data(folder, pairs=False):
    """--config.data.* of files with them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(rows(pairs))
    arguments = ["--config.data.name=files", "--config.data.max_length=48"]
    for split, some in (("train", found), ("validation", found[:5]), ("test", found[1:4])):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        arguments.append(f"--config.data.{split}={path}")
    return arguments


def arguments(model, data):
    """Of a run of ten steps."""
    return [
        *(f"--config.model.name={model}", *data),
        *("--config.train.steps=10", "--config.train.batch_size=8", "--config.eval.every=5"),
        *("--config.log.every=2", "--config.log.tensorboard=False", "--config.eval.batch_size=8"),
        *("--config.peft.lora.rank=2", "--config.optim.learning_rate=0.02"),
        *("--config.generate.tokens=6", "--config.generate.prompts=2"),
    ]
