"""Prints a comparison as tables."""

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from exo.compare.agreement import NEAR_TIE
from exo.compare.comparison import Comparison, EngineReport, Pair, TokenAgreement


def show(comparison: Comparison, console: Console) -> None:
    for part in _parts(comparison):
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))


def _parts(comparison: Comparison) -> Iterator[RenderableType]:
    host = comparison.host
    devices = ", ".join(host.nvidia_devices) or "no NVIDIA device"
    quantization = f" ({comparison.quantization} by its card)" if comparison.quantization else ""
    yield Text(f"{comparison.model_id}{quantization}, exo {comparison.exo_version}, {comparison.date}")
    yield Text(f"{host.system}, {host.processor}, {host.cpu_count} logical CPUs, {_gib(host.memory_total)}, {devices}")
    yield Text(
        f"{len(comparison.prompts)} prompts, each continued by {comparison.tokens} tokens greedily and with seeds from "
        f"{comparison.seed} on\n"
    )
    yield _engines(comparison.engines)
    for pair in comparison.pairs:
        yield Text()
        yield _pair(pair)
        yield from _tokenisation(pair)
        if pair.greedy.differences or pair.seeded.differences:
            yield Text()
            yield _differences(pair)
            yield Text(
                f"Margin: how far {pair.reference} was from choosing the other token; a near-tie is at most "
                f"{NEAR_TIE} nats."
            )


def _engines(engines: tuple[EngineReport, ...]) -> Table:
    table = Table("Engine", *(engine.name for engine in engines), box=None)
    for column in table.columns:
        column.overflow = "fold"

    def row(label: str, *cells: str) -> None:
        table.add_row(*map(Text, (label, *cells)))

    row("version", *(f"{each.engine} {each.version}" for each in engines))
    row("backend", *(each.backend for each in engines))
    row("devices", *(", ".join(each.devices) for each in engines))
    row("card", *(_card_table(each) for each in engines))
    row("weights", *(_mib(each.model_bytes) for each in engines))
    row("vocabulary", *(f"{each.vocabulary} token ids" for each in engines))
    row("context", *(f"{each.context_length} tokens" for each in engines))
    for setting in dict.fromkeys(setting for each in engines for setting in each.settings):
        row(setting, *(each.settings.get(setting, "-") for each in engines))
    row("negative log-likelihood", *(_number(each.negative_log_likelihood, " nats/token") for each in engines))
    row("prefill, one stream", *(_number(each.speed.prefill_rate, " tokens/s") for each in engines))
    row("decode, one stream", *(_number(each.speed.decode_rate, " tokens/s") for each in engines))
    row("memory when ready", *(_mib(each.memory.resident_ready) for each in engines))
    row("memory, peak", *(_mib(each.memory.resident_peak) for each in engines))
    row("device memory, peak", *(_mib(each.memory.device_peak) for each in engines))
    return table


def _card_table(engine: EngineReport) -> str:
    """The card's table without values of several lines, such as a chat template."""
    short = {key: str(value) for key, value in engine.table.items() if "\n" not in str(value)}
    return ", ".join(f"{key}={value}" for key, value in short.items()) or "-"


def _pair(pair: Pair) -> Table:
    divergence = pair.divergence
    table = Table(f"{pair.other} against {pair.reference}", "", box=None)
    read = f"{divergence.positions} positions, {divergence.vocabulary} token ids"
    table.add_row("teacher forcing over", read)
    table.add_row("|Δlogprob|", f"max {divergence.max_abs:.3g}, mean {divergence.mean_abs:.3g} nats")
    kl = f"mean {divergence.kl_mean:.3g}, max {divergence.kl_max:.3g} nats"
    table.add_row(f"KL({pair.reference} || {pair.other})", kl)
    table.add_row("top-1 agreement", _percent(divergence.top1_agreement))
    table.add_row("greedy", _agreement(pair.greedy))
    table.add_row("seeded", _agreement(pair.seeded))
    return table


def _agreement(found: TokenAgreement) -> str:
    """The agreement of whole texts, and that of single choices after the same text."""
    near = sum(each.near_tie for each in found.differences)
    ties = f", {near} of the others near-ties" if found.differences else ""
    return (
        f"{found.identical} of {found.sequences} texts identical, {_percent(found.equal / found.tokens)} of tokens "
        f"equal; {found.chosen_alike} of {found.tokens} choices after the same text alike{ties}"
    )


def _tokenisation(pair: Pair) -> Iterator[Text]:
    for each in pair.tokenisation:
        yield Text(
            f"prompt {each.prompt + 1} is tokenised differently from token {each.position} on: {pair.reference} "
            f"{_ids(each.reference_tokens)}, {pair.other} {_ids(each.other_tokens)}; both read the former"
        )


def _differences(pair: Pair) -> Table:
    table = Table("First difference", "prompt", "token", pair.reference, pair.other, "margin", "", box=None)
    for mode, found in (("greedy", pair.greedy), ("seeded", pair.seeded)):
        first = {each.prompt: each for each in reversed(found.differences)}
        for each in sorted(first.values(), key=lambda difference: difference.prompt):
            place = (str(each.prompt + 1), str(each.position), str(each.reference_token), str(each.other_token))
            table.add_row(mode, *place, f"{each.margin:.2g} nats", "near-tie" if each.near_tie else "")
    return table


def _ids(tokens: tuple[int, ...]) -> str:
    shown = " ".join(str(token) for token in tokens[:8])
    return f"{shown} …" if len(tokens) > 8 else shown or "nothing"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g}{unit}"


def _percent(share: float) -> str:
    """Rounds down, so that only complete agreement shows as 100 %."""
    return f"{int(share * 10_000) / 100:.4g} %"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):,.0f} MiB"
