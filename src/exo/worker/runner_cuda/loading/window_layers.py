"""Which layers of a model look back over a window only, as llama.cpp decides it from a GGUF's header.

The rules are those of llama.cpp 0.5.0-dev: ``load_arch_hparams`` of each architecture in ``src/models``, and
``load_swa_pattern``.
"""

from dataclasses import dataclass

from exo.worker.runner_common.model_files.gguf import GgufHeader


@dataclass(frozen=True, slots=True)
class _WindowRule:
    """The window layers of an architecture. ``period`` is n if every n-th layer sees the whole context."""

    period: int | None = None
    """The file's own pattern takes precedence over this one. None: only the file's list says it."""
    full_first: bool = False
    """Whether the first layer of a period sees the whole context, instead of the last one."""
    window: int = 0
    """Tokens, for a file that does not say it. 0: such a file has no window layers."""
    fixed: int = 0
    """Tokens, whatever a file says that has a window at all. 0: the file says it."""
    n_layers: int | None = None
    """The only number of layers with which a model of this architecture has windows."""


_RULES = {
    "afmoe": _WindowRule(4),
    "cohere2": _WindowRule(4),
    "cohere2moe": _WindowRule(4, full_first=True),
    "exaone-moe": _WindowRule(4),
    "exaone4": _WindowRule(4, window=4096, n_layers=64),
    "gemma2": _WindowRule(2, window=4096),
    "gemma3": _WindowRule(6),
    "gemma3n": _WindowRule(5),
    "gemma4": _WindowRule(),
    "gpt-oss": _WindowRule(2),
    "granite_swa": _WindowRule(),
    "laguna": _WindowRule(4, full_first=True),
    "lfm2": _WindowRule(0),
    "llama4": _WindowRule(4, window=8192, fixed=8192),
    "maple": _WindowRule(),
    "mellum": _WindowRule(4),
    "mimo2": _WindowRule(),
    "muse-glimmer": _WindowRule(4),
    "olmo2": _WindowRule(4),
    "plamo3": _WindowRule(8),
    "smallthinker": _WindowRule(4, full_first=True, fixed=4096),
    "spark2_5": _WindowRule(),
    "step35": _WindowRule(),
}
"""By ``general.architecture``. llama.cpp keeps the whole context for others, such as phi3, even if the file has a
window."""


def layer_windows(header: GgufHeader, arch: str, n_layers: int) -> list[int | None]:
    """Returns each layer's window in tokens, or None for a layer that sees the whole context.

    ``n_layers`` is without the layers that predict several tokens ahead.
    """
    rule = _RULES.get(arch)
    window = header.integer(f"{arch}.attention.sliding_window", rule.window) if rule is not None else 0
    if rule is None or window <= 0 or rule.n_layers not in (None, n_layers):
        return [None] * n_layers
    looks_back = _pattern(header, f"{arch}.attention.sliding_window_pattern", rule, n_layers)
    return [(rule.fixed or window) if each else None for each in looks_back]


def _pattern(header: GgufHeader, key: str, rule: _WindowRule, n_layers: int) -> list[bool]:
    """Returns for each layer whether it has a window: by the file's list, the file's period, or the rule's."""
    if header.array_length(key):
        return [bool(each) for each in header.per_layer(key, n_layers, 0)]
    if rule.period is None:
        return [False] * n_layers
    period = header.integer(key, rule.period)
    full = 0 if rule.full_first else period - 1
    return [period == 0 or layer % period != full for layer in range(n_layers)]
