"""Pulling with a hub that behaves: what lands where, what is recorded, what the runners then find."""

import hashlib
import json
import os
from collections.abc import Generator
from pathlib import Path

import anyio
import pytest

from exo.config import HubAccess
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.hub import Hub
from exo.store.progress import DownloadProgress
from exo.store.pull import plan
from exo.store.store import Store
from exo.worker.runner_common.model_files.model_folder import FolderOptions, find_folder
from exo.worker.runner_cuda.loading import options as cuda_options
from tests.support.hub import REPO, Fault, LocalHub
from tests.support.pulling import PullProgram, gguf_card, hub_at, mlx_card, pull_card

WEIGHTS = os.urandom(300_000)
FOLDER = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS[:100_000],
    "model-00002-of-00002.safetensors": WEIGHTS[100_000:],
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
}
ALL = {
    **FOLDER,
    "README.md": b"read",
    "code.py": b"import os",
    "weights.bin": b"pickle",
    "a-Q4_K_M.gguf": WEIGHTS,
    "a-Q8_0.gguf": os.urandom(2000),
    "big/a-BF16-00001-of-00003.gguf": WEIGHTS[:5000],
    "big/a-BF16-00002-of-00003.gguf": WEIGHTS[5000:9000],
    "big/a-BF16-00003-of-00003.gguf": WEIGHTS[9000:12000],
    "mmproj-F16.gguf": os.urandom(1500),
}


@pytest.fixture
def hub() -> Generator[LocalHub]:
    with LocalHub() as local:
        local.commit(ALL)
        yield local


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store([tmp_path / "models"])


def files(directory: Path) -> dict[str, bytes]:
    """What is in a models directory, without what is exo's own."""
    found = [path for path in directory.rglob("*") if path.is_file() and not {".exo", ".locks"} & {*path.parts}]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


async def test_only_the_quantisation_asked_for_lands_where_the_runner_looks(hub: LocalHub, store: Store) -> None:
    card = gguf_card("*Q4_K_M.gguf")
    assert store.on_disk(Source.of(card, "cuda")).state == "absent"
    found = await pull_card(card, store, hub_at(hub.url))
    directory = store.directories[0]
    assert files(directory) == {"org--model/a-Q4_K_M.gguf": WEIGHTS}
    options = cuda_options.CudaOptions(repo=REPO, file="*Q4_K_M.gguf")
    assert found.path == cuda_options.find_model(options, card.model_id, [str(directory)])
    assert (found.state, found.bytes, found.revision) == ("present", len(WEIGHTS), hub.state.newest[REPO])


async def test_a_folder_for_mlx_lands_where_the_runner_looks(hub: LocalHub, store: Store) -> None:
    found = await pull_card(mlx_card(), store, hub_at(hub.url), "mlx")
    directory = store.directories[0]
    assert files(directory) == {f"org--model/{name}": content for name, content in FOLDER.items()}
    assert found.path == find_folder(FolderOptions(), REPO, [str(directory)])
    assert (found.state, found.bytes) == ("present", sum(map(len, FOLDER.values())))


async def test_what_was_pulled_is_recorded(hub: LocalHub, store: Store) -> None:
    await pull_card(mlx_card(), store, hub_at(hub.url), "mlx")
    recorded = json.loads((store.directories[0] / "org--model/.exo/manifest.json").read_text())
    assert recorded["repo"] == REPO
    assert recorded["pending"] == {}
    assert recorded["files"].keys() == FOLDER.keys()
    for name, entry in recorded["files"].items():
        assert entry["sha256"] == hashlib.sha256(FOLDER[name]).hexdigest()
        assert (entry["size"], entry["revision"]) == (len(FOLDER[name]), hub.state.newest[REPO])
        assert entry["pulled_at"].startswith("20")


async def test_all_parts_of_a_split_file_come_with_their_folder(hub: LocalHub, store: Store) -> None:
    card = gguf_card("big/*-00001-of-*.gguf")
    found = await pull_card(card, store, hub_at(hub.url))
    assert sorted(files(store.directories[0])) == sorted(
        f"org--model/{name}" for name in ALL if name.startswith("big/")
    )
    assert found.path == store.directories[0] / "org--model/big/a-BF16-00001-of-00003.gguf"
    (store.directories[0] / "org--model/big/a-BF16-00002-of-00003.gguf").unlink()
    assert store.on_disk(Source.of(card, "cuda")).state == "partial"
    assert (await pull_card(card, store, hub_at(hub.url))).state == "present"


async def test_a_projector_comes_along_and_goes_along(hub: LocalHub, store: Store) -> None:
    card = gguf_card("*Q4_K_M.gguf", mmproj="mmproj-*")
    found = await pull_card(card, store, hub_at(hub.url))
    assert sorted(files(store.directories[0])) == ["org--model/a-Q4_K_M.gguf", "org--model/mmproj-F16.gguf"]
    assert found.bytes == len(WEIGHTS) + 1500
    assert len(store.remove(Source.of(card, "cuda")).files) == 2


async def test_another_quantisation_on_request(hub: LocalHub, store: Store) -> None:
    card = gguf_card("*Q4_K_M.gguf")
    found = await pull_card(card, store, hub_at(hub.url), quant="q8_0")
    assert found.path is not None
    assert found.path.name == "a-Q8_0.gguf"
    assert store.on_disk(Source.of(card, "cuda")).state == "absent"
    with pytest.raises(PullError, match=r"no GGUF file of quantisation Q2_K; it has Q4_K_M, Q8_0, BF16"):
        await plan(Source.of(card, "cuda", "Q2_K"), hub_at(hub.url))


async def test_what_is_there_is_not_fetched_again(hub: LocalHub, store: Store) -> None:
    for _ in range(2):
        await pull_card(gguf_card("*Q4_K_M.gguf"), store, hub_at(hub.url))
    assert hub.starts == [0]


async def test_progress_counts_up_to_the_whole(hub: LocalHub, store: Store) -> None:
    seen: list[DownloadProgress] = []
    hub.state.faults = [Fault("stall", at=1000)]

    def report(progress: DownloadProgress) -> None:
        seen.append(progress)
        if progress.file_done == 1000:
            hub.state.go_on.set()

    await pull_card(gguf_card("*Q4_K_M.gguf"), store, hub_at(hub.url), report=report)
    middle = next(progress for progress in seen if progress.file_done == 1000)
    assert (middle.step, middle.file, middle.done, middle.total) == ("downloading", "a-Q4_K_M.gguf", 1000, len(WEIGHTS))
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total == len(WEIGHTS)
    assert seen[-1].rate > 0
    assert seen[-1].seconds_left == 0


async def test_a_changed_revision_replaces_what_changed_and_leaves_nothing_behind(hub: LocalHub, store: Store) -> None:
    await pull_card(mlx_card(), store, hub_at(hub.url), "mlx")
    asked = len(hub.starts)
    newer = {name: content for name, content in FOLDER.items() if "safetensors" not in name}
    commit = hub.commit({**newer, "model.safetensors": os.urandom(5000), "tokenizer.json": b"[]"})
    found = await pull_card(mlx_card(), store, hub_at(hub.url), "mlx")
    assert sorted(files(store.directories[0])) == [
        f"org--model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert files(store.directories[0])["org--model/tokenizer.json"] == b"[]"
    assert found.revision == commit
    assert len(hub.starts) == asked + 2


async def test_the_older_revision_stays_whole_until_the_newer_is(hub: LocalHub, store: Store) -> None:
    await pull_card(mlx_card(), store, hub_at(hub.url), "mlx")
    before, old = files(store.directories[0]), hub.state.newest[REPO]
    hub.commit({**FOLDER, "config.json": b"newer", "model-00001-of-00002.safetensors": os.urandom(4000)})
    hub.state.faults = [Fault("none"), *[Fault("reset", at=10)] * 9]
    with pytest.raises(PullError, match="what has come is kept"):
        await pull_card(mlx_card(), store, hub_at(hub.url), "mlx")
    assert files(store.directories[0]) == before
    found = store.on_disk(Source.of(mlx_card(), "mlx"))
    assert (found.state, found.revision) == ("present", old)


async def test_an_unfinished_pull_shows_as_partial(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=4000), *[Fault("close")] * 9]
    with pytest.raises(PullError, match="what has come is kept, so pull again"):
        await pull_card(gguf_card("big/*"), store, hub_at(hub.url))
    found = store.on_disk(Source.of(gguf_card("big/*"), "cuda"))
    assert (found.state, found.total, found.revision) == ("partial", 12_000, hub.state.newest[REPO])
    assert found.bytes == 4000
    assert files(store.directories[0]) == {}
    removed = store.remove(Source.of(gguf_card("big/*"), "cuda"))
    assert removed.bytes == 4000
    assert [path.name for path in store.directories[0].iterdir()] == [".locks"]


async def test_rm_deletes_what_was_pulled_and_nothing_else(hub: LocalHub, store: Store) -> None:
    for card in (gguf_card("*Q4_K_M.gguf"), gguf_card("big/*"), gguf_card("*Q8_0.gguf")):
        await pull_card(card, store, hub_at(hub.url))
    directory = store.directories[0]
    (directory / "org--model/notes.txt").write_text("mine")
    removed = store.remove(Source.of(gguf_card("*Q4_K_M.gguf"), "cuda"))
    assert (removed.files, removed.bytes) == ((directory / "org--model/a-Q4_K_M.gguf",), len(WEIGHTS))
    assert store.on_disk(Source.of(gguf_card("big/*"), "cuda")).state == "present"
    store.remove(Source.of(gguf_card("big/*"), "cuda"))
    store.remove(Source.of(gguf_card("*"), "cuda"))
    assert files(directory) == {"org--model/notes.txt": b"mine"}
    assert sorted(path.name for path in (directory / "org--model").iterdir()) == ["notes.txt"]
    with pytest.raises(PullError, match="test/model is not on disk for cuda"):
        store.remove(Source.of(gguf_card("*"), "cuda"))


async def test_files_put_there_by_hand_count_and_stay(hub: LocalHub, store: Store) -> None:
    folder = store.directories[0] / "org--model"
    folder.mkdir(parents=True)
    (folder / "a-Q4_K_M.gguf").write_bytes(WEIGHTS)
    source = Source.of(gguf_card("*Q4_K_M.gguf"), "cuda")
    found = store.on_disk(source)
    assert (found.state, found.revision) == ("present", None)
    with pytest.raises(PullError, match="was not pulled by exo, so it stays"):
        store.remove(source)
    await pull_card(gguf_card("*Q4_K_M.gguf"), store, hub_at(hub.url))
    assert hub.starts == []  # its hash is right, so it is exo's from now on
    assert store.on_disk(source).revision == hub.state.newest[REPO]


async def test_a_file_of_somebody_elses_is_never_overwritten(hub: LocalHub, store: Store) -> None:
    folder = store.directories[0] / "org--model"
    folder.mkdir(parents=True)
    for content in (b"mine", bytes(len(WEIGHTS))):
        (folder / "a-Q4_K_M.gguf").write_bytes(content)
        with pytest.raises(PullError, match="was not pulled by exo, and is not what the hub has; move it away"):
            await pull_card(gguf_card("*Q4_K_M.gguf"), store, hub_at(hub.url))
        assert (folder / "a-Q4_K_M.gguf").read_bytes() == content


@pytest.mark.parametrize("place", ["test--model", "org--model", "."])
def test_what_counts_as_on_disk_is_what_the_runner_finds(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "a-Q4_K_M.gguf").write_bytes(b"GGUF")
    found = Store([tmp_path]).on_disk(Source.of(gguf_card("*Q4_K_M.gguf"), "cuda"))
    options = cuda_options.CudaOptions(repo=REPO, file="*Q4_K_M.gguf")
    assert found.path == cuda_options.find_model(options, "test/model", [str(tmp_path)])


def test_a_card_with_a_path_is_found_too(tmp_path: Path) -> None:
    folder = tmp_path / "org--model/sub"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "x.gguf"):
        (folder / name).write_bytes(b"x")
    store = Store([tmp_path])
    for runner, path in (
        ("mlx", "sub"),
        ("mlx", str(folder)),
        ("cuda", "sub/x.gguf"),
        ("cuda", str(folder / "x.gguf")),
    ):
        card = mlx_card().model_copy(update={"engines": {runner: {"path": path}}})
        found = store.on_disk(Source.of(card, runner))
        assert (found.state, found.path) == ("present", folder if runner == "mlx" else folder / "x.gguf")


async def test_a_read_only_directory_is_searched_and_never_written(hub: LocalHub, tmp_path: Path) -> None:
    shared, own, card = tmp_path / "shared", tmp_path / "own", gguf_card("*Q4_K_M.gguf")
    await pull_card(card, Store([shared]), hub_at(hub.url))
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    store = Store([shared, own], [shared])
    found = await pull_card(card, store, hub_at(hub.url))
    assert (found.read_only, hub.starts) == (True, [0])
    assert not own.exists()
    with pytest.raises(PullError, match="is in a read-only directory, and stays") as error:
        store.remove(Source.of(card, "cuda"))
    assert error.value.code == "read_only"
    found = await pull_card(gguf_card("*Q8_0.gguf"), store, hub_at(hub.url))
    assert found.path == own / "org--model/a-Q8_0.gguf"
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before
    with pytest.raises(PullError, match="every models directory is read-only"):
        await pull_card(gguf_card("big/*"), Store([shared], [shared]), hub_at(hub.url))


async def test_a_pull_goes_on_in_the_directory_that_has_the_repository(hub: LocalHub, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    await pull_card(gguf_card("*Q8_0.gguf"), Store([second]), hub_at(hub.url))
    found = await pull_card(gguf_card("*Q4_K_M.gguf"), Store([first, second]), hub_at(hub.url))
    assert found.path == second / "org--model/a-Q4_K_M.gguf"


async def test_offline_nothing_is_asked_and_the_remedy_is_named(hub: LocalHub) -> None:
    with pytest.raises(PullError, match="org/model cannot be pulled offline: unset EXO_OFFLINE") as error:
        await plan(Source.of(gguf_card("*Q4_K_M.gguf"), "cuda"), Hub(HubAccess(hub.url, offline="EXO_OFFLINE")))
    assert error.value.code == "offline"
    assert hub.state.listing_tokens == []


async def test_the_token_opens_what_is_closed() -> None:
    with LocalHub(token="hf_right") as closed:
        closed.commit(ALL)
        card = gguf_card("*Q8_0.gguf")
        with pytest.raises(PullError, match=r"gated: accept its terms at http.*/org/model, and set HF_TOKEN") as error:
            await plan(Source.of(card, "cuda"), hub_at(closed.url, "hf_wrong"))
        assert error.value.code == "denied"
        assert (await plan(Source.of(card, "cuda"), hub_at(closed.url, "hf_right"))).total == 2000


async def test_an_unknown_repository_is_not_found(hub: LocalHub) -> None:
    with pytest.raises(PullError, match="no repository org/nothing; check the name, and HF_TOKEN") as error:
        await plan(Source.of(mlx_card("org/nothing"), "mlx"), hub_at(hub.url))
    assert error.value.code == "not_found"


async def test_two_pulls_at_once_share_one_download(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("stall", at=70_000)]
    steps: list[str] = []

    def report(progress: DownloadProgress) -> None:
        steps.append(progress.step)
        if progress.step == "waiting" and progress.done == 70_000:
            hub.state.go_on.set()

    card = gguf_card("*Q4_K_M.gguf")
    with PullProgram(hub.url, store.directories[0], "*Q4_K_M.gguf") as other:
        other.wait_for(70_000)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: pull_card(card, store, hub_at(hub.url), report=report))
            group.start_soon(lambda: pull_card(card, store, hub_at(hub.url)))
        assert other.finish()[0] == 0
    assert "waiting" in steps
    assert hub.starts == [0]
    assert files(store.directories[0]) == {"org--model/a-Q4_K_M.gguf": WEIGHTS}


async def test_a_cancelled_pull_is_taken_up_by_the_one_that_waited(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("stall", at=70_000)]
    card = gguf_card("*Q4_K_M.gguf")
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: pull_card(card, store, hub_at(hub.url)))
        await anyio.to_thread.run_sync(hub.state.stalled.wait)
        group.cancel_scope.cancel()
    hub.state.go_on.set()
    found = await pull_card(card, store, hub_at(hub.url))
    assert found.state == "present"
    assert files(store.directories[0]) == {"org--model/a-Q4_K_M.gguf": WEIGHTS}
