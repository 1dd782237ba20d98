"""exo: one OpenAI-compatible endpoint over several local inference engines."""

__version__ = "0.1.0"
