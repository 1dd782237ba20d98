"""``exo bench`` against a real server with the fake runner, and against what is no server."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exo.bench.options import BenchOptions, Objective
from exo.bench.report import Report, Stage
from exo.bench.run import run_bench
from exo.cli import app
from exo.exit_code import CommandError, ExitCode
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_card(home, "fake", {"cuda": {"slots": 4, "chat_template": "{{ messages[0].content }}"}})
    write_card(home, "slow", {"cuda": {"slots": 4, "step_seconds": 0.002}})
    write_card(home, "small", {"cuda": {"slots": 4, "n_ctx": 256}})
    with ServeProgram(home, fake=True) as program:
        yield program


def measured(server: ServeProgram, **fields: object) -> Report:
    asked: dict[str, object] = {"model": "fake", "prompt_words": 5, "output_tokens": 12, "time_limit": DEADLINE_SECONDS}
    return run_bench(BenchOptions.check(url=server.url, **{**asked, **fields}))


def only(report: Report) -> Stage:
    (stage,) = report.stages
    return stage


def test_a_sweep_counts_every_request_and_every_token(server: ServeProgram) -> None:
    report = measured(server, concurrency=(1, 3), requests=7, token_ids=True, objective=Objective(ttft=60_000))
    assert [stage.load.concurrency for stage in report.stages] == [1, 3]
    for stage in report.stages:
        assert (stage.requests.sent, stage.requests.whole, stage.requests.errors) == (7, 7, {})
        assert (stage.tokens.output, stage.tokens.counted_by_usage, stage.tokens.checked_by_ids) == (84, 7, 7)
        assert stage.tokens.prompt > 7 * 5
        assert stage.ttft is not None
        assert stage.ttft.count == 7
        assert stage.itl is not None
        assert stage.itl.count <= 7 * 11
        assert stage.goodput is not None
        assert stage.goodput.good == 7


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_requests_arrive_at_a_rate(server: ServeProgram, endpoint: str) -> None:
    stage = only(measured(server, endpoint=endpoint, rates=(200.0,), requests=9, temperature=0.8, top_k=40))
    assert (stage.load.rate, stage.requests.whole, stage.tokens.output) == (200.0, 9, 108)


def test_a_long_prompt_comes_among_streams_that_all_run_on(server: ServeProgram) -> None:
    stage = only(measured(server, model="slow", workload="long-prompt", long_words=300, concurrency=(3,)))
    assert (stage.requests.whole, stage.requests.cut, stage.requests.errors) == (1, 3, {})
    found = stage.long_prompt
    assert found is not None
    assert found.prompt_tokens > 300
    assert found.gaps_before is not None
    assert found.gaps_before.count >= 3
    assert found.gaps_during is not None
    assert found.gaps_during.count >= 3


def test_what_goes_wrong_after_the_warm_up_is_counted_by_kind(server: ServeProgram) -> None:
    assert server.complete("small", max_tokens=1).status_code == 200  # while it loads, an error is part of a stream
    stage = only(measured(server, model="small", prompt_words=200, warmup=0, requests=5, concurrency=(2,)))
    assert stage.requests.errors == {"http_400": 5}
    assert "256" in stage.requests.messages["http_400"]
    assert stage.ttft is None


def test_requests_that_outlast_the_time_limit_are_cut(server: ServeProgram) -> None:
    stage = only(
        measured(server, model="slow", output_tokens=3000, requests=6, concurrency=(2,), warmup=0, time_limit=0.3)
    )
    assert stage.requests.cut == 2
    assert (stage.requests.sent, stage.requests.whole) == (2, 0)


def test_a_model_that_is_not_there_ends_it_with_the_servers_words(server: ServeProgram) -> None:
    with pytest.raises(CommandError, match="no model card is called 'nothing'") as refused:
        measured(server, model="nothing")
    assert refused.value.code == ExitCode.FAILED


def test_no_server_ends_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(CommandError, match="cannot connect") as refused:
        run_bench(BenchOptions(url=f"127.0.0.1:{port}", model="fake"))
    assert refused.value.code == ExitCode.UNREACHABLE


def test_a_server_that_hangs_up_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            for _ in range(3):
                connection, _address = listener.accept()
                connection.recv(1 << 16)
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        stage = only(run_bench(BenchOptions(url=url, model="m", warmup=0, requests=3, concurrency=(3,))))
        thread.join()
    assert stage.requests.errors == {"connection": 3}


def shell(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_the_command_prints_a_table_and_draws_it(server: ServeProgram, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    small = ["--prompt-words", "5", "--output-tokens", "4", "--concurrency", "1,2", "--requests", "3"]
    code, output = shell(
        server.url, "--model", "fake", *small, "--token-ids", "--goodput", "ttft:60000", "--plot", str(plot)
    )
    assert code == 0
    for part in ("1 stream ", "2 streams", "3 of 3", "12, every id seen", "goodput, ttft:60000 ms", "(100%)"):
        assert part in output, part
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json_that_is_the_report(server: ServeProgram) -> None:
    code, output = shell(
        server.url, "--model", "fake", "--concurrency", "1", "--requests", "2", "--output-tokens", "4", "--json"
    )
    assert code == 0
    assert json.loads(output)["schema_version"] == 1
    assert only(Report.model_validate_json(output)).tokens.output == 8


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--concurrency", "one"], ExitCode.USAGE, "--concurrency"),
        (["--extra", "[1]"], ExitCode.USAGE, "--extra: Input should be a valid dictionary (got [1])"),
        (["--plot", "plot.txt"], ExitCode.USAGE, "--plot: the file's name must end in"),
        (["--goodput", "soon"], ExitCode.USAGE, "--goodput"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(arguments: list[str], code: ExitCode, said: str) -> None:
    found, output = shell("http://127.0.0.1:1", "--model", "m", *arguments)
    assert (found, said in output) == (code, True), output


def test_the_reports_json_keeps_its_shape(server: ServeProgram) -> None:
    """Who reads it relies on these names; a change of them is a new schema version."""
    found = measured(server, requests=2, concurrency=(1,), objective=Objective(ttft=60_000)).model_dump()
    assert found.keys() == {"schema_version", "date", "exo_version", "client", "options", "stages"}
    (stage,) = found["stages"]
    assert stage.keys() == {
        "load",
        "requests",
        "tokens",
        "seconds",
        "output_tokens_per_second",
        "total_tokens_per_second",
        "requests_per_second",
        "goodput",
        "ttft",
        "itl",
        "tpot",
        "e2e",
        "long_prompt",
    }
    assert stage["ttft"].keys() == {"count", "mean", "min", "p50", "p90", "p95", "p99", "max"}
    assert stage["requests"].keys() == {"sent", "whole", "cut", "errors", "messages"}
    assert stage["tokens"].keys() == {"prompt", "cached", "output", "counted_by_usage", "checked_by_ids"}
    assert stage["goodput"].keys() == {"objective", "good", "requests_per_second", "share"}
