"""Copies of upstream exo's package, as it is and with the edits that ``integrations/upstream_exo/README.md`` names."""

import shutil
from pathlib import Path

from tests import ROOT

BACKENDS = ("LlamaCppCuda", "LlamaCppVulkan", "LlamaCppCpu")
INSTANCE = """class LlamaCppInstance(BaseInstance):
    backend: Backend


"""
BRANCH = """        elif isinstance(bound_instance.instance, LlamaCppInstance):
            from exo.worker.engines.llama_cpp.engine import LlamaCppBuilder

            builder = LlamaCppBuilder(bound_instance.bound_shard.model_card.model_id, cancel_receiver)
"""
FILES_FETCHED = """    if shard.model_card.files:
        return shard.model_card.files
"""
FILES_THERE = """    if card is not None and card.files:
        return all((model_dir / name).is_file() for name in card.files)
"""
CHOICE = """    if set(INSTANCE_META_BACKENDS[InstanceMeta.LlamaCpp]) & set(command.model_card.backends):
        present = [backend for backends in node_backends.values() for backend in backends]
        kind, _ = choose(command.instance_meta, command.model_card, present)
        command = command.model_copy(update={"instance_meta": kind})
"""
ONE_NODE = """    if command.instance_meta == InstanceMeta.LlamaCpp:
        alone = [cycle for cycle in cycles_with_sufficient_memory if len(cycle) == 1]
        if not alone:
            raise ValueError("an instance of llama.cpp has one node")
        cycles_with_sufficient_memory = alone
"""
PLACED = """        case InstanceMeta.LlamaCpp:
            [node] = selected_cycle.node_ids
            _, backend = choose(InstanceMeta.LlamaCpp, command.model_card, node_backends[node])
            target_instances[instance_id] = LlamaCppInstance(
                instance_id=instance_id, shard_assignments=shard_assignments, backend=backend
            )

"""


def unedited(checkout: Path, folder: Path) -> Path:
    """Returns ``folder``, which then has upstream's package as it is, beside a stand-in for its Rust bindings."""
    shutil.copytree(checkout / "src" / "exo", folder / "exo")
    shutil.copy(Path(__file__).with_name("exo_rs.py"), folder)
    metadata = folder / "exo-0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: exo\nVersion: 0\n")
    return folder


def edited(checkout: Path, folder: Path) -> Path:
    """Returns ``folder``, which then has upstream's package with the adapter, beside the packages that it needs."""
    exo, package = unedited(checkout, folder) / "exo", folder / "exo_llama_cpp"
    shutil.copytree(ROOT / "integrations" / "upstream_exo" / "llama_cpp", exo / "worker" / "engines" / "llama_cpp")
    shutil.copytree(ROOT / "integrations" / "exo_llama_cpp", package)
    (package / "tree").symlink_to(ROOT / "src")
    types = exo / "shared" / "types"
    _insert(types / "backends.py", "    Vllm =", "".join(f'    {each} = "{each}"\n' for each in BACKENDS))
    instances = types / "worker" / "instances.py"
    _insert(instances, "    MlxJaccl =", '    LlamaCpp = "LlamaCpp"\n')
    _insert(instances, "Instance =", INSTANCE, before=True)
    _insert(instances, "Instance =", "Instance = Instance | LlamaCppInstance\n")
    _import(instances, "from exo.shared.types.backends import Backend\n")
    _insert(exo / "shared" / "models" / "model_cards.py", "    backends: list[Backend]", "    files: list[str] = []\n")
    bootstrap = exo / "worker" / "runner" / "bootstrap.py"
    _insert(bootstrap, "        else:", BRANCH, before=True)
    _import(bootstrap, "from exo.shared.types.worker.instances import LlamaCppInstance\n")
    gatherer = exo / "utils" / "info_gatherer" / "info_gatherer.py"
    _insert(gatherer, "        return cls(backends=", "        backends += await llama_cpp_backends()\n", before=True)
    _import(gatherer, "from exo.worker.engines.llama_cpp.probe import llama_cpp_backends\n")
    download = exo / "download" / "download_utils.py"
    _insert(download, "async def resolve_allow_patterns", FILES_FETCHED)
    _insert(download, "    file_list = _scan_model_directory(model_dir, recursive=True)", FILES_THERE, before=True)
    _edit_placement(exo / "master" / "placement.py")
    offered = "            for instance_meta in "
    _insert(exo / "api" / "main.py", offered, f"{offered}InstanceMeta:\n", replace=True)
    return folder


def _edit_placement(file: Path) -> None:
    served = ", ".join(f"Backend.{each}" for each in BACKENDS)
    _insert(file, "    InstanceMeta.MlxJaccl:", f"    InstanceMeta.LlamaCpp: [{served}],\n")
    _insert(file, "    cycles = ", CHOICE, before=True)
    _insert(file, "    smallest_cycles = get_smallest_cycles", ONE_NODE, before=True)
    alone = "    if len(selected_cycle) == 1"
    _insert(file, alone, f"{alone} and command.instance_meta != InstanceMeta.LlamaCpp:\n", replace=True)
    _insert(file, "    return target_instances", PLACED, before=True)
    _import(file, "from exo.worker.engines.llama_cpp.placement import choose\n")
    _import(file, "from exo.shared.types.worker.instances import LlamaCppInstance\n")


def _import(file: Path, line: str) -> None:
    """Adds an import before the first one of upstream's own modules."""
    lines = file.read_text().splitlines(keepends=True)
    at = next(index for index, each in enumerate(lines) if each.startswith("from exo."))
    file.write_text("".join([*lines[:at], line, *lines[at:]]))


def _insert(file: Path, start: str, text: str, *, before: bool = False, replace: bool = False) -> None:
    """Inserts text beside the only line that begins with ``start``, or in its place."""
    lines = file.read_text().splitlines(keepends=True)
    found = [index for index, line in enumerate(lines) if line.startswith(start)]
    assert len(found) == 1, (file.name, start, found)
    at = found[0] + (not before and not replace)
    file.write_text("".join([*lines[:at], text, *lines[at + replace :]]))
