#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.3",
#     "gunicorn",
#     "msgpack",
#     "playwright",
#     "pysignalr",
#     "pytest",
#     "pytest-asyncio",
#     "pytest-xdist",
#     "signalrcore",
# ]
# ///
"""The tests of kestrun.py: run this file, or pytest.

Real sockets on free ports and real clients: nothing of kestrun's is replaced. In
the first half `Client` writes the bytes of the wire itself, so that a bug cannot
cancel itself out; in the second half official clients under Node, pysignalr,
signalrcore and headless Chromium do. What they need is looked for; a test skips
with a sentence that says what to install.
"""

import ast
import asyncio
import base64
import bisect
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import functools
import gc
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import urllib.parse
import uuid
import weakref
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self
from uuid import UUID

import aiohttp
import msgpack
import pytest
import pytest_asyncio
from aiohttp import web
from yarl import URL

import kestrun

PATIENCE = 5  # seconds; no wait of any test is longer
#: For tests of what the server notices only when it looks after its connections.
BRISK = {"keep_alive_interval": 0.1}
RS = b"\x1e"
JSON_WIRES = [(t, "json") for t in ("WebSockets", "ServerSentEvents", "LongPolling")]
WIRES = [*JSON_WIRES, ("WebSockets", "messagepack"), ("LongPolling", "messagepack")]
TRANSPORTS = [transport for transport, _ in JSON_WIRES]
everywhere = pytest.mark.parametrize("wire", WIRES, ids="-".join)
every_transport = pytest.mark.parametrize("wire", JSON_WIRES, ids="-".join)
both_protocols = pytest.mark.parametrize("protocol", ["json", "messagepack"])

# The members of each message in the order of the MessagePack array.
MEMBERS = {
    1: ("headers", "invocationId", "target", "arguments", "streamIds"),
    2: ("headers", "invocationId", "item"),
    4: ("headers", "invocationId", "target", "arguments", "streamIds"),
    5: ("headers", "invocationId"),
    6: (),
    7: ("error", "allowReconnect"),
    8: ("sequenceId",),
    9: ("sequenceId",),
}
EMPTY = {"headers": {}, "arguments": [], "streamIds": [], "allowReconnect": False}
OPTIONAL = ("headers", "invocationId", "streamIds", "error", "allowReconnect")
CLOSED = "Connection closed with an error."
NO_ID = "Connection ID required"
UNKNOWN_ID = "No Connection with that ID"


# ---------------------------------------------------------- client and server


def prefixed(body: bytes) -> bytes:
    """Put MessagePack's length before the body: seven bits a byte, low first."""
    size, prefix = len(body), bytearray()
    while size > 127:
        prefix.append(size & 127 | 128)
        size >>= 7
    return bytes([*prefix, size]) + body


def encode(protocol: str, message: dict) -> bytes:
    if protocol == "json":
        return json.dumps(message).encode() + RS
    kind = message["type"]
    if kind == 3:
        tail = [2]
        if "error" in message or "result" in message:
            tail = [1, message["error"]] if "error" in message else [3]
            tail += [message["result"]] if "result" in message else []
        array = [3, {}, message["invocationId"], *tail]
    else:
        array = [kind, *(message.get(m, EMPTY.get(m)) for m in MEMBERS[kind])]
    return prefixed(msgpack.packb(array, datetime=True))


def unpacked(body: bytes) -> Any:
    return msgpack.unpackb(body, timestamp=3, strict_map_key=False)


def decode(array: list) -> dict:
    """Name the members of a MessagePack array as JSON names them."""
    kind, *values = array
    if kind != 3:
        return {"type": kind, **dict(zip(MEMBERS[kind], values, strict=True))}
    _, invocation, result_kind, *value = values
    key = {1: "error", 2: None, 3: "result"}[result_kind]
    message = {"type": 3, "invocationId": invocation}
    return message | ({key: value[0]} if key else {})


def tidy(message: dict) -> dict:
    """Leave out what one protocol writes as empty and the other not at all."""
    return {k: v for k, v in message.items() if v or k not in OPTIONAL}


def call(target: str, *args: Any, **members: Any) -> dict:
    return {"type": 1, "target": target, "arguments": list(args), **members}


class Failed(Exception):
    """The error text of a Completion."""


class Client:
    """A SignalR client over any transport and protocol."""

    def __init__(
        self, server: "Server", transport: str, protocol: str, path: str, query: str
    ) -> None:
        self.server, self.http = server, server.http
        self.transport, self.protocol = transport, protocol
        self.path, self.query, self.headers = path, query, server.headers
        self.unread: list[dict] = []
        self.news = asyncio.Event()
        self.data, self.shaken, self.ended = bytearray(), False, False
        self.close_code: int | None = None
        self.last_id = 0
        self.ws: Any = None
        self.stream_response: Any = None
        self.pump: asyncio.Task | None = None

    async def negotiate(self, version: int = 1, **query: str) -> dict:
        words = {"negotiateVersion": str(version), **query}
        url = URL(self.path + "/negotiate" + self.query).update_query(words)
        async with self.http.post(url, headers=self.headers) as response:
            self.negotiated = await response.json()
        self.id = self.negotiated["connectionId"]
        self.token = self.negotiated.get("connectionToken", self.id)
        self.url = URL(self.path + self.query).update_query(id=self.token)
        return self.negotiated

    async def open(self) -> None:
        """Attach the transport; for a stateful connection also a second time."""
        headers = self.headers
        if self.transport == "WebSockets":
            self.ws = await self.http.ws_connect(
                self.url, headers=headers, max_msg_size=0
            )
            self.pump = asyncio.create_task(self._read_socket(self.ws))
        elif self.transport == "ServerSentEvents":
            accept = {"Accept": "text/event-stream", **headers}
            self.stream_response = await self.http.get(self.url, headers=accept)
            assert self.stream_response.status == 200
            self.pump = asyncio.create_task(self._read_events())
        else:
            assert await self.poll() == (200, b"")
            self.pump = asyncio.create_task(self._poll_on())

    async def start(self, version: int = 1, **query: str) -> dict:
        """Negotiate, open and shake hands; the handshake's answer."""
        await self.negotiate(**query)
        await self.open()
        greeting = {"protocol": self.protocol, "version": version}
        await self.write(json.dumps(greeting).encode() + RS)
        return await self.next()

    async def poll(self) -> tuple[int, bytes]:
        async with self.http.get(self.url, headers=self.headers) as response:
            return response.status, await response.read()

    async def _poll_on(self) -> None:
        with self._until_the_end():
            while (answer := await self.poll())[0] == 200:
                self.feed(answer[1])

    async def _read_socket(self, ws: Any) -> None:
        async for frame in ws:
            self.feed(
                frame.data if isinstance(frame.data, bytes) else frame.data.encode()
            )
        if ws is self.ws:
            with self._until_the_end():
                self.close_code = ws.close_code

    async def _read_events(self) -> None:
        with self._until_the_end():
            rest = b""
            async for chunk in self.stream_response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\r\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        self.feed(line[6:])

    @contextlib.contextmanager
    def _until_the_end(self) -> Iterator[None]:
        try:
            with contextlib.suppress(aiohttp.ClientError):
                yield
        finally:
            self.ended = True
            self.news.set()

    def feed(self, data: bytes) -> None:
        """Cut the bytes that came into messages."""
        self.data += data
        while (message := self._cut()) is not None:
            self.unread.append(tidy(message))
            self.news.set()

    def _cut(self) -> dict | None:
        if self.protocol == "json" or not self.shaken:
            if (end := self.data.find(RS)) < 0:
                return None
            body, self.shaken = bytes(self.data[:end]), True
            del self.data[: end + 1]
            return json.loads(body)
        size = at = 0
        while at < len(self.data):
            size |= (self.data[at] & 127) << 7 * at
            at += 1
            if self.data[at - 1] < 128 and len(self.data) >= at + size:
                body = bytes(self.data[at : at + size])
                del self.data[: at + size]
                return decode(unpacked(body))
            if self.data[at - 1] < 128:
                break
        return None

    async def write(self, data: bytes) -> None:
        if self.transport == "WebSockets":
            frame = aiohttp.WSMsgType.BINARY
            if self.protocol == "json":
                frame = aiohttp.WSMsgType.TEXT
            await self.ws.send_frame(data, frame)
        else:
            async with self.http.post(self.url, data=data, headers=self.headers) as r:
                assert (r.status, await r.read()) == (200, b"")

    async def send(self, *messages: dict) -> None:
        await self.write(b"".join(encode(self.protocol, m) for m in messages))

    async def next(self, kind: int | None = None, id: str | None = None) -> dict:
        """The first unread message of this type and id; pings only if asked for."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for message in self.unread:
                    wanted = kind or message.get("type")
                    fits = message.get("type") == wanted and (kind or wanted != 6)
                    if fits and (id is None or message.get("invocationId") == id):
                        self.unread.remove(message)
                        return message
                if self.ended:
                    raise EOFError
                self.news.clear()
                await self.news.wait()

    async def received(self, target: str) -> list:
        """The arguments of the server's next call, which must be of this target."""
        message = await self.next(1)
        assert message["target"] == target
        return message["arguments"]

    async def begin(self, target: str, *args: Any, **members: Any) -> str:
        """Send a blocking call; its invocation id."""
        self.last_id += 1
        members = {"invocationId": str(self.last_id), **members}
        await self.send(call(target, *args, **members))
        return members["invocationId"]

    async def finish(self, id: str) -> Any:
        completion = await self.next(3, id)
        if "error" in completion:
            raise Failed(completion["error"])
        return completion.get("result")

    async def invoke(self, target: str, *args: Any, **members: Any) -> Any:
        return await self.finish(await self.begin(target, *args, **members))

    async def error(self, target: str, *args: Any, **members: Any) -> str:
        """The error text that a call ends with."""
        completion = await self.next(3, await self.begin(target, *args, **members))
        return completion.get("error", f"no error but {completion}")

    async def stream(self, target: str, *args: Any, **members: Any) -> list:
        """Everything that a streaming call brings: its items, its Completion."""
        id = await self.begin(target, *args, type=4, **members)
        messages = [await self.next(id=id)]
        while messages[-1]["type"] == 2:
            messages.append(await self.next(id=id))
        return [*(m["item"] for m in messages[:-1]), messages[-1]]

    async def cut(self) -> None:
        """Drop the socket as a lost network does: no close frame."""
        self.ws, ws = None, self.ws
        ws._writer.transport.abort()
        self.data.clear()
        async with asyncio.timeout(PATIENCE):
            await self.pump

    async def leave(self) -> None:
        """End as a client ends that does not say goodbye."""
        if self.ws is not None:
            await self.ws.close()
        elif self.stream_response is not None:
            self.stream_response.close()
        elif self.transport == "LongPolling" and self.pump is not None:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                await self.http.delete(self.url, headers=self.headers)
        if self.pump is not None:
            self.pump.cancel()
            await asyncio.wait([self.pump], timeout=PATIENCE)

    async def end(self) -> None:
        """Wait until the server has ended the transport."""
        async with asyncio.timeout(PATIENCE):
            while not self.ended:
                self.news.clear()
                await self.news.wait()


class Server:
    """An aiohttp application on a free port."""

    def __init__(self, app: web.Application, hub: Any) -> None:
        self.app, self.hub, self.headers = app, hub, {}
        self.clients: list[Client] = []
        self.polls: list[str] = []

    async def __aenter__(self) -> Self:
        self.runner = web.AppRunner(self.app, shutdown_timeout=1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.port = self.runner.addresses[0][1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.http = aiohttp.ClientSession(
            self.origin, timeout=aiohttp.ClientTimeout(total=2 * PATIENCE)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:
            await client.leave()
        for url in self.polls:
            await self.http.delete(url)
        await self.http.close()
        await self.runner.cleanup()

    def client(
        self,
        wire: tuple[str, str] = ("WebSockets", "json"),
        path: str = "/hub",
        query: str = "",
    ) -> Client:
        self.clients.append(Client(self, *wire, path, query))
        return self.clients[-1]

    async def connect(
        self,
        wire: tuple[str, str] = ("WebSockets", "json"),
        path: str = "/hub",
        query: str = "",
    ) -> Client:
        client = self.client(wire, path, query)
        assert await client.start() == {}
        return client

    async def request(self, method: str, url: str, **words: Any) -> "Answer":
        words = {"headers": self.headers, **words}
        async with self.http.request(method, URL(url, encoded=True), **words) as r:
            return Answer(r.status, r.content_type, await r.text(), r.headers)

    async def negotiated(self, query: str = "?negotiateVersion=1") -> dict:
        answer = await self.request("POST", "/hub/negotiate" + query)
        return json.loads(answer.body)


@dataclasses.dataclass
class Answer:
    status: int
    type: str
    body: str
    headers: Any

    @property
    def plain(self) -> tuple[int, str, str]:
        return self.status, self.type, self.body

    @property
    def json(self) -> Any:
        assert self.type == "application/json"
        return json.loads(self.body)


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Server]]]:
    """Start servers that end with the test: `await serve(SomeHub, option=…)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(hub: Any = None, app: Any = None, **options: Any) -> Server:
            app, context = app or web.Application(), None
            if hub is not None:
                options = {"close_timeout": 0.5, **options}
                context = kestrun.map_hub(app, "/hub", hub, **options)
            return await stack.enter_async_context(Server(app, context))

        yield start


class RawSocket:
    """A WebSocket whose frames the test builds byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: Any) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(
        cls, server: Server, shake: bool = True, **words: Any
    ) -> "RawSocket":
        sock = socket.socket()
        if "receive_buffer" in words:
            size = words.pop("receive_buffer")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        self = cls(*await asyncio.open_connection(sock=sock, **words))
        self.writer.write(
            b"GET /hub HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        if shake:
            self.send(1, b'{"protocol":"json","version":1}' + RS)
            assert await self.next() == (1, b"{}" + RS)
        return self

    @staticmethod
    def frame(
        opcode: int,
        payload: bytes = b"",
        fin: bool = True,
        mask: bool = True,
        reserved: int = 0,
        length: int | None = None,
    ) -> bytes:
        size = len(payload) if length is None else length
        head = bytes([fin << 7 | reserved << 4 | opcode])
        if size < 126:
            head += bytes([mask << 7 | size])
        elif size < 65536:
            head += bytes([mask << 7 | 126]) + size.to_bytes(2, "big")
        else:
            head += bytes([mask << 7 | 127]) + size.to_bytes(8, "big")
        if mask:
            key = b"\x01\x02\x03\x04"
            head += key
            payload = bytes(b ^ key[i % 4] for i, b in enumerate(payload))
        return head + payload

    def send(self, opcode: int, payload: bytes = b"", **words: Any) -> None:
        self.writer.write(self.frame(opcode, payload, **words))

    async def next(self) -> tuple[int, bytes]:
        """The server's next frame, which must be whole and unmasked."""
        async with asyncio.timeout(PATIENCE):
            first, size = await self.reader.readexactly(2)
            assert first & 0xF0 == 0x80 and size < 128
            if size > 125:
                wide = await self.reader.readexactly(2 if size == 126 else 8)
                size = int.from_bytes(wide, "big")
            return first & 15, await self.reader.readexactly(size)

    async def close_code(self) -> int | None:
        """The code of the server's close frame; None when it just hangs up."""
        try:
            while (frame := await self.next())[0] != 8:
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return struct.unpack(">H", frame[1][:2])[0] if frame[1] else 1005


async def soon(waiting: Awaitable) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await waiting


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what no event announces, such as a table of the server's."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def silence(seconds: float = 0.1) -> None:
    """Give what must not come the time to come all the same."""
    await asyncio.sleep(seconds)


class Plain(kestrun.Hub):
    """The hub of the tests that are about the wire."""

    async def echo(self, value):
        return value

    def add(self, a: int, b: int) -> int:
        return a + b

    def me(self) -> str:
        return self.context.connection_id

    async def counter(self, count: int) -> AsyncIterator[int]:
        for i in range(count):
            yield i

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([n async for n in numbers])


class Diary(kestrun.Hub):
    """A hub whose life can be read: `await Diary.next()`."""

    pages: asyncio.Queue

    @classmethod
    def fresh(cls) -> type["Diary"]:
        return type("Diary", (cls,), {"pages": asyncio.Queue()})

    @classmethod
    async def next(cls) -> Any:
        return await soon(cls.pages.get())

    async def on_connected(self) -> None:
        self.pages.put_nowait("connected")

    async def on_disconnected(self, error: Exception | None) -> None:
        self.pages.put_nowait(error)


# -------------------------------------------------------------------- options

DEFAULTS = {
    "keep_alive_interval": 15,
    "client_timeout_interval": 30,
    "handshake_timeout": 15,
    "maximum_receive_message_size": 32768,
    "maximum_parallel_invocations_per_client": 1,
    "stream_buffer_capacity": 10,
    "enable_detailed_errors": False,
    "transports": ("WebSockets", "ServerSentEvents", "LongPolling"),
    "poll_timeout": 90,
    "disconnect_timeout": 15,
    "close_timeout": 5,
    "allow_stateful_reconnects": False,
    "stateful_reconnect_buffer_size": 100000,
    "outbox_limit": 1048576,
    "transport_send_timeout": 10,
    "allowed_origins": (),
    "authenticate": None,
}
BAD_OPTIONS = [
    ("keep_alive_interval", -1),
    ("keep_alive_interval", "soon"),
    ("client_timeout_interval", 0),
    ("handshake_timeout", -0.5),
    ("maximum_receive_message_size", 0),
    ("maximum_parallel_invocations_per_client", 0),
    ("stream_buffer_capacity", 0),
    ("transports", ("CarrierPigeon",)),
    ("poll_timeout", -1),
    ("disconnect_timeout", -1),
    ("outbox_limit", 0),
    ("stateful_reconnect_buffer_size", -1),
]


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_option_has_the_default_that_the_contract_lists(name: str) -> None:
    assert getattr(kestrun.HubOptions(), name) == DEFAULTS[name]


def test_there_are_no_other_options() -> None:
    fields = dataclasses.fields(kestrun.HubOptions)
    assert {field.name for field in fields} == set(DEFAULTS)


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_a_senseless_option_is_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        kestrun.HubOptions(**{name: value})
    with pytest.raises((TypeError, ValueError)):
        kestrun.map_hub(web.Application(), "/hub", Plain, **{name: value})


def test_an_unknown_option_is_refused_at_once() -> None:
    with pytest.raises((TypeError, ValueError)):
        kestrun.map_hub(web.Application(), "/hub", Plain, keep_alive=10)


def test_options_cannot_be_changed_later() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        kestrun.HubOptions().keep_alive_interval = 1


def test_overrides_replace_single_fields_of_the_options() -> None:
    options = kestrun.HubOptions(poll_timeout=20, close_timeout=2)
    hub = kestrun.map_hub(web.Application(), "/hub", Plain, options, close_timeout=3)
    expected = dataclasses.replace(options, close_timeout=3)
    assert hub.options == expected
    assert options.close_timeout == 2


@pytest.mark.parametrize("path", ["/taken", "/taken/", "/", "/{any}", "hub"])
def test_a_path_that_is_no_place_for_a_hub_is_refused_at_once(path: str) -> None:
    app = web.Application()
    kestrun.map_hub(app, "/taken", Plain)
    kestrun.map_hub(app, "/", Plain)
    with pytest.raises(ValueError, match="path"):
        kestrun.map_hub(app, path, Plain)


def test_two_methods_with_one_wire_name_are_refused_at_once() -> None:
    class Twins(kestrun.Hub):
        def join_group(self) -> None: ...

        def joinGroup(self) -> None: ...

    with pytest.raises((TypeError, ValueError)):
        kestrun.map_hub(web.Application(), "/hub", Twins)


def test_a_renamed_method_may_not_take_anothers_wire_name() -> None:
    class Twins(kestrun.Hub):
        def add(self) -> None: ...

        @kestrun.hub_method("Add")
        def plus(self) -> None: ...

    with pytest.raises((TypeError, ValueError)):
        kestrun.map_hub(web.Application(), "/hub", Twins)


# ------------------------------------------------------------------ negotiate

NOT_A_NUMBER = "The client requested a non-integer protocol version."
TOO_OLD = (
    "The client requested version '{}', but the server does not support this version."
)
VERSIONS = [
    ("", 0),
    ("?negotiateVersion=0", 0),
    ("?negotiateVersion=1", 1),
    ("?negotiateVersion=2", 1),
    ("?negotiateVersion=73", 1),
    ("?NegotiateVersion=1", 1),
    ("?NEGOTIATEVERSION=1", 1),
    ("?negotiateVersion=1&access_token=x&_=5&room=7", 1),
]
BAD_VERSIONS = [
    ("?negotiateVersion=", NOT_A_NUMBER),
    ("?negotiateVersion=one", NOT_A_NUMBER),
    ("?negotiateVersion=1.0", NOT_A_NUMBER),
    ("?negotiateVersion=-1", TOO_OLD.format(-1)),
    ("?negotiateVersion=-20", TOO_OLD.format(-20)),
]
ALL_TRANSPORTS = [
    {"transport": "WebSockets", "transferFormats": ["Text", "Binary"]},
    {"transport": "ServerSentEvents", "transferFormats": ["Text"]},
    {"transport": "LongPolling", "transferFormats": ["Text", "Binary"]},
]


@pytest.mark.parametrize("query, version", VERSIONS)
async def test_negotiate_answers_with_the_version_asked_for(
    serve, query: str, version: int
) -> None:
    server = await serve(Plain)
    answer = await server.negotiated(query)
    assert answer["negotiateVersion"] == version
    assert ("connectionToken" in answer) == (version == 1)


@pytest.mark.parametrize("query, error", BAD_VERSIONS)
async def test_negotiate_answers_200_with_the_error_alone(
    serve, query: str, error: str
) -> None:
    server = await serve(Plain)
    answer = await server.request("POST", "/hub/negotiate" + query)
    assert (answer.status, answer.json) == (200, {"error": error})


async def test_negotiate_writes_version_1_in_the_order_of_the_reference(serve) -> None:
    server = await serve(Plain)
    answer = await server.request("POST", "/hub/negotiate?negotiateVersion=1")
    keys = "negotiateVersion, connectionId, connectionToken, availableTransports"
    assert ", ".join(answer.json) == keys
    assert answer.json["availableTransports"] == ALL_TRANSPORTS
    assert int(answer.headers["Content-Length"]) == len(answer.body)


async def test_negotiate_version_0_has_no_token_and_its_id_opens_the_connection(
    serve,
) -> None:
    server = await serve(Plain)
    client = server.client()
    await client.negotiate(version=0)
    keys = ["negotiateVersion", "connectionId", "availableTransports"]
    assert list(client.negotiated) == keys
    await client.open()
    await client.write(b'{"protocol":"json","version":1}' + RS)
    assert await client.next() == {}
    assert await client.invoke("Me") == client.id


async def test_the_token_is_a_secret_apart_from_the_id(serve) -> None:
    server = await serve(Plain)
    answers = [await server.negotiated() for _ in range(20)]
    names = [a["connectionId"] for a in answers]
    names += [a["connectionToken"] for a in answers]
    assert len(set(names)) == 40
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", name) for name in names)


async def test_the_public_id_opens_nothing_when_there_is_a_token(serve) -> None:
    server = await serve(Plain)
    answer = await server.negotiated()
    answer = await server.request("GET", "/hub?id=" + answer["connectionId"])
    assert answer.plain == (404, "text/plain", UNKNOWN_ID)


async def test_negotiate_lists_only_the_enabled_transports_in_its_own_order(
    serve,
) -> None:
    server = await serve(Plain, transports=("LongPolling", "WebSockets"))
    answer = await server.negotiated()
    assert answer["availableTransports"] == [ALL_TRANSPORTS[0], ALL_TRANSPORTS[2]]


async def test_negotiate_ignores_a_body(serve) -> None:
    server = await serve(Plain)
    answer = await server.request("POST", "/hub/negotiate", data=b"\xff{" * 1000)
    assert answer.json["negotiateVersion"] == 0


@pytest.mark.parametrize("allowed, asked, granted", [
    (True, "useStatefulReconnect=true", True),
    (True, "useStatefulReconnect=True", True),
    (True, "USESTATEFULRECONNECT=TRUE", True),
    (True, "useStatefulReconnect=1", False),
    (True, "useStatefulReconnect=false", False),
    (True, "useStatefulReconnect=", False),
    (True, "", False),
    (False, "useStatefulReconnect=true", False),
])  # fmt: skip
async def test_stateful_reconnect_is_granted_if_asked_for_and_allowed(
    serve, allowed: bool, asked: str, granted: bool
) -> None:
    server = await serve(Plain, allow_stateful_reconnects=allowed)
    answer = await server.negotiated("?negotiateVersion=1&" + asked)
    first, value = next(iter(answer.items()))
    assert (first, value) == (
        ("useStatefulReconnect", True) if granted else ("negotiateVersion", 1)
    )
    assert ("useStatefulReconnect" in answer) == granted


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_negotiate_refuses_other_methods(serve, method: str) -> None:
    server = await serve(Plain)
    answer = await server.request(method, "/hub/negotiate?negotiateVersion=1")
    assert answer.plain == (405, "text/plain", "")


@every_transport
async def test_a_hub_is_reached_with_a_trailing_slash_too(serve, wire) -> None:
    server = await serve(Plain)
    client = server.client(wire)
    await client.negotiate()
    client.url = URL("/hub/").with_query(id=client.token)
    await client.open()
    await client.write(b'{"protocol":"json","version":1}' + RS)
    assert await client.next() == {}


@every_transport
async def test_the_id_is_found_in_any_case_of_its_key(serve, wire) -> None:
    server = await serve(Plain)
    client = server.client(wire)
    await client.negotiate()
    client.url = URL("/hub").with_query(ID=client.token)
    await client.open()
    await client.write(b'{"protocol":"json","version":1}' + RS)
    assert await client.next() == {}


# ----------------------------------------------------- finding the connection

FINDERS = [
    ("POST", {}),
    ("DELETE", {}),
    ("GET", {}),
    ("GET", {"Accept": "text/event-stream"}),
]


@pytest.mark.parametrize("method, headers", FINDERS)
@pytest.mark.parametrize("query", ["", "?id=", "?_=1"])
async def test_a_request_without_an_id_is_told_to_bring_one(
    serve, method: str, headers: dict, query: str
) -> None:
    server = await serve(Plain)
    answer = await server.request(method, "/hub" + query, headers=headers)
    assert answer.plain == (400, "text/plain", NO_ID)


@pytest.mark.parametrize("method, headers", FINDERS)
async def test_an_unknown_id_is_not_found(serve, method: str, headers: dict) -> None:
    server = await serve(Plain)
    answer = await server.request(method, "/hub?id=nobody", headers=headers)
    assert answer.plain == (404, "text/plain", UNKNOWN_ID)


@pytest.mark.parametrize("method, headers", FINDERS)
async def test_a_repeated_id_counts_as_unknown(
    serve, method: str, headers: dict
) -> None:
    server = await serve(Plain)
    token = (await server.negotiated())["connectionToken"]
    url = f"/hub?id={token}&id={token}"
    answer = await server.request(method, url, headers=headers)
    assert answer.plain == (404, "text/plain", UNKNOWN_ID)


@pytest.mark.parametrize("query", ["?id=nobody", "?id=a&id=b"])
async def test_a_socket_with_an_unknown_id_is_refused_before_the_upgrade(
    serve, query: str
) -> None:
    server = await serve(Plain)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await server.http.ws_connect("/hub" + query)
    assert refusal.value.status == 404


@pytest.mark.parametrize("query", ["", "?id=", "?connectionId=random"])
async def test_a_socket_without_an_id_is_a_new_connection(serve, query: str) -> None:
    server = await serve(Plain)
    client = server.client()
    client.url = URL("/hub" + query)
    await client.open()
    await client.write(b'{"protocol":"json","version":1}' + RS)
    assert await client.next() == {}
    assert await client.invoke("Me") in server.hub.connections


@every_transport
async def test_a_connection_that_ended_is_not_found(serve, wire) -> None:
    server = await serve(Plain, **BRISK)
    client = await server.connect(wire)
    await client.leave()
    await until(lambda: not server.hub.connections)
    answer = await server.request("POST", str(client.url), data=b"x")
    assert answer.status == 404


async def test_a_token_that_is_never_used_expires(serve) -> None:
    server = await serve(Plain, disconnect_timeout=0.1)
    token = (await server.negotiated())["connectionToken"]
    async with asyncio.timeout(PATIENCE):
        while (await server.request("POST", f"/hub?id={token}")).status != 404:
            await asyncio.sleep(0.02)


# -------------------------------------------------------- choice of transport

UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
OPENERS = {
    "WebSockets": UPGRADE,
    "ServerSentEvents": {"Accept": "text/event-stream"},
    "LongPolling": {},
}
CHANGES = [(a, b) for a in TRANSPORTS for b in TRANSPORTS if a != b]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_transport_that_is_switched_off_is_not_found(
    serve, transport: str
) -> None:
    others = tuple(t for t in TRANSPORTS if t != transport)
    server = await serve(Plain, transports=others)
    token = (await server.negotiated())["connectionToken"]
    headers = OPENERS[transport]
    answer = await server.request("GET", f"/hub?id={token}", headers=headers)
    text = f"{transport} transport not supported by this end point type"
    assert answer.plain == (404, "text/plain", text)


@pytest.mark.parametrize("first, second", CHANGES)
async def test_a_connection_keeps_its_transport(serve, first: str, second: str) -> None:
    server = await serve(Plain)
    client = await server.connect((first, "json"))
    answer = await server.request("GET", str(client.url), headers=OPENERS[second])
    text = "Cannot change transports mid-connection"
    assert answer.plain == (400, "text/plain", text)
    assert await client.invoke("Add", 1, 2) == 3


@pytest.mark.parametrize("transport", ["WebSockets", "ServerSentEvents"])
async def test_a_second_attach_to_a_live_connection_is_a_conflict(
    serve, transport: str
) -> None:
    server = await serve(Plain)
    client = await server.connect((transport, "json"))
    headers = OPENERS[transport]
    answer = await server.request("GET", str(client.url), headers=headers)
    assert (answer.status, answer.body) == (409, "")
    assert await client.invoke("Add", 1, 2) == 3


@pytest.mark.parametrize("accept", ["Text", "*/*", ";;;,/", "text/plain"])
async def test_any_other_accept_header_means_long_polling(serve, accept: str) -> None:
    server = await serve(Plain)
    token = (await server.negotiated())["connectionToken"]
    headers = {"Accept": accept}
    answer = await server.request("GET", f"/hub?id={token}", headers=headers)
    assert answer.plain == (200, "application/octet-stream", "")


@pytest.mark.parametrize("headers", [
    {"Accept": "text/html, text/event-stream;q=0.9"},
    {"Accept": "Text/Event-Stream"},
    {"Accept": "text/event-stream", **UPGRADE},
])  # fmt: skip
async def test_an_event_stream_wins_if_accepted_at_all(serve, headers: dict) -> None:
    server = await serve(Plain)
    token = (await server.negotiated())["connectionToken"]
    async with server.http.get(f"/hub?id={token}", headers=headers) as response:
        assert response.content_type == "text/event-stream"


# --------------------------------------------------------------- long polling

NO_STORE = {
    "Cache-Control": "no-cache, no-store",
    "Pragma": "no-cache",
    "Expires": "Thu, 01 Jan 1970 00:00:00 GMT",
}
HELLO = b'{"protocol":"json","version":1}' + RS


async def polled(serve, hub: Any = Plain, **options: Any) -> tuple[Server, str]:
    """A server and the URL of a connection after its first poll and handshake."""
    server = await serve(hub, **options)
    url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    server.polls.append(url)
    assert (await server.request("GET", url)).status == 200
    assert (await server.request("POST", url, data=HELLO)).status == 200
    assert (await server.request("GET", url)).body == "{}\x1e"
    return server, url


async def test_the_first_poll_is_answered_empty_at_once(serve) -> None:
    server = await serve(Plain)
    token = (await server.negotiated())["connectionToken"]
    answer = await server.request("GET", f"/hub?id={token}&_=1795468204219")
    assert answer.plain == (200, "application/octet-stream", "")
    assert answer.headers["Content-Length"] == "0"


async def test_a_poll_brings_all_that_is_waiting(serve) -> None:
    server, url = await polled(serve)
    calls = [call("Echo", i, invocationId=str(i)) for i in range(3)]
    data = b"".join(encode("json", c) for c in calls)
    await server.request("POST", url, data=data)
    await server.hub.clients.all.send("Last")
    body = ""
    while '"Last"' not in body or body.count("\x1e") < 4:
        answer = await server.request("GET", url)
        assert (answer.status, answer.type) == (200, "application/octet-stream")
        assert int(answer.headers["Content-Length"]) == len(answer.body)
        assert answer.body.endswith("\x1e")
        body += answer.body


async def test_a_poll_without_data_ends_empty_after_its_timeout(serve) -> None:
    server, url = await polled(serve, poll_timeout=0.05)
    answer = await server.request("GET", url)
    assert answer.plain == (200, "text/plain", "")
    assert answer.headers["Content-Length"] == "0"


async def test_a_newer_poll_sends_the_older_away_and_loses_nothing(serve) -> None:
    server, url = await polled(serve)
    older = asyncio.create_task(server.request("GET", url))
    await silence()
    newer = asyncio.create_task(server.request("GET", url))
    assert (await soon(older)).plain == (204, "text/plain", "")
    await server.hub.clients.all.send("Note", 1)
    note = {"type": 1, "target": "Note", "arguments": [1]}
    assert json.loads((await soon(newer)).body[:-1]) == note


async def test_the_end_is_200_with_the_last_bytes_then_204_then_404(serve) -> None:
    server, url = await polled(serve)
    await server.request("POST", url, data=encode("json", {"type": 7}))
    answers = [(await server.request("GET", url)).plain for _ in range(3)]
    assert answers[0] == (200, "application/octet-stream", '{"type":7}\x1e')
    assert answers[1] == (204, "text/plain", "")
    assert answers[2] == (404, "text/plain", UNKNOWN_ID)


async def test_a_failed_handshake_ends_200_then_204_then_404(serve) -> None:
    server = await serve(Plain)
    url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    await server.request("GET", url)
    await server.request("POST", url, data=b'{"protocol":"xml","version":1}' + RS)
    answers = [await server.request("GET", url) for _ in range(3)]
    assert [a.status for a in answers] == [200, 204, 404]
    assert "is not supported" in answers[0].body


@pytest.mark.parametrize("state", ["first", "data", "400", "404", "end"])
async def test_every_answer_to_a_poll_forbids_caching(serve, state: str) -> None:
    server, url = await polled(serve)
    if state == "first":
        url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    elif state == "data":
        await server.hub.clients.all.send("Note")
    elif state == "end":
        await server.request("POST", url, data=encode("json", {"type": 7}))
        await server.request("GET", url)
    else:
        url = "/hub" if state == "400" else "/hub?id=nobody"
    answer = await server.request("GET", url)
    assert {name: answer.headers.get(name) for name in NO_STORE} == NO_STORE


async def test_a_client_that_stops_polling_is_disconnected(serve) -> None:
    hub = Diary.fresh()
    server, url = await polled(serve, hub, disconnect_timeout=0.1)
    assert await hub.next() == "connected"
    await hub.next()
    assert (await server.request("GET", url)).status in (204, 404)


async def test_the_time_a_poll_is_pending_is_not_idle_time(serve) -> None:
    server, url = await polled(serve, disconnect_timeout=0.3, poll_timeout=0.6)
    answers = [await server.request("GET", url) for _ in range(2)]
    assert [a.status for a in answers] == [200, 200]


async def test_a_poll_that_the_client_drops_is_not_a_disconnect(serve) -> None:
    server, url = await polled(serve)
    dropped = asyncio.create_task(server.request("GET", url))
    await silence(0.05)
    dropped.cancel()
    await silence(0.05)
    await server.hub.clients.all.send("Note")
    assert '"Note"' in (await server.request("GET", url)).body


# --------------------------------------------------------- server-sent events


async def test_an_event_stream_starts_at_once_with_a_comment(serve) -> None:
    server = await serve(Plain)
    token = (await server.negotiated())["connectionToken"]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = (
        f"GET /hub?id={token} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
    )
    writer.write(head.encode())
    async with asyncio.timeout(PATIENCE):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.readexactly(len(b"3\r\n:\r\n\r\n"))
    writer.close()
    assert head.startswith("HTTP/1.1 200 ")
    assert body == b"3\r\n:\r\n\r\n"


async def test_an_event_stream_has_the_headers_of_the_reference(serve) -> None:
    server = await serve(Plain)
    client = await server.connect(("ServerSentEvents", "json"))
    headers = client.stream_response.headers
    assert headers["Content-Type"] == "text/event-stream"
    assert headers["Cache-Control"] == "no-cache,no-store"
    assert headers["Pragma"] == "no-cache"
    assert headers["Content-Encoding"] == "identity"
    assert "Content-Length" not in headers


async def test_an_event_is_one_data_line_and_an_empty_one(serve) -> None:
    server = await serve(Plain)
    url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    async with server.http.get(url, headers={"Accept": "text/event-stream"}) as r:
        assert await soon(r.content.readexactly(3)) == b":\r\n"
        await server.request("POST", url, data=HELLO)
        expected = b"data: {}\x1e\r\n\r\n"
        assert await soon(r.content.readexactly(len(expected))) == expected


async def test_an_event_stream_has_nothing_but_whole_messages_in_data_lines(
    serve,
) -> None:
    server = await serve(Plain, keep_alive_interval=0.05)
    url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    async with server.http.get(url, headers={"Accept": "text/event-stream"}) as r:
        calls = [call("Echo", "a\r\nb\n\nc", invocationId=str(i)) for i in range(9)]
        data = b"".join(encode("json", c) for c in calls)
        await server.request("POST", url, data=HELLO + data)
        stream = b""
        while stream.count(RS) < 12 or not stream.endswith(b"\r\n\r\n"):
            stream += await soon(r.content.readany())
    lines = set(stream.split(b"\r\n")) - {b":", b""}
    assert all(x.startswith(b"data: {") and x.endswith(b"}\x1e") for x in lines)


async def test_a_dropped_event_stream_is_a_disconnect_at_once(serve) -> None:
    hub = Diary.fresh()
    server = await serve(hub, **BRISK)
    client = await server.connect(("ServerSentEvents", "json"))
    client.stream_response.close()
    assert await hub.next() == "connected"
    await hub.next()
    answer = await server.request(
        "GET", str(client.url), headers=OPENERS["ServerSentEvents"]
    )
    assert answer.status == 404


async def test_the_end_of_the_connection_ends_the_event_stream(serve) -> None:
    server = await serve(Plain)
    client = await server.connect(("ServerSentEvents", "json"))
    await client.send({"type": 7})
    assert await client.next() == {"type": 7}
    await client.end()


# ------------------------------------------------------------- POST and DELETE


@pytest.mark.parametrize("kind", ["text/plain;charset=UTF-8", "application/json", "x"])
async def test_a_post_is_answered_empty_whatever_its_content_type(
    serve, kind: str
) -> None:
    server, url = await polled(serve)
    headers = {"Content-Type": kind}
    data = encode("json", call("Add", 1, 2, invocationId="1"))
    answer = await server.request("POST", url, data=data, headers=headers)
    assert answer.plain == (200, "text/plain", "")
    assert '"result":3' in (await server.request("GET", url)).body


async def test_a_post_before_the_first_poll_is_kept(serve) -> None:
    server = await serve(Plain)
    url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    server.polls.append(url)
    assert (await server.request("POST", url, data=HELLO)).status == 200
    assert (await server.request("GET", url)).plain[0::2] == (200, "")
    assert (await server.request("GET", url)).plain[0::2] == (200, "{}\x1e")


async def test_a_post_to_a_socket_is_refused(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    answer = await server.request("POST", str(client.url), data=b"x")
    text = "POST requests are not allowed for WebSocket connections."
    assert answer.plain == (405, "text/plain", text)


async def test_a_post_may_be_larger_than_aiohttps_own_limit(serve) -> None:
    server, url = await polled(serve, maximum_receive_message_size=None)
    data = encode("json", call("Echo", "x" * 2_000_000, invocationId="1"))
    assert (await server.request("POST", url, data=data)).status == 200
    assert len((await server.request("GET", url)).body) > 2_000_000


async def test_posts_at_the_same_time_stay_whole_and_all_arrive(serve) -> None:
    server, url = await polled(serve)
    data = [
        encode("json", call("Echo", "x" * 9000, invocationId=str(i))) for i in range(8)
    ]
    posts = (server.request("POST", url, data=d) for d in data)
    assert {a.status for a in await soon(asyncio.gather(*posts))} == {200}
    body = ""
    while body.count('"type":3') < 8:
        body += (await server.request("GET", url)).body
    assert body.count("error") == 0


async def test_delete_ends_a_long_polling_connection_and_its_pending_poll(
    serve,
) -> None:
    hub = Diary.fresh()
    server, url = await polled(serve, hub)
    assert await hub.next() == "connected"
    poll = asyncio.create_task(server.request("GET", url))
    await silence(0.05)
    answer = await server.request("DELETE", url)
    assert answer.plain == (202, "text/plain", "")
    assert (await soon(poll)).status == 204
    assert await hub.next() is None


async def test_a_post_after_the_delete_is_harmless(serve) -> None:
    server, url = await polled(serve)
    await server.request("DELETE", url)
    close = encode("json", {"type": 7})
    answer = await server.request("POST", url, data=close)
    assert answer.plain[::2] in [(404, ""), (404, UNKNOWN_ID), (200, "")]
    await until(lambda: not server.hub.connections)


@pytest.mark.parametrize("transport", ["None", "WebSockets", "ServerSentEvents"])
async def test_delete_is_for_long_polling_only(serve, transport: str) -> None:
    server = await serve(Plain)
    client = server.client((transport, "json"))
    await client.negotiate()
    if transport != "None":
        await client.open()
    answer = await server.request("DELETE", str(client.url))
    text = "Cannot terminate this connection using the DELETE endpoint."
    assert answer.plain == (400, "text/plain", text)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "HEAD", "OPTIONS"])
async def test_the_hub_refuses_other_methods(serve, method: str) -> None:
    server = await serve(Plain)
    token = (await server.negotiated())["connectionToken"]
    answer = await server.request(method, f"/hub?id={token}")
    assert answer.plain == (405, "text/plain", "")


# ----------------------------------------------------------- WebSocket frames


async def test_a_socket_echoes_what_masked_frames_bring(serve) -> None:
    raw = await RawSocket.open(await serve(Plain))
    raw.send(1, encode("json", call("Add", 1, 2, invocationId="1")))
    text = b'{"type":3,"invocationId":"1","result":3}' + RS
    assert await raw.next() == (1, text)


@pytest.mark.parametrize("sizes", [[1], [7, 0, 9], [0, 0, 1]])
async def test_a_message_may_come_in_fragments(serve, sizes: list[int]) -> None:
    raw = await RawSocket.open(await serve(Plain))
    data = encode("json", call("Echo", "häschen", invocationId="1"))
    opcode = 1
    for size in sizes:
        raw.send(opcode, data[:size], fin=False)
        data, opcode = data[size:], 0
    raw.send(0, data)
    assert json.loads((await raw.next())[1][:-1])["result"] == "häschen"


async def test_a_ping_between_fragments_is_answered_at_once(serve) -> None:
    raw = await RawSocket.open(await serve(Plain))
    data = encode("json", call("Add", 1, 2, invocationId="1"))
    raw.send(1, data[:9], fin=False)
    raw.send(9, b"still there?")
    assert await raw.next() == (10, b"still there?")
    raw.send(0, data[9:])
    assert b'"result":3' in (await raw.next())[1]


async def test_a_pong_that_nobody_asked_for_is_ignored(serve) -> None:
    raw = await RawSocket.open(await serve(Plain))
    raw.send(10, b"hm")
    raw.send(1, encode("json", call("Add", 1, 2, invocationId="1")))
    assert b'"result":3' in (await raw.next())[1]


@pytest.mark.parametrize("code", [None, 1000, 1001, 3000, 4999])
async def test_a_close_frame_is_answered_with_one(serve, code: int | None) -> None:
    hub = Diary.fresh()
    raw = await RawSocket.open(await serve(hub))
    raw.send(8, struct.pack(">H", code) if code else b"")
    assert await raw.close_code() is not None
    assert [await hub.next(), await hub.next()] == ["connected", None]


@pytest.mark.parametrize("code", [0, 999, 1005, 1006, 1015, 5000, 65535])
async def test_an_impossible_close_code_ends_the_connection_and_is_not_echoed(
    serve, code: int
) -> None:
    hub = Diary.fresh()
    raw = await RawSocket.open(await serve(hub))
    raw.send(8, struct.pack(">H", code))
    assert await raw.close_code() in (1000, 1002, 1005, None)
    assert await hub.next() == "connected"
    await hub.next()


FRAME = RawSocket.frame
BAD_FRAMES = {
    "reserved bit 1": FRAME(1, b"x", reserved=4),
    "reserved bit 2": FRAME(1, b"x", reserved=2),
    "reserved bit 3": FRAME(1, b"x", reserved=1),
    "unknown opcode": FRAME(3, b"x"),
    "unknown control opcode": FRAME(11, b"x"),
    "continuation of nothing": FRAME(0, b"x"),
    "text inside a message": FRAME(1, b"x", fin=False) + FRAME(1, b"x"),
    "ping too long": FRAME(9, b"x" * 126),
    "ping in fragments": FRAME(9, b"x", fin=False),
    "close with half a code": FRAME(8, b"\x03"),
}


@pytest.mark.parametrize("data", BAD_FRAMES.values(), ids=list(BAD_FRAMES))
async def test_a_frame_that_breaks_the_rules_is_a_protocol_error(
    serve, data: bytes
) -> None:
    hub = Diary.fresh()
    raw = await RawSocket.open(await serve(hub))
    raw.writer.write(data)
    assert await raw.close_code() == 1002
    assert await hub.next() == "connected"
    await hub.next()


async def test_an_unmasked_frame_is_a_protocol_error(serve) -> None:
    raw = await RawSocket.open(await serve(Plain))
    raw.send(1, encode("json", call("Add", 1, 2, invocationId="1")), mask=False)
    assert await raw.close_code() == 1002


async def test_bad_utf8_in_a_first_fragment_is_invalid_data(serve) -> None:
    raw = await RawSocket.open(await serve(Plain))
    raw.send(1, b'{"type":1,"target":"\xff', fin=False)
    raw.send(0, b'","arguments":[]}' + RS)
    assert await raw.close_code() == 1007


async def test_endless_empty_fragments_are_cut(serve) -> None:
    hub = Diary.fresh()
    raw = await RawSocket.open(await serve(hub))
    assert await hub.next() == "connected"
    raw.send(1, b"", fin=False)
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            raw.writer.write(FRAME(0, b"", fin=False) * 1000)
            await soon(raw.writer.drain())
    await hub.next()


async def test_a_frame_that_promises_a_huge_payload_is_cut(serve) -> None:
    hub = Diary.fresh()
    raw = await RawSocket.open(await serve(hub))
    assert await hub.next() == "connected"
    raw.send(2, b"x", length=2**62)
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            raw.writer.write(b"x" * 65536)
            await soon(raw.writer.drain())
    await hub.next()


async def test_messages_of_many_frames_and_many_messages_of_a_frame_are_one_stream(
    serve,
) -> None:
    raw = await RawSocket.open(await serve(Plain))
    data = encode("json", call("Add", 1, 2, invocationId="1")) * 3
    for byte in data:
        raw.send(2, bytes([byte]))
    answers = b""
    while answers.count(RS) < 3:
        answers += (await raw.next())[1]
    assert answers.count(b'"result":3') == 3


# ------------------------------------------------------------------ handshake

BROKEN = "An unexpected error occurred during connection handshake."
BROKEN_HANDSHAKES = [
    b"",
    b"junk",
    b'{"protocol":"json","version":1',
    b"[]",
    b"null",
    b'"json"',
    b"{}",
    b'{"protocol":"json"}',
    b'{"version":1}',
    b'{"protocol":"json","version":"1"}',
    b'{"protocol":"json","version":null}',
    b'{"protocol":"json","version":true}',
    b'{"protocol":"json","version":1.5}',
    b'{"protocol":1,"version":1}',
    b'{"protocol":null,"version":1}',
    b'{"Protocol":"json","version":1}',
    b'{"protocol":"\xff","version":1}',
    b"[" * 20000,
]
ACCEPTED_HANDSHAKES = [
    b'{"protocol":"json","version":0}',
    b'{"protocol":"json","version":1}',
    b'{"protocol":"json","version":2}',
    b'{"protocol":"json","version":-1}',
    b'{"protocol":"JSON","version":1}',
    b'{"version":1,"other":{"a":[]},"protocol":"json"}',
    b' { "protocol" : "json" , "version" : 1 } ',
]
REFUSED_HANDSHAKES = [
    (b'{"protocol":"xml","version":1}', "The protocol 'xml' is not supported."),
    (b'{"protocol":"","version":1}', "The protocol '' is not supported."),
    (
        b'{"protocol":"json","version":3}',
        "The server does not support version 3 of the 'json' protocol.",
    ),
    (
        b'{"protocol":"messagepack","version":99}',
        "The server does not support version 99 of the 'messagepack' protocol.",
    ),
]


async def opened(serve, wire=("WebSockets", "json"), hub: Any = Plain, **options: Any):
    """A client that has not shaken hands yet."""
    client = (await serve(hub, **options)).client(wire)
    await client.negotiate()
    await client.open()
    return client


@pytest.mark.parametrize("hello", ACCEPTED_HANDSHAKES)
async def test_a_handshake_is_answered_with_an_empty_object(serve, hello) -> None:
    client = await opened(serve)
    await client.write(hello + RS)
    assert await client.next() == {}
    assert await client.invoke("Add", 1, 2) == 3


@everywhere
async def test_the_name_of_a_protocol_has_no_case(serve, wire) -> None:
    client = await opened(serve, wire)
    await client.write(b'{"protocol":"%s","version":1}' % wire[1].upper().encode() + RS)
    assert await client.next() == {}
    assert await client.invoke("Add", 1, 2) == 3


@pytest.mark.parametrize("hello, error", REFUSED_HANDSHAKES)
async def test_a_refused_handshake_is_told_why_and_closed_normally(
    serve, hello: bytes, error: str
) -> None:
    hub = Diary.fresh()
    client = await opened(serve, hub=hub)
    await client.write(hello + RS)
    assert await client.next() == {"error": error}
    await client.end()
    assert (client.unread, client.close_code) == ([], 1000)
    assert hub.pages.empty()


@pytest.mark.parametrize("hello", BROKEN_HANDSHAKES)
async def test_a_broken_handshake_is_told_nothing_but_that(serve, hello) -> None:
    hub = Diary.fresh()
    client = await opened(serve, hub=hub)
    await client.ws.send_bytes(hello + RS)
    assert await client.next() == {"error": BROKEN}
    await client.end()
    assert (client.unread, client.close_code) == ([], 1000)
    assert hub.pages.empty()


@pytest.mark.parametrize("hello, start", [
    (b"{}", "Missing required property 'protocol'. Message content: {}"),
    (b'{"protocol":"json"}', "Missing required property 'version'. Message content: "),
    (b'{"protocol":"json","version":"1"}', ""),
    (b"[]", ""),
])  # fmt: skip
async def test_a_broken_handshake_is_told_more_with_detailed_errors(
    serve, hello: bytes, start: str
) -> None:
    client = await opened(serve, enable_detailed_errors=True)
    await client.write(hello + RS)
    error = (await client.next())["error"]
    assert error.startswith(f"{BROKEN} InvalidDataException: {start}")


async def test_a_version_of_5000_digits_is_refused(serve) -> None:
    client = await opened(serve)
    digits = b"9" * 5000
    await client.write(b'{"protocol":"json","version":' + digits + b"}" + RS)
    assert list(await client.next()) == ["error"]


async def test_messagepack_is_refused_on_event_streams(serve) -> None:
    client = await opened(serve, ("ServerSentEvents", "messagepack"))
    await client.write(b'{"protocol":"messagepack","version":1}' + RS)
    text = (
        "Cannot use the 'messagepack' protocol on the current transport. "
        "The transport does not support 'Binary' transfer format."
    )
    assert await client.next() == {"error": text}
    await client.end()


@every_transport
async def test_a_client_that_does_not_shake_hands_is_sent_away(serve, wire) -> None:
    client = await opened(serve, wire, handshake_timeout=0.05)
    assert await client.next() == {"error": "Handshake was canceled."}
    await client.end()


@every_transport
async def test_a_handshake_without_an_end_is_cut_at_the_size_limit(serve, wire) -> None:
    client = await opened(serve, wire)
    await client.write(b" " * 32769)
    assert await client.next() == {"error": "Handshake was canceled."}
    await client.end()


async def test_the_handshake_has_its_time_from_the_socket_on(serve) -> None:
    server = await serve(Plain, handshake_timeout=0.15)
    client = server.client()
    await client.negotiate()
    await silence(0.2)
    await client.open()
    await client.write(HELLO)
    assert await client.next() == {}


@every_transport
async def test_a_handshake_may_come_byte_by_byte(serve, wire) -> None:
    client = await opened(serve, wire)
    for byte in HELLO:
        await client.write(bytes([byte]))
    assert await client.next() == {}


@everywhere
async def test_first_messages_may_ride_with_the_handshake(serve, wire) -> None:
    client = await opened(serve, wire)
    hello = b'{"protocol":"%s","version":1}' % wire[1].encode() + RS
    calls = [call("Add", 1, i, invocationId=str(i)) for i in range(2)]
    await client.write(hello + b"".join(encode(wire[1], c) for c in calls))
    assert await client.next() == {}
    assert [await client.finish(str(i)) for i in range(2)] == [1, 2]


async def test_messagepack_shakes_hands_in_text_and_answers_in_a_binary_frame(
    serve,
) -> None:
    raw = await RawSocket.open(await serve(Plain), shake=False)
    raw.send(1, b'{"protocol":"messagepack","version":1}' + RS)
    assert await raw.next() == (2, b"{}" + RS)


@pytest.mark.parametrize("opcode", [1, 2])
async def test_a_refused_handshake_is_answered_in_a_text_frame(serve, opcode) -> None:
    raw = await RawSocket.open(await serve(Plain), shake=False)
    raw.send(opcode, b'{"protocol":"xml","version":1}' + RS)
    text = b'{"error":"The protocol \'xml\' is not supported."}' + RS
    got, payload = await raw.next()
    assert (got, json.loads(payload[:-1])) == (1, json.loads(text[:-1]))


async def test_a_client_that_leaves_before_the_handshake_was_never_there(
    serve,
) -> None:
    hub = Diary.fresh()
    server = await serve(hub)
    client = server.client()
    await client.negotiate()
    await client.open()
    await client.leave()
    answer = None
    async with asyncio.timeout(PATIENCE):
        while answer != 404:
            answer = (await server.request("POST", str(client.url))).status
    assert hub.pages.empty()


# -------------------------------------------------------------- JSON messages

# What breaks the protocol, by the text that detailed errors add.
BREACHES = {
    "Error reading JSON.": [
        '{"type":6',
        "junk",
        "",
        '{"type":6}{"type":6}',
        "{'type':6}",
        '{"type":1,"target":"Echo","arguments":[NaN]}',
        '{"type":1,"target":"Echo","arguments":[-Infinity]}',
        '{"type":1,"target":"Echo","arguments":[%s]}' % ("[" * 63 + "]" * 63),
        "[" * 20000,
        '{"a":' * 6000,
    ],
    "Unexpected JSON Token Type '*'. Expected a JSON Object.": [
        "[]",
        '"x"',
        "6",
        "null",
    ],
    "Missing required property 'type'.": [
        "{}",
        '{"Type":6}',
    ],
    "Expected 'type' to be of type Number.": [
        '{"type":"6"}',
        '{"type":null}',
        '{"type":true}',
    ],
    "Missing required property 'target'.": [
        '{"type":1,"arguments":[]}',
        '{"type":4,"invocationId":"1","arguments":[1]}',
    ],
    "Expected 'target' to be of type String.": [
        '{"type":1,"target":null,"arguments":[]}',
        '{"type":1,"target":5,"arguments":[]}',
    ],
    "Missing required property 'arguments'.": [
        '{"type":1,"target":"Echo"}',
        '{"type":4,"invocationId":"1","target":"Counter"}',
    ],
    "Expected 'arguments' to be of type Array.": [
        '{"type":1,"target":"Echo","arguments":null}',
        '{"type":1,"target":"Echo","arguments":{}}',
    ],
    "Expected 'invocationId' to be of type String.": [
        '{"type":1,"target":"Echo","arguments":[1],"invocationId":7}',
        '{"type":3,"invocationId":7}',
    ],
    "Expected 'streamIds' to be of type Array.": [
        '{"type":1,"target":"Echo","arguments":[1],"streamIds":{}}',
        '{"type":1,"target":"Echo","arguments":[1],"streamIds":"a"}',
    ],
    "Null value for 'streamIds' is not valid.": [
        '{"type":1,"target":"Echo","arguments":[1],"streamIds":[null]}',
    ],
    "Expected 'headers' to be of type StartObject.": [
        '{"type":1,"target":"Echo","arguments":[1],"headers":[]}',
    ],
    "Expected header 'k' to be of type String.": [
        '{"type":1,"target":"Echo","arguments":[1],"headers":{"k":1}}',
    ],
    "Missing required property 'invocationId'.": [
        '{"type":2,"item":1}',
        '{"type":2,"invocationId":"","item":1}',
        '{"type":3}',
        '{"type":3,"invocationId":""}',
        '{"type":4,"target":"Counter","arguments":[1]}',
        '{"type":4,"invocationId":"","target":"Counter","arguments":[1]}',
        '{"type":5}',
        '{"type":5,"invocationId":""}',
    ],
    "Missing required property 'item'.": [
        '{"type":2,"invocationId":"1"}',
    ],
    "Expected 'error' to be of type String.": [
        '{"type":3,"invocationId":"1","error":5}',
        '{"type":7,"error":5}',
    ],
    "The 'error' and 'result' properties are mutually exclusive.": [
        '{"type":3,"invocationId":"1","error":"a","result":1}',
        '{"type":3,"result":null,"error":"a","invocationId":"1"}',
    ],
    "Expected 'allowReconnect' to be true or false.": [
        '{"type":7,"allowReconnect":"yes"}',
    ],
    "Missing required property 'sequenceId'.": [
        '{"type":8}',
        '{"type":9}',
    ],
}
PROTOCOL_ERRORS = [(text, error) for error in BREACHES for text in BREACHES[error]]
CLOSE = {"type": 7, "error": CLOSED, "allowReconnect": True}


@pytest.mark.parametrize("text, error", PROTOCOL_ERRORS, ids=lambda value: value[:50])
async def test_a_message_that_breaks_the_protocol_ends_the_connection(
    serve, text: str, error: str
) -> None:
    client = await (await serve(Plain)).connect()
    await client.write(text.encode() + RS)
    assert await client.next() == CLOSE
    await client.end()
    assert (client.unread, client.close_code) == ([], 1000)


@pytest.mark.parametrize("text, error", PROTOCOL_ERRORS, ids=lambda value: value[:50])
async def test_detailed_errors_say_what_broke_the_protocol(
    serve, text: str, error: str
) -> None:
    client = await (await serve(Plain, enable_detailed_errors=True)).connect()
    await client.write(text.encode() + RS)
    close = await client.next()
    pattern = re.escape(f"{CLOSED} InvalidDataException: {error}")
    assert re.fullmatch(pattern.replace(r"\*", r"\w+"), close["error"])
    assert close["allowReconnect"] is True


@everywhere
async def test_after_a_protocol_error_the_hub_is_told_and_the_transport_ends(
    serve, wire
) -> None:
    hub = Diary.fresh()
    server = await serve(hub)
    client = await server.connect(wire)
    await client.write(b"junk" + RS if wire[1] == "json" else b"\x01\xc1")
    assert await client.next() == CLOSE
    await client.end()
    assert await hub.next() == "connected"
    assert isinstance(await hub.next(), Exception)
    assert not server.hub.connections


async def test_the_order_of_the_members_is_free_and_unknown_ones_are_skipped(
    serve,
) -> None:
    client = await (await serve(Plain)).connect()
    await client.write(
        b' {"arguments" : [1, 2], "x":{"y":[null]}, "invocationId":"1",'
        b' "headers":{"Authorization":"secret"}, "target":"Add", "type":1 }' + RS
    )
    assert await client.finish("1") == 3


@pytest.mark.parametrize("text", [
    '{"type":1,"invocationId":null,"target":"Keep","arguments":[1]}',
    '{"type":1,"invocationId":"","target":"Keep","arguments":[1]}',
    '{"type":1,"streamIds":null,"target":"Keep","arguments":[1]}',
    '{"type":1,"headers":null,"target":"Keep","arguments":[1]}',
    '{"type":3,"invocationId":"1","error":null}',
    '{"type":3,"invocationId":"1","error":null,"result":1}',
    '{"type":3,"invocationId":"nobody","result":null}',
    '{"type":2,"invocationId":"nobody","item":null}',
    '{"type":5,"invocationId":"nobody"}',
    '{"type":6}',
    '{"type":99}',
    '{"type":99,"target":5,"arguments":null,"later":[[]]}',
    '{"type":0}',
    '{"type":-1}',
])  # fmt: skip
async def test_a_message_to_be_tolerated_leaves_no_trace(serve, text: str) -> None:
    kept: list[int] = []

    class Keeper(Plain):
        def keep(self, value: int) -> None:
            kept.append(value)

    client = await (await serve(Keeper)).connect()
    await client.write(text.encode() + RS)
    assert await client.invoke("Add", 1, 2) == 3
    assert (client.unread, kept) == ([], [1] if "Keep" in text else [])


async def test_a_null_error_in_a_close_message_is_no_error(serve) -> None:
    hub = Diary.fresh()
    client = await (await serve(hub)).connect()
    await client.write(b'{"type":7,"error":null}' + RS)
    assert await client.next() == {"type": 7}
    assert [await hub.next(), await hub.next()] == ["connected", None]


@everywhere
@pytest.mark.parametrize("id", ["0", "007", "s1", "ünïcødé ☃", 'a"b\\c', "x" * 300])
async def test_the_invocation_id_comes_back_as_it_was(serve, wire, id: str) -> None:
    client = await (await serve(Plain)).connect(wire)
    assert await client.invoke("Add", 1, 2, invocationId=id) == 3


@everywhere
async def test_several_messages_may_come_in_one_payload(serve, wire) -> None:
    client = await (await serve(Plain)).connect(wire)
    calls = [call("Add", i, i, invocationId=str(i)) for i in range(50)]
    await client.send(*calls)
    assert [await client.finish(str(i)) for i in range(50)] == list(range(0, 100, 2))


@everywhere
async def test_a_message_may_be_split_at_every_byte(serve, wire) -> None:
    client = await (await serve(Plain)).connect(wire)
    data = encode(wire[1], call("Echo", "ö", invocationId="1"))
    for at in range(1, len(data)):
        await client.write(data[:at])
        await client.write(data[at:])
        assert await client.finish("1") == "ö"


def sized(protocol: str, size: int) -> bytes:
    """A call of Echo that takes exactly so many bytes on the wire."""
    padding = "x" * (size - len(encode(protocol, call("Echo", "", invocationId="1"))))
    data = encode(protocol, call("Echo", padding, invocationId="1"))
    return sized_again(protocol, padding, len(data) - size)


def sized_again(protocol: str, padding: str, excess: int) -> bytes:
    return encode(
        protocol, call("Echo", padding[: len(padding) - excess], invocationId="1")
    )


@everywhere
@pytest.mark.parametrize("limit", [32768, 1000])
async def test_a_message_of_exactly_the_limit_is_accepted(serve, wire, limit) -> None:
    server = await serve(Plain, maximum_receive_message_size=limit)
    client = await server.connect(wire)
    data = sized(wire[1], limit)
    assert len(data) == limit
    await client.write(data)
    assert len(await client.finish("1")) > limit - 100


@everywhere
async def test_a_message_one_byte_over_the_limit_is_refused(serve, wire) -> None:
    server = await serve(Plain, enable_detailed_errors=True)
    client = await server.connect(wire)
    data = sized(wire[1], 32769)
    assert len(data) == 32769
    await client.write(data)
    text = (
        " InvalidDataException: The maximum message size of 32768B was exceeded. "
        "The message size can be configured in AddHubOptions."
    )
    assert await client.next() == {**CLOSE, "error": CLOSED + text}


@everywhere
async def test_a_message_that_never_ends_is_refused_at_the_limit(serve, wire) -> None:
    client = await (await serve(Plain)).connect(wire)
    start = b'{"' if wire[1] == "json" else b"\xff\xff\x7f"
    await client.write(start + b"x" * 32768)
    assert await client.next() == CLOSE


@everywhere
async def test_many_small_messages_may_exceed_the_limit_together(serve, wire) -> None:
    client = await (await serve(Plain)).connect(wire)
    pings = [{"type": 6}] * 40000
    await client.send(*pings, call("Add", 1, 2, invocationId="1"))
    assert await client.finish("1") == 3


@everywhere
async def test_without_a_limit_messages_may_be_large(serve, wire) -> None:
    server = await serve(Plain, maximum_receive_message_size=None)
    client = await server.connect(wire)
    assert await client.invoke("Echo", "x" * 500_000) == "x" * 500_000


@everywhere
async def test_arguments_may_be_nested_up_to_the_limit(serve, wire) -> None:
    client = await (await serve(Plain)).connect(wire)
    value: list = []
    for _ in range(61):
        value = [value]
    assert await client.invoke("Echo", value) == value


async def test_text_that_is_not_utf8_is_a_protocol_error(serve) -> None:
    client = await (await serve(Plain)).connect(("LongPolling", "json"))
    await client.write(b'{"type":1,"target":"Echo","arguments":["\xff"]}' + RS)
    assert await client.next() == CLOSE


async def test_half_a_surrogate_does_not_corrupt_the_wire(serve) -> None:
    client = await (await serve(Plain)).connect()
    await client.send(call("Echo", "\ud800", invocationId="1"))
    assert (await client.next())["type"] in (3, 7)


@everywhere
@pytest.mark.parametrize("value", [
    None, True, 0, -1, 2**53, 1.5, "", "\x1e\x00\r\n\u2028\x7f", "😀", [], {}, [[None]],
    {"a": {"b": [1, "x"]}, "": 0},
])  # fmt: skip
async def test_plain_values_come_back_as_they_went(serve, wire, value: Any) -> None:
    client = await (await serve(Plain)).connect(wire)
    answer = await client.invoke("Echo", value)
    assert (answer, type(answer)) == (value, type(value))


async def test_the_server_writes_json_as_the_reference_does(serve) -> None:
    server = await serve(Plain)
    raw = await RawSocket.open(server)
    await server.hub.clients.all.send("Note", "ä", 1)
    text = '{"type":1,"target":"Note","arguments":["ä",1]}'
    kind, payload = await raw.next()
    assert (kind, payload[-1:]) == (1, RS)
    assert list(json.loads(payload[:-1]).items()) == list(json.loads(text).items())
    raw.send(1, encode("json", call("Add", 1, 2, invocationId="7")))
    assert await raw.next() == (1, b'{"type":3,"invocationId":"7","result":3}' + RS)
    raw.send(1, encode("json", call("Counter", 1, type=4, invocationId="8")))
    payload = b""
    while payload.count(RS) < 2:
        payload += (await raw.next())[1]
    assert payload == (
        b'{"type":2,"invocationId":"8","item":0}\x1e{"type":3,"invocationId":"8"}\x1e'
    )


async def test_a_call_without_arguments_still_has_the_array(serve) -> None:
    server = await serve(Plain)
    raw = await RawSocket.open(server)
    await server.hub.clients.all.send("Note")
    assert await raw.next() == (1, b'{"type":1,"target":"Note","arguments":[]}' + RS)


# ------------------------------------------------------- MessagePack messages


class Observed(kestrun.Hub):
    """The hub that the JavaScript client talked to when its bytes were observed."""

    seen: asyncio.Queue

    @classmethod
    def fresh(cls) -> type["Observed"]:
        return type("Observed", (cls,), {"seen": asyncio.Queue()})

    def echo(self, value: int) -> None:
        self.seen.put_nowait(value)

    async def up(self, items: AsyncIterator[int]) -> None:
        self.seen.put_nowait([item async for item in items])

    def inv(self, text: str) -> str:
        return text + "!"

    async def st(self, count: int) -> AsyncIterator[int]:
        try:
            for i in range(count):
                yield i
            await asyncio.Event().wait()
        finally:
            self.seen.put_nowait("closed")

    async def ask(self) -> None:
        self.seen.put_nowait(await self.clients.caller.invoke("Name"))


MESSAGEPACK = ("WebSockets", "messagepack")


async def observed(serve) -> tuple[Server, type, RawSocket]:
    hub = Observed.fresh()
    server = await serve(hub)
    raw = await RawSocket.open(server, shake=False)
    raw.send(1, b'{"protocol":"messagepack","version":1}' + RS)
    assert await raw.next() == (2, b"{}" + RS)
    return server, hub, raw


def from_hex(text: str) -> bytes:
    return bytes.fromhex(text)


async def test_the_observed_send_of_five_elements_is_read(serve) -> None:
    _, hub, raw = await observed(serve)
    raw.send(2, from_hex("0b 95 01 80 c0 a4 45 63 68 6f 91 01"))
    assert await soon(hub.seen.get()) == 1


async def test_the_observed_upload_is_read(serve) -> None:
    _, hub, raw = await observed(serve)
    raw.send(2, from_hex("0b 96 01 80 c0 a2 55 70 90 91 a1 30"))
    raw.send(2, from_hex("06 94 02 80 a1 30 05") * 2)
    raw.send(2, from_hex("06 94 03 80 a1 30 02"))
    assert await soon(hub.seen.get()) == [5, 5]


async def test_the_observed_invocation_is_answered_in_bytes(serve) -> None:
    _, _, raw = await observed(serve)
    raw.send(2, from_hex("0c 95 01 80 a1 31 a3 49 6e 76 91 a1 78"))
    assert await raw.next() == (2, from_hex("09 95 03 80 a1 31 03 a2 78 21"))


async def test_the_observed_stream_and_its_cancel_are_answered_in_bytes(serve) -> None:
    _, hub, raw = await observed(serve)
    raw.send(2, from_hex("0a 95 04 80 a1 32 a2 53 74 91 02"))
    items = from_hex("06 94 02 80 a1 32 00 06 94 02 80 a1 32 01")
    payload = b""
    while len(payload) < len(items):
        payload += (await raw.next())[1]
    assert payload == items
    raw.send(2, from_hex("05 93 05 80 a1 32"))
    assert await raw.next() == (2, from_hex("06 94 03 80 a1 32 02"))
    assert await soon(hub.seen.get()) == "closed"


async def test_the_observed_close_is_answered_with_three_elements(serve) -> None:
    _, _, raw = await observed(serve)
    raw.send(2, from_hex("03 92 07 c0"))
    assert await raw.next() == (2, from_hex("04 93 07 c0 c2"))


async def test_the_server_always_writes_invocations_of_six_elements(serve) -> None:
    server, _, raw = await observed(serve)
    await server.hub.clients.all.send("m", 1)
    assert await raw.next() == (2, from_hex("09 96 01 80 c0 a1 6d 91 01 90"))


async def test_the_ping_has_three_bytes(serve) -> None:
    server = await serve(Plain, keep_alive_interval=0.05)
    raw = await RawSocket.open(server, shake=False)
    raw.send(2, b'{"protocol":"messagepack","version":1}' + RS)
    assert await raw.next() == (2, b"{}" + RS)
    assert await raw.next() == (2, from_hex("02 91 06"))


LENIENT = {
    "six elements": [1, {}, "1", "Inv", ["x"], []],
    "five elements": [1, {}, "1", "Inv", ["x"]],
    "seven elements": [1, {}, "1", "Inv", ["x"], [], {"later": 1}],
    "nil headers": [1, None, "1", "Inv", ["x"], []],
    "nil stream ids": [1, {}, "1", "Inv", ["x"], None],
    "headers": [1, {"Authorization": "secret"}, "1", "Inv", ["x"], []],
}


@pytest.mark.parametrize("array", LENIENT.values(), ids=list(LENIENT))
async def test_invocations_of_other_clients_are_read(serve, array: list) -> None:
    client = await (await serve(Observed)).connect(MESSAGEPACK)
    await client.write(prefixed(msgpack.packb(array)))
    assert await client.finish("1") == "x!"


@pytest.mark.parametrize(
    "array", [[99], [99, {}, "x"], [0], [6, "later"], [5, {}, "nobody", 1]]
)
async def test_unknown_types_and_extra_elements_are_skipped(serve, array: list) -> None:
    client = await (await serve(Observed)).connect(MESSAGEPACK)
    await client.write(prefixed(msgpack.packb(array)))
    assert await client.invoke("Inv", "x") == "x!"


async def test_an_upload_may_end_with_a_completion_of_three_elements(serve) -> None:
    hub = Observed.fresh()
    client = await (await serve(hub)).connect(MESSAGEPACK)
    await client.send(call("Up", streamIds=["s"]))
    await client.send({"type": 2, "invocationId": "s", "item": 4})
    await client.write(prefixed(msgpack.packb([3, {}, "s"])))
    assert await soon(hub.seen.get()) == [4]


async def test_an_empty_invocation_id_is_none(serve) -> None:
    hub = Observed.fresh()
    client = await (await serve(hub)).connect(MESSAGEPACK)
    await client.write(prefixed(msgpack.packb([1, {}, "", "Echo", [4], []])))
    assert await soon(hub.seen.get()) == 4
    assert await client.invoke("Inv", "x") == "x!"
    assert client.unread == []


BAD_ARRAYS = [
    (b"\x00", ""),
    (b"\xff\xff\xff\xff\x08", "Messages over 2GB in size are not supported."),
    (b"\xff\xff\xff\xff\xff\x01", "Messages over 2GB in size are not supported."),
    (b"\x01\xc1", ""),
    (b"\x01\x06", ""),
    (b"\x01\x80", ""),
    (b"\x02\x91\x91", ""),
    (b"\x01\x90", ""),
    (prefixed(msgpack.packb([1, {}, "1", 5, [], []])), "Reading 'target' as String failed."),
    (prefixed(msgpack.packb([1, {}, 5, "Inv", [], []])), "Reading 'invocationId' as String failed."),
    (prefixed(msgpack.packb([1, {}, "1", "Inv", 5, []])), ""),
    (prefixed(msgpack.packb([1, {}, "1", "Inv", None, []])), ""),
    (prefixed(msgpack.packb([1, {}, "1"])), ""),
    (prefixed(msgpack.packb(["1", {}, "1", "Inv", [], []])), ""),
    (prefixed(msgpack.packb([3, {}, "1", 9, 1])), "Invalid invocation result kind."),
    (prefixed(msgpack.packb([3, {}, "1", 0])), "Invalid invocation result kind."),
    (prefixed(msgpack.packb([2, {}, "1"])), ""),
    (prefixed(b"\x91" * 3000), ""),
]  # fmt: skip


@pytest.mark.parametrize("data, error", BAD_ARRAYS)
async def test_bytes_that_break_the_protocol_end_the_connection(
    serve, data: bytes, error: str
) -> None:
    server = await serve(Observed, enable_detailed_errors=True)
    client = await server.connect(MESSAGEPACK)
    await client.write(data)
    close = await client.next()
    assert close["error"].startswith(f"{CLOSED} InvalidDataException: {error}")
    assert close["allowReconnect"] is True


async def test_the_largest_prefix_waits_for_more_or_exceeds_the_size_limit(
    serve,
) -> None:
    client = await (await serve(Observed, enable_detailed_errors=True)).connect(
        MESSAGEPACK
    )
    await client.write(b"\xff\xff\xff\xff\x07" + b"x" * 32768)
    assert "The maximum message size of 32768B" in (await client.next())["error"]


async def test_bytes_travel_as_bin_and_text_as_str(serve) -> None:
    client = await (await serve(Plain)).connect(MESSAGEPACK)
    assert await client.invoke("Echo", b"\x00\xff") == b"\x00\xff"
    assert await client.invoke("Echo", "text") == "text"


async def test_a_timestamp_becomes_a_datetime_and_comes_back_as_one(serve) -> None:
    seen: list[Any] = []

    class Clock(kestrun.Hub):
        def next_day(self, moment: datetime.datetime) -> datetime.datetime:
            seen.append(moment)
            return moment + datetime.timedelta(days=1)

    client = await (await serve(Clock)).connect(MESSAGEPACK)
    moment = datetime.datetime(2026, 5, 4, 3, 2, 1, 250000, datetime.UTC)
    answer = await client.invoke("NextDay", moment)
    assert answer == moment + datetime.timedelta(days=1)
    assert seen == [moment]


async def test_keys_of_a_map_need_not_be_text(serve) -> None:
    client = await (await serve(Plain)).connect(MESSAGEPACK)
    assert await client.invoke("Echo", {1: "a", 2.5: [None]}) == {1: "a", 2.5: [None]}


async def test_a_number_too_large_for_messagepack_fails_only_its_own_call(
    serve,
) -> None:
    class Large(Plain):
        def large(self) -> int:
            return 2**70

    client = await (await serve(Large)).connect(MESSAGEPACK)
    text = "An unexpected error occurred invoking 'Large' on the server."
    assert (await client.error("Large")).startswith(text)
    assert await client.invoke("Add", 1, 2) == 3


# ------------------------------------------------------------ calls and errors


class Late(kestrun.HubException):
    pass


class Calls(Plain):
    """Methods that fail in every way the protocol knows."""

    def nothing(self) -> None: ...

    def secret(self) -> None:
        raise ValueError("secret")

    async def refuse(self) -> None:
        raise kestrun.HubException("no")

    async def late(self) -> None:
        raise Late("half past")

    async def leaky(self, count: int) -> AsyncIterator[int]:
        for i in range(count):
            yield i
        raise ValueError("secret")

    async def closed(self) -> AsyncIterator[int]:
        raise kestrun.HubException("no")
        yield 0

    async def double(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for n in numbers:
            yield 2 * n

    async def zip(self, a: AsyncIterator[int], x: int, b: AsyncIterator[int]) -> list:
        return [[n async for n in a], x, [n async for n in b]]

    async def first(self, numbers: AsyncIterator[int]) -> int:
        return await anext(numbers)

    async def read(self, numbers: AsyncIterator[int]) -> str:
        try:
            return str([n async for n in numbers])
        except kestrun.HubException as error:
            return f"{type(error).__name__}: {error}"

    def join_the_group(self) -> str:
        return "joined"

    @kestrun.hub_method("Subtract")
    def minus(self, a: int, b: int) -> int:
        return a - b

    def greet(self, name: str, greeting: str = "Hello") -> str:
        return f"{greeting} {name}"

    def _hidden(self) -> int:
        return 42

    def __dunder__(self) -> int:
        return 42

    limit = 42


FAILED = "Failed to invoke '{}' due to an error on the server."
THREW = "An unexpected error occurred invoking '{}' on the server."
STREAM_THREW = "An error occurred on the server while streaming results."
BINDING = (
    " InvalidDataException: Error binding arguments. Make sure that the types of the "
    "provided values match the types of the hub method being invoked."
)
COUNT = (
    " InvalidDataException: Invocation provides {} argument(s) but target expects {}."
)
WRONG_MODE = "The client attempted to invoke the {} '{}' method with a {} invocation."
MISSING = " HubException: Method does not exist."

# (message, text for everyone, what detailed errors add)
CALL_ERRORS = [
    (call("Nope"), FAILED.format("Nope") + MISSING, ""),
    (call("nope", 1, 2), FAILED.format("nope") + MISSING, ""),
    (call("Nope", type=4), FAILED.format("Nope") + MISSING, ""),
    (call("Add", 1), FAILED.format("Add"), COUNT.format(1, 2)),
    (call("add", 1, 2, 3), FAILED.format("add"), COUNT.format(3, 2)),
    (call("Counter", type=4), FAILED.format("Counter"), COUNT.format(0, 1)),
    (call("Total", 1, streamIds=["s"]), FAILED.format("Total"), COUNT.format(1, 0)),
    (call("Add", "x", 2), FAILED.format("Add"), BINDING),
    (call("Add", 1, None), FAILED.format("Add"), BINDING),
    (
        call("Counter", 1),
        WRONG_MODE.format("streaming", "Counter", "non-streaming"),
        "",
    ),
    (
        call("Add", 1, 2, type=4),
        WRONG_MODE.format("non-streaming", "Add", "streaming"),
        "",
    ),
    (
        call("Total"),
        THREW.format("Total")
        + " HubException: Client sent 0 stream(s), Hub method expects 1.",
        "",
    ),
    (
        call("Add", 1, 2, streamIds=["s"]),
        THREW.format("Add")
        + " HubException: Client sent 1 stream(s), Hub method expects 0.",
        "",
    ),
    (call("Secret"), THREW.format("Secret"), " ValueError: secret"),
    (call("SECRET"), THREW.format("SECRET"), " ValueError: secret"),
    (call("Refuse"), THREW.format("Refuse") + " HubException: no", ""),
    (call("Late"), THREW.format("Late") + " Late: half past", ""),
    (call("Leaky", 0, type=4), STREAM_THREW, " ValueError: secret"),
    (call("Closed", type=4), STREAM_THREW + " HubException: no", ""),
]


@everywhere
@pytest.mark.parametrize("detailed", [False, True])
async def test_a_call_that_fails_is_answered_in_the_words_of_signalr(
    serve, wire, detailed: bool
) -> None:
    server = await serve(Calls, enable_detailed_errors=detailed)
    client = await server.connect(wire)
    for i, (message, text, detail) in enumerate(CALL_ERRORS):
        await client.send({**message, "invocationId": str(i)})
        expected = text + (detail if detailed else "")
        answer = {"type": 3, "invocationId": str(i), "error": expected}
        assert await client.next() == answer


@everywhere
async def test_a_non_blocking_call_is_never_answered_not_even_with_an_error(
    serve, wire
) -> None:
    client = await (await serve(Calls)).connect(wire)
    calls = [m for m, _, _ in CALL_ERRORS if m["type"] == 1]
    await client.send(*calls, call("Add", 1, 2))
    assert await client.invoke("Add", 1, 2) == 3
    assert client.unread == []


@everywhere
async def test_a_method_without_a_result_is_answered_with_null(serve, wire) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("Nothing")
    assert await client.next() == {"type": 3, "invocationId": id, "result": None}


@pytest.mark.parametrize("name", [
    "JoinTheGroup", "joinTheGroup", "join_the_group", "JOINTHEGROUP", "jointhegroup",
    "Join_The_Group",
])  # fmt: skip
async def test_method_names_match_without_case_and_underscores(serve, name) -> None:
    client = await (await serve(Calls)).connect()
    assert await client.invoke(name) == "joined"


async def test_a_method_may_have_another_wire_name(serve) -> None:
    client = await (await serve(Calls)).connect()
    assert await client.invoke("Subtract", 5, 3) == 2
    assert MISSING in await client.error("Minus", 5, 3)


@pytest.mark.parametrize("name", [
    "_hidden", "Hidden", "__dunder__", "Dunder", "__init__", "Init", "__class__",
    "on_connected", "OnConnected", "OnDisconnected", "on_invocation", "OnInvocation",
    "context", "clients", "groups", "Limit", "", "add ", "Plain.add", "mro",
])  # fmt: skip
async def test_what_is_not_a_hub_method_does_not_exist(serve, name: str) -> None:
    client = await (await serve(Calls)).connect()
    assert await client.error(name) == FAILED.format(name) + MISSING


async def test_lifecycle_methods_that_a_hub_overrides_stay_unreachable(serve) -> None:
    hub = Diary.fresh()
    client = await (await serve(hub)).connect()
    for name in ("OnConnected", "on_connected", "OnDisconnected"):
        assert MISSING in await client.error(name)
    assert [await hub.next(), hub.pages.empty()] == ["connected", True]


async def test_trailing_arguments_with_defaults_may_be_left_out(serve) -> None:
    client = await (await serve(Calls)).connect()
    assert await client.invoke("Greet", "Ann") == "Hello Ann"
    assert await client.invoke("Greet", "Ann", "Hi") == "Hi Ann"
    assert (await client.error("Greet")).startswith(FAILED.format("Greet"))
    assert (await client.error("Greet", 1, 2, 3)).startswith(FAILED.format("Greet"))


async def test_the_log_tells_why_arguments_do_not_fit(serve, caplog) -> None:
    client = await (await serve(Plain)).connect()
    for arguments in ([1], [1, 2, 3], [1, "two"]):
        with pytest.raises(Failed, match="due to an error on the server.$"):
            await client.invoke("Add", *arguments)
    one, three, wrong = [r.getMessage() for r in caplog.records if r.levelno > 20]
    assert "Plain.add: 1 argument(s) do not fit (a, b)" in one
    assert "Plain.add: 3 argument(s) do not fit (a, b)" in three
    assert "Plain.add: argument 'b' does not fit" in wrong


async def test_an_exception_is_logged_with_its_traceback(serve, caplog) -> None:
    client = await (await serve(Calls)).connect()
    with caplog.at_level(logging.DEBUG, "kestrun"):
        await client.error("Secret")
    assert "ValueError: secret" in caplog.text


@everywhere
@pytest.mark.parametrize("kind", ["object", "deep"])
async def test_a_result_that_cannot_be_written_is_an_error_of_its_call_alone(
    serve, wire, kind: str
) -> None:
    class Odd(Plain):
        def odd(self, kind: str):
            if kind == "object":
                return {"a": [object()]}
            loop: list = []
            loop.append(loop)
            return loop

    client = await (await serve(Odd)).connect(wire)
    assert (await client.error("Odd", kind)).startswith(THREW.format("Odd"))
    assert await client.invoke("Add", 1, 2) == 3


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
async def test_json_never_carries_numbers_that_are_none(serve, value: str) -> None:
    class Odd(Plain):
        def odd(self, value: str):
            return [float(value)]

    client = await (await serve(Odd)).connect()
    assert (await client.error("Odd", value)).startswith(THREW.format("Odd"))
    assert await client.invoke("Add", 1, 2) == 3


@everywhere
async def test_an_item_that_cannot_be_written_ends_its_stream_alone(
    serve, wire
) -> None:
    class Odd(Plain):
        async def odds(self) -> AsyncIterator[Any]:
            yield 1
            yield object()

    client = await (await serve(Odd)).connect(wire)
    item, completion = await client.stream("Odds")
    assert (item, "error" in completion) == (1, True)
    assert await client.invoke("Add", 1, 2) == 3


@everywhere
async def test_a_hub_object_lives_as_long_as_its_connection(serve, wire) -> None:
    class Counting(kestrun.Hub):
        count = 0

        def up(self) -> int:
            self.count += 1
            return self.count

    server = await serve(Counting)
    one, two = await server.connect(wire), await server.connect(wire)
    assert [await one.invoke("Up"), await one.invoke("Up")] == [1, 2]
    assert await two.invoke("Up") == 1


# ------------------------------------------------------ order and parallelism


class Gate(Plain):
    """Calls that wait for the test, and a list of what has started and ended."""

    log: list
    gates: dict[int, asyncio.Event]

    @classmethod
    def fresh(cls) -> type["Gate"]:
        gates = {i: asyncio.Event() for i in range(5)}
        return type("Gate", (cls,), {"log": [], "gates": gates})

    async def wait(self, gate: int) -> int:
        self.log.append(("start", gate))
        try:
            await self.gates[gate].wait()
            return gate
        finally:
            self.log.append(("end", gate))

    def note(self, value: int) -> None:
        self.log.append(value)


@everywhere
async def test_calls_of_one_client_run_in_order_one_at_a_time(serve, wire) -> None:
    hub = Gate.fresh()
    client = await (await serve(hub)).connect(wire)
    first, second = await client.begin("Wait", 0), await client.begin("Wait", 1)
    await until(lambda: hub.log)
    hub.gates[1].set()
    await silence(0.05)
    assert hub.log == [("start", 0)]
    hub.gates[0].set()
    assert [await client.finish(second), await client.finish(first)] == [1, 0]
    assert hub.log == [("start", 0), ("end", 0), ("start", 1), ("end", 1)]


async def test_as_many_calls_run_at_once_as_the_option_allows(serve) -> None:
    hub = Gate.fresh()
    server = await serve(hub, maximum_parallel_invocations_per_client=3)
    client = await server.connect()
    ids = [await client.begin("Wait", i) for i in range(4)]
    await until(lambda: len(hub.log) == 3)
    await silence(0.05)
    assert hub.log == [("start", 0), ("start", 1), ("start", 2)]
    hub.gates[1].set()
    assert await client.finish(ids[1]) == 1
    await until(lambda: hub.log[-1] == ("start", 3))


async def test_clients_do_not_wait_for_each_other(serve) -> None:
    server = await serve(Gate.fresh())
    one, two = await server.connect(), await server.connect()
    await one.begin("Wait", 0)
    assert await two.invoke("Add", 1, 2) == 3


@everywhere
async def test_non_blocking_calls_run_in_order(serve, wire) -> None:
    hub = Gate.fresh()
    client = await (await serve(hub)).connect(wire)
    for i in range(50):
        await client.send(call("Note", i))
    await client.invoke("Add", 1, 2)
    assert hub.log == list(range(50))


@everywhere
async def test_streams_and_uploads_pass_a_call_that_is_waiting(serve, wire) -> None:
    hub = Gate.fresh()
    client = await (await serve(hub)).connect(wire)
    waiting = await client.begin("Wait", 0)
    assert (await client.stream("Counter", 2))[:2] == [0, 1]
    upload = await client.begin("Total", streamIds=["u"])
    await client.send({"type": 2, "invocationId": "u", "item": 4})
    await client.send({"type": 3, "invocationId": "u"})
    assert await client.finish(upload) == 4
    hub.gates[0].set()
    assert await client.finish(waiting) == 0


@everywhere
async def test_a_cancelled_call_is_cancelled_and_still_answered(serve, wire) -> None:
    hub = Gate.fresh()
    client = await (await serve(hub)).connect(wire)
    id = await client.begin("Wait", 0)
    await until(lambda: hub.log)
    await client.send({"type": 5, "invocationId": id})
    assert (await client.next())["type"] == 3
    assert hub.log == [("start", 0), ("end", 0)]
    assert await client.invoke("Add", 1, 2) == 3


async def test_a_running_call_is_cancelled_when_its_client_leaves(serve) -> None:
    caught: asyncio.Queue = asyncio.Queue()

    class Patient(kestrun.Hub):
        async def wait(self) -> None:
            caught.put_nowait("waiting")
            try:
                await asyncio.Event().wait()
            except BaseException as error:
                caught.put_nowait(type(error))
                raise

    client = await (await serve(Patient)).connect()
    await client.begin("Wait")
    assert await soon(caught.get()) == "waiting"
    await client.leave()
    assert await soon(caught.get()) is asyncio.CancelledError


class Queueing(Gate):
    """Calls that came together, and so may follow each other without a pause."""

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def remember(self, value: str) -> str:
        before = self.variable.get("nothing")
        self.variable.set(value)
        return before

    async def cancel_itself(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def pause(self) -> str:
        await asyncio.sleep(0)
        return "rested"


async def together(client: Client, *calls: tuple) -> list[Any]:
    """Make calls that arrive in one piece; return their results in order."""
    ids = [str(number) for number in range(1000, 1000 + len(calls))]
    messages = [
        call(*target, invocationId=id) for id, target in zip(ids, calls, strict=True)
    ]
    await client.write(b"".join(encode(client.protocol, m) for m in messages))
    return [await client.finish(id) for id in ids]


@everywhere
async def test_calls_that_follow_each_other_share_no_variables(serve, wire) -> None:
    client = await (await serve(Queueing)).connect(wire)
    calls = [("Remember", str(number)) for number in range(5)]
    assert await together(client, *calls) == ["nothing"] * 5


async def test_a_call_that_cancels_its_own_task_hits_no_other(serve) -> None:
    client = await (await serve(Queueing)).connect()
    calls = [("CancelItself",), ("Pause",), ("Pause",)]
    assert await together(client, *calls) == [None, "rested", "rested"]


async def test_many_calls_that_arrive_together_are_all_answered(serve) -> None:
    client = await (await serve(Queueing)).connect()
    calls = [("Remember", "x"), ("Add", 1, 2), ("Pause",)] * 100
    assert await together(client, *calls) == ["nothing", 3, "rested"] * 100


async def test_a_call_that_followed_another_can_be_cancelled(serve) -> None:
    hub = Gate.fresh()
    client = await (await serve(type("Both", (hub, Queueing), {}))).connect()
    ids = [str(number) for number in range(2000, 2002)]
    messages = [call("Remember", "x", invocationId=ids[0])]
    messages += [call("Wait", 0, invocationId=ids[1])]
    await client.write(b"".join(encode("json", m) for m in messages))
    assert await client.finish(ids[0]) == "nothing"
    await until(lambda: hub.log)
    await client.send({"type": 5, "invocationId": ids[1]})
    assert "error" in await client.next(3, ids[1])
    assert hub.log == [("start", 0), ("end", 0)]
    assert await client.invoke("Add", 1, 2) == 3


# ------------------------------------------------------------- server streams


@everywhere
@pytest.mark.parametrize("count", [0, 1, 100])
async def test_a_stream_brings_its_items_and_a_bare_completion(
    serve, wire, count: int
) -> None:
    client = await (await serve(Plain)).connect(wire)
    *items, completion = await client.stream("Counter", count)
    assert items == list(range(count))
    assert completion == {"type": 3, "invocationId": "1"}


@everywhere
async def test_items_before_an_error_stay_delivered(serve, wire) -> None:
    client = await (await serve(Calls)).connect(wire)
    *items, completion = await client.stream("Leaky", 3)
    assert (items, completion["error"]) == ([0, 1, 2], STREAM_THREW)


@everywhere
async def test_an_item_may_be_none(serve, wire) -> None:
    class Nones(kestrun.Hub):
        async def nones(self) -> AsyncIterator[None]:
            yield None

    client = await (await serve(Nones)).connect(wire)
    id = await client.begin("Nones", type=4)
    assert await client.next() == {"type": 2, "invocationId": id, "item": None}


class Ticker(Plain):
    """An endless stream whose end can be awaited."""

    ended: asyncio.Event
    produced = 0

    @classmethod
    def fresh(cls) -> type["Ticker"]:
        return type("Ticker", (cls,), {"ended": asyncio.Event()})

    async def ticks(self, pause: float = 0) -> AsyncIterator[int]:
        try:
            while True:
                yield type(self).produced
                type(self).produced += 1
                await asyncio.sleep(pause)
        finally:
            self.ended.set()

    async def silent(self) -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def bulk(self, limit: int) -> AsyncIterator[str]:
        """Items without a pause; the limit is for servers that never stop it."""
        while self.produced < limit:
            type(self).produced += 1
            yield "x" * 50_000
        self.ended.set()


@everywhere
@pytest.mark.parametrize("target, args", [("Ticks", [0.01]), ("Silent", [])])
async def test_a_cancelled_stream_is_closed_and_completes_without_error(
    serve, wire, target: str, args: list
) -> None:
    hub = Ticker.fresh()
    client = await (await serve(hub)).connect(wire)
    id = await client.begin(target, *args, type=4)
    assert (await client.next(2, id))["item"] == 0
    await client.send({"type": 5, "invocationId": id})
    assert await client.next(3) == {"type": 3, "invocationId": id}
    await soon(hub.ended.wait())


@everywhere
async def test_a_stream_is_closed_when_its_client_leaves(serve, wire) -> None:
    hub = Ticker.fresh()
    client = await (await serve(hub)).connect(wire)
    await client.begin("Ticks", 0.01, type=4)
    await client.next(2)
    await client.leave()
    await soon(hub.ended.wait())


@everywhere
async def test_an_id_in_use_is_refused_and_the_stream_goes_on(serve, wire) -> None:
    hub = Ticker.fresh()
    client = await (await serve(hub)).connect(wire)
    id = await client.begin("Ticks", 0.01, type=4)
    assert (await client.next(2, id))["item"] == 0
    await client.begin("Ticks", 0.01, type=4, invocationId=id)
    text = f"Invocation ID '{id}' is already in use."
    assert (await client.next(3))["error"] == text
    client.unread.clear()
    assert (await client.next(2, id))["item"] > 0
    await client.send({"type": 5, "invocationId": id})
    assert await client.next(3) == {"type": 3, "invocationId": id}


async def test_an_id_may_be_used_again_when_its_stream_has_ended(serve) -> None:
    client = await (await serve(Plain)).connect()
    for _ in range(2):
        *items, _ = await client.stream("Counter", 2, invocationId="again")
        assert items == [0, 1]


@everywhere
async def test_streams_of_one_client_run_side_by_side(serve, wire) -> None:
    hub = Ticker.fresh()
    client = await (await serve(hub)).connect(wire)
    one, two = [await client.begin("Ticks", 0.01, type=4) for _ in range(2)]
    for _ in range(3):
        await client.next(2, one)
        await client.next(2, two)


async def test_a_plain_method_may_return_an_async_iterator(serve) -> None:
    class Letters(kestrun.Hub):
        def letters(self) -> AsyncIterator[str]:
            async def run():
                for letter in "abc":
                    yield letter

            return run()

    client = await (await serve(Letters)).connect()
    assert (await client.stream("Letters"))[:3] == ["a", "b", "c"]


async def test_a_stream_waits_for_a_client_that_does_not_read(serve) -> None:
    hub = Ticker.fresh()
    server = await serve(hub)
    raw = await RawSocket.open(server, receive_buffer=4096, limit=4096)
    raw.send(1, encode("json", call("Bulk", 1000, type=4, invocationId="1")))
    produced = -1
    async with asyncio.timeout(PATIENCE):
        while produced != hub.produced or produced < 1:
            produced = hub.produced
            await asyncio.sleep(0.2)
    assert len(server.hub.connections) == 1
    assert produced * 50_000 < 20_000_000


async def test_a_stream_that_never_pauses_stops_when_its_client_leaves(serve) -> None:
    hub = Ticker.fresh()
    server = await serve(hub)
    raw = await RawSocket.open(server, receive_buffer=4096, limit=4096)
    raw.send(1, encode("json", call("Bulk", 1000, type=4, invocationId="1")))
    await until(lambda: hub.produced)
    raw.writer.transport.abort()
    await until(lambda: not server.hub.connections)
    await silence(0.02)
    assert hub.produced < 1000


# ------------------------------------------------------------- upload streams


async def upload(client: Client, id: str, *items: Any, **end: Any) -> None:
    await client.send(*({"type": 2, "invocationId": id, "item": i} for i in items))
    await client.send({"type": 3, "invocationId": id, **end})


@everywhere
async def test_a_method_reads_an_upload_stream(serve, wire) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("Total", streamIds=["u"])
    await upload(client, "u", *range(30))
    assert await client.finish(id) == sum(range(30))


@everywhere
async def test_a_stream_may_read_an_upload_stream(serve, wire) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("Double", type=4, streamIds=["u"])
    await client.send({"type": 2, "invocationId": "u", "item": 4})
    assert (await client.next(2, id))["item"] == 8
    await upload(client, "u", 5)
    assert (await client.next(2, id))["item"] == 10
    assert await client.next(3) == {"type": 3, "invocationId": id}


@everywhere
async def test_upload_streams_bind_in_order_beside_the_arguments(serve, wire) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("Zip", 7, streamIds=["b", "a"])
    await client.send({"type": 2, "invocationId": "a", "item": 1})
    await upload(client, "b", 2, 3)
    await upload(client, "a")
    assert await client.finish(id) == [[2, 3], 7, [1]]


async def test_a_non_blocking_call_may_upload(serve) -> None:
    hub = Observed.fresh()
    client = await (await serve(hub)).connect()
    await client.send(call("Up", streamIds=["u"]))
    await upload(client, "u", 1, 2)
    assert await soon(hub.seen.get()) == [1, 2]


@everywhere
@pytest.mark.parametrize("end, text", [
    ({}, "[1]"),
    ({"result": 9}, "[1]"),
    ({"error": "out of paper"}, "HubException: out of paper"),
])  # fmt: skip
async def test_an_upload_ends_as_its_completion_says(
    serve, wire, end: dict, text: str
) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("Read", streamIds=["u"])
    await upload(client, "u", 1, **end)
    assert await client.finish(id) == text


@everywhere
async def test_an_item_of_the_wrong_type_ends_that_upload_alone(
    serve, wire, caplog
) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("Read", streamIds=["u"])
    await client.send({"type": 2, "invocationId": "u", "item": "four"})
    assert "Failed to bind Stream message." in await client.finish(id)
    await upload(client, "u", 5)
    assert await client.invoke("Add", 1, 2) == 3
    assert "Calls.read: an item of 'numbers' does not fit" in caplog.text


@everywhere
async def test_a_method_may_return_before_its_upload_has_ended(serve, wire) -> None:
    client = await (await serve(Calls)).connect(wire)
    id = await client.begin("First", streamIds=["u"])
    await client.send({"type": 2, "invocationId": "u", "item": 4})
    assert await client.finish(id) == 4
    await upload(client, "u", *range(50))
    assert await client.invoke("Add", 1, 2) == 3
    assert client.unread == []


class Slow(Plain):
    """A method that takes an upload but reads it only when the test says so."""

    go: asyncio.Event

    @classmethod
    def fresh(cls) -> type["Slow"]:
        return type("Slow", (cls,), {"go": asyncio.Event()})

    async def slow(self, numbers: AsyncIterator[int]) -> int:
        await self.go.wait()
        return sum([n async for n in numbers])


@everywhere
@pytest.mark.parametrize("capacity", [2, 10])
async def test_a_full_upload_stream_holds_back_everything_behind_it(
    serve, wire, capacity: int
) -> None:
    hub = Slow.fresh()
    client = await (await serve(hub, stream_buffer_capacity=capacity)).connect(wire)
    slow = await client.begin("Slow", streamIds=["u"])
    items = [{"type": 2, "invocationId": "u", "item": 1}] * (capacity + 2)
    await client.send(*items)
    add = await client.begin("Add", 1, 2)
    await silence(0.05)
    assert client.unread == []
    hub.go.set()
    assert await client.finish(add) == 3
    await client.send({"type": 3, "invocationId": "u"})
    assert await client.finish(slow) == capacity + 2


async def test_as_many_items_wait_as_the_stream_buffer_holds(serve) -> None:
    hub = Slow.fresh()
    client = await (await serve(hub, stream_buffer_capacity=5)).connect()
    slow = await client.begin("Slow", streamIds=["u"])
    await client.send(*[{"type": 2, "invocationId": "u", "item": 1}] * 5)
    assert await client.invoke("Add", 1, 2) == 3
    hub.go.set()
    await client.send({"type": 3, "invocationId": "u"})
    assert await client.finish(slow) == 5


async def test_an_early_return_frees_what_a_full_upload_stream_held_back(serve) -> None:
    class Hasty(Slow):
        async def hasty(self, numbers: AsyncIterator[int]) -> int:
            await self.go.wait()
            return 1

    hub = Hasty.fresh()
    client = await (await serve(hub, stream_buffer_capacity=2)).connect()
    hasty = await client.begin("Hasty", streamIds=["u"])
    await client.send(*[{"type": 2, "invocationId": "u", "item": 1}] * 9)
    add = await client.begin("Add", 1, 2)
    hub.go.set()
    assert await client.finish(hasty) == 1
    assert await client.finish(add) == 3


@everywhere
async def test_reading_an_upload_fails_when_the_client_leaves(serve, wire) -> None:
    caught: asyncio.Queue = asyncio.Queue()

    class Reader(kestrun.Hub):
        async def read(self, numbers: AsyncIterator[int]) -> None:
            try:
                async for n in numbers:
                    caught.put_nowait(n)
            except BaseException as error:
                caught.put_nowait((type(error), str(error)))
                raise

    client = await (await serve(Reader, **BRISK)).connect(wire)
    await client.begin("Read", streamIds=["u"])
    await client.send({"type": 2, "invocationId": "u", "item": 4})
    assert await soon(caught.get()) == 4
    await client.leave()
    text = "The underlying connection was closed."
    assert await soon(caught.get()) == (ConnectionError, text)


# ------------------------------------------------------------- client results


class Asking(Plain):
    """A hub that asks its clients."""

    async def ask(self) -> str:
        return await self.clients.caller.invoke("GetName")

    async def ask_other(self, id: str) -> str:
        try:
            return await self.clients.client(id).invoke("GetName", "please")
        except ConnectionError as error:
            return f"{type(error).__name__}: {error}"


@everywhere
async def test_a_hub_may_ask_its_caller(serve, wire) -> None:
    client = await (await serve(Asking)).connect(wire)
    id = await client.begin("Ask")
    question = await client.next(1)
    assert (question["target"], question["arguments"]) == ("GetName", [])
    answer = {"type": 3, "invocationId": question["invocationId"], "result": "Ann"}
    await client.send(answer)
    assert await client.finish(id) == "Ann"


@everywhere
async def test_a_client_is_asked_from_outside_the_hub(serve, wire) -> None:
    server = await serve(Plain)
    client = await server.connect(wire)
    proxy = server.hub.clients.client(client.id)
    asking = asyncio.create_task(proxy.invoke("Add", 1, [2]))
    question = await client.next(1)
    assert question["arguments"] == [1, [2]]
    id = question["invocationId"]
    await client.send({"type": 3, "invocationId": id, "result": {"sum": 3}})
    assert await soon(asking) == {"sum": 3}


async def test_a_call_that_asks_its_client_frees_its_slot(serve) -> None:
    client = await (await serve(Asking)).connect()
    await client.begin("Ask")
    await client.next(1)
    assert await client.invoke("Add", 1, 2) == 3


async def test_questions_at_the_same_time_have_their_own_ids(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    proxy = server.hub.clients.client(client.id)
    asking = [asyncio.create_task(proxy.invoke("Echo", i)) for i in range(5)]
    questions = [await client.next(1) for _ in range(5)]
    for q in reversed(questions):
        result = q["arguments"][0]
        id = q["invocationId"]
        await client.send({"type": 3, "invocationId": id, "result": result})
    assert await soon(asyncio.gather(*asking)) == list(range(5))


async def test_the_client_may_answer_with_an_error(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    asking = asyncio.create_task(server.hub.clients.client(client.id).invoke("X"))
    id = (await client.next(1))["invocationId"]
    await client.send({"type": 3, "invocationId": id, "error": "busy"})
    with pytest.raises(kestrun.HubException, match="^busy$"):
        await soon(asking)


async def test_a_client_that_does_not_exist_cannot_be_asked(serve) -> None:
    server = await serve(Plain)
    with pytest.raises(ConnectionError, match=r"^Connection 'x' does not exist\.$"):
        await soon(server.hub.clients.client("x").invoke("GetName"))


@everywhere
async def test_a_client_that_leaves_before_answering_fails_the_question(
    serve, wire
) -> None:
    server = await serve(Plain, **BRISK)
    client = await server.connect(wire)
    asking = asyncio.create_task(server.hub.clients.client(client.id).invoke("X"))
    await client.next(1)
    await client.leave()
    text = re.escape(f"Connection '{client.id}' disconnected.")
    with pytest.raises(ConnectionError, match=f"^{text}$"):
        await soon(asking)


async def test_a_question_may_have_a_timeout_and_its_late_answer_is_ignored(
    serve,
) -> None:
    server = await serve(Plain)
    client = await server.connect()
    with pytest.raises(TimeoutError):
        await soon(server.hub.clients.client(client.id).invoke("X", timeout=0.05))
    id = (await client.next(1))["invocationId"]
    await client.send({"type": 3, "invocationId": id, "result": 1})
    assert await client.invoke("Add", 1, 2) == 3


async def test_one_client_may_ask_another_through_the_hub(serve) -> None:
    server = await serve(Asking)
    one, two = await server.connect(), await server.connect()
    id = await one.begin("AskOther", two.id)
    question = await two.next(1)
    assert question["arguments"] == ["please"]
    answer = {"type": 3, "invocationId": question["invocationId"], "result": "Bob"}
    await two.send(answer)
    assert await one.finish(id) == "Bob"


async def test_an_answer_from_another_connection_is_a_protocol_error(serve) -> None:
    server = await serve(Asking, enable_detailed_errors=True)
    one, two = await server.connect(), await server.connect()
    asking = await one.begin("Ask")
    id = (await one.next(1))["invocationId"]
    await two.send({"type": 3, "invocationId": id, "result": "Mallory"})
    close = await two.next(7)
    text = f"Connection ID '{two.id}' is not valid for invocation ID '{id}'."
    assert text in close["error"]
    await one.send({"type": 3, "invocationId": id, "result": "Ann"})
    assert await one.finish(asking) == "Ann"


async def test_nobody_is_asked_inside_on_connected(serve) -> None:
    caught: asyncio.Queue = asyncio.Queue()

    class Curious(kestrun.Hub):
        async def on_connected(self) -> None:
            try:
                await self.clients.caller.invoke("GetName")
            except kestrun.HubException as error:
                caught.put_nowait(str(error))

    await (await serve(Curious)).connect()
    text = "Client results inside OnConnectedAsync Hub methods are not allowed."
    assert await soon(caught.get()) == text


async def test_only_a_single_client_can_be_asked(serve) -> None:
    clients = (await serve(Plain)).hub.clients
    assert hasattr(clients.client("x"), "invoke")
    for proxy in (clients.all, clients.group("g"), clients.user("u")):
        assert not hasattr(proxy, "invoke")


# ------------------------------------------------------------------ lifecycle


@everywhere
async def test_calls_wait_until_on_connected_has_finished(serve, wire) -> None:
    log: list[str] = []
    go = asyncio.Event()

    class Slowly(kestrun.Hub):
        async def on_connected(self) -> None:
            log.append("connecting")
            await go.wait()
            log.append("connected")

        def hello(self) -> None:
            log.append("call")

        async def on_disconnected(self, error: Exception | None) -> None:
            log.append("disconnected")

    server = await serve(Slowly, **BRISK)
    client = await server.connect(wire)
    id = await client.begin("Hello")
    await silence(0.05)
    assert log == ["connecting"]
    go.set()
    await client.finish(id)
    await client.leave()
    await until(lambda: log[-1] == "disconnected")
    assert log == ["connecting", "connected", "call", "disconnected"]


@everywhere
async def test_the_context_tells_how_the_client_came(serve, wire) -> None:
    seen: asyncio.Queue = asyncio.Queue()

    class Telling(kestrun.Hub):
        async def on_connected(self) -> None:
            self.context.items["room"] = self.context.request.query["room"]

        def tell(self) -> None:
            seen.put_nowait(self.context)

    client = await (await serve(Telling)).connect(wire, query="?room=7&x=1")
    await client.invoke("Tell")
    context = await soon(seen.get())
    assert (context.transport, context.protocol) == wire
    assert (context.connection_id, context.user_id) == (client.id, None)
    assert (context.items, context.aborted) == ({"room": "7"}, False)
    assert isinstance(context.request, web.Request)


@everywhere
@pytest.mark.parametrize("detailed", [False, True])
async def test_a_client_that_the_hub_does_not_want_is_closed_for_good(
    serve, wire, detailed: bool
) -> None:
    left: list[Any] = []

    class Choosy(kestrun.Hub):
        async def on_connected(self) -> None:
            await self.groups.add(self.context.connection_id, "lobby")
            raise ValueError("not you")

        async def on_disconnected(self, error: Exception | None) -> None:
            left.append(error)

    server = await serve(Choosy, enable_detailed_errors=detailed)
    client = await server.connect(wire)
    text = CLOSED + " ValueError: not you" * detailed
    assert await client.next() == {"type": 7, "error": text}
    await client.end()
    await until(lambda: not server.hub.connections)
    assert (left, list(server.hub.groups.names())) == ([], [])


async def test_a_hub_exception_says_why_a_client_is_not_wanted(serve) -> None:
    class Choosy(kestrun.Hub):
        async def on_connected(self) -> None:
            raise kestrun.HubException("house full")

    client = await (await serve(Choosy)).connect()
    assert (await client.next())["error"] == CLOSED + " HubException: house full"


@everywhere
async def test_an_aborted_client_gets_a_close_that_forbids_to_reconnect(
    serve, wire
) -> None:
    class Aborting(Diary):
        def leave(self) -> None:
            self.context.abort()

    hub = Aborting.fresh()
    server = await serve(hub)
    client = await server.connect(wire)
    assert await hub.next() == "connected"
    context = server.hub.connections[client.id]
    await client.send(call("Leave"))
    assert await client.next(7) == {"type": 7}
    await soon(context.wait_aborted())
    assert (context.aborted, await hub.next()) == (True, None)
    await client.end()


async def test_a_client_is_aborted_from_outside_at_once(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    await until(lambda: client.id in server.hub.connections)
    assert server.hub.connections[client.id].abort() is None
    assert await client.next() == {"type": 7}
    await client.end()
    assert client.close_code == 1000


@everywhere
@pytest.mark.parametrize("error", [None, "battery empty"])
async def test_a_close_message_is_answered_and_ends_the_connection(
    serve, wire, error: str | None
) -> None:
    hub = Diary.fresh()
    server = await serve(hub)
    client = await server.connect(wire)
    await client.send({"type": 7} | ({"error": error} if error else {}))
    assert await client.next() == {"type": 7}
    assert await hub.next() == "connected"
    seen = await hub.next()
    assert (seen and (type(seen), str(seen))) == (
        error and (kestrun.HubException, error)
    )
    await client.end()


@everywhere
async def test_a_client_that_just_leaves_is_disconnected_without_error(
    serve, wire
) -> None:
    hub = Diary.fresh()
    server = await serve(hub, **BRISK)
    client = await server.connect(wire)
    assert await hub.next() == "connected"
    await client.leave()
    assert await hub.next() is None
    await until(lambda: not server.hub.connections)


async def test_a_lost_socket_is_a_disconnect(serve) -> None:
    hub = Diary.fresh()
    server = await serve(hub)
    client = await server.connect()
    assert await hub.next() == "connected"
    await client.cut()
    await hub.next()
    await until(lambda: not server.hub.connections)


async def test_on_disconnected_still_sees_the_groups_and_that_all_is_over(
    serve,
) -> None:
    seen: asyncio.Queue = asyncio.Queue()

    class Leaving(kestrun.Hub):
        async def on_connected(self) -> None:
            await self.groups.add(self.context.connection_id, "lobby")

        async def on_disconnected(self, error: Exception | None) -> None:
            groups = self.groups.of(self.context.connection_id)
            seen.put_nowait((list(groups), self.context.aborted))

    server = await serve(Leaving)
    client = await server.connect()
    await client.leave()
    assert await soon(seen.get()) == (["lobby"], True)
    await until(lambda: not list(server.hub.groups.names()))


async def test_a_failing_on_disconnected_is_logged_and_closes_with_1011(
    serve, caplog
) -> None:
    class Clumsy(kestrun.Hub):
        async def on_disconnected(self, error: Exception | None) -> None:
            raise ValueError("oops")

    server = await serve(Clumsy)
    client = await server.connect()
    await client.send({"type": 7})
    await client.end()
    await until(lambda: not server.hub.connections)
    assert client.close_code == 1011
    assert "ValueError: oops" in caplog.text


@everywhere
async def test_a_shutdown_tells_clients_to_come_back(serve, wire) -> None:
    server = await serve(Plain)
    client = await server.connect(wire)
    await client.invoke("Add", 1, 2)
    cleanup = asyncio.create_task(server.runner.cleanup())
    assert await client.next() == {"type": 7, "allowReconnect": True}
    await soon(cleanup)


# ------------------------------------------------------- hooks, several hubs


class Hooked(Plain):
    seen: list

    @classmethod
    def fresh(cls) -> type["Hooked"]:
        return type("Hooked", (cls,), {"seen": []})

    async def on_invocation(self, invocation: Any, call_next: Any) -> Any:
        if invocation.target == "refused":
            raise kestrun.HubException("not today")
        try:
            result = await call_next()
        except ValueError:
            result = "caught"
        self.seen.append((invocation.target, list(invocation.arguments), result))
        return result

    def refused(self) -> None:
        self.seen.append("called")

    def fail(self) -> None:
        raise ValueError


@everywhere
async def test_a_hook_sees_every_call_and_its_result(serve, wire) -> None:
    hub = Hooked.fresh()
    client = await (await serve(hub)).connect(wire)
    assert await client.invoke("add", 1, 2) == 3
    assert await client.invoke("fail") == "caught"
    assert hub.seen == [("add", [1, 2], 3), ("fail", [], "caught")]


async def test_a_hook_may_refuse_a_call(serve) -> None:
    hub = Hooked.fresh()
    client = await (await serve(hub)).connect()
    text = THREW.format("refused") + " HubException: not today"
    assert await client.error("refused") == text
    assert hub.seen == []


async def test_a_hook_sees_streams_too(serve) -> None:
    targets: list[str] = []

    class Watched(Plain):
        async def on_invocation(self, invocation: Any, call_next: Any) -> Any:
            targets.append(invocation.target)
            return await call_next()

    client = await (await serve(Watched)).connect()
    assert (await client.stream("counter", 2))[:2] == [0, 1]
    assert targets == ["counter"]


async def test_hubs_in_one_application_do_not_hear_each_other(serve) -> None:
    app = web.Application()
    chat = kestrun.map_hub(app, "/chat", Plain)
    news = kestrun.map_hub(app, "/deep/news", Asking)
    server = await serve(app=app)
    one, two = (
        await server.connect(path="/chat"),
        await server.connect(path="/deep/news"),
    )
    await chat.clients.all.send("Note", "chat")
    await news.clients.all.send("Note", "news")
    assert await one.received("Note") == ["chat"]
    assert await two.received("Note") == ["news"]
    assert (list(chat.connections), list(news.connections)) == ([one.id], [two.id])


async def test_the_same_hub_may_be_mounted_twice(serve) -> None:
    app = web.Application()
    hubs = [kestrun.map_hub(app, path, Plain) for path in ("/a", "/b")]
    server = await serve(app=app)
    one, two = await server.connect(path="/a"), await server.connect(path="/b")
    await hubs[1].groups.add(one.id, "g")
    await hubs[1].clients.all.send("Note", "b")
    assert await two.received("Note") == ["b"]
    assert await one.invoke("Add", 1, 2) == 3
    assert (one.unread, list(hubs[1].groups.names())) == ([], [])


# ------------------------------------------------------ arguments and results


class Colour(enum.Enum):
    RED = 1
    DEEP_BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    user_name: str = "nobody"


@dataclasses.dataclass
class Trail:
    points: list[Point]
    colour: Colour | None = None
    at: datetime.datetime | None = None


MOMENT = datetime.datetime(2026, 5, 4, 3, 2, 1, 250000, datetime.UTC)
IDENTITY = uuid.UUID("12345678-1234-5678-1234-567812345678")

# (annotation, what JSON brings, what the method sees)
ARGUMENTS = [
    (int, 3, 3),
    (float, 3.5, 3.5),
    (float, 3, 3.0),
    (str, "ä", "ä"),
    (bool, True, True),
    (bytes, "AP8=", b"\x00\xff"),
    (bytes, "", b""),
    (list[int], [1, 2], [1, 2]),
    (list[list[str]], [["a"], []], [["a"], []]),
    (dict[str, int], {"snake_key": 1}, {"snake_key": 1}),
    (int | None, None, None),
    (int | None, 5, 5),
    (str | int, "x", "x"),
    (str | int, 5, 5),
    (Any, {"a": [1]}, {"a": [1]}),
    (Point, {"x": 1, "userName": "Ann"}, Point(1, "Ann")),
    (Point, {"X": 1, "USERNAME": "Ann"}, Point(1, "Ann")),
    (Point, {"x": 1, "user_name": "Ann"}, Point(1, "Ann")),
    (Point, {"x": 1}, Point(1)),
    (Point | None, {"x": 1}, Point(1)),
    (list[Point], [{"x": 1}, {"x": 2}], [Point(1), Point(2)]),
    (dict[str, Point], {"a": {"x": 1}}, {"a": Point(1)}),
    (
        Trail,
        {"points": [{"x": 1}], "colour": "blue", "at": "2026-05-04T03:02:01.25Z"},
        Trail([Point(1)], Colour.DEEP_BLUE, MOMENT),
    ),
    (Trail, {"points": [], "colour": None}, Trail([])),
    (Colour, 1, Colour.RED),
    (Colour, "blue", Colour.DEEP_BLUE),
    (Colour, "RED", Colour.RED),
    (Colour, "DEEP_BLUE", Colour.DEEP_BLUE),
    (datetime.datetime, "2026-05-04T03:02:01.250Z", MOMENT),
    (datetime.datetime, "2026-05-04T05:02:01.25+02:00", MOMENT),
    (uuid.UUID, str(IDENTITY), IDENTITY),
    (uuid.UUID, str(IDENTITY).upper(), IDENTITY),
]
WRONG_ARGUMENTS = [
    (int, "3"), (int, 3.5), (int, True), (int, None), (int, []),
    (float, "1"), (float, None), (float, True), (float, 10**400),
    (str, 5), (str, None), (bool, 1), (bool, "true"),
    (bytes, "not base64!"), (bytes, "A"), (bytes, 5), (bytes, "ä"),
    (list[int], ["x"]), (list[int], {}), (list[int], "12"), (dict[str, int], []),
    (dict[str, int], {"a": "b"}), (int | None, "x"), (str | int, 1.5),
    (Point, {}), (Point, {"x": "a"}), (Point, 5), (Point, None), (Point, [1, "a"]),
    (list[Point], [{"x": 1}, {}]), (Trail, {"points": [{}]}),
    (Colour, "purple"), (Colour, 7), (Colour, None), (Colour, []), (Colour, {}),
    (datetime.datetime, "yesterday"), (datetime.datetime, 5), (datetime.datetime, ""),
    (uuid.UUID, "nope"), (uuid.UUID, 5),
]  # fmt: skip


def taking(annotation: Any) -> tuple[type[kestrun.Hub], list]:
    """A hub whose method `take` wants that type, and the list of what it got."""
    seen: list = []

    def take(self, first: int, peculiar: annotation) -> None:
        seen.append(peculiar)

    return type("Taking", (Plain,), {"take": take}), seen


@pytest.mark.parametrize("annotation, value, expected", ARGUMENTS)
async def test_an_argument_is_converted_to_its_annotation(
    serve, annotation: Any, value: Any, expected: Any
) -> None:
    hub, seen = taking(annotation)
    client = await (await serve(hub)).connect()
    await client.invoke("Take", 1, value)
    assert seen == [expected]
    assert annotation is float or type(seen[0]) is type(expected)


@pytest.mark.parametrize("annotation, value", WRONG_ARGUMENTS)
async def test_an_argument_that_does_not_fit_fails_its_call_and_is_named_in_the_log(
    serve, caplog, annotation: Any, value: Any
) -> None:
    hub, seen = taking(annotation)
    client = await (await serve(hub)).connect()
    with caplog.at_level(logging.DEBUG, "kestrun"):
        assert await client.error("Take", 1, value) == FAILED.format("Take")
    assert any("peculiar" in r.getMessage() for r in caplog.records)
    assert (seen, await client.invoke("Add", 1, 2)) == ([], 3)


@pytest.mark.parametrize("annotation, value, expected", [
    (bytes, b"\x00\xff", b"\x00\xff"),
    (datetime.datetime, MOMENT, MOMENT),
    (datetime.datetime, "2026-05-04T03:02:01.250Z", MOMENT),
    (uuid.UUID, str(IDENTITY), IDENTITY),
    (Colour, "DEEP_BLUE", Colour.DEEP_BLUE),
    (Point, {"UserName": "Ann", "X": 1}, Point(1, "Ann")),
    (dict[int, str], {1: "a"}, {1: "a"}),
])  # fmt: skip
async def test_messagepack_brings_arguments_in_its_own_types(
    serve, annotation: Any, value: Any, expected: Any
) -> None:
    hub, seen = taking(annotation)
    client = await (await serve(hub)).connect(MESSAGEPACK)
    await client.invoke("Take", 1, value)
    assert seen == [expected]


async def test_upload_items_are_converted_like_arguments(serve) -> None:
    class Lines(kestrun.Hub):
        async def length(self, points: AsyncIterator[Point]) -> list[str]:
            return [p.user_name async for p in points]

    client = await (await serve(Lines)).connect()
    id = await client.begin("Length", streamIds=["u"])
    await upload(client, "u", {"x": 1, "userName": "Ann"}, {"X": 2})
    assert await client.finish(id) == ["Ann", "nobody"]


TEXTS = """
from __future__ import annotations
import dataclasses
from collections.abc import AsyncIterator
import kestrun

@dataclasses.dataclass
class Box:
    size: int

class Texts(kestrun.Hub):
    def grow(self, box: Box, by: int) -> Box:
        return Box(box.size + by)

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([n async for n in numbers])
"""


async def test_annotations_may_be_written_as_text(serve, tmp_path, monkeypatch) -> None:
    (tmp_path / "kestrun_texts.py").write_text(TEXTS)
    monkeypatch.syspath_prepend(tmp_path)
    hub = importlib.import_module("kestrun_texts").Texts
    client = await (await serve(hub)).connect()
    assert await client.invoke("Grow", {"size": 2}, 3) == {"size": 5}
    id = await client.begin("Total", streamIds=["u"])
    await upload(client, "u", 1, 2)
    assert await client.finish(id) == 3


# (result, JSON, MessagePack)
RESULTS = [
    (Point(1, "Ann"), {"x": 1, "userName": "Ann"}, ...),
    ([Point(1)], [{"x": 1, "userName": "nobody"}], ...),
    (
        {"snake_key": Point(1, "a")},
        {"snake_key": {"x": 1, "userName": "a"}},
        ...,
    ),
    (
        Trail([Point(1)], Colour.RED),
        {"points": [{"x": 1, "userName": "nobody"}], "colour": 1, "at": None},
        ...,
    ),
    (Colour.RED, 1, ...),
    (Colour.DEEP_BLUE, "blue", ...),
    (b"\x00\xff", "AP8=", b"\x00\xff"),
    ([b"x"], ["eA=="], [b"x"]),
    (IDENTITY, str(IDENTITY), ...),
    ((1, "a"), [1, "a"], ...),
    (None, None, ...),
    ({"a": {"b": [Colour.RED, IDENTITY]}}, {"a": {"b": [1, str(IDENTITY)]}}, ...),
]


def returning(result: Any) -> type[kestrun.Hub]:
    class Returning(kestrun.Hub):
        def take(self):
            return result

        async def takes(self) -> AsyncIterator[Any]:
            yield result

    return Returning


@both_protocols
@pytest.mark.parametrize("result, text, binary", RESULTS)
async def test_a_result_is_written_as_the_contract_says(
    serve, protocol: str, result: Any, text: Any, binary: Any
) -> None:
    client = await (await serve(returning(result))).connect(("WebSockets", protocol))
    expected = text if protocol == "json" or binary is ... else binary
    assert await client.invoke("Take") == expected
    assert (await client.stream("Takes"))[0] == expected


@both_protocols
async def test_a_datetime_is_iso_text_in_json_and_a_timestamp_in_messagepack(
    serve, protocol: str
) -> None:
    hub = returning([MOMENT])
    client = await (await serve(hub)).connect(("WebSockets", protocol))
    (moment,) = await client.invoke("Take")
    if protocol == "json":
        moment = datetime.datetime.fromisoformat(moment)
    assert moment == MOMENT


@everywhere
async def test_what_is_sent_to_clients_is_written_like_results(serve, wire) -> None:
    server = await serve(Plain)
    client = await server.connect(wire)
    await server.hub.clients.all.send(
        "Note", Point(1, "Ann"), Colour.RED, b"x", IDENTITY
    )
    data = "eA==" if wire[1] == "json" else b"x"
    assert await client.received("Note") == [
        {"x": 1, "userName": "Ann"},
        1,
        data,
        str(IDENTITY),
    ]


# ------------------------------------------------- keep-alive and slow clients


@pytest.mark.parametrize("wire", [w for w in WIRES if w[0] != "LongPolling"])
async def test_the_server_pings_a_silent_line(serve, wire) -> None:
    client = await (await serve(Plain, keep_alive_interval=0.05)).connect(wire)
    for _ in range(3):
        assert await client.next(6) == {"type": 6}


async def test_long_polling_has_no_pings(serve) -> None:
    server, url = await polled(serve, keep_alive_interval=0.02, poll_timeout=0.15)
    assert (await server.request("GET", url)).plain == (200, "text/plain", "")


@everywhere
async def test_a_client_that_never_pings_is_never_timed_out(serve, wire) -> None:
    client = await (await serve(Plain, client_timeout_interval=0.05)).connect(wire)
    await silence(0.2)
    assert await client.invoke("Add", 1, 2) == 3


TIMED_OUT = (
    " OperationCanceledException: Client hasn't sent a message/ping within the "
    "configured ClientTimeoutInterval."
)


@everywhere
@pytest.mark.parametrize("detailed", [False, True])
async def test_a_client_that_pinged_and_then_fell_silent_is_timed_out(
    serve, wire, detailed: bool
) -> None:
    hub = Diary.fresh()
    options = {"client_timeout_interval": 0.05, "enable_detailed_errors": detailed}
    client = await (await serve(hub, **options)).connect(wire)
    await client.send({"type": 6})
    close = {**CLOSE, "error": CLOSED + TIMED_OUT * detailed}
    assert await client.next() == close
    assert await hub.next() == "connected"
    assert isinstance(await hub.next(), Exception)


async def test_a_client_that_goes_on_pinging_lives_on(serve) -> None:
    client = await (await serve(Plain, client_timeout_interval=0.5)).connect()
    for _ in range(10):
        await client.send({"type": 6})
        await silence(0.1)
    assert await client.invoke("Add", 1, 2) == 3


async def test_the_client_timeout_stands_still_while_a_call_is_running(serve) -> None:
    hub = Gate.fresh()
    client = await (await serve(hub, client_timeout_interval=0.05)).connect()
    waiting = call("Wait", 0, invocationId="w")
    queue = [call("Note", i) for i in range(5000)]
    await client.send({"type": 6}, waiting, *queue)
    await silence(0.2)
    hub.gates[0].set()
    assert await client.finish("w") == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stalled_reader_is_cut_and_others_lose_nothing(
    serve, transport: str
) -> None:
    server = await serve(Plain, outbox_limit=200_000)
    client = await server.connect()
    line = await stalled(server, transport)
    await until(lambda: len(server.hub.connections) == 2)
    for i in range(800):
        await server.hub.clients.all.send("Note", i, "x" * 16_000)
        assert (await client.received("Note"))[0] == i
    await until(lambda: list(server.hub.connections) == [client.id])
    del line


async def stalled(server: Server, transport: str) -> Any:
    """A client that shakes hands and then never reads again."""
    if transport == "WebSockets":
        return await RawSocket.open(server, receive_buffer=4096, limit=4096)
    url = "/hub?id=" + (await server.negotiated())["connectionToken"]
    if transport == "LongPolling":
        await server.request("GET", url)
    else:
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"GET {url} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
        sock.sendall(head.encode())
    await server.request("POST", url, data=HELLO)
    return None if transport == "LongPolling" else sock


async def test_a_line_without_progress_is_cut_after_its_timeout(serve) -> None:
    options = {"outbox_limit": None, "transport_send_timeout": 0.2}
    server = await serve(Plain, **options)
    raw = await RawSocket.open(server, receive_buffer=4096, limit=4096)
    for _ in range(100):
        await server.hub.clients.all.send("Note", "x" * 100_000)
    await until(lambda: not server.hub.connections)
    raw.writer.close()


async def crowded(server: Server, room: Any) -> RawSocket:
    """A client that owes more than it may, which the next message will judge."""
    raw = await RawSocket.open(server, receive_buffer=4096, limit=4096)
    await until(lambda: len(server.hub.connections) == len(server.clients) + 1)
    for size in (20_000_000, 300_000):
        await room.send("Note", size, "x" * size)
        for _ in range(3):
            await asyncio.sleep(0)
    assert server.hub.stats()["queued_bytes"] > 200_000
    return raw


class Regrouping(Plain):
    begun: ClassVar[list[str]] = []

    async def on_connected(self) -> None:
        await self.groups.add(self.context.connection_id, "g")

    async def regroup(self) -> None:
        self.begun.append(self.context.connection_id)
        await self.groups.remove(self.context.connection_id, "g")


async def test_calls_of_a_client_that_a_broadcast_cuts_begin_no_more(serve) -> None:
    server = await serve(Regrouping, outbox_limit=200_000)
    clients, room = [await server.connect() for _ in range(2)], server.hub.clients
    raw = await crowded(server, room.group("g"))
    clients.append(await server.connect())
    heard = server.hub.stats()["messages_in"]
    for _ in range(3):
        raw.send(1, encode("json", call("Regroup")))
    await until(lambda: server.hub.stats()["messages_in"] == heard + 3)
    await room.group("g").send("Note", "last")
    for client in clients:
        while (await client.received("Note"))[0] != "last":
            pass
    await until(lambda: len(server.hub.connections) == len(clients))
    assert Regrouping.begun == []
    assert server.hub.stats()["cuts"] == {"slow client": 1}


async def test_a_close_that_is_too_much_for_a_slow_client_ends_it_once(serve) -> None:
    server = await serve(Plain, outbox_limit=200_000)
    raw = await crowded(server, server.hub.clients.all)
    client = await server.connect()
    await server.runner.cleanup()
    assert (await client.next(7)) == {"type": 7, "allowReconnect": True}
    raw.writer.close()


async def test_a_burst_for_a_client_that_reads_is_not_cut(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    for i in range(500):
        await server.hub.clients.all.send("Note", i, "x" * 1000)
    assert [(await client.received("Note"))[0] for _ in range(500)] == list(range(500))


# --------------------------------------------------- clients, groups, presence


class Social(Plain):
    """Sends to whom the client names; users come from the query."""

    async def tell(self, whom: str, text: str) -> None:
        proxy = getattr(self.clients, whom)
        await (proxy("g") if whom == "others_in_group" else proxy).send("Note", text)

    async def join(self, name: str) -> None:
        await self.groups.add(self.context.connection_id, name)

    async def leave(self, name: str) -> None:
        await self.groups.remove(self.context.connection_id, name)


async def user_of(request: web.Request) -> str | None:
    return request.query.get("user")


async def three(serve, wire=("WebSockets", "json")) -> tuple[Server, list[Client]]:
    """Ann, Ann again and Bob; the first two are in group g, Bob is in h."""
    server = await serve(Social, authenticate=user_of, **BRISK)
    users = ("Ann", "Ann", "Bob")
    people = [await server.connect(wire, query=f"?user={user}") for user in users]
    for person, group in zip(people, "ggh", strict=True):
        await person.invoke("Join", group)
    return server, people


async def heard(server: Server, people: list[Client]) -> str:
    """Who of a, b and c has received the note, once everything has arrived."""
    await server.hub.clients.all.send("End")
    names = ""
    for name, person in zip("abc", people, strict=True):
        while (message := await person.next(1))["target"] != "End":
            assert message["target"] == "Note"
            names += name
    return names


ADDRESSES: list[tuple[str, Callable, str]] = [
    ("all", lambda c, ids: c.all, "abc"),
    ("all_except", lambda c, ids: c.all_except([ids[0]]), "bc"),
    ("all_except nobody", lambda c, ids: c.all_except([]), "abc"),
    ("client", lambda c, ids: c.client(ids[1]), "b"),
    ("clients", lambda c, ids: c.clients([ids[0], ids[2], "gone"]), "ac"),
    ("group", lambda c, ids: c.group("g"), "ab"),
    ("group in capitals", lambda c, ids: c.group("G"), ""),
    ("groups", lambda c, ids: c.groups(["g", "h", "none"]), "abc"),
    ("group_except", lambda c, ids: c.group_except("g", [ids[0]]), "b"),
    ("user", lambda c, ids: c.user("Ann"), "ab"),
    ("user in small letters", lambda c, ids: c.user("ann"), ""),
    ("users", lambda c, ids: c.users(["Bob", "Eve"]), "c"),
    ("client that is gone", lambda c, ids: c.client("gone"), ""),
    ("empty group", lambda c, ids: c.group("none"), ""),
    ("unknown user", lambda c, ids: c.user("Eve"), ""),
    ("no clients", lambda c, ids: c.clients([]), ""),
]


@pytest.mark.parametrize(
    "address, receivers", [a[1:] for a in ADDRESSES], ids=[a[0] for a in ADDRESSES]
)
async def test_a_message_reaches_whom_the_hub_context_names(
    serve, address: Callable, receivers: str
) -> None:
    server, people = await three(serve)
    await address(server.hub.clients, [p.id for p in people]).send("Note", "hi")
    assert await heard(server, people) == receivers


@everywhere
@pytest.mark.parametrize("whom, receivers", [
    ("caller", "a"), ("others", "bc"), ("others_in_group", "b"), ("all", "abc"),
])  # fmt: skip
async def test_a_hub_tells_its_caller_from_the_others(
    serve, wire, whom: str, receivers: str
) -> None:
    server, people = await three(serve, wire)
    await people[0].invoke("Tell", whom, "hi")
    assert await heard(server, people) == receivers


async def test_one_message_reaches_clients_of_every_transport_and_protocol(
    serve,
) -> None:
    server = await serve(Plain)
    people = [await server.connect(wire) for wire in WIRES]
    await server.hub.clients.all.send("Note", "ä", [1, None])
    for person in people:
        assert await person.received("Note") == ["ä", [1, None]]


@everywhere
async def test_messages_arrive_in_the_order_of_sending(serve, wire) -> None:
    server = await serve(Plain)
    client = await server.connect(wire)
    for i in range(200):
        await server.hub.clients.all.send("Note", i)
    assert [(await client.received("Note"))[0] for _ in range(200)] == list(range(200))


@everywhere
async def test_groups_know_who_is_there(serve, wire) -> None:
    server, (a, b, c) = await three(serve, wire)
    groups = server.hub.groups
    assert sorted(groups.members("g")) == sorted([a.id, b.id])
    assert sorted(groups.names()) == ["g", "h"]
    await c.invoke("Join", "g")
    assert sorted(groups.of(c.id)) == ["g", "h"]
    await c.invoke("Leave", "h")
    assert list(groups.of(c.id)) == ["g"]
    assert sorted(groups.names()) == ["g"]


@everywhere
async def test_groups_forget_who_leaves(serve, wire) -> None:
    server, (a, b, _) = await three(serve, wire)
    await a.leave()
    await until(lambda: len(server.hub.connections) == 2)
    assert list(server.hub.groups.members("g")) == [b.id]
    await b.leave()
    await until(lambda: len(server.hub.connections) == 1)
    assert list(server.hub.groups.names()) == ["h"]
    assert list(server.hub.groups.of(a.id)) == []


async def test_joining_twice_is_joining_once_and_leaving_needs_no_joining(
    serve,
) -> None:
    server, people = await three(serve)
    await people[0].invoke("Join", "g")
    await people[2].invoke("Leave", "g")
    await people[2].invoke("Leave", "never heard of")
    await server.hub.clients.group("g").send("Note")
    assert await heard(server, people) == "ab"
    await people[0].invoke("Leave", "g")
    assert list(server.hub.groups.members("g")) == [people[1].id]


async def test_adding_an_unknown_connection_to_a_group_does_nothing(serve) -> None:
    groups = (await serve(Plain)).hub.groups
    await groups.add("nobody", "g")
    await groups.remove("nobody", "g")
    assert (list(groups.members("g")), list(groups.names())) == ([], [])
    assert list(groups.of("nobody")) == []


async def test_groups_are_changed_from_outside_the_hub_too(serve) -> None:
    server, people = await three(serve)
    await server.hub.groups.add(people[2].id, "g")
    await server.hub.groups.remove(people[0].id, "g")
    await server.hub.clients.group("g").send("Note")
    assert await heard(server, people) == "bc"


@pytest.mark.parametrize("argument", [object(), {1, 2}, float("nan"), print])
async def test_what_cannot_be_written_is_the_senders_error(serve, argument) -> None:
    server = await serve(Plain)
    client = await server.connect()
    with pytest.raises((TypeError, ValueError)):
        await server.hub.clients.all.send("Note", argument)
    await server.hub.clients.all.send("Next")
    assert await client.received("Next") == []


async def test_what_cannot_be_written_is_an_error_whoever_is_there(serve) -> None:
    clients = (await serve(Plain)).hub.clients
    for nobody in (clients.all, clients.client("gone"), clients.group("g")):
        with pytest.raises(TypeError):
            await nobody.send("Note", object())


async def test_the_hub_context_knows_its_connections(serve) -> None:
    server = await serve(Plain, authenticate=user_of)
    connections = server.hub.connections
    assert len(connections) == 0
    client = await server.connect(query="?user=Ann")
    await client.invoke("Add", 1, 2)
    assert list(connections) == [client.id]
    assert connections[client.id].connection_id == client.id
    assert connections[client.id].user_id == "Ann"


async def test_the_connections_of_the_hub_context_cannot_be_changed(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    with pytest.raises(TypeError):
        server.hub.connections["x"] = None
    with pytest.raises(TypeError):
        del server.hub.connections[client.id]


async def test_the_statistics_change_with_the_traffic(serve) -> None:
    server = await serve(Plain)
    before = repr(server.hub.stats())
    client = await server.connect()
    await client.invoke("Add", 1, 2)
    assert repr(server.hub.stats()) != before


@everywhere
async def test_the_statistics_count_each_message_of_a_joined_burst(serve, wire) -> None:
    server = await serve(Plain)
    people = [await server.connect(wire) for _ in range(4)]
    for person, name in zip(people, "aabb", strict=True):
        await server.hub.groups.add(person.id, name)
    before = server.hub.stats()["messages_out"]
    await asyncio.gather(
        *(server.hub.clients.group(n).send("Note", i) for i in range(5) for n in "ab")
    )
    await server.hub.clients.client(people[0].id).send("Last")
    for person in people:
        assert [await person.received("Note") for _ in range(5)] == [
            [i] for i in range(5)
        ]
    await people[0].received("Last")
    assert server.hub.stats()["messages_out"] - before == 4 * 5 + 1


# ----------------------------------------------- authentication, origins, CORS


TOKENS = {"a-secret": "Ann", "b-secret": "Bob"}


async def by_token(request: web.Request) -> str | None:
    """Ann and Bob have tokens; Mallory is known and not wanted."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    token = token or request.query.get("access_token", "")
    if token == "m-secret":
        raise web.HTTPForbidden
    if token not in TOKENS:
        raise web.HTTPUnauthorized
    return TOKENS[token]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


REQUESTS = [
    ("POST", "/hub/negotiate?negotiateVersion=1", {}),
    ("GET", "/hub?id={}", {}),
    ("GET", "/hub?id={}", {"Accept": "text/event-stream"}),
    ("GET", "/hub?id={}", UPGRADE),
    ("GET", "/hub", UPGRADE),
    ("POST", "/hub?id={}", {}),
    ("DELETE", "/hub?id={}", {}),
]


async def anns_token(server: Server) -> str:
    url = "/hub/negotiate?negotiateVersion=1"
    answer = await server.request("POST", url, headers=bearer("a-secret"))
    return answer.json["connectionToken"]


@pytest.mark.parametrize("method, url, headers", REQUESTS)
@pytest.mark.parametrize("token, status", [("", 401), ("junk", 401), ("m-secret", 403)])
async def test_every_request_is_authenticated_on_its_own(
    serve, method: str, url: str, headers: dict, token: str, status: int
) -> None:
    server = await serve(Plain, authenticate=by_token)
    url = url.format(await anns_token(server))
    headers = {**headers, **(bearer(token) if token else {})}
    assert (await server.request(method, url, headers=headers)).status == status


@pytest.mark.parametrize("method, url, headers", [r for r in REQUESTS if "{}" in r[1]])
async def test_the_connection_of_another_user_is_forbidden(
    serve, method: str, url: str, headers: dict
) -> None:
    server = await serve(Plain, authenticate=by_token)
    url = url.format(await anns_token(server))
    headers = {**headers, **bearer("b-secret")}
    assert (await server.request(method, url, headers=headers)).status == 403


@everywhere
@pytest.mark.parametrize("place", ["header", "query"])
async def test_the_user_is_known_from_header_or_query(serve, wire, place: str) -> None:
    class Who(kestrun.Hub):
        def who(self) -> str | None:
            return self.context.user_id

    server = await serve(Who, authenticate=by_token)
    query = ""
    if place == "header":
        server.headers = bearer("a-secret")
    else:
        query = "?access_token=a-secret"
    client = await server.connect(wire, query=query)
    assert await client.invoke("Who") == "Ann"


async def test_authentication_may_leave_a_client_without_a_name(serve) -> None:
    server = await serve(Social, authenticate=user_of)
    client = await server.connect()
    assert await client.invoke("Add", 1, 2) == 3
    assert server.hub.connections[client.id].user_id is None


FRIEND = "https://friend.example"
STRANGER = "https://stranger.example"
PREFLIGHT = {
    "Origin": FRIEND,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "x-requested-with,authorization,x-mine",
}


def words(header: str) -> set[str]:
    return {word.strip().lower() for word in header.split(",")}


@pytest.mark.parametrize("url", ["/hub/negotiate?negotiateVersion=1", "/hub?id=x&_=5"])
async def test_a_preflight_is_granted_to_an_allowed_origin_without_a_token(
    serve, url: str
) -> None:
    server = await serve(Plain, allowed_origins=(FRIEND,), authenticate=by_token)
    answer = await server.request("OPTIONS", url, headers=PREFLIGHT)
    assert answer.status in (200, 204)
    assert answer.headers["Access-Control-Allow-Origin"] == FRIEND
    assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    methods = words(answer.headers["Access-Control-Allow-Methods"])
    assert {"get", "post", "delete"} <= methods
    allowed = words(answer.headers["Access-Control-Allow-Headers"])
    assert {"x-requested-with", "authorization", "x-mine"} <= allowed


@pytest.mark.parametrize("method, url, status", [
    ("POST", "/hub/negotiate?negotiateVersion=1", 200),
    ("GET", "/hub?id={}", 200),
    ("GET", "/hub", 400),
    ("GET", "/hub?id=nobody", 404),
    ("POST", "/hub?id={}", 200),
    ("POST", "/hub?id=nobody", 404),
    ("DELETE", "/hub?id={}", 400),
    ("PUT", "/hub?id={}", 405),
    ("GET", "/hub/negotiate", 405),
])  # fmt: skip
async def test_every_answer_names_the_allowed_origin(
    serve, method: str, url: str, status: int
) -> None:
    server = await serve(Plain, allowed_origins=(FRIEND,))
    url = url.format((await server.negotiated())["connectionToken"])
    answer = await server.request(method, url, headers={"Origin": FRIEND})
    assert answer.status == status
    assert answer.headers.get("Access-Control-Allow-Origin") == FRIEND
    assert answer.headers.get("Access-Control-Allow-Credentials") == "true"
    assert "origin" in words(answer.headers.get("Vary", ""))


@pytest.mark.parametrize("token, status", [("junk", 401), ("m-secret", 403)])
async def test_a_refusal_names_the_allowed_origin_too(serve, token, status) -> None:
    server = await serve(Plain, allowed_origins=(FRIEND,), authenticate=by_token)
    headers = {"Origin": FRIEND, **bearer(token)}
    answer = await server.request("POST", "/hub/negotiate", headers=headers)
    assert answer.status == status
    assert answer.headers.get("Access-Control-Allow-Origin") == FRIEND


async def test_an_event_stream_names_the_allowed_origin(serve) -> None:
    server = await serve(Plain, allowed_origins=(FRIEND,))
    server.headers = {"Origin": FRIEND}
    client = await server.connect(("ServerSentEvents", "json"))
    headers = client.stream_response.headers
    assert headers["Access-Control-Allow-Origin"] == FRIEND
    assert headers["Access-Control-Allow-Credentials"] == "true"


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_a_stranger_gets_no_cors_headers(serve, method: str) -> None:
    server = await serve(Plain, allowed_origins=(FRIEND,))
    headers = {**PREFLIGHT, "Origin": STRANGER}
    answer = await server.request(method, "/hub/negotiate", headers=headers)
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("allowed", [(), (FRIEND,)])
async def test_a_socket_from_a_strange_page_is_refused(serve, allowed: tuple) -> None:
    server = await serve(Plain, allowed_origins=allowed)
    headers = {"Origin": STRANGER}
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await server.http.ws_connect("/hub", headers=headers)
    assert refusal.value.status == 403


@everywhere
@pytest.mark.parametrize("kind", ["own", "friend", "none"])
async def test_pages_of_the_server_and_of_friends_may_connect(
    serve, wire, kind: str
) -> None:
    server = await serve(Plain, allowed_origins=(FRIEND,))
    origin = {"own": server.origin, "friend": FRIEND}.get(kind)
    server.headers = {"Origin": origin} if origin else {}
    client = await server.connect(wire)
    assert await client.invoke("Add", 1, 2) == 3


# --------------------------------------------------------- stateful reconnect


class Steady(Diary, Plain):
    """A hub for connections that survive their socket."""

    async def tick(self, gates: int) -> AsyncIterator[int]:
        for i in range(gates):
            yield i
            await asyncio.sleep(0.02)

    async def long(self, count: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield "x" * 300

    async def join(self, name: str) -> None:
        await self.groups.add(self.context.connection_id, name)

    async def ask(self) -> str:
        return await self.clients.caller.invoke("GetName")

    def note(self, value) -> None:
        self.pages.put_nowait(value)


async def steady(serve, protocol: str = "json", **options: Any) -> tuple[Any, Client]:
    """A hub's diary and a client with stateful reconnect."""
    hub = Steady.fresh()
    options = {"allow_stateful_reconnects": True, **options}
    server = await serve(hub, **options)
    client = server.client(("WebSockets", protocol))
    assert await client.start(version=2, useStatefulReconnect="true") == {}
    assert client.negotiated["useStatefulReconnect"] is True
    assert await hub.next() == "connected"
    return hub, client


async def ack(client: Client, number: int) -> None:
    await client.send({"type": 8, "sequenceId": number})


@both_protocols
async def test_the_transcript_of_the_reference_is_followed(serve, protocol) -> None:
    hub, client = await steady(serve, protocol)
    everyone = client.server.hub.clients.all
    for i in (1, 2):
        await everyone.send("m", i)
        assert await client.received("m") == [i]
    await ack(client, 2)
    await client.send(call("Note", 1))
    assert await hub.next() == 1
    await everyone.send("m", 3)
    assert await client.received("m") == [3]
    await client.cut()
    await everyone.send("m", 4)
    client.unread.clear()
    await client.open()
    assert await client.next() == {"type": 9, "sequenceId": 3}
    assert [await client.received("m") for _ in "34"] == [[3], [4]]
    await client.send({"type": 9, "sequenceId": 1}, call("Note", 1))
    await ack(client, 4)
    assert await client.next(8) == {"type": 8, "sequenceId": 1}
    assert hub.pages.empty()


@both_protocols
async def test_the_first_message_on_the_new_socket_is_the_sequence(
    serve, protocol
) -> None:
    _, client = await steady(serve, protocol, keep_alive_interval=0.01)
    for _ in range(3):
        await client.cut()
        client.unread.clear()
        await client.server.hub.clients.all.send("m")
        await client.open()
        await until(lambda: client.unread)
        assert client.unread[0] == {"type": 9, "sequenceId": 1}


async def test_the_sequence_is_the_next_number_when_everything_is_acked(serve) -> None:
    hub, client = await steady(serve)
    for number in (1, 2, 3):
        await client.invoke("Add", 1, 2)
        await ack(client, number)
    await client.send(call("Note", "the acks have been read"))
    assert await hub.next() == "the acks have been read"
    await client.cut()
    client.unread.clear()
    await client.open()
    assert await client.next() == {"type": 9, "sequenceId": 4}


async def test_messages_that_the_client_repeats_are_dropped(serve) -> None:
    hub, client = await steady(serve)
    await client.send(call("Note", 1), call("Note", 2))
    assert [await hub.next(), await hub.next()] == [1, 2]
    await client.cut()
    await client.open()
    await client.next(9)
    await client.send({"type": 9, "sequenceId": 1})
    await client.send(*(call("Note", i) for i in (1, 2, 3)))
    assert await hub.next() == 3


@both_protocols
async def test_nothing_is_lost_or_doubled_over_many_drops(serve, protocol) -> None:
    _, client = await steady(serve, protocol)
    got: list[int] = []
    number = latest = 0
    for i in range(100):
        await client.server.hub.clients.all.send("m", i)
        if i % 10 == 5:
            await client.cut()
            await client.open()
    while len(got) < 100:
        message = await client.next()
        if message["type"] == 9:
            number = message["sequenceId"] - 1
        elif message["type"] == 1:
            number += 1
            if number > latest:
                latest = number
                got += message["arguments"]
    assert got == list(range(100))


@both_protocols
async def test_the_hub_does_not_notice_a_reconnect(serve, protocol) -> None:
    hub, client = await steady(serve, protocol)
    await client.invoke("Join", "g")
    ticks = await client.begin("Tick", 20, type=4)
    assert (await client.next(2, ticks))["item"] == 0
    ask = await client.begin("Ask")
    question = (await client.next(1))["invocationId"]
    await client.cut()
    await client.open()
    await client.next(9)
    await client.send({"type": 9, "sequenceId": 4})
    await client.send({"type": 3, "invocationId": question, "result": "Ann"})
    assert await client.finish(ask) == "Ann"
    assert (await client.next(3, ticks)) == {"type": 3, "invocationId": ticks}
    assert list(client.server.hub.groups.members("g")) == [client.id]
    assert list(client.server.hub.connections) == [client.id]
    assert hub.pages.empty()


async def test_a_client_that_comes_back_too_late_is_not_found(serve) -> None:
    hub, client = await steady(serve, disconnect_timeout=0.1)
    await client.cut()
    await hub.next()
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await client.open()
    assert refusal.value.status == 404
    assert hub.pages.empty()


@pytest.mark.parametrize("how", ["close frame", "Close message", "abort"])
async def test_a_goodbye_ends_a_stateful_connection_at_once(serve, how: str) -> None:
    hub, client = await steady(serve)
    if how == "close frame":
        await client.ws.close()
    elif how == "Close message":
        await client.send({"type": 7})
    else:
        client.server.hub.connections[client.id].abort()
    assert await hub.next() is None
    await until(lambda: not client.server.hub.connections)
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await client.open()


async def test_a_client_aborted_while_away_cannot_come_back(serve) -> None:
    hub, client = await steady(serve)
    await client.cut()
    client.server.hub.connections[client.id].abort()
    await hub.next()
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await client.open()
    assert refusal.value.status in (204, 404)


async def test_a_new_socket_replaces_one_that_still_looks_alive(serve) -> None:
    hub, client = await steady(serve)
    old = client.pump
    await client.open()
    assert await client.next() == {"type": 9, "sequenceId": 1}
    await soon(old)
    await client.send({"type": 9, "sequenceId": 1})
    assert await client.invoke("Add", 1, 2) == 3
    assert hub.pages.empty()


async def test_an_ack_makes_room_in_a_full_buffer(serve) -> None:
    _, client = await steady(serve, stateful_reconnect_buffer_size=1000)
    await client.begin("Long", 20, type=4)
    await client.next(2)
    await silence()
    assert len(client.unread) < 10
    for i in range(1, 20):
        await ack(client, i)
        await client.next(2)
    await ack(client, 20)
    assert (await client.next(3))["type"] == 3


@both_protocols
async def test_each_second_the_server_acks_what_counts(serve, protocol) -> None:
    _, client = await steady(serve, protocol)
    await client.send(
        {"type": 6},
        call("Add", "x", 2),
        {"type": 2, "invocationId": "nobody", "item": 1},
        {"type": 3, "invocationId": "nobody", "result": 1},
        {"type": 5, "invocationId": "nobody"},
        call("Nope", type=4, invocationId="s"),
        {"type": 8, "sequenceId": 0},
        {"type": 6},
    )
    number = 0
    while number < 5:
        newer = (await client.next(8))["sequenceId"]
        assert number < newer <= 5
        number = newer


async def test_a_sequence_from_the_future_is_a_protocol_error(serve) -> None:
    _, client = await steady(serve, enable_detailed_errors=True)
    await client.cut()
    await client.open()
    await client.next(9)
    await client.send({"type": 9, "sequenceId": 50})
    close = await client.next(7)
    text = "Sequence ID greater than amount of messages we've received."
    assert text in close["error"]
    assert close["allowReconnect"] is True


async def test_an_ack_from_the_future_is_ignored(serve) -> None:
    _, client = await steady(serve)
    await ack(client, 99)
    assert await client.invoke("Add", 1, 2) == 3


async def test_an_old_handshake_switches_stateful_reconnect_off(serve) -> None:
    hub = Steady.fresh()
    server = await serve(hub, allow_stateful_reconnects=True)
    client = server.client()
    await client.start(version=1, useStatefulReconnect="true")
    assert await hub.next() == "connected"
    await client.cut()
    await hub.next()
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await client.open()
    assert refusal.value.status == 404


@pytest.mark.parametrize("query", [{}, {"useStatefulReconnect": "true"}])
async def test_a_lost_socket_is_final_if_reconnect_was_not_negotiated(
    serve, query: dict
) -> None:
    hub = Steady.fresh()
    server = await serve(hub, allow_stateful_reconnects=not query)
    client = server.client()
    await client.start(version=2, **query)
    await client.cut()
    assert await hub.next() == "connected"
    await hub.next()


@pytest.mark.parametrize("wire", [w for w in WIRES if w[0] != "WebSockets"])
async def test_other_transports_ignore_the_wish_for_stateful_reconnect(
    serve, wire
) -> None:
    server = await serve(Plain, allow_stateful_reconnects=True)
    client = server.client(wire)
    assert await client.start(version=1, useStatefulReconnect="true") == {}
    assert await client.invoke("Add", 1, 2) == 3


async def test_numbers_of_sequence_ids_are_checked(serve) -> None:
    _, client = await steady(serve)
    await client.write(b'{"type":8,"sequenceId":"1"}' + RS)
    assert await client.next() == CLOSE


# ----------------------------------------------------------------- operations

FINAL = ("Completed", "Faulted", "Canceled")


@pytest_asyncio.fixture
async def operations() -> AsyncIterator[Callable[..., kestrun.Operations]]:
    """Make Operations that are closed with the test."""
    async with contextlib.AsyncExitStack() as stack:

        def make(**words: Any) -> kestrun.Operations:
            ops = kestrun.Operations(**words)
            stack.push_async_callback(ops.close)
            return ops

        yield make


async def ten(progress: kestrun.Progress) -> int:
    await progress(50, "half")
    return 10


async def failing(progress: kestrun.Progress) -> None:
    await progress(30, "so far")
    raise ValueError("out of paper")


async def endless(progress: kestrun.Progress) -> None:
    await progress(30, "so far")
    await asyncio.Event().wait()


async def finished(op: kestrun.Operation) -> kestrun.Operation:
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await soon(op.wait())
    await until(lambda: op.state in FINAL)
    return op


async def running(op: kestrun.Operation) -> kestrun.Operation:
    await until(lambda: op.status == "so far")
    assert op.state == "Running"
    return op


async def test_an_operation_completes_with_the_result(operations) -> None:
    op = await finished(operations().start(ten, name="Import"))
    assert (op.state, op.progress, op.result) == ("Completed", 100, 10)
    assert (op.name, op.error) == ("Import", None)
    assert op.started_at <= op.completed_at


async def test_an_operation_that_raises_is_faulted_and_keeps_its_progress(
    operations,
) -> None:
    op = await finished(operations().start(failing))
    assert (op.state, op.progress, op.result) == ("Faulted", 30, None)
    assert "out of paper" in str(op.error)
    assert op.completed_at is not None


async def test_a_running_operation_has_not_ended(operations) -> None:
    op = await running(operations().start(endless))
    assert (op.progress, op.status) == (30, "so far")
    assert (op.completed_at, op.result, op.error) == (None, None, None)
    assert op.started_at is not None


async def test_start_returns_before_the_work_begins(operations) -> None:
    op = operations().start(endless)
    assert (op.state, op.progress) == ("NotStarted", 0)
    assert op.completed_at is None


async def test_a_cancelled_operation_is_cancelled_inside(operations) -> None:
    seen: list[str] = []

    async def work(progress: kestrun.Progress) -> None:
        try:
            await endless(progress)
        finally:
            seen.append("cleaned up")

    ops = operations()
    op = await running(ops.start(work))
    ops.cancel(op.id)
    await finished(op)
    assert (op.state, op.progress, seen) == ("Canceled", 30, ["cleaned up"])


async def test_an_operation_cancelled_before_its_first_step_never_runs(
    operations,
) -> None:
    seen: list[str] = []

    async def work(progress: kestrun.Progress) -> None:
        seen.append("ran")

    ops = operations()
    op = ops.start(work)
    ops.cancel(op.id)
    assert ((await finished(op)).state, seen) == ("Canceled", [])


async def test_a_final_state_is_never_left(operations) -> None:
    ops = operations()
    op = await finished(ops.start(ten))
    with contextlib.suppress(Exception):
        ops.cancel(op.id)
    await silence(0.02)
    assert (op.state, op.progress, op.result) == ("Completed", 100, 10)


async def test_progress_only_rises(operations) -> None:
    seen: list[int] = []

    async def work(progress: kestrun.Progress) -> None:
        for percent in (10, 50, 20, 60, 60, 5):
            await progress(percent, "step")
            seen.append(op.progress)

    op = operations().start(work)
    await finished(op)
    assert seen == [10, 50, 50, 60, 60, 60]


@pytest.mark.parametrize("work, final", [
    (ten, "Completed"), (failing, "Faulted"), (endless, "Canceled"),
])  # fmt: skip
async def test_every_step_is_announced_and_the_end_exactly_once(
    operations, work: Callable, final: str
) -> None:
    seen: list[tuple] = []
    ops = operations(on_change=lambda op: seen.append((op.state, op.progress)))
    op = ops.start(work)
    if final == "Canceled":
        ops.cancel((await running(op)).id)
    await finished(op)
    await until(lambda: seen and seen[-1][0] == final)
    assert [s for s, _ in seen if s in FINAL] == [final]
    assert ("Running", 50 if work is ten else 30) in seen
    assert [p for _, p in seen] == sorted(p for _, p in seen)


async def test_a_callback_may_be_a_coroutine_function(operations) -> None:
    seen: list[str] = []

    async def announce(op: kestrun.Operation) -> None:
        seen.append(op.state)

    await finished(operations(on_change=announce).start(ten))
    await until(lambda: seen and seen[-1] == "Completed")


async def test_operations_are_found_by_id(operations) -> None:
    ops = operations()
    one, two = ops.start(endless), ops.start(ten)
    assert one.id != two.id
    assert (ops.get(one.id), ops.get(two.id)) == (one, two)
    assert {op.id for op in ops.list()} == {one.id, two.id}


async def test_a_finished_operation_is_removed_and_a_running_one_is_not(
    operations,
) -> None:
    ops = operations()
    done, busy = await finished(ops.start(ten)), await running(ops.start(endless))
    ops.remove(done.id)
    with contextlib.suppress(Exception):
        ops.remove(busy.id)
    assert [op.id for op in ops.list()] == [busy.id]
    assert busy.state == "Running"


async def test_finished_operations_expire_and_running_ones_do_not(operations) -> None:
    ops = operations(retention=0.05)
    done, busy = await finished(ops.start(ten)), await running(ops.start(endless))
    await until(lambda: [op.id for op in ops.list()] == [busy.id])
    with contextlib.suppress(KeyError):
        assert ops.get(done.id) is None


async def test_only_the_newest_operations_are_kept(operations) -> None:
    ops = operations(limit=3)
    done = [await finished(ops.start(ten)) for _ in range(6)]
    assert {op.id for op in ops.list()} == {op.id for op in done[3:]}


async def test_closing_cancels_what_is_running(operations) -> None:
    ops = operations()
    busy = [await running(ops.start(endless)) for _ in range(3)]
    await soon(ops.close())
    assert [op.state for op in busy] == ["Canceled"] * 3


async def test_an_operation_that_swallows_its_cancellation_still_ends(
    operations,
) -> None:
    async def stubborn(progress: kestrun.Progress) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await endless(progress)
        return "anyway"

    seen: list[str] = []
    ops = operations(on_change=lambda op: seen.append(op.state))
    op = await running(ops.start(stubborn))
    ops.cancel(op.id)
    await finished(op)
    assert [state for state in seen if state in FINAL] == [op.state]


# ------------------------------------------------------------------- schedule


@pytest_asyncio.fixture
async def schedule() -> AsyncIterator[kestrun.Schedule]:
    schedule = kestrun.Schedule()
    yield schedule
    await soon(schedule.close())


def report_of(schedule: kestrun.Schedule, name: str) -> str:
    (job,) = (job for job in schedule.report() if name in repr(job))
    return repr(job)


async def test_a_job_runs_again_and_again(schedule) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.every(0.1)
    async def beat() -> None:
        runs.put_nowait(time.time())

    first, *_, last = [await soon(runs.get()) for _ in range(4)]
    assert 0.2 < last - first < 0.9


async def test_intervals_are_aligned_to_the_clock(schedule) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.every(0.5)
    async def beat() -> None:
        runs.put_nowait(time.time())

    for _ in range(2):
        assert await soon(runs.get()) % 0.5 < 0.2


async def test_a_cron_job_runs_each_second(schedule) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.cron("* * * * * *")
    async def tick() -> None:
        runs.put_nowait(time.time())

    first, second = [await soon(runs.get()) for _ in range(2)]
    assert int(second) == int(first) + 1
    assert first % 1 < 0.3


async def test_a_decorated_function_stays_itself(schedule) -> None:
    @schedule.every(3600)
    async def answer() -> int:
        return 42

    assert await answer() == 42


@pytest.mark.parametrize("expression, field", [
    ("60 * * * * *", "second"),
    ("x * * * * *", "second"),
    ("-1 * * * * *", "second"),
    ("*/0 * * * * *", "second"),
    ("1,,2 * * * * *", "second"),
    ("* 60 * * * *", "minute"),
    ("* 5-99 * * * *", "minute"),
    ("* * 24 * * *", "hour"),
    ("* * * 0 * *", "day"),
    ("* * * 32 * *", "day"),
    ("* * * * 13 *", "month"),
    ("* * * * 0 *", "month"),
    ("* * * * * 8", "week"),
    ("* * * * * someday", "week"),
])  # fmt: skip
def test_a_wrong_cron_field_is_named(expression: str, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        kestrun.Schedule().cron(expression)


@pytest.mark.parametrize("expression", ["", "* * * * *", "* * * * * * *", "hourly"])
def test_a_cron_expression_has_six_fields(expression: str) -> None:
    with pytest.raises(ValueError, match="six"):
        kestrun.Schedule().cron(expression)


@pytest.mark.parametrize("expression", [
    "0 * * * * *", "*/15 0-30 8,12,18 1 1-6 *", "59 59 23 31 12 6", "0 0 0 * * 0",
])  # fmt: skip
async def test_ordinary_cron_expressions_are_accepted(schedule, expression) -> None:
    @schedule.cron(expression)
    async def job() -> None: ...

    assert "job" in report_of(schedule, "job")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1"])
def test_an_interval_is_a_positive_number(seconds: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        kestrun.Schedule().every(seconds)


async def test_a_suspended_job_rests_until_it_is_resumed(schedule) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.every(0.02)
    async def beat() -> None:
        runs.put_nowait(1)

    await soon(runs.get())
    active = report_of(schedule, "beat")
    schedule.suspend("beat")
    await asyncio.sleep(0)
    while not runs.empty():
        runs.get_nowait()
    await silence()
    assert runs.empty()
    assert report_of(schedule, "beat") != active
    schedule.resume("beat")
    await soon(runs.get())


async def test_a_cancelled_job_is_gone(schedule) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.every(0.02)
    async def beat() -> None:
        runs.put_nowait(1)

    await soon(runs.get())
    schedule.cancel("beat")
    while not runs.empty():
        runs.get_nowait()
    await silence()
    assert (runs.empty(), len(schedule.report())) == (True, 0)


@pytest.mark.parametrize("verb", ["suspend", "resume", "cancel"])
async def test_a_job_that_does_not_exist_cannot_be_changed(schedule, verb) -> None:
    with pytest.raises((KeyError, ValueError)):
        getattr(schedule, verb)("nobody")


async def test_a_job_that_raises_is_logged_and_runs_again(schedule, caplog) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.every(0.02)
    async def clumsy() -> None:
        runs.put_nowait(1)
        raise ValueError("oops")

    for _ in range(3):
        await soon(runs.get())
    assert "clumsy" in caplog.text
    assert "ValueError: oops" in caplog.text


async def test_a_job_that_is_still_running_is_not_started_twice(schedule) -> None:
    starts: asyncio.Queue = asyncio.Queue()
    gate = asyncio.Event()

    @schedule.every(0.02)
    async def slow() -> None:
        starts.put_nowait(1)
        await gate.wait()

    await soon(starts.get())
    await silence()
    assert starts.empty()
    gate.set()
    await soon(starts.get())


async def test_a_slow_job_delays_no_other(schedule) -> None:
    runs: asyncio.Queue = asyncio.Queue()

    @schedule.every(0.02)
    async def slow() -> None:
        await asyncio.Event().wait()

    @schedule.every(0.02)
    async def quick() -> None:
        runs.put_nowait(1)

    for _ in range(5):
        await soon(runs.get())
    assert len(schedule.report()) == 2


# ------------------------------------------------------------------- demo app

HUB = "/hubs/kestrun"
LEVELS = ["Trace", "Verbose", "Debug", "Information"]
LEVELS += ["Warning", "Error", "Critical", "Fatal"]
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
STATUS_KEYS = {"OperationId", "TaskId", "Name", "State", "StartedAt"}
STATUS_KEYS |= {"CompletedAt", "Progress", "Status", "Message"}


@pytest.fixture
def jobs(monkeypatch) -> Any:
    """The demo's schedule: its times are noted, and its pauses are the test's."""

    class Paced(kestrun.Schedule):
        pause = 1e9
        times: list = []  # noqa: RUF012

        def every(self, seconds: float, **words: Any) -> Any:
            self.times.append(seconds)
            return super().every(self.pause, **words)

        def cron(self, expression: str, **words: Any) -> Any:
            self.times.append(expression)
            return super().every(self.pause, **words)

    monkeypatch.setattr(kestrun, "Schedule", Paced)
    return Paced


@pytest_asyncio.fixture
async def demo(serve, jobs) -> Callable[..., Awaitable[Server]]:
    async def start(**words: Any) -> Server:
        return await serve(app=kestrun.create_app(**words))

    return start


async def visitor(server: Server, path: str = HUB) -> Client:
    """A client of the demo; it has been heard once, so it is surely connected."""
    client = await server.connect(path=path)
    await client.invoke("Echo", "hello")
    assert await client.received("ReceiveEcho") == ["hello"]
    return client


async def event(client: Client, name: str) -> dict:
    """The data of the next event, which must have this name."""
    (payload,) = await client.received("ReceiveEvent")
    assert set(payload) == {"eventName", "data", "timestamp"}
    assert STAMP.fullmatch(payload["timestamp"])
    assert payload["eventName"] == name
    return payload["data"]


async def unheard(client: Client) -> None:
    """Nothing has come since; another echo proves that it would be here."""
    await client.invoke("Echo", "end")
    assert await client.received("ReceiveEcho") == ["end"]
    assert client.unread == []


def assert_error(answer: Answer, status: int) -> None:
    """Errors about an operation may name it as its status does."""
    keys = set(answer.json) - {"TaskId"}
    assert (answer.status, keys) == (status, {"Success", "Message"})
    assert answer.json["Success"] is False
    assert len(answer.json["Message"].split()) >= 3


@everywhere
async def test_the_demo_hub_echoes_to_the_caller(demo, wire) -> None:
    client = await (await demo()).connect(wire, path=HUB)
    await client.invoke("Echo", "ä")
    assert await client.received("ReceiveEcho") == ["ä"]


@everywhere
async def test_a_client_joins_and_leaves_a_group_of_the_demo(demo, wire) -> None:
    server = await demo()
    client = await server.connect(wire, path=HUB)
    await client.invoke("JoinGroup", "Blue")
    assert await client.received("GroupJoined") == ["Blue"]
    await server.request("POST", "/api/group/broadcast/Blue")
    assert len(await client.received("ReceiveGroupMessage")) == 1
    await client.invoke("LeaveGroup", "Blue")
    assert await client.received("GroupLeft") == ["Blue"]
    await server.request("POST", "/api/group/broadcast/Blue")
    await client.invoke("Echo", "end")
    assert await client.received("ReceiveEcho") == ["end"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
async def test_a_log_message_is_broadcast_in_the_spelling_of_the_table(
    demo, level: str, spell: Callable
) -> None:
    server = await demo()
    client = await visitor(server)
    answer = await server.request("GET", f"/api/ps/log/{spell(level)}")
    text = f"Broadcasted {level} log message"
    assert answer.plain == (200, "text/plain", text)
    (log,) = await client.received("ReceiveLog")
    assert set(log) == {"level", "message", "timestamp"}
    assert log["level"] == level
    pattern = rf"Test {level} message from Kestrun at \d\d:\d\d:\d\d"
    assert re.fullmatch(pattern, log["message"])
    assert STAMP.fullmatch(log["timestamp"])


async def test_a_log_message_may_be_given(demo, caplog) -> None:
    server = await demo()
    client = await visitor(server)
    with caplog.at_level(logging.DEBUG):
        await server.request("GET", "/api/ps/log/Warning?message=caf%C3%A9%20%3Cb%3E")
    assert (await client.received("ReceiveLog"))[0]["message"] == "café <b>"
    assert "café <b>" in caplog.text


@pytest.mark.parametrize("url", [
    "/api/ps/log/Loud",
    "/api/ps/log/Information%0d%0a",
    "/api/ps/log/Information%0aEvil",
    "/api/ps/log/Informat%C4%B1on",
])  # fmt: skip
async def test_an_unknown_level_is_refused_and_nothing_is_sent(demo, url: str) -> None:
    server = await demo()
    client = await visitor(server)
    assert_error(await server.request("GET", url), 400)
    await unheard(client)


async def test_an_event_is_broadcast(demo) -> None:
    server = await demo()
    client = await visitor(server)
    answer = await server.request("GET", "/api/ps/event")
    assert answer.plain == (200, "text/plain", "Broadcasted custom event")
    data = await event(client, "PowerShellEvent")
    assert set(data) == {"Message", "Timestamp", "Random"}
    assert STAMP.fullmatch(data["Timestamp"])


@pytest.mark.parametrize("group", ["Blue", "Z%C3%BCrich%20Nord", "a%2Fb", "a.b-c_d"])
@pytest.mark.parametrize("verb, name", [
    ("join", "GroupJoinRequest"), ("leave", "GroupLeaveRequest"),
])  # fmt: skip
async def test_a_request_about_a_group_is_broadcast(
    demo, verb: str, name: str, group: str
) -> None:
    server = await demo()
    client = await visitor(server)
    answer = await server.request("POST", f"/api/group/{verb}/{group}")
    text = urllib.parse.unquote(group)
    assert (answer.status, set(answer.json)) == (
        200,
        {"Success", "Message", "GroupName"},
    )
    assert (answer.json["Success"], answer.json["GroupName"]) == (True, text)
    data = await event(client, name)
    assert set(data) == {"GroupName", "Message", "Timestamp"}
    assert (data["GroupName"], bool(STAMP.fullmatch(data["Timestamp"]))) == (text, True)


async def test_a_group_message_reaches_the_group_alone(demo) -> None:
    server = await demo()
    member, other = await visitor(server), await visitor(server)
    await member.invoke("JoinGroup", "Blue")
    await member.received("GroupJoined")
    answer = await server.request("POST", "/api/group/broadcast/Blue")
    assert (answer.status, set(answer.json)) == (
        200,
        {"Success", "Message", "GroupName"},
    )
    assert answer.json["GroupName"] == "Blue"
    (message,) = await member.received("ReceiveGroupMessage")
    assert set(message) == {"Message", "Timestamp", "Sender"}
    assert STAMP.fullmatch(message["Timestamp"])
    await unheard(other)


@pytest.mark.parametrize("verb", ["join", "leave", "broadcast"])
@pytest.mark.parametrize("group", ["a%0d%0ab", "%0a", "a%00", "a%7f", "a%ff"])
async def test_control_characters_in_a_group_name_are_refused(
    demo, verb: str, group: str
) -> None:
    server = await demo()
    client = await visitor(server)
    answer = await server.request("POST", f"/api/group/{verb}/{group}")
    assert_error(answer, 400)
    await unheard(client)


async def started(server: Server, seconds: str = "3600") -> str:
    url = "/api/operation/start" + (seconds and "?seconds=" + seconds)
    answer = await server.request("POST", url)
    assert (answer.status, set(answer.json)) == (200, {"Success", "TaskId", "Message"})
    assert answer.json["Success"] is True
    return answer.json["TaskId"]


async def status(server: Server, id: str) -> dict:
    answer = await server.request("GET", f"/api/operation/status/{id}")
    assert (answer.status, set(answer.json)) == (200, STATUS_KEYS)
    return answer.json


async def test_an_operation_of_two_steps_is_followed_to_its_end(demo) -> None:
    server = await demo()
    client = await visitor(server)
    id = await started(server, seconds="")
    seen: list[int] = []
    (payload,) = await client.received("ReceiveEvent")
    while payload["eventName"] == "OperationProgress":
        data = payload["data"]
        assert set(data) == {"TaskId", "Progress", "Step", "Message", "Timestamp"}
        assert data["TaskId"] == id
        seen.append(data["Progress"])
        (payload,) = await client.received("ReceiveEvent")
    assert payload["eventName"] == "OperationComplete"
    data = payload["data"]
    assert set(data) == {"TaskId", "State", "Progress", "Message", "Timestamp"}
    assert (data["TaskId"], data["State"], data["Progress"]) == (id, "Completed", 100)
    assert [p for p in dict.fromkeys(seen) if p] == [50, 100]
    final = await status(server, id)
    assert (final["State"], final["Progress"]) == ("Completed", 100)
    await unheard(client)


async def test_zeros_before_the_seconds_change_nothing(demo) -> None:
    assert await started(await demo(), "0" * 5000 + "1")


async def test_progress_is_rounded_to_whole_percents(demo) -> None:
    server = await demo()
    client = await visitor(server)
    await started(server, "3")
    steps: list[int] = []
    while not steps or steps[-1] < 67:
        data = await event(client, "OperationProgress")
        assert type(data["Progress"]) is int
        steps.append(data["Progress"])
    assert [p for p in dict.fromkeys(steps) if p] == [33, 67]


@pytest.mark.parametrize(
    "seconds",
    ["0", "-1", "3601", "x", "1.5", "%20", "1e2", "%C2%B2", "9" * 5000, "1&seconds=x"],
)
async def test_an_operation_needs_a_sensible_number_of_seconds(demo, seconds) -> None:
    server = await demo()
    client = await visitor(server)
    answer = await server.request("POST", f"/api/operation/start?seconds={seconds}")
    assert_error(answer, 400)
    assert (await server.request("GET", "/api/operation/list")).json == []
    await unheard(client)


async def test_the_status_of_a_running_operation(demo) -> None:
    server = await demo()
    id = await started(server)
    async with asyncio.timeout(PATIENCE):
        while (now := await status(server, id))["State"] != "Running":
            assert now["State"] == "NotStarted"
    assert (now["OperationId"], now["TaskId"]) == (id, id)
    assert (now["CompletedAt"], now["Progress"]) == (None, 0)
    assert STAMP.fullmatch(now["StartedAt"])


async def test_the_list_has_the_newest_operation_first(demo) -> None:
    server = await demo()
    ids = [await started(server) for _ in range(3)]
    operations = (await server.request("GET", "/api/operation/list")).json
    assert [op["TaskId"] for op in operations] == ids[::-1]
    assert all(set(op) == STATUS_KEYS for op in operations)


async def test_an_operation_is_cancelled_once_and_then_removed_once(demo) -> None:
    server = await demo()
    client = await visitor(server)
    id = await started(server)
    url, one = f"/api/operation/cancel/{id}", f"/api/operation/{id}"
    assert_error(await server.request("DELETE", one), 409)
    assert (await server.request("POST", url)).status == 200
    data: dict = {}
    while "State" not in data:
        data = (await client.received("ReceiveEvent"))[0]["data"]
    assert (data["TaskId"], data["State"]) == (id, "Canceled")
    final = await status(server, id)
    assert (final["State"], bool(STAMP.fullmatch(final["CompletedAt"]))) == (
        "Canceled",
        True,
    )
    assert_error(await server.request("POST", url), 409)
    assert (await server.request("DELETE", one)).status == 200
    assert (await server.request("DELETE", one)).status == 404


async def test_the_status_of_an_unknown_operation_is_not_found(demo) -> None:
    answer = await (await demo()).request("GET", "/api/operation/status/nobody")
    assert (answer.status, answer.json["TaskId"]) == (404, "nobody")
    assert answer.json.get("Success", False) is False
    assert len(answer.json["Message"].split()) >= 3


@pytest.mark.parametrize("method, url", [
    ("POST", "/api/operation/cancel/nobody"),
    ("DELETE", "/api/operation/nobody"),
    ("GET", "/nothing"),
    ("GET", "/api"),
    ("POST", "/api/group/join/"),
    ("GET", "/api/operation/status/"),
    ("GET", "/%0d%0aX-Evil:1"),
])  # fmt: skip
async def test_what_is_not_there_is_a_404_in_json(demo, method: str, url: str) -> None:
    answer = await (await demo()).request(method, url)
    assert answer.status == 404
    assert {"Success", "Message"} <= set(answer.json)
    assert answer.json["Success"] is False


@pytest.mark.parametrize("method, url", [
    ("POST", "/"),
    ("POST", "/api/ps/log/Information"),
    ("DELETE", "/api/ps/event"),
    ("GET", "/api/group/join/Blue"),
    ("PUT", "/api/group/broadcast/Blue"),
    ("GET", "/api/operation/start"),
    ("POST", "/api/operation/list"),
    ("GET", "/api/operation/cancel/nobody"),
    ("POST", "/healthz"),
])  # fmt: skip
async def test_a_wrong_method_is_a_405_in_json_and_fires_nothing(
    demo, method: str, url: str
) -> None:
    server = await demo()
    client = await visitor(server)
    answer = await server.request(method, url)
    assert_error(answer, 405)
    assert answer.headers["Allow"]
    await unheard(client)


@pytest.mark.parametrize("url", [
    "/api/ps/log/Information", "/api/ps/event", "/api/group/join/Blue",
    "/api/group/broadcast/Blue", "/api/operation/start",
])  # fmt: skip
async def test_head_fires_nothing(demo, url: str) -> None:
    server = await demo()
    client = await visitor(server)
    await client.invoke("JoinGroup", "Blue")
    await client.received("GroupJoined")
    await server.request("HEAD", url)
    assert (await server.request("GET", "/api/operation/list")).json == []
    await unheard(client)


async def test_the_health_of_the_server_is_told(demo) -> None:
    server = await demo()
    client = await visitor(server)
    await client.invoke("JoinGroup", "Blue")
    await started(server)
    health = (await server.request("GET", "/healthz")).json
    keys = {"Status", "Uptime", "ConnectedClients", "Groups", "Operations"}
    assert (set(health), health["Status"]) == ({*keys, "Hub"}, "Healthy")
    counts = health["ConnectedClients"], health["Groups"], health["Operations"]
    assert counts == (1, 1, 1)


async def test_the_page_is_html(demo) -> None:
    answer = await (await demo()).request("GET", "/")
    assert (answer.status, answer.type) == (200, "text/html")
    assert answer.body.lstrip().lower().startswith("<!doctype html>")


GUARDED = [
    ("POST", HUB + "/negotiate?negotiateVersion=1"),
    ("GET", HUB),
    ("GET", "/api/ps/log/Information"),
    ("GET", "/api/ps/event"),
    ("POST", "/api/group/join/Blue"),
    ("POST", "/api/group/leave/Blue"),
    ("POST", "/api/group/broadcast/Blue"),
    ("POST", "/api/operation/start"),
    ("GET", "/api/operation/status/nobody"),
    ("GET", "/api/operation/list"),
    ("POST", "/api/operation/cancel/nobody"),
    ("DELETE", "/api/operation/nobody"),
]


@pytest.mark.parametrize("method, url", GUARDED)
@pytest.mark.parametrize("token", [None, "wrong", "s3cretx", "", "s3cr\u00e9t"])
async def test_hub_and_api_ask_for_the_token(demo, method, url, token) -> None:
    server = await demo(token="s3cret")
    headers = {} if token is None else bearer(token)
    answer = await server.request(method, url, headers=headers)
    assert answer.status == 401
    if url.startswith("/api"):
        assert_error(answer, 401)


@pytest.mark.parametrize("place", ["header", "query"])
async def test_the_token_opens_hub_and_api(demo, place: str) -> None:
    server = await demo(token="s3cret")
    query = ""
    if place == "header":
        server.headers = bearer("s3cret")
    else:
        query = "?access_token=s3cret"
    client = await server.connect(path=HUB, query=query)
    answer = await server.request("GET", "/api/ps/event" + query)
    assert answer.status == 200
    assert set(await event(client, "PowerShellEvent")) >= {"Random"}


@pytest.mark.parametrize("url", ["/", "/healthz"])
async def test_page_and_health_need_no_token(demo, url: str) -> None:
    server = await demo(token="s3cret")
    assert (await server.request("GET", url)).status == 200


async def test_the_demo_allows_the_origins_it_is_given(demo) -> None:
    server = await demo(allowed_origins=(FRIEND,))
    headers = {"Origin": FRIEND}
    answer = await server.request("POST", HUB + "/negotiate", headers=headers)
    assert answer.headers["Access-Control-Allow-Origin"] == FRIEND


async def test_the_demo_has_its_hub_where_it_is_told(demo) -> None:
    server = await demo(hub_path="/live")
    await visitor(server, "/live")
    assert (await server.request("POST", HUB + "/negotiate")).status == 404


async def test_the_demo_allows_stateful_reconnects(demo) -> None:
    client = (await demo()).client(path=HUB)
    await client.negotiate(useStatefulReconnect="true")
    assert client.negotiated["useStatefulReconnect"] is True


async def test_the_demo_may_be_part_of_another_application(serve, jobs) -> None:
    app = web.Application()
    app.add_subapp("/sub", kestrun.create_app())
    server = await serve(app=app)
    client = await visitor(server, "/sub" + HUB)
    assert (await server.request("GET", "/sub/")).status == 200
    assert (await server.request("GET", "/sub/api/ps/event")).status == 200
    await event(client, "PowerShellEvent")


async def test_a_shutdown_of_the_demo_cancels_operations_and_says_goodbye(demo) -> None:
    server = await demo()
    client = await visitor(server)
    id = await started(server)
    cleanup = asyncio.create_task(server.runner.cleanup())
    data = await event(client, "OperationComplete")
    assert (data["TaskId"], data["State"]) == (id, "Canceled")
    assert await client.next() == {"type": 7, "allowReconnect": True}
    await soon(cleanup)


async def test_two_demos_in_one_process_share_nothing(demo) -> None:
    one, two = await demo(), await demo()
    client = await visitor(one)
    await two.request("GET", "/api/ps/event")
    await started(two)
    await unheard(client)
    assert (await one.request("GET", "/api/operation/list")).json == []


# ----------------------------------------------------------------- demo jobs


async def test_the_heart_of_the_demo_beats_each_30_seconds(demo, jobs) -> None:
    jobs.pause = 0.05
    client = await (await demo()).connect(path=HUB)
    data = await event(client, "ServerHeartbeat")
    keys = {"Type", "ServerTime", "Uptime", "ConnectedClients", "Message"}
    assert (set(data), data["Type"]) == (keys, "Heartbeat")
    assert STAMP.fullmatch(data["ServerTime"])
    assert data["ConnectedClients"] == 1
    assert 30 in jobs.times


async def test_admins_are_told_about_the_system_each_minute(demo, jobs) -> None:
    jobs.pause = 0.05
    server = await demo()
    admin, other = [await server.connect(path=HUB) for _ in range(2)]
    await admin.invoke("JoinGroup", "Admins")
    message = await admin.next(1)
    while message["target"] != "ReceiveAdminUpdate":
        message = await admin.next(1)
    (update,) = message["arguments"]
    assert set(update) == {"Type", "SystemInfo", "Timestamp", "Message"}
    assert update["Type"] == "AdminUpdate"
    assert set(update["SystemInfo"]) == {"ProcessorCount", "PythonVersion", "MemoryMB"}
    assert STAMP.fullmatch(update["Timestamp"])
    await event(other, "ServerHeartbeat")
    assert all(m["target"] == "ReceiveEvent" for m in other.unread)
    assert "0 * * * * *" in jobs.times


# ------------------------------------------------------------------ broadcasts


async def test_a_log_message_is_broadcast_from_code(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    await kestrun.broadcast_log(server.hub, "Information", "hello")
    (log,) = await client.received("ReceiveLog")
    assert set(log) == {"level", "message", "timestamp"}
    assert (log["level"], log["message"]) == ("Information", "hello")
    assert STAMP.fullmatch(log["timestamp"])


async def test_a_level_is_known_in_any_case_and_no_other(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    with pytest.raises(ValueError, match="one of Trace, Verbose"):
        await kestrun.broadcast_log(server.hub, "Loud", "hello")
    await kestrun.broadcast_log(server.hub, "fATAL", "hello")
    (log,) = await client.received("ReceiveLog")
    assert log["level"] == "Fatal"


async def test_an_event_is_broadcast_from_code(serve) -> None:
    server = await serve(Plain)
    client = await server.connect()
    await kestrun.broadcast_event(server.hub, "Rain", {"Amount": 3})
    assert await event(client, "Rain") == {"Amount": 3}


async def test_a_group_is_addressed_from_code(serve) -> None:
    server = await serve(Plain)
    member, other = await server.connect(), await server.connect()
    await server.hub.groups.add(member.id, "Blue")
    message = {"Message": "hi"}
    group = (server.hub, "Blue")
    await kestrun.broadcast_to_group(*group, "ReceiveGroupMessage", message)
    assert await member.received("ReceiveGroupMessage") == [message]
    assert await other.invoke("Add", 1, 2) == 3
    assert other.unread == []


async def test_broadcasts_to_nobody_do_not_raise(serve) -> None:
    hub = (await serve(Plain)).hub
    await kestrun.broadcast_log(hub, "Error", "anybody?")
    await kestrun.broadcast_event(hub, "Rain", None)
    await kestrun.broadcast_to_group(hub, "none", "Note", 1)
    assert len(hub.connections) == 0


KESTRUN = Path(kestrun.__file__)
LIMIT = 20  # seconds that all the waiting of one test may take

# ---------------------------------------------------------------- what tests need


def needed(sentence: str) -> None:
    """Skip the test that needs something else installed, or fail if none may skip."""
    if os.environ.get("KESTRUN_NO_SKIP") == "1":
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)


def package(name: str) -> None:
    """Skip unless a Python package is there."""
    try:
        __import__(name)
    except ImportError:
        needed(f"install {name}: pip install {name}")


def cache() -> Path:
    """The folder that keeps what npm installed from one run to the next."""
    named = os.environ.get("KESTRUN_TEST_CACHE")
    folder = Path(named or f"{tempfile.gettempdir()}/kestrun-tests-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


NPM = {
    "@microsoft/signalr": "@microsoft/signalr@10",
    "@microsoft/signalr-protocol-msgpack": "@microsoft/signalr-protocol-msgpack@10",
    "signalr8": "signalr8@npm:@microsoft/signalr@8",
    "signalr6": "signalr6@npm:@microsoft/signalr@6",
}


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder with the official clients, filled by npm the first time."""
    sentence = "install Node.js 18 or newer with npm: apt-get install nodejs npm"
    if not shutil.which("node") or not shutil.which("npm"):
        needed(sentence)
    command = ["npm", "install", "--no-audit", "--no-fund", *NPM.values()]
    kept = cache() / f"clients-{zlib.crc32(' '.join(command).encode()):08x}"
    if not kept.exists():
        # Several processes may come here at once. Each installs apart from the
        # others, and the folder that is ready first stays.
        folder = tempfile.TemporaryDirectory
        with folder(dir=cache(), ignore_cleanup_errors=True) as mine:
            Path(mine, "package.json").write_text("{}")
            run, how = subprocess.run, {"capture_output": True, "text": True}
            done = run(command, cwd=mine, check=False, **how)
            if done.returncode:
                needed(f"{sentence}; npm said: {done.stderr.strip()[-300:]}")
            with suppress(OSError):
                os.rename(mine, kept)
    return kept / "node_modules"


@contextmanager
def script(node_modules: Path, name: str, text: str) -> Iterator[Path]:
    """Put a script where it finds the official clients, for as long as it runs."""
    path = node_modules.parent / f"{os.getpid()}-{name}"
    path.write_text(text)
    try:
        yield path
    finally:
        path.unlink()


@pytest.fixture(scope="session")
def driver(node_modules: Path) -> Iterator[int]:
    """The port of one Node process that runs the official client for the tests."""
    pipe = subprocess.PIPE
    with (
        script(node_modules, "driver.cjs", DRIVER) as path,
        subprocess.Popen(["node", path], stdin=pipe, stdout=pipe, text=True) as node,
    ):
        yield int(node.stdout.readline())
        node.stdin.close()


CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--remote-debugging-port=0"),
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The DevTools address of one headless Chromium."""
    package("playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        needed("install Chromium: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")
    command = [found, *CHROMIUM, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        said = next((line for line in browser.stderr if "listening on" in line), None)
        if said is None:
            needed(f"{found} does not start: try it with --headless --no-sandbox")
        yield said.split()[-1]
        browser.terminate()


# ------------------------------------------------------------------- servers to test


class Paint(Enum):
    RED = "red"
    GREEN = "green"


@dataclass
class Person:
    user_name: str
    birth_year: int
    friends: list[str] = field(default_factory=list)


NOTES = web.AppKey("notes", asyncio.Queue)


class Playground(kestrun.Hub):
    """Every shape of method that a client may meet. What it notes, tests can await."""

    def _jot(self, *words: Any) -> None:
        self.context.request.app[NOTES].put_nowait(words)

    async def on_connected(self) -> None:
        self._jot("connected", self.context.connection_id)

    async def on_disconnected(self, error: Exception | None) -> None:
        self._jot("disconnected", error)

    def who(self) -> list[str | None]:
        context = self.context
        return [
            context.connection_id,
            context.user_id,
            context.transport,
            context.protocol,
        ]

    def echo(self, value: Any) -> Any:
        return value

    def add(self, a: int, b: int) -> int:
        return a + b

    def nothing(self) -> None:
        return None

    def note(self, text: str) -> None:
        self._jot("note", text)

    def big(self, size: int) -> str:
        return "ä" * size

    def older(self, person: Person, years: int) -> Person:
        return Person(person.user_name, person.birth_year - years, [*person.friends])

    def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    def later(self, moment: datetime.datetime, seconds: float) -> datetime.datetime:
        return moment + datetime.timedelta(seconds=seconds)

    def other(self, colour: Paint) -> Paint:
        return Paint.GREEN if colour is Paint.RED else Paint.RED

    def same(self, identity: UUID) -> UUID:
        return identity

    def refuse(self) -> None:
        raise kestrun.HubException("not today")

    def fall_over(self) -> None:
        raise ValueError("a detail for the log")

    def hang_up(self) -> None:
        self.context.abort()

    async def counter(
        self, count: int, delay: float = 0, fail_at: int | None = None
    ) -> AsyncIterator[int]:
        for number in range(count):
            if number == fail_at:
                raise kestrun.HubException(f"no {number}")
            await asyncio.sleep(delay)
            yield number

    async def endless(self) -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
                await asyncio.sleep(0.005)
        finally:
            self._jot("closed")

    async def total(self, numbers: AsyncIterator[int]) -> int:
        try:
            return sum([number async for number in numbers])
        except kestrun.HubException as error:
            self._jot("upload failed", str(error))
            raise

    async def keep(self, items: AsyncIterator[int]) -> None:
        self._jot("kept", [item async for item in items])

    async def join(
        self, left: AsyncIterator[str], between: str, right: AsyncIterator[str]
    ) -> str:
        texts = ["".join([item async for item in items]) for items in (left, right)]
        return between.join(texts)

    async def first(self, numbers: AsyncIterator[int]) -> int:
        async for number in numbers:
            return number
        return -1

    async def doubled(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield number * 2

    async def ask(self, method: str, *arguments: Any) -> Any:
        return await self.clients.caller.invoke(method, *arguments)

    async def ask_briefly(self, method: str) -> str:
        try:
            return await self.clients.caller.invoke(method, timeout=0.1)
        except TimeoutError:
            return "too slow"

    async def join_group(self, name: str) -> None:
        await self.groups.add(self.context.connection_id, name)

    async def leave_group(self, name: str) -> None:
        await self.groups.remove(self.context.connection_id, name)

    async def tell_group(self, name: str, text: str) -> None:
        await self.clients.group(name).send("Told", text)

    async def tell_all(self, text: str) -> None:
        await self.clients.all.send("Told", text)

    async def tell_others(self, text: str) -> None:
        await self.clients.others.send("Told", text)


@asynccontextmanager
async def serving(app: web.Application, port: int = 0) -> AsyncIterator[str]:
    """Run an application on loopback; yield its address."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass
class Ground:
    """A running playground: where it is, its hub, what its methods noted."""

    url: str
    hub: kestrun.HubContext
    notes: asyncio.Queue

    async def noted(self, word: str) -> tuple:
        """Wait for the next note that begins with `word`; drop those before it."""
        while (words := await self.notes.get())[0] != word:
            pass
        return words[1:]


@asynccontextmanager
async def playground(port: int = 0, **options: Any) -> AsyncIterator[Ground]:
    """Run the playground. All that happens in the block has LIMIT seconds."""
    app = web.Application()
    app[NOTES] = notes = asyncio.Queue()
    hub = kestrun.map_hub(app, "/hub", Playground, **options)
    async with asyncio.timeout(LIMIT), serving(app, port) as base:
        yield Ground(f"{base}/hub", hub, notes)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# --------------------------------------------------------- driving JavaScript clients

# One request a line, one answer a line, and a line for all that happens to a client.
# What JSON cannot say is wrapped: {"$bytes": base64}, {"$date": iso}, {"$subject": n}.
DRIVER = r"""
"use strict";
const net = require("node:net");
const readline = require("node:readline");
const libraries = { 10: "@microsoft/signalr", 8: "signalr8", 6: "signalr6" };

function toWire(value) {
  if (value === undefined || value === null) return null;
  if (value instanceof Uint8Array)
    return { $bytes: Buffer.from(value).toString("base64") };
  if (value instanceof Date) return { $date: value.toISOString() };
  if (Array.isArray(value)) return value.map(toWire);
  if (typeof value !== "object") return value;
  const members = Object.entries(value).map(([name, item]) => [name, toWire(item)]);
  return Object.fromEntries(members);
}

function fromWire(value, subjects) {
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value.map((item) => fromWire(item, subjects));
  if ("$bytes" in value) return new Uint8Array(Buffer.from(value.$bytes, "base64"));
  if ("$date" in value) return new Date(value.$date);
  if ("$subject" in value) return subjects.get(value.$subject);
  return value;
}

function serve(socket) {
  const hubs = new Map();
  const subjects = new Map();
  const streams = new Map();
  const text = (error) => (error ? String(error.message ?? error) : null);
  const write = (line) => socket.writable && socket.write(JSON.stringify(line) + "\n");
  const plain = (args) => args.map((item) => fromWire(item, subjects));

  const operations = {
    async connect({ hub: key, url, version, transport, protocol, on, ...options }) {
      const signalr = require(libraries[version]);
      const http = { transport: signalr.HttpTransportType[transport] };
      if (options.token) http.accessTokenFactory = () => options.token;
      if (options.skip) http.skipNegotiation = true;
      const builder = new signalr.HubConnectionBuilder();
      builder.withUrl(url, http).configureLogging(signalr.LogLevel.None);
      if (protocol === "messagepack") {
        const { MessagePackHubProtocol } = require("@microsoft/signalr-protocol-msgpack");
        builder.withHubProtocol(new MessagePackHubProtocol());
      }
      if (options.reconnect) builder.withAutomaticReconnect(options.reconnect);
      if (options.stateful) builder.withStatefulReconnect();
      const hub = builder.build();
      hubs.set(key, hub);
      const report = (event, data) => write({ hub: key, event, data });
      for (const [method, answer] of Object.entries(on))
        hub.on(method, async (...args) => {
          report(method, toWire(args));
          if (answer.after) await new Promise((go) => setTimeout(go, answer.after));
          if (answer.throws) throw new Error(answer.throws);
          return answer.returns;
        });
      hub.onclose((error) => report("close", text(error)));
      hub.onreconnecting((error) => report("reconnecting", text(error)));
      hub.onreconnected((id) => report("reconnected", id));
      await hub.start();
      return hub.connectionId;
    },
    invoke: ({ hub, method, args }) => hubs.get(hub).invoke(method, ...plain(args)),
    send: ({ hub, method, args }) => hubs.get(hub).send(method, ...plain(args)),
    stop: ({ hub }) => hubs.get(hub).stop(),
    stopAll: () => Promise.allSettled([...hubs.values()].map((hub) => hub.stop())),
    id: ({ hub }) => hubs.get(hub).connectionId,
    state: ({ hub }) => hubs.get(hub).state,
    stream({ hub, stream, method, args }) {
      const report = (event, data) => write({ hub: stream, event, data });
      const subscription = hubs.get(hub).stream(method, ...plain(args)).subscribe({
        next: (item) => report("item", toWire(item)),
        complete: () => report("end", null),
        error: (error) => report("end", text(error)),
      });
      streams.set(stream, subscription);
    },
    dispose: ({ stream }) => streams.get(stream).dispose(),
    subject: ({ subject }) => {
      subjects.set(subject, new (require(libraries[10]).Subject)());
    },
    next: ({ subject, args }) => subjects.get(subject).next(plain(args)[0]),
    complete: ({ subject }) => subjects.get(subject).complete(),
    error: ({ subject, args }) => subjects.get(subject).error(new Error(args[0])),
  };

  readline.createInterface({ input: socket }).on("line", async (line) => {
    const { id, op, ...request } = JSON.parse(line);
    try {
      write({ id, result: toWire(await operations[op](request)) });
    } catch (error) {
      write({ id, error: text(error) });
    }
  });
  socket.on("error", () => {});
}

for (const surprise of ["unhandledRejection", "uncaughtException"])
  process.on(surprise, (error) => console.error(surprise, error));
process.stdin.resume().on("end", () => process.exit());
const server = net.createServer(serve);
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
"""


class JsError(Exception):
    """What a promise in Node was rejected with."""


class JavaScript:
    """One conversation with the driver: numbered requests, and events in queues."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.numbers = itertools.count(1)
        self.waiting: dict[int, asyncio.Future] = {}
        self.history: dict[int, list[tuple]] = defaultdict(list)
        self.queues: dict[tuple, asyncio.Queue] = defaultdict(asyncio.Queue)

    def request(self, op: str, **fields: Any) -> asyncio.Future:
        """Send now, in order; await the answer whenever it suits."""
        number = next(self.numbers)
        self.waiting[number] = future = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": number, "op": op, **fields}, default=to_wire)
        self.writer.write(line.encode() + b"\n")
        return future

    async def listen(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            said = json.loads(line, object_hook=from_wire)
            if "event" in said:
                self.history[said["hub"]].append((said["event"], said["data"]))
                self.queues[said["hub"], said["event"]].put_nowait(said["data"])
                if said["event"] == "end":  # let the reader of items see the end too
                    self.queues[said["hub"], "item"].put_nowait(None)
            elif not (future := self.waiting.pop(said["id"])).done():
                if "error" in said:
                    future.set_exception(JsError(said["error"]))
                    future.exception()  # seen: an answer that nobody awaits is fine
                else:
                    future.set_result(said["result"])

    async def connect(
        self, url: str, transport: str, protocol: str = "json", **options: Any
    ) -> "JsClient":
        """Start a client. `on` maps methods to {returns, throws, after}."""
        if protocol == "messagepack":
            package("msgpack")
        key = next(self.numbers)
        options = {"version": 10, "on": {"Told": {}}, **options}
        fields = {"url": url, "transport": transport, "protocol": protocol, **options}
        return JsClient(self, key, await self.request("connect", hub=key, **fields))


class JsClient:
    """A HubConnection in Node."""

    def __init__(self, js: JavaScript, key: int, connection_id: str | None) -> None:
        self.js, self.key, self.id = js, key, connection_id

    def invoke(self, method: str, *args: Any) -> asyncio.Future:
        return self.js.request("invoke", hub=self.key, method=method, args=args)

    def send(self, method: str, *args: Any) -> asyncio.Future:
        return self.js.request("send", hub=self.key, method=method, args=args)

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """Yield the items; leaving early disposes, an error raises at the end."""
        js, key = self.js, next(self.js.numbers)
        fields = {"stream": key, "method": method, "args": args}
        await js.request("stream", hub=self.key, **fields)
        ended = js.queues[key, "end"]
        try:
            while (item := await js.queues[key, "item"].get()) is not None:
                yield item
        finally:
            if ended.empty():
                await js.request("dispose", stream=key)
        if error := ended.get_nowait():
            raise JsError(error)

    async def collect(self, method: str, *args: Any) -> list[Any]:
        return [item async for item in self.stream(method, *args)]

    async def upload(self) -> "JsSubject":
        subject = JsSubject(self.js, next(self.js.numbers))
        await self.js.request("subject", subject=subject.key)
        return subject

    async def event(self, name: str) -> Any:
        """Wait for close, reconnecting, reconnected, or the arguments of a method."""
        return await self.js.queues[self.key, name].get()

    def happened(self) -> list[str]:
        return [name for name, _ in self.js.history[self.key]]

    def stop(self) -> asyncio.Future:
        return self.js.request("stop", hub=self.key)

    def ask(self, what: str) -> asyncio.Future:
        return self.js.request(what, hub=self.key)


class JsSubject:
    """An upload stream in Node."""

    def __init__(self, js: JavaScript, key: int) -> None:
        self.js, self.key = js, key

    def next(self, *items: Any) -> asyncio.Future:
        sent = [self.js.request("next", subject=self.key, args=[i]) for i in items]
        return sent[-1]

    def complete(self) -> asyncio.Future:
        return self.js.request("complete", subject=self.key)

    def error(self, text: str) -> asyncio.Future:
        return self.js.request("error", subject=self.key, args=[text])


def to_wire(value: Any) -> dict[str, Any]:
    match value:
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case datetime.datetime():
            return {"$date": value.isoformat()}
        case JsSubject():
            return {"$subject": value.key}
    raise TypeError(f"the driver cannot take {value!r}")


def from_wire(value: dict[str, Any]) -> Any:
    match value:
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$date": text}:
            return datetime.datetime.fromisoformat(text)
    return value


@asynccontextmanager
async def javascript(driver: int) -> AsyncIterator[JavaScript]:
    """Talk with the driver; at the end its clients of this talk are stopped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", driver, limit=2**24)
    js = JavaScript(writer)
    listener = asyncio.create_task(js.listen(reader))
    try:
        yield js
    finally:
        with suppress(TimeoutError):
            await asyncio.wait_for(js.request("stopAll"), 2)
        listener.cancel()
        writer.close()


@dataclass
class Stage(Ground):
    """A playground together with JavaScript."""

    js: JavaScript

    async def connect(self, *line: str, **options: Any) -> JsClient:
        return await self.js.connect(self.url, *line, **options)


@asynccontextmanager
async def stage(driver: int, port: int = 0, **options: Any) -> AsyncIterator[Stage]:
    async with playground(port, **options) as ground, javascript(driver) as js:
        yield Stage(ground.url, ground.hub, ground.notes, js)


LINES = [
    (transport, protocol)
    for transport in TRANSPORTS
    for protocol in ("json", "messagepack")
    if (transport, protocol) != ("ServerSentEvents", "messagepack")
]
on_each_line = pytest.mark.parametrize("line", LINES, ids="-".join)
on_each_transport = pytest.mark.parametrize("transport", TRANSPORTS)
PREFIX = "An unexpected error occurred invoking '{}' on the server."
STREAMING = (
    "The client attempted to invoke the streaming '{}' method"
    " with a non-streaming invocation."
)

# --------------------------------------------------------- official JavaScript client

VALUES = [
    None,
    True,
    0,
    -7,
    2**40,
    0.5,
    "",
    "Grüße, 世界 👋🏽\u2028",
    "a\nb\u0000c",
    [],
]
NESTED = {"a": [1, {"b": None}], "Ünï": "x", "": False}


@on_each_line
async def test_js_gets_back_each_kind_of_value_that_it_sends(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        for value in [*VALUES, VALUES, NESTED]:
            assert await client.invoke("Echo", value) == value


@on_each_line
async def test_js_tells_the_server_its_transport_and_protocol(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        assert await client.invoke("Who") == [client.id, None, *line]
        assert list(s.hub.connections) == [client.id]


@on_each_line
async def test_js_reads_none_as_null(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        assert await client.invoke("Nothing") is None


@on_each_line
async def test_js_calls_methods_in_any_case(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        for name in ("FallOver", "fall_over", "FALLOVER"):
            with pytest.raises(JsError) as caught:
                await client.invoke(name)
            assert str(caught.value) == PREFIX.format(name)
        assert await client.invoke("add", 2, 3) == await client.invoke("ADD", 2, 3) == 5


@on_each_line
async def test_js_sends_dataclasses_in_camel_case(driver, line):
    person = {"userName": "Ada", "birthYear": 1815, "friends": ["Charles"]}
    async with stage(driver) as s:
        client = await s.connect(*line)
        older = await client.invoke("Older", person, 5)
        assert older == {**person, "birthYear": 1810}


@on_each_line
async def test_js_sends_bytes(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        if line[1] == "json":
            assert await client.invoke("Reverse", "AAH/") == "/wEA"
        else:
            assert await client.invoke("Reverse", b"\x00\x01\xff") == b"\xff\x01\x00"


@on_each_line
async def test_js_sends_dates(driver, line):
    noon = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)
    async with stage(driver) as s:
        client = await s.connect(*line)
        later = await client.invoke("Later", noon, 1.5)
        if isinstance(later, str):
            later = datetime.datetime.fromisoformat(later)
        assert later == noon + datetime.timedelta(seconds=1.5)


@on_each_line
async def test_js_sends_enums_and_uuids(driver, line):
    identity = "12345678-1234-5678-1234-567812345678"
    async with stage(driver) as s:
        client = await s.connect(*line)
        assert await client.invoke("Same", identity) == identity
        assert await client.invoke("Other", "red") == "green"
        assert await client.invoke("Other", "GREEN") == "red"


@on_each_line
async def test_js_reads_a_big_answer(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        assert await client.invoke("Big", 100_000) == "ä" * 100_000


@on_each_line
async def test_js_sends_a_big_message_where_the_limit_allows_it(driver, line):
    async with stage(driver, maximum_receive_message_size=200_000) as s:
        client = await s.connect(*line)
        text = "€" * 50_000
        assert await client.invoke("Echo", text) == text


@on_each_line
async def test_js_is_closed_when_its_message_is_too_big(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        client.send("Echo", "x" * 40_000)
        closed = await client.event("close")
        assert "Connection closed with an error." in closed
        assert (await s.noted("disconnected"))[0] is not None


@on_each_line
async def test_js_send_runs_the_method_and_expects_no_answer(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        await client.send("Note", "hello")
        await client.send("Refuse")
        assert await s.noted("note") == ("hello",)
        assert await client.invoke("Echo", "still here") == "still here"


@on_each_line
async def test_js_calls_run_in_the_order_sent(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        for number in range(100):
            client.send("Note", str(number))
        noted = [await s.noted("note") for _ in range(100)]
        assert noted == [(str(number),) for number in range(100)]


REFUSED = "Failed to invoke '{}' due to an error on the server."
FAILURES = [
    ("Refuse", (), PREFIX.format("Refuse") + " HubException: not today"),
    ("FallOver", (), PREFIX.format("FallOver")),
    ("No", (), REFUSED.format("No") + " HubException: Method does not exist."),
    ("Add", (1,), REFUSED.format("Add")),
    ("Add", (1, 2, 3), REFUSED.format("Add")),
    ("Add", (1, "two"), REFUSED.format("Add")),
    ("Counter", (3,), STREAMING.format("Counter")),
]


@on_each_line
async def test_js_reads_each_failure_in_the_words_of_signalr(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        for method, arguments, sentence in FAILURES:
            with pytest.raises(JsError) as caught:
                await client.invoke(method, *arguments)
            assert str(caught.value) == sentence


@on_each_line
async def test_js_reads_details_where_the_server_gives_them(driver, line):
    async with stage(driver, enable_detailed_errors=True) as s:
        client = await s.connect(*line)
        with pytest.raises(JsError) as caught:
            await client.invoke("FallOver")
        detail = " ValueError: a detail for the log"
        assert str(caught.value) == PREFIX.format("FallOver") + detail


@on_each_line
async def test_js_cannot_call_what_is_no_hub_method(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        for name in ("on_connected", "OnDisconnected", "_jot", "clients", "__init__"):
            with pytest.raises(JsError, match="Method does not exist"):
                await client.invoke(name)


# ---- streams


@on_each_line
async def test_js_reads_a_stream_to_its_end(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        assert await client.collect("Counter", 200) == list(range(200))
        assert await client.collect("Counter", 0) == []


@on_each_line
async def test_js_reads_two_streams_at_once(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        streams = [client.collect("Counter", 20, 0.002) for _ in range(2)]
        assert await asyncio.gather(*streams) == [list(range(20))] * 2


@on_each_line
async def test_js_sees_the_error_of_a_stream_after_its_items(driver, line):
    got = []
    async with stage(driver) as s:
        client = await s.connect(*line)
        with pytest.raises(JsError) as caught:
            async for item in client.stream("Counter", 5, 0, 3):
                got.append(item)
    sentence = "An error occurred on the server while streaming results."
    assert got == [0, 1, 2]
    assert str(caught.value) == sentence + " HubException: no 3"


@on_each_line
async def test_js_ends_a_stream_early_and_the_generator_closes(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        async with aclosing(client.stream("Endless")) as items:
            async for item in items:
                if item == 5:
                    break
        await s.noted("closed")
        assert await client.invoke("Add", 1, 1) == 2


@on_each_line
async def test_js_leaves_amid_a_stream_and_the_generator_closes(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        items = client.stream("Endless")
        assert await anext(items) == 0
        await client.stop()
        await s.noted("closed")


@on_each_line
async def test_js_streams_only_from_streaming_methods(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        with pytest.raises(JsError, match="non-streaming 'Add' method with a stream"):
            await client.collect("Add", 1, 2)


@on_each_line
async def test_js_uploads_a_stream(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        numbers = await client.upload()
        total = client.invoke("Total", numbers)
        numbers.next(*range(100))
        numbers.complete()
        assert await total == 4950


@on_each_line
async def test_js_uploads_two_streams_between_plain_arguments(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        left, right = await client.upload(), await client.upload()
        joined = client.invoke("Join", left, " & ", right)
        for letter in "abc":
            left.next(letter)
            right.next(letter.upper())
        left.complete()
        right.complete()
        assert await joined == "abc & ABC"


@on_each_line
async def test_js_fails_an_upload_and_the_method_raises(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        numbers = await client.upload()
        total = client.invoke("Total", numbers)
        numbers.next(1)
        numbers.error("out of numbers")
        with pytest.raises(JsError, match="HubException: .*out of numbers"):
            await total
        assert "out of numbers" in (await s.noted("upload failed"))[0]


@on_each_line
async def test_js_goes_on_uploading_after_the_method_returned(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        numbers = await client.upload()
        first = client.invoke("First", numbers)
        numbers.next(7)
        assert await first == 7
        numbers.next(*range(50))
        numbers.complete()
        assert await client.invoke("Add", 1, 1) == 2


@on_each_line
async def test_js_uploads_into_a_stream_that_comes_back(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        numbers = await client.upload()
        async with aclosing(client.stream("Doubled", numbers)) as doubled:
            first = asyncio.ensure_future(anext(doubled))
            await client.invoke("Nothing")  # the stream has been asked for by now
            numbers.next(1, 2, 3)
            assert [await first, await anext(doubled), await anext(doubled)] == [
                2,
                4,
                6,
            ]
            numbers.complete()
            assert [item async for item in doubled] == []


# ---- client results


@on_each_line
async def test_js_answers_the_server(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line, on={"GetName": {"returns": "Ada"}})
        assert await client.invoke("Ask", "GetName", "Sir", 1) == "Ada"
        assert await client.event("GetName") == ["Sir", 1]


@on_each_line
async def test_js_answers_from_outside_a_hub_method_too(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line, on={"GetName": {"returns": ["Ada", 1815]}})
        answer = await s.hub.clients.client(client.id).invoke("GetName", timeout=5)
        assert answer == ["Ada", 1815]


@on_each_line
async def test_js_without_a_handler_is_an_error_for_the_server(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        with pytest.raises(kestrun.HubException, match="didn't provide a result"):
            await s.hub.clients.client(client.id).invoke("GetName", timeout=5)


@on_each_line
async def test_js_with_a_failing_handler_is_an_error_for_the_server(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line, on={"GetName": {"throws": "no name"}})
        with pytest.raises(kestrun.HubException, match="^Error: no name$"):
            await s.hub.clients.client(client.id).invoke("GetName", timeout=5)


@on_each_line
async def test_js_thinks_about_its_answer_and_other_calls_pass(driver, line):
    slow = {"GetName": {"returns": "Ada", "after": 300}}
    async with stage(driver) as s:
        client = await s.connect(*line, on=slow)
        asked = client.invoke("Ask", "GetName")
        await client.event("GetName")
        assert await client.invoke("Add", 1, 1) == 2
        assert not asked.done()
        assert await asked == "Ada"


@on_each_line
async def test_js_answers_too_late(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line, on={"GetName": {"returns": 1, "after": 300}})
        assert await client.invoke("AskBriefly", "GetName") == "too slow"
        assert await client.invoke("Add", 1, 1) == 2


@on_each_line
async def test_js_leaves_before_it_answers(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line, on={"GetName": {"returns": 1, "after": 9000}})
        proxy = s.hub.clients.client(client.id)
        asked = asyncio.create_task(proxy.invoke("GetName"))
        await client.event("GetName")
        await client.stop()
        with pytest.raises(ConnectionError, match=f"'{client.id}' disconnected"):
            await asked


# ---- broadcasts and groups


@on_each_line
async def test_js_hears_what_is_told_to_all(driver, line):
    async with stage(driver) as s:
        clients = [await s.connect(*line) for _ in range(3)]
        await clients[0].invoke("TellAll", "hello")
        heard = [await client.event("Told") for client in clients]
        assert heard == [["hello"]] * 3


async def test_js_clients_of_every_kind_hear_one_broadcast(driver):
    async with stage(driver) as s:
        clients = [await s.connect(*line) for line in LINES]
        await s.hub.clients.all.send("Told", "👋", NESTED, None)
        heard = [await client.event("Told") for client in clients]
        assert heard == [["👋", NESTED, None]] * len(LINES)


@on_each_line
async def test_js_hears_a_thousand_messages_in_order(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        for number in range(1000):
            await s.hub.clients.all.send("Told", number)
        heard = [(await client.event("Told"))[0] for _ in range(1000)]
        assert heard == list(range(1000))


@on_each_line
async def test_js_hears_only_its_groups(driver, line):
    async with stage(driver) as s:
        member, stranger = await s.connect(*line), await s.connect(*line)
        await member.invoke("JoinGroup", "Lobby")
        await stranger.invoke("TellGroup", "Lobby", "first")
        await stranger.invoke("TellGroup", "lobby", "another group")
        assert await member.event("Told") == ["first"]
        await member.invoke("LeaveGroup", "Lobby")
        await stranger.invoke("TellGroup", "Lobby", "too late")
        await member.invoke("TellAll", "last")
        assert await member.event("Told") == ["last"]
        assert await stranger.event("Told") == ["last"]


@on_each_line
async def test_js_tells_others_but_not_itself(driver, line):
    async with stage(driver) as s:
        one, two = await s.connect(*line), await s.connect(*line)
        await one.invoke("TellOthers", "psst")
        await two.invoke("TellAll", "end")
        assert await two.event("Told") == ["psst"]
        assert await one.event("Told") == ["end"]


@on_each_line
async def test_js_that_left_is_in_no_group(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        await client.invoke("JoinGroup", "Lobby")
        assert list(s.hub.groups.members("Lobby")) == [client.id]
        await client.stop()
        await s.noted("disconnected")
        await s.hub.clients.group("Lobby").send("Told", "anyone?")
        assert not s.hub.groups.members("Lobby")


# ---- the end of a connection


@on_each_line
async def test_js_stops_and_the_server_sees_no_error(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        await client.stop()
        assert await client.event("close") is None
        assert await s.noted("disconnected") == (None,)


@on_each_line
async def test_js_starts_again_after_a_stop(driver, line):
    async with stage(driver) as s:
        await (await s.connect(*line)).stop()
        again = await s.connect(*line)
        assert await again.invoke("Add", 1, 1) == 2


@on_each_line
async def test_js_that_is_aborted_stays_away(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line, reconnect=[0, 0, 0])
        client.send("HangUp")
        assert await client.event("close") is None
        assert client.happened() == ["close"]
        assert await s.noted("disconnected") == (None,)


@on_each_line
async def test_js_that_is_aborted_from_outside_loses_its_calls(driver, line):
    async with stage(driver) as s:
        client = await s.connect(*line)
        items = client.stream("Endless")
        await anext(items)
        s.hub.connections[client.id].abort()
        await client.event("close")
        await s.noted("closed")
        assert await client.ask("state") == "Disconnected"


@on_each_line
async def test_js_without_reconnect_is_closed_by_a_shutdown(driver, line):
    async with asyncio.timeout(LIMIT), javascript(driver) as js:
        async with playground() as ground:
            client = await js.connect(ground.url, *line)
        await client.event("close")
        assert client.happened() == ["close"]


@on_each_line
async def test_js_comes_back_to_a_restarted_server(driver, line):
    port = free_port()
    async with asyncio.timeout(LIMIT), javascript(driver) as js:
        async with playground(port) as ground:
            client = await js.connect(ground.url, *line, reconnect=[0] + [50] * 100)
        await client.event("reconnecting")
        async with playground(port) as ground:
            new_id = await client.event("reconnected")
            assert new_id != client.id
            assert await client.invoke("Who") == [new_id, None, *line]
            await client.stop()


@on_each_line
async def test_js_keeps_alive_by_pings(driver, line):
    times = {"keep_alive_interval": 0.2, "client_timeout_interval": 0.6}
    async with stage(driver, **times) as s:
        client = await s.connect(*line)
        await asyncio.sleep(
            0.5
        )  # shorter than the silence that a pinging client may keep
        assert await client.invoke("Add", 1, 1) == 2


async def test_js_that_falls_silent_is_closed_and_may_come_back(driver):
    async with stage(driver, client_timeout_interval=0.3) as s:
        client = await s.connect("WebSockets", reconnect=[0, 0, 0])
        assert "Connection closed with an error." in await client.event("reconnecting")
        assert await client.event("reconnected") != client.id


# ---- ways to connect


@pytest.mark.parametrize("protocol", ["json", "messagepack"])
async def test_js_skips_negotiation(driver, protocol):
    async with stage(driver) as s:
        client = await s.connect("WebSockets", protocol, skip=True)
        assert client.id is None
        assert (await client.invoke("Who"))[2:] == ["WebSockets", protocol]


async def test_js_falls_back_to_what_the_server_offers(driver):
    async with stage(driver, transports=("LongPolling",)) as s:
        client = await s.connect("None", "json")
        assert (await client.invoke("Who"))[2] == "LongPolling"


async def test_js_is_told_that_events_carry_no_messagepack(driver):
    async with stage(driver) as s:
        with pytest.raises(JsError, match="ServerSentEvents.*does not support Binary"):
            await s.connect("ServerSentEvents", "messagepack")


async def test_js_with_a_query_of_its_own_connects(driver):
    async with stage(driver) as s:
        for transport in TRANSPORTS:
            client = await s.js.connect(f"{s.url}?room=7&x=%20", transport)
            request = s.hub.connections[client.id].request
            assert request.query["room"] == "7"


def reader_of_tokens(places: set[str]):
    """Make an `authenticate` option that accepts tokens of the form user:secret."""

    async def authenticate(request: web.Request) -> str:
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        token = header or request.query.get("access_token", "")
        places.add(f"{request.method} {'header' if header else 'query'}")
        if not token.endswith(":secret"):
            raise web.HTTPUnauthorized()
        return token.removesuffix(":secret")

    return authenticate


@on_each_line
async def test_js_shows_its_token_and_becomes_a_user(driver, line):
    places = set()
    async with stage(driver, authenticate=reader_of_tokens(places)) as s:
        ada = await s.connect(*line, token="ada:secret")
        bob = await s.connect(*line, token="bob:secret")
        await s.hub.clients.user("ada").send("Told", "only you")
        assert (await ada.invoke("Who"))[1] == "ada"
        await s.hub.clients.user("bob").send("Told", "your turn")
        assert await ada.event("Told") == ["only you"]
        assert await bob.event("Told") == ["your turn"]
    where = "query" if line[0] == "ServerSentEvents" else "header"
    assert {"POST header", f"GET {where}"} <= places


@on_each_line
async def test_js_with_a_wrong_token_is_told_unauthorized(driver, line):
    async with stage(driver, authenticate=reader_of_tokens(set())) as s:
        with pytest.raises(JsError, match="401"):
            await s.connect(*line, token="guess")
        assert not s.hub.connections


# ---- older versions

on_older_versions = pytest.mark.parametrize("version", [8, 6])


@on_older_versions
@on_each_transport
async def test_older_js_invokes_sends_and_reads_errors(driver, version, transport):
    async with stage(driver) as s:
        client = await s.connect(transport, version=version)
        assert await client.invoke("Echo", NESTED) == NESTED
        await client.send("Note", "hello")
        assert await s.noted("note") == ("hello",)
        with pytest.raises(JsError, match="HubException: not today"):
            await client.invoke("Refuse")


@on_older_versions
@on_each_transport
async def test_older_js_streams_both_ways(driver, version, transport):
    async with stage(driver) as s:
        client = await s.connect(transport, version=version)
        assert await client.collect("Counter", 10) == list(range(10))
        numbers = await client.upload()
        total = client.invoke("Total", numbers)
        numbers.next(1, 2, 3)
        numbers.complete()
        assert await total == 6


@on_older_versions
@on_each_transport
async def test_older_js_hears_broadcasts_and_stops(driver, version, transport):
    async with stage(driver) as s:
        client = await s.connect(transport, version=version)
        await s.hub.clients.all.send("Told", "hello")
        assert await client.event("Told") == ["hello"]
        await client.stop()
        assert await s.noted("disconnected") == (None,)


@on_older_versions
@on_each_transport
async def test_older_js_comes_back_after_a_restart(driver, version, transport):
    port = free_port()
    how = {"version": version, "reconnect": [0] + [50] * 100}
    async with asyncio.timeout(LIMIT), javascript(driver) as js:
        async with playground(port) as ground:
            client = await js.connect(ground.url, transport, **how)
        await client.event("reconnecting")
        async with playground(port):
            await client.event("reconnected")
            assert await client.invoke("Add", 1, 1) == 2
            await client.stop()


@on_each_transport
async def test_js_8_answers_the_server(driver, transport):
    async with stage(driver) as s:
        on = {"GetName": {"returns": "Ada"}}
        client = await s.connect(transport, version=8, on=on)
        assert await client.invoke("Ask", "GetName") == "Ada"


# -------------------------------------------------- stateful reconnect over a bad line


class Line:
    """A TCP line to a server that can be cut, half or whole, and held up."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.passable = asyncio.Event()  # new calls wait until this is set
        self.passable.set()
        self.live: asyncio.Queue[list] = asyncio.Queue()  # sockets that talk WebSocket
        self.ends: list[asyncio.StreamWriter] = []
        self.tasks: set[asyncio.Task] = set()
        self.cuts = 0

    async def carry(self, reader, writer) -> None:
        """Join one call with the server, until either side ends it."""
        self.tasks.add(asyncio.current_task())
        self.ends.append(writer)
        await self.passable.wait()
        back, out = await asyncio.open_connection("127.0.0.1", self.target)
        self.ends.append(out)
        ends = [writer, out]
        await asyncio.gather(
            self.pump(reader, out, ends, counts=True),
            self.pump(back, writer, ends),
            return_exceptions=True,
        )

    async def pump(self, reader, writer, ends, counts: bool = False) -> None:
        """Pass bytes on. The second bytes on a WebSocket say that it is in use."""
        data = await reader.read(65536)
        upgrade = counts and b"upgrade: websocket" in data.lower()
        while data:
            writer.write(data)
            data = await reader.read(65536)
            if data and upgrade:
                upgrade = False
                self.live.put_nowait(ends)
        if writer in ends:
            writer.close()

    async def cut(self, whole: bool = True) -> None:
        """Reset the WebSocket, once it is in use; `whole`: at both ends."""
        ends = await self.live.get()
        if not whole:
            ends.pop()  # the far end stays open, silent
        for writer in ends:
            reset(writer)
        self.cuts += 1


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a socket the hard way, with RST."""
    if (wire := writer.get_extra_info("socket")) and wire.fileno() >= 0:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def bad_line(url: str) -> AsyncIterator[tuple[str, Line]]:
    """Put a Line before a server; yield the address to use instead, and the line."""
    port = url.split(":")[2].split("/")[0]
    line = Line(int(port))
    server = await asyncio.start_server(line.carry, "127.0.0.1", 0)
    mine = server.sockets[0].getsockname()[1]
    try:
        yield url.replace(port, str(mine)), line
    finally:
        server.close()
        for writer in line.ends:
            reset(writer)
        for task in line.tasks:
            task.cancel()
        await asyncio.gather(*line.tasks, return_exceptions=True)


on_each_protocol = pytest.mark.parametrize("protocol", ["json", "messagepack"])


@asynccontextmanager
async def stateful(driver: int, protocol: str, reconnect=None, **options: Any):
    """A playground, a bad line to it, and a client with stateful reconnect on it."""
    options["allow_stateful_reconnects"] = True
    async with stage(driver, **options) as s, bad_line(s.url) as (url, line):
        how = {"stateful": True, "reconnect": reconnect}
        client = await s.js.connect(url, "WebSockets", protocol, **how)
        yield s, line, client


@on_each_protocol
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "half"])
async def test_stateful_js_hears_all_of_a_broadcast_once(driver, protocol, whole):
    async with stateful(driver, protocol) as (s, line, client):
        for number in range(300):
            await s.hub.clients.all.send("Told", number)
            if number % 60 == 30:
                await line.cut(whole)
        heard = [(await client.event("Told"))[0] for _ in range(300)]
        assert heard == list(range(300))
        assert client.happened() == ["Told"] * 300


@on_each_protocol
async def test_stateful_js_reads_a_stream_through_cuts(driver, protocol):
    got = []
    async with stateful(driver, protocol) as (_, line, client):
        async for item in client.stream("Counter", 200, 0.002):
            got.append(item)
            if item % 40 == 20:
                await line.cut()
    assert got == list(range(200))
    assert line.cuts == 5


@on_each_protocol
async def test_stateful_js_uploads_through_cuts(driver, protocol):
    async with stateful(driver, protocol) as (_, line, client):
        numbers = await client.upload()
        total = client.invoke("Total", numbers)
        for number in range(200):
            await numbers.next(number)
            if number % 40 == 20:
                await line.cut()
        numbers.complete()
        assert await total == sum(range(200))


@on_each_protocol
async def test_stateful_js_calls_arrive_once_through_cuts(driver, protocol):
    async with stateful(driver, protocol) as (s, line, client):
        for number in range(100):
            client.send("Note", str(number))
            if number % 20 == 10:
                await line.cut()
        await client.invoke("Note", "end")
        noted = [(await s.noted("note"))[0] for _ in range(101)]
        assert noted == [*map(str, range(100)), "end"]


@on_each_protocol
async def test_stateful_js_stays_who_it_is(driver, protocol):
    async with stateful(driver, protocol) as (s, line, client):
        await client.invoke("JoinGroup", "Lobby")
        await line.cut()
        assert (await client.invoke("Who"))[0] == client.id == await client.ask("id")
        await s.hub.clients.group("Lobby").send("Told", "still in")
        assert await client.event("Told") == ["still in"]
        assert [words[0] for words in drain(s.notes)] == ["connected"]


def drain(queue: asyncio.Queue) -> list:
    return [queue.get_nowait() for _ in range(queue.qsize())]


@on_each_protocol
async def test_stateful_js_answers_through_a_cut(driver, protocol):
    async with stateful(driver, protocol) as (_, line, client):
        assert await client.invoke("Add", 1, 1) == 2
        asked = asyncio.gather(*(client.invoke("Add", n, n) for n in range(50)))
        await line.cut()
        assert await asked == [2 * n for n in range(50)]


@on_each_protocol
@pytest.mark.parametrize("seed", range(3))
async def test_stateful_js_loses_nothing_to_random_cuts(driver, protocol, seed):
    dice = random.Random(seed)
    async with stateful(driver, protocol) as (s, line, client):
        numbers = await client.upload()
        total = client.invoke("Total", numbers)
        stream = asyncio.create_task(client.collect("Counter", 300, 0.001))
        for number in range(300):
            await s.hub.clients.all.send("Told", number)
            numbers.next(number)
            await asyncio.sleep(dice.random() / 500)
            if dice.random() < 0.04:
                await line.cut(whole=dice.random() < 0.7)
        numbers.complete()
        assert await total == sum(range(300))
        assert await stream == list(range(300))
        heard = [(await client.event("Told"))[0] for _ in range(300)]
        assert heard == list(range(300)) and line.cuts
        assert await client.ask("id") == client.id


@on_each_protocol
async def test_stateful_js_that_comes_too_late_starts_afresh(driver, protocol):
    late = {"disconnect_timeout": 0.3, "reconnect": [0, 50, 50]}
    async with stateful(driver, protocol, **late) as (s, line, client):
        line.passable.clear()
        await line.cut()
        await s.noted("disconnected")
        line.passable.set()
        new_id = await client.event("reconnected")
        assert new_id != client.id
        assert (await client.invoke("Who"))[0] == new_id


@on_each_protocol
async def test_stateful_js_that_stops_leaves_no_ghost(driver, protocol):
    async with stateful(driver, protocol) as (s, _, client):
        await client.stop()
        assert await s.noted("disconnected") == (None,)
        assert not s.hub.connections


async def test_stateful_js_gets_an_ordinary_connection_where_it_is_off(driver):
    async with stage(driver) as s, bad_line(s.url) as (url, line):
        how = {"stateful": True, "reconnect": [0, 50]}
        client = await s.js.connect(url, "WebSockets", **how)
        await line.cut()
        assert await client.event("reconnected") != client.id


# --------------------------------------------------------------------------- pysignalr


@asynccontextmanager
async def pysignalr_client(url: str, protocol: str, **options: Any):
    """A connected pysignalr client; it runs until the block ends."""
    package("pysignalr")
    from pysignalr.client import SignalRClient
    from pysignalr.protocol.json import JSONProtocol
    from pysignalr.protocol.messagepack import MessagepackProtocol

    codec = JSONProtocol() if protocol == "json" else MessagepackProtocol()
    client = SignalRClient(url, codec, **options)
    opened, client.failures = asyncio.Event(), asyncio.Queue()

    async def on_open() -> None:
        opened.set()

    client.on_open(on_open)
    client.on_error(client.failures.put)
    running = asyncio.create_task(client.run())
    waiting = asyncio.create_task(opened.wait())
    await asyncio.wait({running, waiting}, return_when="FIRST_COMPLETED")
    try:
        if not opened.is_set():
            waiting.cancel()
            await running  # raises what went wrong
        yield client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def pysignalr(protocol: str, client: dict[str, Any] | None = None, **server: Any):
    """A playground, and a pysignalr client in it."""
    async with (
        playground(**server) as ground,
        pysignalr_client(ground.url, protocol, **client or {}) as joined,
    ):
        yield ground, joined


async def pysignalr_invoke(client: Any, method: str, *arguments: Any) -> Any:
    answers = asyncio.Queue()
    await client.send(method, list(arguments), answers.put)
    return (await answers.get()).result


@on_each_protocol
async def test_pysignalr_invokes(protocol):
    async with pysignalr(protocol) as (_, client):
        assert await pysignalr_invoke(client, "Add", 2, 3) == 5
        assert await pysignalr_invoke(client, "Echo", NESTED) == NESTED
        assert await pysignalr_invoke(client, "Nothing") is None
        who = await pysignalr_invoke(client, "Who")
        assert who[2:] == ["WebSockets", protocol]


@on_each_protocol
async def test_pysignalr_sends_without_an_answer(protocol):
    async with pysignalr(protocol) as (ground, client):
        await client.send("Note", ["hello"])
        assert await ground.noted("note") == ("hello",)


@on_each_protocol
async def test_pysignalr_receives(protocol):
    heard = asyncio.Queue()
    async with pysignalr(protocol) as (ground, client):
        client.on("Told", heard.put)
        await ground.hub.clients.all.send("Told", "👋", None, NESTED)
        assert await heard.get() == ["👋", None, NESTED]


@on_each_protocol
async def test_pysignalr_reads_errors(protocol):
    async with pysignalr(protocol) as (_, client):
        await client.send("Refuse", [], asyncio.Queue().put)
        error = (await client.failures.get()).error
        assert error == PREFIX.format("Refuse") + " HubException: not today"
        assert await pysignalr_invoke(client, "Add", 1, 1) == 2


@on_each_protocol
async def test_pysignalr_reads_a_stream(protocol):
    items, ends = asyncio.Queue(), asyncio.Queue()
    async with pysignalr(protocol) as (_, client):
        await client.stream("Counter", [5], items.put, ends.put)
        await ends.get()
        assert drain(items) == [0, 1, 2, 3, 4]


@on_each_protocol
async def test_pysignalr_reads_the_error_of_a_stream(protocol):
    items, errors = asyncio.Queue(), asyncio.Queue()
    async with pysignalr(protocol) as (_, client):
        await client.stream("Counter", [5, 0, 2], items.put, None, errors.put)
        assert "HubException: no 2" in (await errors.get()).error
        assert drain(items) == [0, 1]


@on_each_protocol
async def test_pysignalr_uploads(protocol):
    async with pysignalr(protocol) as (ground, client):
        async with client.client_stream("Keep") as stream:
            for number in range(30):
                await stream.send(number)
        assert await ground.noted("kept") == (list(range(30)),)


@on_each_protocol
async def test_pysignalr_answers_the_server(protocol):
    async def name(arguments: list) -> str:
        return f"{arguments[0]} Ada"

    async with pysignalr(protocol) as (_, client):
        client.on("GetName", name)
        assert await pysignalr_invoke(client, "Ask", "GetName", "Lady") == "Lady Ada"


@on_each_protocol
async def test_pysignalr_leaves_and_the_server_sees_it(protocol):
    async with playground() as ground:
        async with pysignalr_client(ground.url, protocol):
            await ground.noted("connected")
        await ground.noted("disconnected")
        assert not ground.hub.connections


async def test_pysignalr_shows_a_token_in_its_headers():
    places = set()
    ada = {"headers": {"Authorization": "Bearer ada:secret"}}
    async with pysignalr("json", ada, authenticate=reader_of_tokens(places)) as (
        _,
        client,
    ):
        assert (await pysignalr_invoke(client, "Who"))[1] == "ada"
        assert places == {"POST header", "GET header"}


async def test_pysignalr_without_a_token_is_refused():
    package("pysignalr")
    from pysignalr.client import SignalRClient
    from pysignalr.exceptions import AuthorizationError

    async with playground(authenticate=reader_of_tokens(set())) as ground:
        running = asyncio.create_task(SignalRClient(ground.url).run())
        await asyncio.wait({running})
        assert isinstance(running.exception(), AuthorizationError)


@on_each_protocol
async def test_pysignalr_pings_both_ways(protocol):
    times = {"keep_alive_interval": 0.1, "client_timeout_interval": 1.5}
    pings = {"ping_interval": 0.1, "signalr_ping_interval": 0.1}
    async with pysignalr(protocol, pings, **times) as (_, client):
        await asyncio.sleep(0.5)  # some of each kind of ping
        assert await pysignalr_invoke(client, "Add", 1, 1) == 2


# ------------------------------------------------------------------------- signalrcore

CORE_LINES = [
    ("WebSockets", "json"),
    ("WebSockets", "messagepack"),
    ("ServerSentEvents", "json"),
    ("LongPolling", "json"),
]
on_each_core_line = pytest.mark.parametrize("line", CORE_LINES, ids="-".join)


class Core:
    """signalrcore runs in threads and calls back from them: here it fills queues."""

    def __init__(self, url: str, transport: str, protocol: str, **options: Any) -> None:
        package("signalrcore")
        from signalrcore.hub_connection_builder import HubConnectionBuilder
        from signalrcore.types import HttpTransportType, HubProtocolEncoding

        encoding = {"json": "Text", "messagepack": "Binary"}[protocol]
        options = {"transport": HttpTransportType(transport), **options}
        builder = HubConnectionBuilder().with_url(url, options)
        builder.configure_logging(logging.CRITICAL)
        builder.with_hub_protocol(HubProtocolEncoding(encoding))
        self.loop = asyncio.get_running_loop()
        self.hub = builder.build()
        self.queues: dict[str, asyncio.Queue] = defaultdict(asyncio.Queue)
        self.hub.on_open(lambda: self.put("open", None))
        self.hub.on_close(lambda: self.put("close", None))
        self.hub.on_error(lambda completion: self.put("error", completion.error))
        self.hub.on("Told", lambda arguments: self.put("Told", arguments))

    def put(self, name: str, value: Any) -> None:
        self.loop.call_soon_threadsafe(self.queues[name].put_nowait, value)

    async def next(self, name: str) -> Any:
        return await self.queues[name].get()

    async def send(self, method: str, arguments: Any) -> None:
        await asyncio.to_thread(self.hub.send, method, arguments)

    async def invoke(self, method: str, *arguments: Any) -> Any:
        def answered(completion: Any) -> None:
            self.put("answer", completion.result)

        await asyncio.to_thread(self.hub.invoke, method, list(arguments), answered)
        return await self.next("answer")


@asynccontextmanager
async def signalrcore_client(url: str, *line: str, **options: Any):
    """A connected signalrcore client. It stops at the end: a blocking affair."""
    core = Core(url, *line, **options)
    await asyncio.to_thread(core.hub.start)
    await core.next("open")
    try:
        yield core
    finally:
        await asyncio.to_thread(core.hub.stop)


@asynccontextmanager
async def signalrcore(*line: str, client: dict[str, Any] | None = None, **server: Any):
    """A playground, and a signalrcore client in it."""
    server["keep_alive_interval"] = 0.1  # its stop() waits for the next byte from us
    async with (
        playground(**server) as ground,
        signalrcore_client(ground.url, *line, **client or {}) as joined,
    ):
        yield ground, joined


@on_each_core_line
async def test_signalrcore_invokes(line):
    async with signalrcore(*line) as (_, client):
        assert await client.invoke("Add", 2, 3) == 5
        assert await client.invoke("Echo", NESTED) == NESTED
        assert (await client.invoke("Who"))[2:] == [*line]


@on_each_core_line
async def test_signalrcore_sends(line):
    async with signalrcore(*line) as (ground, client):
        await client.send("Note", ["hello"])
        assert await ground.noted("note") == ("hello",)


@on_each_core_line
async def test_signalrcore_receives(line):
    async with signalrcore(*line) as (ground, client):
        for text in ("one", "two"):
            await ground.hub.clients.all.send("Told", text, None, NESTED)
            assert await client.next("Told") == [text, None, NESTED]


@on_each_core_line
async def test_signalrcore_reads_errors(line):
    async with signalrcore(*line) as (_, client):
        await client.send("Refuse", [])
        error = await client.next("error")
        assert error == PREFIX.format("Refuse") + " HubException: not today"


@on_each_core_line
async def test_signalrcore_reads_a_stream(line):
    def subscribe(hub: Any) -> None:
        names = ("next", "complete", "error")
        answers = {name: partial(client.put, name) for name in names}
        hub.stream("Counter", [4, 0.1]).subscribe(answers)

    async with signalrcore(*line) as (ground, client):
        await asyncio.to_thread(subscribe, client.hub)
        assert [await client.next("next") for _ in range(4)] == [0, 1, 2, 3]
        # Of one poll it reads one message; the completion may need another to follow.
        await ground.hub.clients.all.send("Told", "something")
        await client.next("complete")


@on_each_core_line
async def test_signalrcore_uploads(line):
    if line[1] == "messagepack":
        pytest.xfail("signalrcore leaves the invocation id out, so the message is none")
    async with signalrcore(*line) as (ground, client):
        from signalrcore.subject import Subject

        numbers = Subject()
        await client.send("Keep", numbers)
        for number in range(10):
            await asyncio.to_thread(numbers.next, number)
        await asyncio.to_thread(numbers.complete)
        assert await ground.noted("kept") == (list(range(10)),)


@on_each_core_line
async def test_signalrcore_stops_and_the_server_sees_it(line):
    async with playground(keep_alive_interval=0.1) as ground:
        async with signalrcore_client(ground.url, *line) as client:
            await ground.noted("connected")
        await client.next("close")
        await ground.noted("disconnected")
        assert not ground.hub.connections


async def test_signalrcore_skips_negotiation():
    skip = {"skip_negotiation": True}
    async with signalrcore("WebSockets", "json", client=skip) as (_, client):
        assert await client.invoke("Add", 1, 1) == 2


async def test_signalrcore_shows_a_token():
    ada = {"access_token_factory": lambda: "ada:secret"}
    server = {"authenticate": reader_of_tokens(set())}
    async with signalrcore("WebSockets", "json", client=ada, **server) as (_, client):
        assert (await client.invoke("Who"))[1] == "ada"


# ------------------------------------------------- a client written for Kestrun's sample

SAMPLE = (
    "ReceiveLog",
    "ReceiveEvent",
    "ReceiveGroupMessage",
    "GroupJoined",
    "GroupLeft",
)


@asynccontextmanager
async def sample(driver: int, *line: str):
    """The demo application, a client of the PowerShell sample, and an HTTP client."""
    async with (
        asyncio.timeout(LIMIT),
        serving(kestrun.create_app()) as base,
        javascript(driver) as js,
        aiohttp.ClientSession(base) as http,
    ):
        on = {name: {} for name in (*SAMPLE, "ReceiveEcho")}
        yield await js.connect(f"{base}/hubs/kestrun", *line, on=on), http


def is_stamp(text: str) -> bool:
    """Whether this is ISO 8601 in UTC, with a Z."""
    return (
        text.endswith("Z") and datetime.datetime.fromisoformat(text).tzinfo is not None
    )


@on_each_line
async def test_the_sample_hears_the_log(driver, line):
    async with sample(driver, *line) as (client, http):
        for level in ("information", "Warning", "ERROR"):
            async with http.get(f"/api/ps/log/{level}") as answer:
                said = f"Broadcasted {level.title()} log message"
                assert (answer.status, await answer.text()) == (200, said)
            (entry,) = await client.event("ReceiveLog")
            assert entry["level"] == level.title() and is_stamp(entry["timestamp"])
            assert entry["message"].startswith(f"Test {level.title()} message from")


@on_each_line
async def test_the_sample_hears_the_event(driver, line):
    async with sample(driver, *line) as (client, http):
        async with http.get("/api/ps/event") as answer:
            assert await answer.text() == "Broadcasted custom event"
        (event,) = await client.event("ReceiveEvent")
        assert event["eventName"] == "PowerShellEvent" and is_stamp(event["timestamp"])
        assert event["data"].keys() == {"Message", "Timestamp", "Random"}


@on_each_line
async def test_the_sample_joins_hears_and_leaves_a_group(driver, line):
    async with sample(driver, *line) as (client, http):
        await client.invoke("JoinGroup", "Ops & Co")
        assert await client.event("GroupJoined") == ["Ops & Co"]
        async with http.post("/api/group/broadcast/Ops%20%26%20Co") as answer:
            assert (await answer.json())["GroupName"] == "Ops & Co"
        (message,) = await client.event("ReceiveGroupMessage")
        assert message.keys() == {"Message", "Timestamp", "Sender"}
        await client.invoke("LeaveGroup", "Ops & Co")
        assert await client.event("GroupLeft") == ["Ops & Co"]


@on_each_line
async def test_the_sample_hears_requests_to_join_and_leave(driver, line):
    async with sample(driver, *line) as (client, http):
        for what, name in (
            ("join", "GroupJoinRequest"),
            ("leave", "GroupLeaveRequest"),
        ):
            async with http.post(f"/api/group/{what}/Ops") as answer:
                assert (await answer.json())["Success"] is True
            (event,) = await client.event("ReceiveEvent")
            assert (event["eventName"], event["data"]["GroupName"]) == (name, "Ops")


@on_each_line
async def test_the_sample_hears_its_echo(driver, line):
    async with sample(driver, *line) as (client, _):
        await client.send("Echo", "Grüße 👋")
        assert await client.event("ReceiveEcho") == ["Grüße 👋"]


async def progress_of(client: JsClient, task_id: str) -> list[dict]:
    """What the client hears of an operation, up to its completion."""
    heard = []
    while not heard or heard[-1]["eventName"] != "OperationComplete":
        (event,) = await client.event("ReceiveEvent")
        if event["data"].get("TaskId") == task_id:
            heard.append(event)
    return heard


async def test_the_sample_watches_a_four_second_operation(driver):
    async with sample(driver, "WebSockets", "json") as (client, http):
        async with http.post("/api/operation/start?seconds=4") as answer:
            task_id = (await answer.json())["TaskId"]
        *steps, end = await progress_of(client, task_id)
        assert {step["eventName"] for step in steps} == {"OperationProgress"}
        shown = [step["data"]["Progress"] for step in steps]
        assert [percent for percent in shown if percent] == [25, 50, 75, 100]
        assert (end["data"]["State"], end["data"]["Progress"]) == ("Completed", 100)


async def test_the_sample_sees_an_operation_cancelled(driver):
    async with sample(driver, "WebSockets", "json") as (client, http):
        async with http.post("/api/operation/start?seconds=60") as answer:
            task_id = (await answer.json())["TaskId"]
        async with http.post(f"/api/operation/cancel/{task_id}") as answer:
            assert answer.status == 200
        *_, end = await progress_of(client, task_id)
        assert end["data"]["State"] == "Canceled"


# ------------------------------------------------------------------ the running program


class Program:
    """`python kestrun.py` and what it printed."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.base = process, f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.more = asyncio.Condition()

    async def read(self) -> None:
        async for line in self.process.stdout:
            async with self.more:
                self.lines.append(line.decode().rstrip())
                self.more.notify_all()

    def output(self) -> str:
        return "\n".join(self.lines)

    async def printed(self, text: str) -> None:
        """Wait until the output contains `text`."""
        async with self.more:
            await self.more.wait_for(lambda: text in self.output())

    async def end(self, how: signal.Signals) -> int:
        """Send a signal; return the exit status, which must come within 5 seconds."""
        self.process.send_signal(how)
        async with asyncio.timeout(5):
            return await self.process.wait()


@asynccontextmanager
async def program(
    *arguments: str, script: Path = KESTRUN, port: int = 0, by_env=False, **env: str
) -> AsyncIterator[Program]:
    """Start the program and wait until it answers."""
    port = port or free_port()
    if by_env:
        env["PORT"] = str(port)
    else:
        arguments += ("--port", str(port))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        cwd=script.parent,
    )
    running = Program(process, port)
    reading = asyncio.create_task(running.read())
    try:
        async with asyncio.timeout(LIMIT):
            async with asyncio.timeout(10):
                await running.printed("/hubs/")
            yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        return answer.status, await answer.text()


async def post(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.post(url) as answer:
        return await answer.json()


async def test_the_program_prints_where_its_page_and_hub_are():
    async with program() as running:
        assert f"{running.base}/hubs/kestrun" in running.output()
        assert re.search(rf"{running.base}/?(\s|$)", running.output(), re.MULTILINE)
        status, page = await get(running.base)
        assert status == 200 and "<title>" in page


async def test_the_program_takes_its_port_from_the_environment():
    async with program(by_env=True) as running:
        assert (await get(f"{running.base}/healthz"))[0] == 200


async def test_the_program_mounts_the_hub_where_it_is_told(driver):
    async with (
        program("--hub-path", "/hubs/other") as running,
        javascript(driver) as js,
    ):
        client = await js.connect(f"{running.base}/hubs/other", "WebSockets")
        assert client.id


async def test_the_program_runs_as_a_lone_copy(tmp_path, driver):
    copy = Path(shutil.copy(KESTRUN, tmp_path))
    async with program(script=copy) as running, javascript(driver) as js:
        assert "<title>" in (await get(running.base))[1]
        await js.connect(f"{running.base}/hubs/kestrun", "WebSockets")
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"kestrun.py"}


async def test_the_program_says_how_to_get_messagepack(tmp_path, driver):
    (tmp_path / "msgpack.py").write_text("raise ImportError('none here')")
    async with program(PYTHONPATH=str(tmp_path)) as running, javascript(driver) as js:
        hub = f"{running.base}/hubs/kestrun"
        with pytest.raises(JsError, match="'messagepack' is not supported"):
            await js.connect(hub, "WebSockets", "messagepack")
        assert await js.connect(hub, "WebSockets", "json")
        await running.end(signal.SIGTERM)
    said = [line for line in running.lines if "msgpack" in line]
    assert len(said) == 1 and "pip install msgpack" in said[0]
    assert "Traceback" not in running.output()


async def test_the_program_logs_no_query_string(driver):
    how = ("--token", "hidden-token", "--log-level", "Debug")
    async with program(*how) as running, javascript(driver) as js:
        hub = f"{running.base}/hubs/kestrun"
        for transport in TRANSPORTS:
            client = await js.connect(hub, transport, token="hidden-token")
            await client.stop()
        await get(f"{running.base}/healthz?access_token=hidden-token")
        await running.end(signal.SIGTERM)
    assert "hidden-token" not in running.output()
    assert "access_token" not in running.output()


async def test_the_program_logs_a_malformed_request_in_one_line_without_its_words():
    async with program("--token", "hidden-token") as running:
        port = int(running.base.rpartition(":")[2])
        for head in (
            "/?access_token=hidden-token HTTP/9.9",
            "/ HTTP/1.1\r\nA hidden: x",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {head}\r\n\r\n".encode())
            assert b" 400 " in await reader.readline()
            writer.close()
        await running.printed("refused a malformed request: 400")
        await running.end(signal.SIGTERM)
    assert "hidden" not in running.output()
    assert "Traceback" not in running.output()


async def test_the_program_ends_a_long_poll_that_comes_while_it_shuts_down():
    async with program() as running, aiohttp.ClientSession() as http:
        hub = f"{running.base}/hubs/kestrun"
        async with http.post(f"{hub}/negotiate?negotiateVersion=1") as answer:
            url = f"{hub}?id={(await answer.json())['connectionToken']}"
        polls = [b"", b"{}\x1e", b'{"type":7,"allowReconnect":true}\x1e']
        for number, body in enumerate(polls):
            if number == 1:
                await http.post(url, data=b'{"protocol":"json","version":1}\x1e')
            if number == 2:
                running.process.send_signal(signal.SIGTERM)
                await running.printed("shutting down")
            async with http.get(url) as answer:
                assert await answer.read() == body
        async with http.get(url) as answer:
            assert answer.status == 204
        assert await running.process.wait() == 0


async def test_the_program_asks_for_its_token():
    async with program(KESTRUN_TOKEN="sesame") as running:
        statuses = [
            (await get(running.base + path))[0]
            for path in ("/", "/healthz", "/api/ps/event", "/api/operation/list")
        ]
        assert statuses == [200, 200, 401, 401]
        query = "?access_token=sesame"
        assert (await get(f"{running.base}/api/ps/event{query}"))[0] == 200


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
async def test_the_program_ends_soon_with_clients_of_every_kind(driver, how):
    async with program() as running, javascript(driver) as js:
        hub, again = f"{running.base}/hubs/kestrun", [60_000]
        clients = [await js.connect(hub, *line, reconnect=again) for line in LINES]
        assert await running.end(how) == 0
        for client in clients:
            await client.event("reconnecting")
        assert "Traceback" not in running.output()


async def test_the_program_says_that_operations_are_cancelled_before_it_ends(driver):
    async with program() as running, javascript(driver) as js:
        on, hub = {"ReceiveEvent": {}}, f"{running.base}/hubs/kestrun"
        how = {"on": on, "reconnect": [60_000]}
        clients = [await js.connect(hub, *line, **how) for line in LINES]
        started = await post(f"{running.base}/api/operation/start?seconds=60")
        assert await running.end(signal.SIGTERM) == 0
        for client in clients:
            await client.event("reconnecting")
            *_, (event, arguments), last = js.history[client.key]
            assert (event, last[0]) == ("ReceiveEvent", "reconnecting")
            said = arguments[0]["data"]
            assert (said["TaskId"], said["State"]) == (started["TaskId"], "Canceled")


async def test_the_program_comes_back_and_so_do_its_clients(driver):
    port = free_port()
    async with javascript(driver) as js:
        async with program(port=port) as running:
            hub = f"{running.base}/hubs/kestrun"
            client = await js.connect(hub, "WebSockets", reconnect=[50] * 200)
            assert await running.end(signal.SIGTERM) == 0
        async with program(port=port):
            assert await client.event("reconnected") != client.id


async def test_the_program_refuses_a_port_in_use_in_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(KESTRUN), "--port", port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        async with asyncio.timeout(10):
            output, _ = await process.communicate()
    assert process.returncode != 0
    assert port in output.decode() and "Traceback" not in output.decode()


# --------------------------------------------------------- the page in a real browser


@asynccontextmanager
async def browsing(chromium: str) -> AsyncIterator[Any]:
    """An empty page in a browser without cookies; its script errors fail the test."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.connect_over_cdp(chromium)
        context = await browser.new_context()
        page = await context.new_page()
        page.set_default_timeout(8000)
        errors: list[Exception] = []
        page.on("pageerror", lambda error: errors.append(error))
        yield page
        await context.close()
        assert not errors


@asynccontextmanager
async def shown(chromium: str, **options: Any) -> AsyncIterator[Any]:
    """The demo application and its page, connected."""
    app = kestrun.create_app(**options)
    async with asyncio.timeout(LIMIT), serving(app) as base, browsing(chromium) as page:
        await page.goto(base)
        await sees(page, "#state", "Connected")
        yield page


async def sees(page: Any, selector: str, text: str = "") -> None:
    """Wait until an element shows `text`."""
    await page.locator(selector).filter(has_text=text).first.wait_for()


async def misses(page: Any, selector: str, text: str = "") -> None:
    """Wait until no element shows `text`."""
    found = page.locator(selector).filter(has_text=text).first
    await found.wait_for(state="hidden")


async def start(page: Any, seconds: int) -> str:
    """Start an operation from the page; return a selector of its element."""
    await page.fill("#seconds", str(seconds))
    await page.click("#start")
    shown = page.locator("#operations [data-task-id]").first
    await shown.wait_for()
    return f'[data-task-id="{await shown.get_attribute("data-task-id")}"]'


async def test_the_page_connects_and_says_how(chromium):
    async with shown(chromium) as page:
        await sees(page, "#transport", "WebSockets")
        assert "Kestrun" in await page.title()


async def test_the_page_shows_a_log_message_of_each_level(chromium):
    async with shown(chromium) as page:
        for level in ("Information", "Warning", "Error"):
            await page.click(f"#log-{level.lower()}")
            await sees(page, "#log li", f"Test {level} message from Kestrun")


async def test_the_page_shows_the_event(chromium):
    async with shown(chromium) as page:
        await page.click("#event")
        await sees(page, "#log li", "PowerShellEvent")


async def test_the_page_shows_an_echo_as_text(chromium):
    said = "Grüße 👋 <b>&amp;</b> <img src=x onerror=alert(1)>"
    async with shown(chromium) as page:
        await page.fill("#echo", said)
        await page.click("#echo-send")
        await sees(page, "#log li", said)
        assert await page.locator("#log b, #log img").count() == 0


async def test_the_page_joins_hears_and_leaves_a_group(chromium):
    async with shown(chromium) as page:
        await page.fill("#group", "Crew & Co")
        await page.click("#join")
        await sees(page, "#groups li", "Crew & Co")
        await page.click("#clear")
        await page.click("#broadcast")
        await sees(page, "#log li", "Group message")
        await page.click("#leave")
        await misses(page, "#groups li", "Crew & Co")


async def test_the_page_asks_others_to_join_or_leave(chromium):
    async with shown(chromium) as page:
        await page.fill("#group", "Crew")
        for what in ("Join", "Leave"):
            await page.click(f"#ask-{what.lower()}")
            await sees(page, "#log li", f"Group{what}Request")


async def test_the_page_shows_an_operation_to_its_end_and_removes_it(chromium):
    async with shown(chromium) as page:
        operation = await start(page, 2)
        await sees(page, f"{operation} .state", "Completed")
        assert (
            await page.locator(f"{operation} progress").evaluate("e => e.value") == 100
        )
        await page.click(f"{operation} .remove")
        await misses(page, operation)
        listed = await page.evaluate("fetch('api/operation/list').then(r => r.json())")
        assert listed == []


async def test_the_page_shows_the_progress_of_an_operation(chromium):
    async with shown(chromium) as page:
        operation = await start(page, 4)
        script = "s => document.querySelector(s).value === 25"
        await page.wait_for_function(script, arg=f"{operation} progress")
        await sees(page, f"{operation} .state", "Running")


async def test_the_page_asks_for_the_status_of_an_operation(chromium):
    async with shown(chromium) as page:
        operation = await start(page, 60)
        async with page.expect_response("**/api/operation/status/*") as answer:
            await page.click(f"{operation} .status")
        assert (await (await answer.value).json())["State"] == "Running"
        await sees(page, f"{operation} .state", "Running")


async def test_the_page_cancels_an_operation(chromium):
    async with shown(chromium) as page:
        operation = await start(page, 60)
        await page.click(f"{operation} .cancel")
        await sees(page, f"{operation} .state", "Canceled")
        await page.locator(f"{operation} .remove").wait_for()


async def test_the_page_clears_its_log(chromium):
    async with shown(chromium) as page:
        await page.click("#event")
        await sees(page, "#log li", "PowerShellEvent")
        await page.click("#clear")
        assert await page.locator("#log li").count() == 0


async def test_the_page_hears_what_another_client_does(chromium):
    async with shown(chromium) as page, aiohttp.ClientSession() as http:
        url = f"{page.url}api/ps/log/critical"
        async with http.get(url, params={"message": "a <i>fire</i>"}) as answer:
            assert answer.status == 200
        await sees(page, "#log li", "a <i>fire</i>")


async def test_the_page_comes_back_after_a_restart_and_rejoins_its_groups(chromium):
    port = free_port()
    async with asyncio.timeout(LIMIT), browsing(chromium) as page:
        async with serving(kestrun.create_app(), port) as base:
            await page.goto(base)
            await sees(page, "#state", "Connected")
            await page.fill("#group", "Crew")
            await page.click("#join")
            await sees(page, "#groups li", "Crew")
        await sees(page, "#state", "Reconnecting")
        async with serving(kestrun.create_app(), port):
            await sees(page, "#state", "Connected")
            await sees(page, "#groups li", "Crew")
            status = "fetch('healthz').then(r => r.json()).then(h => h.Groups)"
            await page.wait_for_function(f"async () => (await {status}) === 1")
            await page.click("#clear")
            await page.click("#broadcast")
            await sees(page, "#log li", "Group message")


async def test_the_page_asks_for_the_token_and_uses_it_everywhere(chromium):
    app = kestrun.create_app(token="sesame")
    async with asyncio.timeout(LIMIT), serving(app) as base, browsing(chromium) as page:
        await page.goto(base)
        await page.locator("#token-form").wait_for()
        for token in ("guess", "sesame"):
            assert "Connected" not in await page.inner_text("#state")
            await page.fill("#token", token)
            await page.press("#token", "Enter")
            if token == "guess":
                await sees(page, "#state", "Unauthorized")
        await sees(page, "#state", "Connected")
        await page.locator("#token-form").wait_for(state="hidden")
        await page.click("#event")
        await sees(page, "#log li", "PowerShellEvent")


async def test_the_page_works_below_another_path(chromium):
    app = web.Application()
    app.add_subapp("/demo/", kestrun.create_app())
    async with asyncio.timeout(LIMIT), serving(app) as base, browsing(chromium) as page:
        await page.goto(f"{base}/demo/")
        await sees(page, "#state", "Connected")
        await page.click("#event")
        await sees(page, "#log li", "PowerShellEvent")


async def test_the_page_asks_no_other_host_for_anything(chromium):
    asked = []
    app = kestrun.create_app()
    async with asyncio.timeout(LIMIT), serving(app) as base, browsing(chromium) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        await page.goto(base)
        await sees(page, "#state", "Connected")
    host = base.removeprefix("http:")
    ours = (f"http:{host}", f"ws:{host}", "data:")
    assert asked and all(url.startswith(ours) for url in asked)


async def test_the_page_never_writes_html():
    async with asyncio.timeout(5), serving(kestrun.create_app()) as base:
        page = (await get(base))[1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", page
    )


# ---- the official client in a page of another origin

OFFICIAL_PAGE = """<!doctype html><title>Another origin</title><script src="signalr.js">
</script><ol id="log"></ol><script>
async function connect(url, transport, token) {
  const options = { transport: signalR.HttpTransportType[transport] };
  if (token) options.accessTokenFactory = () => token;
  const hub = new signalR.HubConnectionBuilder().withUrl(url, options).build();
  const say = (text) => {
    const line = document.createElement("li");
    line.textContent = text;
    document.querySelector("#log").append(line);
  };
  hub.on("ReceiveEcho", say);
  await hub.start();
  await hub.invoke("Echo", `${transport} works`);
  return hub.connectionId;
}
</script>"""


@asynccontextmanager
async def elsewhere(chromium: str, node_modules: Path):
    """A page of another origin that has the official client."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=OFFICIAL_PAGE, content_type="text/html")

    async def script(request: web.Request) -> web.FileResponse:
        name = "@microsoft/signalr/dist/browser/signalr.js"
        return web.FileResponse(node_modules / name)

    app = web.Application()
    app.add_routes([web.get("/", page), web.get("/signalr.js", script)])
    async with asyncio.timeout(LIMIT), serving(app) as base, browsing(chromium) as tab:
        await tab.goto(base)
        yield base, tab


@pytest.mark.parametrize("token", [None, "sesame"], ids=["open", "token"])
async def test_a_page_of_an_allowed_origin_connects(chromium, node_modules, token):
    async with elsewhere(chromium, node_modules) as (origin, tab):
        app = kestrun.create_app(allowed_origins=[origin], token=token)
        async with serving(app) as base:
            for transport in TRANSPORTS:
                arguments = [f"{base}/hubs/kestrun", transport, token]
                assert await tab.evaluate("a => connect(...a)", arguments)
                await sees(tab, "#log li", f"{transport} works")


async def test_a_page_of_another_origin_does_not_connect(chromium, node_modules):
    refused = "a => connect(...a).then(() => 'in', () => 'refused')"
    async with (
        elsewhere(chromium, node_modules) as (_, tab),
        serving(kestrun.create_app()) as base,
    ):
        for transport in TRANSPORTS:
            arguments = [f"{base}/hubs/kestrun", transport]
            assert await tab.evaluate(refused, arguments) == "refused"


# ---------------------------------------------------- the file as its readers see it

SOURCE = KESTRUN.read_text()
README = KESTRUN.with_name("README.md").read_text()


def sections() -> list[tuple[str, int]]:
    """The name and first line of each section of kestrun.py, in order."""
    lines = enumerate(SOURCE.splitlines(), 1)
    found = [("opening", 1)]
    for number, line in lines:
        if match := re.fullmatch(r"# -{10,} (\w[\w ]+)", line):
            found.append((match[1], number))
    return found


def bound_names(node: ast.stmt) -> set[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.If, ast.Try)):
        return set().union(*map(bound_names, node.body))
    targets = node.targets if isinstance(node, ast.Assign) else [node]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_each_section_uses_only_what_stands_above_it() -> None:
    starts = [line for _, line in sections()]
    body = ast.parse(SOURCE).body
    home = {
        name: bisect.bisect(starts, node.lineno)
        for node in body
        for name in bound_names(node)
    }
    for node in body:
        here = bisect.bisect(starts, node.lineno)
        for used in ast.walk(node):
            if isinstance(used, ast.Name) and isinstance(used.ctx, ast.Load):
                assert home.get(used.id, 0) <= here, f"line {used.lineno}: {used.id}"


def test_the_opening_lists_the_sections_in_their_order() -> None:
    contents = re.findall(r"^    (\w[\w ]{2,12}?)  +\S", kestrun.__doc__, re.MULTILINE)
    assert contents == [name for name, _ in sections()[1:]]


def test_the_public_names_are_those_of_the_readmes_table() -> None:
    table = README.split("## The library on one screen")[1].split("Receivers:")[0]
    names = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    assert sorted(names) == kestrun.__all__


def test_the_options_are_those_of_the_readmes_table() -> None:
    table = README.split("### Options")[1].split("## How it works")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    fields = {field.name: field.default for field in fields_of(kestrun.HubOptions)}
    assert list(rows) == list(fields)
    shown = {name: value.strip("` ") for name, value in rows.items()}
    shown["transports"] = str(fields["transports"])
    assert shown == {name: str(value) for name, value in fields.items()}


def test_importing_it_has_no_effects_and_copies_live_side_by_side() -> None:
    handlers, threads = list(logging.root.handlers), set(threading.enumerate())
    spec = importlib.util.spec_from_file_location("second_copy", KESTRUN)
    copy = importlib.util.module_from_spec(spec)
    sys.modules["second_copy"] = copy
    spec.loader.exec_module(copy)
    assert logging.root.handlers == handlers
    assert set(threading.enumerate()) <= threads  # others' may end meanwhile
    assert copy.Hub is not kestrun.Hub
    kestrun.map_hub(web.Application(), "/hub", type("Mine", (kestrun.Hub,), {}))
    copy.map_hub(web.Application(), "/hub", type("Mine", (copy.Hub,), {}))


def test_an_old_aiohttp_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("__version__ = '3.9.5'\nweb = abc = None")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types; m = types.ModuleType('aiohttp.abc');"
        "m.AbstractAccessLogger = object; sys.modules['aiohttp.abc'] = m"
    )
    done = subprocess.run(
        [sys.executable, KESTRUN],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    sentence = "kestrun needs aiohttp 3.14.3 or newer: pip install -U aiohttp"
    assert done.stderr == f"{sentence} (found 3.9.5)\n"


def test_both_files_carry_the_metadata_that_uv_run_reads() -> None:
    for path in (KESTRUN, Path(__file__)):
        block = re.search(r"(?ms)^# /// script$(.+?)^# ///$", path.read_text())[1]
        data = tomllib.loads(block.replace("\n# ", "\n"))
        assert data["requires-python"] == ">=3.11"
        assert "aiohttp>=3.14.3" in data["dependencies"]
    (command,) = re.findall(r"install (.*) && .*test_kestrun.py$", README, re.MULTILINE)
    assert sorted(shlex.split(command)) == sorted(data["dependencies"])


# ---------------------------------------------------------- what the README promises


def snippets(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.+?)^```$", README)


def snippet(file: str) -> str:
    """The Python snippet whose first line names a file."""
    (found,) = (s for s in snippets("python") if s.startswith(f"# {file}"))
    return found


def load(file: str) -> types.ModuleType:
    module = types.ModuleType(file.partition(".")[0])
    sys.modules[module.__name__] = module  # where dataclasses look for their names
    exec(compile(snippet(file), file, "exec"), module.__dict__)  # noqa: S102
    return module


def test_every_python_snippet_of_the_readme_is_run_by_a_test() -> None:
    files = {re.match(r"# ([\w.]+)", text)[1] for text in snippets("python")}
    assert files == {
        *("chat.py", "calls.py", "client.py", "work.py", "secure.py", "guarded.py")
    }


async def test_the_readmes_javascript_talks_to_the_readmes_hub(
    node_modules: Path,
) -> None:
    (text,) = snippets("js")
    async with asyncio.timeout(LIMIT), serving(load("chat.py").app) as base:
        stop = "connection.on('ReceiveMessage', () => connection.stop());"
        text = text.replace("await connection.start", stop + "await connection.start")
        text = text.replace("http://127.0.0.1:5000", base)
        with script(node_modules, "readme.mjs", text) as path:
            assert "Ada: Hello" in (await output_of("node", path)).splitlines()


async def test_the_readmes_python_client_talks_to_the_readmes_hub() -> None:
    package("pysignalr")
    async with asyncio.timeout(LIMIT), serving(load("chat.py").app) as base:
        text = snippet("client.py").replace("http://127.0.0.1:5000", base)
        text = text.replace('{arguments[1]}")', '{arguments[1]}"); raise SystemExit')
        assert await output_of(sys.executable, "-c", text) == "Ada: Hello\n"


async def output_of(*command: object) -> str:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    return output.decode()


def test_the_readmes_net_client_calls_what_the_readmes_hub_has() -> None:
    (text,) = snippets("csharp")  # there is no .NET to run it with
    hub = load("chat.py").ChatHub
    assert '.WithUrl("http://127.0.0.1:5000/hubs/chat")' in text
    (method,) = re.findall(r'InvokeAsync\("(\w+)", "\w+", "\w+"\)', text)
    assert list(inspect.signature(getattr(hub, method.lower())).parameters)[1:] == [
        "user",
        "text",
    ]
    assert 'On<string, string>("ReceiveMessage"' in text


async def test_the_readmes_calls_work(driver: int) -> None:
    app = web.Application()
    kestrun.map_hub(app, "/hub", load("calls.py").CallsHub)
    async with (
        asyncio.timeout(LIMIT),
        serving(app) as base,
        javascript(driver) as js,
    ):
        on = {"GetName": {"returns": "Ada"}}
        client = await js.connect(f"{base}/hub", "WebSockets", on=on)
        assert await client.invoke("Add", 1, 2) == 3
        assert (
            await client.invoke("Total", {"itemName": "tea", "count": 2}) == "2 x tea"
        )
        with pytest.raises(JsError, match="HubException: Order at least one"):
            await client.invoke("Total", {"itemName": "tea", "count": 0})
        assert await client.invoke("Ask") == "Ada"
        assert await client.invoke("Who") is None


async def test_the_readmes_operations_and_schedule_work() -> None:
    async with asyncio.timeout(LIMIT):
        assert await output_of(
            sys.executable, "-c", preamble() + snippet("work.py")
        ) in (
            "Completed 100 4\n",
            "alive\nCompleted 100 4\n",
        )


def preamble() -> str:
    """Let a snippet that runs in a process of its own find kestrun."""
    return f"import sys; sys.path.insert(0, {str(KESTRUN.parent)!r})\n"


async def test_the_readmes_users_are_told_apart() -> None:
    async with asyncio.timeout(LIMIT), serving(load("secure.py").app) as base:
        url = f"{base}/hubs/mine/negotiate"
        async with aiohttp.ClientSession() as http:
            statuses = []
            for headers in ({}, {"Authorization": "Bearer secret-of-ada"}):
                async with http.post(url, headers=headers) as answer:
                    statuses.append(answer.status)
    assert statuses == [401, 200]


async def test_the_readmes_guard_refuses_and_lets_through(serve) -> None:
    hub = load("guarded.py").GuardedHub
    server = await serve(hub, authenticate=user_of)
    nobody, ann = await server.connect(), await server.connect(query="?user=Ann")
    assert (await nobody.error("Delete", "it")).endswith("Log in first.")
    assert await ann.invoke("Delete", "it") == "it is gone"


async def test_the_readmes_curl_commands_all_succeed() -> None:
    if not shutil.which("curl"):
        needed("install curl: apt-get install curl")
    (commands,) = (text for text in snippets("sh") if text.startswith("curl"))
    async with asyncio.timeout(LIMIT), serving(kestrun.create_app()) as base:
        for command in commands.replace("http://127.0.0.1:5000", base).splitlines():
            assert "200 OK" in await output_of(*shlex.split(command))


async def test_the_readmes_run_command_starts_the_server(tmp_path: Path) -> None:
    command = next(text for text in snippets("sh") if "kestrun.py" in text).strip()
    shutil.copy(KESTRUN, tmp_path)
    process = await asyncio.create_subprocess_shell(
        f"{'exec .venv'.join(command.rsplit('.venv', 1))} --port 0",
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        async with asyncio.timeout(90):
            async for line in process.stdout:
                if line.startswith(b"page"):
                    break
            else:
                needed("give pip a package index to install from")
        status, page = await get(line.split()[1].decode())
        assert (status, "<title>Kestrun" in page) == (200, True)
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


# -------------------------------------------------------------- where else it may run


async def test_it_runs_under_gunicorn(driver: int, tmp_path: Path) -> None:
    package("gunicorn")
    (tmp_path / "chat.py").write_text(preamble() + snippet("chat.py"))
    port = free_port()
    (command,) = re.findall(r"`gunicorn (.+?)`", README)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gunicorn", *shlex.split(command)),
        *("--bind", f"127.0.0.1:{port}"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT):
            async for line in process.stderr:
                if b"Booting worker" in line:
                    break
            async with javascript(driver) as js:
                url = f"http://127.0.0.1:{port}/hubs/chat"
                for transport in TRANSPORTS:
                    client = await js.connect(url, transport, on={"ReceiveMessage": {}})
                    await client.invoke("Send", "Ada", transport)
                    assert await client.event("ReceiveMessage") == ["Ada", transport]
    finally:
        process.terminate()
        await process.wait()


async def test_it_speaks_websockets_behind_tls(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        needed("install OpenSSL: apt-get install openssl")
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    await output_of(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject),
        *("-keyout", tmp_path / "key", "-out", tmp_path / "crt", "-days", "1"),
    )
    theirs = ssl.create_default_context(cafile=tmp_path / "crt")
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    runner = web.AppRunner(load("chat.py").app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ours).start()
        port = runner.addresses[0][1]
        async with asyncio.timeout(LIMIT), aiohttp.ClientSession() as http:
            url = f"https://localhost:{port}/hubs/chat"
            async with http.ws_connect(url, ssl=theirs) as line:
                await line.send_str('{"protocol":"json","version":1}\x1e')
                assert (await line.receive()).data == "{}\x1e"
                text = "x" * 20_000
                message = {"type": 1, "target": "Send", "arguments": ["Ada", text]}
                await line.send_str(json.dumps(message) + "\x1e")
                answer = json.loads((await line.receive()).data[:-1])
                assert answer["arguments"] == ["Ada", text]
    finally:
        await runner.cleanup()


async def test_the_demo_works_inside_another_application(driver: int) -> None:
    app = web.Application()
    app.add_subapp("/inner", kestrun.create_app())
    async with (
        asyncio.timeout(LIMIT),
        serving(app) as base,
        javascript(driver) as js,
    ):
        url = f"{base}/inner/hubs/kestrun"
        client = await js.connect(url, "WebSockets", on={"ReceiveLog": {}})
        assert (await get(f"{base}/inner/api/ps/log/error"))[0] == 200
        ((log,),) = [await client.event("ReceiveLog")]
        assert log["level"] == "Error"


# ------------------------------------------------------- order within one turn


class Mixer(kestrun.Hub):
    """Sends to all, to a group and to one, with nothing to wait for in between."""

    tell: ClassVar[Callable[..., Any]]

    async def mix(self, count: int, size: int) -> None:
        own, number = self.context.connection_id, itertools.count()
        text = "x" * size
        for turn in range(count):
            await self.clients.all.send("Note", next(number), text)
            await self.clients.all.send("Note", next(number), text)
            await self.clients.caller.send("Note", next(number), text)
            await self.clients.all.send("Note", next(number), text)
            change = self.groups.remove if turn % 2 else self.groups.add
            await change(own, "some")
            await self.clients.group("some").send("Note", next(number), text)
            await self.clients.others.send("Note", next(number), text)
            await self.clients.client(own).send("Note", next(number), text)

    async def enter(self) -> None:
        await self.groups.add(self.context.connection_id, "some")

    async def note_others(self, count: int) -> None:
        for number in range(count):
            await self.clients.others.send("Note", number)

    async def note_all(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            await self.clients.all.send("Note", number)


@everywhere
@pytest.mark.parametrize("size", [0, 10_000])
async def test_messages_to_many_and_to_one_keep_their_order(serve, wire, size) -> None:
    server = await serve(Mixer, maximum_receive_message_size=None)
    caller, member, other = [await server.connect(wire) for _ in range(3)]
    await member.invoke("Enter")
    await caller.invoke("Mix", 20, size)
    caller_gets = {0: (0, 1, 2, 3, 4, 6), 1: (0, 1, 2, 3, 6)}  # by parity of the turn
    wanted = {
        caller: [7 * t + n for t in range(20) for n in caller_gets[t % 2]],
        member: [7 * t + n for t in range(20) for n in (0, 1, 3, 4, 5)],
        other: [7 * t + n for t in range(20) for n in (0, 1, 3, 5)],
    }
    for client, numbers in wanted.items():
        found = [(await client.received("Note"))[0] for _ in numbers]
        assert found == numbers


@everywhere
async def test_a_burst_to_all_others_leaves_the_caller_out(serve, wire) -> None:
    server = await serve(Mixer)
    caller, other, another = [await server.connect(wire) for _ in range(3)]
    ids = [await client.begin("NoteOthers", 5) for client in (caller, other)]
    await caller.finish(ids[0])
    await other.finish(ids[1])
    await server.hub.clients.all.send("Note", "end")
    for client, rounds in ((caller, 1), (other, 1), (another, 2)):
        notes = [(await client.received("Note"))[0] for _ in range(5 * rounds + 1)]
        assert notes == [*range(5), *range(5), "end"][-len(notes) :]


async def test_a_broadcast_reaches_every_wire_at_once_in_order(serve) -> None:
    server = await serve(Mixer)
    clients = [await server.connect(wire) for wire in WIRES * 2]
    await clients[0].invoke("NoteAll", 0, 50)
    for client in clients:
        numbers = [(await client.received("Note"))[0] for _ in range(50)]
        assert numbers == list(range(50))


class Tattle(enum.Enum):
    """Tells a group whenever it is written."""

    LOUD = 1

    @property
    def value(self) -> str:
        with contextlib.suppress(StopIteration):
            Mixer.tell("Note", "inner").send(None)
        return "outer"


async def test_a_broadcast_within_the_writing_of_another_is_sent_once(serve) -> None:
    server = await serve(Mixer)
    clients = [await server.connect() for _ in range(2)]
    for client in clients:
        await server.hub.groups.add(client.id, "some")
    Mixer.tell = server.hub.clients.group("some").send
    for text in ("a", Tattle.LOUD, "b"):
        await server.hub.clients.all.send("Note", text)
    for client in clients:
        notes = [(await client.received("Note"))[0] for _ in range(4)]
        assert notes == ["a", "inner", "outer", "b"]
        assert await client.invoke("Enter") is None


async def test_who_leaves_amid_broadcasts_takes_nothing_from_the_others(serve) -> None:
    server = await serve(Mixer)
    stays, *leaving = [await server.connect() for _ in range(6)]
    for first, client in enumerate(leaving):
        await stays.begin("NoteAll", first * 20, 20)
        server.hub.connections[client.id].abort()
    numbers = [(await stays.received("Note"))[0] for _ in range(100)]
    assert numbers == list(range(100))


# ------------------------------------------------------- what hostile clients found


@dataclass
class Picky:
    number: int

    def __post_init__(self) -> None:
        raise KeyError(self.number)


class OddError(BaseException):
    """What no `except Exception` sees."""


@dataclasses.dataclass
class OddlyPicky:
    number: int

    def __post_init__(self) -> None:
        raise OddError if self.number else asyncio.CancelledError


@dataclasses.dataclass
class Watched:
    number: int

    def __post_init__(self) -> None:
        Victim.notes.append(SETTING.get())


class Permission(enum.IntFlag):
    READ = 1
    WRITE = 2


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


@dataclass
class HalfMade:
    whole: int
    missing: int = field(init=False)


@dataclass
class Role:
    name: str

    def __post_init__(self) -> None:
        next(role for role in ("user", "admin") if role == self.name)


SETTING: contextvars.ContextVar[str] = contextvars.ContextVar(
    "setting", default="clean"
)


class Victim(kestrun.Hub):
    """Methods that were once hung, lost or killed by what a client did."""

    notes: ClassVar[list[Any]] = []

    async def on_disconnected(self, error: Exception | None) -> None:
        self.notes.append(("gone", error and str(error)))

    def echo(self, value: Any) -> Any:
        return value

    def note(self, value: Any) -> None:
        self.notes.append(value)

    async def clean_up(self) -> None:
        self.notes.append("begun")
        try:
            await asyncio.sleep(50)
        finally:
            await asyncio.sleep(0.1)
            self.notes.append("cleaned up")

    def picky(self, value: Picky) -> None:
        raise AssertionError(value)

    def give_up(self) -> None:
        raise asyncio.CancelledError

    async def endless(self) -> AsyncIterator[int]:
        await asyncio.sleep(50)
        yield 1

    async def nap(self, value: Any) -> None:
        await asyncio.sleep(0.05)
        self.notes.append(value)

    async def ask_with_patience(self) -> str:
        question = asyncio.create_task(self.clients.caller.invoke("Name"))
        return await question

    async def note_later(self, value: Any) -> None:
        self.notes.append(value)
        await asyncio.sleep(0.001)

    async def counter(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    def set_variable(self) -> str:
        SETTING.set("set")
        return SETTING.get()

    async def set_and_ask(self) -> str:
        SETTING.set("set")
        return await self.clients.caller.invoke("Name")

    def get_variable(self) -> str:
        return SETTING.get()

    def half_made(self) -> HalfMade:
        return HalfMade(1)

    async def half_made_later(self) -> HalfMade:
        return HalfMade(1)

    def half_a_letter(self) -> None:
        raise kestrun.HubException("no \ud800")

    def oddly_picky(self, value: OddlyPicky) -> None:
        self.notes.append(value)

    async def oddly_picky_stream(self, values: AsyncIterator[OddlyPicky]) -> int:
        return len([value async for value in values])

    def watched(self, value: Watched) -> int:
        return value.number

    async def set_and_tell(self) -> None:
        SETTING.set("another client's")
        for _ in range(100):
            await self.clients.caller.send("Tick")
            await asyncio.sleep(0)

    def odd(self) -> None:
        raise OddError

    async def odd_later(self) -> None:
        raise OddError

    def role(self, role: Role = None, strict: bool = True) -> list:
        return [role is None, strict]

    def permit(self, flags: Permission) -> int:
        return flags.value

    def work(self) -> None:
        started = time.perf_counter()
        while time.perf_counter() - started < 0.001:
            pass

    async def firehose(self) -> AsyncIterator[str]:
        while True:
            yield "x" * 100

    async def read_twice(self, numbers: AsyncIterator[int]) -> str:
        async def read() -> None:
            async for _ in numbers:
                pass

        await asyncio.gather(read(), read())
        return "done"

    async def check(self, numbers: AsyncIterator[int]) -> int:
        return sum(
            [await self.clients.caller.invoke("Check", n) async for n in numbers]
        )

    async def answer_much(self, size: int) -> None:
        for _ in range(3):
            await self.clients.caller.send("Note", "x" * size)

    def slow_in_disguise(self) -> Awaitable[None]:
        return asyncio.sleep(50)

    def by_key(self, value: dict[Level, int]) -> dict:
        return {UUID(int=1): [value], Level.LOW: {Level.HIGH: 1}}

    async def tick_stubbornly(self) -> AsyncIterator[int]:
        while True:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.notes.append("not yet")
            self.notes.append("tick")
            yield 1


class Farewell(Victim):
    """Has something to say to whoever is gone, and takes its time before."""

    async def on_connected(self) -> None:
        await asyncio.sleep(0.1)

    async def on_disconnected(self, error: Exception | None) -> None:
        try:
            await self.clients.caller.invoke("Why")
        except ConnectionError as lost:
            self.notes.append(("gone", error, type(lost).__name__))


@pytest.fixture(autouse=True)
def forget_notes() -> None:
    Victim.notes.clear()


@every_transport
async def test_replies_of_more_than_the_outbox_holds_all_arrive(serve, wire) -> None:
    client = await (await serve(Victim)).connect(wire)
    text, wanted = "x" * 1000, 300
    messages = [call("Echo", text, invocationId=str(n)) for n in range(wanted)]
    await client.send(*messages)
    for number in range(wanted):
        assert await client.finish(str(number)) == text


async def test_what_comes_together_with_a_close_frame_still_counts(serve) -> None:
    server = await serve(Victim)
    raw = await RawSocket.open(server)
    last = encode("json", call("Note", 7)) + encode("json", {"type": 7, "error": "bye"})
    raw.writer.write(masked_frame(1, last) + masked_frame(8, b""))
    await until(lambda: len(Victim.notes) == 2)
    assert Victim.notes == [7, ("gone", "bye")]


async def test_what_comes_together_with_a_broken_frame_still_counts(serve) -> None:
    raw = await RawSocket.open(await serve(Victim))
    last = masked_frame(1, encode("json", call("Note", 7)))
    raw.writer.write(last + masked_frame(3, b""))
    await until(lambda: len(Victim.notes) == 2)
    assert Victim.notes == [7, ("gone", "a frame that begins 83 80")]
    assert await raw.close_code() == 1002


def masked_frame(opcode: int, payload: bytes) -> bytes:
    assert len(payload) < 126
    return bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


@pytest.mark.parametrize("again", ["cancel", "leave"])
async def test_a_cancelled_method_finishes_its_cleanup(serve, again) -> None:
    client = await (await serve(Victim)).connect()
    called = await client.begin("CleanUp")
    await until(lambda: Victim.notes)
    await client.send({"type": 5, "invocationId": called})
    if again == "cancel":
        await client.send({"type": 5, "invocationId": called})
    else:
        await client.leave()
    await until(lambda: "cleaned up" in Victim.notes)


@both_protocols
async def test_a_call_cancelled_at_once_is_completed(serve, protocol) -> None:
    Victim.notes.clear()
    client = await (await serve(Victim)).connect(("WebSockets", protocol))
    called = call("CleanUp", invocationId="1")
    await client.send(called, {"type": 5, "invocationId": "1"})
    assert "error" in await client.next(3, "1")
    assert await client.invoke("Echo", 1) == 1
    assert Victim.notes == ["begun", "cleaned up"]


@pytest.mark.parametrize("number", [0, 1])
async def test_a_conversion_may_raise_what_no_exception_is(serve, number) -> None:
    client = await (await serve(Victim)).connect()
    refused = "Failed to invoke 'OddlyPicky' due to an error on the server."
    assert await client.error("OddlyPicky", {"number": number}) == refused
    id = await client.begin("OddlyPickyStream", streamIds=["u"])
    await upload(client, "u", {"number": number})
    assert "error" in await client.next(3, id)
    assert await client.invoke("Echo", 1) == 1


async def test_conversions_do_not_see_what_another_client_set(serve) -> None:
    server = await serve(Victim)
    one, other = await server.connect(), await server.connect()
    for _ in range(5):
        telling = await one.begin("SetAndTell")
        await one.next(1)
        assert await other.invoke("Watched", {"number": 1}) == 1
        await one.finish(telling)
    assert set(Victim.notes) == {"clean"}


async def test_a_broadcast_that_cannot_be_written_reaches_nobody(serve) -> None:
    server = await serve(Victim)
    events = await server.connect(("ServerSentEvents", "json"))
    polls = await server.connect(("LongPolling", "json"))
    other = await server.connect()
    await server.hub.clients.all.send("First", 1)
    with pytest.raises(TypeError):
        await server.hub.clients.all.send("Bad", object())
    await server.hub.clients.all.send("Last", 2)
    for client in (events, polls, other):
        assert (await client.next(1))["target"] == "First"
        assert (await client.next(1))["target"] == "Last"
    with pytest.raises(TypeError):
        await server.hub.clients.all.send("Bad", object())
    assert server.hub._registry.turn.batch is None


@both_protocols
async def test_a_conversion_may_fail_in_any_way(serve, protocol) -> None:
    client = await (await serve(Victim)).connect(("WebSockets", protocol))
    refused = "Failed to invoke 'Picky' due to an error on the server."
    assert await client.error("Picky", {"number": 1}) == refused
    assert await client.invoke("Echo", 1) == 1


async def test_a_plain_method_that_raises_a_cancel_fails_alone(serve) -> None:
    client = await (await serve(Victim)).connect()
    failed = "An unexpected error occurred invoking 'GiveUp' on the server."
    assert await client.error("GiveUp") == failed
    assert await client.invoke("Echo", 1) == 1


async def test_streams_of_one_client_are_bounded(serve) -> None:
    client = await (await serve(Victim)).connect()
    for number in range(1001):
        stream = {"type": 4, "invocationId": f"s{number}", "arguments": []}
        await client.send({**stream, "target": "Endless"})
    refused = await client.next(3, "s1000")
    assert refused["error"] == "The client has too many calls and streams under way."
    assert await client.invoke("Echo", 1) == 1


async def answer(client: Client, result: Any) -> None:
    """Answer the server's next question."""
    question = await client.next(1)
    id = question["invocationId"]
    await client.send({"type": 3, "invocationId": id, "result": result})


async def test_a_call_that_asks_through_another_task_frees_its_slot(serve) -> None:
    client = await (await serve(Victim)).connect()
    asking = await client.begin("AskWithPatience")
    assert await client.invoke("Echo", 1) == 1
    await answer(client, "Ann")
    assert await client.finish(asking) == "Ann"


async def test_forty_calls_may_ask_at_once(serve) -> None:
    client = await (await serve(Victim)).connect()
    ids = [str(n) for n in range(40)]
    await client.send(*(call("AskWithPatience", invocationId=id) for id in ids))
    for _ in ids:
        await answer(client, "Ann")
    assert [await client.finish(id) for id in ids] == ["Ann"] * 40


async def test_a_variable_that_a_call_sets_is_seen_by_no_other(serve) -> None:
    client = await (await serve(Victim)).connect()
    assert await client.invoke("SetVariable") == "set"
    assert await client.invoke("GetVariable") == "clean"
    asking = await client.begin("SetAndAsk")
    assert await client.invoke("GetVariable") == "clean"
    await answer(client, "Ann")
    assert await client.finish(asking) == "Ann"


async def test_a_variable_of_one_client_is_not_seen_by_another(serve) -> None:
    server = await serve(Victim)
    client = await server.connect()

    async def shout() -> None:
        SETTING.set("set")
        for _ in range(50):
            await server.hub.clients.all.send("Note", "x" * 3000)
            await asyncio.sleep(0)

    shouting = asyncio.create_task(shout())
    for _ in range(20):
        ids = [await client.begin("Echo", "x" * 9000) for _ in range(9)]
        assert await client.invoke("GetVariable") == "clean"
        for id in ids:
            await client.finish(id)
    await shouting


whose: contextvars.ContextVar[str] = contextvars.ContextVar("whose", default="nobody's")


class Letter(dict):
    """Is written with what a context variable says meanwhile."""

    def __init__(self) -> None:
        super().__init__(by="")

    def items(self) -> Any:
        return [("by", whose.get())]


class Nowhere(datetime.tzinfo):
    def utcoffset(self, moment: datetime.datetime | None) -> None:
        raise asyncio.CancelledError


class Tasks(kestrun.Hub):
    """Methods that ask asyncio in whose name they run."""

    kept: ClassVar[list[asyncio.Task]] = []
    over: ClassVar[list[str]] = []
    order: ClassVar[list[int]] = []
    notes: ClassVar[weakref.WeakKeyDictionary[asyncio.Task, str]]
    begun: ClassVar[asyncio.Event]
    gate: ClassVar[asyncio.Event]
    shared: ClassVar[asyncio.Future[str]]
    latest: ClassVar[weakref.ref]

    async def on_connected(self) -> None:
        Tasks.latest = weakref.ref(self)

    async def soon(self, value: Any) -> Any:
        return value

    async def keep_task(self) -> None:
        self.kept.append(asyncio.current_task())

    async def same_task(self) -> bool:
        before = asyncio.current_task()
        await asyncio.sleep(0)
        return before is not None and asyncio.current_task() is before

    async def hurry(self, seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                await self.gate.wait()
        except TimeoutError:
            return "late"
        return "in time"

    async def hurry_a_turn(self) -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        except TimeoutError:
            return "late"
        return "in time"

    async def give_up(self, wait: bool) -> None:
        asyncio.current_task().cancel()
        if wait:
            await asyncio.sleep(0)

    async def think_again(self) -> str:
        asyncio.current_task().cancel()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
        await asyncio.sleep(0.001)
        return "went on"

    async def divide(self) -> list[int]:
        async def part(number: int) -> int:
            await asyncio.sleep(0)
            return number

        async with asyncio.TaskGroup() as group:
            parts = [group.create_task(part(number)) for number in range(3)]
        return [part.result() for part in parts]

    async def fall_apart(self) -> str:
        async def part() -> None:
            raise OSError("broken")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(part())
                await self.gate.wait()
        except ExceptionGroup as errors:
            return str(errors.exceptions[0])
        return "held"

    async def wait(self) -> str:
        self.begun.set()
        await self.gate.wait()
        return "waited"

    async def give_way(self, number: int | None = None) -> None:
        self.order.append(number)
        await asyncio.sleep(0)

    async def elsewhere(self) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1, tzinfo=Nowhere())

    def cancel_workers(self) -> int:
        return sum(task.cancel() for task in workers())

    async def await_shared(self) -> str:
        return await self.shared

    async def call_off_in_time(self, wait: bool) -> tuple[bool, int]:
        """Cancel this very task and take it back, as a task group does."""
        task, cancelled = asyncio.current_task(), False
        task.cancel()
        task.uncancel()
        if wait:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                cancelled = True
        return cancelled, task.cancelling()

    async def give_up_because(self, why: str) -> list[str]:
        asyncio.current_task().cancel(why)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            asyncio.current_task().uncancel()
            return list(error.args)
        return []

    async def turns_of_a_pause(self) -> int:
        turns, loop = 0, asyncio.get_running_loop()

        def count() -> None:
            nonlocal turns, handle
            turns += 1
            handle = loop.call_soon(count)

        handle = loop.call_soon(count)
        await asyncio.sleep(0)
        handle.cancel()
        return turns

    async def mark(self, how: str, name: str) -> list[Any]:
        """Leave a trace at the task; tell those of others."""
        task = asyncio.current_task()
        found = [self.notes.get(task), task.get_name()]
        if how == "note":
            self.notes[task] = name
        elif how == "name":
            task.set_name(name)
        else:
            task.add_done_callback(lambda task: self.over.append(name))
        return found

    async def own_name(self) -> list[str]:
        asyncio.current_task().set_name("my own")
        await asyncio.sleep(0)
        return asyncio.current_task().get_name()

    async def break_off(self) -> None:
        self.break_off_at_once()

    async def break_off_later(self) -> None:
        await asyncio.sleep(0)
        self.break_off_at_once()

    def break_off_at_once(self) -> None:
        whose.set(self.context.connection_id)
        raise ValueError("broken off")

    async def letter(self, wait: bool) -> Any:
        whose.set("the method's")
        if wait:
            await asyncio.sleep(0)
        return Letter()

    def plain(self, number: int) -> int:
        self.order.append(number)
        return number

    async def in_order(self, number: int) -> int:
        self.order.append(number)
        await self.gate.wait()
        return number

    async def open_later(self, number: int) -> AsyncIterator[int]:
        return self.several(number)

    async def kill(self) -> None:
        for task in asyncio.all_tasks():
            if task.get_coro().__qualname__ == "Dispatcher.run":
                task.cancel()
        await self.gate.wait()

    async def tidy_up(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.gate.wait()
            self.over.append("tidied up")

    async def hold_out(self) -> None:
        self.begun.set()
        while not self.gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.gate.wait()

    def in_disguise(self, number: int) -> Awaitable[int]:
        return self.in_order(number)

    async def several(self, count: int) -> AsyncIterator[bool]:
        first = asyncio.current_task()
        for number in range(count):
            if number % 2:
                await asyncio.sleep(0)
            yield first is not None and asyncio.current_task() is first


@pytest_asyncio.fixture
async def serve_tasks(serve) -> Callable[[], Awaitable[Server]]:
    Tasks.kept, Tasks.begun, Tasks.gate = [], asyncio.Event(), asyncio.Event()
    Tasks.over, Tasks.order, Tasks.notes = [], [], weakref.WeakKeyDictionary()
    Tasks.shared = asyncio.get_running_loop().create_future()
    return functools.partial(serve, Tasks)


@pytest_asyncio.fixture
async def tasks(serve_tasks) -> Client:
    return await (await serve_tasks()).connect()


def workers() -> list[asyncio.Task]:
    """The tasks in which methods run, or will."""
    return [
        task
        for task in asyncio.all_tasks()
        if task.get_coro().__qualname__ == "Worker._work"
    ]


async def test_a_method_runs_in_one_task_from_its_first_step_on(tasks) -> None:
    assert await tasks.invoke("SameTask") is True
    id = await tasks.begin("Several", 4, type=4)
    assert [(await tasks.next(2, id))["item"] for _ in range(4)] == [True] * 4


@pytest.mark.parametrize("seconds", [-1, 0, 0.01])
async def test_a_timeout_around_the_first_wait_ends_that_wait(tasks, seconds) -> None:
    assert await tasks.invoke("Hurry", seconds) == "late"
    assert await tasks.invoke("Soon", 1) == 1


async def test_a_timeout_of_zero_ends_a_method_that_only_gives_way(tasks) -> None:
    assert await tasks.invoke("HurryATurn") == "late"
    assert await tasks.invoke("Soon", 1) == 1


@pytest.mark.parametrize("wait", [True, False])
async def test_a_method_that_cancels_its_task_hits_nobody_else(tasks, wait) -> None:
    id = await tasks.begin("GiveUp", wait)
    later = await tasks.begin("Hurry", 0.01)
    assert ("error" in await tasks.next(3, id)) is wait
    assert await tasks.finish(later) == "late"
    for _ in range(3):
        assert await tasks.invoke("SameTask") is True


async def test_a_method_may_cancel_a_task_that_is_new(serve_tasks) -> None:
    server = await serve_tasks(maximum_parallel_invocations_per_client=3)
    client = await server.connect()
    await client.send(call("Wait"), call("GiveUp", True, invocationId="gives up"))
    assert "error" in await client.next(3, "gives up")


async def test_a_method_may_survive_its_cancellation(tasks) -> None:
    assert await tasks.invoke("ThinkAgain") == "went on"


async def test_task_groups_work_from_the_first_step_on(tasks) -> None:
    assert await tasks.invoke("Divide") == [0, 1, 2]
    assert await tasks.invoke("FallApart") == "broken"


async def test_a_task_kept_from_a_call_that_is_over_cancels_no_other(
    serve_tasks,
) -> None:
    server = await serve_tasks()
    one, other = await server.connect(), await server.connect()
    await one.invoke("KeepTask")
    waiting = await other.begin("Wait")
    await Tasks.begun.wait()
    Tasks.kept.pop().cancel()
    await one.invoke("Soon", 1)
    Tasks.gate.set()
    assert await other.finish(waiting) == "waited"


async def test_any_number_of_calls_may_await_one_future_in_one_turn(
    serve_tasks,
) -> None:
    server = await serve_tasks(maximum_parallel_invocations_per_client=None)
    clients = [await server.connect() for _ in range(5)]
    for client in clients:
        await client.send(*(call("AwaitShared", invocationId=str(n)) for n in range(9)))
    outside = asyncio.ensure_future(Tasks.shared)
    asyncio.get_running_loop().call_later(0.05, Tasks.shared.set_result, "shared")
    for client in clients:
        for n in range(9):
            assert await client.finish(str(n)) == "shared"
    assert await outside == "shared"


@pytest.mark.parametrize("wait", [True, False])
async def test_a_task_that_takes_its_cancellation_back_goes_on(tasks, wait) -> None:
    wanted: list[tuple[bool, int]] = []

    async def model() -> None:
        wanted.append(await Tasks.call_off_in_time(None, wait))

    await asyncio.wait([asyncio.create_task(model())])
    for _ in range(2):
        assert await tasks.invoke("CallOffInTime", wait) == list(*wanted)
        assert await tasks.invoke("SameTask") is True


async def test_whoever_cancels_all_idle_tasks_stops_no_later_call(tasks) -> None:
    assert await tasks.invoke("Soon", 1) == 1
    idle = workers()
    assert idle
    for task in idle:
        task.cancel("everyone")
        task.cancel("once more")
    assert await tasks.invoke("SameTask") is True
    assert all(task.cancelled() for task in idle)
    assert await tasks.invoke("SameTask") is True


async def test_a_cancellation_says_why_before_the_first_wait(tasks) -> None:
    assert await tasks.invoke("GiveUpBecause", "enough") == ["enough"]


async def test_the_first_pause_of_a_method_takes_one_turn(tasks) -> None:
    async def model() -> int:
        return await Tasks.turns_of_a_pause(None)

    wanted = await asyncio.create_task(model())
    assert await tasks.invoke("TurnsOfAPause") == wanted


@pytest.mark.parametrize("how", ["note", "name", "callback"])
async def test_what_a_call_leaves_at_its_task_meets_no_other_call(
    serve_tasks, how
) -> None:
    server = await serve_tasks()
    one, other = await server.connect(), await server.connect()
    assert await one.invoke("Mark", how, "one") == [None, "Tasks.mark"]
    if how == "callback":
        await until(lambda: Tasks.over == ["one"])
    assert await other.invoke("Mark", how, "other") == [None, "Tasks.mark"]
    assert await one.invoke("OwnName") == "my own"


@pytest.mark.parametrize("method", ["BreakOff", "BreakOffLater", "BreakOffAtOnce"])
async def test_a_failure_is_logged_where_the_method_ran(
    serve_tasks, method, caplog
) -> None:
    class Noting(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.whose = whose.get()
            return True

    server, noting = await serve_tasks(), Noting()
    clients = [await server.connect() for _ in range(2)]
    logging.getLogger("kestrun").addFilter(noting)
    try:
        for client in clients:
            await client.error(method)
    finally:
        logging.getLogger("kestrun").removeFilter(noting)
    failures = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(failures) == 2
    assert [record.whose for record in failures] == [
        record.getMessage().split()[-1] for record in failures
    ]


@pytest.mark.parametrize("wait", [True, False])
async def test_a_result_is_written_where_the_method_ran(tasks, wait) -> None:
    assert await tasks.invoke("Letter", wait) == {"by": "the method's"}


@pytest.mark.parametrize("method", ["InOrder", "InDisguise"])
async def test_calls_begin_in_order_when_many_wait_at_once(serve_tasks, method) -> None:
    server = await serve_tasks(maximum_parallel_invocations_per_client=None)
    client, numbers = await server.connect(), list(range(100))
    calls = [(method, "Plain")[n % 3 == 2] for n in numbers]
    await client.send(
        *(call(calls[n], n, invocationId=str(n)) for n in numbers),
    )
    await until(lambda: len(Tasks.order) == len(numbers))
    assert Tasks.order == numbers
    Tasks.gate.set()
    assert [await client.finish(str(n)) for n in numbers] == numbers
    await until(lambda: len(workers()) == 1)


async def test_many_clients_may_begin_a_call_that_waits_in_one_turn(
    serve_tasks,
) -> None:
    server = await serve_tasks()
    clients = [await server.connect() for _ in range(40)]
    for number, client in enumerate(clients):
        await client.send(call("InOrder", number, invocationId="1"))
    await until(lambda: len(Tasks.order) == len(clients))
    Tasks.gate.set()
    for number, client in enumerate(clients):
        assert await client.finish("1") == number


async def test_calls_that_may_not_begin_yet_have_no_tasks_come(serve_tasks) -> None:
    server = await serve_tasks(maximum_parallel_invocations_per_client=3)
    clients = [await server.connect() for _ in range(20)]
    queue = [call("InOrder", n, invocationId=str(n)) for n in range(60)]
    await asyncio.gather(*(client.send(*queue) for client in clients))
    await until(lambda: len(Tasks.order) == 3 * len(clients))
    assert len(workers()) <= 4 * len(clients)


async def test_a_rush_for_tasks_is_over_soon(serve_tasks) -> None:
    server = await serve_tasks(maximum_parallel_invocations_per_client=None)
    clients = [await server.connect() for _ in range(5)]
    Tasks.gate.set()
    for _ in range(3):
        for client in clients:
            await client.send(*(call("HurryATurn") for _ in range(200)))
    for client in clients:
        assert await client.invoke("SameTask") is True
    await until(lambda: len(workers()) == 1)
    assert await clients[0].invoke("SameTask") is True


async def test_a_cleanup_that_takes_its_time_is_not_cancelled_again(
    serve_tasks,
) -> None:
    server = await serve_tasks(close_timeout=0.01)
    client = await server.connect()
    await client.send(call("TidyUp"))
    await Tasks.begun.wait()
    await client.leave()
    await until(lambda: not server.hub.connections)
    await asyncio.sleep(0)
    Tasks.gate.set()
    await until(lambda: Tasks.over == ["tidied up"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("end", ["leave", "cut", "cancel", "kill"])
async def test_calls_in_line_for_a_task_are_given_up_in_good_order(
    serve_tasks, end
) -> None:
    outside = asyncio.all_tasks()
    server = await serve_tasks(maximum_parallel_invocations_per_client=None)
    client = await server.connect()
    calls = [call("InOrder", n, invocationId=str(n)) for n in range(50)]
    calls[1::2] = [dict(c, type=4, target="OpenLater") for c in calls[1::2]]
    if end == "kill":
        calls[0] = call("Kill")
    if end == "cancel":
        calls += [{"type": 5, "invocationId": str(n)} for n in range(50)]
    await client.send(*calls)
    if end == "cancel":
        for n in range(50):
            assert ("error" in await client.next(3, str(n))) is (n % 2 == 0)
    if end == "cut":
        await client.cut()
    if end == "kill":
        await until(lambda: client.ended)
        assert Tasks.order == []
    await client.leave()
    await server.runner.cleanup()
    await until(lambda: asyncio.all_tasks() == outside)
    gc.collect()


@pytest.mark.filterwarnings("error")
async def test_calls_of_clients_that_leave_together_all_begin(serve_tasks) -> None:
    server = await serve_tasks()
    clients = [await server.connect() for _ in range(20)]
    for client in clients:
        await client.send(*(call("InOrder", n, invocationId=str(n)) for n in range(4)))
    await until(lambda: len(Tasks.order) == len(clients))
    await asyncio.gather(*(client.leave() for client in clients))
    await until(lambda: len(Tasks.order) == 4 * len(clients))
    gc.collect()


async def test_calls_of_a_client_that_left_begin_while_others_are_busy(
    serve_tasks,
) -> None:
    server = await serve_tasks()
    busy = [await server.connect() for _ in range(5)]
    client = await server.connect()
    for other in busy:
        await other.send(*[call("GiveWay")] * 500)
    await client.send(*(call("GiveWay", number) for number in range(50)))
    await client.leave()
    await until(lambda: Tasks.order.count(None) == 2500)
    assert [number for number in Tasks.order if number is not None] == [*range(50)]


async def test_a_worker_that_broke_gets_no_other_call(serve_tasks, request) -> None:
    def break_too(record: logging.LogRecord) -> bool:
        raise OSError("the disk is full")

    server = await serve_tasks()
    one, other = await server.connect(), await server.connect()
    kestrun.log.addFilter(break_too)
    request.addfinalizer(lambda: kestrun.log.removeFilter(break_too))
    assert "unexpected" in await one.error("BreakOff")
    assert await other.invoke("SameTask") is True
    assert await one.invoke("SameTask") is True


async def test_an_answer_whose_writing_is_cancelled_becomes_an_error(tasks) -> None:
    assert "unexpected" in await tasks.error("Elsewhere")
    assert await tasks.invoke("SameTask") is True


async def test_calls_that_begin_after_shutdown_leave_no_task_behind(
    serve_tasks, monkeypatch
) -> None:
    monkeypatch.setattr(kestrun, "_SHUTDOWN", 0.05)
    outside = asyncio.all_tasks()
    server = await serve_tasks(close_timeout=5)
    client = await server.connect()
    await client.send(call("HoldOut"), call("InOrder", 1), call("InOrder", 2))
    await Tasks.begun.wait()
    await client.leave()
    await server.runner.cleanup()
    assert Tasks.order == []
    Tasks.gate.set()
    await until(lambda: asyncio.all_tasks() == outside)
    assert Tasks.order == [1, 2]


async def test_no_call_is_given_to_a_worker_that_was_cancelled(tasks) -> None:
    await tasks.send(
        call("CancelWorkers", invocationId="1"), call("SameTask", invocationId="2")
    )
    assert (await tasks.next(3, "1"))["result"] > 0
    assert (await tasks.next(3, "2"))["result"] is True


@pytest.mark.parametrize("method", ["Soon", "HurryATurn", "ThinkAgain"])
async def test_a_call_that_is_over_is_not_left_to_the_garbage_collector(
    tasks, method
) -> None:
    def calls() -> set[int]:
        return {id(c) for c in gc.get_objects() if type(c) is kestrun.Call}

    gc.collect()
    gc.disable()
    try:
        others = calls()
        for _ in range(3):
            name = await tasks.begin(method, *([1] if method == "Soon" else []))
            await tasks.next(3, name)
        assert calls() <= others
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["Soon", "Wait"])
async def test_a_client_that_left_is_remembered_by_no_task(serve_tasks, method) -> None:
    client = await (await serve_tasks()).connect()
    Tasks.gate.set()
    await client.invoke(method, *([1] if method == "Soon" else []))
    assert Tasks.latest() is not None
    await client.leave()
    await until(lambda: gc.collect() >= 0 and Tasks.latest() is None)


async def test_calls_leave_no_task_behind(serve_tasks) -> None:
    outside = asyncio.all_tasks()
    server = await serve_tasks()
    idle = len(asyncio.all_tasks())
    client = await server.connect()
    for method in ("SameTask", "KeepTask", "GiveUp", "SameTask"):
        await client.begin(method, *([False] if method == "GiveUp" else []))
    waiting = [await client.begin("Wait") for _ in range(3)]
    Tasks.gate.set()
    for id in waiting:
        await client.finish(id)
    await client.leave()
    await until(lambda: len(asyncio.all_tasks()) == idle)
    await server.runner.cleanup()
    assert asyncio.all_tasks() == outside


@everywhere
@pytest.mark.parametrize("method", ["HalfMade", "HalfMadeLater", "HalfALetter"])
async def test_an_answer_that_cannot_be_written_fails_alone(
    serve, wire, method: str
) -> None:
    client = await (await serve(Victim)).connect(wire)
    failed = f"An unexpected error occurred invoking '{method}' on the server."
    assert (await client.error(method)).startswith(failed)
    assert await client.invoke("Echo", 1) == 1


@everywhere
@pytest.mark.parametrize("method", ["Odd", "OddLater"])
async def test_an_exception_of_an_odd_kind_is_answered(serve, wire, method) -> None:
    client = await (await serve(Victim)).connect(wire)
    failed = f"An unexpected error occurred invoking '{method}' on the server."
    assert await client.error(method) == failed
    assert await client.invoke("Echo", 1) == 1


async def test_half_a_letter_from_messagepack_is_replaced(serve) -> None:
    client = await (await serve(Victim)).connect(("WebSockets", "messagepack"))
    head, tail = b"\x96\x01\x80\xa11\xa4Echo\x91", b"\x90"
    await client.write(prefixed(head + b"\xa4a\xed\xa0\xbd" + tail))
    assert (await client.finish("1")).startswith("a\ufffd")


async def test_a_time_that_python_does_not_know_fails_its_call_alone(serve) -> None:
    class Times(Victim):
        def year(self, moment: datetime.datetime) -> int:
            return moment.year

    client = await (await serve(Times)).connect(("WebSockets", "messagepack"))
    failed = await client.error("Year", msgpack.Timestamp(8_640_000_000_000))
    assert failed == "Failed to invoke 'Year' due to an error on the server."
    assert await client.invoke("Year", msgpack.Timestamp(0)) == 1970


@pytest.mark.parametrize("id", [0, [], False, {}])
async def test_an_id_that_is_no_text_is_a_protocol_error(serve, id: Any) -> None:
    client = await (await serve(Victim)).connect(("WebSockets", "messagepack"))
    await client.write(prefixed(msgpack.packb([1, {}, id, "Echo", [1], []])))
    assert (await client.next(7))["error"] == CLOSED


@both_protocols
async def test_keys_of_a_dict_are_converted_both_ways(serve, protocol) -> None:
    client = await (await serve(Victim)).connect(("WebSockets", protocol))
    answer = await client.invoke("ByKey", {"1": 1, "high": 2})
    low, first = ("1", str(UUID(int=1)))
    if protocol == "json":
        assert answer == {first: [{low: 1, "2": 2}], low: {"2": 1}}
    else:
        assert answer == {first: [{1: 1, 2: 2}], 1: {2: 1}}


async def test_a_converter_that_stops_short_drops_no_argument(serve) -> None:
    client = await (await serve(Victim)).connect()
    refused = "Failed to invoke 'Role' due to an error on the server."
    assert await client.error("Role", {"name": "evil"}, False) == refused
    assert await client.invoke("Role", {"name": "user"}, False) == [False, False]


async def test_flags_that_do_not_exist_are_refused_and_not_remembered(serve) -> None:
    client = await (await serve(Victim)).connect()
    for number in range(4, 40):
        assert "error" in await client.error("Permit", number)
    assert await client.invoke("Permit", 3) == 3
    assert len(Permission._value2member_map_) < 6


async def test_a_user_that_is_no_text_is_the_servers_error(serve) -> None:
    async def authenticate(request: web.Request) -> Any:
        return {"name": "Ann"}

    server = await serve(Victim, authenticate=authenticate)
    assert (await server.request("POST", "/hub/negotiate")).status == 500
    assert len(server.hub.connections) == 0


async def test_many_cheap_calls_of_one_client_do_not_hold_up_others(serve) -> None:
    server = await serve(Victim, maximum_receive_message_size=None)
    raw, other = await RawSocket.open(server), await server.connect()
    raw.send(1, encode("json", call("Work")) * 1500)
    longest = 0.0
    for _ in range(20):
        asked = time.monotonic()
        await other.invoke("Echo", 1)
        longest = max(longest, time.monotonic() - asked)
    assert longest < 0.3


async def test_many_clients_with_many_calls_do_not_hold_up_another(serve) -> None:
    server = await serve(Victim, maximum_receive_message_size=None)
    busy = [await RawSocket.open(server) for _ in range(20)]
    other, waited = await server.connect(), []
    for raw in busy:
        raw.send(1, encode("json", call("Work")) * 100)
    for _ in range(10):
        asked = time.monotonic()
        await other.invoke("Echo", 1)
        waited.append(time.monotonic() - asked)
    assert sum(waited) < 1.2  # the busy ones want two seconds


async def test_a_stream_as_fast_as_it_can_does_not_hold_up_its_cancel(serve) -> None:
    client = await (await serve(Victim)).connect()
    stream = await client.begin("Firehose", type=4)
    await client.next(2)
    assert await client.invoke("Echo", 1) == 1
    await client.send({"type": 5, "invocationId": stream})
    assert "error" not in await client.next(3, stream)


async def test_a_stream_that_is_stubborn_sends_no_more_when_its_client_left(
    serve,
) -> None:
    client = await (await serve(Victim, close_timeout=0.1)).connect()
    await client.begin("TickStubbornly", type=4)
    await client.next(2)
    await client.leave()
    await until(lambda: "not yet" in Victim.notes)
    await until(lambda: any(n[0] == "gone" for n in Victim.notes if n != "tick"))
    ticks = Victim.notes.count("tick")
    await silence()
    assert Victim.notes.count("tick") == ticks


@everywhere
async def test_an_upload_may_be_read_by_two(serve, wire) -> None:
    client = await (await serve(Victim)).connect(wire)
    id = await client.begin("ReadTwice", streamIds=["u"])
    await upload(client, "u", 1, 2, 3)
    assert await client.finish(id) == "done"


@everywhere
async def test_an_upload_method_may_ask_about_each_item(serve, wire) -> None:
    client = await (await serve(Victim)).connect(wire)
    id = await client.begin("Check", streamIds=["u"])
    await upload(client, "u", *range(30))
    for number in range(30):
        await answer(client, number)
    assert await client.finish(id) == sum(range(30))


async def test_one_stream_cannot_be_two_uploads(serve) -> None:
    client = await (await serve(Calls)).connect()
    refused = await client.error("Zip", 1, streamIds=["s", "s"])
    assert refused == "Stream ID 's' is already in use."


async def test_a_call_does_not_take_the_id_of_a_running_stream(serve) -> None:
    client = await (await serve(Victim)).connect()
    await client.begin("Firehose", type=4, invocationId="9")
    await client.next(2)
    await client.send(call("Nap", 1, invocationId="9"))
    await until(lambda: Victim.notes)
    await client.send({"type": 5, "invocationId": "9"})
    await client.next(3, "9")
    assert await client.invoke("Echo", 1) == 1


async def test_a_cancel_reaches_a_plain_method_that_returns_a_coroutine(serve) -> None:
    client = await (await serve(Victim)).connect()
    slow = call("SlowInDisguise", invocationId="1")
    await client.send(slow, {"type": 5, "invocationId": "1"})
    assert "error" in await client.next(3, "1")


@everywhere
async def test_what_waits_is_not_overtaken_by_a_stream(serve, wire) -> None:
    client = await (await serve(Victim)).connect(wire)
    calls = [call("Nap", n) for n in (1, 2)]
    stream = call("Firehose", type=4, invocationId="s")
    await client.send(*calls, stream)
    await client.next(2)
    assert Victim.notes[:1] == [1]
    await client.send({"type": 5, "invocationId": "s"})
    await until(lambda: len(Victim.notes) == 2)


@everywhere
async def test_items_of_an_open_upload_pass_calls_that_wait(serve, wire) -> None:
    client = await (await serve(Victim)).connect(wire)
    id = await client.begin("Check", streamIds=["u"])
    await client.send(call("CleanUp"), call("Nap", 1), call("Nap", 2))
    await upload(client, "u", *range(30))
    for number in range(30):
        await answer(client, number)
    assert await client.finish(id) == sum(range(30))
    assert Victim.notes == ["begun"]


async def test_hundreds_of_streams_that_waited_are_all_completed(serve) -> None:
    client = await (await serve(Victim)).connect()
    names = [f"s{n}" for n in range(400)]
    streams = [call("Counter", 1, type=4, invocationId=name) for name in names]
    await client.send(call("Nap", 1), call("Nap", 2), *streams)
    for name in names:
        assert "error" not in await client.next(3, name)


async def test_a_call_that_follows_others_can_be_cancelled_at_once(serve) -> None:
    client = await (await serve(Victim)).connect()
    many = [call("Echo", "x" * 5000) for _ in range(31)]
    await client.send(call("Nap", 1), call("Nap", 2), *many)
    await client.send(call("CleanUp", invocationId="long"), call("Echo", 1))
    await client.send({"type": 5, "invocationId": "long"})
    assert "error" in await client.next(3, "long")


@everywhere
async def test_calls_begin_in_the_order_of_their_arrival(serve, wire) -> None:
    server = await serve(Victim, maximum_parallel_invocations_per_client=3)
    client = await server.connect(wire)
    calls = [call("Note" if n % 3 else "NoteLater", n) for n in range(30)]
    await client.send(*calls)
    await until(lambda: len(Victim.notes) == 30)
    assert Victim.notes == list(range(30))


async def test_calls_that_ask_their_client_are_bounded(serve) -> None:
    server = await serve(Victim, maximum_receive_message_size=None)
    client = await server.connect()
    calls = [call("AskWithPatience", invocationId=str(n)) for n in range(1500)]
    await client.send(*calls)
    await until(lambda: len(client.unread) >= 1001)
    await silence()
    assert len(client.unread) == 1001
    for n in range(1500):
        await answer(client, n)
    for n in range(1500):
        await client.finish(str(n))


async def test_all_of_many_calls_begin_though_their_client_leaves(serve) -> None:
    client = await (await serve(Victim)).connect()
    await client.send(*(call("NoteLater", n) for n in range(60)), {"type": 7})
    await until(lambda: ("gone", None) in Victim.notes)
    assert [n for n in Victim.notes if type(n) is int] == list(range(60))


async def test_calls_that_waited_for_a_slow_one_all_get_their_turn(serve) -> None:
    client = await (await serve(Victim)).connect()
    calls = [call("Nap", 0), *(call("Work") for _ in range(60)), call("Note", 1)]
    await client.send(*calls)
    await until(lambda: Victim.notes == [0, 1])


async def test_a_call_that_is_cancelled_while_it_waits_lets_others_begin(serve) -> None:
    client = await (await serve(Victim)).connect()
    await client.send(call("CleanUp"), call("Nap", 1, invocationId="nap"))
    await client.send(call("Firehose", type=4, invocationId="stream"))
    await client.send({"type": 5, "invocationId": "nap"})
    await client.next(3, "nap")
    await client.next(2, "stream")
    assert Victim.notes == ["begun"]


@everywhere
@pytest.mark.parametrize("goodbye", [True, False])
async def test_calls_sent_before_a_goodbye_all_begin(serve, wire, goodbye) -> None:
    client = await (await serve(Victim)).connect(wire)
    last = [{"type": 7}] if goodbye else []
    await client.send(call("Nap", "cancelled"), *(call("Note", n) for n in range(60)))
    await client.send(*last)
    await client.leave()
    await until(lambda: ("gone", None) in Victim.notes)
    assert [n for n in Victim.notes if type(n) is int] == list(range(60))


@everywhere
async def test_calls_that_came_before_the_hub_was_ready_count(serve, wire) -> None:
    client = await (await serve(Farewell)).connect(wire)
    await client.send({"type": 6}, call("Note", 7))
    await client.leave()
    gone = ("gone", None, "ConnectionError")
    await until(lambda: gone in Victim.notes)
    assert Victim.notes == [7, gone]


async def test_a_client_with_many_calls_under_way_may_acknowledge(serve) -> None:
    server = await serve(Victim, allow_stateful_reconnects=True)
    client = server.client()
    assert await client.start(version=2, useStatefulReconnect="true") == {}
    await client.send(*(call("AnswerMuch", 40_000) for _ in range(40)))
    for number in range(1, 121):
        await client.next(1)
        await ack(client, number)


async def test_stateful_reconnect_is_for_websockets_only(serve) -> None:
    server = await serve(Plain, allow_stateful_reconnects=True)
    for transport in ("LongPolling", "ServerSentEvents"):
        client = server.client((transport, "json"))
        assert await client.start(version=2, useStatefulReconnect="true") == {}
        assert await client.invoke("Add", 1, 2) == 3
        assert not client.unread


async def test_an_answer_without_a_result_is_none(serve) -> None:
    client = await (await serve(Asking)).connect()
    id = await client.begin("Ask")
    question = await client.next(1)
    await client.send({"type": 3, "invocationId": question["invocationId"]})
    with pytest.raises(Failed, match="HubException: Client didn't provide a result."):
        await client.finish(id)


async def test_a_poll_that_was_dropped_does_not_take_the_close_with_it(serve) -> None:
    server, url = await polled(serve, Victim)
    poll = asyncio.create_task(server.request("GET", url))
    await silence(0.05)
    poll.cancel()
    await silence(0.05)  # until the server has seen it
    (context,) = server.hub.connections.values()
    context.abort()
    answer = await server.request("GET", url)
    assert (answer.status, answer.body) == (200, '{"type":7}\x1e')
    assert (await server.request("GET", url)).status == 204


async def test_a_ping_that_met_a_full_socket_is_answered_later(serve) -> None:
    server = await serve(Victim, outbox_limit=None)
    raw = await RawSocket.open(server, receive_buffer=4096)
    await silence(0.05)
    for _ in range(400):
        await server.hub.clients.all.send("Note", "x" * 20_000)
    raw.send(9, b"there?")
    await silence()
    while (frame := await raw.next())[0] == 1:
        pass
    assert frame == (10, b"there?")


async def test_bytes_without_a_message_are_no_sign_of_life(serve) -> None:
    client = await (await serve(Victim, client_timeout_interval=0.3)).connect()
    await client.send({"type": 6})
    with suppress(aiohttp.ClientConnectionError):
        while not client.ended:
            await client.write(b" ")
            await asyncio.sleep(0.05)
    assert (await client.next(7))["error"] == CLOSED


@pytest.mark.parametrize("version", ["2147483647", "%201%20", "-0"])
async def test_any_integer_is_a_version_of_negotiate(serve, version: str) -> None:
    server = await serve(Plain)
    answer = await server.negotiated(f"?negotiateVersion={version}")
    assert answer["negotiateVersion"] in (0, 1)


async def test_a_handshake_that_a_shutdown_interrupts_is_told_so(serve) -> None:
    server = await serve(Plain)
    raw = await RawSocket.open(server, shake=False)
    stopping = asyncio.create_task(server.runner.cleanup())
    assert b"Handshake was canceled." in (await raw.next())[1]
    raw.writer.close()
    await stopping


async def test_a_close_is_finished_also_where_reading_had_stopped(serve) -> None:
    class Busy(Victim):
        async def bye(self) -> None:
            await asyncio.sleep(0.1)
            self.context.abort()

    server = await serve(Busy, close_timeout=PATIENCE)
    raw = await RawSocket.open(server)
    raw.send(
        1, encode("json", call("Bye")) + encode("json", call("Nap", "x" * 99)) * 9999
    )
    assert await raw.close_code() == 1000
    raw.send(8, b"\x03\xe8")
    assert await soon(raw.reader.read(9)) == b""


async def test_a_small_outbox_has_its_limit_too(serve) -> None:
    server, _ = await polled(serve, Victim, outbox_limit=1000)
    for _ in range(3):
        await server.hub.clients.all.send("Note", "x" * 900)
    assert server.hub.stats()["cuts"] == {"slow client": 1}


async def test_what_a_client_says_cannot_forge_a_line_of_the_log(serve, caplog) -> None:
    caplog.set_level("INFO", "kestrun")
    server = await serve(Victim)
    raw = await RawSocket.open(server, shake=False)
    raw.send(1, b'{"a":1\n,"ERROR root: forged":\n1}' + RS)
    await raw.close_code()
    client = await server.connect()
    await client.error("Echo\nERROR root: forged")
    assert "forged" in caplog.text
    assert not any("\n" in record.getMessage() for record in caplog.records)


async def test_operations_that_ignore_a_cancel_do_not_hold_up_the_end() -> None:
    async def stubborn(progress: kestrun.Progress) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(50)
        await asyncio.sleep(50)

    operations = kestrun.Operations()
    operation = operations.start(stubborn)
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        await operations.close()
    assert operation.state == "Canceled"


async def test_a_demo_can_be_started_again(serve) -> None:
    app = kestrun.create_app()
    for _ in range(2):
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/api/operation/start"
        assert (await post(url))["Success"] is True
        await runner.cleanup()


async def test_a_job_that_comes_after_the_end_does_not_run() -> None:
    schedule, ran = kestrun.Schedule(), []
    schedule.start()
    await schedule.close()
    schedule.every(0.01)(lambda: ran.append(1))
    await silence(0.05)
    assert ran == []


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "https://a.example:443",
            "http://a.example:80",
            "https://b\u00fccher.example",
        ),
        *("https://user@a.example", "https://a .example", "https://a.example:999999"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_at_once(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origins"):
        kestrun.HubOptions(allowed_origins=[origin])


async def test_a_post_of_a_connection_that_ended_is_not_read_on(serve) -> None:
    server, url = await polled(serve, disconnect_timeout=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST {url} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000"
    writer.write(head.encode() + b"\r\n\r\n" + b"x" * 100)
    await server.http.delete(url)
    async with asyncio.timeout(PATIENCE):
        status = int((await reader.readline()).split()[1])
    assert status in (400, 404)
    writer.close()


async def test_a_flood_of_pings_does_not_keep_others_waiting(serve) -> None:
    server = await serve(Victim)
    flooder, other = await RawSocket.open(server), await server.connect()
    flood = masked_frame(9, b"") * 200_000
    flooder.writer.write(flood)
    started_at = time.monotonic()
    assert await other.invoke("Echo", 1) == 1
    assert time.monotonic() - started_at < 1


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://["}, {"Authorization": "Bearer \udcff"}],
    ids=["origin", "authorization"],
)
async def test_odd_headers_are_refused_and_not_an_error(serve, headers) -> None:
    server = await serve(app=kestrun.create_app(token="sesame"))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"GET /api/ps/event HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n"
    writer.write(head.encode(errors="surrogateescape"))
    status = int((await reader.readline()).split()[1])
    assert status in (401, 403)
    writer.close()


@pytest.mark.parametrize(
    ("expression", "after", "found"),
    [
        ("0 30 2 * * *", "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"),
        ("0 30 2 * * *", "2026-03-28T12:00+01:00", "2026-03-30T02:30+02:00"),
        ("0 0 * * * *", "2026-03-29T01:00+01:00", "2026-03-29T03:00+02:00"),
        ("59 59 23 31 12 *", "2026-12-31T23:59:58+01:00", "2026-12-31T23:59:59+01:00"),
        ("0 0 0 29 2 *", "2026-01-01T00:00+01:00", "2028-02-29T00:00+01:00"),
        ("0 * * * * *", "2026-10-25T02:59+02:00", "2026-10-25T02:00+01:00"),
        ("0 */30 * * * *", "2026-10-25T02:30+01:00", "2026-10-25T03:00+01:00"),
        ("0 5 * * * fri-mon", "2026-11-23T23:30+01:00", "2026-11-27T00:05+01:00"),
    ],
)
def test_cron_copes_with_clocks_that_change(
    monkeypatch: pytest.MonkeyPatch, expression: str, after: str, found: str
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        moments: list[float] = []
        now = datetime.datetime.fromisoformat(after).timestamp()
        schedule = kestrun.Schedule(clock=lambda: now)
        schedule.cron(expression, name="job")(lambda: moments.append(now))
        (job,) = schedule.report()
        wanted = datetime.datetime.fromisoformat(found)
        assert job["next_run"] == wanted
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_an_operation_is_final_whatever_on_change_does() -> None:
    def on_change(operation: kestrun.Operation) -> None:
        if operation.state == "Completed":
            raise asyncio.CancelledError

    operations = kestrun.Operations(on_change=on_change)
    operation = operations.start(lambda progress: asyncio.sleep(0))
    async with asyncio.timeout(PATIENCE):
        assert (await operation.wait()).state == "Completed"
        await operations.close()


async def test_an_operation_is_final_while_its_end_is_announced() -> None:
    announcing, go_on = asyncio.Event(), asyncio.Event()

    async def on_change(operation: kestrun.Operation) -> None:
        if operation.final:
            announcing.set()
            await go_on.wait()

    operations = kestrun.Operations(on_change=on_change)
    operation = operations.start(lambda progress: asyncio.sleep(0))
    async with asyncio.timeout(PATIENCE):
        await announcing.wait()
        assert (operation.state, operations.cancel(operation.id)) == (
            "Completed",
            False,
        )
        go_on.set()
        assert (await operation.wait()).state == "Completed"
    assert operations.remove(operation.id)


async def test_a_job_may_close_its_schedule() -> None:
    schedule, closed = kestrun.Schedule(), asyncio.Event()

    @schedule.every(0.05)
    async def last() -> None:
        await schedule.close()
        closed.set()

    async with asyncio.timeout(PATIENCE):
        await closed.wait()


# ------------------------------------------------------------------- measuring speed
#
# `python test_kestrun.py --bench` compares with what one writes by hand on aiohttp:
# `json.dumps` and a loop of `await ws.send_str`. Server and load are a process each;
# the servers take turns within each round, so that both meet the same machine. The
# figures to trust are the ratios.

CROWD, BURST, STEPS, CALLERS, CALLS = 200, 100, 40, 50, 100
PAYLOAD = "x" * 100


class BenchHub(kestrun.Hub):
    """What a load generator asks for; the bench itself needs only half of it."""

    async def broadcast(self, count: int, payload: str) -> None:
        for number in range(count):
            await self.clients.all.send("ReceiveMessage", payload, number)

    async def broadcast_once(self, payload: str) -> None:
        await self.broadcast(1, payload)

    def echo(self, text: str) -> str:
        return text

    async def counter(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    async def join_group(self, name: str) -> None:
        await self.groups.add(self.context.connection_id, name)

    async def broadcast_group(self, name: str, count: int, payload: str) -> None:
        for number in range(count):
            await self.clients.group(name).send("ReceiveMessage", payload, number)


async def freeze(app: web.Application) -> None:
    """Keep the garbage collector from looking at what will not go away."""
    gc.collect()
    gc.freeze()


class AsyncBenchHub(BenchHub):
    async def echo(self, text: str) -> str:
        return text


def kestrun_app(hub: type[BenchHub] = BenchHub) -> web.Application:
    app = web.Application()
    kestrun.map_hub(app, "/hubs/bench", hub)
    app.on_startup.append(freeze)
    return app


def plain_app() -> web.Application:
    """The same hub in the plainest aiohttp."""
    sockets: set[web.WebSocketResponse] = set()

    async def serve(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        await socket.receive()
        await socket.send_str("{}\x1e")
        sockets.add(socket)
        async for frame in socket:
            for record in frame.data.split("\x1e")[:-1]:
                await answer(socket, json.loads(record))
        sockets.discard(socket)
        return socket

    async def answer(socket: web.WebSocketResponse, message: dict[str, Any]) -> None:
        result, arguments = None, message["arguments"]
        if message["target"] == "Echo":
            result = arguments[0]
        else:
            for number in range(arguments[0]):
                event = {"type": 1, "target": "ReceiveMessage"}
                event["arguments"] = [arguments[1], number]
                for other in list(sockets):
                    await other.send_str(json.dumps(event) + "\x1e")
        done = {"type": 3, "invocationId": message["invocationId"], "result": result}
        await socket.send_str(json.dumps(done) + "\x1e")

    app = web.Application()
    app.router.add_get("/hubs/bench", serve)
    app.on_startup.append(freeze)
    return app


BENCHED = {
    "kestrun": kestrun_app,
    "kestrun-async": lambda: kestrun_app(AsyncBenchHub),
    "plain": plain_app,
}


class Load(asyncio.Protocol):
    """A client that only counts the records it gets."""

    def __init__(self) -> None:
        self.records, self.goal = 0, 1
        self.reached = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.records += data.count(RS)
        if self.records >= self.goal and not self.reached.done():
            self.reached.set_result(None)

    async def get(self, count: int) -> None:
        """Wait for so many records more."""
        self.goal += count
        if self.records < self.goal:
            self.reached = asyncio.get_running_loop().create_future()
            await self.reached

    def send(self, message: dict[str, Any]) -> None:
        payload = json.dumps(message).encode() + RS
        size = len(payload)
        length = (
            bytes([size | 128]) if size < 126 else b"\xfe" + struct.pack(">H", size)
        )
        self.transport.write(b"\x81" + length + bytes(4) + payload)

    def invoke(self, target: str, *arguments: Any) -> None:
        call = {"type": 1, "target": target, "arguments": arguments}
        self.send({**call, "invocationId": "1"})


async def loads(port: int, count: int) -> list[Load]:
    """Connect so many clients, each with its handshake done."""
    clients = []
    for _ in range(count):
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(Load, "127.0.0.1", port)
        client.transport.write(
            b"GET /hubs/bench HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        client.send({"protocol": "json", "version": 1})
        await client.reached
        clients.append(client)
    return clients


async def burst(port: int) -> float:
    clients = await loads(port, CROWD)
    started = time.perf_counter()
    clients[0].invoke("Broadcast", BURST, PAYLOAD)
    await asyncio.gather(*(client.get(BURST) for client in clients))
    return CROWD * BURST / (time.perf_counter() - started)


async def lockstep(port: int) -> float:
    clients = await loads(port, CROWD)
    started = time.perf_counter()
    for _ in range(STEPS):
        clients[0].invoke("Broadcast", 1, PAYLOAD)
        waiting = (client.get(1 + (client is clients[0])) for client in clients)
        await asyncio.gather(*waiting)
    return CROWD * STEPS / (time.perf_counter() - started)


async def echo(port: int) -> float:
    async def ask(client: Load) -> None:
        for _ in range(CALLS):
            client.invoke("Echo", PAYLOAD)
            await client.get(1)

    clients = await loads(port, CALLERS)
    started = time.perf_counter()
    await asyncio.gather(*map(ask, clients))
    return CALLERS * CALLS / (time.perf_counter() - started)


@asynccontextmanager
async def server_of(name: str) -> AsyncIterator[tuple[int, int]]:
    """Run one of the servers in a process; yield its port and process id."""
    port = free_port()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--bench-server", name, str(port))
    )
    try:
        async with asyncio.timeout(60):
            while True:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 0.1).close()
                    break
                await asyncio.sleep(0.05)
            yield port, server.pid
    finally:
        server.kill()
        await server.wait()


async def measured(scenario: Callable[[int], Awaitable[float]], name: str) -> float:
    """Run one scenario against a fresh server process; records a second."""
    async with server_of(name) as (port, _):
        return await scenario(port)


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used. (Linux)"""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


async def cost(wire: tuple[str, str]) -> float:
    """Microseconds of the server's processor for each message of a broadcast."""
    async with server_of("kestrun") as (port, pid):
        server = Server(web.Application(), None)
        server.http = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
        async with server.http:
            clients = [server.client(wire, "/hubs/bench") for _ in range(50)]
            for client in clients:
                await client.start()
            before = cpu_seconds(pid)
            for _ in range(BURST):
                await clients[0].invoke("Broadcast", 10, PAYLOAD)
            for client in clients:
                for _ in range(10 * BURST):
                    await client.next(1)
            used = cpu_seconds(pid) - before
            for client in clients:
                client.pump.cancel()
    return used * 1e6 / (len(clients) * 10 * BURST)


def bench(rounds: int = 5) -> None:
    """Print ratios for each scenario, then what each wire costs the server."""
    print(f"{'scenario':22}{'kestrun/s':>12}{'plain/s':>12}{'ratio':>8}")
    for title, scenario, name in (
        ("burst", burst, "kestrun"),
        ("lockstep", lockstep, "kestrun"),
        ("echo", echo, "kestrun"),
        ("echo, async method", echo, "kestrun-async"),
    ):
        rates: dict[str, list[float]] = {name: [], "plain": []}
        for _ in range(rounds):
            for server, found in rates.items():
                found.append(asyncio.run(measured(scenario, server)))
        ours, plain = map(statistics.median, rates.values())
        row = f"{title:22}{ours:12,.0f}{plain:12,.0f}{ours / plain:8.2f}"
        print(row, flush=True)
    if not sys.platform.startswith("linux"):
        return
    print(f"\n{'wire':30}server us/message")
    for wire in WIRES:
        found = [asyncio.run(cost(wire)) for _ in range(rounds)]
        print(f"{' '.join(wire):30}{statistics.median(found):17.2f}", flush=True)


async def test_the_bench_measures_both_servers() -> None:
    for name in BENCHED:
        assert await measured(echo, name) > 0


# ----------------------------------------------------------------------- running them

for _test in [t for n, t in globals().items() if n.startswith("test_")]:
    if inspect.iscoroutinefunction(_test):
        pytest.mark.asyncio(_test)


def main(arguments: list[str]) -> int:
    """Run the tests on two processes; further arguments are pytest's."""
    options = ["asyncio_default_fixture_loop_scope=function", "faulthandler_timeout=60"]
    settings = [word for option in options for word in ("-o", option)]
    # This module has imported the plug-in already, to be started as a program.
    settings += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([__file__, "-q", "-n", "2", *settings, *arguments])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--bench"]:
            bench()
        case ["--bench-server", name, port, *on]:
            app, address = BENCHED[name](), {"host": "127.0.0.1", "port": int(port)}
            new_loop = kestrun._loop_factory(on == ["uvloop"]) or asyncio.new_event_loop
            options = {"print": None, "access_log": None, "backlog": 1024}
            web.run_app(app, loop=new_loop(), **address, **options)
        case arguments:
            sys.exit(main(arguments))
