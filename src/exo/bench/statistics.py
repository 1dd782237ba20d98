"""Computes a stage's figures from the outcomes of its requests. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from exo.bench.options import Objective
from exo.bench.reading import Outcome
from exo.bench.report import Distribution, Goodput, LoadResult, LongPrompt, Requests, Stage, Tokens


def percentile(ordered: Sequence[float], share: float) -> float:
    """A percentile of ascending numbers, of which there is at least one. Interpolates between the two nearest ranks."""
    rank = share * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """The distribution in milliseconds; None without values."""
    if not seconds:
        return None
    ordered = sorted(1000 * each for each in seconds)
    return Distribution(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        min=ordered[0],
        p50=percentile(ordered, 0.50),
        p90=percentile(ordered, 0.90),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        max=ordered[-1],
    )


def is_good(outcome: Outcome, objective: Objective) -> bool:
    """Whether a request meets every limit of the objective. A single token has no inter-token latency."""
    if not outcome.whole:
        return False
    kept = (
        (outcome.ttft, objective.ttft),
        (outcome.itl, objective.itl),
        (max(outcome.gaps, default=None), objective.gap),
        (outcome.e2e, objective.e2e),
    )
    return all(seconds is None or limit is None or 1000 * seconds <= limit for seconds, limit in kept)


def summarize(
    load: LoadResult, outcomes: Sequence[Outcome], objective: Objective | None, long: LongPrompt | None = None
) -> Stage:
    whole = [outcome for outcome in outcomes if outcome.whole]
    ended = [outcome for outcome in outcomes if not outcome.cut]
    seconds = max(each.ended for each in ended) - min(each.began for each in ended) if ended else 0.0
    tokens = _tokens(whole)

    def per_second(count: int) -> float:
        return count / seconds if seconds > 0 else 0.0

    return Stage(
        load=load,
        requests=_requests(outcomes),
        tokens=tokens,
        seconds=seconds,
        output_tokens_per_second=per_second(tokens.output),
        total_tokens_per_second=per_second(tokens.prompt + tokens.output),
        requests_per_second=per_second(len(whole)),
        goodput=_goodput(ended, objective, seconds) if objective is not None else None,
        ttft=distribution([each.ttft for each in whole]),
        itl=distribution([gap for each in whole for gap in each.gaps]),
        tpot=distribution([each.itl for each in whole if each.itl is not None]),
        e2e=distribution([each.e2e for each in whole]),
        long_prompt=long,
    )


def long_prompt(streams: Sequence[Outcome], long: Outcome) -> LongPrompt:
    """The effect of a long prompt, which got its first token, on the streams around it."""
    before, during = gaps_before(streams, long), gaps_during(streams, long)
    begun = max((each.times[0] for each in streams if each.times and each.times[0] < long.began), default=long.began)

    def chunk_rate(since: float, until: float) -> float:
        chunks = sum(since < moment <= until for each in streams for moment in each.times)
        return chunks / (until - since) if until > since else 0.0

    return LongPrompt(
        prompt_tokens=long.prompt_tokens,
        ttft_ms=1000 * long.ttft,
        gaps_before=distribution(before),
        gaps_during=distribution(during),
        stream_chunks_per_second_before=chunk_rate(begun, long.began),
        stream_chunks_per_second_during=chunk_rate(long.began, long.times[0]),
    )


def gaps_before(streams: Sequence[Outcome], long: Outcome) -> list[float]:
    """Seconds between the chunks of each stream, from the start of the last stream until the long prompt was sent."""
    running = max((stream.times[0] for stream in streams if stream.times and stream.times[0] < long.began), default=0.0)
    return _gaps(streams, lambda earlier, later: earlier >= running and later <= long.began)


def gaps_during(streams: Sequence[Outcome], long: Outcome) -> list[float]:
    """The gaps that overlap with the long prompt's wait for its first token."""
    return _gaps(streams, lambda earlier, later: later > long.began and earlier < long.times[0])


def _gaps(streams: Sequence[Outcome], counts: Callable[[float, float], bool]) -> list[float]:
    return [
        later - earlier for stream in streams for earlier, later in pairwise(stream.times) if counts(earlier, later)
    ]


def _requests(outcomes: Sequence[Outcome]) -> Requests:
    faults = [outcome.fault for outcome in outcomes if outcome.fault is not None]
    return Requests(
        sent=len(outcomes),
        whole=sum(outcome.whole for outcome in outcomes),
        cut=sum(outcome.cut for outcome in outcomes),
        errors=dict(Counter(fault.kind for fault in faults)),
        messages={fault.kind: fault.message for fault in reversed(faults)},
    )


def _tokens(whole: Sequence[Outcome]) -> Tokens:
    cached = [outcome.cached_tokens for outcome in whole if outcome.cached_tokens is not None]
    return Tokens(
        prompt=sum(outcome.prompt_tokens for outcome in whole),
        cached=sum(cached) if cached else None,
        output=sum(outcome.completion_tokens for outcome in whole),
        counted_by_usage=sum(outcome.counted_by == "usage" for outcome in whole),
        checked_by_ids=sum(outcome.ids is not None and outcome.counted_by == "usage" for outcome in whole),
    )


def _goodput(ended: Sequence[Outcome], objective: Objective, seconds: float) -> Goodput:
    good = sum(is_good(outcome, objective) for outcome in ended)
    return Goodput(
        objective=str(objective),
        good=good,
        requests_per_second=good / seconds if seconds > 0 else 0.0,
        share=good / len(ended) if ended else 0.0,
    )
