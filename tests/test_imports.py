"""Imports point one way, and no engine is imported outside its runner's folder."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
MODULES = sorted((SOURCE / "exo").rglob("*.py"))

ENGINES = {"llama_cpp", "mlx", "mlx_lm", "vllm", "torch", "transformers"}
ENGINE_HOMES = {
    "llama_cpp": "exo.worker.runner_cuda",
    "mlx": "exo.worker.runner_mlx",
    "mlx_lm": "exo.worker.runner_mlx",
}
"""`exo.convert` may also import engines, but only inside a function."""

RUNNER_MAY_USE = {"exo.worker.protocol", "exo.worker.runner_common"}

SERVER = ("exo.api", "exo.cli", "exo.serving", "exo.worker.supervisor")

MAY_NOT_IMPORT = {
    "exo.worker.protocol.messages": ("exo",),
    "exo.worker.protocol.runners": ("exo",),
    "exo.worker.runner_common.detokenizer": ("exo",),
    "exo.worker.runner_common.keyed_rng": ("exo",),
    "exo.cards": (*SERVER, "exo.chat", "exo.store"),
    "exo.store": (*SERVER, "exo.chat"),
    "exo.convert": (*SERVER, "exo.chat"),
    "exo.chat": (*SERVER, "exo.cards", "exo.store", "exo.convert"),
    "exo.worker": ("exo.api", "exo.cli", "exo.serving"),
    "exo.worker.router": (*SERVER, "exo.config"),
    "exo.config": (*SERVER, "exo.worker", "exo.cards", "exo.store", "exo.convert"),
    "exo.serving": ("exo.cli",),
    "exo.api": ("exo.cli",),
    "exo.bench": (*SERVER, "exo.chat", "exo.worker", "exo.cards", "exo.store", "exo.convert"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[tuple[str, bool]]:
    """Every imported module with whether it is imported at the top of the file."""
    tree = ast.parse(path.read_text())
    top = set(ast.walk(ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])))
    found: set[tuple[str, bool]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add((node.module, node in top))
            found |= {(f"{node.module}.{alias.name}", node in top) for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_engines_stay_in_their_runner(path: Path) -> None:
    name = module_name(path)
    for imported, at_top in imports(path):
        engine = imported.partition(".")[0]
        if engine in ENGINES:
            at_home = inside(name, ENGINE_HOMES.get(engine, "exo.worker.runner_vllm"))
            converting = inside(name, "exo.convert") and not at_top
            assert at_home or converting, f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_runners_know_only_the_contract(path: Path) -> None:
    name = module_name(path)
    home = next((".".join(name.split(".")[:3]) for _ in [0] if name.startswith("exo.worker.runner_")), None)
    for imported, _ in imports(path):
        if home in (None, "exo.worker.runner_common"):
            own = inside(imported, "exo.worker.runner_common")
            assert own or not imported.startswith("exo.worker.runner_"), f"{name} imports the runner module {imported}"
        elif inside(imported, "exo") and not inside(imported, home):
            assert any(inside(imported, allowed) for allowed in RUNNER_MAY_USE), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    for package, forbidden in MAY_NOT_IMPORT.items():
        if inside(name, package):
            for imported, _ in imports(path):
                wrong = [f for f in forbidden if inside(imported, f)]
                assert not wrong, f"{name} imports {imported}"


def test_the_rules_can_fail(tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text("import llama_cpp\n\ndef f():\n    from mlx.core import array\n")
    assert ("llama_cpp", True) in imports(example)
    assert ("mlx.core", False) in imports(example)
