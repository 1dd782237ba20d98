"""References to models on the hub, as other programs write them: ``hf.co/OWNER/NAME:QUANT``."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.store.errors import PullError
from exo.store.file_selection import Source

_PREFIX = re.compile(r"(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/|hf:")
_REFERENCE = re.compile(r"([^/:\s]+/[^/:\s]+)(?::([A-Za-z0-9_-]+))?")


class KnownModel(NamedTuple):
    """A model card, and the runner whose files come from the repository if those of other runners do not."""

    card: ModelCard
    runner: str | None


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository, and the quantisation of a GGUF file in it if one is asked for."""

    repo: str
    quant: str | None

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else self.repo

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Reads ``OWNER/NAME`` or ``OWNER/NAME:QUANT``, perhaps behind the hub's name; None for anything else."""
        prefix = _PREFIX.match(text)
        match = _REFERENCE.fullmatch(text, prefix.end() if prefix else 0)
        return cls(match[1], match[2]) if match else None

    @classmethod
    def with_prefix(cls, text: str) -> Self | None:
        """The same for a text that begins with the hub's name; None for one that does not, which may be a model id."""
        return cls.parse(text) if _PREFIX.match(text) else None

    def known(self, catalogue: Catalogue) -> list[KnownModel]:
        """The models of the catalogue that are this one, the one with the repository's name first."""
        fitting = [*self._fitting(catalogue)]
        return sorted(fitting, key=lambda known: known.card.model_id != self.repo)

    def _fitting(self, catalogue: Catalogue) -> Iterator[KnownModel]:
        for model_id, card in catalogue.cards.items():
            if self.quant is not None and card.quantization.upper() != self.quant.upper():
                continue
            if model_id in catalogue.found:
                if model_id == f"hf/{self.repo}" or model_id.startswith(f"hf/{self.repo}:"):
                    yield KnownModel(card, None)
                continue
            repos = _repos(card)
            runners = [runner for runner, repo in repos.items() if repo == self.repo]
            if self.quant is not None:
                runners = [runner for runner in runners if runner == "cuda"]
            if runners:
                yield KnownModel(card, None if set(repos.values()) == {self.repo} else runners[0])


def _repos(card: ModelCard) -> dict[str, str]:
    """The repositories of a card's files, by runner."""
    repos: dict[str, str] = {}
    for runner in card.engines:
        with suppress(PullError):
            if (repo := Source.of(card, runner).repo) is not None:
                repos[runner] = repo
    return repos
