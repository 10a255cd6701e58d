"""Every error that an API caller can see, with its status, type, code and retry-after.

One class says everything about one error: this file is the error table of the API. The
wire form is OpenAI's, `{"error": {"message", "type", "param", "code"}}`, on every path.
Messages say what happened, to which model on which node, and what to do about it; they
never carry a prompt or a key.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class LlameshError(Exception):
    """An error with an API face. Subclasses fix the class attributes, callers the message.

    `retry_after` is in seconds, None for none. `extra` holds top-level members beside
    `error` (such as `loading`), already JSON-ready.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    retry_after: int | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.extra = extra or {}
        if retry_after is not None:
            self.retry_after = retry_after

    @property
    def code(self) -> str:
        """OpenAI's `code`: the same word as the type, so that either can be matched on."""
        return self.type

    def document(self) -> dict[str, Any]:
        """The JSON document that a caller gets."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error, **self.extra}

    def body(self) -> bytes:
        """`document` as JSON bytes."""
        return msgspec.json.encode(self.document())


class InternalError(LlameshError):
    """A defect of ours. The log has the traceback; the caller gets the request id."""


class InvalidRequest(LlameshError):
    """The request can't be understood: bad JSON, a bad `model`, a wrong kind of model, bad framing."""

    status, type = 400, "invalid_request_error"


class NotAuthenticated(LlameshError):
    """No key, or a key that nobody issued."""

    status, type = 401, "authentication_error"


class Forbidden(LlameshError):
    """A valid key, but not for this."""

    status, type = 403, "forbidden"


class NotFound(LlameshError):
    """No such path."""

    status, type = 404, "not_found"


class ModelNotFound(LlameshError):
    """An unknown or disabled model, or one without the capability that was asked for."""

    status, type = 404, "model_not_found"


class MethodNotAllowed(LlameshError):
    """The path exists, the method doesn't. `allowed`: the value of the Allow header."""

    status, type = 405, "method_not_allowed"
    allowed = ""


class RequestTimeout(LlameshError):
    """The client took too long to send its request."""

    status, type = 408, "request_timeout"


class CancelledByOperator(LlameshError):
    """Somebody who administers the node ended the request. The status is nobody's own (nginx uses it for a
    client that left): those of 500 and above, 408, 409 and 429 would have clients try again by themselves.
    """

    status, type = 499, "cancelled_by_operator"


class Conflict(LlameshError):
    """It is being done already."""

    status, type = 409, "conflict"


class RequestTooLarge(LlameshError):
    """The body is above `http.request_body_limit_bytes`."""

    status, type = 413, "request_too_large"


class HeadersTooLarge(LlameshError):
    """The request head is above the limit of the HTTP reader."""

    status, type = 431, "invalid_request_error"


class RateLimited(LlameshError):
    """A key's own limit; `retry_after` is computed."""

    status, type = 429, "rate_limit_exceeded"


class UpstreamError(LlameshError):
    """llama-server broke before it answered, and no retry helped."""

    status, type = 502, "upstream_error"


class Overloaded(LlameshError):
    """Base of what passes with time: try again, here or elsewhere."""

    status, retry_after = 503, 5


class QueueFull(Overloaded):
    """The model's queue is at its limit; nothing was started for this request."""

    type = "queue_full"


class QueueTimeout(Overloaded):
    """`max_wait_in_queue_ms` ran out before an instance could take the request."""

    type = "queue_timeout"


class Draining(Overloaded):
    """The node is shutting down or was told to drain."""

    type = "draining"


class NoCapacity(Overloaded):
    """This can never fit in the memory that the node may use; nothing was evicted for it."""

    type, retry_after = "no_capacity", 30


class SpawnFailed(Overloaded):
    """llama-server failed to start three times; the message has its own last words."""

    type, retry_after = "spawn_failures_exhausted", 30


class UpstreamTimeout(LlameshError):
    """`max_request_duration_ms` or `upstream_read_timeout_ms` ran out before the first byte."""

    status, type = 504, "request_timeout"
