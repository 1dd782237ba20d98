"""``python -m exo``."""

from exo.cli import main

main()
