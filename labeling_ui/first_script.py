"""A script in front of everything else of a Gradio page: Gradio adds its `head` only once its own scripts run."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class FirstScript:
    """Puts `script` at the beginning of the page at the root of the application, and leaves all else alone."""

    def __init__(self, app: ASGIApp, script: str) -> None:
        self._app = app
        self._element = f"<head><script>{script}</script>".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = scope["type"] == "http" and scope["path"] == f"{scope.get('root_path', '')}/"
        await self._app(scope, receive, self._adding(send) if root and scope["method"] == "GET" else send)

    def _adding(self, send: Send) -> Send:
        """Holds the beginning of the answer back until its length is known: Gradio sends the page in one piece."""
        begun: Message = {}

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.update(message)
                return
            if begun:
                body = message.get("body", b"")
                if Headers(raw=begun["headers"]).get("content-type", "").startswith("text/html"):
                    body = body.replace(b"<head>", self._element, 1)
                    headers = MutableHeaders(raw=list(begun["headers"]))
                    if "content-length" in headers and not message.get("more_body"):
                        headers["content-length"] = str(len(body))
                    begun["headers"] = headers.raw
                await send(dict(begun))
                begun.clear()
                message = {**message, "body": body}
            await send(message)

        return wrapped
