"""The Hub as an ASGI application."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from pipeline.local_hub import commits, files, lfs, repos, spaces
from pipeline.local_hub.accounts import Accounts
from pipeline.local_hub.errors import HubError
from pipeline.local_hub.store import Store
from pipeline.local_hub.web import ROUTES, RawPath, gone, no_such_route, refuse

# As at the real Hub, a page of another origin may read what everybody may; here only one that this machine serves.
LOOPBACK = r"https?://(127\.0\.0\.1|localhost)(:\d+)?"

assert all((commits, files, lfs, repos, spaces))  # importing them registered their routes


def create_app(root: Path, upload_seconds: float = 3600, middleware: Sequence[Middleware] = ()) -> Starlette:
    """The application that serves `root`. Upload addresses are good for `upload_seconds`.

    `middleware` sees every request first: the place for what misbehaves on purpose, such as a Hub that stalls or refuses.
    Raises UserError when another Hub serves the same root.
    """
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(CORSMiddleware, allow_origin_regex=LOOPBACK, allow_methods=["GET", "HEAD"]),
            *middleware,
            Middleware(RawPath),
        ],
        exception_handlers={HubError: refuse, HTTPException: no_such_route, ClientDisconnect: gone},
    )
    app.router.redirect_slashes = False
    app.state.store, app.state.accounts, app.state.signer = Store(root), Accounts(root), lfs.Signer(upload_seconds)
    return app
