"""Chat templates as published models have them. Kind: oracle (transformers renders the same text)."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import tiny
from onebit.engine.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <brief> & \u201cwise\u201d."},
    {"role": "user", "content": "  What is 2 < 3?\n"},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Why?"},
]

TEMPLATES = {
    "bitnet": (
        "{% for message in messages %}{% set content = message['role'] | capitalize + ': ' + message['content'] | trim "
        "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    "chatml": (
        "{%- for message in messages %}\n    {%- if loop.first and messages[0]['role'] != 'system' %}\n"
        "        {{- '<|im_start|>system\\nHi<|im_end|>\\n' }}\n    {%- endif %}\n"
        "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "json, dates, namespaces and loop controls": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}"
        "{{ ns.n }} {{ strftime_now('%Y-%m') }}{% if tools is not none %}{{ tools[0] }}{% endif %}{{ eos_token }}"
    ),
    "guards": "{% if messages[1].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages[1].content }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(name, monkeypatch):
    tokenizer = Tokenizer(tiny.tokenizer_json(), bos_token=0, chat_template=TEMPLATES[name], eos_token=0)
    seen = []
    monkeypatch.setattr(tokenizer, "_encode", lambda text: seen.append(text) or [])
    tokenizer.encode_chat(MESSAGES)
    token = "<|endoftext|>"
    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        bos_token=token,
        eos_token=token,
    )
    assert seen == expected
