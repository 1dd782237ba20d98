"""``exo serve`` and the commands with models that other programs keep, with paths, and with names of the hub."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import LocalHub
from tests.support.other_programs import Ollama, download, put, variables
from tests.support.server import DEADLINE_SECONDS, ServeProgram, environment, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx

SEEDS = {
    "hf/org/model:F32": 1,
    "ollama/tiny:1b": 2,
    "lmstudio/org/tiny:Q8_0": 3,
    "llama.cpp/org_model_tiny": 4,
    "local/own": 5,
}
"""The weights of each model differ, so that an answer tells which one has been loaded."""
REPO = "someone/small-GGUF"
PROMPT = {"prompt": "once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def gguf(folder: Path, seed: int) -> Path:
    path = folder / f"seed-{seed}.gguf"
    write_gguf(path, Shape(seed=seed))
    return path


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all programs, with one model in each."""
    home, made = tmp_path_factory.mktemp("others"), tmp_path_factory.mktemp("made")
    hf, ollama, lmstudio, llamacpp, further = (gguf(made, seed) for seed in SEEDS.values())
    with LocalHub() as hub:
        hub.commit({"tiny-F32.gguf": hf})
        download(home / "hub", hub)
    Ollama(home / "ollama").model("library/tiny:1b", ollama, {"temperature": 0.0, "num_ctx": 64})
    put(home / "lmstudio" / "org" / "tiny" / "tiny-Q8_0.gguf", lmstudio)
    put(home / "llama.cpp" / "org_model_tiny.gguf", llamacpp)
    put(home / "further" / "own.gguf", further)
    (home / "further" / "broken.gguf").write_bytes(b"\0" * 64)
    return home


@pytest.fixture(scope="module")
def server(others: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    with ServeProgram(
        home, "--load", str(gguf(home, 6)), fake=False, python=sys.executable, **variables(others)
    ) as server:
        yield server


def exo(home: Path, *arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exo", *arguments],
        env={**environment(home), "EXO_OFFLINE": "1", **given},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The text of each model's weights, from model cards that name the files."""
    home = tmp_path_factory.mktemp("expected")
    for seed in (*SEEDS.values(), 6):
        path = str(gguf(home, seed))
        write_card(home, f"seed-{seed}", {"cuda": {"path": path, "n_ctx": 256, "slots": 1, "threads": 1}})
    with ServeProgram(home) as server:
        return {seed: text_of(server, f"test/seed-{seed}") for seed in (*SEEDS.values(), 6)}


def text_of(server: ServeProgram, model: str) -> str:
    reply = server.client.post("/v1/completions", json={"model": model, **PROMPT})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


@pytest.mark.parametrize("model", SEEDS)
def test_a_model_of_each_program_answers(server: ServeProgram, expected: dict[int, str], model: str) -> None:
    assert text_of(server, model) == expected[SEEDS[model]]
    assert len(set(expected.values())) == len(expected)


def test_a_path_is_loaded_at_the_start(server: ServeProgram, expected: dict[int, str]) -> None:
    assert text_of(server, "local/seed-6@cuda") == expected[6]


def test_ollamas_own_name_is_enough(server: ServeProgram, expected: dict[int, str]) -> None:
    assert text_of(server, "tiny:1b") == expected[2]
    asked = {"model": "tiny:1b", "prompt": PROMPT["prompt"], "raw": True, "stream": False}
    reply = server.client.post("/api/generate", json={**asked, "options": {"num_predict": 2}})
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == "ollama/tiny:1b"


def test_the_lists_tell_where_models_come_from(server: ServeProgram) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    found = {each["id"]: each["found_in"] for each in listed if "found_in" in each}
    assert (
        found.items()
        >= {
            "hf/org/model:F32": "Hugging Face's cache",
            "ollama/tiny:1b": "Ollama",
            "lmstudio/org/tiny:Q8_0": "LM Studio",
            "llama.cpp/org_model_tiny": "llama.cpp's cache",
            "local/own": "a folder of yours",
        }.items()
    )
    order = [each["id"] for each in listed]
    absent = [each["id"] for each in listed if not each["downloaded"]]
    assert max(order.index(name) for name in found) < min(order.index(name) for name in absent)
    tags = {each["name"]: each for each in server.client.get("/api/tags").json()["models"]}
    assert tags["tiny:1b"]["found_in"] == tags["ollama/tiny:1b"]["found_in"] == "Ollama"
    assert server.client.get("/v1/models/ollama/tiny:1b").json()["downloaded"]


def test_a_model_that_comes_and_goes(server: ServeProgram, others: Path, expected: dict[int, str]) -> None:
    path = put(others / "lmstudio" / "late" / "late" / "late.gguf", others / "further" / "own.gguf")
    model = "lmstudio/late/late:late"
    wait_until(server, model, 200)
    assert text_of(server, model) == expected[5]
    path.unlink()
    wait_until(server, model, 404)


def wait_until(server: ServeProgram, model: str, status: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (reply := server.client.get(f"/v1/models/{model}")).status_code != status:
        assert time.monotonic() < deadline, reply.text
        time.sleep(0.1)


def test_the_commands_show_a_found_model_and_do_not_delete_it(others: Path, tmp_path: Path) -> None:
    given = variables(others)
    rows: list[dict[str, Any]] = json.loads(exo(tmp_path, "list", "--json", **given).stdout)
    assert {row["model_id"]: row["found_in"] for row in rows}["ollama/tiny:1b"] == "Ollama"
    assert "broken.gguf" not in exo(tmp_path, "list", **given).stderr
    said = exo(tmp_path, "list", "-v", **given).stderr
    assert said.count(f"{others / 'further' / 'broken.gguf'}: is not a GGUF file") == 1
    shown = exo(tmp_path, "show", "tiny:1b", **given).stdout
    assert "Ollama; its model card is made from its files" in shown
    assert "set in Ollama and not used: num_ctx" in shown
    assert "4,096 tokens: the trained length" in shown
    refused = exo(tmp_path, "rm", "tiny:1b", "--yes", **given)
    assert refused.returncode == 1
    assert "`ollama rm tiny:1b` deletes it" in refused.stderr
    assert len(list((others / "ollama" / "blobs").iterdir())) >= 4
    off = {**given, "EXO_FIND_MODELS": "0"}
    assert {row["found_in"] for row in json.loads(exo(tmp_path, "list", "--json", **off).stdout)} == {
        "a folder of yours",
        None,
    }


def test_a_folder_of_the_cache_is_loaded_by_mlx(tmp_path: Path) -> None:
    write_mlx(tmp_path / "folder", Shape())
    with LocalHub() as hub:
        hub.commit({path.name: path for path in (tmp_path / "folder").iterdir()})
        download(tmp_path / "others" / "hub", hub)
    given, path = variables(tmp_path / "others"), str(tmp_path / "folder")
    with ServeProgram(tmp_path, "--load", path, fake=False, python=sys.executable, **given) as server:
        assert text_of(server, "hf/org/model@mlx") == text_of(server, "local/folder@mlx")


class TestNamesOfTheHub:
    """``hf.co/OWNER/NAME:QUANT`` in one step."""

    @pytest.fixture
    def hub(self, tmp_path: Path) -> Iterator[LocalHub]:
        with LocalHub() as hub:
            files = {f"small-{quant}.gguf": gguf(tmp_path, at) for at, quant in enumerate(("Q4_K_M", "Q8_0"), 1)}
            hub.commit(files, REPO)
            yield hub

    def run(self, home: Path, model: str, hub: LocalHub | None) -> subprocess.CompletedProcess[str]:
        where = {"HF_ENDPOINT": hub.url, "EXO_OFFLINE": "0"} if hub is not None else {}
        return exo(home, "run", model, "once", "--raw", "--max-tokens", "8", "--temperature", "0", **where)

    def test_the_first_run_downloads_and_the_second_uses_what_is_there(self, tmp_path: Path, hub: LocalHub) -> None:
        first = self.run(tmp_path, f"hf.co/{REPO}:Q8_0", hub)
        assert first.returncode == 0, first.stderr
        assert "model card written to" in first.stderr
        for same in (f"hf:{REPO}:q8_0", f"https://huggingface.co/{REPO}", f"huggingface.co/{REPO}@cuda"):
            again = self.run(tmp_path, same, None)
            assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
        assert len(list((tmp_path / "custom_model_cards").iterdir())) == 1

    def test_each_quantisation_has_a_card_of_its_own(self, tmp_path: Path, hub: LocalHub) -> None:
        plain = self.run(tmp_path, f"hf.co/{REPO}", hub)  # Q4_K_M, as exo add chooses
        other = self.run(tmp_path, f"hf.co/{REPO}:Q8_0", hub)
        assert (plain.returncode, other.returncode) == (0, 0), plain.stderr + other.stderr
        assert plain.stdout != other.stdout
        assert self.run(tmp_path, f"hf.co/{REPO}:Q4_K_M", None).stdout == plain.stdout
        rows = json.loads(exo(tmp_path, "list", "--json").stdout)
        mine = {row["model_id"]: row["on_disk"]["cuda"]["state"] for row in rows if row["model_id"].startswith(REPO)}
        assert mine == {REPO: "present", f"{REPO}:Q8_0": "present"}

    def test_what_the_hub_does_not_have(self, tmp_path: Path, hub: LocalHub) -> None:
        done = self.run(tmp_path, f"hf.co/{REPO}:Q2_K", hub)
        assert (done.returncode, done.stdout) == (3, "")
        assert "it has Q4_K_M, Q8_0" in done.stderr
        assert not (tmp_path / "custom_model_cards").exists()

    def test_a_running_server_learns_of_it(self, tmp_path: Path, hub: LocalHub) -> None:
        with ServeProgram(tmp_path) as server:
            port = server.url.rpartition(":")[2]
            model, where = f"hf.co/{REPO}:Q8_0", {"HF_ENDPOINT": hub.url, "EXO_OFFLINE": "0"}
            done = exo(tmp_path, "run", "--port", port, model, "once", "--raw", "--max-tokens", "2", **where)
            assert done.returncode == 0, done.stderr
            assert server.client.get(f"/v1/models/{REPO}").json()["status"]["value"] == "loaded"

    def test_the_cache_of_the_hub_is_used_first(self, tmp_path: Path, hub: LocalHub) -> None:
        download(tmp_path / "others" / "hub", hub, "*Q8_0*", repo=REPO)
        given = variables(tmp_path / "others")
        done = exo(tmp_path, "run", f"hf.co/{REPO}:Q8_0", "once", "--raw", "--max-tokens", "2", **given)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "models").exists()

    def test_serve_loads_it_at_the_start(self, tmp_path: Path, hub: LocalHub) -> None:
        with ServeProgram(tmp_path, "--load", f"hf.co/{REPO}:Q4_K_M", HF_ENDPOINT=hub.url) as server:
            assert text_of(server, REPO)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serve", "--load", "./absent.gguf"], 3, "absent.gguf: is not there"),
        (["serve", "--load", "{one}", "--load", "{two}"], 2, "would both be local/same"),
        (["run", "{one}@vllm", "hi"], 1, "runner vllm"),
        (["chat", "absent.gguf"], 3, "is not there"),
    ],
)
def test_paths_that_cannot_be_used(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    one, two = (put(tmp_path / place / "same.gguf", gguf(tmp_path, 1)) for place in ("one", "two"))
    done = exo(tmp_path, *(each.format(one=one, two=two) for each in arguments))
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_a_running_server_takes_no_path(tmp_path: Path) -> None:
    path = gguf(tmp_path, 1)
    with ServeProgram(tmp_path) as server:
        done = exo(tmp_path, "run", "--port", server.url.rpartition(":")[2], str(path), "hi")
    assert done.returncode == 1
    assert f"--load {path}" in done.stderr


def test_a_path_answers_in_one_step(tmp_path: Path, expected: dict[int, str]) -> None:
    path = gguf(tmp_path, 1)
    fixed = ("--raw", "--max-tokens", "8", "--temperature", "0")
    done = exo(tmp_path, "run", f"{path}@cuda", str(PROMPT["prompt"]), *fixed)
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n")
    assert text
    assert expected[1].startswith(text)
