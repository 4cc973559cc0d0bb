"""Starts the service.

    python -m serve --model user/repo --revision v1 [--host 127.0.0.1] [--port 8000]
    python -m serve --model path/to/release --port 0        # a folder, on a free port

Prints `listening on http://HOST:PORT` once it answers, and logs when it is ready. Exit codes: 0 after SIGTERM or
Ctrl-C (requests in flight are finished first), 2 for what the person who started it can put right, in one line, 70 for
an engine that died or hung and could not be replaced: whoever started it should start it again; 1 for a defect.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import uvicorn

from serve import logs
from serve.errors import UserError
from serve.life import Fatal
from serve.machine import share_memory
from serve.metrics import Metrics
from serve.service import Service
from serve.settings import Settings, parse
from serve.worker import in_thread

log = logging.getLogger("serve")

EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_ENGINE = 70
DRAIN_SECONDS = 8  # for requests in flight; whoever stops containers kills after 10 s


class Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets and self.started:
            host, port = sockets[0].getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def bind(settings: Settings) -> socket.socket:
    """Raises UserError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {settings.host}:{settings.port} ({reason}): give another --port (0 takes a free one) or --host."
        ) from error
    return listener


def run(settings: Settings) -> None:
    """Serves until it is told to stop. Raises UserError, or whatever else kept the model from being loaded."""
    config = uvicorn.Config(
        "serve.app",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        # Longer than the minute for which proxies keep theirs: a connection that both ends give up at once loses a request.
        timeout_keep_alive=75,
        server_header=False,
    )
    server = Server(config)
    service = Service(settings, Metrics())
    service.on_failure = lambda: setattr(server, "should_exit", True)
    # uvicorn puts its own handlers in place when it runs, and raises the signal again once it has stopped: it must not be
    # lost before, and not be a second death after.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    with bind(settings) as listener, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(answer(service, server, listener))
    if service.failure:
        raise service.failure


async def answer(service: Service, server: Server, listener: socket.socket) -> None:
    """The HTTP side is imported while the model is loaded: either takes half a second, and there is more than one core."""
    service.start()
    try:
        application = await in_thread("imports", importlib.import_module, "serve.app")
        server.config.app = application.create_app(service)
        await server.serve(sockets=[listener])
    finally:
        await service.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of a mistake; a service that has served ends the process here."""
    try:
        settings = parse(sys.argv[1:] if argv is None else argv)
        logs.set_up(settings.log_format)
        share_memory()
        run(settings)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Fatal as error:
        log.critical("the service ends: %s", error)
        end(EXIT_ENGINE)
    except Exception as error:
        log.critical("the service has a defect and ends", exc_info=error)
        end(EXIT_DEFECT)
    end(0)


def end(code: int) -> NoReturn:
    """At once: Python would stop threads in the middle of a library's call, where an engine loads or computes, and abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
