"""The commands about models: pull, list, show, add, rm, against a hub on this machine."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.edited_gguf import Edit, rewrite
from tests.support.hub import REPO, Fault, LocalHub
from tests.support.server import ServeProgram, environment, without_vllm, write_card
from tests.support.terminal import CTRL_C, Terminal
from tests.support.tiny import Shape, write_gguf, write_mlx

Q4, Q8 = "big-Q4_K_M.gguf", "big-Q8_0.gguf"
CONTENT = random.Random(6).randbytes(1 << 20)
SIZE = f"{len(CONTENT):,}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    with LocalHub() as hub:
        hub.commit({Q4: CONTENT, Q8: CONTENT[::-1], "tiny-F16.gguf": tmp_path / "tiny.gguf"})
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    write_card(home, "big", {"cuda": {"repo": REPO, "file": Q4}})
    write_card(home, "tiny", {"cuda": {"repo": REPO, "file": "tiny-*.gguf", "n_ctx": 512, "threads": 1}})
    write_card(home, "own", {"cuda": {"path": str(home / "own.gguf")}})
    return home


def exo(
    home: Path, *arguments: str, hub: LocalHub | None = None, typed: str = "", python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "exo", *arguments]
    where = {"HF_ENDPOINT": hub.url} if hub is not None else {"EXO_OFFLINE": "1"}
    return subprocess.run(
        command,
        env={**environment(home), **where},
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def listed(home: Path, model: str) -> dict[str, Any]:
    return next(row for row in json.loads(exo(home, "list", "--json").stdout) if row["model_id"] == f"test/{model}")


def folder(home: Path) -> Path:
    return home / "models" / REPO.replace("/", "--")


def test_a_pull_says_where_the_model_is_and_is_not_done_twice(home: Path, hub: LocalHub) -> None:
    done = exo(home, "pull", "big", hub=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"test/big for cuda: {folder(home) / Q4} (Q4_K_M, 0.00 GB, revision ")
    assert f"pulling 1 files, {SIZE} bytes, of {REPO}" in done.stderr
    assert (folder(home) / Q4).read_bytes() == CONTENT
    assert exo(home, "pull", "big@cuda", hub=hub).stdout == done.stdout
    assert hub.starts == [0]
    found = listed(home, "big")["on_disk"]["cuda"]
    assert (found["state"], found["bytes"], found["path"]) == ("present", len(CONTENT), str(folder(home) / Q4))
    assert listed(home, "tiny")["on_disk"]["cuda"]["state"] == "absent"
    assert "cuda 0.00 GB" in exo(home, "list").stdout


def test_a_pull_and_show_tell_of_the_projector(home: Path, hub: LocalHub) -> None:
    """Also where the model itself has been on disk before."""
    assert exo(home, "pull", "big", hub=hub).returncode == 0
    projector = bytes(300_000)
    hub.commit({Q4: CONTENT, "mmproj-F16.gguf": projector})
    write_card(home, "big", {"cuda": {"repo": REPO, "file": Q4, "mmproj": "mmproj-*.gguf"}})
    shown = exo(home, "show", "big").stdout
    assert f"{REPO}: {Q4} and mmproj-*.gguf" in shown
    assert "in part, " in shown
    done = exo(home, "pull", "big", hub=hub)
    assert done.returncode == 0, done.stderr
    assert f"pulling 2 files, {len(CONTENT) + len(projector):,} bytes" in done.stderr
    assert "for runner cuda, the projector for pictures among them" in done.stderr
    assert (folder(home) / "mmproj-F16.gguf").read_bytes() == projector
    assert hub.starts == [0, 0], "the model's file is not downloaded again"


def test_ctrl_c_says_how_to_go_on_and_the_next_pull_does(home: Path, hub: LocalHub) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    with Terminal(home, "pull", "big", HF_ENDPOINT=hub.url) as terminal:
        terminal.wait_for(Q4)
        terminal.wait_for("%.* MB")
        assert hub.state.stalled.wait(60)
        terminal.wait_for("2[0-9]%")
        terminal.keys(CTRL_C)
        said = terminal.wait_for("goes on from there")
        hub.state.go_on.set()
        assert terminal.end() == 130
    assert f"of {SIZE} bytes are here, and `exo pull test/big --runner cuda`" in said
    assert "Traceback" not in terminal.shown
    left = listed(home, "big")["on_disk"]["cuda"]
    assert (left["state"], left["total"]) == ("partial", len(CONTENT))
    assert 0 < left["bytes"] < len(CONTENT)
    assert exo(home, "pull", "big", hub=hub).returncode == 0
    assert (folder(home) / Q4).read_bytes() == CONTENT
    assert hub.starts[0] == 0
    assert hub.starts[1] >= left["bytes"]


def test_a_pull_that_hears_nothing_ends_at_once_when_it_is_interrupted(home: Path, hub: LocalHub) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    command = [sys.executable, "-m", "exo", "pull", "big"]
    variables = {**environment(home), "HF_ENDPOINT": hub.url}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert hub.state.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=20)  # the hub is silent for longer
    assert (process.returncode, out) == (130, "")
    assert "goes on from there" in said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["bigg"], 3, "did you mean big"),
        (["big", "--quant", "Q2_K"], 3, "it has Q4_K_M, Q8_0, F16"),
        (["big", "--runner", "abacus"], 2, "--runner: there is no runner 'abacus'; there are cuda, mlx"),
        (["big@cuda", "--runner", "mlx"], 2, "asks for runner cuda (got 'mlx')"),
        (["own"], 1, "names the path"),
    ],
)
def test_what_cannot_be_pulled(home: Path, hub: LocalHub, arguments: list[str], code: int, says: str) -> None:
    done = exo(home, "pull", *arguments, hub=hub)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr


def test_offline_is_a_hub_that_is_not_reachable(home: Path) -> None:
    done = exo(home, "pull", "big")
    assert done.returncode == 4
    assert "unset EXO_OFFLINE" in done.stderr


def test_another_quantisation_than_the_cards_can_be_pulled_and_removed_again(home: Path, hub: LocalHub) -> None:
    done = exo(home, "pull", "big", "--quant", "q8_0", hub=hub)
    assert done.returncode == 0, done.stderr
    assert f"file = '{Q8}' in its table [cuda] has this one loaded" in done.stderr
    assert listed(home, "big")["on_disk"]["cuda"]["state"] == "absent"
    assert exo(home, "rm", "big", "--yes").returncode == 3
    assert exo(home, "rm", "big", "--quant", "Q8_0", "--yes").returncode == 0
    assert not folder(home).exists()


def test_removing_asks_first(home: Path, hub: LocalHub) -> None:
    exo(home, "pull", "big", hub=hub)
    kept = exo(home, "rm", "big", typed="n\n")
    assert kept.returncode == 1
    assert f"cuda: {folder(home) / Q4}, {SIZE} bytes" in kept.stdout
    assert "nothing is deleted" in kept.stderr
    assert (folder(home) / Q4).exists()
    assert exo(home, "rm", "big", typed="y\n").stdout.endswith(f"deleted 1 files, {SIZE} bytes\n")
    assert not folder(home).exists()
    again = exo(home, "rm", "big", "--yes")
    assert (again.returncode, again.stdout) == (3, "")
    assert "nothing was pulled of test/big for cuda" in again.stderr


def test_what_was_not_pulled_stays(home: Path) -> None:
    folder(home).mkdir(parents=True)
    (folder(home) / Q4).write_bytes(b"by hand")
    done = exo(home, "rm", "big", "--yes")
    assert done.returncode == 3
    assert "was not pulled by exo, so it stays" in done.stderr
    assert (folder(home) / Q4).exists()


def test_a_model_that_a_server_has_loaded_is_not_removed(home: Path, hub: LocalHub) -> None:
    assert exo(home, "pull", "tiny", hub=hub).returncode == 0
    with ServeProgram(home) as server:
        port = str(httpx.URL(server.url).port)
        assert server.complete("tiny", max_tokens=1).status_code == 200
        refused = exo(home, "rm", "tiny", "--yes", "--port", port)
        assert refused.returncode == 1
        assert "`exo stop test/tiny` unloads it" in refused.stderr
        assert exo(home, "stop", "tiny", "--port", port).stdout == "tiny is unloaded\n"
        assert exo(home, "stop", "tiny", "--port", port).stdout == "tiny was not loaded\n"
        assert exo(home, "rm", "tiny", "--yes", "--port", port).returncode == 0
        assert exo(home, "stop", "nothing", "--port", port).returncode == 3


def test_a_repository_becomes_a_card_and_is_shown(home: Path, hub: LocalHub) -> None:
    added = exo(home, "add", f"{REPO}:F16", "--name", "me/mine", "--json", hub=hub)
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["files"] == ["tiny-F16.gguf"]
    assert exo(home, "add", f"{REPO}:F16", "--name", "me/mine", hub=hub).returncode == 1
    assert exo(home, "add", "org/nothing", hub=hub).returncode == 3
    shown = json.loads(exo(home, "show", "mine", "--json").stdout)
    assert shown["card"]["model_id"] == "me/mine"
    assert [engine["state"] for engine in shown["engines"]] == ["absent"]
    assert "me/mine" in exo(home, "show", "mine").stdout
    assert exo(home, "show", "none").returncode == 3
    assert exo(home, "pull", "mine", hub=hub).returncode == 0


def test_the_doctor_tells_of_models_that_are_broken_and_of_faults_in_others(home: Path) -> None:
    write_gguf(home / "own.gguf", Shape())
    rewrite(home / "own.gguf", home / "unnamed.gguf", Edit(keys={"tokenizer.ggml.pre": None}))
    rewrite(home / "own.gguf", home / "broken.gguf", Edit(keys={"llama.block_count": 0}))
    for name in ("unnamed", "broken"):
        write_card(home, name, {"cuda": {"path": str(home / f"{name}.gguf")}})
    python = without_vllm(home)
    found = json.loads(exo(home, "doctor", "--json", python=python).stdout)["models"]
    assert [(each["model_id"], each["runner"]) for each in found] == [("test/broken", "cuda"), ("test/unnamed", "cuda")]
    assert "block_count = 0" in found[0]["problem"]
    assert found[1]["problem"] is None
    assert "does not name its pre-tokenizer" in found[1]["notes"][0]
    text = exo(home, "doctor", python=python).stdout
    assert "\nmodel test/broken with cuda\n  problem " in text
    assert "\nmodel test/unnamed with cuda\n  note    " in text
    assert "test/own" not in text


def test_the_doctor_tells_of_folders_with_code_and_of_incomplete_files(home: Path, hub: LocalHub) -> None:
    for name in ("coded", "sound", "lacking"):
        write_mlx(home / name, Shape())
        write_card(home, name, {"mlx": {"path": str(home / name)}}, backends=["MlxCpu"])
    config = json.loads((home / "coded" / "config.json").read_text())
    (home / "coded" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a.B"}}))
    index = {"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "other.safetensors"}}
    (home / "lacking" / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.state.faults.append(Fault("stall", at=300_000))
    with Terminal(home, "pull", "big", HF_ENDPOINT=hub.url) as terminal:
        assert hub.state.stalled.wait(60)
        terminal.wait_for("2[0-9]%")
        terminal.keys(CTRL_C)
        assert terminal.end() == 130
        hub.state.go_on.set()
    text = exo(home, "doctor", python=without_vllm(home)).stdout
    assert (
        "\nmodel test/coded with mlx\n  note    the folder names code of its own (auto_map), which is not run" in text
    )
    assert "test/sound" not in text
    assert "\nmodel test/lacking with mlx\n  problem " in text
    assert "\nmodel test/big with cuda\n  problem its files are incomplete, 0 of 1 MB are at " in text
    assert "exo pull continues the download" in text
