"""``exo route``."""

import json
import time

import anyio
import typer

from exo.api.admin.speeds import SpeedAtLoad, known_speeds
from exo.cli.console import out, say
from exo.cli.models.local_models import catalogue_of
from exo.cli.options import AsJson, Model, ModelsDir
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.worker.router import NO_REMOTE_HOSTS, Refusal, adapter_not_found, parse_model
from exo.worker.router import route as decide
from exo.worker.supervisor.host_probe import probe_host
from exo.worker.supervisor.speed_store import SpeedStore


def route(model: Model, models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """Show which runner would serve a model here, and why. Nothing is loaded."""
    settings = Settings.load(models_directory=models_dir)
    catalogue = catalogue_of(settings)
    known: list[SpeedAtLoad] = []
    wish = parse_model(model)
    card, adapter = catalogue.with_adapter(wish.name)
    if card is None:
        decision = Refusal("model_not_found", catalogue.unknown(wish.name), "model")
    elif adapter and adapter not in card.adapters:
        decision = adapter_not_found(card, adapter)
    else:
        host, speeds = anyio.run(probe_host), SpeedStore(settings.speeds_file)
        remote = NO_REMOTE_HOSTS
        if settings.hosts:
            from exo.worker.supervisor.ask_hosts import ask_hosts

            remote = anyio.run(ask_hosts, settings.hosts)
        speeds.set_host(host)
        known = known_speeds(speeds, card)
        preference = speeds.preference(card, card.prefer or settings.prefer, load=1, now=time.time())
        adapters = (adapter,) if adapter else ()
        decision = decide(
            wish.runner, card, host, (), card.needs, preference=preference, adapters=adapters, remote=remote
        )
    if isinstance(decision, Refusal):
        code = ExitCode.NOT_FOUND if decision.code == "model_not_found" else ExitCode.FAILED
        if as_json:
            out.print_json(json.dumps({"code": decision.code, "message": decision.message, "param": decision.param}))
            raise typer.Exit(code)
        raise CommandError(decision.message, code)
    if as_json:
        answer = {"runner": decision.runner, "backend": decision.backend, "reason": decision.reason}
        answer |= {"host": decision.host} if decision.host else {}
        out.print_json(json.dumps({**answer, "speeds": [each.model_dump() for each in known]}))
        return
    where = f", host {decision.host}" if decision.host else ""
    say(f"{model} -> runner {decision.runner}, backend {decision.backend}{where}")
    say(decision.reason)
    for each in known:
        say(f"  {each}")
