"""An S3 server on this machine (moto), which can be told to refuse a request or to break off while it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Server:
    """Answers as S3 does.

    Attributes:
      requests: all requests so far, such as "PUT bucket/run/config.json".
      trouble: of a request, "refused" where access is denied, and "cut" where half an answer comes.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.trouble: Callable[[str], str] = no_trouble
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.address = f"http://127.0.0.1:{self._server.port}"

    def changing(self) -> list[str]:
        """The requests so far that write or delete."""
        return [request for request in self.requests if not request.startswith(("GET", "HEAD"))]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = environ["QUERY_STRING"]
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].lstrip('/')}{'?' if query else ''}{query}"
        self.requests.append(request)
        trouble = self.trouble(request)
        if trouble == "refused":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the client sees a reset
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else DENIED
            start_response("403 Forbidden", [("Content-Length", str(len(body)))])
            return [body]
        answer = self._moto(environ, start_response)
        if trouble == "cut":
            whole = b"".join(answer)
            return [whole[: len(whole) // 2]]
        return answer

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Runs in a thread; what asks for S3 finds it there meanwhile."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.address)
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.delenv("AWS_PROFILE", raising=False)
            yield self
        self._server.shutdown()
        thread.join()


def no_trouble(request: str) -> str:
    """Every request is answered."""
    return ""


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass
