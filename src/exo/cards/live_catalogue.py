"""The catalogue of a program that runs on while its user edits, adds and removes cards."""

import logging
import time

from exo.cards.catalogue import Catalogue

log = logging.getLogger(__name__)


class LiveCatalogue:
    """A catalogue that follows its files, which ``current`` looks at, at most once in ``every_seconds``."""

    def __init__(self, catalogue: Catalogue, every_seconds: float = 1.0) -> None:
        self._catalogue = catalogue
        self._every_seconds = every_seconds
        self._next_look = time.monotonic() + every_seconds

    @property
    def known(self) -> Catalogue:
        """The catalogue as the files were when they were last looked at."""
        return self._catalogue

    def current(self) -> Catalogue:
        """The catalogue as the files are now. What has become wrong with them since is logged."""
        now = time.monotonic()
        if now >= self._next_look:
            before, self._catalogue = self._catalogue, self._catalogue.refreshed()
            self._next_look = now + self._every_seconds
            if self._catalogue is not before:
                _log_changes(before, self._catalogue)
        return self._catalogue


def _log_changes(before: Catalogue, after: Catalogue) -> None:
    log.info("the model cards have changed; there are %d now", len(after.cards))
    for problem in after.problems:
        if problem not in before.problems:
            log.warning("model card %s", problem)
