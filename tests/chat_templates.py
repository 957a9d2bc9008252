"""Chat templates that use the same features as published ones, and what each renders from one message."""

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if loop.index0 > ns.last %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
INST = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] %}
    {% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {% else %}
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
DATED = """[gMASK]<sop>{% if not (messages[0].content is string) %}{{ raise_exception('text only') }}{% endif %}
{{- '<|system|>\\nThe year is ' ~ strftime_now('%Y')[:2] ~ 'xx; ' ~ {'message': messages[0].content} | tojson }}
{%- for m in messages %}{% if m.role == 'user' %}<|user|>
{{ m.content }}
{%- endif %}{% endfor %}
{% if add_generation_prompt %}
<|assistant|>{{ pad_token }}{% endif %}"""

MESSAGE = '  Is 1 < 2 & "naïve"?\nYes  '
RENDERED = {
    CHATML: '<|im_start|>user\n  Is 1 < 2 & "naïve"?\nYes  <|im_end|>\n<|im_start|>assistant\n',
    INST: '<|endoftext|>\n[INST] Is 1 < 2 & "naïve"?\nYes [/INST]\n',
    DATED: '[gMASK]<sop><|system|>\nThe year is 20xx; {"message": "  Is 1 < 2 & \\"naïve\\"?\\nYes  "}<|user|>\n'
    '  Is 1 < 2 & "naïve"?\nYes  <|assistant|><|endoftext|>',
}
