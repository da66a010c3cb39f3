"""Refusals in OpenAI's shape, so that its clients understand them."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse


class ApiError(Exception):
    """A refusal that the client reads: `{"error": {"message", "type", "param", "code"}}`.

    Args:
      status: of HTTP.
      message: what is wrong, where, and what to do.
      param: the field of the request.
      code: one of OpenAI's, if a client may look for it.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def of(error: Exception) -> ApiError:
    """Any exception as a refusal; one that is not the client's fault has status 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # no such path, or another method
        headers = None if error.headers is None else dict(error.headers)
        return ApiError(error.status_code, error.detail, headers=headers)
    return ApiError(500, f"{type(error).__name__}: {error}")


async def show_error(_: Request, error: Exception) -> JSONResponse:
    """An exception handler for Starlette."""
    return of(error).response()
