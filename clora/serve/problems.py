"""What a request is refused with: a status and one sentence, in OpenAI's error shape."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """A refusal. `code` is for programs and names the reason in metrics; `retry_after` is in seconds, for a client that
    did nothing wrong; `extra` are more fields of the error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.extra = retry_after, extra or {}

    def to_json(self) -> dict[str, Any]:
        """{"error": {...}} as OpenAI's clients read it."""
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else None)
        error = {"message": self.message, "type": kind or "invalid_request_error", "param": self.param}
        return {"error": error | {"code": self.code} | self.extra}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, where a later try may succeed; the scheme to use, where a key is missing."""
        found = {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def bad(message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> Problem:
    """A request that its sender can mend."""
    return Problem(status, message, code, param=param)
