"""How two servers' figures are set against each other, and the page that tells them."""

from pathlib import Path

import pytest

from bench.peer_report import (
    DATA,
    PAGE,
    PLOT,
    SCENARIOS,
    Ceiling,
    CeilingTurn,
    Contender,
    PeerFindings,
    ServerTurn,
    against_ceiling,
    comparisons,
    read_line,
    write,
)
from exo.bench.options import BenchOptions
from exo.bench.reading import Outcome
from exo.bench.report import LoadResult, Stage
from exo.bench.statistics import long_prompt, summarize
from exo.compare.comparison import HostFacts


def outcome(first: float, gap: float, tokens: int = 4) -> Outcome:
    times = tuple(first + gap * number for number in range(tokens))
    return Outcome(0.0, times[-1], times, prompt_tokens=5, completion_tokens=tokens, counted_by="usage")


def stage(first: float, gap: float, streams: int = 1) -> Stage:
    return summarize(LoadResult(concurrency=streams, rate=None), [outcome(first, gap) for _ in range(streams)], None)


def interrupted(gap: float) -> Stage:
    streams, long = [outcome(0.1, gap, 100)], Outcome(2.0, 5.0, (4.0, 5.0), prompt_tokens=50)
    return summarize(LoadResult(concurrency=1, rate=None), [long], None, long_prompt(streams, long))


def test_what_is_faster_or_sooner_is_better_by_its_ratio() -> None:
    found = {each.name: each for each in comparisons([stage(1, 1), stage(1, 1)], [stage(2, 2), stage(4, 4)])}
    assert found["output rate"].better == pytest.approx((2, 4))
    assert found["median time to first token"].better == pytest.approx((2, 4))
    assert found["p99 inter-token latency"].better == pytest.approx((2, 4))
    assert found["output rate"].words() == ("1.0 tokens/s", "0.4 tokens/s", "3.00 (2.00 to 4.00)")


def test_of_a_long_prompt_the_others_latency_and_its_own_count() -> None:
    others, own = comparisons([interrupted(0.1)], [interrupted(0.5)])
    assert others.better == pytest.approx((5,))
    assert own.better == pytest.approx((1,))


def test_the_ceiling_predicts_as_many_batches_as_there_were() -> None:
    batch = Ceiling(streams=2, prompt_tokens=5, output_tokens=4, prefill_seconds=0.5, decode_seconds=1.5)
    four = summarize(LoadResult(concurrency=2, rate=None), [outcome(2, 1) for _ in range(4)], None)
    assert against_ceiling([four], [batch]).better == pytest.approx((4 / 5,))


def test_a_line_of_llama_batched_bench_is_read() -> None:
    line = '{"pp": 41, "tg": 64, "pl": 4, "n_kv": 420, "t_pp": 0.5, "speed_pp": 328.0, "t_tg": 2.5, "t": 3.0}'
    assert read_line(line).seconds == 3.0


def test_every_scenario_is_a_load_that_can_be_asked_for() -> None:
    for scenario in SCENARIOS:
        for tiny in (True, False):
            BenchOptions.check(url="http://127.0.0.1:1", model="m", **scenario.sized(tiny=tiny))


def test_the_page_tells_every_scenario_and_its_data_gives_it_again(tmp_path: Path) -> None:
    turns = [
        ServerTurn(
            pair=0,
            scenario=scenario.name,
            server=server,
            stage=interrupted(0.1) if "among" in scenario.name else stage(1, 1, scenario.streams),
        )
        for scenario in SCENARIOS
        for server in (scenario.us, *scenario.peers)
    ]
    batches = tuple(
        Ceiling(streams=streams, prompt_tokens=5, output_tokens=4, prefill_seconds=1, decode_seconds=2)
        for streams in (1, 4, 16)
    )
    findings = PeerFindings(
        date="2026-11-22T00:00:00+00:00",
        commit="abc",
        tiny=False,
        host=HostFacts(system="Linux", processor="a processor", cpu_count=2, memory_total=1 << 34, nvidia_devices=()),
        pairs=1,
        contenders=(Contender(name="exo", version="1", flags="exo serve"),),
        turns=tuple(turns),
        ceilings=(CeilingTurn(pair=0, batches=batches),),
    )
    write(findings, tmp_path)
    page = (tmp_path / PAGE).read_text()
    for scenario in SCENARIOS:
        assert f"| {scenario.name} |" in page
    assert "| greedy, 1 stream | 4.0 s | 3.0 s | 0.75 (0.75 to 0.75) |" in page
    assert "tiny sizes" not in page
    assert (tmp_path / PLOT).stat().st_size < 100_000
    assert PeerFindings.model_validate_json((tmp_path / DATA).read_text()) == findings
