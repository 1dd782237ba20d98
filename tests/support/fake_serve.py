"""``exo serve`` with the fake runner: ``python -m tests.support.fake_serve``, settings from the environment."""

from exo.api.server import serve_forever
from exo.cards.catalogue import Catalogue
from exo.config import Settings
from tests.support import fake_runner


def main() -> None:
    settings = Settings.load(port=0)
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
