"""A user's mistake ends in one line: what was given, what is allowed, what to do next. Exit code 2, no traceback.

`UserError` is that line. `explain` recognises the failures of the libraries below us that are really a user's
situation (a full disk, a repository that does not exist, a Hub that is not there) and turns them into one.
`run_entry` is the frame around every command line of the project.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shell's convention
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by SIGTERM with everything saved; start it again
EXIT_PEER_LOST = 69  # EX_UNAVAILABLE: another rank has ended
EXIT_HUNG = 70  # EX_SOFTWARE: another rank does not go on; the rank that noticed has said so
PATIENCE_SECONDS = 5  # the launcher looks for failed ranks ten times a second
GO_ON = "Interrupted. Complete checkpoints are kept: run the same command again to go on."


class UserError(ValueError):
    """What the person who typed the command can put right; its text is one line they can act on."""


class PeerLost(RuntimeError):
    """Another rank of the run has ended; its text names the rank."""

    def __str__(self) -> str:
        return f"{self.args[0]}. The same command goes on from the newest complete checkpoint."


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `allowed`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(given), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first: libraries wrap the telling one."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)  # type: ignore[assignment]
    return chain


def explain(error: BaseException) -> str | None:
    """The one line for a failure that a user can act on, or None where it is a defect of ours and wants a traceback."""
    for cause in _causes(error):
        text = _explain_one(cause)
        if text:
            return text
    return None


def _explain_one(error: BaseException) -> str | None:
    if isinstance(error, UserError | PeerLost):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {error.filename}" if error.filename else ""
        return (
            f"The disk is full{where}. Free some space (older runs under outputs/, the cache under ~/.cache/huggingface) or write "
            "to another place; then run the same command again. What was complete before is kept."
        )
    if isinstance(error, PermissionError) and error.filename:
        return f"No permission to use {error.filename}. Choose a folder you may write to."
    name = type(error).__name__
    if name == "OutOfMemoryError":
        return (
            "The device ran out of memory. Halve --max_per_device_batch_size (the global batch, and so the result, stays "
            "the same: accumulation makes up for it) or lower --max_length."
        )
    # safetensors and torch.save do not raise OSError; the latter only says that it stands at an unexpected position.
    if (name == "SafetensorError" and "No space left" in str(error)) or (
        "inline_container.cc" in str(error) and "unexpected pos" in str(error)
    ):
        return _explain_one(OSError(errno.ENOSPC, "No space left on device"))
    return _explain_hub(error)


def _explain_hub(error: BaseException) -> str | None:
    """Failures of huggingface_hub. Imported late: most commands that fail early never need it."""
    from huggingface_hub import errors as hub

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    url = str(getattr(response, "url", "")) or endpoint
    if "HF_HUB_DISABLE_XET" in str(error):
        return f"The Hub at {endpoint} does not speak Xet: set HF_HUB_DISABLE_XET=1 and run the command again."
    if isinstance(error, hub.RevisionNotFoundError):
        return f"No such revision at {url}. Look at the repository's branches, tags and commits, or leave the revision out for main."
    if isinstance(error, hub.GatedRepoError):
        return f"Access to {url} is gated: ask for it on the repository's page, then `hf auth login`."
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"No such repository at {url}, or it is private and your token may not see it. Check the spelling "
            "(owner/name); for a private one `hf auth login` or set HF_TOKEN; for a local folder check the path."
        )
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return _no_network(endpoint)
    if isinstance(error, hub.LocalTokenNotFoundError):
        return "No token: run `hf auth login`, or set HF_TOKEN to a token with the right to write."
    if isinstance(error, hub.HfHubHTTPError) and status in (401, 403):
        return (
            f"The Hub refused ({status}) at {url}: the token is missing, wrong or may only read. Make one with the right to "
            "write under Settings > Access Tokens, then `hf auth login` or set HF_TOKEN."
        )
    if status == 429:
        return f"The Hub at {endpoint} asks for a pause: too many requests. Wait five minutes, then run the same command again."
    if status is not None and status >= 500:
        return f"The Hub at {endpoint} has trouble of its own ({status}). Run the same command again later."
    # The client lets the errors of its HTTP library through, whose name has changed before: go by their family.
    if isinstance(error, BrokenPipeError | ConnectionResetError):
        return None  # of some other connection, or of our own output
    if {kind.__name__ for kind in type(error).__mro__} & {"TransportError", "ConnectionError"}:
        return _no_network(endpoint)
    return None


def _no_network(endpoint: str) -> str:
    return (
        f"The Hub at {endpoint} cannot be reached and what is needed is not in the local cache. Check the network, or start "
        "a local Hub with `make hub` and set the environment it prints, or give a local folder instead of a Hub id."
    )


def tell(error: BaseException) -> None:
    """Print the line for a user's mistake on stderr, once (with the traceback before it where `--debug` was given).

    Under a launcher rank 0 speaks at once and the other ranks wait: when they met the same mistake, or only lost their
    peer, the launcher ends them first, so the line appears once. When rank 0 has only lost a peer, it waits for that
    one to say why.
    """
    if getattr(error, "told", False):
        return
    error.told = True  # type: ignore[attr-defined]
    rank, text = int(os.environ.get("RANK", "0")), explain(error)
    if isinstance(error, PeerLost):
        if "DISTRINEWS_COMMAND" in os.environ:
            return  # our launcher sees how that rank ended, and says so
    elif rank != 0:
        time.sleep(PATIENCE_SECONDS)
    if text is None:
        if rank == 0 and ("by peer" in str(error) or type(error).__name__.startswith("Dist")):
            time.sleep(2 * PATIENCE_SECONDS)
        return
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    # Another rank's progress bar may stand on the line.
    who, line = (f" (rank {rank})", "\n") if rank else ("", "")
    print(f"{line}error{who}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def run_entry(main: Callable[[list[str]], int | None], *, interrupted: str = "Interrupted.") -> int:
    """Run `main(arguments)` and turn what it raises into an exit code and, for a user's mistake, one line on stderr.

    Returns 0 (or what `main` returned), 2 for a user's mistake, 69 where another rank has ended, 130 after Ctrl-C, when
    rank 0 says `interrupted`. Any other exception is a defect of ours and propagates with its traceback. Every command understands
    `--debug`.
    """
    try:
        return main([argument for argument in sys.argv[1:] if argument != "--debug"]) or 0
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        tell(error)
        if explain(error) is None:
            raise
        return EXIT_PEER_LOST if isinstance(error, PeerLost) else EXIT_USER_ERROR
