"""What stands before the search page's server: who may speak to it, and how much.

The server has no login, so it answers the machine it runs on. A page of another site that is open in the same browser
could reach it all the same, by a name that was made to point at this machine (hence the check of `Host`), or by sending
a form (hence the check of `Origin` and `Sec-Fetch-Site`).
"""

import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READING = frozenset({"GET", "HEAD"})
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuses requests of other sites and bodies that are too large; adds headers that keep browsers to this server."""

    def __init__(self, app: App, *, names: frozenset[str], any_address: bool, most_bytes: int) -> None:
        """
        Args:
            names: host names besides this machine's own that a request may ask for.
            any_address: whether it may ask for any numeric address, too.
            most_bytes: size of a request's body.
        """
        self.app, self.names, self.any_address, self.most_bytes = app, names, any_address, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", []))
                given = {name.lower() for name, _ in own}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*own, *(header for header in extra if header[0] not in given)]
            await send(message)

        if refusal := self.refusal(scope["method"], headers_of(scope)):
            await answer(send_with_headers, *refusal)
        else:
            await self.app(scope, receive, send_with_headers)

    def refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason where a request is refused."""
        host = headers.get("host", "")
        if not self.is_ours(host):
            return 421, f"this server does not answer for {host or 'no host'!r}: open it by the address that it printed"
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        foreign = site not in ("none", "same-origin") and (method not in READING or mode != "navigate")
        origin = headers.get("origin")
        if foreign or (method not in READING and origin is not None and urlsplit(origin).netloc != host):
            return 403, "pages of other sites may not use this server"
        if method in READING:
            return None
        length = headers.get("content-length", "0" if method == "DELETE" else "")
        if not length.isdecimal():
            return 411, "the request does not say how long it is (Content-Length)"
        if int(length) > self.most_bytes:
            return 413, f"{int(length):,} bytes at once are too many, {self.most_bytes:,} may be sent: send less"
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a `Host` header (name or address, with or without a port) means this server."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or name == "localhost" or is_loopback(name) or (self.any_address and is_address(name))


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether a name is this machine's own, seen from itself."""
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def headers_of(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def answer(send: Send, status: int, reason: str) -> None:
    """A refusal in the form of the server's other errors."""
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
