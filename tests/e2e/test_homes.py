"""The directory for everything, EXO_HOME, for users who share it, who have no other home, or who may not write it."""

import json
import os
import signal
import stat
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.support.hub import REPO, Fault, LocalHub
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.users import User, make_user, needs_root, open_folder

pytestmark = needs_root

GROUP = 5901
FILE = "tiny-Q4_K_M.gguf"
PART = 20_000


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as opened:
        yield opened


@pytest.fixture
def hub(folder: Path) -> Generator[LocalHub]:
    write_gguf(folder / FILE, Shape())
    with LocalHub() as local:
        local.commit({FILE: folder / FILE})
        yield local


@pytest.fixture
def home(folder: Path) -> Path:
    """A home that a group shares."""
    home = folder / "home"
    write_card(home, "tiny", {"cuda": {"repo": REPO, "file": FILE, "n_ctx": 512, "threads": 1}})
    os.chown(home, 0, GROUP)
    home.chmod(0o2775)
    return home


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupted_pull(user: User, home: Path, hub: LocalHub) -> None:
    """A pull that its user ends with Ctrl-C when a part of the file has come."""
    hub.state.faults = [Fault("stall", at=PART)]
    hub.state.stalled.clear()
    with user.start(home, "pull", "tiny", HF_ENDPOINT=hub.url) as process:
        assert hub.state.stalled.wait(60)
        wait_until(lambda: any(each.stat().st_size == PART for each in home.glob("models/*/.exo/*")))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert f"{PART:,} of" in error, error


def check_modes(home: Path) -> None:
    """The group can change whatever one of its users has created."""
    for path in home.rglob("*"):
        found = path.stat()
        if found.st_uid:
            assert found.st_gid == GROUP, path
            assert stat.filemode(found.st_mode)[4:6] == "rw", path


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_two_users_of_a_group_share_downloads(folder: Path, home: Path, hub: LocalHub, umask: int) -> None:
    alice, bob = (make_user(folder, uid, GROUP, umask=umask) for uid in (4901, 4902))
    interrupted_pull(alice, home, hub)
    check_modes(home)
    status, _, error = bob.exo(home, "rm", "tiny", "--yes")
    assert status == 0, error
    interrupted_pull(alice, home, hub)
    status, _, error = bob.exo(home, "pull", "tiny", HF_ENDPOINT=hub.url)
    assert status == 0, error
    assert hub.starts[-1] == PART
    check_modes(home)
    with ServeProgram(home, python=alice.python) as one, ServeProgram(home, python=bob.python) as two:
        for server in (one, two):
            reply = server.complete("tiny", max_tokens=4)
            assert reply.status_code == 200, reply.text
    check_modes(home)
    assert "WARNING" not in (home / "serve.log").read_text()
    status, _, error = alice.exo(home, "rm", "tiny", "--yes")
    assert status == 0, error
    assert not any(path.is_file() and path.stat().st_size for path in (home / "models").rglob("*"))


def test_a_home_that_may_not_be_written_serves_its_models(folder: Path, home: Path, hub: LocalHub) -> None:
    stranger = make_user(folder, 4903)
    for name in ("one", "two"):
        write_card(home, name, {"cuda": {"path": str(folder / FILE), "n_ctx": 512, "threads": 1}})
    before = set(home.rglob("*"))
    with ServeProgram(home, python=stranger.python) as server:
        for name in ("one", "two"):
            reply = server.complete(name, max_tokens=4)
            assert reply.status_code == 200, reply.text
    assert set(home.rglob("*")) - before == {home / "serve.log"}
    warnings = [line for line in (home / "serve.log").read_text().splitlines() if "cannot be written" in line]
    (warning,) = warnings
    assert warning.startswith(
        f"WARNING: {home}/exo_log/runner_log cannot be written (Permission denied);"
        " the logs of the runners go to standard error"
    )
    status, _, error = stranger.exo(home, "pull", "tiny", HF_ENDPOINT=hub.url)
    assert (status, error.splitlines()[1:]) == (1, [f"exo: {home}/models: Permission denied"])


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("closed", "Permission denied"),
        ("closed/models", "Permission denied"),
        ("x" * 256, "File name too long"),
        ("some/" * 1000, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        (f"{FILE}/models", "Not a directory"),
    ],
    ids=["closed", "inside", "long", "deep", "loop", "file"],
)
def test_models_that_cannot_be_reached_are_told_in_one_line(
    folder: Path, home: Path, hub: LocalHub, place: str, why: str
) -> None:
    stranger = make_user(folder, 4903)
    (folder / "closed").mkdir(0o700)
    (folder / "loop").symlink_to("loop")
    models = {"EXO_DEFAULT_MODELS_DIR": str(folder / place)}
    told = f"exo: models directory {folder / place}: cannot be listed: {why}"
    status, _, error = stranger.exo(home, "list", **models)
    assert (status, error.splitlines()) == (0, [told])
    status, _, error = stranger.exo(home, "pull", "tiny", HF_ENDPOINT=hub.url, **models)
    first, _, last = error.splitlines()
    assert (status, first) == (1, told)
    assert last.startswith("exo: ")
    assert last.endswith("Not a directory" if place == "loop" else why)
    assert stranger.exo(home, "rm", "tiny", "--yes", **models)[0] == 3


def test_a_model_folder_that_is_a_link_is_pulled_listed_and_removed(folder: Path, home: Path, hub: LocalHub) -> None:
    user = make_user(folder, 4901, GROUP)
    elsewhere = folder / "disk"
    elsewhere.mkdir()
    (home / "models").mkdir()
    for each in (elsewhere, home / "models"):
        os.chown(each, user.uid, user.uid)
    (home / "models" / REPO.replace("/", "--")).symlink_to(elsewhere)
    for command in ("pull", "rm"):
        status, _, error = user.exo(home, command, "tiny", *(["--yes"] if command == "rm" else []), HF_ENDPOINT=hub.url)
        assert status == 0, error
        shown = json.loads(user.exo(home, "list", "--json")[1])
        (tiny,) = [each for each in shown if each["model_id"] == "test/tiny"]
        assert tiny["on_disk"]["cuda"]["state"] == ("present" if command == "pull" else "absent")
        assert (elsewhere / FILE).exists() == (command == "pull")
    assert (home / "models" / REPO.replace("/", "--")).is_symlink()
