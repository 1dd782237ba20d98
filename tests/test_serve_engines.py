"""One server, one card, two engines: the same weights as GGUF and as safetensors, chosen for each request."""

from collections.abc import Iterator

import pytest
from pydantic import JsonValue

from tests.server import ServeProgram, write_card
from tests.tiny import Shape, write_gguf, write_mlx

BACKENDS: list[JsonValue] = ["LlamaCppCpu", "MlxCpu"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "twin.gguf", Shape())
    write_mlx(home / "twin", Shape())
    exact = {"n_ctx": 512, "slots": 4}
    tables: dict[str, dict[str, JsonValue]] = {
        "cuda": {
            "path": str(home / "twin.gguf"),
            "threads": 1,
            "cache_type_k": "f32",
            "cache_type_v": "f32",
            "flash_attn": "off",
            **exact,
        },
        "mlx": {"path": str(home / "twin"), "dtype": "float32", **exact},
    }
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
