"""Nothing outside the models directory is ever written, whatever the hub, a card or a link says."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from tests.support.hub import Fault, LocalHub
from tests.support.pulling import gguf_card, hub_at, pull_card

WEIGHTS = os.urandom(2000)
CARD = gguf_card("*Q4_K_M.gguf")


@pytest.fixture
def hub() -> Generator[LocalHub]:
    with LocalHub() as local:
        yield local


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if ".locks" not in path.parts)


@pytest.mark.parametrize(
    "name",
    [
        "../evil-Q4_K_M.gguf",
        "a/../../evil-Q4_K_M.gguf",
        "/tmp/evil-Q4_K_M.gguf",
        "a//evil-Q4_K_M.gguf",
        "./evil-Q4_K_M.gguf",
        "..\\evil-Q4_K_M.gguf",
        "evil\0-Q4_K_M.gguf",
        "evil\n-Q4_K_M.gguf",
        "evil\ud800-Q4_K_M.gguf",
        ".exo/evil-Q4_K_M.gguf",
        ".EXO/evil-Q4_K_M.gguf",
        "e" * 260 + "-Q4_K_M.gguf",
        "ä" * 130 + "-Q4_K_M.gguf",
        "deep/" * 300 + "evil-Q4_K_M.gguf",
    ],
)
async def test_a_name_that_could_leave_the_folder_is_refused(hub: LocalHub, tmp_path: Path, name: str) -> None:
    hub.commit({name: WEIGHTS})
    with pytest.raises(PullError, match=r"the hub lists a file named .*, which is refused") as error:
        await pull_card(CARD, Store([tmp_path / "models"]), hub_at(hub.url), quant="Q4_K_M")
    assert error.value.code == "unsafe_name"
    assert str(error.value).isprintable()
    assert tree(tmp_path) == []
    assert hub.state.asked == []


@pytest.mark.parametrize("name", ["%2e%2e/x-Q4_K_M.gguf", "a b/ü?#%-Q4_K_M.gguf", "...-Q4_K_M.gguf"])
async def test_an_odd_name_is_taken_literally(hub: LocalHub, tmp_path: Path, name: str) -> None:
    hub.commit({name: WEIGHTS})
    found = await pull_card(CARD, Store([tmp_path]), hub_at(hub.url), quant="Q4_K_M")
    assert found.path == tmp_path / "org--model" / name
    assert (tmp_path / "org--model" / name).read_bytes() == WEIGHTS


@pytest.mark.parametrize("link", ["org--model/.exo", "org--model/sub", ".locks"])
async def test_a_link_is_not_written_through(hub: LocalHub, tmp_path: Path, link: str) -> None:
    hub.commit({"sub/x-Q4_K_M.gguf": WEIGHTS})
    models, outside = tmp_path / "models", tmp_path / "outside"
    outside.mkdir()
    (models / link).parent.mkdir(parents=True)
    (models / link).symlink_to(outside)
    with pytest.raises(PullError, match="is not written through"):
        await pull_card(CARD, Store([models]), hub_at(hub.url), quant="Q4_K_M")
    assert tree(outside) == []


async def test_a_model_folder_may_be_a_link_for_every_command(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit({"x-Q4_K_M.gguf": WEIGHTS})
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    models.mkdir()
    elsewhere.mkdir()
    (models / "org--model").symlink_to(elsewhere)
    store, source = Store([models]), Source.of(CARD, "cuda", "Q4_K_M")
    await pull_card(CARD, store, hub_at(hub.url), quant="Q4_K_M")
    assert (elsewhere / "x-Q4_K_M.gguf").read_bytes() == WEIGHTS
    assert store.on_disk(source).state == "present"
    store.remove(source)
    assert tree(elsewhere) == []
    assert store.on_disk(source).state == "absent"
    elsewhere.rmdir()  # as when a disk is not mounted
    with pytest.raises(PullError, match="org--model"):
        await pull_card(CARD, store, hub_at(hub.url), quant="Q4_K_M")


@pytest.mark.parametrize(("mode", "shared"), [(0o2775, True), (0o755, False), (0o2755, False)])
async def test_the_group_may_write_what_is_pulled_into_its_directory(
    hub: LocalHub, tmp_path: Path, mode: int, shared: bool
) -> None:
    hub.commit({"sub/x-Q4_K_M.gguf": WEIGHTS})
    hub.state.faults = [Fault("close", at=1000), Fault("status", status=403)]
    models = tmp_path / "models"
    models.mkdir()
    models.chmod(mode)
    before = os.umask(0o022)
    try:
        with pytest.raises(PullError):
            await pull_card(CARD, Store([models]), hub_at(hub.url), quant="Q4_K_M")
        begun = [path for path in models.rglob("*") if path.stat().st_size == 1000]
        assert len(begun) == 1
        assert [bool(path.stat().st_mode & 0o020) for path in begun] == [shared]
        hub.state.faults = []
        await pull_card(CARD, Store([models]), hub_at(hub.url), quant="Q4_K_M")
    finally:
        os.umask(before)
    writable = {str(path.relative_to(models)): bool(path.stat().st_mode & 0o020) for path in models.rglob("*")}
    assert writable == dict.fromkeys(writable, shared)
    assert {"org--model/sub/x-Q4_K_M.gguf", "org--model/.exo/manifest.json", ".locks/org--model"} <= writable.keys()


@pytest.mark.parametrize("file", ["part", "manifest.json.new"])
async def test_a_file_of_exos_own_that_is_a_link_is_not_written_through(
    hub: LocalHub, tmp_path: Path, file: str
) -> None:
    hub.commit({"x-Q4_K_M.gguf": WEIGHTS})
    models, outside = tmp_path / "models", tmp_path / "outside"
    store = Store([models])
    await pull_card(CARD, store, hub_at(hub.url))
    (models / "org--model/x-Q4_K_M.gguf").unlink()
    part = store.place("org/model", ()).part("x-Q4_K_M.gguf", hub.sha256("x-Q4_K_M.gguf"))
    (part if file == "part" else part.with_name(file)).symlink_to(outside)
    with pytest.raises(PullError, match="Too many levels of symbolic links"):
        await pull_card(CARD, store, hub_at(hub.url))
    assert not outside.exists()


async def test_a_final_name_that_is_a_link_is_replaced_and_not_followed(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit({"x-Q4_K_M.gguf": WEIGHTS})
    models, outside = tmp_path / "models", tmp_path / "outside"
    store = Store([models])
    await pull_card(CARD, store, hub_at(hub.url))
    outside.write_bytes(b"theirs")
    (models / "org--model/x-Q4_K_M.gguf").unlink()
    (models / "org--model/x-Q4_K_M.gguf").symlink_to(outside)
    await pull_card(CARD, store, hub_at(hub.url))
    assert outside.read_bytes() == b"theirs"
    assert (models / "org--model/x-Q4_K_M.gguf").read_bytes() == WEIGHTS
    (models / "org--model/x-Q4_K_M.gguf").unlink()
    (models / "org--model/x-Q4_K_M.gguf").symlink_to(outside)
    store.remove(Source.of(CARD, "cuda"))
    assert outside.read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["../../outside-Q4_K_M.gguf", "sub/outside-Q4_K_M.gguf"])
async def test_rm_deletes_nothing_outside_whatever_the_manifest_says(hub: LocalHub, tmp_path: Path, name: str) -> None:
    hub.commit({"x-Q4_K_M.gguf": WEIGHTS})
    models, outside = tmp_path / "models", tmp_path / "outside-Q4_K_M.gguf"
    outside.write_bytes(b"theirs")
    store = Store([models])
    await pull_card(CARD, store, hub_at(hub.url))
    (models / "org--model/sub").symlink_to(tmp_path)
    manifest = models / "org--model/.exo/manifest.json"
    manifest.write_text(manifest.read_text().replace("x-Q4_K_M.gguf", name))
    with pytest.raises(PullError, match=r"refused|nothing is deleted"):
        store.remove(Source.of(CARD, "cuda", "Q4_K_M"))
    assert outside.read_bytes() == b"theirs"


async def test_a_repository_that_would_share_a_folder_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    for repo in ("org/a--b", "org--a/b"):
        hub.commit({"x-Q4_K_M.gguf": WEIGHTS}, repo)
    folder = tmp_path / "org--a--b/.exo"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"repo": "org--a/b"}')
    card = CARD.model_copy(update={"engines": {"cuda": {"repo": "org/a--b", "file": "*"}}})
    with pytest.raises(PullError):
        await pull_card(card, Store([tmp_path]), hub_at(hub.url))
    assert tree(tmp_path) == ["org--a--b", "org--a--b/.exo", "org--a--b/.exo/manifest.json"]


async def test_a_manifest_that_cannot_be_read_is_said_so(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit({"x-Q4_K_M.gguf": WEIGHTS})
    own = tmp_path / "org--model/.exo"
    own.mkdir(parents=True)
    for broken in ("", "{}", '{"repo": "org/model", "version": 2}'):
        (own / "manifest.json").write_text(broken)
        assert Store([tmp_path]).on_disk(Source.of(CARD, "cuda")).state == "absent"
        with pytest.raises(PullError, match=r"manifest\.json is not a manifest of exo's; remove it and pull again"):
            await pull_card(CARD, Store([tmp_path]), hub_at(hub.url))
