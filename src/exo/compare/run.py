"""Runs one comparison. The engines run one after another, so that neither slows down the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import anyio

import exo
from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.compare.agreement import agreement, judge, partings
from exo.compare.comparison import (
    MODES,
    CompareError,
    Comparison,
    Divergence,
    EngineReport,
    HostFacts,
    Mode,
    Pair,
    TokenAgreement,
    TokenisationDifference,
)
from exo.compare.engine import ComparedEngine, choose_engine, engine_names
from exo.compare.generation import Continuations, Generated, generate
from exo.compare.prompts import PROMPTS
from exo.compare.scoring import Scoring, score, score_same
from exo.config import Settings
from exo.worker.host import Host
from exo.worker.protocol.runners import runner_commands
from exo.worker.supervisor.host_probe import probe_host

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """The texts of a comparison. ``tokens`` are generated twice for each prompt."""

    prompts: tuple[str, ...] = PROMPTS
    tokens: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    card: ModelCard
    host: Host


def compare(
    settings: Settings,
    catalogue: Catalogue,
    model: str,
    engines: Sequence[str] | None,
    options: CompareOptions,
    note: Note = lambda _: None,
    commands: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Compares the runners named in ``engines`` (None: all that serve the card) on the model called ``model``.

    ``note`` gets progress messages. ``commands``, by runner name, replace the usual commands of the runners.
    Raises CompareError.
    """
    card = catalogue.get(model)
    if card is None:
        raise CompareError(catalogue.unknown(model))
    names = engine_names(card, engines)
    started = partial(_start, settings, card, names, options, note, commands or runner_commands())
    return anyio.run(started, backend_options={"use_uvloop": True})


async def _start(
    settings: Settings,
    card: ModelCard,
    names: Sequence[str],
    options: CompareOptions,
    note: Note,
    commands: Mapping[str, Sequence[str]],
) -> Comparison:
    note("probing the engines")
    host = await probe_host({name: (*command, "--probe") for name, command in commands.items()})
    directories = [str(directory) for directory in settings.models_directories]
    chosen = [choose_engine(name, card, host, commands, directories) for name in names]
    return await examine(Subject(card, host), chosen, options, settings.log_directory, note)


async def examine(
    subject: Subject, engines: Sequence[ComparedEngine], options: CompareOptions, log_directory: Path, note: Note
) -> Comparison:
    """Compares ``engines``, of which the first is the reference. Each writes a log. Raises CompareError."""
    reading = await _read(engines, options.prompts, note)
    for scoring in reading.scorings:
        _check_room(scoring, options.tokens)
    wanted = Continuations(reading.scorings[0].tokens, options.tokens, options.seed)
    label = subject.card.model_id.replace("/", "--")
    logs = [log_directory / f"{label}@{engine.name}-compare.log" for engine in engines]
    generated = await _generate(engines, wanted, logs, note)
    agreements = await _agreements(engines[0], wanted, generated, note)
    return Comparison(
        model_id=subject.card.model_id,
        quantization=subject.card.quantization,
        exo_version=exo.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        host=HostFacts.of(subject.host),
        prompts=options.prompts,
        tokens=options.tokens,
        seed=options.seed,
        engines=tuple(map(_engine_report, engines, reading.scorings, reading.likelihoods, generated)),
        pairs=tuple(
            Pair(
                reference=engines[0].name,
                other=engine.name,
                tokenisation=tokenisation,
                divergence=divergence,
                greedy=agreement["greedy"],
                seeded=agreement["seeded"],
            )
            for engine, tokenisation, divergence, agreement in zip(
                engines[1:], reading.tokenisation, reading.divergences, agreements, strict=True
            )
        ),
    )


def _engine_report(
    engine: ComparedEngine, scoring: Scoring, likelihood: float | None, generated: Generated
) -> EngineReport:
    can = scoring.capabilities
    return EngineReport(
        name=engine.name,
        engine=can.engine,
        version=can.engine_version,
        backend=can.backend,
        devices=can.devices,
        table=dict(engine.load.table),
        settings=dict(scoring.settings),
        model_bytes=can.model_bytes,
        context_length=can.context_length,
        vocabulary=can.vocabulary,
        negative_log_likelihood=likelihood,
        speed=generated.speed,
        memory=generated.memory,
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """Scorings and likelihoods of all engines, and the differences of all but the first from it. The files are gone."""

    scorings: list[Scoring]
    likelihoods: list[float | None]
    tokenisation: list[tuple[TokenisationDifference, ...]]
    divergences: list[Divergence]


async def _read(engines: Sequence[ComparedEngine], prompts: Sequence[str], note: Note) -> _Reading:
    first, *others = engines
    note(f"engine {first.name}: scoring {len(prompts)} texts")
    with TemporaryDirectory(prefix="exo-compare-") as folder:
        reference = await score(first, prompts, Path(mkdtemp(dir=folder)))
        # Not at the top: NumPy comes with the engines, and without them their lack must be reported first.
        from exo.compare.divergence import measure, negative_log_likelihood

        reading = _Reading([reference], [negative_log_likelihood(reference)], [], [])
        for engine in others:
            note(f"engine {engine.name}: scoring {len(prompts)} texts")
            scoring, tokenisation = await score_same(engine, prompts, reference, Path(mkdtemp(dir=folder)))
            reading.scorings.append(scoring)
            reading.likelihoods.append(negative_log_likelihood(scoring))
            reading.tokenisation.append(tokenisation)
            reading.divergences.append(measure(reference, scoring))
    return reading


def _check_room(scoring: Scoring, tokens: int) -> None:
    """Raises CompareError if a prompt and the generated tokens exceed the engine's context."""
    room = scoring.capabilities.context_length
    for index, prompt in enumerate(scoring.tokens):
        if len(prompt) + tokens > room:
            raise CompareError(
                f"engine {scoring.engine}: prompt {index + 1} has {len(prompt)} tokens, and {tokens} more do not fit "
                f"into its context of {room}"
            )


async def _generate(
    engines: Sequence[ComparedEngine], wanted: Continuations, logs: Sequence[Path], note: Note
) -> list[Generated]:
    reference: Generated | None = None
    found: list[Generated] = []
    for engine, log in zip(engines, logs, strict=True):
        found.append(await generate(engine, wanted, reference, log, note))
        reference = found[0]
    return found


async def _agreements(
    engine: ComparedEngine, wanted: Continuations, generated: Sequence[Generated], note: Note
) -> list[dict[Mode, TokenAgreement]]:
    """The agreement of each other engine with the first one, ``engine``, which judges the differences."""
    reference, *others = generated
    parted = [partings(reference, other) for other in others]
    note(f"engine {engine.name}: judging {sum(map(len, parted))} differences")
    judged = await judge(engine, wanted, reference, [each for found in parted for each in found])
    return [
        {
            mode: agreement(mode, reference, other, [judged[each] for each in found if each.mode == mode])
            for mode in MODES
        }
        for other, found in zip(others, parted, strict=True)
    ]
