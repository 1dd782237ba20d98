"""One server, one card, two engines: the same weights as GGUF and as safetensors, chosen for each request."""

import json
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.server import ServeProgram, long_story, write_card
from tests.support.tiny import Shape
from tests.support.twins import BACKENDS, write_twins


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    tables = write_twins(home)
    write_card(home, "twin", tables, backends=BACKENDS)
    write_card(home, "for-mlx", tables, backends=BACKENDS, runner="mlx")
    with ServeProgram(home) as program:
        yield program


def texts(server: ServeProgram, model: str, **body: object) -> list[str]:
    reply = server.complete(model, **{"max_tokens": 40, "temperature": 0, "ignore_eos": True, **body})
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-exo-runner"] == ("mlx" if "mlx" in model else "cuda")
    return [choice["text"] for choice in reply.json()["choices"]]


def test_the_request_or_the_card_chooses_the_engine_and_the_text_is_the_same(server: ServeProgram) -> None:
    by_llama_cpp = texts(server, "twin")
    assert texts(server, "twin@mlx") == by_llama_cpp
    assert texts(server, "for-mlx") == by_llama_cpp
    assert texts(server, "twin@cuda", temperature=1, seed=5) == texts(server, "twin@mlx", temperature=1, seed=5)
    refused = server.complete("for-mlx@cuda")
    assert refused.status_code == 400
    assert "runner mlx" in refused.json()["error"]["message"]


@pytest.mark.parametrize("model", ["twin@cuda", "twin@mlx"])
def test_neither_an_end_token_nor_a_stop_string_ends_the_first_tokens(server: ServeProgram, model: str) -> None:
    def ended(**body: object) -> tuple[str, int, str]:
        """The text, the number of tokens and the finish reason."""
        reply = server.complete(model, **{"max_tokens": 20, "temperature": 0, **body}).json()
        choice = reply["choices"][0]
        return choice["text"], reply["usage"]["completion_tokens"], choice["finish_reason"]

    ends = {str(token): 100 for token in range(Shape().vocabulary - 3, Shape().vocabulary)}
    assert ended(logit_bias=ends) == ("", 1, "stop")
    _, tokens, reason = ended(logit_bias=ends, min_tokens=7)
    assert (tokens, reason) == (8, "stop")
    assert ended(logit_bias=ends, ignore_eos=True)[1:] == (20, "length")
    x = {str(ord("x")): 100}
    assert ended(logit_bias=x, stop="xx") == ("", 2, "stop")
    assert ended(logit_bias=x, stop="xx", min_tokens=7) == ("x" * 7, 9, "stop")
    refused = server.complete(model, max_tokens=4, min_tokens=5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_tokens")


def test_a_list_of_prompts_gets_a_choice_for_each(server: ServeProgram) -> None:
    prompts = ["once upon a time", "the quick brown fox", "x"]
    together = texts(server, "twin@mlx", prompt=prompts)
    assert together == [texts(server, "twin@mlx", prompt=prompt)[0] for prompt in prompts]


def test_a_prompt_that_is_an_earlier_prompt_with_its_answer_goes_on(server: ServeProgram) -> None:
    whole = texts(server, "twin@mlx", prompt="abc", max_tokens=60)[0]
    head = texts(server, "twin@mlx", prompt="abc", max_tokens=30)[0]
    assert texts(server, "twin@mlx", prompt="abc" + head, max_tokens=30)[0] == whole[len(head) :]
    assert texts(server, "twin@mlx", prompt="abc" + head, max_tokens=30)[0] == whole[len(head) :]


def test_a_stop_string_stops_however_it_would_be_tokenised(server: ServeProgram) -> None:
    free = texts(server, "twin@mlx")[0]
    for start in range(4, 20, 3):
        stop = free[start : start + 5]
        assert texts(server, "twin@mlx", stop=stop)[0] == free[: free.index(stop)]


def test_seeds_hold_within_a_batch(server: ServeProgram) -> None:
    batch = texts(server, "twin@mlx", temperature=1, seed=7, n=8)
    assert len(set(batch)) == 8
    assert [texts(server, "twin@mlx", temperature=1, seed=7 + choice)[0] for choice in (0, 3, 7)] == [
        batch[choice] for choice in (0, 3, 7)
    ]


# --- one engine keeps dying ---

TOKENS = 1200
BODY = long_story(TOKENS)


@contextmanager
def killing(server: ServeProgram, module: str) -> Generator[list[int]]:
    """Kills every process of the runner ``module`` as soon as it appears. Gives the killed ones' numbers."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):  # no event tells a test of another process's child
            for runner in server.runners():
                with suppress(psutil.NoSuchProcess):
                    if module in runner.cmdline()[-1] and runner.pid not in killed:
                        runner.kill()
                        killed.append(runner.pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def test_a_stream_moves_to_the_other_engine_when_the_first_keeps_dying(tmp_path: Path) -> None:
    tables = write_twins(tmp_path)
    write_card(tmp_path, "twin", tables, backends=BACKENDS)
    with ServeProgram(tmp_path) as server:
        whole = server.complete("twin", **BODY)
        assert whole.headers["x-exo-runner"] == "cuda"
        undisturbed = whole.json()["choices"][0]["text"]
        request = {**BODY, "model": "twin", "stream": True, "stream_options": {"include_usage": True}}
        with server.client.stream("POST", "/v1/completions", json=request) as reply:
            assert reply.headers["x-exo-runner"] == "cuda"
            events = (json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))
            before = [next(events) for _ in range(5)]
            with killing(server, "runner_cuda") as killed:
                after = list(events)
        text_before, text_after = text_of(before), text_of(after)
        assert text_before
        assert text_after
        assert text_before + text_after == undisturbed
        assert after[-1]["usage"]["completion_tokens"] == TOKENS
        assert len(killed) >= 3

        later = server.complete("twin", **BODY)
        assert later.json()["choices"][0]["text"] == undisturbed
        assert later.headers["x-exo-runner"] == "mlx"
        route = later.headers["x-exo-route"]
        assert "LlamaCppCpu, which is left out while runner cuda keeps failing; MlxCpu is next" in route
        rows = {row["runner"]: row for row in server.client.get("/v1/instances").json()["data"]}
        assert (rows["cuda"]["state"], rows["cuda"]["deaths"]) == ("Failed", len(killed))
        assert "SIGKILL" in rows["cuda"]["last_failure"]["message"]
        assert (rows["mlx"]["state"], rows["mlx"]["deaths"]) == ("Ready", 0)


def test_a_stream_moves_on_when_the_first_engines_file_is_torn_under_it(tmp_path: Path) -> None:
    """Its runner dies once, and no other can be loaded."""
    tables = write_twins(tmp_path)
    write_card(tmp_path, "twin", tables, backends=BACKENDS)
    with ServeProgram(tmp_path) as server:
        undisturbed = server.complete("twin", **BODY).json()["choices"][0]["text"]
        with server.client.stream("POST", "/v1/completions", json={**BODY, "model": "twin", "stream": True}) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data: "))
            before = [json.loads(next(lines)[6:]) for _ in range(5)]
            whole = (tmp_path / "twin.gguf").read_bytes()
            (tmp_path / "twin.gguf").unlink()  # what the runner has mapped stays whole
            (tmp_path / "twin.gguf").write_bytes(whole[:3000])
            server.runners()[0].kill()
            *after, done = list(lines)
        assert done == "data: [DONE]", done
        assert text_of(before) + text_of([json.loads(line[6:]) for line in after]) == undisturbed


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"])
