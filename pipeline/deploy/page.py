"""A static Space, free for everyone: the service's page, with the release running in the visitor's browser. No server.

    python -m pipeline.deploy.page --space your-name/ag-news --model your-name/ag-news --revision v1
    python -m pipeline.deploy.page --space your-name/ag-news --model your-name/ag-news --library node_modules

The page fetches the release from the Hub at the commit that the revision is now, and transformers.js from a CDN of npm's
packages, each file pinned by hash. With `--library node_modules` these files are put into the Space instead (after
`npm i --ignore-scripts @huggingface/transformers@4.3.1`), and nothing comes from elsewhere. Run it again for a newer revision.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import HFValidationError

from pipeline.deploy.upload import upload
from pipeline.errors import UserError, run_entry
from pipeline.hub_access import advice, limit_waiting

STATIC = Path(__file__).resolve().parents[2] / "serve" / "static"
CDN = "https://cdn.jsdelivr.net/npm"
RELEASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx")  # what a browser fetches of a release
HTML = '<html lang="en">'  # where the page takes up what was set here


@dataclass(frozen=True)
class NpmFile:
    package: str
    version: str
    path: str
    bytes: int
    sha384: str  # in base64, as browsers check it


# By the names that serve/static/worker.js knows them by. The WebAssembly is the version that transformers.js names, in its smallest
# build: no WebGPU, which few phones have and whose answers differ more.
LIBRARY = {
    "library": NpmFile("@huggingface/transformers", "4.3.1", "dist/transformers.min.js", 586230,
                       "AFNtlNOt2vbygtlRCUX2TDgkE+EyonjbCLxAfqezYwJJDVlozUhg+yKs4cPwyjHR"),
    "glue": NpmFile("onnxruntime-web", "1.31.0-dev.20260914-8d85527a0", "dist/ort-wasm-simd-threaded.mjs", 24381,
                    "rwgdUeIyqfd2lxMuhdqXYPnZiluDqSM5liz/q+ulIt4vYtB52NCoTVWBkm1KFOeN"),
    "wasm": NpmFile("onnxruntime-web", "1.31.0-dev.20260914-8d85527a0", "dist/ort-wasm-simd-threaded.wasm", 14264838,
                    "LrOPe1yNsLVzhsriuQfxO06RWx/XakR0S8uiOMx7HVJP6N/IEaR1EAgJMFeTanif"),
}  # fmt: skip


@dataclass(frozen=True)
class Release:
    """What the Hub has of a release, at one commit."""

    model: str
    revision: str
    commit: str
    bytes: int  # of RELEASE_FILES together


def find_release(model: str, revision: str, api: HfApi) -> Release:
    """The commit that `revision` of `model` is. Raises UserError unless every browser can fetch what it needs from there."""
    try:
        info = api.model_info(model, revision=revision, files_metadata=True)
    except HFValidationError as error:
        raise UserError(f"'{model}' is no repository on the Hub: allowed is owner/name. Publish a run first, with `make push`.") from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if missing := [name for name in RELEASE_FILES if name not in sizes]:
        raise UserError(
            f"{model} at {revision} has no {', '.join(missing)}: a browser needs them. Give a release that training published with onnx: true."
        )
    if info.private or info.gated:
        raise UserError(
            f"{model} is {'private' if info.private else 'gated'}, and a page that anyone may open can hold no token. Make it public "
            f"(`hf repos settings {model} --public`), or deploy a Space with a server: make deploy-space."
        )
    assert info.sha, "the Hub names the commit"
    return Release(info.id, revision, info.sha, sum(sizes[name] for name in RELEASE_FILES))


def find_library(library: str) -> tuple[dict[str, str], dict[str, Path]]:
    """Where the page finds each file of LIBRARY, and the files that have to be put into the Space for that.

    `library` is the address of a CDN of npm's packages, or a folder node_modules. Raises UserError where it is neither, or
    has other files than the pinned ones.
    """
    if library.startswith(("https://", "http://")):
        base = library.rstrip("/")
        return {name: f"{base}/{file.package}@{file.version}/{file.path}" for name, file in LIBRARY.items()}, {}
    if not Path(library).is_dir():
        raise UserError(f"No folder {library}: --library is a folder node_modules, or the address of a CDN of npm's packages like {CDN}.")
    addresses, shipped = {}, {}
    for name, file in LIBRARY.items():
        source = Path(library) / file.package / file.path
        if not source.is_file() or _sha384(source) != file.sha384:
            raise UserError(
                f"{source} is not that of {file.package} {file.version}: run `npm i --ignore-scripts @huggingface/transformers@"
                f"{LIBRARY['library'].version}` in an empty folder and give its node_modules, or leave --library out."
            )
        addresses[name] = f"library/{source.name}"
        shipped[addresses[name]] = source
    return addresses, shipped


def _sha384(file: Path) -> str:
    return base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()


def compose(release: Release, library: str = CDN, host: str = "https://huggingface.co") -> Mapping[str, bytes | Path]:
    """The Space's files, by name. `host` is the Hub that visitors fetch the release from. Raises UserError as `find_library`."""
    addresses, shipped = find_library(library)
    settings = {
        "model": release.model,
        "revision": release.revision,
        "commit": release.commit,
        "host": host,
        "files": {name: {"url": addresses[name], "integrity": f"sha384-{file.sha384}"} for name, file in LIBRARY.items()},
        "bytes": visitor_bytes(release),
    }
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert page.count(HTML) == 1, "the page's first line has changed"
    page = page.replace(HTML, f'{HTML[:-1]} data-space="{html.escape(json.dumps(settings))}">')
    scripts = {name: STATIC / name for name in ("browser.js", "worker.js", "model.js")}
    return {"README.md": _readme(release, host).encode(), "index.html": page.encode(), **scripts, **shipped}


def visitor_bytes(release: Release) -> int:
    """What a browser fetches, once."""
    return release.bytes + sum(file.bytes for file in LIBRARY.values())


def _readme(release: Release, host: str) -> str:
    name = release.model.rpartition("/")[2]
    front = SpaceCardData(
        title=name, emoji="📰", colorFrom="indigo", colorTo="gray", sdk="static", app_file="index.html", pinned=False,
        short_description="A text classifier that runs in your browser", models=[release.model],
    )  # fmt: skip
    return f"""---
{front.to_yaml().strip()}
---

# {name}

[{release.model}]({host}/{release.model}/tree/{release.commit}) at `{release.commit}`, run by the visitor's browser with
[transformers.js](https://github.com/huggingface/transformers.js): there is no server, and no text leaves the browser.
Made by DistriNews' `make deploy-page`.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}. Usage: python -m pipeline.deploy.page --space owner/name --model owner/name [--revision v1] [--library node_modules]"
        )


def main(argv: Sequence[str]) -> None:
    description = "Put the page into a static Space, free for everyone: the release runs in the visitor's browser."
    parser = _Parser(prog="python -m pipeline.deploy.page", description=description, allow_abbrev=False)
    parser.add_argument("--space", required=True, help="owner/name of the Space; made if it does not exist.")
    parser.add_argument("--model", required=True, help="owner/name of the release's repository, a public one.")
    parser.add_argument("--revision", default="main", help="Tag, branch or commit of the release; the page keeps to the commit it is now.")
    parser.add_argument(
        "--library",
        default=CDN,
        help="Where transformers.js comes from: a CDN of npm's packages, or a folder node_modules to ship. (%(default)s)",
    )
    parser.add_argument("--private", action="store_true", help="Create the Space as private.")
    arguments = parser.parse_args(argv)
    limit_waiting()
    api = HfApi()
    with advice(api, f"the model {arguments.model}", "Nothing was deployed."):
        release = find_release(arguments.model, arguments.revision, api)
    commit = upload(arguments.space, "static", compose(release, arguments.library, api.endpoint), private=arguments.private)
    print(
        f"model       {release.model} at {release.commit}\nspace       {arguments.space} at {commit}\n"
        f"visitors    fetch {visitor_bytes(release) / 1e6:.0f} MB once, which their browser keeps\n"
        f"at          {api.endpoint}/spaces/{arguments.space}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_entry(main))
