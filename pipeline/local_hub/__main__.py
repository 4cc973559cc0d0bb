"""Run a local Hub in the foreground, until Ctrl-C or SIGTERM:

python -m pipeline.local_hub --root outputs/hub                        on http://127.0.0.1:8009
python -m pipeline.local_hub --root outputs/hub --port 0               on a free port
python -m pipeline.local_hub --root outputs/hub --add-user alice       make a user, print the token, end
python -m pipeline.local_hub --root outputs/hub --add-user bob --role read
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError, run_entry
from pipeline.local_hub.accounts import OWNER, ROLES, Accounts
from pipeline.local_hub.process import environment

# The mission's data and model live under these names on the big Hub; owning them here lets its ids be used unchanged.
ORGANIZATIONS = ("distilbert", "fancyzhx")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. All options: python -m pipeline.local_hub --help")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "python -m pipeline.local_hub", description="A local Hub that the Hugging Face clients use unchanged.", allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, default=Path("outputs/hub"), help="folder of repositories and accounts (outputs/hub)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8009, help="port to listen on; 0: a free one (8009)")
    parser.add_argument("--token", help=f"write token of the user '{OWNER}'; without it one is made at the first start and kept")
    parser.add_argument("--organization", action="append", default=[], help=f"another namespace '{OWNER}' may write to; repeatable")
    parser.add_argument("--add-user", metavar="NAME", help="make this user and a token, print the token and end; the Hub may be running")
    parser.add_argument("--role", choices=ROLES, default="write", help="role of the token of --add-user (write)")
    parser.add_argument("--with-parent", action="store_true", help="end when the process that started this one has ended")
    parser.add_argument("--faults", action="store_true", help=argparse.SUPPRESS)  # for tests: see faults.py
    return parser.parse_args(argv)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address or port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is in use" if error.errno == errno.EADDRINUSE else "is reserved"
            raise UserError(f"Port {port} on {host} {why}: choose another with --port, or --port 0 for a free one.") from error
        raise UserError(f"Cannot listen on {host}: {error.strerror or error}. --host takes an address of this machine.") from error
    except OverflowError as error:
        raise UserError(f"port is {port}: allowed is 0 to 65535.") from error


def main(arguments: argparse.Namespace) -> int:
    root: Path = arguments.root
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--root {root} is a file: give a folder, or a name for a new one.") from error
    accounts = Accounts(root)
    if arguments.add_user:
        print(accounts.add(arguments.add_user, arguments.role))
        return 0
    # Imported late: --help and --add-user need no web server.
    import uvicorn
    from starlette.middleware import Middleware

    from pipeline.local_hub.app import create_app
    from pipeline.local_hub.faults import Faults

    with listen(arguments.host, arguments.port) as listener:
        app = create_app(root, middleware=[Middleware(Faults, root)] if arguments.faults else [])
        token = accounts.add(OWNER, "write", arguments.token, (*ORGANIZATIONS, *arguments.organization))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3))

        # uvicorn raises the signals it caught once more when it has shut down; being stopped is how a server ends well.
        def end(*_: object) -> None:
            server.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        if arguments.with_parent:
            threading.Thread(target=_after_parent, args=(end,), daemon=True).start()
        host, port = arguments.host, listener.getsockname()[1]
        print(welcome(f"http://{_name(host)}:{port}", token, accounts.path), flush=True)
        if host not in LOOPBACK:
            print("warning: plain HTTP beyond this machine: whoever listens on the network can read the tokens.", file=sys.stderr)
        server.run(sockets=[listener])
    return 0


def _name(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _after_parent(end: Callable[[], None]) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    end()


def welcome(url: str, token: str, kept: Path) -> str:
    exports = "\n".join(f"export {name}={value}" for name, value in environment(url, token).items())
    return (
        f"A local Hub listens on {url} as long as this runs; Ctrl-C ends it. In another terminal:\n\n{exports}\n\n"
        f"You are the user '{OWNER}'; the token is kept in {kept} (readable by you alone). Try: hf auth whoami"
    )


if __name__ == "__main__":
    sys.exit(run_entry(lambda argv: main(parse(argv))))
