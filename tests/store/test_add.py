"""``exo add`` against a local hub: a card from the beginnings of files, and no weights fetched."""

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.config import HubAccess
from exo.store.discover.add import AddError, add, as_text
from exo.store.discover.description import HEADER_LIMIT
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.hub import Hub
from exo.store.store import Store
from exo.worker.host import Host
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Route, route
from tests.support.gguf_bytes import LLAMA, field, header, text
from tests.support.hub import REPO, Fault, LocalHub
from tests.support.pulling import hub_at, pull_card
from tests.support.tiny import Shape, write_gguf, write_mlx

TEMPLATE = field("tokenizer.chat_template", 8, text("{% if enable_thinking %}<think></think>{% endif %}"))
VOCABULARY = field(
    "tokenizer.ggml.tokens", 9, b"\x08\0\0\0" + (200_000).to_bytes(8, "little") + text("token") * 200_000
)
GGUF = header(*LLAMA, VOCABULARY, TEMPLATE) + bytes(9 << 20)
QUANTS = {"model-Q8_0.gguf": GGUF, "model-Q4_K_M.gguf": GGUF, "mmproj-F16.gguf": b"GGUF", "README.md": b"x"}


@pytest.fixture
def hub() -> Generator[LocalHub]:
    with LocalHub() as local:
        yield local


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    return tmp_path / "cards"


def written(directory: Path) -> Catalogue:
    catalogue = Catalogue.load(directory)
    assert catalogue.problems == ()
    return catalogue


def test_a_card_from_a_gguf_files_header(hub: LocalHub, cards: Path) -> None:
    hub.commit(QUANTS)
    added = add(f"{REPO}:q8_0", hub_at(hub.url), Catalogue.load(), cards)
    assert (added.architecture, added.n_layers, added.context_length) == ("llama", 4, 10_485_760)
    assert added.chat_template
    assert (added.files, added.quantization, added.bytes) == (("model-Q8_0.gguf",), "Q8_0", len(GGUF))
    assert added.revision == hub.state.newest[REPO]
    assert added.notes == ()
    card = written(cards).get("model")
    assert card is not None
    assert card.is_custom
    assert (card.model_id, card.n_layers, card.hidden_size, card.quantization) == (REPO, 4, 64, "Q8_0")
    assert card.capabilities == ("text", "thinking", "thinking_toggle")
    assert card.backends == ("LlamaCppCuda", "LlamaCppVulkan", "LlamaCppCpu")
    assert card.engines == {"cuda": {"repo": REPO, "file": "model-Q8_0.gguf"}}
    assert hub.starts == [0, 1 << 20, 2 << 20], "as much again each time, until the metadata is whole"
    assert hub.state.sent == 4 << 20


async def test_what_was_added_can_be_pulled(hub: LocalHub, cards: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    hub.commit({"tiny-F32.gguf": tmp_path / "tiny.gguf"})
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    card = written(cards).cards[REPO]
    store = Store([tmp_path / "models"])
    found = await pull_card(card, store, hub_at(hub.url), added.runners[0])
    assert (found.state, found.bytes) == ("present", added.bytes)


def test_without_a_choice_of_several_the_usual_one_is_taken_and_told(hub: LocalHub, cards: Path) -> None:
    hub.commit(QUANTS)
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert added.quantization == "Q4_K_M"
    assert added.notes == (f"took Q4_K_M of Q4_K_M, Q8_0; for another, say {REPO}:Q8_0",)
    lines = list(as_text(added))
    assert lines[0] == "org/model: llama, 4 layers, 10,485,760 tokens of context, has a chat template"
    assert lines[-1] == f"written to {added.card}; fetch the model with: exo pull model"


def test_where_the_usual_one_is_not_there_the_user_must_choose(hub: LocalHub, cards: Path) -> None:
    hub.commit({"model-Q8_0.gguf": GGUF, "model-IQ2_XXS.gguf": GGUF})
    for reference, reason in (
        (REPO, f"has IQ2_XXS, Q8_0; choose one, as in {REPO}:IQ2_XXS"),
        (f"{REPO}:Q4_K_M", "has no GGUF file of quantisation Q4_K_M; it has IQ2_XXS, Q8_0"),
    ):
        with pytest.raises(PullError, match=reason):
            add(reference, hub_at(hub.url), Catalogue.load(), cards)
    assert not cards.exists()
    assert hub.starts == []


def test_of_a_split_model_the_first_part_is_read_and_all_are_counted(hub: LocalHub, cards: Path) -> None:
    parts = {f"big/m-Q4_K_M-0000{part}-of-00002.gguf": GGUF if part == 1 else bytes(5000) for part in (2, 1)}
    hub.commit(parts)
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert added.files == tuple(sorted(parts))
    assert added.bytes == len(GGUF) + 5000
    assert written(cards).cards[REPO].engines["cuda"]["file"] == "big/m-Q4_K_M-00001-of-00002.gguf"


@pytest.mark.parametrize("template", ["tokenizer_config.json", "chat_template.jinja", None])
def test_a_card_from_a_folders_configuration(hub: LocalHub, cards: Path, tmp_path: Path, template: str | None) -> None:
    write_mlx(tmp_path, Shape(architecture="qwen3"))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    config = json.loads(files["config.json"]) | {"quantization": {"bits": 4, "group_size": 64}}
    files["config.json"] = json.dumps(config).encode()
    files.pop("chat_template.jinja", None)
    files["tokenizer_config.json"] = b"{}"
    if template == "tokenizer_config.json":
        named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "</think>"}]
        files[template] = json.dumps({"chat_template": named}).encode()
    elif template is not None:
        files[template] = b"</think>"
    hub.commit(files)
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert (added.architecture, added.n_layers, added.runners, added.quantization) == ("qwen3", 2, ("mlx",), "4bit")
    assert added.chat_template is (template is not None)
    card = written(cards).cards[REPO]
    assert (card.hidden_size, card.num_key_value_heads, card.context_length) == (64, 2, 4096)
    assert ("thinking" in card.capabilities) is (template is not None)
    assert card.engines == {"mlx": {"repo": REPO}}
    assert card.backends == RUNNERS["mlx"].backends
    assert Source.of(card, "mlx").repo == REPO
    assert not any(asked.path.endswith(".safetensors") for asked in hub.state.asked)


async def test_a_folder_that_nothing_quantised_is_for_mlx_and_for_vllm(
    hub: LocalHub, cards: Path, tmp_path: Path
) -> None:
    write_mlx(tmp_path / "tiny", Shape(architecture="qwen3"))
    hub.commit({path.name: path for path in (tmp_path / "tiny").iterdir() if path.is_file()})
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert added.runners == ("mlx", "vllm")
    assert "TextGeneration by mlx or vllm" in list(as_text(added))[1]
    card = written(cards).cards[REPO]
    assert card.engines == {"mlx": {"repo": REPO}, "vllm": {"repo": REPO}}
    assert card.backends == ("MlxMetal", "Vllm", "MlxCuda", "MlxCpu")
    installed = {
        ("MlxMetal", "Vllm"): "mlx",
        ("Vllm", "MlxCuda", "MlxCpu"): "vllm",
        ("MlxCuda", "MlxCpu"): "mlx",
        ("Vllm",): "vllm",
    }
    for backends, runner in installed.items():
        probes = {
            name: Probe(installed=True, engine=name, backends=tuple({*spec.backends} & {*backends}))
            for name, spec in RUNNERS.items()
        }
        found = route(None, card, Host("", "", 1, 1, 1, (), probes), (), {})
        assert isinstance(found, Route)
        assert (found.runner, found.backend) == (runner, backends[0])
    store = Store([tmp_path / "models"])
    for runner in added.runners:
        assert (await pull_card(card, store, hub_at(hub.url), runner)).bytes == added.bytes
    assert [path.name for path in (tmp_path / "models").iterdir() if path.name[0] != "."] == [REPO.replace("/", "--")]


def test_a_folder_for_vectors_is_known_by_sentence_transformers_files(
    hub: LocalHub, cards: Path, tmp_path: Path
) -> None:
    write_mlx(tmp_path, Shape(architecture="qwen3"))
    files: dict[str, bytes | Path] = {path.name: path for path in tmp_path.iterdir() if path.is_file()}
    beside = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
    hub.commit({**files, "modules.json": b"[]", **dict.fromkeys((*beside, "2_Dense/pytorch_model.bin"), b"{}")})
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert written(cards).cards[REPO].tasks == added.tasks == ("TextEmbedding",)
    assert {*added.files} == {*files, "modules.json", *beside}


def test_a_model_that_sees_keeps_its_sizes_one_level_down(hub: LocalHub, cards: Path) -> None:
    sizes = {"num_hidden_layers": 34, "hidden_size": 2560}
    config = json.dumps({"model_type": "gemma3", "hidden_size": 1, "text_config": sizes}).encode()
    hub.commit({"config.json": config, "model.safetensors": bytes(2000)})
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert (added.n_layers, written(cards).cards[REPO].hidden_size) == (34, 2560)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"model-Q4_K_M.gguf": b"<html>" + bytes(2000)},
            "model-Q4_K_M.gguf is not a GGUF file: it is a web page",
        ),
        ({"model-Q4_K_M.gguf": header(*LLAMA, claimed=99)}, "ends within its header, at byte"),
        ({"model-Q4_K_M.gguf": header(LLAMA[0])}, "does not say llama.block_count"),
        ({"config.json": b"{}", "model.safetensors": b""}, "config.json model_type: Field required"),
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b""}, "num_hidden_layers: Field required"),
        ({"config.json": b"[" * 5000, "model.safetensors": b""}, "config.json .*JSON"),
        ({"config.json": b"{}", "weights.bin": b""}, "pickles are never fetched"),
        ({"README.md": b"x"}, "has no config.json, so mlx cannot load it"),
    ],
)
def test_what_holds_no_model_gets_no_card(hub: LocalHub, cards: Path, files: dict[str, bytes], reason: str) -> None:
    hub.commit(files)
    with pytest.raises(PullError, match=reason):
        add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert not cards.exists()


def test_a_header_without_end_is_not_read_to_its_end(hub: LocalHub, cards: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless.gguf"
    with endless.open("wb") as file:
        file.write(header(field("x", 9, b"\0\0\0\0" + (1 << 40).to_bytes(8, "little"))))
        file.truncate(HEADER_LIMIT + (8 << 20))
    hub.commit({"model-Q4_K_M.gguf": endless})
    with pytest.raises(PullError, match="ends within its header"):
        add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    with endless.open("r+b") as file:
        file.write(header(field("x", 9, b"\0\0\0\0" + (HEADER_LIMIT + 1).to_bytes(8, "little"))))
    hub.commit({"model-Q4_K_M.gguf": endless})
    with pytest.raises(PullError, match="has a header of more than 64 MiB"):
        add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert hub.state.sent <= 2 << 20


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("status", status=503), Fault("reset", at=1000)],
        [Fault("status", status=429, retry_after="0"), Fault("close", at=500_000)],
        [Fault("whole"), Fault("whole")],
        [Fault("more"), Fault("none"), Fault("whole", at=700_000)],
    ],
)
def test_a_hub_that_misbehaves_is_asked_again(hub: LocalHub, cards: Path, faults: list[Fault]) -> None:
    hub.commit({"model-Q4_K_M.gguf": GGUF})
    hub.state.faults += faults
    assert add(REPO, hub_at(hub.url), Catalogue.load(), cards).chat_template
    assert hub.state.faults == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("status", status=403), "set HF_TOKEN"),
        (Fault("status", status=404), "the server answers 404"),
        (Fault("gzip"), "compresses"),
        (Fault("wrong"), "is not a GGUF file"),
    ],
)
def test_a_hub_that_will_not_is_not_asked_again(hub: LocalHub, cards: Path, fault: Fault, reason: str) -> None:
    hub.commit({"model-Q4_K_M.gguf": GGUF})
    hub.state.faults.append(fault)
    with pytest.raises(PullError, match=reason):
        add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert len(hub.starts) == 1


def test_another_range_than_asked_for_is_refused(hub: LocalHub, cards: Path) -> None:
    hub.commit({"model-Q4_K_M.gguf": GGUF})
    hub.state.faults += [Fault("none"), Fault("range")]
    with pytest.raises(PullError, match="sends another range: bytes 0-"):
        add(REPO, hub_at(hub.url), Catalogue.load(), cards)


def test_the_token_goes_to_the_hub_alone(hub: LocalHub, cards: Path) -> None:
    hub.commit({"model-Q4_K_M.gguf": GGUF})
    hub.state.token, hub.state.elsewhere = "secret", hub.other_host
    add(REPO, hub_at(hub.url, "secret"), Catalogue.load(), cards)
    tokens = {asked.host: asked.token for asked in hub.state.asked}
    assert tokens == {hub.url.removeprefix("http://"): "Bearer secret", hub.other_host: None}


def test_a_card_that_is_there_stays_unless_told(hub: LocalHub, cards: Path) -> None:
    hub.commit(QUANTS)
    first = add(REPO, hub_at(hub.url), written(cards), cards)
    before = first.card.read_bytes()
    with pytest.raises(AddError, match=f"{REPO} has a card already, {first.card}; replace it with --overwrite"):
        add(f"{REPO}:Q8_0", hub_at(hub.url), written(cards), cards)
    assert first.card.read_bytes() == before
    moved = first.card.rename(cards / "renamed.toml")
    again = add(f"{REPO}:Q8_0", hub_at(hub.url), written(cards), cards, overwrite=True)
    assert again.card == moved
    assert written(cards).cards[REPO].quantization == "Q8_0"
    assert [path.name for path in cards.iterdir()] == ["renamed.toml"]


def test_a_broken_card_is_in_the_way_too(hub: LocalHub, cards: Path) -> None:
    hub.commit(QUANTS)
    cards.mkdir()
    (cards / "org--model.toml").write_text("not a card")
    with pytest.raises(AddError, match="has a card already"):
        add(REPO, hub_at(hub.url), Catalogue.load(cards), cards)


def test_a_built_in_card_is_replaced_by_a_file_of_the_users(hub: LocalHub, cards: Path) -> None:
    hub.commit(QUANTS)
    with pytest.raises(AddError, match="has a card already"):
        add(REPO, hub_at(hub.url), Catalogue.load(), cards, name="Qwen/Qwen3-8B")
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards, name="Qwen/Qwen3-8B", overwrite=True)
    assert added.card.parent == cards
    assert written(cards).cards["Qwen/Qwen3-8B"].is_custom


def test_an_alias_that_another_card_has_is_not_taken(hub: LocalHub, cards: Path) -> None:
    hub.commit(QUANTS, repo="me/Qwen3-8B-GGUF")
    assert add("me/Qwen3-8B-GGUF", hub_at(hub.url), Catalogue.load(), cards).aliases == ()
    catalogue = written(cards)
    card = catalogue.get("qwen3-8b")
    assert card is not None
    assert card.model_id == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("reference", ["model", "org/model:", "org/model/file", "../model", "org/..", "o/m:Q4 0", ""])
def test_what_names_no_repository_is_refused_before_the_hub_is_asked(cards: Path, reference: str) -> None:
    with pytest.raises(AddError, match="expected"):
        add(reference, Hub(HubAccess("http://127.0.0.1:9")), Catalogue.load(), cards)


def test_what_the_author_wrote_is_quoted(hub: LocalHub, cards: Path) -> None:
    name = field("general.name", 8, text('"""\\ ]\n[cuda]\x7f\x00 ü 模型'))
    hub.commit({"model-Q4_K_M.gguf": header(*LLAMA[:1], name, *LLAMA[2:])})
    added = add(REPO, hub_at(hub.url), Catalogue.load(), cards)
    assert written(cards).cards[REPO].base_model == '"""\\ ][cuda] ü 模型'
    assert ModelCard.from_toml(added.card.read_text()).engines.keys() == {"cuda"}
