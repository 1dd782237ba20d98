"""The tables of docs/ against the code: keys of model cards, settings, commands, and the site's list of pages."""

import re
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from exo.cards.card import ModelCard, SamplingValues, ToolFormat
from exo.cli import app
from exo.worker.runner_cuda.loading.options import CudaOptions, DraftOptions
from exo.worker.runner_mlx.loading.options import MlxOptions
from exo.worker.runner_vllm.options import VllmOptions
from tests import ROOT

DOCS = ROOT / "docs"
CODE = re.compile(r"`([^`]+)`")
GROUP: Any = typer.main.get_command(app)  # click's group, which typer's types do not show
COMMANDS: dict[str, Any] = GROUP.commands
MARKDOWN_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def first_column(text: str) -> set[str]:
    """All code in the first cell of each row of the tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in CODE.findall(row)}


@pytest.mark.parametrize(
    ("heading", "options", "others"),
    [
        ("`[cuda]`: llama.cpp", CudaOptions, {"draft"}),
        ("`[mlx]`: MLX", MlxOptions, set[str]()),
        ("`[vllm]`: vLLM", VllmOptions, set[str]()),
    ],
)
def test_every_key_of_a_runners_table_is_documented(heading: str, options: type[BaseModel], others: set[str]) -> None:
    documented = first_column(section(page("model-cards.md"), heading))
    assert documented - {"n_ctx"} == options.model_fields.keys() - others - {"n_ctx"}
    assert "n_ctx" in documented


def test_every_other_key_of_a_model_card_is_documented() -> None:
    text = page("model-cards.md")
    documented = {name.split()[-1] for name in first_column(section(text, "The model"))}
    backends = {name for name in documented if name[0].isupper()}
    tables = {"sampling_defaults", "engines", "storage_size"}
    assert documented - backends - {"in_bytes"} == ModelCard.model_fields.keys() - tables
    formats = text.partition("`tool_format` is one of ")[2].partition(". `auto` recognises")[0]
    assert set(CODE.findall(formats)) == set(get_args(ToolFormat))
    assert all(f"`{name}`" in text for name in (*SamplingValues.model_fields, *DraftOptions.model_fields))


def test_every_setting_is_documented() -> None:
    text = page("settings.md")
    variables = set(re.findall(r"\"((?:EXO|HF)_[A-Z_]+)\"", (ROOT / "src" / "exo" / "config.py").read_text()))
    assert len(variables) > 15
    assert [name for name in sorted(variables) if f"`{name}`" not in text] == []
    flags: set[str] = {option for parameter in COMMANDS["serve"].params for option in parameter.opts} - {"--help"}
    assert [flag for flag in sorted(flags) if f"`{flag}`" not in text] == []


def test_every_command_is_documented() -> None:
    documented = {name.split()[1] for name in first_column(page("commands.md")) if name.startswith("exo ")}
    assert documented == COMMANDS.keys()


def test_the_site_has_every_page_and_no_link_is_broken() -> None:
    pages = {path.name for path in DOCS.glob("*.md")}
    assert set(re.findall(r": ([a-z_-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)) == pages
    for path in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *DOCS.glob("*.md")):
        for target in MARKDOWN_LINK.findall(path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().rpartition("```")[2]
    names = [name for name in CODE.findall(text) if name.endswith((".py", "/"))]
    files = {str(path.relative_to(ROOT)) for path in (*ROOT.glob("src/exo/**/*"), *ROOT.glob("tests/**/*"))}
    missing = [
        name
        for name in names
        if name != "src/exo/"
        and "runner_x" not in name
        and not any(f"/{file}".endswith(f"/{name.rstrip('/')}") for file in files)
    ]
    assert len(names) > 30
    assert missing == []


def test_a_unit_test_has_the_place_and_name_of_its_module() -> None:
    """``unit/cards/test_card_text.py`` and ``test_card.py`` are both tests of ``cards/card.py``."""
    unit = ROOT / "tests" / "unit"
    files = sorted(unit.rglob("test_*.py"))
    assert len(files) > 40
    for file in files:
        folder = ROOT / "src" / "exo" / file.parent.relative_to(unit)
        modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        subject = file.stem.removeprefix("test_")
        assert any(subject == module or subject.startswith(f"{module}_") for module in modules), file.relative_to(ROOT)


def test_a_class_name_stands_for_one_class() -> None:
    names: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for name in re.findall(r"^ *class _?(\w+)", path.read_text(), re.MULTILINE):
            names.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}
