"""The report of a fault campaign: what happened, what was promised, and whether it was kept."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict

from bench.campaign import CampaignOutcome
from bench.streams import WatchedStream
from bench.target import FaultTarget
from bench.texts import Alignment, Continuation, Judge, NearTie, UnexpectedText, align, first_difference

RECOVERY_SECONDS = 1.5
"""The promised median time from a death to the next token, beyond the time that the model takes to load."""
_ERRORS_SHOWN, _TIES_SHOWN = 5, 12


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True)


class Spread(_Figures):
    count: int
    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        if not values:
            return None
        ordered = sorted(values)
        p95, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.95, 0.99))
        return cls(count=len(ordered), median=statistics.median(ordered), p95=p95, p99=p99)

    def milliseconds(self) -> str:
        return f"median {self.median * 1e3:.0f} ms, p95 {self.p95 * 1e3:.0f} ms, p99 {self.p99 * 1e3:.0f} ms"


class Streams(_Figures):
    """The results of the streams. ``declined`` ones had not begun and were told when to come again."""

    whole: int
    lost: int
    errors: tuple[str, ...]
    declined: Mapping[int, int]
    tokens: int
    tokens_lost: int
    tokens_doubled: int
    different: int
    usage_wrong: int
    cuts: int
    """The number of deaths between two tokens of a stream."""

    @classmethod
    def of(cls, outcome: CampaignOutcome, *, exact: bool) -> Self:
        """Compares every stream with the undisturbed one of the same number.

        If texts may differ (not ``exact``), lost and doubled tokens are found by their number only; ``texts`` judges
        the differences.
        """
        whole = [each for each in outcome.streams if each.done]
        lost = [each for each in outcome.streams if not each.done]
        expected = {each.number: each for each in outcome.undisturbed}
        found = [_alignment(expected[each.number], each, exact=exact) for each in whole]
        return cls(
            whole=len(whole),
            lost=len(lost),
            errors=tuple(dict.fromkeys(each.error for each in lost))[:_ERRORS_SHOWN],
            declined=outcome.declined,
            tokens=sum(len(each.ids) for each in whole),
            tokens_lost=sum(each.lost for each in found),
            tokens_doubled=sum(each.doubled for each in found),
            different=len(different(outcome)),
            usage_wrong=sum(not each.usage_exact for each in whole),
            cuts=sum(len(each.cuts) for each in outcome.streams),
        )


class Deaths(_Figures):
    """The runner's deaths. Seconds from each to the next token: of any stream, and of each stream that it cut."""

    kills: int
    early_kills: int
    stops: int
    in_flight: tuple[int, ...]
    """The number of streams in flight at each death."""
    first_token: Spread | None
    each_stream: Spread | None
    after_stop: Spread | None
    """A stopped runner is noticed only after a while."""

    @classmethod
    def of(cls, outcome: CampaignOutcome) -> Self:
        kinds = [fault.kind for fault in outcome.faults]
        times: Mapping[bool, list[float]] = {True: [], False: []}
        for fault in outcome.faults:
            if fault.seconds is not None:
                times[fault.kind == "stop"].append(fault.seconds)
        stopped = {fault.died for fault in outcome.faults if fault.kind == "stop"}
        cuts = [cut for each in outcome.streams for cut in each.cuts if cut.died not in stopped]
        return cls(
            kills=len(kinds) - kinds.count("stop"),
            early_kills=kinds.count("early kill"),
            stops=kinds.count("stop"),
            in_flight=tuple(fault.in_flight for fault in outcome.faults),
            first_token=Spread.of(times[False]),
            each_stream=Spread.of([cut.seconds for cut in cuts if cut.seconds is not None]),
            after_stop=Spread.of(times[True]),
        )


class Floods(_Figures):
    bursts: int
    statuses: Mapping[int, int]
    wrong: int
    unexpected: int
    refused: Spread | None

    @classmethod
    def of(cls, outcome: CampaignOutcome, bursts: int) -> Self:
        burst = outcome.flood
        return cls(
            bursts=bursts,
            statuses=burst.statuses,
            wrong=burst.wrong,
            unexpected=burst.unexpected,
            refused=Spread.of(burst.refused_seconds),
        )


class ServerFacts(_Figures):
    """The server process: resident memory in bytes, and its state after it was told to stop."""

    memory_before: int
    memory_after: int
    extra_runners: int
    exit_status: int | None
    children_after_exit: int


class Choices(_Figures):
    """Different choices of tokens, and whether rounding explains them."""

    continuations: int = 0
    """How often an undisturbed runner continued a different text from a cut."""
    continuations_same: int = 0
    near_ties: tuple[NearTie, ...] = ()


class FaultReport(_Figures):
    """One campaign. The times of a runner's start and load are those of the median start."""

    target: str
    runner: str
    seed: int
    seconds: float
    start_seconds: float
    load_seconds: float
    finished: bool
    exact: bool
    streams: Streams
    deaths: Deaths
    floods: Floods
    server: ServerFacts
    choices: Choices

    @property
    def beyond_load(self) -> float | None:
        """The median recovery in seconds without the load of the model, but with the start of the process."""
        spread = self.deaths.first_token
        return None if spread is None else spread.median - self.load_seconds

    def promises(self) -> dict[str, bool]:
        streams, deaths, server = self.streams, self.deaths, self.server
        kept = {
            "every fault within the time limit": self.finished,
            "every death fell within the streams": all(deaths.in_flight),
            "no stream lost": streams.lost == 0 < streams.whole,
            "no token lost, none doubled": streams.tokens_lost == streams.tokens_doubled == 0,
            "every usage exact": streams.usage_wrong == 0,
            "floods are served, or told to come again": self.floods.wrong == self.floods.unexpected == 0,
            "one runner at the end, exit status 0, no child left": (
                (server.extra_runners, server.exit_status, server.children_after_exit) == (0, 0, 0)
            ),
        }
        if self.exact:
            kept["every text equals that of the undisturbed run"] = streams.different == 0
            beyond = self.beyond_load
            kept[f"next token within {RECOVERY_SECONDS:g} s of a death, beyond the load"] = (
                beyond is None or beyond < RECOVERY_SECONDS
            )
        else:
            kept["every difference a near-tie"] = all(tie.within_noise for tie in self.choices.near_ties)
        return kept

    def kept(self) -> bool:
        return all(self.promises().values())


def _alignment(expected: WatchedStream, got: WatchedStream, *, exact: bool) -> Alignment:
    if exact:
        return align(expected.ids, got.ids)
    surplus = len(got.ids) - len(expected.ids)
    return Alignment(lost=max(0, -surplus), doubled=max(0, surplus))


def different(outcome: CampaignOutcome) -> list[WatchedStream]:
    """The complete streams whose tokens or text differ from the undisturbed run."""
    expected = {each.number: (each.ids, each.reply.text) for each in outcome.undisturbed}
    return [each for each in outcome.streams if each.done and (each.ids, each.reply.text) != expected[each.number]]


def differing_texts(
    target: FaultTarget, outcome: CampaignOutcome, asked: Sequence[Continuation]
) -> list[UnexpectedText]:
    """The distinct outputs that differ, with the expected tokens."""
    expected = {each.number: each.ids for each in outcome.undisturbed}
    found: dict[tuple[int, tuple[int, ...]], dict[int, tuple[int, Judge]]] = {}
    for stream in different(outcome):
        others = found.setdefault((stream.number, tuple(stream.ids)), {})
        at = first_difference(expected[stream.number], stream.ids)
        if at is not None and at < min(len(stream.ids), len(expected[stream.number])):
            others[at] = expected[stream.number][at], "undisturbed run"
    for each in asked:
        if (difference := each.difference()) is not None:
            at, token = difference
            found[each.stream.number, tuple(each.stream.ids)].setdefault(at, (token, "continuation"))
    return [UnexpectedText(number, target.ids(number), output, others) for (number, output), others in found.items()]


def lines(report: FaultReport) -> Iterator[str]:
    yield f"== {report.target} model on runner {report.runner}, seed {report.seed}: {report.seconds:.0f} s of faults"
    for name, value in (*_streams(report), *_deaths(report), *_server(report)):
        yield f"{name:<24}{value}"
    if not report.exact:
        yield from _choices(report)
    yield from promise_lines(report.promises())


def promise_lines(promises: Mapping[str, bool]) -> list[str]:
    return [f"{'kept' if kept else 'BROKEN':<8}{text}" for text, kept in promises.items()]


def _streams(report: FaultReport) -> Iterator[tuple[str, str]]:
    found = report.streams
    same = found.whole - found.different
    yield "streams", f"{found.whole} whole, {found.lost} lost; begun later as told: {_counts(found.declined)}"
    yield from (("", error) for error in found.errors)
    yield "tokens", f"{found.tokens} delivered, {found.tokens_lost} lost, {found.tokens_doubled} doubled"
    yield "texts", f"{same} of {found.whole} are those of the undisturbed run, {found.different} are not"
    yield "usage", f"{found.usage_wrong} wrong"


def _deaths(report: FaultReport) -> Iterator[tuple[str, str]]:
    found = report.deaths
    early = f"({found.early_kills} of them while a runner was loading)"
    yield "deaths", f"{found.kills} kills {early}, {found.stops} stops; {report.streams.cuts} cuts of streams"
    if found.in_flight:
        yield "streams in flight", f"{min(found.in_flight)} to {max(found.in_flight)} at each death"
    yield "start and load", f"{report.start_seconds:.2f} s until it loads, {report.load_seconds:.2f} s of loading"
    yield "kill to next token", _seconds(found.first_token, report.load_seconds)
    yield "  of each stream cut", _seconds(found.each_stream, report.load_seconds)
    yield "stop to next token", _seconds(found.after_stop, report.load_seconds)


def _server(report: FaultReport) -> Iterator[tuple[str, str]]:
    floods, server = report.floods, report.server
    if floods.bursts:
        yield "floods", f"{floods.bursts}: by status {_counts(floods.statuses)}; {floods.wrong} wrong answers"
        yield "refused within", floods.refused.milliseconds() if floods.refused else "none was"
    before, after = server.memory_before / 1e6, server.memory_after / 1e6
    yield "memory of the server", f"{before:.1f} MB before, {after:.1f} MB after"
    yield "told to stop", f"exit status {server.exit_status}, {server.children_after_exit} children left"


def _choices(report: FaultReport) -> Iterator[str]:
    found = report.choices
    same = f"{found.continuations_same} of {found.continuations} are what came"
    yield f"{'continuations':<24}{same}, for each cut of a text that differs"
    for name, judges in (("first differences", ("undisturbed run",)), ("later choices", ("continuation", "reading"))):
        ties = [tie for tie in found.near_ties if tie.by in judges]
        within, here = sum(tie.within_noise for tie in ties), sum(tie.gap <= tie.noise_here for tie in ties)
        yield f"{name:<24}{len(ties)}; gap within the text's noise: {within}, within that of the very position: {here}"
    for tie in sorted(found.near_ties, key=lambda tie: tie.gap - tie.noise, reverse=True)[:_TIES_SHOWN]:
        yield (
            f"  stream {tie.stream}, token {tie.position}: {tie.got} instead of the {tie.by}'s {tie.expected}; "
            f"gap {tie.gap:.4f}, noise {tie.noise:.4f}, {tie.noise_here:.4f} here"
        )


def _counts(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(counts.items())) or "none"


def _seconds(spread: Spread | None, load: float) -> str:
    if spread is None:
        return "none"
    beyond = f"less the load {spread.median - load:.2f} s and {spread.p95 - load:.2f} s"
    return f"median {spread.median:.2f} s, p95 {spread.p95:.2f} s; {beyond} ({spread.count})"
