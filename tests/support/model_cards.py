"""Model cards as files."""

from pathlib import Path

from tests import DATA

UPSTREAM = sorted((DATA / "upstream_cards").glob("*.toml"))


SMALL = """
model_id = "someone/small"
backends = ["LlamaCppCuda", "LlamaCppCpu"]
n_layers = 2
hidden_size = 64
supports_tensor = false
tasks = ["TextGeneration"]
storage_size = { in_bytes = 1000 }
"""


def write(directory: Path, name: str, model_id: str, *aliases: str, layers: int = 2) -> Path:
    path = directory / name
    text = SMALL.replace("someone/small", model_id).replace("n_layers = 2", f"n_layers = {layers}")
    path.write_text(f"aliases = {list(aliases)}\n{text}")
    return path
