"""The control tokens for filling in the middle of a text, by the texts that families of models give them."""

from collections.abc import Collection

from exo.worker.protocol.events import FimTokens

_KNOWN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
)
_REPOSITORY = ("<|repo_name|>", "<reponame>")
_FILE = ("<|file_sep|>", "<|file_separator|>", "<file_sep>")


def fim_tokens(texts: Collection[str]) -> FimTokens:
    """Returns those among the texts of a vocabulary's added tokens."""
    prefix, suffix, middle = next((each for each in _KNOWN if set(each) <= set(texts)), ("", "", ""))
    repository = next((each for each in _REPOSITORY if each in texts), "")
    file = next((each for each in _FILE if each in texts), "")
    return FimTokens(prefix=prefix, suffix=suffix, middle=middle, repository=repository, file=file)
