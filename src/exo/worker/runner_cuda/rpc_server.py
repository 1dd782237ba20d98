"""``--rpc-server ADDRESS``: lends this host's devices to a llama.cpp runner on another host, which starts this program.

It serves through llama.cpp's RPC back end, which asks for no credentials and encrypts nothing. It listens at one
address, which must not be a public one. It writes one line, ``Serving`` or ``Failed``.
"""

import ctypes
import os
import socket
import threading
from contextlib import suppress

from exo.worker.protocol.cores import physical_cores
from exo.worker.protocol.events import Failed
from exo.worker.protocol.messages import Message
from exo.worker.protocol.wire import encode, exit_now, take_protocol_stream
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.part_process import check_private, lines_while_needed
from exo.worker.runner_cuda.bindings import engine_version
from exo.worker.runner_cuda.loading.devices import GPU_BACKENDS, Gpu, cpu, gpus
from exo.worker.runner_cuda.plugin import PluginError, rpc_function

_READY_SECONDS = 30.0


class Serving(Message):
    """The server listens on ``port``."""

    port: int
    engine_version: str
    devices: tuple[str, ...]


def main(address: str) -> None:
    """Runs the program. Does not return."""
    protocol = take_protocol_stream()
    try:
        devices = _devices()
        port = _serve(address, devices)
    except (LoadError, PluginError, OSError) as error:
        protocol.write(encode(Failed(code="model_load_failed", message=str(error))))
        exit_now(1)
    names = tuple(each.name for each in devices)
    protocol.write(encode(Serving(port=port, engine_version=engine_version(), devices=names)))
    for _ in lines_while_needed():
        pass
    exit_now(0)


def _devices() -> tuple[Gpu, ...]:
    """Returns the GPUs of the first back end that has any, or else the CPU."""
    for backend in GPU_BACKENDS:
        with suppress(LoadError):
            if found := gpus(backend):
                return found
    return (cpu(),)


def _serve(address: str, devices: tuple[Gpu, ...]) -> int:
    """Starts the server in a thread, and returns its port. Raises LoadError, PluginError and OSError."""
    check_private(address)
    with socket.socket() as trial:
        try:
            trial.bind((address, 0))
        except OSError as error:
            raise OSError(f"{address} is no address of this host: {error.strerror}") from error
    size = ctypes.c_size_t
    start = rpc_function(
        "start_server", None, ctypes.c_char_p, ctypes.c_char_p, size, size, ctypes.POINTER(ctypes.c_void_p)
    )
    handles = (ctypes.c_void_p * len(devices))(*(each.handle for each in devices))
    arguments = f"{address}:0".encode(), None, physical_cores(), len(devices), handles
    thread = threading.Thread(target=start, args=arguments, name="RPC server", daemon=True)
    thread.start()
    for _ in range(int(_READY_SECONDS / 0.02)):
        thread.join(0.02)
        if (port := _listening(address)) is not None:
            return port
        if not thread.is_alive():
            break
    raise OSError("llama.cpp's RPC server did not start; its reason is on standard error")


def _listening(address: str) -> int | None:
    """Returns the port on which this process listens at an address: llama.cpp does not tell it."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as opened:
                if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and opened.getsockname()[0] == address:
                    return int(opened.getsockname()[1])
        except OSError:  # no socket
            continue
    return None
