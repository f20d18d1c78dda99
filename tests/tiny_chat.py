"""A tokenizer of a few words, each with the blank before it as GPT-2's, and chat templates of the
shapes that real models have, in short."""

import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = r" ?\w+|\n|[^\w\s]| "
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<turn>", "<end>")
TEXTS = """
What is one and one? It is two. Are you sure of that? Yes, quite sure. two?2 3 short
system user assistant model\n [INST]Be brief. [INST] No way. A: B: yes</INST> no <think></think>
### What the Yes It Are Question: Answer: human name
"""

CHATML = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": """{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"""
    + CHATML,
    "llama2": """{% for m in messages %}{% if m.role == 'user' %}
{{- bos_token + '[INST] ' + m.content + ' [INST]' }}{% elif m.role == 'assistant' %}
{{- ' ' + m.content + ' ' + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}""",
    "llama3": """{{- bos_token }}{% for m in messages %}
{{- '<turn>' + m.role + '<end>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant<end>\n\n' }}{% endif %}""",
    "llama3 at first": """{{- bos_token }}{% for m in messages %}
{{- '<turn>' + m.role + '<end>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{{- '<turn>assistant<end>\n\n' }}""",
    "gemma": """{{- bos_token }}{% if messages[0].role == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<turn>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}""",
    "mistral": """{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '[INST]' + ' ' + m.content + '[INST]' }}{% else %}
{{- ' ' + m.content + eos_token }}{% endif %}{% endfor %}""",
    "qwen3": """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ '<think></think>\n' if m.role == 'assistant' and loop.last }}{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "generation": """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
}

# What a template must not be, and what is said of it.
UNFIT = {
    "no roles": (
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        "does not tell user and",
    ),
    "no users": (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}</s>{% endfor %}",
        "leaves out what the user says",
    ),
    "no opening": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        r"opens an answer by '<\|im_start\|>assistant' but not with add_generation_prompt",
    ),
    "no end": (
        "{% for m in messages %}{{ '[INST] ' if m.role == 'user' }}{{ m.content }}\n{% endfor %}",
        "has no mark where an answer ends",
    ),
    "another end": (
        "{% for m in messages %}{{ '[INST] ' if m.role == 'user' }}{{ m.content }}"
        "{{ '</s>' if loop.last or m.role == 'user' else '<end>' }}{% endfor %}",
        "ends an answer otherwise when another turn follows",
    ),
    "a count": (
        "{{ messages | length }}{% for m in messages %}{{ '[INST] ' if m.role == 'user' }}"
        "{{ m.content }}</s>{% endfor %}",
        "changes what stands before an answer once the answer is there",
    ),
    "an error": ("{{ messages[0].role.name.x }}", "fails: .*has no attribute"),
    "generation without an end": (
        TEMPLATES["generation"].replace(
            "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
        ),
        "learns no mark at the end of an answer: 'It is two.'",
    ),
    "generation of the name": (
        "{%- for m in messages %}{% if m.role == 'assistant' %}{% generation %}assistant\n"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
        r"learns 'assistant\\nIt is two\.<\|im_end\|>' where the answer is 'It is two\.'",
    ),
    "generation of questions": (
        "{%- for m in messages %}{{ m.role + ' ' }}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endfor %}",
        "marks 4 stretches by generation in a dialog of 2 answers",
    ),
}


def tokenizer(template=None, texts=TEXTS, bos=True, **settings):
    """Every word of `texts` is a token; a text begins with <s> where `bos` says so."""
    words = dict.fromkeys(re.findall(WORDS, texts))
    words = dict.fromkeys([*words, *(w.strip() for w in words), *(f" {w.strip()}" for w in words)])
    vocab = {word: i for i, word in enumerate([*SPECIAL, *filter(None, words)])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    backend.pre_tokenizer, backend.decoder = split, decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | settings
    found = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="tiny", **named)
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    found.chat_template = template
    return found
