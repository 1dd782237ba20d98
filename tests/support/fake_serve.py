"""``exo serve`` with the fake runner: ``python -m tests.support.fake_serve [CERTIFICATE KEY]``.

Other settings come from the environment.
"""

import sys
from pathlib import Path

from exo.api.server import serve_forever
from exo.cards.catalogue import Catalogue
from exo.config import Access, Settings
from tests.support import fake_runner


def main() -> None:
    certificate, key = map(Path, sys.argv[1:]) if sys.argv[1:] else (None, None)
    settings = Settings.load(port=0, access=Access.load(certificate=certificate, certificate_key=key))
    catalogue = Catalogue.load(settings.cards_directory)
    serve_forever(
        settings,
        catalogue,
        (),
        lambda url: print(f"exo is listening on {url}", flush=True),
        commands={"cuda": fake_runner.COMMAND},
    )


if __name__ == "__main__":
    main()
