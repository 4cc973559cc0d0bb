"""The two ways in which the service says no.

`UserError` is for the person who starts it: one line, exit code 2. `Refusal` is for a caller: one JSON answer.
"""

from __future__ import annotations


class UserError(ValueError):
    """What the person who started the service can put right: what was given, what is allowed, what to do next."""


class Refusal(Exception):
    """A request that gets no prediction.

    `status` is the HTTP status, `code` a short word for programs, `message` a sentence for people, `field` the part of
    the request it is about, `retry_after` whole seconds after which trying again makes sense, `revision` the commit
    that judged the texts, where one did: another may serve when the answer is sent.
    """

    revision: str | None = None

    def __init__(self, status: int, code: str, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field, self.retry_after = status, code, message, field, retry_after
