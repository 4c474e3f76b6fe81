"""HTTP/1.1 over a real socket for anything that answers `httpx2` requests.

In: an async function from request to response, such as `FakeAnthropic.respond`. Out: a server on a
Unix socket or on 127.0.0.1, in a thread or in this process's own event loop. Transport errors the
function raises happen on the wire: a timeout never answers, a broken connection closes. It knows
nothing of what is asked or answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import h11
    import httpx2
    from anthropic import AsyncAnthropic

Respond = Callable[["httpx2.Request"], Awaitable["httpx2.Response"]]
UNIX_BASE_URL = "http://localhost"
"""The base URL of a server on a Unix socket; the host's name means nothing there."""


def socket_client(unix_path: str | Path, **options: Any) -> AsyncAnthropic:
    """A client of the Anthropic SDK for a server on a Unix socket; `options` are the client's own.

    It keeps no connection open after an answer: a judge closes no client that was given to it, so
    an open one would be left behind. For a server on a port, `AsyncAnthropic(base_url=...)` does.
    """
    import httpx2
    from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

    limits = httpx2.Limits(max_connections=1_000, max_keepalive_connections=0)
    transport = httpx2.AsyncHTTPTransport(uds=str(unix_path), limits=limits)
    options = {"api_key": "fake-key", "base_url": UNIX_BASE_URL, **options}
    return AsyncAnthropic(http_client=DefaultAsyncHttpxClient(transport=transport), **options)


@contextlib.contextmanager
def serve_in_thread(
    respond: Respond, *, unix_path: str | Path | None = None, port: int | None = None
) -> Iterator[str]:
    """Serve from a thread of its own while the block runs; yields the base URL.

    Raises:
        ValueError: neither or both of `unix_path` and `port`.
        OSError: the socket cannot be opened.
    """
    _check_address(unix_path, port)
    started = threading.Event()
    state: dict[str, Any] = {}

    async def main() -> None:
        stop = asyncio.Event()
        state["stop"] = (asyncio.get_running_loop(), stop)
        async with serve(respond, unix_path=unix_path, port=port) as base_url:
            state["base_url"] = base_url
            started.set()
            await stop.wait()

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            state["error"] = error
        finally:
            started.set()

    thread = threading.Thread(target=work, name="prefopt-fake-server", daemon=True)
    thread.start()
    started.wait()
    try:
        if "base_url" in state:
            yield state["base_url"]
    finally:
        loop, stop = state["stop"]
        with contextlib.suppress(RuntimeError):  # the loop is closed when all is over
            loop.call_soon_threadsafe(stop.set)
        thread.join()
    if "error" in state:
        raise state["error"]


@contextlib.asynccontextmanager
async def serve(
    respond: Respond, *, unix_path: str | Path | None = None, port: int | None = None
) -> AsyncIterator[str]:
    """Serve on the running event loop while the block runs; yields the base URL.

    Raises:
        ValueError: neither or both of `unix_path` and `port`.
        OSError: the socket cannot be opened.
    """
    _check_address(unix_path, port)
    loop = asyncio.get_running_loop()
    open_connections: set[_Connection] = set()

    def connection() -> asyncio.Protocol:
        return _Connection(respond, open_connections)

    if unix_path is not None:
        server = await loop.create_unix_server(connection, str(unix_path))
        base_url = UNIX_BASE_URL
    else:
        server = await loop.create_server(connection, "127.0.0.1", port)
        base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield base_url
    finally:
        server.close()
        for each in list(open_connections):
            each.close()
        await server.wait_closed()
        if unix_path is not None:
            Path(unix_path).unlink(missing_ok=True)


def _check_address(unix_path: str | Path | None, port: int | None) -> None:
    if (unix_path is None) == (port is None):
        raise ValueError(
            f"give either unix_path or port (0 for any free one); got {unix_path!r} and {port!r}."
        )


class _Connection(asyncio.Protocol):
    """One client's connection: requests one after another, each answered before the next."""

    def __init__(self, respond: Respond, open_connections: set[_Connection]) -> None:
        import h11

        self._respond = respond
        self._open_connections = open_connections
        self._http = h11.Connection(h11.SERVER)
        self._head: h11.Request | None = None
        self._body: list[bytes] = []
        self._answering: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._open_connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_connections.discard(self)
        if self._answering is not None:
            self._answering.cancel()

    def data_received(self, data: bytes) -> None:
        self._http.receive_data(data)
        self._read_on()

    def eof_received(self) -> None:
        self._transport.close()

    def close(self) -> None:
        """Break the connection off."""
        self._transport.abort()

    def _read_on(self) -> None:
        import h11

        while self._answering is None:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError:
                self._transport.close()
                return
            if isinstance(event, h11.Request):
                self._head, self._body = event, []
                if self._http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[])
                    self._transport.write(self._http.send(go_on) or b"")
            elif isinstance(event, h11.Data):
                self._body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._answering = asyncio.get_running_loop().create_task(self._answer())
            else:  # more data is needed, or the client is done
                return

    async def _answer(self) -> None:
        import h11
        import httpx2

        assert self._head is not None
        headers = list(self._head.headers)
        host = dict(headers).get(b"host", b"localhost").decode()
        request = httpx2.Request(
            self._head.method.decode(),
            f"http://{host}{self._head.target.decode()}",
            headers=headers,
            content=b"".join(self._body),
        )
        try:
            await self._send(await self._respond(request))
        except httpx2.TimeoutException:
            return  # Nothing more comes on this connection; the client gives up and closes it.
        except httpx2.TransportError:
            self._transport.close()
            return
        except Exception as error:
            said = f"the server failed: {type(error).__name__}: {error}"
            if self._http.our_state is h11.SEND_RESPONSE:
                await self._send(httpx2.Response(500, text=said))
            self._transport.close()
            return
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            self._transport.close()
            return
        self._http.start_next_cycle()
        self._answering = None
        self._read_on()

    async def _send(self, response: httpx2.Response) -> None:
        import h11
        import httpx2

        headers = [(k, v) for k, v in response.headers.raw if k.lower() != b"connection"]
        head = self._http.send(h11.Response(status_code=response.status_code, headers=headers))
        if isinstance(response.stream, httpx2.ByteStream):
            body = self._http.send(h11.Data(data=response.content))
            end = self._http.send(h11.EndOfMessage())
            self._transport.write(b"".join((head or b"", body or b"", end or b"")))
            return
        self._transport.write(head or b"")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        async for chunk in response.stream:
            self._transport.write(self._http.send(h11.Data(data=chunk)) or b"")
        self._transport.write(self._http.send(h11.EndOfMessage()) or b"")
