from pathlib import Path

EXO_MODELS_DIRS: list[Path] = []
EXO_MODELS_READ_ONLY_DIRS: list[Path] = []
