"""``exo compare`` on tiny models with real runners."""

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from pydantic import JsonValue
from rich.console import Console

from exo.cards.catalogue import Catalogue
from exo.compare.comparison import CompareError, Comparison
from exo.compare.engine import ComparedEngine
from exo.compare.plot import draw
from exo.compare.prompts import PROMPTS, read_prompts
from exo.compare.run import CompareOptions, Subject, compare, examine
from exo.compare.table import show
from exo.config import Settings
from exo.exit_code import CommandError
from exo.plot import check_plot
from exo.worker.host import Host
from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import runner_commands
from tests.conftest import fake_card
from tests.support.server import write_card
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.twins import FLOAT32

Table = dict[str, JsonValue]

ROUGH: Table = {"cache_type_k": "bf16", "cache_type_v": "bf16", "flash_attn": "on", "threads": 1}
TEXTS = (" the stopper and a hello world", "Once upon a time", "hello assistant, stop the user", " and you, and you")
NOWHERE = Host(system="", machine="", cpu_count=1, memory_total=1, memory_available=1, nvidia_devices=(), probes={})


def llama_cpp(name: str, file: Path, table: Table) -> ComparedEngine:
    load = Load(model_id="test/tiny", backend="LlamaCppCpu", table={"path": str(file), **table})
    return ComparedEngine(name, runner_commands()["cuda"], load)


async def comparison_of(folder: Path, *engines: ComparedEngine, options: CompareOptions | None = None) -> Comparison:
    subject = Subject(fake_card("test/tiny"), NOWHERE)
    return await examine(subject, engines, options or CompareOptions(TEXTS, tokens=24), folder / "log", lambda _: None)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_gguf(file, Shape())
    return file


@pytest.fixture(scope="module")
def home(gguf: Path) -> Path:
    """With a card that both runners can serve."""
    folder = gguf.parent
    write_mlx(folder / "tiny", Shape())
    write_card(
        folder,
        "tiny",
        {"cuda": {**FLOAT32, "path": str(gguf), "n_ctx": 256}, "mlx": {"path": str(folder / "tiny")}},
        backends=["LlamaCppCpu", "MlxCpu"],
    )
    write_card(folder, "gguf-only", {"cuda": {**FLOAT32, "path": str(gguf)}}, backends=["LlamaCppCpu"])
    write_card(folder, "lost", {"cuda": {"path": "/no/such.gguf"}}, backends=["LlamaCppCpu", "MlxCpu"])
    return folder


@pytest.fixture
def settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("EXO_HOME", str(home))
    return Settings.load()


def ask(settings: Settings, model: str, *engines: str, options: CompareOptions | None = None) -> Comparison:
    catalogue = Catalogue.load(settings.cards_directory)
    return compare(settings, catalogue, model, engines or None, options or CompareOptions(TEXTS[:1], tokens=4))


async def test_a_difference_between_two_settings_is_found_measured_and_shown(gguf: Path, tmp_path: Path) -> None:
    found = await comparison_of(tmp_path, llama_cpp("exact", gguf, FLOAT32), llama_cpp("rough", gguf, ROUGH))
    (pair,) = found.pairs
    assert pair.divergence.positions == sum(row.sequences for row in pair.divergence.by_position) > 30
    assert pair.divergence.vocabulary == 320
    assert 1e-3 < pair.divergence.mean_abs < pair.divergence.max_abs < 1
    assert 0 < pair.divergence.kl_mean < pair.divergence.kl_max < 0.1
    assert pair.divergence.top1_agreement > 0.9
    for agreement in (pair.greedy, pair.seeded):
        assert (agreement.sequences, agreement.tokens) == (4, 4 * 24)
        assert agreement.chosen_alike == agreement.tokens - len(agreement.differences)
    assert pair.seeded.equal < pair.seeded.chosen_alike < pair.seeded.tokens
    assert all(each.near_tie for each in pair.seeded.differences)
    exact, rough = found.engines
    assert (exact.settings["flash attention"], rough.settings["flash attention"]) == ("off", "on")
    assert (exact.settings["KV cache"], rough.settings["KV cache"]) == ("f32/f32", "bf16/bf16")
    assert exact.negative_log_likelihood == pytest.approx(rough.negative_log_likelihood, abs=0.1)
    for engine in found.engines:
        assert engine.speed.prefill_tokens > 4
        assert engine.speed.decode_tokens == 2 * 4 * 23
        assert min(engine.speed.prefill_seconds, engine.speed.decode_seconds) > 0
        assert 0 < engine.memory.resident_ready <= engine.memory.resident_peak
    shown = text_of(found)
    for expected in ("bf16/bf16", "rough against exact", "KL(exact || rough)", "test/tiny", "near-tie"):
        assert expected in shown
    assert Comparison.model_validate_json(found.model_dump_json()) == found


async def test_an_engine_agrees_with_itself(gguf: Path, tmp_path: Path) -> None:
    found = await comparison_of(tmp_path, llama_cpp("one", gguf, FLOAT32), llama_cpp("two", gguf, FLOAT32))
    (pair,) = found.pairs
    assert (pair.divergence.max_abs, pair.divergence.kl_max, pair.divergence.top1_agreement) == (0, 0, 1)
    for agreement in (pair.greedy, pair.seeded):
        assert agreement.identical == agreement.sequences == 4
        assert agreement.equal == agreement.chosen_alike == agreement.tokens
    assert pair.tokenisation == ()
    assert text_of(found).count("100 %") == 3


async def test_another_tokenizer_is_told_and_given_the_reference_s_tokens(gguf: Path, tmp_path: Path) -> None:
    """The reference lacks the last merges of the other, so it has more and smaller tokens for the same text."""
    smaller = tmp_path / "smaller.gguf"
    write_gguf(smaller, Shape(vocabulary=264))
    engines = llama_cpp("smaller", smaller, FLOAT32), llama_cpp("larger", gguf, FLOAT32)
    found = await comparison_of(tmp_path, *engines, options=CompareOptions((" the world", "1234"), tokens=4))
    (pair,) = found.pairs
    assert [each.prompt for each in pair.tokenisation] == [0]
    (difference,) = pair.tokenisation
    assert len(difference.reference_tokens) > len(difference.other_tokens) > 0
    assert pair.divergence.vocabulary == 264
    assert pair.divergence.positions == sum(engine.speed.prefill_tokens for engine in found.engines[:1])
    assert "prompt 1 is tokenised differently" in text_of(found)


def text_of(comparison: Comparison) -> str:
    screen = StringIO()
    show(comparison, Console(width=200, file=screen))
    return screen.getvalue()


def test_both_runners_of_a_card_are_compared_unasked(settings: Settings) -> None:
    found = ask(settings, "tiny")
    assert found.model_id == "test/tiny"
    assert [engine.backend for engine in found.engines] == ["LlamaCppCpu", "MlxCpu"]
    assert found.pairs[0].divergence.max_abs <= 1e-3
    assert json.loads(found.model_dump_json())["engines"][1]["settings"]


def test_the_first_engine_named_is_the_reference(settings: Settings) -> None:
    found = ask(settings, "tiny", "mlx", "cuda")
    assert (found.pairs[0].reference, found.pairs[0].other) == ("mlx", "cuda")


@pytest.mark.parametrize(
    ("model", "engines", "message"),
    [
        ("tinny", (), "no model card is called 'tinny'; did you mean"),
        ("tiny", ("cuda",), "needs at least two engines, and only cuda is named; runners are cuda, mlx"),
        ("gguf-only", (), "the card of test/gguf-only lists backends of cuda alone"),
        ("tiny", ("mlx", "mlx"), "mlx is named twice"),
        ("tiny", ("cuda", "quantum"), "engine quantum: there is no runner 'quantum'"),
        ("gguf-only", ("cuda", "mlx"), "engine mlx: .*lists only LlamaCppCpu"),
        ("lost", ("cuda", "mlx"), "engine cuda: .*/no/such.gguf"),
    ],
)
def test_what_cannot_be_compared_is_told(
    settings: Settings, model: str, engines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CompareError, match=message):
        ask(settings, model, *engines)


def test_an_engine_that_is_not_installed_is_named(settings: Settings) -> None:
    commands = {**runner_commands(), "mlx": (sys.executable, "-c", "raise SystemExit('no mlx')")}
    catalogue = Catalogue.load(settings.cards_directory)
    with pytest.raises(CompareError, match=r"engine mlx: .*not installed here.*no mlx"):
        compare(settings, catalogue, "tiny", None, CompareOptions(), commands=commands)


def test_texts_that_leave_no_room_are_refused_with_the_numbers(settings: Settings) -> None:
    with pytest.raises(CompareError, match=r"engine cuda: prompt 1 has .* 300 more do not fit into its context of 256"):
        ask(settings, "tiny", options=CompareOptions(TEXTS[:1], tokens=300))


async def test_a_program_that_dies_is_told_with_its_last_words(gguf: Path, tmp_path: Path) -> None:
    dying = ComparedEngine(
        "dying", (sys.executable, "-c", "raise SystemExit('no disk')"), llama_cpp("", gguf, FLOAT32).load
    )
    with pytest.raises(CompareError, match=r"engine dying: .*status 1.*no disk"):
        await comparison_of(tmp_path, llama_cpp("exact", gguf, FLOAT32), dying)


def test_prompts_come_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first line\n\n  second, indented\n", encoding="utf-8")
    assert read_prompts(file) == ("first line", "  second, indented")
    assert len(set(PROMPTS)) == len(PROMPTS)
    file.write_text("\n \n", encoding="utf-8")
    for bad in (file, tmp_path / "missing.txt"):
        with pytest.raises(CompareError, match=f"prompts: {bad}"):
            read_prompts(bad)


async def test_divergence_is_drawn_over_position(gguf: Path, tmp_path: Path) -> None:
    options = CompareOptions(TEXTS[:1], tokens=1)
    engines = llama_cpp("exact", gguf, FLOAT32), llama_cpp("rough", gguf, ROUGH)
    found = await comparison_of(tmp_path, *engines, options=options)
    draw(found, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
    draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match=r"must end in .png, .svg, .pdf \(got .*plot.bmp"):
        check_plot(tmp_path / "plot.bmp")
    with pytest.raises(CommandError, match="no directory"):
        check_plot(tmp_path / "missing" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CommandError, match=r"exo\[plot\]"):
        check_plot(tmp_path / "plot.png")
