"""The server: its ASGI application, and the program that runs it with uvicorn until a signal."""

import errno
import logging
import math
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import cast

import anyio
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI
from uvicorn.lifespan.on import LifespanOn

from exo import __version__
from exo.api.admin.activity import activity_routes
from exo.api.admin.engines import engine_routes
from exo.api.admin.metrics import metric_routes
from exo.api.admin.pulls import pull_routes
from exo.api.admin.status import server_routes
from exo.api.anthropic.routes import anthropic_routes
from exo.api.http.connection import BoundedConnection, connection_limit, limited_connection, raise_file_limit
from exo.api.http.error_reply import install
from exo.api.http.log import JsonFormatter, OneLineFormatter, add_request_id
from exo.api.http.middleware import AccessControl, ForgivingPaths, WarningHeader
from exo.api.http.openapi_schema import describe
from exo.api.http.request_record import RequestRecords
from exo.api.http.tls import Handshake, TlsListener
from exo.api.llama_completion import llama_completion_routes
from exo.api.llama_server import llama_routes
from exo.api.llama_status import llama_status_routes
from exo.api.ollama.embed import embed_routes
from exo.api.ollama.models import model_routes
from exo.api.ollama.routes import ollama_routes
from exo.api.openai.embeddings import embedding_routes
from exo.api.openai.models import model_list_routes
from exo.api.openai.responses.routes import responses_routes
from exo.api.openai.routes import openai_routes
from exo.api.page.routes import Page, page_routes
from exo.api.traces import Traces, TracesError
from exo.api.upstream.bench import bench_routes
from exo.api.upstream.routes import upstream_routes
from exo.api.vllm_score import score_routes
from exo.cards.catalogue import Catalogue
from exo.config import Settings, variables_without_effect
from exo.serving.app_state import Services

log = logging.getLogger(__name__)

GRACEFUL_SECONDS = 5
"""How long the last bytes may take to reach their clients, once every request has ended."""


def create_app(settings: Settings, services: Services, *, load: Iterable[str] = ()) -> FastAPI:
    """The application. ``load`` names models to load at the start.

    Starting it takes no time: the host is probed and models are loaded in the background, and requests that depend on
    that wait. Stopping it ends every process it started. Raises ``TracesError``.
    """
    traces = None
    if settings.otlp_endpoint is not None:
        traces = Traces(settings.otlp_endpoint, settings.service_name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with services.running(load):
            yield
        if traces is not None:
            await run_sync(traces.close)

    page = Page.read()
    app = FastAPI(  # its own pages about the API take their scripts from another host
        title="exo", version=__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.include_router(openai_routes(services))
    app.include_router(model_list_routes(services))
    app.include_router(responses_routes(services))
    app.include_router(embedding_routes(services))
    app.include_router(llama_routes(services))
    app.include_router(llama_completion_routes(services))
    app.include_router(llama_status_routes(services))
    app.include_router(score_routes(services))
    app.include_router(anthropic_routes(services))
    app.include_router(ollama_routes(services))
    app.include_router(embed_routes(services))
    app.include_router(model_routes(services))
    app.include_router(server_routes(services))
    app.include_router(pull_routes(services))
    app.include_router(activity_routes(services))
    app.include_router(metric_routes(services))
    app.include_router(engine_routes(services))
    if settings.upstream_api:
        app.include_router(upstream_routes(services, settings.models_directory))
        app.include_router(bench_routes(services))
    app.include_router(page_routes(page))
    install(app)
    app.add_middleware(WarningHeader, strict=settings.strict)
    app.add_middleware(ForgivingPaths)
    # A process monitor has no key, and a browser asks for one when it has the page.
    app.add_middleware(AccessControl, settings=settings, open_paths={"/health", *page.paths})
    on_end = None if traces is None else traces.export
    app.add_middleware(RequestRecords, activity=services.activity, on_end=on_end)
    describe(app)
    return app


class ListenError(Exception):
    """The server cannot start; the message says why and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Bound before anything is started, so that a port in use costs nothing. Raises ListenError.

    ``::`` is every address of this machine, those of IPv4 included.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} on {host} is in use; stop what is using it or give another with --port"
        else:
            reason = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise ListenError(reason) from error


def listen_all(host: str, port: int) -> Generator[socket.socket]:
    """The sockets of a host: localhost means the loopback addresses of IPv4 and, if this machine has it, IPv6."""
    if host.lower() != "localhost":
        yield listen(host, port)
        return
    first = listen("127.0.0.1", port)
    yield first
    if _has_ipv6_loopback():
        yield listen("::1", first.getsockname()[1])


def _has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def serve_forever(
    settings: Settings,
    catalogue: Catalogue,
    load: Iterable[str],
    on_listening: Callable[[str], None],
    commands: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; every runner has then ended. ``on_listening`` gets the URL.

    The first signal lets the requests that are here end, within ``settings.limits.drain_seconds``, while others are
    refused; the second ends everything at once. ``commands`` is as for ``Services``. Raises ListenError.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_json else OneLineFormatter("%(levelname)s: %(message)s"))
    if not settings.log_json:
        handler.addFilter(add_request_id)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if not (settings.is_local or settings.access.keys or settings.access.insecure):
        raise ListenError(
            f"{settings.host} can be reached from other machines: give a key with --api-key-file, --api-key or"
            " EXO_API_KEY, or --insecure to let anyone in"
        )
    raise_file_limit()
    if unused := variables_without_effect():
        log.warning("these environment variables have no effect here: %s", ", ".join(unused))
    with ExitStack() as stack:
        sockets = [stack.enter_context(each) for each in listen_all(settings.host, settings.port)]
        services = Services(settings, catalogue, commands)
        try:
            app = create_app(settings, services, load=load)
        except TracesError as error:
            raise ListenError(str(error)) from error
        tls = settings.access.tls
        config = uvicorn.Config(
            app,
            http=limited_connection(settings.limits.stall_seconds, connection_limit()),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here depends on what a proxy says of the client
            timeout_keep_alive=math.ceil(settings.limits.idle_seconds),
            timeout_graceful_shutdown=GRACEFUL_SECONDS,
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
        )
        _load_tls(config)
        url = settings.url(sockets[0].getsockname()[1])
        server = _Server(config)

        async def serve() -> None:
            # Outermost, so that no signal finds its default action while anything here is still to be ended.
            with anyio.open_signal_receiver(*_stop_signals()) as signals:
                on_listening(url)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_stop_on_signal, signals, server, services, settings.limits.drain_seconds)
                    await server.serve(sockets=sockets)
                    if server.force_exit:
                        await server.lifespan.shutdown()
                    tasks.cancel_scope.cancel()

        anyio.run(serve, backend_options={"use_uvloop": True})
        if server.failed:
            raise SystemExit(1)


def _stop_signals() -> list[signal.Signals]:
    """A closed terminal stops the server as well, unless ``nohup`` started it."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class _Server(uvicorn.Server):
    """Leaves the signals to us: uvicorn would close its socket at the first, and could not say why."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = anyio.Event()
        self._listeners: list[TlsListener] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """TLS connections are accepted by ``TlsListener``, all others by uvicorn."""
        context = self.config.ssl
        await super().startup(sockets if context is None else [])
        if context is not None:
            connections = cast("set[BoundedConnection | Handshake]", self.server_state.connections)
            self._listeners = [
                TlsListener(each, context, self._protocol, connections, connection_limit()) for each in sockets or ()
            ]
            for listener in self._listeners:
                listener.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets)

    def _protocol(self) -> BoundedConnection:
        kind = cast("type[BoundedConnection]", self.config.http_protocol_class)
        return kind(self.config, self.server_state, self.lifespan.state)

    def stop(self) -> None:
        """Has it end."""
        self.should_exit = True
        self._stopping.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    @property
    def failed(self) -> bool:
        """Whether what the server works with has failed, at the start or later."""
        return isinstance(self.lifespan, LifespanOn) and (self.lifespan.error_occurred or self.lifespan.startup_failed)

    async def main_loop(self) -> None:
        """Wakes up once a second, when the date in the replies changes; uvicorn's own does so ten times a second."""
        while not await self.on_tick(0):
            with anyio.move_on_after(1.0):
                await self._stopping.wait()
            if self.failed:
                log.critical("the server cannot go on, for the reason above, and exits")
                self.should_exit = True


async def _stop_on_signal(
    signals: AsyncIterator[signal.Signals], server: "_Server", services: Services, drain_seconds: float
) -> None:
    async def drain() -> None:
        await services.queues.drain(drain_seconds)
        server.stop()

    async with anyio.create_task_group() as tasks:
        name = (await anext(signals)).name
        log.info("%s: taking no more requests; those that are here have %g seconds", name, drain_seconds)
        tasks.start_soon(drain)
        await anext(signals)
        log.info("stopping at once")
        services.queues.cut()
        services.pool.kill()
        server.force_exit = True
        server.stop()


def _load_tls(config: uvicorn.Config) -> None:
    """Reads the certificate before the server says that it listens."""
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ListenError(f"--ssl-certfile, --ssl-keyfile: cannot be used: {error}") from error
