"""Models that other programs keep: which are found, under which names, and what is said of the others."""

import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.cards.catalogue import Catalogue, Found, FoundModel
from exo.config import OtherFolders
from exo.store.file_selection import Source
from exo.store.found import finder
from exo.store.found.finder import Finder, model_at
from exo.store.found.unread_model import UnusableError
from exo.store.store import Store
from tests.support.hub import REPO, LocalHub
from tests.support.other_programs import Ollama, download, folders, put
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.users import open_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, Shape())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "folder"
    write_mlx(path, Shape())
    return path


@pytest.fixture
def hub(tiny: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        other = tiny.read_bytes() + b"\0"  # or both would be links to one blob
        hub.commit({"tiny-Q4_K_M.gguf": tiny, "tiny-Q8_0.gguf": other, "README.md": b"text"})
        yield hub


def look(home: Path) -> Found:
    return Finder(folders(home))()


def names(found: Found) -> list[str]:
    return sorted(each.card.model_id for each in found.models)


def only(found: Found) -> FoundModel:
    assert found.unusable == ()
    (model,) = found.models
    return model


def is_present(model: FoundModel, runner: str) -> bool:
    """Whether the runner would find the files."""
    found = Store([]).on_disk(Source.of(model.card, runner))
    return (found.state, found.path) == ("present", model.path)


def test_a_cache_that_huggingface_hub_has_filled(tmp_path: Path, hub: LocalHub) -> None:
    snapshot = download(tmp_path / "hub", hub)
    found = look(tmp_path)
    assert found.unusable == ()
    assert names(found) == ["hf/org/model:Q4_K_M", "hf/org/model:Q8_0"]
    first = found.models[0]
    assert first.path == snapshot / "tiny-Q4_K_M.gguf"
    assert first.path.is_symlink()
    assert is_present(first, "cuda")
    card = first.card
    assert (card.family, card.quantization, card.n_layers, card.context_length) == ("llama", "Q4_K_M", 2, 4096)
    assert card.storage_size.in_bytes == first.path.stat().st_size
    assert first.removal == f"`hf cache rm model/{REPO}` deletes it"


def test_a_repository_of_which_each_commit_brought_one_file(tmp_path: Path, hub: LocalHub, tiny: Path) -> None:
    older = download(tmp_path / "hub", hub, "tiny-Q4_K_M.gguf")
    hub.commit({"tiny-Q8_0.gguf": tiny})
    newer = download(tmp_path / "hub", hub, "tiny-Q8_0.gguf")
    assert older != newer
    paths = {each.card.model_id: each.path for each in look(tmp_path).models}
    assert paths == {"hf/org/model:Q4_K_M": older / "tiny-Q4_K_M.gguf", "hf/org/model:Q8_0": newer / "tiny-Q8_0.gguf"}


def test_a_folder_of_safetensors_in_the_cache(tmp_path: Path, folder: Path) -> None:
    with LocalHub() as hub:
        hub.commit({path.name: path for path in folder.iterdir()})
        snapshot = download(tmp_path / "hub", hub)
    model = only(look(tmp_path))
    assert (model.card.model_id, model.path) == ("hf/org/model", snapshot)
    assert set(model.card.engines) == {"mlx", "vllm"}
    assert is_present(model, "mlx")
    assert is_present(model, "vllm")


def test_only_the_complete_model_of_a_cache_is_one(tmp_path: Path, hub: LocalHub, folder: Path) -> None:
    snapshot = download(tmp_path / "hub", hub)
    (snapshot / "tiny-Q8_0.gguf").resolve().unlink()  # a dangling link
    only_config = tmp_path / "hub" / "models--org--tokenizer" / "snapshots" / ("1" * 40)
    put(only_config / "config.json", folder / "config.json")
    (tmp_path / "hub" / "datasets--org--text" / "snapshots").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--begun" / "blobs").mkdir(parents=True)
    found = look(tmp_path)
    assert names(found) == ["hf/org/model:Q4_K_M"]
    assert found.unusable == (f"{snapshot / 'tiny-Q8_0.gguf'}: is no file, or a link that leads to none",)


def test_models_of_safetensors_that_generate_no_text(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, kind, more in (
        ("image", "CLIPModel", {}),
        ("speech", "WhisperForConditionalGeneration", {}),
        ("vision", "Gemma3ForConditionalGeneration", {"text_config": config}),
    ):
        copy = put(tmp_path / "lmstudio" / "org" / name, folder)
        (copy / "config.json").write_text(json.dumps({**config, **more, "architectures": [kind]}))
    found = look(tmp_path)
    assert names(found) == ["lmstudio/org/vision"]
    assert sorted(line.partition(": ")[2] for line in found.unusable) == [
        "is no language model, but a CLIPModel",
        "is no language model, but a WhisperForConditionalGeneration",
    ]


def test_ollamas_manifests_name_the_models(tmp_path: Path, tiny: Path) -> None:
    ollama = Ollama(tmp_path / "ollama")
    parameters: dict[str, JsonValue] = {"temperature": 0.5, "top_k": 20, "repeat_penalty": 1.1, "num_ctx": 2048}
    ollama.model("library/tiny:1b", tiny, {**parameters, "stop": ["<end>"], "top_p": 7, "min_p": True})
    ollama.model("library/small:latest", tiny)
    ollama.model("someone/own:v1", tiny)
    ollama.manifest("org/model:Q8_0", ollama.layer("model", tiny), host="hf.co")
    found = look(tmp_path)
    assert found.unusable == ()
    models = {each.card.model_id: each for each in found.models}
    assert list(models) == [
        "ollama/hf.co/org/model:Q8_0",
        "ollama/small:latest",
        "ollama/tiny:1b",
        "ollama/someone/own:v1",
    ]
    one = models["ollama/tiny:1b"]
    assert is_present(one, "cuda")
    assert one.card.quantization == "F32"
    assert one.card.aliases == ("tiny:1b",)
    assert models["ollama/small:latest"].card.aliases == ("small", "small:latest")
    defaults = one.card.sampling_defaults
    assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty) == (0.5, 20, 1.1)
    assert (defaults.top_p, defaults.min_p) == (None, None)
    assert one.notes == ("set in Ollama and not used: num_ctx, stop, top_p, min_p",)
    assert one.removal == "`ollama rm tiny:1b` deletes it"
    assert models["ollama/hf.co/org/model:Q8_0"].removal == "`ollama rm hf.co/org/model:Q8_0` deletes it"


def test_ollamas_blobs_with_a_colon_in_the_name(tmp_path: Path, tiny: Path) -> None:
    ollama = Ollama(tmp_path / "ollama")
    layer = ollama.layer("model", tiny)
    ollama.manifest("library/tiny:1b", layer)
    blob = ollama.blob(layer)
    blob.rename(blob.with_name(str(layer["digest"])))
    assert is_present(only(look(tmp_path)), "cuda")


def test_each_broken_manifest_is_named_once(tmp_path: Path, tiny: Path) -> None:
    ollama = Ollama(tmp_path / "ollama")
    ollama.model("library/sound:1b", tiny)
    broken = {
        "not-json": ollama.model("library/not-json:1", tiny),
        "no-layers": ollama.model("library/no-layers:1", tiny),
        "escape": ollama.model("library/escape:1", tiny),
        "pipe": ollama.model("library/pipe:1", tiny),
        "nested": ollama.model("library/nested:1", tiny),
    }
    broken["not-json"].write_text("{")
    broken["no-layers"].write_text('{"layers": []}')
    kind = "application/vnd.ollama.image.model"
    outside = {"mediaType": kind, "digest": "sha256:../../../../etc/hostname", "size": 1}
    broken["escape"].write_text(json.dumps({"layers": [outside]}))
    broken["pipe"].unlink()
    os.mkfifo(broken["pipe"])  # to open it would wait for a writer
    broken["nested"].write_text("[" * 100_000)
    adapter = ollama.manifest("library/adapted:1", ollama.layer("model", tiny), ollama.layer("adapter", b"GGUF"))
    absent = ollama.layer("model", b"absent")
    ollama.blob(absent).unlink()
    missing = ollama.manifest("library/missing:1", absent)
    begun = ollama.layer("model", b"begun")
    ollama.blob(begun).write_bytes(b"beg")
    partial = ollama.manifest("library/partial:1", begun)
    found = look(tmp_path)
    assert names(found) == ["ollama/sound:1b"]
    said = {line.partition(": ")[0]: line.partition(": ")[2] for line in found.unusable}
    assert len(said) == len(found.unusable) == 8
    assert "is no manifest of Ollama" in said[str(broken["not-json"])]
    assert said[str(broken["no-layers"])] == "has 0 layers of GGUF weights; exo loads a model of one"
    assert "digest" in said[str(broken["escape"])]
    assert said[str(broken["pipe"])] == "is not a regular file"
    assert "is no manifest of Ollama" in said[str(broken["nested"])]
    assert "adapter" in said[str(adapter)]
    assert said[str(missing)] == f"names the blob {ollama.blob(absent)}, which is not there"
    assert said[str(partial)].endswith("of which 3 of 5 bytes are there")


def test_a_blob_that_is_no_language_model(tmp_path: Path) -> None:
    ollama = Ollama(tmp_path / "ollama")
    layer = ollama.layer("model", b"\0" * 100)
    ollama.manifest("library/zeros:1", layer)
    found = look(tmp_path)
    assert found.models == ()
    assert found.unusable[0].startswith(f"{ollama.blob(layer)}: is not a GGUF file")


def test_lm_studio_keeps_files_and_folders_by_publisher(tmp_path: Path, tiny: Path, folder: Path) -> None:
    root = tmp_path / "lmstudio"
    put(root / "someone" / "tiny-GGUF" / "tiny-Q4_K_M.gguf", tiny)
    put(root / "someone" / "tiny-GGUF" / "mmproj-tiny-F16.gguf", tiny)
    put(root / "someone" / "twins" / "first-Q8_0.gguf", tiny)
    put(root / "someone" / "twins" / "other-Q8_0.gguf", tiny)
    put(root / "mlx-community" / "tiny-mlx", folder)
    (root / "linked").mkdir()
    (root / "linked" / "elsewhere").symlink_to(folder)
    (root / "linked" / "round").symlink_to(root)  # a circle
    found = look(tmp_path)
    assert found.unusable == ()
    assert {each.card.model_id: each.path for each in found.models} == {
        "lmstudio/someone/tiny-GGUF:Q4_K_M": root / "someone/tiny-GGUF/tiny-Q4_K_M.gguf",
        "lmstudio/someone/twins:first-Q8_0": root / "someone/twins/first-Q8_0.gguf",
        "lmstudio/someone/twins:other-Q8_0": root / "someone/twins/other-Q8_0.gguf",
        "lmstudio/mlx-community/tiny-mlx": root / "mlx-community/tiny-mlx",
        "lmstudio/linked/elsewhere": root / "linked/elsewhere",
    }


def test_llama_cpps_manifests_tell_the_repository(tmp_path: Path, tiny: Path) -> None:
    root = tmp_path / "llama.cpp"
    put(root / "org_model_tiny-Q4_K_M.gguf", tiny)
    put(root / "org_model_deep_tiny-Q8_0.gguf", tiny)
    put(root / "other_name_tiny-Q8_0.gguf", tiny)
    put(root / "begun.gguf.downloadInProgress", tiny)
    for tag, name in (("latest", "tiny-Q4_K_M.gguf"), ("Q8_0", "deep/tiny-Q8_0.gguf")):
        (root / f"manifest=org=model={tag}.json").write_text(json.dumps({"ggufFile": {"rfilename": name}}))
    (root / "manifest=org=broken=latest.json").write_text("{}")
    found = look(tmp_path)
    assert names(found) == ["llama.cpp/org/model:Q4_K_M", "llama.cpp/org/model:Q8_0", "llama.cpp/other_name_tiny-Q8_0"]
    assert [line.partition(": ")[0] for line in found.unusable] == [str(root / "manifest=org=broken=latest.json")]


def test_names_of_a_further_folder_fit_a_model_id(tmp_path: Path, tiny: Path) -> None:
    put(tmp_path / "further" / "ein Modell@home.gguf", tiny)
    put(tmp_path / "further" / ".hidden" / "hidden.gguf", tiny)
    put(tmp_path / "further" / "-a" / "b" / "c" / "d" / "tiny-Q8_0.gguf", tiny)
    put(tmp_path / "further" / os.fsdecode(b"latin-\xff\n.gguf"), tiny)
    found = look(tmp_path)
    assert names(found) == ["local/_a/b/c:Q8_0", "local/ein_Modell_home"]
    assert found.unusable == (f"{tmp_path / 'further'}/latin-\ufffd\ufffd.gguf: has a path that is not UTF-8",)


def test_a_split_model_is_one_and_an_incomplete_one_is_none(tmp_path: Path, tiny: Path) -> None:
    root = tmp_path / "lmstudio" / "org"
    for part in (1, 2):
        put(root / "whole" / f"tiny-Q8_0-0000{part}-of-00002.gguf", tiny)
    put(root / "part" / "tiny-Q8_0-00001-of-00002.gguf", tiny)
    found = look(tmp_path)
    (model,) = found.models
    assert model.card.model_id == "lmstudio/org/whole:Q8_0"
    assert model.path.name == "tiny-Q8_0-00001-of-00002.gguf"
    assert model.card.storage_size.in_bytes == 2 * tiny.stat().st_size
    assert is_present(model, "cuda")
    first = root / "part" / "tiny-Q8_0-00001-of-00002.gguf"
    assert found.unusable == (f"{first}: is not complete: tiny-Q8_0-00002-of-00002.gguf is not there",)


@contextmanager
def without_roots_rights() -> Generator[None]:
    """Root may read every folder, so these tests give that up for a while."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_may_not_be_read_is_named_and_the_rest_is_found(tiny: Path) -> None:
    with open_folder() as home:
        put(home / "lmstudio" / "org" / "tiny" / "tiny-Q8_0.gguf", tiny)
        closed_file = put(home / "lmstudio" / "org" / "closed" / "closed.gguf", tiny)
        closed_file.chmod(0)
        closed = [home / "lmstudio" / "closed", home / "ollama" / "manifests", home / "llama.cpp", home / "hub"]
        for each in closed:
            each.mkdir(parents=True)
            each.chmod(0)
        with without_roots_rights():
            found = look(home)
        for each in closed:
            each.chmod(0o755)
        assert names(found) == ["lmstudio/org/tiny:Q8_0"]
        assert sorted(found.unusable) == [
            f"{each}: cannot be read: Permission denied" for each in sorted([*closed, closed_file])
        ]


def test_a_folder_in_place_of_a_file_harms_nothing(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "lmstudio" / "org" / "odd" / "odd.gguf").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--odd" / "refs" / "main").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--odd" / "snapshots").mkdir()
    (tmp_path / "ollama").write_text("a file")
    os.mkfifo(put(tmp_path / "lmstudio" / "org" / "pipe" / "sound.gguf", tiny).with_name("pipe.gguf"))
    found = look(tmp_path)
    assert names(found) == ["lmstudio/org/pipe:sound"]
    assert [line.partition(": ")[0] for line in found.unusable] == [str(tmp_path / "lmstudio/org/pipe/pipe.gguf")]


def test_the_same_model_in_two_places(tmp_path: Path, tiny: Path) -> None:
    for place in ("first", "second"):
        Ollama(tmp_path / place).model("library/tiny:1b", tiny)
    put(tmp_path / "lmstudio" / "org" / "tiny" / "tiny-Q8_0.gguf", tiny)
    others = OtherFolders(ollama=(tmp_path / "first", tmp_path / "second"), lmstudio=(tmp_path / "lmstudio",))
    found = Finder(others)()
    assert names(found) == ["lmstudio/org/tiny:Q8_0", "ollama/tiny:1b"]
    (line,) = found.unusable
    assert "has the name ollama/tiny:1b, as" in line
    assert line.startswith(str(tmp_path / "second"))


def test_model_cards_keep_their_names(tmp_path: Path, tiny: Path) -> None:
    ollama = Ollama(tmp_path / "ollama")
    for name in ("llama3.2:1b", "own:1b", "fresh:1b"):
        ollama.model(f"library/{name}", tiny)
    put(tmp_path / "lmstudio" / "org" / "tiny" / "tiny-Q8_0.gguf", tiny)
    cards = tmp_path / "cards"
    cards.mkdir()
    built_in = Catalogue.load().get("llama3.2:1b")
    assert built_in is not None
    taken = built_in.model_copy(update={"model_id": "lmstudio/org/tiny:Q8_0", "aliases": ("own:1b",)})
    (cards / "taken.toml").write_text(taken.to_toml())
    catalogue = Catalogue.load(cards, Finder(folders(tmp_path)))
    assert catalogue.problems == ()
    assert catalogue.get("llama3.2:1b") == built_in
    assert catalogue.get("own:1b") == catalogue.get("lmstudio/org/tiny:Q8_0") == taken
    fresh = catalogue.get("fresh:1b")
    assert fresh is not None
    assert fresh.model_id == "ollama/fresh:1b"
    assert "lmstudio/org/tiny:Q8_0" not in catalogue.found
    assert list(catalogue.cards)[-3:] == ["ollama/fresh:1b", "ollama/llama3.2:1b", "ollama/own:1b"]


def test_nothing_is_read_again_until_something_changes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finder, "_LOOK_SECONDS", 0.0)
    ollama = Ollama(tmp_path / "ollama")
    ollama.model("library/tiny:1b", tiny)
    find = Finder(folders(tmp_path))
    first = find()
    assert find() is first
    manifest = ollama.model("library/later:1b", tiny)
    second = find()
    assert names(second) == ["ollama/later:1b", "ollama/tiny:1b"]
    assert find() is second
    manifest.write_text("in the same folder, and broken now")
    assert names(find()) == ["ollama/tiny:1b"]
    shutil.rmtree(tmp_path / "ollama")
    assert find().models == ()
    put(tmp_path / "lmstudio" / "org" / "tiny" / "tiny-Q8_0.gguf", tiny)
    assert names(find()) == ["lmstudio/org/tiny:Q8_0"]


def test_a_path_names_a_model(tmp_path: Path, tiny: Path, folder: Path) -> None:
    file = put(tmp_path / "models" / "my-model.gguf", tiny)
    model = model_at(file)
    assert (model.card.model_id, model.path) == ("local/my-model", file)
    for part in (1, 2):
        put(tmp_path / "split" / f"big-0000{part}-of-00002.gguf", tiny)
    assert model_at(tmp_path / "split" / "big-00002-of-00002.gguf").path.name == "big-00001-of-00002.gguf"
    assert model_at(tmp_path / "models").path == file
    assert model_at(folder).card.model_id == "local/folder"
    put(tmp_path / "models" / "second.gguf", tiny)
    for path, said in (
        (tmp_path / "models", r"several models; name one: my-model.gguf, second.gguf"),
        (tmp_path / "absent.gguf", "is not there"),
        (folder / "config.json", "is no GGUF file"),
        (tmp_path, "has no model"),
    ):
        with pytest.raises(UnusableError, match=said):
            model_at(path)
