"""Short chat templates, each with the restrictions of one family of published templates."""

import os
from collections.abc import Iterator
from pathlib import Path

from exo.cards.card import ModelCard
from tests import ROOT

_CARDS = ROOT / "src/exo/cards/built_in"
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_END = "{% if add_generation_prompt %}<assistant>{% endif %}"
_ALTERNATE = (
    "{% set ns = namespace(turn=0) %}{% for m in rest %}{% if m.role == 'user' or "
    "(m.role == 'assistant' and not m.tool_calls) %}{% if (m.role == 'user') != (ns.turn % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% set ns.turn = ns.turn + 1 %}{% endif %}"
    "{% endfor %}"
)
_SPLIT_SYSTEM = (
    "{% set rest = messages %}{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}"
    "{% set rest = messages[1:] %}{% endif %}"
)

FAMILIES = {
    "any role": _TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}{% endfor %}" + _END,
    "no calls": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + _END,
    "system first, and a user": _TOOLS
    + "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('no user query') }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}{% endif %}"
    "{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unexpected role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>"
    "{% for key, value in c.function.arguments | items %}<{{ key }}>{{ value }}{% endfor %}{% endfor %}{% endfor %}"
    + _END,
    "no system, alternating, no calls": "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{% endfor %}" + _END,
    "ids of nine, alternating around calls": _SPLIT_SYSTEM
    + _ALTERNATE
    + _TOOLS
    + "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    "{{ c.function | tojson }}{{ c.id }}{% endfor %}{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters') }}"
    "{% endif %}[TOOL_RESULTS]{{ m.content }}{% else %}{{ raise_exception('unexpected role') }}{% endif %}{% endfor %}",
    "no empty reply, alternating around calls": _SPLIT_SYSTEM
    + _ALTERNATE
    + _TOOLS
    + "{% for m in rest %}{% if m.role == 'assistant' and not m.content and not m.tool_calls %}"
    "{{ raise_exception('an assistant says or calls something') }}{% endif %}"
    "{% if m.role == 'system' %}{{ raise_exception('unexpected role') }}{% endif %}<{{ m.role }}>"
    "{% if (m['content'] is none or m['content'] == '') and not m.tool_calls %}{% elif m.content | length > 0 %}"
    "{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}" + _END,
    "one call, tools in the first user message": _SPLIT_SYSTEM
    + "{% if tools %}{% if rest | length == 0 or rest[0].role != 'user' %}{{ raise_exception('no first user') }}"
    "{% endif %}{{ tools | tojson }}{% endif %}{% for m in rest %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}" + _END,
    "channels": "{% set ns = namespace(called=none) %}{% set rest = messages %}"
    "{% if messages[0].role in ['system', 'developer'] %}<developer>{{ messages[0].content }}"
    "{% set rest = messages[1:] %}{% endif %}"
    + _TOOLS
    + "{% for m in rest %}{% if m.role == 'assistant' %}{% if 'tool_calls' in m %}"
    "{% if m.content and m.thinking %}{{ raise_exception('either content or thinking') }}{% endif %}"
    "{% set later = rest[loop.index:] | selectattr('role', 'equalto', 'assistant') | "
    "rejectattr('tool_calls', 'defined') | list %}{% if not later %}<analysis>{{ m.content or m.thinking }}{% endif %}"
    "<to={{ m.tool_calls[0].function.name }}>{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% set ns.called = m.tool_calls[0].function.name %}{% else %}<final>{{ m.content }}{% endif %}"
    "{% elif m.role == 'tool' %}{% if ns.called is none %}{{ raise_exception('a result without a call') }}{% endif %}"
    "<{{ ns.called }}>{{ m.content | tojson }}{% elif m.role == 'user' %}<user>{{ m.content }}{% endif %}{% endfor %}"
    + _END,
    "calls beside no content": _SPLIT_SYSTEM
    + _TOOLS
    + "{% for m in rest %}{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{% elif m.role == 'assistant' %}<a>{{ m.content }}"
    "{% elif m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'tool' %}<t>{{ m.content }}{% endif %}{% endfor %}",
    "content in parts": _TOOLS
    + "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}" + _END,
    "ids are names": "{# <|tool_calls_section_begin|> #}"
    + _TOOLS
    + "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}{% if not c.id.startswith('functions.') %}"
    "{{ raise_exception('an id that is no name') }}{% endif %}{{ c.id }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ m.content }}{% endfor %}" + _END,
    "lists are built": _TOOLS
    + "{% set said = [] %}{% for m in messages %}{% set _ = said.append(m.role ~ m.content) %}"
    "{% for c in m.tool_calls or [] %}{% set _ = said.append(c.function | tojson) %}{% endfor %}{% endfor %}"
    "{{ said | join('\n') }}",
}
"""By their peculiarity."""


def known_templates() -> Iterator[tuple[str, str]]:
    """Name and source of the templates above, those of model cards, and the files in EXO_CHAT_TEMPLATES."""
    yield from FAMILIES.items()
    for path in sorted(_CARDS.glob("*.toml")):
        for table in ModelCard.from_toml(path.read_text()).engines.values():
            if isinstance(source := table.get("chat_template"), str):
                yield path.stem, source
    if folder := os.environ.get("EXO_CHAT_TEMPLATES"):
        for path in sorted(Path(folder).glob("*.jinja")):
            yield path.stem, path.read_text()
