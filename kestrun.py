#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.3"]
# ///
"""kestrun 1.0.0: a SignalR server in one file. MIT licence, safe to vendor.

Any ASP.NET Core SignalR client connects to it unchanged: JavaScript, .NET,
Python; over WebSockets, Server-Sent Events or long polling; in JSON, or in
MessagePack if `msgpack` is installed. aiohttp is the only dependency.

Run it, then open http://127.0.0.1:5000/ for the demo page:

    python kestrun.py

Or copy this file next to your own code and write a hub:

    from aiohttp import web
    import kestrun

    class ChatHub(kestrun.Hub):
        async def send(self, user: str, text: str) -> None:
            await self.clients.all.send("ReceiveMessage", user, text)

    app = web.Application()
    kestrun.map_hub(app, "/hubs/chat", ChatHub)
    web.run_app(app)

A client gets a token (negotiate), opens a transport with it, and names its protocol
(handshake). Three parts handle each connection, and each knows only its neighbour:

            transports                     connection                    hub
  ┌──────────────────────────┐      ┌────────────────────┐      ┌─────────────────────┐
  │ serve_websocket          │─feed─►  inbox ──► decode ──┼─────►│ HubConnection       │
  │ serve_events  + POST     │      │                    │      │   dispatch → Calls ─┼─► your method
  │ serve_poll    + POST     │◄─take─  outbox ◄── send ◄──┼──────┤ Registry.publish ◄──┼── clients.group("x").send()
  └──────────────────────────┘      └────────────────────┘      └─────────────────────┘

Incoming bytes are handled immediately; only calls wait. Sending never waits:
messages are queued and leave together at the end of the event loop's iteration.

The file reads from top to bottom; each section uses only what stands above it.
`grep -n '^# ---' kestrun.py` prints the contents:

    options         the settings of a hub
    messages        hub messages, and how JSON and MessagePack write them
    connection      a duplex pipe between one client and one hub
    transports      WebSockets, Server-Sent Events, long polling
    registry        connections, groups and users; publish
    redis           a link to Redis: publish and subscribe
    backplane       several processes as one hub
    hub API         what user code sees: Hub, clients, groups, context
    hub methods     finding them, binding and converting their arguments
    hub connection  calls, streams, timeouts: from handshake to end
    endpoint        negotiate, GET, POST, DELETE, origins, users; map_hub
    client          a client for tests and scripts
    operations      long-running work on asyncio tasks
    schedule        jobs on the clock, by interval or cron expression
    page            what a browser sees at /
    demo            the sample application: hub, routes, jobs
    main            the command line

Out of scope: TLS (aiohttp and proxies do it well), user accounts, persistence,
the old ASP.NET SignalR.
"""

from __future__ import annotations

import sys

match sys.version_info[:2]:  # kestrun needs Python 3.11 or newer
    case (3, minor) if minor < 11:  # older than 3.10, it stops at the line above
        sys.exit(f"kestrun needs Python 3.11 or newer; this is 3.{minor}")

import argparse
import asyncio
import base64
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import html
import importlib
import inspect
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import secrets
import signal
import socket
import struct
import threading
import time
import types
import typing
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time
from decimal import Decimal
from enum import Enum, EnumType, Flag
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, quote, unquote_to_bytes

try:
    import aiohttp
    from aiohttp import web
    from aiohttp.abc import AbstractAccessLogger
    from aiohttp.web import Request, Response, StreamResponse

    # Older releases let a request pass that was smuggled behind an upgrade.
    if [int(n) for n in re.findall(r"\d+", aiohttp.__version__)[:3]] < [3, 14, 3]:
        raise ImportError(f"aiohttp {aiohttp.__version__} is too old")
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"kestrun needs aiohttp 3.14.3 or newer: pip install -U aiohttp ({error})")

__version__ = "1.0.0"
__all__ = [
    "HUB",
    "ClientProxy",
    "GroupManager",
    "Hub",
    "HubCallerClients",
    "HubCallerContext",
    "HubClient",
    "HubClients",
    "HubContext",
    "HubException",
    "HubInvocation",
    "HubOptions",
    "Operation",
    "Operations",
    "Progress",
    "RedisBackplane",
    "Schedule",
    "SingleClientProxy",
    "TooManyOperations",
    "access_token",
    "authorize",
    "broadcast_event",
    "broadcast_log",
    "broadcast_to_group",
    "connect",
    "create_app",
    "describe",
    "hub_method",
    "map_hub",
    "not_callable",
]

log = logging.getLogger("kestrun")
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


# ------------------------------------------------------------------ options
#
# All settings of a hub, and checks of functions that users pass. Where SignalR has
# the option, name and default are SignalR's, in snake case. Options are checked when
# they are made, so a running server never meets a wrong one.

WEBSOCKETS = "WebSockets"
SERVER_SENT_EVENTS = "ServerSentEvents"
LONG_POLLING = "LongPolling"
TRANSPORTS = (WEBSOCKETS, SERVER_SENT_EVENTS, LONG_POLLING)

_ORIGIN = re.compile(
    r"(?!(?:http://.*:80|https://.*:443)$)"
    r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?",
    re.IGNORECASE,
)

Authenticate = Callable[[Request], Awaitable["str | None"]]
#: Takes a value, returns it converted, or raises an exception.
Converter = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """The settings of one mapped hub; `map_hub` takes them as keywords too.

    Seconds are floats, sizes are bytes, None means no limit. Raises TypeError or
    ValueError, naming the field, for a value that makes no sense.
    """

    #: Seconds between the server's pings. Long polling needs none.
    keep_alive_interval: float | None = 15
    #: Seconds of silence after which a client that has pinged times out.
    client_timeout_interval: float | None = 30
    #: Seconds for the handshake, from the moment the transport opens.
    handshake_timeout: float | None = 15
    #: Bytes of one hub message, including its separator or length prefix.
    maximum_receive_message_size: int | None = 32768
    #: Calls of one client that run at the same time; further ones wait.
    maximum_parallel_invocations_per_client: int | None = 1
    #: Bytes of calls and stream items that wait for user code. Above it, reading
    #: pauses until it is down to half.
    receive_buffer_limit: int | None = 131_072
    #: Streams that one client reads, and streams that it uploads, at the same time.
    maximum_streams_per_client: int | None = 100
    #: Groups that one client can be in.
    maximum_groups_per_client: int | None = None
    #: Messages of one client in a second, on average; at most twice as many at once.
    #: Its answers to the server do not count. Above it, the client is disconnected.
    invocations_per_second: float | None = None
    #: Connections of this hub in one process, and unused tokens for them; more get 503.
    maximum_connections: int | None = 10_000
    #: Send the text of every exception to the caller. For development only.
    enable_detailed_errors: bool = False
    #: What negotiate offers, out of `TRANSPORTS`.
    transports: Collection[str] = TRANSPORTS
    #: Seconds until a poll is answered empty. nginx waits 60; SignalR's default is 90.
    poll_timeout: float | None = 50
    #: Seconds for which an unused token (an hour at most), a client between two polls,
    #: or one that lost its WebSocket and may resume is kept.
    disconnect_timeout: float | None = 15
    #: Seconds to wait for the peer's WebSocket close frame, and for code that still
    #: runs before its closed connection is forgotten.
    close_timeout: float | None = 5
    #: Let clients resume a lost WebSocket without losing messages.
    allow_stateful_reconnects: bool = False
    #: Unacknowledged bytes above which code that sends to this client alone waits.
    stateful_reconnect_buffer_size: int | None = 100_000
    #: Bytes waiting for one client, above which it is dropped as too slow.
    outbox_limit: int | None = 1_048_576
    #: Seconds without progress before a client with waiting bytes is dropped.
    transport_send_timeout: float | None = 10
    #: Origins, such as "https://example.com", besides the server's own.
    allowed_origins: Collection[str] = ()
    #: Return the converter for an annotation of a hub method, or None for kestrun's
    #: own. Called for each annotation and for each type inside it.
    converter: Callable[[Any], Converter | None] | None = None
    #: Convert a value that kestrun cannot write to one that it can. If it returns the
    #: same value or raises TypeError, sending fails.
    encoder: Callable[[Any], Any] | None = None
    #: Return the name on the wire of a dataclass's field, for the protocol "json" or
    #: "messagepack". By default user_name is userName.
    member_name: Callable[[str, str], str] | None = None
    #: Reads and writes JSON by `dumps(value, default=…)` and `loads(data)`, text or
    #: bytes, such as the module orjson, which does not write integers beyond 64 bits and
    #: reads them as floats. NaN is never written; the limits on size and depth stay.
    json: Any = json
    #: Async: return a request's user id, or None for an anonymous user; or raise
    #: web.HTTPUnauthorized or web.HTTPForbidden. Called for each GET, POST, DELETE.
    authenticate: Authenticate | None = None

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            self._check(option.name, str(option.type), getattr(self, option.name))
        if not self.transports or not set(self.transports) <= set(TRANSPORTS):
            raise ValueError(f"transports: some of {TRANSPORTS}, not {self.transports}")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allowed_origins: {origin!r} is not an origin that browsers send, "
                    "such as 'https://example.com' (ASCII, no path, no final slash, "
                    "no '*', no default port)"
                )

    @staticmethod
    def _check(name: str, annotation: str, value: Any) -> None:
        """Check an option by its annotation, which is text here. Raises an error."""
        if annotation == "Collection[str]":
            strings = isinstance(value, Collection) and not isinstance(value, str)
            if not (strings and all(isinstance(v, str) for v in value)):
                raise TypeError(f"{name}: a list of strings, not {value!r}")
        elif annotation == "bool" and type(value) is not bool:
            raise TypeError(f"{name}: True or False, not {value!r}")
        elif annotation in ("float | None", "int | None") and value is not None:
            number = int if annotation == "int | None" else (int, float)
            if isinstance(value, bool) or not isinstance(value, number):
                raise TypeError(f"{name}: a number or None, not {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: more than 0 and finite, not {value!r}")
        elif name == "authenticate" and value is not None and not _is_async(value):
            raise TypeError(f"authenticate: an async function, not {value!r}")
        elif "Callable" in annotation and not (value is None or callable(value)):
            raise TypeError(f"{name}: a function or None, not {value!r}")
        elif name == "json" and not all(hasattr(value, n) for n in ("dumps", "loads")):
            raise TypeError("json: an object with dumps and loads, such as orjson")


class HubOverrides(typing.TypedDict, total=False):
    """The fields of HubOptions as keywords, for editors and type checkers."""

    keep_alive_interval: float | None
    client_timeout_interval: float | None
    handshake_timeout: float | None
    maximum_receive_message_size: int | None
    maximum_parallel_invocations_per_client: int | None
    receive_buffer_limit: int | None
    maximum_streams_per_client: int | None
    maximum_groups_per_client: int | None
    invocations_per_second: float | None
    maximum_connections: int | None
    enable_detailed_errors: bool
    transports: Collection[str]
    poll_timeout: float | None
    disconnect_timeout: float | None
    close_timeout: float | None
    allow_stateful_reconnects: bool
    stateful_reconnect_buffer_size: int | None
    outbox_limit: int | None
    transport_send_timeout: float | None
    allowed_origins: Collection[str]
    converter: Callable[[Any], Converter | None] | None
    encoder: Callable[[Any], Any] | None
    member_name: Callable[[str, str], str] | None
    json: Any
    authenticate: Authenticate | None


def _is_async(function: Any) -> bool:
    """Return True for an async function, or an object that is called like one."""
    called = getattr(type(function), "__call__", None)  # noqa: B004
    return any(map(inspect.iscoroutinefunction, (function, called)))


def _check_call(function: Any, usage: str, count: int) -> None:
    """Raise TypeError if a function cannot be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError as error:
        raise TypeError(f"{usage}: {error} ({function!r})") from None
    except ValueError:  # it has no signature
        pass


async def _result_of(result: Any) -> Any:
    """Return what a function returned; await it if the function was async."""
    return await result if hasattr(result, "__await__") else result


# ----------------------------------------------------------------- messages
#
# A hub message is a small value; a protocol turns messages into bytes and bytes
# into messages. No sockets here. The wire's own spelling (invocationId) stays
# inside this section. Follows HubProtocol.md of ASP.NET Core SignalR, and
# the shipped clients where they differ from it.

#: Stands for a result that is missing, which is not the same as null.
NO_RESULT: Any = object()


@dataclass(slots=True)
class Invocation:
    """Call `target`. Without an invocation id nobody waits for an answer."""

    invocation_id: str | None = field(default=None, kw_only=True)
    target: str
    arguments: list[Any]
    stream_ids: tuple[str, ...] = ()
    #: The caller expects stream items before the completion.
    streaming: bool = False


@dataclass(slots=True)
class StreamItem:
    """One item of a stream, in either direction."""

    invocation_id: str
    item: Any


@dataclass(slots=True)
class Completion:
    """The end of a call or stream: a result, an error, or neither (NO_RESULT)."""

    invocation_id: str
    result: Any = NO_RESULT
    error: str | None = None


@dataclass(slots=True)
class CancelInvocation:
    """The caller no longer wants the answer."""

    invocation_id: str


@dataclass(slots=True)
class Ping:
    """Keeps the connection alive."""


@dataclass(slots=True)
class Close:
    """The last message of a connection; may allow the client to reconnect."""

    error: str | None = None
    allow_reconnect: bool = False


@dataclass(slots=True)
class Ack:
    """Stateful reconnect: everything up to `sequence_id` has arrived."""

    sequence_id: int


@dataclass(slots=True)
class Sequence:
    """Stateful reconnect: the next message sent has this number."""

    sequence_id: int


#: The messages that stateful reconnect numbers, keeps and sends again.
SEQUENCED = Invocation | StreamItem | Completion | CancelInvocation
Message = SEQUENCED | Ping | Close | Ack | Sequence


class HubException(Exception):
    """An error whose message is sent to the client; other errors stay private."""


class ProtocolError(Exception):
    """The peer violated the protocol: its connection ends."""

    reported_as = "InvalidDataException"  # what clients read, the name in .NET


class MessageTooLarge(ProtocolError):
    """The peer sent a message above the limit. It may know the limit."""

    def __init__(self, limit: float) -> None:
        super().__init__(
            f"The maximum message size of {limit}B was exceeded. The message size can "
            "be configured in AddHubOptions. In kestrun: maximum_receive_message_size."
        )


def error_text(message: str, error: BaseException, options: HubOptions) -> str:
    """Describe an error to the client; add its own text only if that is public."""
    public = isinstance(error, (HubException, MessageTooLarge))
    if public or options.enable_detailed_errors:
        name = getattr(error, "reported_as", type(error).__name__)
        message = f"{message} {name}: {_text_of(error)}"
    return message.encode(errors="replace").decode()


def _text_of(error: BaseException) -> str:
    """Return an error's text; the `__str__` of user code may fail as well."""
    try:
        return str(error)
    except (Exception, SystemExit):  # noqa: BLE001
        return "(without a text)"


def _one_line(text: str, longest: int | None = None) -> str:
    """Escape characters that would break or forge a line of the log."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:longest])


def _camel_case(name: str) -> str:
    """Spell a Python name as JavaScript and .NET do: user_name -> userName."""
    first, *others = name.strip("_").split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in others)


def _write_duration(duration: timedelta) -> str:
    """Write a duration as ISO 8601 does: PT5400S."""
    whole, rest = divmod(abs(duration), timedelta(seconds=1))
    seconds = f"{whole}.{rest.microseconds:06}".rstrip("0").rstrip(".")
    return f"{'-' if duration < timedelta() else ''}PT{seconds}S"


#: The types that every protocol and library writes; dict keys have no others.
_SCALARS = (str, int, float, types.NoneType)


def _a(value: Any) -> str:
    """Name the type of a value, with its article."""
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeioAEIO' else 'a'} {name}"  # but a UUID


def _is_unicode(text: str) -> bool:
    """Return False for text with a lone surrogate, which UTF-8 does not have."""
    return text.isascii() or text.encode(errors="replace").decode() == text


class Inbox(bytearray):
    """Undecoded bytes from the client, and the size of decoded messages that wait."""

    __slots__ = ("_searched", "full", "held", "limit", "lock", "posts", "unfinished")

    def __init__(self, limit: float, data: bytes = b"") -> None:
        super().__init__(data)
        #: Bytes already searched for a separator, so that reading takes linear time.
        self._searched = 0
        #: Bytes of decoded calls and stream items that wait for user code.
        self.held = 0
        #: How many bytes may wait.
        self.limit = limit
        #: Set when `held` exceeds the limit; reset when it is down to half.
        self.full = False
        #: Complete messages may remain, to be decoded in a later iteration.
        self.unfinished = False
        #: Keeps the bytes of two POSTs apart.
        self.lock = asyncio.Lock()
        #: POSTs that are being read or wait for the lock.
        self.posts = 0

    def clear(self) -> None:
        super().clear()
        self._searched = 0

    def read_record(self, limit: float = math.inf) -> bytearray | None:
        """Remove and return the text before the next byte 0x1E; None without one.

        Raises MessageTooLarge if it has more than `limit` bytes, complete or not.
        """
        end = self.find(b"\x1e", self._searched)
        if (len(self) if end < 0 else end + 1) > limit:
            raise MessageTooLarge(limit)
        if end < 0:
            self._searched = len(self)
            return None
        record = self[:end]
        del self[: end + 1]
        self._searched = 0
        return record

    def hold(self, size: int) -> None:
        """Count a decoded message that waits for user code."""
        self.held += size
        self.full = self.full or self.held > self.limit

    def release(self, size: int) -> bool:
        """Stop counting a message; return True if reading may now resume."""
        self.held -= size
        may_go_on = self.full and self.held <= self.limit / 2
        self.full = self.full and not may_go_on
        return may_go_on


#: What `decode` yields: messages with their sizes; None for one of a later version.
Decoded = Iterator[tuple[Message | None, int]]

#: By the type of a field's value: what .NET calls it in errors, and the fields.
_FIELD_TYPES = {
    int: ("of type Number", ("type", "sequenceId", "version")),
    str: ("of type String", ("invocationId", "target", "error", "protocol")),
    list: ("of type Array", ("arguments", "streamIds")),
    dict: ("of type StartObject", ("headers",)),
    bool: ("true or false", ("allowReconnect",)),
}
_TYPE_OF = {name: kind for kind, (_, names) in _FIELD_TYPES.items() for name in names}
_NULLABLE = ("headers", "streamIds", "error")

#: By type number: the message, and what follows the number in MessagePack, in order.
_MESSAGES: dict[int, tuple[type[Message], tuple[str, ...]]] = {
    1: (Invocation, ("headers", "invocationId", "target", "arguments", "streamIds")),
    2: (StreamItem, ("headers", "invocationId", "item")),
    3: (Completion, ("headers", "invocationId", "kind", "value")),
    4: (Invocation, ("headers", "invocationId", "target", "arguments", "streamIds")),
    5: (CancelInvocation, ("headers", "invocationId")),
    6: (Ping, ()),
    7: (Close, ("error", "allowReconnect")),
    8: (Ack, ("sequenceId",)),
    9: (Sequence, ("sequenceId",)),
}
#: The type number of each message: for an Invocation 1, though one that streams has 4.
_TYPES = {message: number for number, (message, _) in reversed(_MESSAGES.items())}
#: The fields of each message: name, spelling on the wire, default.
_FIELDS = {
    kind: [(f.name, _camel_case(f.name), f.default) for f in dataclasses.fields(kind)]
    for kind in _TYPES
}


def _check_fields(fields: dict[str, Any], *required: str, detail: str = "") -> None:
    """Raise ProtocolError for a field that is missing or of the wrong type.

    Text must be valid UTF-8: an answer may repeat it. Unknown fields have any type.
    """
    for name, value in fields.items():
        kind = _TYPE_OF.get(name)
        if kind is None or (value is None and name in _NULLABLE):
            continue
        if type(value) is not kind:
            raise ProtocolError(f"Expected '{name}' to be {_FIELD_TYPES[kind][0]}.")
        if type(value) is str and not _is_unicode(value):
            raise ProtocolError(f"Expected '{name}' to be valid UTF-8.")
    for name in required:
        if name not in fields:
            raise ProtocolError(f"Missing required property '{name}'.{detail}")


def _build(fields: dict[str, Any]) -> Message | None:
    """Make a message of its fields; None for a type of a later version."""
    kind: Any = fields.get("type")
    if type(kind) is int and kind not in _MESSAGES:
        return None
    if fields.get("invocationId") in (None, ""):
        fields.pop("invocationId", None)  # the same as missing
    _check_fields(fields, "invocationId" if kind == 4 else "type")  # a stream has an id
    for key, value in (fields.get("headers") or {}).items():  # otherwise unused
        if type(value) is not str:
            raise ProtocolError(f"Expected header '{key}' to be of type String.")
    if kind == 3 and "result" in fields and fields.get("error") is not None:
        text = "The 'error' and 'result' properties are mutually exclusive."
        raise ProtocolError(text)
    message, _ = _MESSAGES[kind]
    for _, wire, default in _FIELDS[message]:
        if default is dataclasses.MISSING and wire not in fields:
            raise ProtocolError(f"Missing required property '{wire}'.")
    if message is Invocation:
        stream_ids = tuple(fields.get("streamIds") or ())
        for stream_id in stream_ids:
            if stream_id is None:
                raise ProtocolError("Null value for 'streamIds' is not valid.")
            if type(stream_id) is not str or not _is_unicode(stream_id):
                raise ProtocolError("Expected 'streamIds' to be of type String.")
        call = fields["target"], fields["arguments"], stream_ids, kind == 4
        return Invocation(*call, invocation_id=fields.get("invocationId"))
    values = [fields.get(wire, default) for _, wire, default in _FIELDS[message]]
    return message(*values)


def _to_fields(message: Message) -> dict[str, Any]:
    """Return a message's fields, without those that have their default."""
    fields: dict[str, Any] = {"type": _TYPES[type(message)]}
    for name, wire, default in _FIELDS[type(message)]:
        value = getattr(message, name)
        if value is not default:
            fields[wire] = value
    if fields.pop("streaming", False):
        fields["type"] = 4
    return fields


#: Nesting of one JSON message; the reference server's limit.
_JSON_DEPTH = 64


class HubProtocol:
    """How hub messages look on the wire, by the options of a hub."""

    name: ClassVar[str]
    binary: ClassVar[bool]
    #: The types that the protocol has, besides dict, list and tuple.
    _types: tuple[type, ...] = _SCALARS

    def __init__(self, options: HubOptions) -> None:
        self._options = options
        self._members = functools.cache(self.spell)

    def encode(self, message: Message) -> bytes:
        """Write one message.

        Raises TypeError or ValueError, which names the part that cannot be written
        by its place and type; or what the hub's encoder raises.
        """
        try:
            return self._write(message)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            self._to_plain_fields(message)  # raises an error that names the part
            raise ValueError(str(error)) from None

    def _write(self, message: Message) -> bytes:
        raise NotImplementedError

    def decode(self, inbox: Inbox, limit: float) -> Decoded:
        """Remove complete messages from the inbox; yield each with its size in bytes.

        Raises ProtocolError at the first bad message or one above the limit, after
        yielding those before it. None stands for a message of a later version.
        """
        raise NotImplementedError

    def spell(self, kind: Any) -> list[tuple[str, str]]:
        """Return the fields of a dataclass, each with its spelling on the wire."""
        spell = self._options.member_name or (lambda name, _: _camel_case(name))
        return [(f.name, spell(f.name, self.name)) for f in dataclasses.fields(kind)]

    def to_plain(self, value: Any) -> Any:
        """Convert one value of a type that JSON lacks, but not what it contains.

        Raises TypeError for a value that no client could read.
        """
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            members = self._members(type(value))
            return {wire: getattr(value, name) for name, wire in members}
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, (date, clock_time)):  # also a datetime; UTC ends in Z
            return value.isoformat().replace("+00:00", "Z")
        if isinstance(value, timedelta):
            return _write_duration(value)
        if isinstance(value, (uuid.UUID, Decimal)):
            return str(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return base64.b64encode(value).decode()
        if self._options.encoder is not None:
            plain = self._options.encoder(value)
            if plain is not value:
                return plain
        raise TypeError(f"{_a(value)} cannot be sent")

    def result_to_plain(self, value: Any) -> Any:
        """Convert a part of a method's result, where a set becomes a list."""
        if isinstance(value, (set, frozenset)):
            return list(value)
        return self.to_plain(value)

    def _to_plain_fields(self, message: Message) -> dict[str, Any]:
        """Return a message's fields, made plain; an error names the part that fails."""
        fields = _to_fields(message)
        place = "the result"
        try:
            if isinstance(message, Invocation):
                fields["arguments"] = []
                for number, value in enumerate(message.arguments, 1):
                    place = f"{message.target}, argument {number}"
                    fields["arguments"].append(self._walk(value, self.to_plain))
            for name in {"item", "result"} & fields.keys():
                fields[name] = self._walk(fields[name], self.result_to_plain)
        except (TypeError, ValueError) as error:
            path, _, what = str(error).rpartition(": ")
            path = path if len(path) <= 200 else f"{path[:40]}…"
            text = f"{place}{path and ', '}{path}: {what} cannot be sent"
            raise type(error)(text) from None
        return fields

    def _walk(self, value: Any, convert: Converter, depth: int = 0) -> Any:
        """Convert a value and all in it. An error is such as "[2].name: a set"."""
        if depth > (500 if self.binary else _JSON_DEPTH - 2):  # .NET reads no deeper
            raise ValueError(": what is nested too deeply")
        if isinstance(value, list):  # first: a client can send many
            plain: list[Any] = []
            try:
                for item in value:
                    plain.append(self._walk(item, convert, depth + 1))
            except (TypeError, ValueError) as error:
                raise type(error)(f"[{len(plain)}]{error}") from None
            return plain
        if isinstance(value, dict):
            members: dict[Any, Any] = {}
            for key, item in value.items():
                if not isinstance(key, _SCALARS):
                    raise TypeError(f": a dict with {_a(key)} as a key")
                try:
                    name = self._walk(key, convert)  # not every key can be written
                    members[name] = self._walk(item, convert, depth + 1)
                except (TypeError, ValueError) as error:
                    named = isinstance(key, str) and key.isidentifier()
                    step = f".{key}" if named else "[…]"
                    raise type(error)(f"{step}{error}") from None
            return members
        if isinstance(value, str) and not _is_unicode(value):
            raise ValueError(": text with a lone surrogate")
        if isinstance(value, float) and not (self.binary or math.isfinite(value)):
            raise ValueError(": a number that is not finite")
        beyond = isinstance(value, int) and not -(2**63) <= value < 2**64
        if beyond and not self.binary and self._options.json is not json:
            raise ValueError(": an integer beyond 64 bits")
        if isinstance(value, self._types) and not (beyond and self.binary):
            return value
        try:
            value = list(value) if isinstance(value, tuple) else convert(value)
        except (TypeError, ValueError):
            what = "an integer beyond 64 bits" if beyond else _a(value)
            raise TypeError(f": {what}") from None
        return self._walk(value, convert, depth + 1)


class _TooLarge(float):
    """A JSON number beyond the range of a float, so that it binds to none."""


def _read_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _TooLarge(number)


# `int` refuses NaN and the infinities.
_decoder = json.JSONDecoder(parse_constant=int, parse_float=_read_float)


def _loads(text: str) -> Any:
    value, end = _decoder.raw_decode(text)  # a third faster than `decode`
    if end != len(text):
        raise ValueError("text behind the value")
    return value


#: Everything but the brackets of a JSON text.
_BESIDE_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^][}{"]+')


def _check_depth(text: str) -> None:
    """Raise ValueError for JSON that is nested deeper than the reference reads."""
    if len(text) <= 2 * _JSON_DEPTH or text.count("[") + text.count("{") <= _JSON_DEPTH:
        return
    brackets = _BESIDE_BRACKETS.sub("", text)
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    if max(depths, default=0) > _JSON_DEPTH:
        raise ValueError("nested too deeply")


def _json_object(data: bytearray, loads: Converter = _loads) -> dict[str, Any]:
    """Read a JSON text that is an object. Raises ProtocolError."""
    try:
        text = data.decode().strip(" \t\r\n")
        value = loads(text)
        _check_depth(text)
    except Exception:  # noqa: BLE001 (libraries have exceptions of their own)
        raise ProtocolError("Error reading JSON.") from None
    if type(value) is dict:
        return value
    names = {list: "Array", str: "String", types.NoneType: "Null", bool: str(value)}
    token = f"JSON Token Type '{names.get(type(value), 'Number')}'"
    raise ProtocolError(f"Unexpected {token}. Expected a JSON Object.")


class JsonProtocol(HubProtocol):
    """One JSON object for each message, ended by the byte 0x1E, in UTF-8."""

    name: ClassVar[str] = "json"
    binary: ClassVar[bool] = False

    def __init__(self, options: HubOptions) -> None:
        super().__init__(options)
        library = options.json
        self._loads: Converter = _loads if library is json else library.loads
        # Both raise TypeError, ValueError or RecursionError. A result may hold sets.
        self.dumps = self._make_writer(self.to_plain)
        self.dumps_result = self._make_writer(self.result_to_plain)

    def _make_writer(self, convert: Converter) -> Callable[[Any], str]:
        """Return a function that writes values. convert: for types that JSON lacks.

        Other libraries differ in the types that they write by themselves, so the
        standard one makes values plain first. orjson can be told to leave such types
        to `convert`; it gets plain values only if it fails, or writes null where NaN
        may have been.
        """
        encoder = json.JSONEncoder(
            ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=convert
        )
        library = self._options.json
        kinds = ("DATACLASS", "DATETIME", "SUBCLASS")
        option = sum(getattr(library, f"OPT_PASSTHROUGH_{kind}", 0) for kind in kinds)

        def write(value: Any) -> str:
            if library is json:  # its encoder is fast for a str only
                return repr(value) if type(value) is int else encoder.encode(value)
            if option:
                with contextlib.suppress(TypeError):
                    data: bytes = library.dumps(value, default=convert, option=option)
                    if b"null" not in data:
                        return data.decode()
            text = library.dumps(_loads(encoder.encode(value)), default=convert)
            return text.decode() if isinstance(text, bytes) else str(text)

        return write

    def _write(self, message: Message) -> bytes:
        text = self._to_text(message)
        _check_depth(text)  # clients that read no deeper would be lost
        return f"{text}\x1e".encode()

    def _to_text(self, message: Message) -> str:
        # The most frequent two as text: the encoder has a fast path for a lone
        # string, while a dict costs it three times as much.
        match message:
            case Completion(error=None) if message.result is not NO_RESULT:
                number, name, value = 3, "result", message.result
            case StreamItem():
                number, name, value = 2, "item", message.item
            case _:
                return self.dumps(_to_fields(message))
        id, value = self.dumps(message.invocation_id), self.dumps_result(value)
        return f'{{"type":{number},"invocationId":{id},"{name}":{value}}}'

    def decode(self, inbox: Inbox, limit: float) -> Decoded:
        while (record := inbox.read_record(limit)) is not None:
            yield _build(_json_object(record, self._loads)), len(record) + 1


class MessagePackProtocol(HubProtocol):
    """One MessagePack array for each message, after its length as a VarInt.

    Needs the `msgpack` package; raises ImportError without it.
    """

    name: ClassVar[str] = "messagepack"
    binary: ClassVar[bool] = True

    def __init__(self, options: HubOptions) -> None:
        import msgpack  # type: ignore[import-untyped,import-not-found,unused-ignore]

        # Invalid text is replaced when read, as .NET does.
        self._unpack: Any = functools.partial(
            msgpack.unpackb, strict_map_key=False, unicode_errors="replace"
        )
        # `default` is called for naive times only, which are taken as UTC.
        self._pack: Any = functools.partial(
            msgpack.packb, datetime=True, default=lambda t: t.replace(tzinfo=UTC)
        )
        self._types = (*_SCALARS, bytes, bytearray, memoryview, datetime)
        self._types += (msgpack.ExtType, msgpack.Timestamp)
        super().__init__(options)

    def _write(self, message: Message) -> bytes:
        body: bytes = self._pack(self._to_array(message))
        length, prefix = len(body), bytearray()
        while length > 0x7F:
            prefix.append(length & 0x7F | 0x80)
            length >>= 7
        prefix.append(length)
        return bytes(prefix) + body

    def _to_array(self, message: Message) -> list[Any]:
        fields = self._to_plain_fields(message)
        if isinstance(message, Completion):
            kind, name = (1, "error") if "error" in fields else (3, "result")
            tail = [kind, fields[name]] if name in fields else [2]
            return [3, {}, message.invocation_id, *tail]
        empty = {"headers": {}, "streamIds": [], "allowReconnect": False}
        _, names = _MESSAGES[fields["type"]]
        return [fields["type"], *[fields.get(name, empty.get(name)) for name in names]]

    def decode(self, inbox: Inbox, limit: float) -> Decoded:
        while True:
            start, length = self._read_prefix(inbox[:5])
            size = start + length
            if size > limit:
                raise MessageTooLarge(limit)
            if not start or len(inbox) < size:
                return
            body = inbox[start:size]
            del inbox[:size]
            yield _build(self._read(body)), size

    @staticmethod
    def _read_prefix(data: bytearray) -> tuple[int, int]:
        """Return the sizes of the length prefix (0: incomplete) and the body."""
        length = 0
        for position, byte in enumerate(data):
            length |= (byte & 0x7F) << 7 * position
            if byte < 0x80 and length <= 0x7FFFFFFF:
                return position + 1, length
            if byte < 0x80 or position == 4:
                raise ProtocolError("Messages over 2GB in size are not supported.")
        return 0, 0

    def _read(self, body: bytearray) -> dict[str, Any]:
        """Read one array; name its elements as JSON does."""
        try:
            try:
                array = self._unpack(body, timestamp=3)  # as datetime
            except (ValueError, OverflowError):  # datetime cannot hold the year
                array = self._unpack(body)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"Error reading MessagePack: {error}") from None
        if type(array) is not list or not array or type(array[0]) is not int:
            raise ProtocolError("Reading 'messageType' as Int32 failed.")
        _, names = _MESSAGES.get(array[0], (None, ()))
        fields = dict(zip(("type", *names), array, strict=False))
        # signalrcore ends an upload stream with three elements.
        kind = fields.get("kind", 2)
        if kind not in (1, 2, 3):
            raise ProtocolError("Invalid invocation result kind.")
        if kind != 2:
            _check_fields(fields, "value")
            fields["error" if kind == 1 else "result"] = fields["value"]
        return fields


#: The protocol of the handshake, and of clients that do not choose another.
JSON = JsonProtocol(HubOptions())
_dumps = JSON.dumps  # writes any value as JSON


def decode_one(protocol: HubProtocol, data: bytes) -> Message:
    """Decode one whole message, of any size. Raises ProtocolError."""
    for message, _ in protocol.decode(Inbox(math.inf, data), math.inf):
        if message is not None:
            return message
    raise ProtocolError("not a whole message")


def _load_protocols(options: HubOptions) -> dict[str, HubProtocol]:
    """Make the protocols that this installation supports, by name."""
    protocols: dict[str, HubProtocol] = {"json": JsonProtocol(options)}
    with contextlib.suppress(ImportError):
        protocols["messagepack"] = MessagePackProtocol(options)
    return protocols


def _read_handshake(record: bytearray) -> tuple[str, int]:
    """Return the protocol and version that a client asks for, always in JSON."""
    fields = _json_object(record)
    detail = f" Message content: {record.decode(errors='replace')}"
    _check_fields(fields, "protocol", "version", detail=detail)
    return fields["protocol"], fields["version"]


def _handshake_response(error: str | None = None) -> bytes:
    """Write the answer to a handshake, in JSON: empty for success, else the error."""
    return f"{'{}' if error is None else _dumps({'error': error})}\x1e".encode()


# --------------------------------------------------------------- connection
#
# A connection is a duplex pipe between one client and one hub, and the only
# thing that both sides know. Transports use one end: attach, feed, readable, take,
# lost. The hub uses the other: send, drain, close, drop. Sending never waits; a
# client that does not take its bytes is dropped. Only code that sends to one client
# alone waits, in `drain`. State needs no locks: everything runs in one thread,
# and nothing awaits between a check and the action that relies on it.

#: Bytes that may wait in one place before their sender waits. SignalR uses 64 KiB.
_HIGH_WATER = 65_536

#: Seconds of an iteration of the event loop that the messages of one hub may take.
_TIME_SLICE = 0.01
#: Bytes of a large message. Once the time is over, each iteration handles one.
_LARGE = 4096

#: The states of a connection, in order; OPEN from the handshake on.
OPENING, OPEN, CLOSING, CLOSED = range(4)


class End(NamedTuple):
    """How a connection ended."""

    #: The error that caused it, if any.
    error: Exception | None = None
    #: The client closed normally, so messages received before the close are processed.
    normal: bool = False


@dataclass(slots=True, eq=False)
class Transport:
    """The HTTP request that carries a connection, and its socket."""

    _connection: Connection
    socket: asyncio.Transport

    def flush(self) -> None:
        """Wake the request, so that it sends the outbox, and ends if CLOSING."""
        self._connection.wake()

    def abort(self) -> None:
        """Drop the client at once. asyncio's abort would fail on a closed socket."""
        if self.socket.get_write_buffer_size() or not self.socket.is_closing():
            self.socket.abort()


@dataclass(slots=True, eq=False)
class Outbox:
    """Encoded messages that wait for the transport, in order."""

    #: Bytes above which the client is too slow.
    limit: float
    #: Bytes above which code that sends to this client alone waits.
    high_water: float
    #: Bytes that wait, and bytes ever taken.
    size: int = 0
    taken: int = 0
    #: When the client was last seen to make progress.
    last_progress: float = field(default_factory=time.monotonic)
    _delivered: int = 0
    _messages: list[bytes] = field(default_factory=list)

    def add(self, data: bytes) -> None:
        self._messages.append(data)
        self.size += len(data)

    def take(self) -> bytes:
        """Remove and return everything, in order."""
        data = b"".join(self._messages)
        self.taken += self.size
        self.clear()
        return data

    def clear(self) -> None:
        self._messages.clear()
        self.size = 0

    def stalled_for(self, backlog: int, now: float) -> float:
        """Return the seconds without progress. backlog: bytes here and unsent."""
        delivered = self.taken + self.size - backlog
        if delivered != self._delivered or not backlog:
            self._delivered, self.last_progress = delivered, now
        return now - self.last_progress


@dataclass(slots=True, eq=False)
class ReconnectBuffer:
    """Messages sent and not acknowledged, for stateful reconnect.

    Each side numbers the `SEQUENCED` messages that it sends, from 1. The numbers
    travel only in Ack and Sequence. (HubProtocol.md, Ack and Sequence)
    """

    #: Bytes of the messages that are kept.
    size: int = 0
    _messages: deque[bytes] = field(default_factory=deque)
    _sent: int = 0
    #: Number of the newest message dropped without an Ack; 0 if there is none.
    forgotten: int = 0
    #: The number of the peer's next message, the latest one received, and the
    #: latest one acknowledged to the peer.
    _peer_next: int = 1
    _peer_latest: int = 0
    _acked: int = 0

    def keep(self, data: bytes, limit: float) -> None:
        """Number and keep a message; above `limit` bytes forget the oldest."""
        self._messages.append(data)
        self.size += len(data)
        self._sent += 1
        while self.size > limit:
            self.size -= len(self._messages.popleft())
            self.forgotten = self._sent - len(self._messages)

    def acknowledge(self, number: int) -> None:
        """Forget what the peer has received; ignore a number never sent."""
        if number > self._sent:
            return
        if number >= self.forgotten:
            self.forgotten = 0
        while len(self._messages) > self._sent - number:
            self.size -= len(self._messages.popleft())

    def replay(self) -> tuple[Sequence, bytes]:
        """Return the Sequence and the messages for a client that resumes."""
        first = self._sent - len(self._messages) + 1
        return Sequence(first), b"".join(self._messages)

    def accept(self, message: Message | None) -> bool:
        """Number a sequenced message of the peer; return False for a repeated one."""
        if not isinstance(message, SEQUENCED):
            return True
        number = self._peer_next
        self._peer_next += 1
        if number <= self._peer_latest:
            self._acked = 0  # the peer repeats it, so our last Ack was lost
            return False
        self._peer_latest = number
        return True

    def resume(self, number: int) -> None:
        """Continue at the number with which the peer's replay begins."""
        if number > self._peer_latest + 1:
            text = "Sequence ID greater than amount of messages we've received."
            raise ProtocolError(text)
        self._peer_next = number

    def take_ack(self) -> Ack | None:
        """Return the acknowledgement that the peer should get now, if any."""
        if self._peer_latest <= self._acked:
            return None
        self._acked = self._peer_latest
        return Ack(self._acked)


@dataclass(slots=True)
class Shared:
    """What the connections of one hub share: options, counters, and when to send.

    At the end of each iteration of the event loop it sends what was queued in it, so
    everything for one client leaves in one write. It spreads large work over
    iterations, so that clients with large messages do not hold up the others.
    """

    options: HubOptions
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    #: Dropped clients by reason.
    drops: Counter[str] = field(default_factory=Counter)
    #: Called when a connection is CLOSING, and when it is CLOSED; set by the endpoint.
    on_end: Callable[[Connection], None] = field(default=lambda connection: None)
    _queue: list[Connection] = field(default_factory=list)
    #: Large work that waits for an iteration of its own, in order.
    _work: deque[Callable[[], object]] = field(default_factory=deque)
    #: When this iteration's time is over; 0 until that is needed.
    _deadline: float = 0.0

    def flush_later(self, connection: Connection) -> None:
        """Flush this connection at the end of the iteration."""
        self._queue.append(connection)
        self._schedule()

    def deadline(self) -> float:
        """Return when this iteration's time for messages is over."""
        self._schedule()
        return self._deadline

    def run_later(self, work: Callable[[], object]) -> None:
        """Do large work in a later iteration, after the work that waits already."""
        self._work.append(work)
        self._schedule()

    async def admit(self) -> None:
        """Wait until a large message may be handled."""
        if self._work or time.perf_counter() > self.deadline():
            admitted = asyncio.Event()
            self.run_later(admitted.set)
            await admitted.wait()

    def _schedule(self) -> None:
        if not self._deadline:
            self._deadline = time.perf_counter() + _TIME_SLICE
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._deadline = 0.0
        queue, self._queue = self._queue, []
        for connection in queue:
            if connection.outbox.size:
                connection.flush()
        if self._work:
            self._schedule()  # first: the work may fail
            work = self._work.popleft()
            work()


async def _end_tasks(
    tasks: Collection[asyncio.Task[Any]], seconds: Iterable[float] = (1.0, 1.0)
) -> None:
    """Wait for tasks to end; cancel them after each timeout; stop those left."""
    current = asyncio.current_task()
    for timeout in seconds:
        if running := set(tasks) - {current}:
            await asyncio.wait(running, timeout=timeout)
        for task in set(tasks) - {current}:
            task.cancel()
    for task in set(tasks) - {current}:
        if not task.done():
            log.error("task ignored its cancellation: %r", task)
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
            with contextlib.suppress(Exception):  # raised in its `finally`
                task.get_coro().close()  # otherwise the event loop could not end
            task.cancel()


#: Returns a random 128-bit id that is safe in a URL.
_new_id = functools.partial(secrets.token_urlsafe, 16)
#: Characters of an id. Old clients (negotiate's version 0) have the longer token as id.
_ID_LENGTH = 22


@dataclass(slots=True, eq=False)
class Connection:
    """One client's pipe. Its first request creates it; a transport and a hub use it."""

    shared: Shared
    connection_id: str
    user_id: str | None
    state: int = OPENING
    #: Resolved as soon as it is CLOSING or CLOSED.
    ended: asyncio.Future[End] = field(default_factory=asyncio.Future)
    #: When it last got or lost a transport, or began to end.
    last_change: float = field(default_factory=time.monotonic)
    #: Fixed by the first GET.
    transport_name: str = ""
    transport: Transport | None = None
    #: Chosen by the handshake.
    protocol: HubProtocol = JSON
    #: Set if the token allows it; removed if the client cannot resume.
    reconnect: ReconnectBuffer | None = None
    inbox: Inbox = field(init=False)
    outbox: Outbox = field(init=False)
    #: Decodes the inbox; set by the hub after `on_connected` has accepted.
    on_data: Callable[[], None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        """Return its id for logs, cut short: the id of old clients is their token."""
        return self.connection_id[:_ID_LENGTH]

    def __post_init__(self) -> None:
        options = self.shared.options
        self.inbox = Inbox(options.receive_buffer_limit or math.inf)
        limit = options.outbox_limit or math.inf
        self.outbox = Outbox(limit, min(limit, _HIGH_WATER))

    # The hub's end

    def send(self, data: bytes, sequenced: bool = True) -> None:
        """Queue an encoded message for the client; do nothing after the end.

        sequenced: it is one of the messages that stateful reconnect numbers.
        Never waits: beyond `outbox_limit` bytes the client is dropped.
        """
        if self.state >= CLOSING:
            return
        self.shared.messages_out += 1
        outbox = self.outbox
        if self.reconnect is not None:
            if sequenced:
                self.reconnect.keep(data, outbox.limit)
            if self.transport is None:  # the replay has it; the rest is dropped
                if self.reconnect.forgotten:
                    self.drop("missed too much while away")
                return
        if outbox.size > outbox.high_water:
            self.flush()
            if self.backlog() > outbox.limit:
                self.drop("slow client")
            if self.state >= CLOSING:
                return
        if not outbox.size:
            self.shared.flush_later(self)
        outbox.add(data)

    def backlog(self) -> int:
        """Count the bytes that the client has not taken."""
        unsent = self.transport.socket.get_write_buffer_size() if self.transport else 0
        return self.outbox.size + unsent

    def writable(self) -> bool:
        """Return True if code that sends to this client alone may go on."""
        full = self.outbox.size > self.outbox.high_water
        limit = self.shared.options.stateful_reconnect_buffer_size or math.inf
        if self.reconnect is not None and self.reconnect.size > limit:
            # Not while reading is paused: the acknowledgement could not arrive.
            full = full or self.can_read()
        return self.state >= CLOSING or not full

    async def drain(self) -> None:
        """Wait until the client has room for more, or the end."""
        while not self.writable():
            await self.changed()

    def release(self, size: int) -> None:
        """Stop counting a call or an item; resume reading if there is room again."""
        if self.inbox.release(size):
            self.shared.run_later(self.feed)

    def close(self, end: End) -> None:
        """End from the hub's side: deliver what is queued, then end the transport."""
        if self.state >= CLOSING:
            return
        self._end(CLOSING, end)
        self.flush()
        if self.transport is None and self.transport_name != LONG_POLLING:
            self.lost(end)  # nothing will fetch the rest

    def drop(self, reason: str) -> None:
        """Abort the connection and discard its queue; count and log it."""
        if self.state == CLOSED:
            return
        self.shared.drops[reason] += 1
        log.warning("connection %s dropped: %s", self, reason)
        if self.transport is not None:
            self.transport.abort()
        self.lost(End(ConnectionAbortedError(f"The client was dropped: {reason}.")))

    # The transport's end

    def attach(self, transport: Transport) -> None:
        """Replace the transport; a client that resumes gets what it did not confirm."""
        if self.state == CLOSED:
            transport.abort()
            return
        older, self.transport = self.transport, transport
        self.last_change = self.outbox.last_progress = time.monotonic()
        if older is not None:
            older.abort()
        if self.reconnect is not None and self.state == OPEN:
            self.inbox.clear()  # half a message, which the client will send again
            self.outbox.clear()
            sequence, messages = self.reconnect.replay()
            self.outbox.add(self.protocol.encode(sequence) + messages)
        self.flush()

    def detach(self) -> None:
        """Detach the transport; the client may return until `disconnect_timeout`."""
        self.transport = None
        self.last_change = time.monotonic()
        if self.reconnect is not None:
            self.outbox.clear()  # the replay will bring it
        self.wake()

    def can_resume(self) -> bool:
        """Return True if a new WebSocket may take over."""
        resumable = self.reconnect is not None and not self.reconnect.forgotten
        return resumable and self.state == OPEN

    def feed(self, data: bytes = b"") -> None:
        """Process bytes from the client, and bytes left in the inbox, immediately."""
        if self.state >= CLOSING and (data or not self.accepts_messages()):
            return  # ignore data after the end
        self.shared.bytes_in += len(data)
        self.inbox.extend(data)
        if self.on_data is not None:
            self.on_data()
        self.wake()

    def accepts_messages(self) -> bool:
        """Return True while open, and after a normal close for data received before."""
        return self.state < CLOSING or self.ended.result().normal

    def can_read(self) -> bool:
        """Return False while too much waits for user code."""
        inbox = self.inbox
        if self.on_data is None:
            return len(inbox) <= inbox.limit
        return not (inbox.full or inbox.unfinished)

    async def readable(self) -> None:
        """Return when the next bytes may be read, or when no more can come."""
        websocket = self.transport if self.transport_name == WEBSOCKETS else None
        while not self.can_read() and self.state < CLOSING:
            if websocket is not None and websocket.socket.is_closing():
                return
            await self.changed()

    def flush(self) -> None:
        """Hand the outbox to the transport. Its errors end only this connection."""
        try:
            if self.transport is not None:
                self.transport.flush()
        except Exception:
            log.exception("connection %s", self)
            self.drop("transport error")

    def take(self) -> bytes:
        """Take all that is queued: whole messages, in order."""
        data = self.outbox.take()
        self.shared.bytes_out += len(data)
        self.wake()
        return data

    def lost(self, end: End) -> None:
        """End at once: the transport is gone, or nothing more may be sent."""
        if self.state != CLOSED:
            self._end(CLOSED, end)
            self.transport = self.reconnect = None
            self.outbox.clear()

    # Both ends

    def _end(self, state: int, end: End) -> None:
        self.state = state
        self.last_change = time.monotonic()
        if not self.ended.done():
            self.ended.set_result(end)
        self.shared.on_end(self)
        self.wake()

    async def changed(self) -> None:
        """Wait for the next `wake`; the caller then checks its condition again."""
        self._changed.clear()
        await self._changed.wait()

    def wake(self) -> None:
        """Make all waiters check their condition again."""
        self._changed.set()


# --------------------------------------------------------------- transports
#
# Three ways to carry the pipe's bytes over HTTP. Each is a coroutine that ends
# with its request; none looks inside the bytes. aiohttp reads WebSocket frames, and
# writes them while the socket is full. Otherwise they are written here, straight to
# the socket: a server does not mask, so a frame is a head and the payload.

#: Bytes of one WebSocket message, which may hold many hub messages; more if a single
#: hub message may have more. aiohttp keeps an unfinished one in memory.
_WEBSOCKET_MESSAGE_SIZE = 4 * 2**20

#: The types of WebSocket messages that hold bytes of the connection.
_DATA = (web.WSMsgType.TEXT, web.WSMsgType.BINARY)
#: The types of WebSocket messages that do not end the WebSocket.
_READ_ON = (*_DATA, web.WSMsgType.PING, web.WSMsgType.PONG)


def _socket_of(request: Request) -> asyncio.Transport:
    """Return the socket of a request. Raises ConnectionError if the client left."""
    if request.transport is None:
        raise ConnectionResetError("The client is gone.")
    return request.transport


def _frame(opcode: int, payload: bytes) -> bytes:
    """Build one final, unmasked WebSocket frame. (RFC 6455, section 5.2)"""
    length = len(payload)
    if length < 126:
        return bytes((0x80 | opcode, length)) + payload
    if length < 65_536:
        return struct.pack("!BBH", 0x80 | opcode, 126, length) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, length) + payload


#: Ends a WebSocket; `serve_websocket` then reads the peer's.
_CLOSE_FRAME = _frame(web.WSMsgType.CLOSE, struct.pack("!H", aiohttp.WSCloseCode.OK))


@dataclass(slots=True, eq=False)
class WebSocketTransport(Transport):
    """The transport of one WebSocket."""

    _websocket: web.WebSocketResponse[bool]
    #: Sends the outbox while the socket is full.
    _sender: asyncio.Task[None] | None = None

    def flush(self) -> None:
        """Send the outbox; if CLOSING, send the close frame after it."""
        connection, socket = self._connection, self.socket
        if self._sender is not None or socket.is_closing():
            return
        if connection.outbox.size:
            if socket.get_write_buffer_size() >= _HIGH_WATER:
                self._sender = asyncio.create_task(self._send_outbox())
                return
            socket.write(_frame(self._opcode(), connection.take()))
        if connection.state == CLOSING:
            socket.write(_CLOSE_FRAME)

    async def _send_outbox(self) -> None:
        """Send what is queued at the pace of the socket, until nothing is left."""
        connection = self._connection
        try:
            while connection.outbox.size and connection.transport is self:
                await self._websocket.send_frame(connection.take(), self._opcode())
        except ConnectionError:
            return  # the client left, which the reader notices as well
        finally:
            self._sender = None
        self.flush()

    def _opcode(self) -> web.WSMsgType:
        binary = self._connection.protocol.binary
        return web.WSMsgType.BINARY if binary else web.WSMsgType.TEXT

    def close_socket(self, timeout: float | None) -> None:
        """Close the socket; abort it if the peer has not read the rest in time."""
        if self.socket.is_closing():
            return
        if self._connection.state < CLOSING:  # answer the peer's close frame
            self.socket.write(_CLOSE_FRAME)
        self.socket.close()
        if timeout is not None and self.socket.get_write_buffer_size():
            asyncio.get_running_loop().call_later(timeout, self.abort)


async def serve_websocket(request: Request, connection: Connection) -> StreamResponse:
    """Carry a connection over a WebSocket until the socket has ended."""
    shared, options = connection.shared, connection.shared.options
    limit = options.maximum_receive_message_size
    websocket = web.WebSocketResponse(
        autoclose=False,
        autoping=False,
        compress=False,
        decode_text=False,
        max_msg_size=0 if limit is None else max(limit + 1, _WEBSOCKET_MESSAGE_SIZE),
        writer_limit=0,
    )
    error: object = None
    transport: WebSocketTransport | None = None
    try:
        await websocket.prepare(request)
        transport = WebSocketTransport(connection, _socket_of(request), websocket)
        connection.attach(transport)
        while (message := await websocket.receive()).type in _READ_ON:
            if message.type in _DATA and len(message.data) > _LARGE:
                await shared.admit()
            if connection.transport is not transport:
                break  # a newer socket has taken over, or the client was dropped
            if message.type is web.WSMsgType.PING:
                await websocket.pong(message.data)
            elif message.type in _DATA:
                connection.feed(message.data)
            if not connection.can_read():
                await connection.readable()
            elif time.perf_counter() > shared.deadline():
                await asyncio.sleep(0)  # many small frames must let others run
        error = message.data  # a WebSocketError if aiohttp refused a frame
    except ConnectionError:
        pass  # the client left during the upgrade
    finally:
        if transport is not None:
            transport.close_socket(options.close_timeout)
        if connection.transport is transport:  # both are None after a failed upgrade
            _websocket_ended(connection, websocket.close_code, error)
    return websocket


def _websocket_ended(connection: Connection, code: int | None, error: object) -> None:
    """Tell the connection how its socket ended: by a bad frame, closed, or lost."""
    if isinstance(error, aiohttp.WebSocketError):
        log.warning("connection %s: %s", connection, error)
        connection.lost(End(ProtocolError(str(error))))
    elif code is not None and code != aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
        connection.lost(End(normal=True))
    elif connection.can_resume():
        connection.detach()
    else:
        connection.lost(End())


@dataclass(slots=True, eq=False)
class PendingResponse(Transport):
    """The transport of a response that waits for data: a poll or an event stream."""

    #: A newer poll wants to take its place.
    replaced: bool = False

    async def ready(self) -> bool:
        """Wait for data or the end; return True if there is data to send."""
        connection = self._connection
        while not (self.socket.is_closing() or self.replaced):
            if connection.outbox.size or connection.state >= CLOSING:
                return connection.outbox.size > 0
            await connection.changed()
        return False


_NO_CACHE = {
    "Cache-Control": "no-cache, no-store",
    "Pragma": "no-cache",
    "Expires": "Thu, 01 Jan 1970 00:00:00 GMT",
}


async def serve_events(request: Request, connection: Connection) -> StreamResponse:
    """Stream the outbox as Server-Sent Events until either side ends."""
    headers = {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache,no-store",
        "Pragma": "no-cache",
        "Content-Encoding": "identity",
        "X-Accel-Buffering": "no",  # nginx would wait for more
    }
    response = StreamResponse(headers=headers)
    try:
        await response.prepare(request)
        await response.write(b":\r\n")  # some browsers wait for the first bytes
        transport = PendingResponse(connection, _socket_of(request))
        connection.attach(transport)
        while await transport.ready():
            # Encoded messages contain no line feed, so one data line is enough.
            await response.write(b"data: " + connection.take() + b"\r\n\r\n")
        await response.write_eof()  # here, while `close_timeout` applies
    except ConnectionError:
        pass  # the client left while it was written to
    finally:
        connection.lost(End(normal=True))
    return response


def _poll_answer(status: int, body: bytes = b"", kind: str = "text/plain") -> Response:
    return Response(status=status, body=body, content_type=kind, headers=_NO_CACHE)


async def serve_poll(
    request: Request, connection: Connection, first: bool
) -> StreamResponse:
    """Answer one long poll: with data, empty after a while, or 204 at the end.

    A newer poll takes the place of an older one only after that has ended: two
    readers of one outbox would lose messages between them.
    """
    while isinstance(connection.transport, PendingResponse):
        if not connection.transport.replaced:
            connection.transport.replaced = True
            connection.wake()
        await connection.changed()
    if connection.state == CLOSED or request.transport is None:
        return _poll_answer(404)
    transport = PendingResponse(connection, request.transport)
    connection.attach(transport)
    try:
        if first:
            return _poll_answer(200, kind="application/octet-stream")
        try:
            async with asyncio.timeout(connection.shared.options.poll_timeout):
                has_data = await transport.ready()
        except TimeoutError:
            return _poll_answer(200)
        if has_data:
            return await _send_poll(request, connection)
        keeps_polling = transport.replaced or connection.outbox.size
        if connection.state == CLOSING and not keeps_polling:
            connection.lost(End(normal=True))  # the client stops polling at this 204
        return _poll_answer(204)
    finally:
        if connection.transport is transport:
            connection.detach()


async def _send_poll(request: Request, connection: Connection) -> StreamResponse:
    """Send what is queued; end the connection if the client is gone."""
    response = _poll_answer(200, connection.take(), "application/octet-stream")
    try:
        await response.prepare(request)
        await response.write_eof()
    except ConnectionError as error:
        connection.lost(End(error))
    except asyncio.CancelledError:
        connection.lost(End(ConnectionResetError("The poll was dropped.")))
        raise
    return response


async def receive_post(request: Request, connection: Connection) -> None:
    """Feed the body of a POST to the connection, as fast as the hub uses it.

    Raises aiohttp.ClientPayloadError, ConnectionError or TimeoutError if the client
    stops in the middle.
    """
    timeout = connection.shared.options.disconnect_timeout
    ended = connection.ended
    while not (ended.done() or request.content.at_eof()):
        reading = asyncio.ensure_future(request.content.readany())
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wait((reading, ended), return_when="FIRST_COMPLETED")
            if reading.done():
                if len(reading.result()) > _LARGE:
                    await connection.shared.admit()
                connection.feed(reading.result())
                await connection.readable()
        finally:
            reading.cancel()


# ----------------------------------------------------------------- registry
#
# Tracks connections, groups and users, and delivers messages to them. An address
# says who receives a message; it is a value that can be sent to another process.
# Messages go through `Registry.publish`, calls for a result through `PendingResults`.
# Both hand them to the backplane as well: to other processes that serve the hub.

Connections = dict[str, Connection]
#: One message as each protocol writes it, by the protocol's name.
Encoded = dict[str, bytes]


class Address(NamedTuple):
    """The receivers of a message: a kind, its names, and the ids to leave out."""

    kind: str  # "all", "connection", "group" or "user"
    names: tuple[str, ...] = ()
    excluding: frozenset[str] = frozenset()
    #: Only receivers whose connections are in this process.
    local: bool = False


#: Seconds to wait for the answers of all processes.
_ALL_TIMEOUT = 1.0
#: Seconds to wait for the one process that has a connection; it may wait for Redis.
_OWNER_TIMEOUT = 3.0


class Backplane(Protocol):
    """The other processes that serve the same hub, as its registry sees them.

    A channel names the processes that get a message or a question: "all",
    "group:NAME", "user:ID", "connection:ID" or "process:ID". Methods that ask raise
    ConnectionError if the others cannot be reached.
    """

    #: The id of this process among them; empty if there are no others.
    process_id: str = ""

    def publish(self, address: Address, message: Invocation, encoded: Encoded) -> None:
        """Hand a message to the others. Only a call that cannot be written fails."""
        return

    def tell(self, channel: str, handler: str, *arguments: Any) -> None:
        """Call the handler of that name in the others. Never waits, never fails."""
        return

    def subscribe(self, channel: str) -> None:
        """Receive what others send to a channel."""
        return

    def unsubscribe(self, channel: str) -> None:
        """Stop receiving from a channel."""
        return

    async def subscribed(self, channel: str) -> bool:
        """Wait a second at most for a subscription; return True if it is active."""
        return False

    async def subscribers(self, channel: str) -> int:
        """Count the processes that have subscribed to a channel."""
        return 0

    async def ask(
        self, seconds: float, channel: str, question: str, *arguments: Any
    ) -> tuple[list[Any], int]:
        """Return the others' answers that come in time, and how many are missing."""
        return [], 0


class NoBackplane(Backplane):
    """The backplane of a process that is alone."""


@dataclass(slots=True, eq=False, repr=False)
class GroupManager:
    """The groups of one hub, kept in memory. Their names are case-sensitive.

    `add` and `remove` work for connections of any process; the other methods cover
    this process only (`hub.everywhere` covers all).
    """

    _registry: Registry

    async def add(self, connection_id: str, name: str) -> None:
        """Add a connection; do nothing if it is gone or a member already.

        When this returns, messages from any process to the group reach the member.
        It waits for that a second at most, and not at all while Redis is away.
        Raises HubException if the name does not have 1 to 256 characters, or if the
        connection is in `maximum_groups_per_client` groups; ConnectionError if it is
        not here and the other processes cannot be reached.
        """
        if not 1 <= len(name) <= 256:
            raise HubException("A group name must have 1 to 256 characters.")
        if problem := await self._registry.ask_owner(connection_id, "join", name):
            raise HubException(problem)

    async def remove(self, connection_id: str, name: str) -> None:
        """Remove a connection; do nothing if it is not a member.

        Raises ConnectionError if the connection is not here and the other processes
        cannot be reached.
        """
        await self._registry.ask_owner(connection_id, "leave", name)

    def members(self, name: str) -> list[str]:
        """List the connection ids in a group, in the order in which they joined."""
        return list(self._registry.members["group"].get(name, ()))

    def names(self) -> list[str]:
        """List the groups that have members."""
        return list(self._registry.members["group"])

    def of(self, connection_id: str) -> list[str]:
        """List the groups that a connection is in."""
        return list(self._registry.groups_of.get(connection_id, ()))


#: Seconds between checks that the client of another process is still connected.
_WATCH_INTERVAL = 0.7


class PendingResults:
    """The calls that wait for a client's result.

    A client of another process gets the invocation like any message. Its id names the
    process that waits, so the client's own process only has to pass the result on.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        #: By id: this process's id, "s" and a number. Ids of clients are only numbers.
        self._results: dict[str, asyncio.Future[Completion]] = {}
        #: The ids that each client has not answered, also those of other processes.
        self.asked: defaultdict[str, set[str]] = defaultdict(set)
        self._numbers = itertools.count(1)
        #: The tasks that watch clients of other processes, by connection id.
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def invoke(self, address: Address, message: Invocation) -> Completion:
        """Call the handler of one client at an address; return its completion.

        Raises ConnectionError if there is no such client or it leaves, and TypeError
        or ValueError if the message cannot be written.
        """
        registry, (name,) = self._registry, address.names
        id = f"{registry.backplane.process_id}s{next(self._numbers)}"
        registry.publish(address, dataclasses.replace(message, invocation_id=id))
        result = self._results[id] = asyncio.Future()
        self.asked[name].add(id)
        connection = registry.connections.get(name)
        if connection is None and not address.local:
            if name not in self._watches:
                self._watches[name] = asyncio.create_task(self._watch(name))
        elif connection is None or connection.ended.done():
            self.fail(name, [id])
        try:
            # The shield wakes this one iteration later. So a cancellation comes first
            # if it was read together with the result.
            completion: Completion = await asyncio.shield(result)
        finally:
            self.forget(name, id)
            if not result.done():
                registry.backplane.tell(f"connection:{name}", "forget call", name, id)
        if completion.error is None and completion.result is NO_RESULT:
            completion.error = "Client didn't provide a result."
        return completion

    async def _watch(self, name: str) -> None:
        """Fail the calls to a client of another process that will get no result.

        Its process lists what the client has not answered. It passes results on before
        that, so a call that neither is in the list nor has its result is lost.
        """
        await asyncio.sleep(0)  # an eager task would begin before it is in `_watches`
        question = _ALL_TIMEOUT, f"connection:{name}", "unanswered", name
        why = "Redis was away; the result may be lost."
        while name in self.asked:
            ids = set(self.asked[name])
            try:
                unanswered = await self._registry.ask_elsewhere(*question)
                if unanswered is None:
                    self.fail(name)
                    break
                ids.difference_update(unanswered)
            except ConnectionResetError:  # Redis is away, so no result can come
                self.fail(name, set(self.asked.get(name, ())), why)
                break
            except ConnectionError:
                ids.clear()  # the other process may only be slow
            self.fail(name, ids, why)
            await asyncio.sleep(_WATCH_INTERVAL)
        del self._watches[name]

    def unanswered(self, name: str) -> list[str] | None:
        """List the calls that a client has not answered; None if it is not here."""
        here = name in self._registry.connections
        return list(self.asked.get(name, ())) if here else None

    def forget(self, name: str, id: str) -> asyncio.Future[Completion] | None:
        """Forget a call to a client; return what waits for its result here, if any."""
        self.asked[name].discard(id)
        if not self.asked[name]:
            del self.asked[name]
        return self._results.pop(id, None)

    def fail(self, name: str, lost: Iterable[str] | None = None, why: str = "") -> None:
        """Forget lost calls, or all to a client that is gone: here they raise."""
        why = why or f"Connection '{name!s:.{_ID_LENGTH}}' does not exist."
        for id in tuple(self.asked.get(name, ())) if lost is None else lost:
            if (result := self.forget(name, id)) is not None:
                result.set_exception(ConnectionError(why))

    def awaits(self, connection: Connection, message: Message | None) -> bool:
        """Return True for a result of this client that somebody waits for."""
        id = message.invocation_id if isinstance(message, Completion) else None
        return id in self.asked.get(connection.connection_id, ())

    def complete(self, name: str, completion: Completion) -> None:
        """Give a client's result to the call that waits, here or elsewhere, if any.

        Raises ProtocolError if another client was asked.
        """
        id = completion.invocation_id
        result = self._results.get(id)
        if id not in self.asked.get(name, ()):
            if result is None:
                return  # no call of this process waits for it
            text = f"Connection ID '{name[:_ID_LENGTH]}' is not valid for"
            raise ProtocolError(f"{text} invocation ID '{id}'.")
        self.forget(name, id)
        if result is not None:
            result.set_result(completion)
            return
        protocol = self._registry.connections[name].protocol
        try:
            data = protocol.encode(completion)
        except (TypeError, ValueError) as error:
            data = protocol.encode(Completion(id, NO_RESULT, str(error)))
        channel = f"process:{id.partition('s')[0]}"
        packed = name, id, protocol.name, base64.b64encode(data).decode()
        self._registry.backplane.tell(channel, "complete", *packed)

    def complete_remote(self, name: str, id: str, protocol: str, text: str) -> None:
        """Take a result that another process passes on, in its client's protocol."""
        completion: Message = Completion(id, error=f"No package for {protocol}.")
        if protocol in self._registry.protocols:
            data = base64.b64decode(text)
            completion = decode_one(self._registry.protocols[protocol], data)
        assert isinstance(completion, Completion)
        self.complete(name, completion)


class Registry:
    """The connections of one hub, their groups and users, and messages to them."""

    def __init__(self, protocols: dict[str, HubProtocol]) -> None:
        self.protocols = protocols
        self.backplane: Backplane = NoBackplane()
        self.connections: Connections = {}
        #: The members of each group, and the connections of each user.
        self.members: dict[str, dict[str, Connections]] = {"group": {}, "user": {}}
        self.groups_of: dict[str, set[str]] = {}
        self.groups = GroupManager(self)
        self.results = PendingResults(self)
        #: Makes the converter for a client result's type.
        self.make_converter: Callable[[Any], Converter]
        #: Bytes published since a sender last let the event loop run.
        self.published_bytes = 0
        #: Functions that other processes call by name: with `ask`, plain or async; with
        #: `tell`, plain. The answer None means that another process may know.
        self.handlers: dict[str, Callable[..., Any]] = {
            "count": lambda: len(self.connections),
            "members": self.groups.members,
            "groups": lambda id: self.groups.of(id) if id in self.connections else None,
            "join": self._join,
            "leave": self._leave,
            "complete": self.results.complete_remote,
            "forget call": self.results.forget,
            "unanswered": self.results.unanswered,
        }

    def add(self, connection: Connection) -> None:
        self.connections[connection.connection_id] = connection
        if connection.user_id is not None:
            self._enter("user", connection.user_id, connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that was added, and its memberships."""
        del self.connections[connection.connection_id]
        self.results.fail(connection.connection_id)
        for name in self.groups_of.pop(connection.connection_id, ()):
            self._exit("group", name, connection)
        if connection.user_id is not None:
            self._exit("user", connection.user_id, connection)

    def _enter(self, kind: str, name: str, connection: Connection) -> None:
        """Add a connection to a group or a user; subscribe for the first one."""
        if name not in self.members[kind]:
            self.members[kind][name] = {}
            self.backplane.subscribe(f"{kind}:{name}")
        self.members[kind][name][connection.connection_id] = connection

    def _exit(self, kind: str, name: str, connection: Connection) -> None:
        """Remove a connection that has entered; unsubscribe after the last one."""
        del self.members[kind][name][connection.connection_id]
        if not self.members[kind][name]:
            del self.members[kind][name]
            self.backplane.unsubscribe(f"{kind}:{name}")

    async def _join(self, connection_id: str, name: str) -> str | None:
        """Add a connection to a group. Return a problem or ""; None if not here."""
        connection = self.connections.get(connection_id)
        if connection is None:
            return None
        limit = connection.shared.options.maximum_groups_per_client
        joined = self.groups_of.setdefault(connection_id, set())
        if name not in joined:
            if len(joined) >= (limit or math.inf):
                return f"A connection can be in at most {limit} groups."
            joined.add(name)
            self._enter("group", name, connection)
        await self.backplane.subscribed(f"group:{name}")
        return ""

    def _leave(self, connection_id: str, name: str) -> bool | None:
        """Remove a connection from a group; return None if it is not here."""
        joined = self.groups_of.get(connection_id, set())
        if name in joined:
            joined.remove(name)
            self._exit("group", name, self.connections[connection_id])
        if not joined:  # even an empty set can be large
            self.groups_of.pop(connection_id, None)
        return True if connection_id in self.connections else None

    # Messages

    def publish(self, address: Address, message: Invocation) -> None:
        """Queue a message for everyone at the address, here and elsewhere.

        Raises TypeError or ValueError if it cannot be written, before anyone has
        received it. Nothing here awaits, so membership cannot change meanwhile.
        """
        receivers = self._receivers(address)
        # A mistake must show, even if nobody happens to be connected.
        protocols = {c.protocol for c in receivers} or {self.protocols["json"]}
        encoded = {p.name: p.encode(message) for p in protocols}
        for connection in receivers:
            connection.send(encoded[connection.protocol.name])
        self.published_bytes += sum(map(len, encoded.values()))
        if not address.local:
            self.backplane.publish(address, message, encoded)

    def deliver(self, address: Address, encoded: Encoded, id: str | None) -> None:
        """Queue a message of another process. id: that of a call that waits there."""
        common = self.protocols["json"]  # all that a sender without msgpack writes
        for connection in self._receivers(address):
            protocol = connection.protocol
            if protocol.name not in encoded and common.name in encoded:
                with contextlib.suppress(TypeError, ValueError):
                    message = decode_one(common, encoded[common.name])
                    encoded[protocol.name] = protocol.encode(message)
            if protocol.name in encoded:
                connection.send(encoded[protocol.name])
                if id is not None:
                    self.results.asked[connection.connection_id].add(id)

    def _receivers(self, address: Address) -> list[Connection]:
        kind, names, excluding, _ = address
        here, found = self.connections, Connections()
        if kind == "all":
            found = here
        elif kind == "connection":
            found = {id: here[id] for id in names if id in here}
        else:
            for name in names:  # a client with two of them gets one message
                found |= self.members[kind].get(name, {})
        return [connection for id, connection in found.items() if id not in excluding]

    # Questions

    async def answer(self, question: str, *arguments: Any) -> Any:
        """Answer a question for this process."""
        return await _result_of(self.handlers[question](*arguments))

    async def ask(self, channel: str, question: str, *arguments: Any) -> list[Any]:
        """Return the answers of this process and of all others at a channel."""
        own = await self.answer(question, *arguments)
        rest, _ = await self.backplane.ask(_ALL_TIMEOUT, channel, question, *arguments)
        return [own, *rest]

    async def ask_owner(self, connection_id: str, question: str, *more: Any) -> Any:
        """Return the answer of the process that has a connection; None if none has."""
        answer = await self.answer(question, connection_id, *more)
        if answer is not None:
            return answer
        asking = _OWNER_TIMEOUT, f"connection:{connection_id}", question, connection_id
        return await self.ask_elsewhere(*asking, *more)

    async def ask_elsewhere(self, seconds: float, channel: str, *question: Any) -> Any:
        """Return the answer of the one other process that knows; None if none does.

        Raises ConnectionError if a process that does not answer may know.
        """
        answers, missing = await self.backplane.ask(seconds, channel, *question)
        known = [answer for answer in answers if answer is not None]
        if missing and not known:
            raise ConnectionError("Another process does not answer.")
        return known[0] if known else None


# -------------------------------------------------------------------- redis
#
# A link to Redis, through the optional `redis` package, which packs commands and
# parses replies. Commands never wait for each other: what is queued in one
# iteration of the event loop leaves in one write. Nothing here knows of hubs.

#: Seconds to dial Redis.
_DIAL_TIMEOUT = 5.0
#: Bytes that may wait for Redis; more are dropped. Redis itself keeps 32 MiB for
#: each receiver unless it is told otherwise.
_LINK_LIMIT = 24 * 2**20
#: Channels in one command, commands in one write, messages read without a pause. A
#: flood from Redis must not hold up the clients of this process.
_AT_ONCE = 200


def _make_pool(url: str) -> Any:
    """Return what makes connections, without their own timeouts and retries."""
    try:
        from redis import asyncio as redis  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ImportError("RedisBackplane needs a package: pip install redis") from None
    try:
        pool: Any = redis.ConnectionPool.from_url(url, protocol=2)
        # Whatever the URL says: `RedisLink` has timeouts and checks of its own.
        pool.connection_kwargs |= {"socket_timeout": None, "health_check_interval": 0}
        pool.connection_kwargs |= {"decode_responses": False}
        pool.make_connection()  # which checks the options in the URL
    except (ValueError, TypeError, AttributeError):  # their text may show the password
        raise ValueError("the URL must be like redis://host:6379/0") from None
    return pool


def _batches(channels: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Split channels into lists of at most `_AT_ONCE`."""
    rest = iter(channels)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        yield some


class RedisLink:
    """A link to Redis, from dialling to its loss: two sockets.

    One carries commands, the other brings messages. `write`, `read` and `subscribe`
    run as tasks until one of them raises: then the link is lost.
    """

    def __init__(self, pool: Any) -> None:
        self._commands, self._messages = pool.make_connection(), pool.make_connection()
        #: Commands without a reply yet, each with its future; None for a PUBLISH.
        self._queue: deque[tuple[tuple[Any, ...], asyncio.Future[Any] | None]] = deque()
        self._queued = asyncio.Event()
        self._waiting_bytes = 0
        #: The channels whose subscription Redis has confirmed.
        self.active: set[bytes] = set()
        #: Channels to subscribe to (True) or to leave (False) next.
        self._changes: dict[bytes, bool] = {}
        self._changed = asyncio.Event()
        #: Released for each change that Redis confirms.
        self._confirmed = asyncio.Semaphore(0)
        #: Wakes those who wait for a channel to become active.
        self.active_changed = asyncio.Event()

    async def open(self, channels: Collection[bytes]) -> None:
        """Dial, and subscribe to channels. Raises ConnectionError in one sentence."""
        try:
            async with asyncio.timeout(_DIAL_TIMEOUT):
                await self._commands.connect()
                await self._messages.connect()
                await self._commands.send_command("HELLO", 2)
                if b"cluster" in await self._commands.read_response():
                    raise ConnectionError("it is a Redis Cluster; give a single server")
            for some in _batches(channels):
                async with asyncio.timeout(_DIAL_TIMEOUT):
                    await self._messages.send_command("SUBSCRIBE", *some)
                    for _ in some:
                        while (await self._messages.read_response())[0] != b"subscribe":
                            pass  # a message; the link is not in use yet
                    await asyncio.sleep(0)
            self.active.update(channels)
        except BaseException as error:
            await self.close()
            if isinstance(error, Exception):
                reason = str(error) or "it does not answer"
                raise ConnectionError(f"Redis cannot be used: {reason}") from None
            raise

    async def close(self) -> int:
        """Close the sockets; return the number of lost messages."""
        for connection in (self._commands, self._messages):
            await connection.disconnect(nowait=True)
        for _, future in self._queue:
            if future is not None and not future.done():
                future.set_exception(ConnectionResetError("Redis is not connected."))
        return sum(future is None for _, future in self._queue)

    # Commands

    def submit(self, *command: Any) -> asyncio.Future[Any]:
        """Queue a command; return the future of its reply."""
        future = asyncio.Future[Any]()
        self._queue.append((command, future))
        self._queued.set()
        return future

    def publish(self, channel: bytes, data: bytes) -> bool:
        """Queue a message; return False if too much waits already."""
        if self._waiting_bytes > _LINK_LIMIT:
            return False
        self._waiting_bytes += len(data)
        self._queue.append((("PUBLISH", channel, data), None))
        self._queued.set()
        return True

    async def write(self) -> None:
        """Send what is queued and read the replies."""
        connection, queue = self._commands, self._queue
        while True:
            await self._queued.wait()
            self._queued.clear()
            batch = list(itertools.islice(queue, _AT_ONCE))
            packed = connection.pack_commands([command for command, _ in batch])
            await connection.send_packed_command(packed)
            for command, future in batch:
                reply = await connection.read_response()
                queue.popleft()
                if future is None:
                    self._waiting_bytes -= len(command[2])
                elif not future.done():
                    future.set_result(reply)
            if queue:
                self._queued.set()
                await asyncio.sleep(0)

    # Messages

    async def read(self, receive: Callable[[bytes, bytes], None]) -> None:
        """Pass each published message to `receive`, with its channel."""
        for count in itertools.count(1):
            kind, channel, data = await self._messages.read_response()
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
            if kind == b"message":
                receive(channel, data)
            else:  # Redis confirms a change of subscriptions
                self._confirmed.release()

    def want(self, channel: bytes, wanted: bool) -> None:
        """Subscribe to a channel soon, or leave it."""
        self._changes[channel] = wanted
        self._changed.set()

    async def subscribe(self) -> None:
        """Subscribe and unsubscribe; changes meanwhile form the next batch."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changes, self._changes = self._changes, {}
            more = {c for c, wanted in changes.items() if wanted} - self.active
            less = {c for c, wanted in changes.items() if not wanted} & self.active
            self.active -= less
            for command, channels in (("UNSUBSCRIBE", less), ("SUBSCRIBE", more)):
                for some in _batches(channels):
                    await self._messages.send_command(command, *some)
            for _ in (*less, *more):
                await self._confirmed.acquire()
            self.active |= more
            self.active_changed.set()  # for those who wait now
            self.active_changed.clear()


# ---------------------------------------------------------------- backplane
#
# Several processes act as one hub through the pub/sub of Redis, which stores
# nothing: its table of subscriptions shows which processes have members of a group, a
# user or a connection. A message is delivered to this process's clients first and
# then published, encoded; what arrives from others is delivered and never published
# again. While Redis is away, local delivery continues; messages to other processes
# are dropped and counted.
#
#   PREFIX:HUB PATH:…     who subscribes       what it carries
#   all                   every process        messages, questions, used tokens
#   group:NAME, user:ID   those with members   messages, questions
#   connection:ID         the one with it      messages, questions
#   process:ID            that process         questions, answers, results, beats
#
# Each packet is signed with the secret: signature, sender, a header in JSON, and after
# a line break what is not JSON, such as an encoded message.

#: Seconds between beats: packets that a process sends to itself, through Redis.
_BEAT = 1.0
#: How many beats in a row may fail to come back before the link counts as lost.
_MISSED_BEATS = 5
#: Seconds to wait for a reply of Redis, and for a subscription to be active.
_REPLY_TIMEOUT = 1.0
#: Seconds before dialling again: random, so that not all processes dial at once.
_DIAL_DELAYS = 0.05, 0.5
#: Bytes of a signature, and of a process id in hexadecimal.
_SIGNATURE_SIZE = _PROCESS_ID_SIZE = 16


def _sign(key: bytes, *parts: bytes) -> bytes:
    """Return a signature: keyed BLAKE2b. (RFC 7693)"""
    data = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hashlib.blake2b(data, key=key, digest_size=_SIGNATURE_SIZE).digest()


class RedisBackplane:
    """Connects the processes that serve the same hubs, through Redis or Valkey.

    url: "redis://user:password@host:6379/0"; "rediss://" for TLS; "unix://".
    secret: at least 16 characters, the same in all processes. It signs what they
        publish, and the connection tokens, so that each process takes any token.
    prefix: begins channels' names; processes with different ones ignore each other.
    Give one object to all hubs of one application. It connects when the application
    starts, which fails with ConnectionError if Redis cannot be used then. Raises
    ValueError for a wrong url or secret, ImportError without the `redis` package.
    """

    def __init__(self, url: str, *, secret: str, prefix: str = "kestrun") -> None:
        if len(secret) < 16:
            raise ValueError("the secret must have at least 16 characters")
        self.key = hashlib.blake2b(secret.encode()).digest()
        self.prefix = prefix
        self._pool = _make_pool(url)
        #: Made at startup: with `--preload`, gunicorn forks after the import.
        self.process_id = ""
        self.callbacks: list[Callable[[bool], Any]] = []
        self._hubs: dict[str, HubBackplane] = {}
        #: The channels that the hubs want; the link subscribes to them.
        self._wanted: set[bytes] = set()
        #: None while Redis is away.
        self.link: RedisLink | None = None
        #: Beats in a row that have not come back.
        self.missed_beats = 0
        #: By the id of a question of this process: a list for each process that has
        #: received it, with its answer; empty for this process.
        self.questions: dict[str, asyncio.Queue[list[Any]]] = {}
        #: Tasks that answer questions of other processes.
        self.replies: set[asyncio.Task[None]] = set()
        self._counts = Counter(processes=0, dropped=0, reconnects=0, rejected=0)

    def for_hub(self, path: str, registry: Registry) -> Backplane:
        """Return the backplane of one hub."""
        self._hubs[path] = HubBackplane(self, path, registry)
        return self._hubs[path]

    # The link

    async def context(self, app: object) -> AsyncIterator[None]:
        """Stay connected while an application runs: for its `cleanup_ctx`.

        Raises ConnectionError if Redis cannot be used. Sends what is queued at the end.
        """
        if self.link is not None:
            raise RuntimeError("a RedisBackplane can serve one application only")
        self.process_id = secrets.token_hex(_PROCESS_ID_SIZE // 2)
        for hub in self._hubs.values():
            hub.process_id = self.process_id
            hub.subscribe("all")
            hub.subscribe(f"process:{self.process_id}")
        changes = asyncio.Queue[bool]()
        link = await self._connect()
        works = self._run(link, changes), self._run_callbacks(changes)
        tasks = [asyncio.create_task(work) for work in works]
        yield
        with contextlib.suppress(ConnectionError):
            for hub in self._hubs.values():
                await hub.subscribers("all")  # answered after all that is queued
        await _end_tasks([*tasks, *self.replies], (0, 1))
        self._wanted.clear()

    async def _run(self, link: RedisLink, changes: asyncio.Queue[bool]) -> None:
        """Dial again when the link is lost: put False, then True into `changes`."""
        while True:
            works = link.write(), link.read(self._receive), link.subscribe()
            # Not in a TaskGroup: before Python 3.11.3, one that fails leaves its task
            # cancelled once, and then a timeout of the next dial would end the task.
            tasks = [asyncio.create_task(work) for work in (*works, self._beat())]
            try:
                ended, _ = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
                reason = _one_line(str(ended.pop().exception()), 200)
                log.warning("backplane: lost Redis: %s", reason)
            finally:
                self.link = None
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._counts["dropped"] += await link.close()
            changes.put_nowait(False)
            while self.link is None:
                await asyncio.sleep(random.uniform(*_DIAL_DELAYS))
                try:
                    link = await self._connect()
                except ConnectionError as error:
                    log.debug("backplane: %s", _one_line(str(error), 200))
            self._counts["reconnects"] += 1
            changes.put_nowait(True)

    async def _connect(self) -> RedisLink:
        """Make a new link and use it. Raises ConnectionError."""
        link = RedisLink(self._pool)
        await link.open(set(self._wanted))
        for channel in self._wanted ^ link.active:  # they changed meanwhile
            link.want(channel, channel in self._wanted)
        self.link = link
        log.info("backplane: connected as process %s", self.process_id)
        return link

    async def _beat(self) -> None:
        """Detect a Redis that hangs: beats do not come back. Count the processes."""
        self.missed_beats = 0
        hub = next(iter(self._hubs.values()))  # any: they share the link
        while self.missed_beats < _MISSED_BEATS:
            self.missed_beats += 1
            self.publish(hub, f"process:{self.process_id}", "beat")
            with contextlib.suppress(ConnectionError):  # raised after a beat's time
                self._counts["processes"] = await hub.subscribers("all", _BEAT)
                await asyncio.sleep(_BEAT)
        raise ConnectionError("Redis does not answer.")

    async def _run_callbacks(self, changes: asyncio.Queue[bool]) -> None:
        """Call the `on_backplane` callbacks in order."""
        while True:
            connected = await changes.get()
            for callback in self.callbacks:
                try:
                    await _result_of(callback(connected))
                except (Exception, SystemExit):
                    log.exception("on_backplane: %r failed", callback)

    # What hubs need

    def want(self, channel: bytes, wanted: bool) -> None:
        """Subscribe to a channel, or leave it, with each link."""
        change = self._wanted.add if wanted else self._wanted.discard
        change(channel)
        if self.link is not None:
            self.link.want(channel, wanted)

    def publish(
        self, hub: HubBackplane, channel: str, *header: Any, body: bytes = b""
    ) -> None:
        """Publish a packet, or drop and count it. Raises what `_dumps` raises."""
        if self.link is not None:
            head = f"{self.process_id}{_dumps([hub.path, *header])}\n"
            packet = head.encode(errors="surrogatepass") + body
            name = hub.channel(channel)
            if self.link.publish(name, _sign(self.key, name, packet) + packet):
                return
        self._counts["dropped"] += 1

    def _receive(self, channel: bytes, data: bytes) -> None:
        """Handle a packet from Redis; refuse it unless the secret has signed it."""
        signature, packet = data[:_SIGNATURE_SIZE], data[_SIGNATURE_SIZE:]
        sender, content = packet[:_PROCESS_ID_SIZE], packet[_PROCESS_ID_SIZE:]
        own = sender == self.process_id.encode()
        if own and not (self.questions or channel.endswith(sender)):
            return  # a message of this process, which it has delivered itself
        try:
            if not secrets.compare_digest(signature, _sign(self.key, channel, packet)):
                raise ValueError("it is not signed with our secret")
            header, _, body = content.partition(b"\n")
            path, *rest = json.loads(header.decode(errors="surrogatepass"))
            self._hubs[path].receive(sender.decode(), rest, body)
        except Exception as error:  # noqa: BLE001 (it may contain anything)
            self._counts["rejected"] += 1
            if self._counts["rejected"] <= 10:
                text = _one_line(str(error), 200)
                log.warning("backplane: rejected a packet of %d B: %s", len(data), text)

    def report(self) -> dict[str, Any]:
        """Describe the state, for `HubContext.stats`."""
        return {"state": "Connected" if self.link else "Disconnected", **self._counts}


@dataclass(slots=True, eq=False)
class HubBackplane(Backplane):
    """The backplane of one hub: its channels on a RedisBackplane."""

    _redis: RedisBackplane
    path: str
    _registry: Registry
    process_id: str = ""

    def channel(self, name: str) -> bytes:
        text = f"{self._redis.prefix}:{quote(self.path)}:{name}"
        return text.encode(errors="surrogatepass")

    def subscribe(self, channel: str) -> None:
        self._redis.want(self.channel(channel), True)

    def unsubscribe(self, channel: str) -> None:
        self._redis.want(self.channel(channel), False)

    async def subscribed(self, channel: str) -> bool:
        link, name = self._redis.link, self.channel(channel)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPLY_TIMEOUT):
                while link is not None and name not in link.active:
                    await link.active_changed.wait()
        return link is not None and name in link.active

    async def subscribers(self, channel: str, seconds: float = _REPLY_TIMEOUT) -> int:
        """Raises ConnectionResetError if the link is lost, ConnectionError if slow."""
        link, command = self._redis.link, ("PUBSUB", "NUMSUB", self.channel(channel))
        if link is None:
            raise ConnectionResetError("Redis is not connected.")
        try:
            async with asyncio.timeout(seconds):
                return int((await link.submit(*command))[1])
        except TimeoutError:
            raise ConnectionError("Redis does not answer.") from None

    def publish(self, address: Address, message: Invocation, encoded: Encoded) -> None:
        kind, names, excluding, _ = address
        here = self._registry.connections if kind == "connection" else {}
        if kind != "all" and here.keys() >= set(names):
            return  # they are all here
        name = "all" if len(names) != 1 else f"{kind}:{names[0]}"
        ignored = () if message.invocation_id else (TypeError, ValueError)
        for protocol in self._registry.protocols.values():  # others may use any
            if protocol.name not in encoded:
                with contextlib.suppress(*ignored):  # but a caller must know
                    encoded[protocol.name] = protocol.encode(message)
        sizes = {protocol: len(data) for protocol, data in encoded.items()}
        header = "send", kind, names, list(excluding), sizes, message.invocation_id
        self._redis.publish(self, name, *header, body=b"".join(encoded.values()))

    def tell(self, channel: str, handler: str, *arguments: Any) -> None:
        self._redis.publish(self, channel, "tell", handler, arguments)

    async def ask(
        self, seconds: float, channel: str, question: str, *arguments: Any
    ) -> tuple[list[Any], int]:
        id, found = _new_id(), list[Any]()
        answers = self._redis.questions[id] = asyncio.Queue[list[Any]]()
        try:
            self._redis.publish(self, channel, "ask", id, question, arguments)
            missing = await self.subscribers(channel, seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while missing:
                        found += await answers.get()
                        missing -= 1
        finally:
            del self._redis.questions[id]
        if missing:
            log.warning("backplane: %d processes did not answer %r", missing, question)
        return found, missing

    def receive(self, sender: str, header: list[Any], body: bytes) -> None:
        """Act on a packet of another process, or on one that came back."""
        questions, replies = self._redis.questions, self._redis.replies
        match header:
            case ["beat"]:
                self._redis.missed_beats = 0
            case ["ask", id, *_] if id in questions:
                questions[id].put_nowait([])  # Redis counts this process, too
            case _ if sender == self.process_id:
                pass
            case ["send", kind, names, excluding, sizes, id]:
                address = Address(kind, tuple(names), frozenset(excluding))
                encoded: Encoded = {}
                for protocol, size in sizes.items():
                    encoded[protocol], body = body[:size], body[size:]
                self._registry.deliver(address, encoded, id)
            case ["tell", handler, arguments]:
                self._registry.handlers[handler](*arguments)
            case ["ask", id, question, arguments]:
                task = asyncio.create_task(self._reply(sender, id, question, arguments))
                replies.add(task)
                task.add_done_callback(replies.discard)
            case ["answer", id, answer] if id in questions:
                questions[id].put_nowait([answer])

    async def _reply(self, asker: str, id: str, question: str, arguments: Any) -> None:
        """Answer a question of another process; log a handler that fails."""
        try:
            answer = await self._registry.answer(question, *arguments)
            self._redis.publish(self, f"process:{asker}", "answer", id, answer)
        except (Exception, SystemExit):
            log.exception("backplane: the question %r failed", question)


# ------------------------------------------------------------------ hub API
#
# What user code sees. A hub method names its receivers through `self.clients`
# and sends; the same proxies serve routes and jobs through the HubContext that
# `map_hub` returns.

#: The Call or HubConnection whose user code runs; its `awaiting_result` surrounds
#: the wait for a client result.
_current_call = contextvars.ContextVar[Any]("kestrun_current_call", default=None)


def _invocation(method: str, args: tuple[Any, ...]) -> Invocation:
    if not isinstance(method, str):
        raise TypeError(f"a client method's name is a str, not {method!r}")
    return Invocation(method, list(args))


@dataclass(slots=True, eq=False, repr=False)
class ClientProxy:
    """Sends messages to the receivers of one address."""

    _registry: Registry
    _address: Address

    async def send(self, method: str, *args: Any) -> None:
        """Call `method` on every receiver, without waiting for any of them.

        method: the name under which clients registered their handler.
        args: numbers, text, bytes, lists, dicts, dataclasses, enums, datetimes,
            UUIDs, None, nested as you like.
        Returns when the message is queued, and never fails for clients that are
        gone. Raises TypeError or ValueError for arguments that no client could
        read; then nobody has received anything.
        """
        registry = self._registry
        registry.publish(self._address, _invocation(method, args))
        if registry.published_bytes > _HIGH_WATER:
            # A long loop of broadcasts must let the event loop write and read.
            registry.published_bytes = 0
            await asyncio.sleep(0)


class SingleClientProxy(ClientProxy):
    """One receiver, which can also be asked for a result."""

    async def send(self, method: str, *args: Any) -> None:
        """Call `method` on the client; wait while the client is behind.

        Like `ClientProxy.send`, but a single receiver sets the pace: while 64 KiB
        are queued for it, this waits until it has taken some of them or is gone.
        """
        await super().send(method, *args)
        connection = self._registry.connections.get(self._address.names[0])
        if connection is not None:  # another process's client cannot be waited for
            await connection.drain()

    @typing.overload
    async def invoke(
        self, method: str, *args: Any, timeout: float | None = None, returns: type[T]
    ) -> T: ...

    @typing.overload
    async def invoke(
        self,
        method: str,
        *args: Any,
        timeout: float | None = None,
        returns: types.UnionType = ...,
    ) -> Any: ...

    async def invoke(
        self, method: str, *args: Any, timeout: float | None = None, returns: Any = Any
    ) -> Any:
        """Call `method` on the client and return what its handler returns.

        timeout: seconds to wait for the answer; None waits until the connection
            ends.
        returns: the type of the result, checked and converted like an argument of a
            hub method; ValueError if it does not fit.
        Meanwhile the caller's other calls may run. Raises ConnectionError if there
        is no such client, it leaves, or a lost link to Redis may have lost the call
        or the answer; HubException with the client's text if its handler fails or is
        missing; TimeoutError; and TypeError or ValueError for arguments that cannot
        be written. Inside `on_connected` it raises HubException: the client does not
        listen yet.
        """
        call, results = _current_call.get(), self._registry.results
        convert = self._registry.make_converter(returns)
        message = _invocation(method, args)
        async with contextlib.nullcontext() if call is None else call.awaiting_result():
            try:
                async with asyncio.timeout(timeout):
                    completion = await results.invoke(self._address, message)
            except TimeoutError:
                name = self._address.names[0][:_ID_LENGTH]
                text = f"No result from connection '{name}' in {timeout} s."
                raise TimeoutError(text) from None
        if completion.error is not None:
            raise HubException(completion.error)
        try:
            return convert(completion.result)
        except Exception as error:  # a converter may be user code
            raise ValueError(f"The client's result of {method!r}: {error}") from error


@dataclass(slots=True, eq=False, repr=False)
class HubClients:
    """Every receiver that can be named: `hub.clients` outside of hub methods."""

    _registry: Registry
    _local: bool = field(default=False, kw_only=True)

    def _proxy(
        self, kind: str, names: Iterable[str] = (), excluding: Iterable[str] = ()
    ) -> ClientProxy:
        for given in (names, excluding):
            if isinstance(given, str):
                raise TypeError(f"give a list of strings, not the string {given!r}")
        names = tuple(dict.fromkeys(names))
        address = Address(kind, names, frozenset(excluding), self._local)
        return ClientProxy(self._registry, address)

    @property
    def all(self) -> ClientProxy:
        """Every connection of this hub."""
        return self._proxy("all")

    def all_except(self, ids: Iterable[str]) -> ClientProxy:
        """Every connection but those with these connection ids."""
        return self._proxy("all", (), ids)

    def client(self, id: str) -> SingleClientProxy:
        """The connection with this connection id."""
        address = Address("connection", (id,), local=self._local)
        return SingleClientProxy(self._registry, address)

    def clients(self, ids: Iterable[str]) -> ClientProxy:
        """The connections with these connection ids."""
        return self._proxy("connection", ids)

    def group(self, name: str) -> ClientProxy:
        """The members of a group."""
        return self._proxy("group", (name,))

    def groups(self, names: Iterable[str]) -> ClientProxy:
        """The members of any of these groups, each of them once."""
        return self._proxy("group", names)

    def group_except(self, name: str, ids: Iterable[str]) -> ClientProxy:
        """The members of a group but those with these connection ids."""
        return self._proxy("group", (name,), ids)

    def user(self, id: str) -> ClientProxy:
        """All connections of one user, compared exactly."""
        return self._proxy("user", (id,))

    def users(self, ids: Iterable[str]) -> ClientProxy:
        """All connections of these users."""
        return self._proxy("user", ids)


@dataclass(slots=True, eq=False, repr=False)
class HubCallerClients(HubClients):
    """Every receiver, and those relative to the caller: `self.clients` inside a hub."""

    _caller: str

    @property
    def caller(self) -> SingleClientProxy:
        """The connection that made this call."""
        return self.client(self._caller)

    @property
    def others(self) -> ClientProxy:
        """Every connection but the caller's."""
        return self._proxy("all", (), (self._caller,))

    def others_in_group(self, name: str) -> ClientProxy:
        """The members of a group but the caller."""
        return self._proxy("group", (name,), (self._caller,))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HubCallerContext:
    """One connection as user code sees it: `self.context`."""

    #: The public id of the connection: not a secret, unlike its token.
    connection_id: str
    #: What `authenticate` returned when the connection was made.
    user_id: str | None
    #: "WebSockets", "ServerSentEvents" or "LongPolling".
    transport: str
    #: "json" or "messagepack".
    protocol: str
    #: The aiohttp request that opened the connection.
    request: Request
    _ended: asyncio.Future[End]
    _abort: Callable[[], None]
    #: Anything that user code wants to keep with the connection.
    items: dict[Any, Any] = field(default_factory=dict)

    def abort(self) -> None:
        """Close the connection without waiting; tell the client not to reconnect."""
        self._abort()

    @property
    def aborted(self) -> bool:
        """Whether the connection has ended, for whatever reason."""
        return self._ended.done()

    async def wait_aborted(self) -> None:
        """Wait until the connection has ended."""
        await asyncio.wait([self._ended])


@dataclass(slots=True, eq=False, repr=False)
class HubInvocation:
    """One call of a hub method, as `Hub.on_invocation` sees it."""

    #: The method's canonical name, the same for every spelling of the target:
    #: "JoinGroup" for `join_group`, or what `hub_method` says.
    method: str
    #: The name as the client spelled it.
    target: str
    #: The arguments as the method will get them; the list may be changed.
    arguments: list[Any]


class Hub:
    """Base of all hubs: subclass it, and clients can call every public method.

    That includes inherited, static and class methods; `not_callable` keeps one out.
    There is one instance for each connection, so `self` may hold that
    connection's own state. Methods may be plain, async, or async generators
    (streams to the client); a parameter annotated AsyncIterator takes a stream
    from the client. Wire names match without regard to case and underscores.
    """

    #: The aiohttp application: `self.app[KEY]` is what it keeps under a key.
    app: web.Application
    #: The connection: id, user, items, transport, abort().
    context: HubCallerContext
    #: The receivers of messages.
    clients: HubCallerClients
    #: Groups of connections.
    groups: GroupManager

    async def on_connected(self) -> None:
        """Run after the handshake, before any call; an exception refuses the client."""

    async def on_disconnected(self, error: Exception | None) -> None:
        """Run when a connection that `on_connected` accepted has ended.

        error: the reason, if known; None also if the client just disappeared.
        """

    async def on_invocation(
        self, invocation: HubInvocation, call_next: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Wrap every call that `authorize` allows. Override it to observe or refuse.

        invocation: the method, the target and the arguments of the call.
        call_next: calls the method and returns its result (of a streaming
            method: the iterator).
        Return what `call_next()` returned, or raise HubException to refuse.
        """
        return await call_next()


@dataclass(slots=True, eq=False, repr=False)
class Everywhere:
    """One hub in all processes that serve it: `hub.everywhere`.

    Without a backplane that is this process. With one, a method raises
    ConnectionError if it needs Redis and Redis is away, or if the one process that
    it asks does not answer in 3 s. If it asks all processes, those that do not answer
    within a second are left out, with a warning.
    """

    _registry: Registry

    @property
    def process_id(self) -> str:
        """The id of this process, made at its start; empty without a backplane."""
        return self._registry.backplane.process_id

    async def members(self, name: str) -> list[str]:
        """List the connection ids in a group."""
        answers = await self._registry.ask(f"group:{name}", "members", name)
        return [id for members in answers for id in members]

    async def groups_of(self, connection_id: str) -> list[str]:
        """List the groups that a connection is in."""
        return await self._registry.ask_owner(connection_id, "groups") or []

    async def count(self) -> int:
        """Count the connections."""
        return sum(await self._registry.ask("all", "count"))

    async def is_online(self, user_id: str) -> bool:
        """Return whether a user has a connection."""
        backplane = self._registry.backplane
        here = user_id in self._registry.members["user"]
        return here or await backplane.subscribers(f"user:{user_id}") > 0

    async def abort(self, connection_id: str) -> bool:
        """Close a connection; return False if there is none with this id."""
        return bool(await self._registry.ask_owner(connection_id, "abort"))

    def handle(self, question: str, handler: Callable[..., Any]) -> None:
        """Let this process answer a question of your own.

        handler: plain or async. Its arguments and its result are JSON values; None
            means that this process does not know.
        """
        self._registry.handlers[f"own {question}"] = handler

    async def ask(self, question: str, *arguments: Any) -> list[Any]:
        """Ask all processes; return their answers, this one's first.

        Raises KeyError if this process has no handler for the question.
        """
        return await self._registry.ask("all", f"own {question}", *arguments)

    async def ask_process(self, process_id: str, question: str, *arguments: Any) -> Any:
        """Ask the process with this id, perhaps this one; None if there is none."""
        question = f"own {question}"
        if process_id == self.process_id:
            return await self._registry.answer(question, *arguments)
        asking = _OWNER_TIMEOUT, f"process:{process_id}", question, *arguments
        return await self._registry.ask_elsewhere(*asking)


@dataclass(eq=False, repr=False)
class HubContext:
    """A hub seen from outside: from routes, operations and jobs."""

    _registry: Registry
    _shared: Shared
    _backplane: RedisBackplane | None
    #: The connections, by id; a live read-only mapping.
    connections: Mapping[str, HubCallerContext]

    def __post_init__(self) -> None:
        #: The receivers of messages.
        self.clients = HubClients(self._registry)
        #: Those of them that are connected to this process.
        self.local = HubClients(self._registry, _local=True)
        #: Questions to all processes that serve the hub.
        self.everywhere = Everywhere(self._registry)
        #: Groups of connections.
        self.groups = self._registry.groups
        #: The options this hub was mapped with.
        self.options = self._shared.options

    async def abort_user(self, user_id: str) -> int:
        """Close all connections of a user, in every process; return their number.

        One that is still being opened is not closed: `authenticate` must refuse it.
        Raises ConnectionError if other processes cannot be reached.
        """
        return sum(await self._registry.ask(f"user:{user_id}", "abort user", user_id))

    def on_backplane(self, callback: Callable[[bool], Any]) -> None:
        """Call a function, plain or async, when the link to Redis is lost or back.

        callback: gets False or True. Messages between processes meanwhile are lost.
        """
        if self._backplane is not None:
            self._backplane.callbacks.append(callback)

    def stats(self) -> dict[str, Any]:
        """Count connections by transport and protocol, traffic, and drops by reason.

        Returns plain numbers and dicts, ready for JSON. Bytes are those of hub
        messages, without frames; `queued_bytes` wait for clients now; `cuts` are
        the dropped clients. A message counts as sent when it is queued. With a
        backplane there is its "backplane": state ("Connected" or "Disconnected"),
        number of processes, messages dropped, reconnects, packets rejected.
        """
        contexts, connections = self.connections.values(), self._registry.connections
        backplane = self._backplane and self._backplane.report()
        return {
            "connections": len(connections),
            "transports": dict(Counter(context.transport for context in contexts)),
            "protocols": dict(Counter(context.protocol for context in contexts)),
            "groups": len(self.groups.names()),
            "messages_in": self._shared.messages_in,
            "messages_out": self._shared.messages_out,
            "bytes_in": self._shared.bytes_in,
            "bytes_out": self._shared.bytes_out,
            "queued_bytes": sum(c.backlog() for c in connections.values()),
            "cuts": dict(self._shared.drops),
            **({"backplane": backplane} if backplane else {}),
        }


# -------------------------------------------------------------- hub methods
#
# The methods that clients may call are collected when the hub is mapped, from
# what the subclass adds; a name from the wire is looked up in that table and
# nowhere else. Signatures are read once too: each annotated parameter gets a
# converter, a function that returns the converted value or raises an exception.


def _mark(target: F, name: str, value: Any) -> F:
    """Add a value to a tuple that is an attribute of a class or a function."""
    plain: Any = getattr(target, "__func__", target)  # of a static method
    setattr(plain, name, (*vars(plain).get(name, ()), value))
    return target


def hub_method(name: str) -> Callable[[F], F]:
    """Give a hub method another name on the wire.

    name: matched without regard to case and underscores, like every name.
    Raises TypeError when used without a name.
    """
    if not isinstance(name, str) or not normalize_name(name):
        raise TypeError('hub_method takes the wire name: @hub_method("OtherName")')
    return lambda function: _mark(function, "__kestrun_names__", name)


def authorize(check: Callable[[HubCallerContext], Any]) -> Callable[[F], F]:
    """Let only some clients call a method, or any method of a hub class.

    check: (context) -> bool, plain or async. If it returns False, the call fails with
        "Failed to invoke 'X' because user is unauthorized".
    Checks add up, also with those of base classes and of overridden methods. Raises
    TypeError if `check` is not a function of one argument.
    """
    _check_call(check, "authorize takes a function of the context", 1)
    return lambda target: _mark(target, "__kestrun_checks__", check)


def not_callable(function: F) -> F:
    """Keep a public method of a hub, and methods that override it, from clients.

    It marks the function, for all classes that have it. To keep out a mixin's method
    in one hub, override it there.
    """
    return _mark(function, "__kestrun_not_callable__", True)


def normalize_name(name: str) -> str:
    """Return the form in which names are compared: no underscores, lower case."""
    return name.replace("_", "").lower()


class BindingError(Exception):
    """The arguments of a call do not match the method's parameters."""

    reported_as = "InvalidDataException"


class HubMethod:
    """One method of a hub class that clients can call."""

    def __init__(self, hub_class: type[Hub], name: str, converters: Converters) -> None:
        function = getattr(hub_class, name)
        # As .NET spells it: join_group -> JoinGroup.
        wire_name = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
        #: The one name that stands for the method on the wire: "JoinGroup".
        self.name: str = getattr(function, "__kestrun_names__", (wire_name,))[-1]
        #: Class and method, for logs and task names: "ChatHub.join_group".
        self.qualified_name = where = f"{hub_class.__name__}.{name}"
        #: The checks of `authorize`: those of the classes, then those of the method.
        self.checks: list[Callable[[HubCallerContext], Any]] = []
        for checked in (*reversed(hub_class.__mro__), *_definitions(hub_class, name)):
            self.checks += vars(checked).get("__kestrun_checks__", ())
        if getattr(function, "__qualname__", "").startswith("authorize.<locals>"):
            raise TypeError(f"{where}: write @authorize(check)")
        takes_hub = inspect.isfunction(inspect.getattr_static(hub_class, name))
        #: Takes the hub first, also for a static or class method.
        self.function = function if takes_hub else lambda hub, *args: function(*args)
        #: Of each upload stream: its position, its name, the converter of its items.
        self.uploads: list[tuple[int, str, Converter]] = []
        self._parameters: list[tuple[inspect.Parameter, Converter]] = []
        self._rest: list[tuple[inspect.Parameter, Converter]] = []  # one for *args
        #: What clients pass, with evaluated annotations.
        self.signature: list[inspect.Parameter] = []
        unwrapped, signature = inspect.unwrap(function), inspect.signature(function)
        parameters = list(signature.parameters.values())
        if takes_hub and not parameters:
            raise TypeError(f"{where}: the first parameter must be self")
        for parameter in parameters[1:] if takes_hub else parameters:
            annotation = parameter.annotation
            try:
                annotation = _evaluate(annotation, unwrapped)
                self._add(parameter.replace(annotation=annotation), converters)
            except Exception as error:  # an annotation may be any expression
                shown = f"{parameter.name!r} ({_type_text(annotation)})"
                raise TypeError(f"{where}: parameter {shown}: {error}") from error
        if inspect.isgeneratorfunction(unwrapped):
            raise TypeError(f"{where}: a method that yields must be async")
        self.result: Any = Any
        with contextlib.suppress(Exception):  # results are not converted
            self.result = _evaluate(signature.return_annotation, unwrapped)
        generates = inspect.isasyncgenfunction(unwrapped)
        self.streaming = generates or _item_type(self.result)[0]
        self._required = sum(p.default is p.empty for p, _ in self._parameters)
        #: Whether a running call counts against the client's parallel calls.
        self.needs_slot = not (self.streaming or self.uploads)

    def _add(self, parameter: inspect.Parameter, converters: Converters) -> None:
        """Add a parameter. Raises TypeError if clients cannot pass it."""
        required = parameter.default is parameter.empty
        if parameter.kind is parameter.KEYWORD_ONLY and required:
            raise TypeError("clients pass arguments by position; give it a default")
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            return
        streams, annotation = _item_type(parameter.annotation)
        convert = converters.make(annotation)
        if parameter.kind is parameter.VAR_POSITIONAL:
            self._rest.append((parameter, convert))
        elif streams:
            self.uploads.append((len(self.signature), parameter.name, convert))
        else:
            self._parameters.append((parameter, convert))
        self.signature.append(parameter)

    def bind(self, values: list[Any]) -> list[Any]:
        """Check and convert the arguments of one call.

        Returns them with the defaults of those left out, but without the upload
        streams, which the caller inserts at their positions. Raises BindingError.
        """
        method, count, most = self.qualified_name, len(values), len(self._parameters)
        if count < self._required or count > most and not self._rest:
            names = ", ".join(parameter.name for parameter, _ in self._parameters)
            log.warning("%s: %d argument(s) do not fit (%s)", method, count, names)
            text = f"Invocation provides {count} argument(s) but target expects {most}."
            raise BindingError(text)
        parameters = self._parameters + self._rest * (count - most)
        bound = []
        try:
            for (_, convert), value in zip(parameters, values):
                bound.append(convert(value))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a converter may be user code
            name, text = parameters[len(bound)][0].name, _text_of(error)
            shown = _one_line(text, 200)
            log.warning("%s: argument %r does not fit: %s", method, name, shown)
            raise BindingError(
                "Error binding arguments. Make sure that the types of the provided values "
                f"match the types of the hub method being invoked. ({name}: {text})"
            ) from error
        return bound + [parameter.default for parameter, _ in self._parameters[count:]]


def _definitions(hub_class: type[Hub], name: str) -> list[Callable[..., Any]]:
    """Return the functions of this name in a class and its bases, bases first."""
    found = [vars(kind).get(name) for kind in reversed(hub_class.__mro__)]
    functions = (getattr(member, "__func__", member) for member in found)
    return [function for function in functions if inspect.isfunction(function)]


def _hub_methods(hub_class: type[Hub], converters: Converters) -> dict[str, HubMethod]:
    """Return the methods that clients may call, by normalized name.

    Those are the public methods that the class or a base other than Hub defines,
    also static and class methods. Raises TypeError for a mistake in the class.
    """
    methods: dict[str, HubMethod] = {}
    hooks = {"on_connected": 1, "on_disconnected": 2, "on_invocation": 3}
    for name in dir(hub_class):
        where = f"{hub_class.__name__}.{name}"
        if name in hooks:
            _check_call(getattr(hub_class, name), where, hooks[name])
        member = inspect.getattr_static(hub_class, name)
        is_method = isinstance(member, (types.FunctionType, staticmethod, classmethod))
        marks = {mark for f in _definitions(hub_class, name) for mark in vars(f)}
        hidden = name.startswith("_") or "__kestrun_not_callable__" in marks
        if hidden or hasattr(Hub, name) or not is_method:
            if "__kestrun_checks__" in marks:
                text = f"{where}: authorize is for methods that clients can call"
                raise TypeError(text)
            continue
        if name in Hub.__annotations__:
            raise TypeError(f"{where} hides the hub's own {name}")
        method = HubMethod(hub_class, name, converters)
        other = methods.setdefault(normalize_name(method.name), method)
        if other is not method:
            raise TypeError(
                f"{where} and {other.qualified_name} are the same name for clients; "
                'rename one with @hub_method("OtherName")'
            )
    return methods


def _evaluate(annotation: Any, function: Callable[..., Any]) -> Any:
    """Evaluate an annotation of a function, which may be text; Any if there is none."""
    if annotation is inspect.Parameter.empty:
        return Any
    scope = dict(function.__globals__)
    with contextlib.suppress(ValueError):  # an empty closure cell
        scope |= inspect.getclosurevars(function).nonlocals
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    return typing.get_type_hints(holder, scope, include_extras=True)["it"]


def _item_type(annotation: Any) -> tuple[bool, Any]:
    """Return whether this is a stream, and the type of its items, else its own."""
    origin = typing.get_origin(annotation) or annotation
    if origin not in (AsyncIterator, AsyncIterable, AsyncGenerator):
        return False, annotation
    return True, (*typing.get_args(annotation), Any)[0]


def _unchanged(value: Any) -> Any:
    return value


@dataclass(slots=True, eq=False)
class Converters:
    """Makes the converters of one hub, by its options `converter` and `member_name`."""

    _options: HubOptions
    #: The converter for types that have none; without it they raise TypeError.
    _fallback: Converter | None = None
    #: The converters of aliases, enums and object types, by type and `exact`.
    named: dict[tuple[Any, bool], Converter] = field(default_factory=dict)
    #: What unions made of lists and dicts during one conversion: by the ids of union
    #: and value, the value (so that no other gets its id) and the result, or NO_RESULT
    #: if no member fits. Without them, nested unions would take exponential time.
    _results: dict[tuple[int, int], tuple[Any, Any]] = field(default_factory=dict)

    def make(self, annotation: Any, exact: bool = False) -> Converter:
        """Return the converter for values of this annotation.

        exact: accept only values that arrive as this type, or as text if it is a type
        that is written as text; unions try this first. Raises TypeError for an
        annotation whose values cannot be checked.
        """
        custom = self._options.converter
        if custom is not None and (convert := custom(annotation)) is not None:
            if not callable(convert):
                raise TypeError(f"converter returned {convert!r}, not a function")
            return convert
        if annotation is Any or annotation is object:
            return _unchanged
        kind, args = typing.get_origin(annotation), typing.get_args(annotation)
        kind = type(None) if annotation is None else kind or annotation
        make = functools.partial(self.make, exact=exact)
        if kind in (typing.Annotated, typing.Required, typing.NotRequired):
            return make(args[0])
        if kind is typing.Literal and args:
            return functools.partial(_to_literal, [(a, make(type(a))) for a in args])
        if kind in (typing.Union, types.UnionType) and args:
            return self._for_union(args, exact)
        if kind is tuple and args and args[-1] is not Ellipsis:
            return functools.partial(_to_tuple, [*map(make, args)])
        if kind in (list, set, frozenset, tuple):
            return functools.partial(_to_items, kind, make(args[0] if args else Any))
        if kind is dict and args:
            return functools.partial(_to_dict, self.make(args[0]), make(args[1]))
        is_class = isinstance(kind, type)
        if is_class and kind in _ACCEPTED:
            return functools.partial(_to_type, kind, exact)
        is_alias = hasattr(kind, "__supertype__") or hasattr(kind, "__value__")
        is_named = isinstance(kind, EnumType) or typing.is_typeddict(kind)
        if is_alias or is_named or is_class and dataclasses.is_dataclass(kind):
            return self._for_named(kind, exact)
        if self._fallback is not None:
            return self._fallback
        raise TypeError(
            f"the annotation {_type_text(annotation)} cannot be checked; use Any, or set "
            "HubOptions.converter, or use bool, int, float, str, bytes, list, dict, set, "
            "frozenset, tuple, unions, Literal, dataclasses, TypedDict, Enum, datetime, "
            "date, time, timedelta, Decimal, UUID, NewType, Annotated"
        )

    def _for_union(self, members: tuple[Any, ...], exact: bool) -> Converter:
        """Take the member of the value's exact type, else the first one that fits."""
        passes = (True,) if exact else (True, False)
        converters = [self.make(m, only) for only in passes for m in members]
        if _unchanged in converters:  # a member takes any value
            return _unchanged
        names, results = " or ".join(map(_type_text, members)), self._results

        def convert_once(value: Any) -> Any:
            problem, reason = f"expected, got {type(value).__name__}", ""
            for converter in converters:
                try:
                    return converter(value)
                except Exception as error:  # noqa: BLE001 (a dataclass is user code)
                    # An error inside the value says more than that its type differs.
                    if not (text := _text_of(error)).endswith(problem):
                        reason = f" ({text[:200]})"
            raise ValueError(f"{names} {problem}{reason}")

        def convert(value: Any) -> Any:
            if not isinstance(value, (list, dict)):
                return convert_once(value)
            outermost, attempt = not results, (id(convert), id(value))
            try:
                if attempt not in results:
                    results[attempt] = value, NO_RESULT
                    results[attempt] = value, convert_once(value)
                if results[attempt][1] is NO_RESULT:
                    raise ValueError(f"{names} expected, got {type(value).__name__}")
                return results[attempt][1]
            finally:
                if outermost:
                    results.clear()

        return convert

    def _for_named(self, kind: Any, exact: bool) -> Converter:
        """Return the converter of a type that may contain itself."""
        known, key = self.named, (kind, exact)
        if key not in known:
            # For its members of the same type, until its own converter is made.
            known[key] = lambda value: self._for_named(kind, exact)(value)
            try:
                known[key] = self._make_named(kind, exact)
            except Exception:
                del known[key]  # otherwise it would call itself forever
                raise
        return known[key]

    def _make_named(self, kind: Any, exact: bool) -> Converter:
        if hasattr(kind, "__supertype__"):
            return self.make(kind.__supertype__, exact)
        if hasattr(kind, "__value__"):  # `type Name = …`
            return self.make(kind.__value__, exact)
        if issubclass(kind, Enum):
            return functools.partial(_to_enum, kind, exact)
        hints = typing.get_type_hints(kind, include_extras=True)
        spell = None
        if dataclasses.is_dataclass(kind):
            hints = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}
            spell = self._options.member_name
        members = {name: (name, self.make(hint, exact)) for name, hint in hints.items()}
        fields = {normalize_name(name): member for name, member in members.items()}
        if spell is not None:
            for name, protocol in itertools.product(members, ("json", "messagepack")):
                fields[normalize_name(spell(name, protocol))] = members[name]
        return functools.partial(_to_object, kind, fields)


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"int expected, got {number}")
    return int(number)


def _decimal(value: str | float) -> Decimal:
    number = Decimal(str(value))
    if not number.is_finite():
        raise ValueError("a finite number expected")
    return number


_DURATION = re.compile(
    r"([-+]?)P(?=.)(?:(\d+)W)?(?:(\d+)D)?"
    r"(?:T(?=.)(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)(?:\.(\d{1,6})\d*)?S)?)?"
)


def _read_duration(text: str) -> timedelta:
    """Read an ISO 8601 duration of weeks, days, hours, minutes and seconds."""
    if (match := _DURATION.fullmatch(text)) is None:
        raise ValueError("a duration such as PT1H30M expected")
    sign, *numbers, fraction = match.groups("0")
    weeks, days, hours, minutes, seconds = map(int, numbers)
    microseconds = int(fraction.ljust(6, "0"))  # a float would lose some
    duration = timedelta(days, seconds, microseconds, 0, minutes, hours, weeks)
    return -duration if sign == "-" else duration


#: By type of an annotation: the other types that are accepted for it, each with its
#: converter. JavaScript has one kind of number, and JSON writes many types as text.
_ACCEPTED: dict[type, dict[type, Converter]] = {
    **{kind: {} for kind in (type(None), bool, str, list, dict)},
    int: {float: _whole},
    float: {int: float},
    bytes: {str: functools.partial(base64.b64decode, validate=True)},
    datetime: {str: datetime.fromisoformat},
    uuid.UUID: {str: uuid.UUID},
    date: {str: date.fromisoformat},
    clock_time: {str: clock_time.fromisoformat},
    timedelta: {str: _read_duration},
    Decimal: {str: _decimal, int: Decimal, float: _decimal},
}


def _to_type(kind: Any, exact: bool, value: Any) -> Any:
    """Return a value of that type, or convert one of another accepted type."""
    arrived = type(value)
    if arrived is kind:  # not isinstance: a bool is no int
        return value
    convert = _ACCEPTED[kind].get(arrived)
    # For types that are written as text, text is exact; but MessagePack has bytes.
    if convert is None or exact and (arrived is not str or kind is bytes):
        raise ValueError(f"{kind.__name__} expected, got {arrived.__name__}")
    return convert(value)


def _to_items(kind: type, convert: Converter, value: Any) -> Any:
    """Read a list, or another collection, which arrives as a list."""
    return kind([convert(item) for item in _to_type(list, True, value)])


def _to_tuple(converters: list[Converter], value: Any) -> tuple[Any, ...]:
    items = _to_type(list, True, value)
    if len(items) != len(converters):
        raise ValueError(f"a list of {len(converters)} expected, got {len(items)}")
    return tuple(convert(item) for convert, item in zip(converters, items, strict=True))


def _to_literal(literals: list[tuple[Any, Converter]], value: Any) -> Any:
    for literal, convert in literals:
        with contextlib.suppress(Exception):  # it is of another type
            if convert(value) == literal:
                return literal
    raise ValueError(f"one of {[literal for literal, _ in literals]} expected")


def _to_dict(convert_key: Converter, convert: Converter, value: Any) -> dict[Any, Any]:
    def convert_any_key(key: Any) -> Any:
        try:
            return convert_key(key)
        except ValueError:  # JSON writes a key that is a number as text
            return convert_key(_loads(key))

    items = _to_type(dict, True, value).items()
    return {convert_any_key(key): convert(item) for key, item in items}


def _to_enum(kind: type[Enum], exact: bool, value: Any) -> Enum:
    """Read an enum by value, or by name without regard to case and underscores."""
    fits = not exact or type(value) in {str, *(type(member.value) for member in kind)}
    if issubclass(kind, Flag) and isinstance(value, int):
        bits = sum(flag.value for flag in kind)
        fits = fits and not value & ~bits  # IntFlag itself keeps unknown bits
    with contextlib.suppress(ValueError):
        if fits:
            return kind(value)
    for name, member in kind.__members__.items():
        if isinstance(value, str) and normalize_name(name) == normalize_name(value):
            return member
    raise ValueError(f"{value!r} is not a {kind.__name__}")


def _to_object(kind: Any, fields: dict[str, tuple[str, Converter]], value: Any) -> Any:
    """Read a dataclass or a TypedDict from an object; unknown members are skipped."""
    members = {}
    for key, item in _to_type(dict, True, value).items():
        if not isinstance(key, str) or normalize_name(key) not in fields:
            continue
        name, convert = fields[normalize_name(key)]
        try:
            members[name] = convert(item)
        except Exception as error:  # noqa: BLE001 (it may be user code)
            raise ValueError(f"{kind.__name__}.{name}: {_text_of(error)}") from None
    required: frozenset[str] = getattr(kind, "__required_keys__", frozenset())
    if missing := required - members.keys():
        raise ValueError(f"{kind.__name__}: {min(missing)!r} is missing")
    return kind(**members)


def _type_text(annotation: Any) -> str:
    """Spell a type as Python source does, without modules."""
    if annotation is type(None):
        return "None"
    literal_or_module = r"""('[^']*'|"[^"]*")|\b(?:[\w<>]+\.)+(?=\w)"""
    return re.sub(literal_or_module, r"\1", inspect.formatannotation(annotation))


def _check_hub_class(hub_class: Any) -> None:
    if not (isinstance(hub_class, type) and issubclass(hub_class, Hub)):
        raise TypeError(f"hub_class: a subclass of Hub, not {hub_class!r}")


def describe(
    hub_class: type[Hub], options: HubOptions = HubOptions()
) -> dict[str, Any]:
    """Describe the methods that clients may call, and the types in them.

    options: those of the hub; its `member_name` spells the members of dataclasses.
    Returns JSON values, from which front ends can generate their own types. Raises
    TypeError for a class that is no hub, for methods that `map_hub` refuses, except
    for a type without a converter, and for two types of the same name.
    """
    _check_hub_class(hub_class)
    converters = Converters(dataclasses.replace(options, converter=None), _unchanged)
    methods = _hub_methods(hub_class, converters).values()
    for method in methods:
        converters.make(_item_type(method.result)[1])
    kinds = {kind for kind, _ in converters.named}
    described = {kind.__name__: _describe_type(kind, options) for kind in kinds}
    if len(described) < len(kinds):
        raise TypeError(f"{hub_class.__name__}: two of its types have the same name")
    return {
        "hub": hub_class.__name__,
        "methods": [*map(_describe_method, methods)],
        "types": dict(sorted(described.items())),
    }


def _describe_method(method: HubMethod) -> dict[str, Any]:
    """Describe the parameters of a method, its result, and who may call it."""
    return {
        "name": method.name,
        "parameters": [
            {
                "name": parameter.name,
                "type": _type_text(parameter.annotation),
                "optional": parameter.default is not parameter.empty,
                "repeated": parameter.kind is parameter.VAR_POSITIONAL,
            }
            for parameter in method.signature
        ],
        "result": _type_text(method.result),
        "stream": method.streaming,
        "authorize": [getattr(c, "__qualname__", repr(c)) for c in method.checks],
    }


def _describe_type(kind: Any, options: HubOptions) -> dict[str, Any]:
    """Describe another name of a type, an enum, or a type of objects."""
    if hasattr(kind, "__supertype__") or hasattr(kind, "__value__"):
        other = getattr(kind, "__supertype__", None) or kind.__value__
        return {"alias": _type_text(other)}
    if issubclass(kind, Enum):
        return {"values": json.loads(JsonProtocol(options).dumps({**kind.__members__}))}
    hints = typing.get_type_hints(kind)
    spelled = [(name, name) for name in hints]
    optional = getattr(kind, "__optional_keys__", frozenset[str]())
    if dataclasses.is_dataclass(kind):
        spelled = JsonProtocol(options).spell(kind)
        fields = dataclasses.fields(kind)
        # Without a default and a factory, both have the same value: MISSING.
        optional = {f.name for f in fields if f.default is not f.default_factory}
    members = {wire: _type_text(hints[name]) for name, wire in spelled}
    return {"members": members, "optional": [w for n, w in spelled if n in optional]}


# ----------------------------------------------------------- hub connection
#
# `HubConnection.run` shows a connection from handshake to end, `_dispatch` what
# each message does. Only calls wait: for a slot, or until the client takes its
# answers. Everything else is handled when it is read, so neither side waits for
# the other while the server reads. A plain method is called right where its
# message is read; a call that is async or has to wait runs in a task of its own.

#: Calls and streams of one client that may run at the same time; further ones wait.
_MAX_RUNNING = 1000

#: Waiting calls of one client that get a task in advance. Calls that end in their
#: first step are then all answered in one write; the rest cost no task.
_TASKS_AHEAD = 32

_KINDS = {False: "non-streaming", True: "streaming"}
_WRONG_KIND = "The client attempted to invoke the {} '{}' method with a {} invocation."
_FAILED_INVOKING = "An unexpected error occurred invoking '{}' on the server."
_UNAUTHORIZED = "Failed to invoke '{}' because user is unauthorized"


class OperationCanceledException(Exception):
    """Something timed out or was cancelled; clients see this name, which is .NET's."""


class Refusal(HubException):
    """An error that clients see as it is, without a sentence before it."""


class MappedHub:
    """One mapped hub: its class, methods, registry and the tasks of its calls."""

    def __init__(
        self,
        app: web.Application,
        hub_class: type[Hub],
        make_hub: Callable[[], Hub],
        options: HubOptions,
    ) -> None:
        self.app = app
        self.hub_class = hub_class
        self.make_hub = make_hub
        self.options = options
        converters = Converters(options)
        self.methods = _hub_methods(hub_class, converters)
        self.shared = Shared(options)
        #: Calls of one client that may run at the same time.
        self.slots = options.maximum_parallel_invocations_per_client or sys.maxsize
        self.registry = Registry(_load_protocols(options))
        users = self.registry.members["user"]
        self.registry.handlers |= {
            "abort": lambda id: self._abort([id]) or None,
            "abort user": lambda id: self._abort(users.get(id, ())),
        }
        self.registry.make_converter = converters.make
        self.contexts: dict[str, HubCallerContext] = {}
        #: The tasks of all calls, also of clients that have left.
        self.tasks: set[asyncio.Task[None]] = set()

    def _abort(self, ids: Iterable[str]) -> int:
        """Abort those of the connections that are in this process; count them."""
        contexts = [self.contexts[id] for id in ids if id in self.contexts]
        for context in contexts:
            context.abort()
        return len(contexts)

    def remove(self, connection: Connection, seconds: float) -> None:
        """Forget a connection, if it was added. seconds: how long it lasted."""
        if self.contexts.pop(connection.connection_id, None) is not None:
            self.registry.remove(connection)
            who = connection, connection.user_id, connection.transport_name
            log.info("connection %s closed: user %r, %s, after %.1f s", *who, seconds)


@dataclass(slots=True, eq=False)
class UploadStream(AsyncIterator[Any]):
    """The items that a client streams to a method; `async for` reads them."""

    _name: str
    _convert: Converter
    _connection: Connection
    #: Items with the size of their messages.
    _items: deque[tuple[Any, int]] = field(default_factory=deque)
    #: What the reader gets after the last item, once the stream has ended.
    _end: Exception | None = None

    def put(self, item: Any, size: int) -> None:
        """Convert an item and keep it until the method reads it."""
        if self._end is not None:
            return
        try:
            value = self._convert(item)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (a converter may be user code)
            text = _one_line(_text_of(error), 200)
            log.warning("%s does not fit: %s", self._name, text)
            message = "Failed to bind Stream message."
            options = self._connection.shared.options
            self.end(HubException(error_text(message, error, options)))
            return
        self._items.append((value, size))
        self._connection.inbox.hold(size)
        self._connection.wake()

    def end(self, error: Exception | None = None) -> None:
        """Accept no more items; the reader gets those left, then stops or `error`."""
        if self._end is None:
            self._end = error or StopAsyncIteration()
            self._connection.wake()

    def discard(self) -> None:
        """End, and forget the items that nobody will read."""
        self.end()
        while self._items:
            self._connection.release(self._items.popleft()[1])

    async def __anext__(self) -> Any:
        while not self._items:
            if self._end is not None:
                raise self._end
            await self._connection.changed()
        item, size = self._items.popleft()
        self._connection.release(size)
        return item


def _log_failure(name: str, connection: Connection, error: BaseException) -> None:
    """Log an exception of user code; with its traceback unless it was expected."""
    gone = isinstance(error, ConnectionError) and connection.ended.done()
    if isinstance(error, HubException) or gone:
        text = _one_line(_text_of(error), 200)
        log.info("%s ended for connection %s: %s", name, connection, text)
    else:
        log.error("%s failed for connection %s", name, connection, exc_info=error)


@dataclass(slots=True, eq=False)
class Call:
    """One accepted call, from its message to its answer."""

    _calls: Calls
    #: The message, in which converted arguments replace the client's.
    invocation: Invocation
    method: HubMethod
    #: Bytes of the message.
    size: int
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    #: Client results that its code waits for.
    awaited_results: int = 0
    #: The client's streams among the arguments.
    _uploads: dict[str, UploadStream] = field(default_factory=dict)

    def open_uploads(self) -> None:
        """Open the client's streams when the call is read, so that items find them."""
        ids, method = self.invocation.stream_ids, self.method
        for id, (position, name, convert) in zip(ids, method.uploads, strict=True):
            name = f"{method.qualified_name}: an item of {name!r}"
            stream = UploadStream(name, convert, self._calls.connection)
            self._uploads[id] = self._calls.uploads[id] = stream
            self.invocation.arguments.insert(position, stream)

    def close_uploads(self) -> None:
        """Discard the upload streams of a call that has ended."""
        for id, stream in self._uploads.items():
            stream.discard()
            if self._calls.uploads.get(id) is stream:
                del self._calls.uploads[id]

    def start(self) -> Any:
        """Call the method; return what to await, or NO_RESULT if it is answered."""
        _current_call.set(self)
        started = time.perf_counter()
        hub, method = self._calls.hub, self.method
        try:
            if method.checks or type(hub).on_invocation is not Hub.on_invocation:
                result = self._call_if_allowed()
            else:
                result = method.function(hub, *self.invocation.arguments)
            if method.streaming or hasattr(result, "__await__"):
                return result
            self._calls.reply(self.invocation, result)
        except BaseException as error:  # noqa: BLE001 (user code)
            self._fail(error)
        if (seconds := time.perf_counter() - started) > 0.1:
            text = "%s blocked the event loop for %.0f ms: use asyncio.to_thread"
            log.warning(text, method.qualified_name, seconds * 1000)
        return NO_RESULT

    async def _call_if_allowed(self) -> Any:
        """Call the method through `on_invocation` if all its checks allow it."""
        hub, method, message = self._calls.hub, self.method, self.invocation
        for check in method.checks:
            if not await _result_of(check(hub.context)):
                raise Refusal(_UNAUTHORIZED.format(message.target))
        invocation = HubInvocation(method.name, message.target, message.arguments)

        async def call_next() -> Any:
            return await _result_of(method.function(hub, *invocation.arguments))

        return await _result_of(hub.on_invocation(invocation, call_next))

    async def run(self, result: Any) -> None:
        """Await the result, or send the stream, and answer: the task of a call.

        result: what the method returned; NO_RESULT if it is not called yet.
        """
        problem = ""
        try:
            if result is NO_RESULT:
                await self._calls.wait_to_begin(self)
                if (result := self.start()) is NO_RESULT:
                    return
            result = await _result_of(result)
            if self.method.streaming:
                if not hasattr(result, "__aiter__"):
                    method = f"the streaming method '{self.invocation.target}'"
                    text = "is not a ChannelReader<> or IAsyncEnumerable<>."
                    raise Refusal(f"The value returned by {method} {text}")
                problem = "An error occurred on the server while streaming results."
                await self._send_items(result)
                result = NO_RESULT
            self._calls.reply(self.invocation, result)
        except GeneratorExit:  # the event loop ends
            raise
        except BaseException as error:  # noqa: BLE001 (user code)
            self._fail(error, problem)
        finally:
            self._calls.forget(self)

    async def _send_items(self, items: AsyncIterable[Any]) -> None:
        """Send the items of a stream as fast as the client takes them."""
        connection, sent = self._calls.connection, 0
        stream_id = self.invocation.invocation_id or ""
        try:
            async for item in items:
                await connection.drain()
                if connection.state >= CLOSING:
                    return
                data = connection.protocol.encode(StreamItem(stream_id, item))
                connection.send(data)
                sent += len(data)
                if sent > _HIGH_WATER:
                    sent = 0
                    # A generator that never waits must let others run: the flush,
                    # then a call that waits for room in the outbox.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                if len(data) > _LARGE:  # the next one is likely to be as large
                    await connection.shared.admit()
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()

    def _fail(self, error: BaseException, problem: str = "") -> None:
        """Complete the call with an error; log it unless the call was cancelled."""
        if isinstance(error, KeyboardInterrupt):
            raise error
        cancelled = self.task.cancelling() if self.task else self.cancelled
        if cancelled and isinstance(error, asyncio.CancelledError):
            if self.invocation.streaming:  # its caller expects no reason
                self._calls.reply(self.invocation, NO_RESULT)
                return
            error = OperationCanceledException("The invocation was canceled.")
        else:
            _log_failure(self.method.qualified_name, self._calls.connection, error)
        problem = problem or _FAILED_INVOKING.format(self.invocation.target)
        text = error_text(problem, error, self._calls.mapped.options)
        if isinstance(error, Refusal):
            text = str(error)
        self._calls.reply(self.invocation, NO_RESULT, text)

    def cancel(self) -> None:
        """Cancel a call that runs or waits, once; it is still answered."""
        if self.cancelled:
            return
        self.cancelled = True
        if self.task is None:
            self._fail(asyncio.CancelledError())
            self._calls.forget(self)
        else:
            # In the next iteration: a task that is cancelled before its first step
            # would skip its `finally`.
            asyncio.get_running_loop().call_soon(self.task.cancel)

    @contextlib.asynccontextmanager
    async def awaiting_result(self) -> AsyncIterator[None]:
        """Release the slot until user code waits for no more client results."""
        self.awaited_results += 1
        self._calls.slot_queue.pop(self, None)
        self._calls.connection.wake()
        try:
            yield
        finally:
            if not self.cancelled:  # a cancelled call gets no slot again
                self.awaited_results -= 1
                await self._calls.resume(self)


@dataclass(slots=True, eq=False)
class Calls:
    """The calls of one client: those that wait, those that run, their uploads."""

    mapped: MappedHub
    connection: Connection
    hub: Hub
    #: The connection's context variables. Each call runs in a copy of its own.
    _variables: contextvars.Context = field(default_factory=contextvars.copy_context)
    #: The calls that wait to begin, in order. The first `_TASKS_AHEAD` have tasks,
    #: which queue for the lock.
    _waiting: deque[Call] = field(default_factory=deque)
    _beginning: asyncio.Lock = field(default_factory=asyncio.Lock)
    _running: dict[Call, None] = field(default_factory=dict)
    #: Running calls that hold a slot; behind them those that wait to go on.
    slot_queue: OrderedDict[Call, None] = field(default_factory=OrderedDict)
    #: The upload streams that are open, by stream id.
    uploads: dict[str, UploadStream] = field(default_factory=dict)

    def add(self, invocation: Invocation, size: int) -> None:
        """Begin or queue a call, or answer it without calling its method."""
        method = self.mapped.methods.get(normalize_name(invocation.target))
        context = self._variables.copy()
        problem = context.run(self._bind, invocation, method)
        if method is None or problem:
            log.info("connection %s: %s", self.connection, _one_line(problem, 200))
            self.reply(invocation, NO_RESULT, problem)
            return
        call = Call(self, invocation, method, size)
        if method.uploads:
            call.open_uploads()
        if self._waiting or not self._may_begin(call):
            self.connection.inbox.hold(size)
            self._waiting.append(call)
            if len(self._waiting) <= _TASKS_AHEAD:
                self._spawn(call, NO_RESULT, context)
        elif (result := context.run(call.start)) is not NO_RESULT:
            self._run(call)
            self._spawn(call, result, context)
        elif method.uploads:
            call.close_uploads()

    def _spawn(self, call: Call, result: Any, context: contextvars.Context) -> None:
        """Continue a call in a task: await its method's result, or wait to begin."""
        loop, name = asyncio.get_running_loop(), call.method.qualified_name
        task = loop.create_task(call.run(result), name=name, context=context)
        if not task.done():  # as it may be, with an eager task factory
            call.task = task
            self.mapped.tasks.add(task)
            task.add_done_callback(self.mapped.tasks.discard)

    def _bind(self, invocation: Invocation, method: HubMethod | None) -> str:
        """Convert a call's arguments; return its first problem as .NET does, or ""."""
        target, streaming = invocation.target, invocation.streaming
        ids, options = invocation.stream_ids, self.mapped.options
        try:
            if method is None:
                raise HubException("Method does not exist.")
            invocation.arguments = method.bind(invocation.arguments)
        except (HubException, BindingError) as error:
            text = f"Failed to invoke '{target}' due to an error on the server."
            return error_text(text, error, options)
        if method.needs_slot and not (streaming or ids):
            return ""  # the usual call
        if streaming != method.streaming:
            return _WRONG_KIND.format(_KINDS[not streaming], target, _KINDS[streaming])
        if streaming and self.find(invocation.invocation_id) is not None:
            return f"Invocation ID '{invocation.invocation_id}' is already in use."
        limit, expected = options.maximum_streams_per_client, len(method.uploads)
        streams = streaming + sum(call.invocation.streaming for call in self._all())
        if max(streams, len(ids) + len(self.uploads)) > (limit or math.inf):
            text = f"A client can have at most {limit} streams at the same time."
        elif len(ids) != expected:
            text = f"Client sent {len(ids)} stream(s), Hub method expects {expected}."
        elif used := [id for id in ids if id in self.uploads or ids.count(id) > 1]:
            text = f"Stream ID '{used[0]}' is already in use."
        else:
            return ""
        return error_text(_FAILED_INVOKING.format(target), HubException(text), options)

    def reply(self, message: Invocation, result: Any, error: str | None = None) -> None:
        """Complete a call, if it has an id. Raises what `encode` raises."""
        connection, invocation_id = self.connection, message.invocation_id
        if invocation_id is not None and connection.state < CLOSING:
            completion = Completion(invocation_id, result, error)
            connection.send(connection.protocol.encode(completion))

    def _all(self) -> Iterator[Call]:
        return itertools.chain(self._running, self._waiting)

    def find(self, id: str | None) -> Call | None:
        return next((c for c in self._all() if c.invocation.invocation_id == id), None)

    def _may_begin(self, call: Call) -> bool:
        """Return True if a slot is free, and the client reads or closed normally."""
        no_slot = call.method.needs_slot and len(self.slot_queue) >= self.mapped.slots
        if no_slot or len(self._running) >= _MAX_RUNNING:
            return False
        outbox = self.connection.outbox
        return outbox.size <= outbox.high_water and self.connection.accepts_messages()

    async def wait_to_begin(self, call: Call) -> None:
        """Wait until earlier calls have begun and there is a slot, time and room."""
        async with self._beginning:
            if time.perf_counter() > self.mapped.shared.deadline():
                await asyncio.sleep(0)  # let others run
            while not self._may_begin(call):
                if self.connection.inbox.full and len(self._running) >= _MAX_RUNNING:
                    # Calls that run may wait for answers that cannot be read.
                    raise HubException("The client has too many calls at once.")
                await self.connection.changed()
            self._stop_waiting(call)
            self._run(call)

    def _run(self, call: Call) -> None:
        """Count a call as running; if it needs a slot, it takes one or queues for it."""
        self._running[call] = None
        if call.method.needs_slot and not call.awaited_results:
            self.slot_queue[call] = None

    def _stop_waiting(self, call: Call) -> None:
        """Remove a call from those that wait; the next one gets a task."""
        self._waiting.remove(call)
        self.connection.release(call.size)
        self.connection.wake()
        if len(self._waiting) >= _TASKS_AHEAD:
            following = self._waiting[_TASKS_AHEAD - 1]
            if following.task is None:
                self._spawn(following, NO_RESULT, self._variables.copy())

    def forget(self, call: Call) -> None:
        """Forget a call that has ended; its slot is free for another."""
        if call not in self._running:
            self._stop_waiting(call)
        self._running.pop(call, None)
        self.slot_queue.pop(call, None)
        call.task = None  # its context refers to the call: a cycle
        call.close_uploads()
        self.connection.wake()

    async def resume(self, call: Call) -> None:
        """Take a slot again if the call needs one, and wait until it is free."""
        late: asyncio.CancelledError | None = None
        if call in self._running:
            self._run(call)
        slots, queue = self.mapped.slots, self.slot_queue
        while call in queue and call not in itertools.islice(queue, slots):
            try:
                await self.connection.changed()
            except asyncio.CancelledError as error:  # its own timeout, perhaps
                if call.cancelled:
                    raise
                late = error
        if late is not None:
            raise late

    def cancel_waiting(self) -> None:
        """Cancel the calls that have not begun."""
        for call in list(self._waiting):
            call.cancel()

    async def finish(self, end: End) -> None:
        """Close streams and fail uploads; return once no call waits any more."""
        if not end.normal:  # after a normal close, waiting calls still run
            self.cancel_waiting()
        while True:
            unread = end.normal and self.connection.inbox.unfinished
            # Streams end once all is read, or if waiting items have paused the reading.
            if self.connection.inbox.full or not unread:
                for stream in self.uploads.values():
                    stream.end(ConnectionError("The underlying connection was closed."))
                for call in self._running:
                    if call.invocation.streaming:
                        call.cancel()
            if not (unread or self._waiting):
                return
            await self.connection.changed()


# The handshake (HubProtocol.md, Handshake)


async def _shake_hands(mapped: MappedHub, connection: Connection) -> bool:
    """Answer the handshake request; return True if it succeeds."""
    problem = None
    try:
        await _choose_protocol(mapped, connection)
        connection.state = OPEN
    except (ProtocolError, HubException) as error:
        problem = str(error)
        log.warning("connection %s: %s", connection, _one_line(problem, 200))
        if isinstance(error, ProtocolError):
            text = "An unexpected error occurred during connection handshake."
            problem = error_text(text, error, mapped.options)
    connection.send(_handshake_response(problem), sequenced=False)
    return problem is None


async def _choose_protocol(mapped: MappedHub, connection: Connection) -> None:
    """Set up what the client asks for. Raises ProtocolError or HubException."""
    name, version = _read_handshake(await _read_first_record(connection))
    protocol = mapped.registry.protocols.get(name.lower())
    if protocol is None:
        if name.lower() == "messagepack":
            log.warning("a client asks for MessagePack: pip install msgpack")
        raise HubException(f"The protocol '{name}' is not supported.")
    if version > 2:  # version 2 added stateful reconnect
        raise HubException(
            f"The server does not support version {version} of the '{name}' protocol."
        )
    if protocol.binary and connection.transport_name == SERVER_SENT_EVENTS:
        raise HubException(
            f"Cannot use the '{protocol.name}' protocol on the current transport. "
            "The transport does not support 'Binary' transfer format."
        )
    connection.protocol = protocol
    if version < 2:
        connection.reconnect = None


async def _read_first_record(connection: Connection) -> bytearray:
    """Wait for the handshake request; HubException if it is late or too large."""
    inbox, options = connection.inbox, connection.shared.options
    limit = options.maximum_receive_message_size or math.inf
    with contextlib.suppress(TimeoutError, MessageTooLarge):
        async with asyncio.timeout(options.handshake_timeout):
            while connection.state < CLOSING:
                if (record := inbox.read_record(limit)) is not None:
                    return record
                await connection.changed()
    raise HubException("Handshake was canceled.")


class HubConnection:
    """One client and its hub, from the handshake to the end."""

    def __init__(self, mapped: MappedHub, connection: Connection) -> None:
        self._mapped = mapped
        self._connection = connection
        self._size_limit = mapped.options.maximum_receive_message_size or math.inf
        #: Messages that the client may send now, and when they were counted.
        self._credit = max(1.0, 2 * (mapped.options.invocations_per_second or 0.0))
        self._begun = self._counted_at = time.monotonic()
        #: Whether the client has sent something since the last check, and a ping ever.
        self._active = self._pinged = False
        self._last_received = self._last_ping = self._begun
        self._calls: Calls

    async def run(self, request: Request) -> None:
        """Serve a client from its handshake to its end. request: its first GET."""
        connection = self._connection
        try:
            if not await _shake_hands(self._mapped, connection):
                return
            error = await self._run_hook("__init__", self._create_hub, request)
            error = error or await self._run_hook("on_connected", self._accept)
            if error is not None:
                self._fail(error, allow_reconnect=False)
                return
            connection.on_data = self._receive
            connection.feed()  # handle what came meanwhile
            end = await connection.ended
            await self._calls.finish(end)
            error = end.error
            if end.normal and connection.inbox:
                error = ProtocolError("Connection terminated while reading a message.")
            on_disconnected = self._calls.hub.on_disconnected
            await self._run_hook("on_disconnected", on_disconnected, error)
        except Exception:
            log.exception("connection %s failed", connection)
        finally:
            self._mapped.remove(connection, time.monotonic() - self._begun)
            connection.close(End())

    def _create_hub(self, request: Request) -> None:
        """Make the hub of this connection, and register both."""
        mapped, connection = self._mapped, self._connection
        hub, id = mapped.make_hub(), connection.connection_id
        if type(hub) is not mapped.hub_class or getattr(hub, "context", None):
            name = mapped.hub_class.__name__
            raise TypeError(f"factory: a new {name} for each connection, not {hub!r}")
        who = connection.user_id, connection.transport_name
        protocol, ended = connection.protocol.name, connection.ended
        abort = functools.partial(self._close, End(), Close())
        hub.context = HubCallerContext(id, *who, protocol, request, ended, abort)
        hub.app, hub.groups = mapped.app, mapped.registry.groups
        hub.clients = HubCallerClients(mapped.registry, id)
        self._calls = Calls(mapped, connection, hub)
        mapped.contexts[id] = hub.context
        mapped.registry.add(connection)
        log.info("connection %s opened: user %r, %s", connection, *who)

    async def _accept(self) -> None:
        """Let the hub accept the client, once other processes reach it."""
        channel = f"connection:{self._connection.connection_id}"
        await self._mapped.registry.backplane.subscribed(channel)
        _current_call.set(self)
        await _result_of(self._calls.hub.on_connected())

    def awaiting_result(self) -> contextlib.nullcontext[None]:
        """Forbid client results in `on_connected`; a hook has no slot."""
        if self._connection.on_data is None:
            text = "Client results inside OnConnectedAsync Hub methods are not allowed."
            raise HubException(text)
        return contextlib.nullcontext()

    async def _run_hook(
        self, name: str, hook: Callable[..., Any], *arguments: Any
    ) -> BaseException | None:
        """Run a hook of the hub; log and return what it raises."""
        try:
            await _result_of(hook(*arguments))
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the server stops
            name = f"{self._mapped.hub_class.__name__}.{name}"
            _log_failure(name, self._connection, error)
            return error
        return None

    def _receive(self) -> None:
        """Decode and dispatch what has arrived, until this iteration's time is up."""
        connection, mapped = self._connection, self._mapped
        protocol, inbox = connection.protocol, connection.inbox
        shared, deadline = mapped.shared, mapped.shared.deadline()
        rate = mapped.options.invocations_per_second
        paused, inbox.unfinished = inbox.unfinished, False
        try:
            for message, size in protocol.decode(inbox, self._size_limit):
                shared.messages_in += 1
                self._active = True
                reconnect = connection.reconnect
                if reconnect is None or reconnect.accept(message):
                    if rate is not None:
                        self._check_rate(message, rate, paused)
                    self._dispatch(message, size)
                if not connection.accepts_messages():
                    inbox.clear()  # ignore what follows the end
                    return
                if inbox and (inbox.full or time.perf_counter() > deadline):
                    inbox.unfinished = True
                    if not inbox.full:  # else `Connection.release` goes on
                        shared.run_later(connection.feed)
                    return
        except (ProtocolError, HubException) as error:
            log.warning("connection %s: %s", connection, _one_line(str(error), 200))
            inbox.clear()
            self._fail(error)

    def _check_rate(self, message: Message | None, rate: float, paused: bool) -> None:
        """Count a message, unless it answers the server. HubException above the rate.

        paused: reading was paused before, so any number of messages may have waited.
        """
        acks = isinstance(message, Ack) and self._connection.reconnect is not None
        if acks or self._mapped.registry.results.awaits(self._connection, message):
            return
        now = time.monotonic()
        most = math.inf if paused else max(1.0, 2 * rate, self._credit)
        earned = (now - self._counted_at) * rate
        self._counted_at = now
        self._credit = min(most, self._credit + earned) - 1
        if self._credit < 0:
            self._mapped.shared.drops["rate limit"] += 1
            text = f"The client sent more than {rate:g} messages a second."
            raise HubException(text)

    def _dispatch(self, message: Message | None, size: int) -> None:
        """Act on one message; this is the whole protocol."""
        reconnect, calls = self._connection.reconnect, self._calls
        match message:
            case Invocation():
                calls.add(message, size)
            case StreamItem(stream_id, item) if stream_id in calls.uploads:
                calls.uploads[stream_id].put(item, size)
            case Completion(stream_id, _, error) if stream_id in calls.uploads:
                failure = None if error is None else HubException(error)
                calls.uploads.pop(stream_id).end(failure)
            case Completion():
                results = self._mapped.registry.results
                results.complete(self._connection.connection_id, message)
            case CancelInvocation(invocation_id):
                if (call := calls.find(invocation_id)) is not None:
                    call.cancel()
            case Ping():
                self._pinged = True
            case Close(error):
                self._connection.inbox.clear()  # ignore what follows it
                failure = None if error is None else HubException(error)
                self._close(End(failure, normal=True), Close())
            case Ack(sequence_id) if reconnect is not None:
                reconnect.acknowledge(sequence_id)
                self._connection.wake()
            case Sequence(sequence_id) if reconnect is not None:
                reconnect.resume(sequence_id)

    def _fail(self, error: BaseException, allow_reconnect: bool = True) -> None:
        """End the connection because of an error; a Close message reports it."""
        text = error_text(
            "Connection closed with an error.", error, self._mapped.options
        )
        failure = error if isinstance(error, Exception) else None
        self._close(End(failure), Close(text, allow_reconnect))

    def _close(self, end: End, message: Close) -> None:
        """End the connection with a last message, or its handshake."""
        connection = self._connection
        data = connection.protocol.encode(message)
        if connection.state == OPENING:
            data = _handshake_response("Handshake was canceled.")
        connection.send(data, sequenced=False)
        connection.close(end)

    def shut_down(self) -> None:
        """End the connection because the server stops; cancel the calls that wait."""
        self._close(End(), Close(allow_reconnect=True))
        if self._connection.on_data is not None:
            self._calls.cancel_waiting()

    def check_timeouts(self, now: float) -> None:
        """Send a due ping or ack; disconnect a silent client. now: monotonic seconds.

        A closed connection is forgotten after `close_timeout`, even if its code runs.
        """
        connection, mapped = self._connection, self._mapped
        reconnect, encode = connection.reconnect, connection.protocol.encode
        timeout = mapped.options.close_timeout or math.inf
        if connection.state == CLOSED and now - connection.last_change > timeout:
            mapped.remove(connection, now - self._begun)
        if connection.state != OPEN:
            return
        # What it sent may not have been read yet, or it has no socket to send on.
        if self._active or not connection.can_read() or connection.transport is None:
            self._active, self._last_received = False, now
        limit = mapped.options.client_timeout_interval or math.inf
        if self._pinged and now - self._last_received > limit:
            mapped.shared.drops["client timeout"] += 1
            log.info("connection %s timed out", connection)
            text = "Client hasn't sent a message/ping within the configured "
            self._fail(OperationCanceledException(f"{text}ClientTimeoutInterval."))
        if connection.transport is None or connection.backlog() > _HIGH_WATER:
            return
        interval = mapped.options.keep_alive_interval or math.inf
        polls = connection.transport_name == LONG_POLLING  # which keep it alive
        if now - self._last_ping >= interval and not polls:
            self._last_ping = now
            connection.send(encode(Ping()), sequenced=False)
        if reconnect is not None and (ack := reconnect.take_ack()) is not None:
            connection.send(encode(ack), sequenced=False)


# ----------------------------------------------------------------- endpoint
#
# The HTTP side of a hub: negotiate makes a token, and the first request with it the
# connection. GET gives it a transport, POST brings bytes, DELETE ends long polling.
# Every request is checked in the same order: origin, method, user id, connection,
# transport. Bodies and status codes are the reference server's, which clients know.

#: The origin whose page may read the answer.
_CORS_ORIGIN = web.RequestKey("kestrun_cors_origin", str)

#: Seconds at shutdown: for calls that run, for a poll that fetches the Close message,
#: and for everything together.
_CALLS_TIMEOUT, _LAST_POLL_TIMEOUT, _SHUTDOWN_TIMEOUT = 2.0, 0.3, 3.0

#: The header of an answer when the server is full.
_RETRY_LATER = {"Retry-After": "5"}

_UNKNOWN_TOKEN = (
    "%s with an unknown token: it has expired, is from before a restart, or from "
    "another process. Several processes need a common backplane, and a proxy that "
    "sends all requests of a connection to one of them."
)


def access_token(request: Request) -> str | None:
    """Return the token of a request, for use in `authenticate`; None without one.

    It is in `Authorization: Bearer`, or in the query as `access_token`: browsers
    cannot set headers on WebSockets and event streams.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.query.get("access_token")


def _check_headers(request: Request, allowed: Collection[str], reads: bool) -> None:
    """Refuse compressed bodies, and requests from pages of origins not `allowed`.

    reads: the request changes nothing, so links on other sites may lead to it.
    Raises HTTP errors. Browsers send no Origin with images, links and prefetches, but
    other headers show where those come from. (Fetch Metadata Request Headers)
    """
    headers, linked = request.headers, False
    if (origin := headers.get("Origin")) is None:
        site = headers.get("Sec-Fetch-Site", "none").lower()
        linked = site not in ("same-origin", "none")
    elif origin.lower() in map(str.lower, allowed):
        request[_CORS_ORIGIN] = origin
    elif origin.lower().partition("://")[2] != request.host.lower():
        sides = _one_line(f"Origin: {origin}, Host: {request.host}", 500)
        text = (
            f"Pages of this origin may not connect ({sides}). A proxy must pass Host "
            "on; other origins belong in allowed_origins (--allow-origin)."
        )
        log.warning("%s %s: %s", request.method, request.rel_url.raw_path, text)
        raise web.HTTPForbidden(text=text)
    names = ("Sec-Purpose", "Purpose", "X-Moz")
    early = any("prefetch" in headers.get(name, "").lower() for name in names)
    if (early or linked) and not reads:
        text = "Other sites may not request this, and browsers may not prefetch it."
        raise web.HTTPForbidden(text=text)
    encodings = headers.getall("Content-Encoding", ())  # aiohttp uses the last
    if any(encoding.lower() != "identity" for encoding in encodings):  # maybe a bomb
        raise web.HTTPUnsupportedMediaType(text="The body must not be compressed.")


async def _add_cors(request: Request, response: StreamResponse) -> None:
    """Let an allowed origin read any answer, including errors and streams."""
    if (origin := request.get(_CORS_ORIGIN)) is None:
        return
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Allow-Credentials"] = "true"
    headers.add("Vary", "Origin")
    if request.method == "OPTIONS":
        asked = request.headers.get("Access-Control-Request-Headers", "")
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
        headers["Access-Control-Allow-Headers"] = asked or "x-requested-with"


@dataclass(repr=False)
class Tokens:
    """Connection tokens, which every process with the same key can check.

    A token has 56 characters: 22 random ones, the time until which it may first be
    used (10, in hundredths of a second, hexadecimal), negotiate's version, whether it
    is stateful, and a signature (22) for one hub and one user.
    """

    _key: bytes
    _path: str

    def create(
        self, user_id: str | None, lifetime: float, version: int, stateful: bool
    ) -> str:
        """Make a token. lifetime: seconds until its first use."""
        end = int((time.time() + lifetime) * 100)
        content = f"{_new_id()}{end:010x}{version:d}{stateful:d}"
        return content + self._sign("token", content, user_id)

    def read(self, token: str, user_id: str | None) -> tuple[str, bool, float]:
        """Return a token's connection id, whether it is stateful, and when it expires.

        The time is in seconds since 1970; a token that was used does not expire.
        Raises ValueError if the token is not of this hub and user.
        """
        content, signature = token[:-_ID_LENGTH], token[-_ID_LENGTH:]
        genuine = self._sign("token", content, user_id)
        if not secrets.compare_digest(signature.encode(), genuine.encode()):
            raise ValueError("the token is signed for another hub or user, or forged")
        end, version, stateful = content[-12:-2], content[-2], content[-1]
        # In version 0 of negotiate, the token is the connection id as well.
        id = token if version == "0" else self._sign("id", content, user_id)
        return id, stateful == "1", int(end, 16) / 100

    def _sign(self, purpose: str, content: str, user_id: str | None) -> str:
        user = b"" if user_id is None else b"=" + user_id.encode(errors="surrogatepass")
        parts = purpose.encode(), content.encode(), self._path.encode(), user
        return base64.urlsafe_b64encode(_sign(self._key, *parts)).decode()[:_ID_LENGTH]


def _apply_timeouts(connection: Connection, now: float) -> None:
    """Apply the timeouts of a transport. now: the monotonic time in seconds."""
    options, transport = connection.shared.options, connection.transport
    if transport is not None and transport.socket.is_closing():
        connection.wake()  # its request notices that the client is gone
    elif transport is None or connection.state == CLOSING:
        limit = options.close_timeout if transport else options.disconnect_timeout
        if now - connection.last_change > (limit or math.inf):
            connection.lost(End())
            if transport is not None:
                transport.abort()
    else:
        stalled = connection.outbox.stalled_for(connection.backlog(), now)
        if stalled > (options.transport_send_timeout or math.inf):
            connection.drop("send timeout")


class ConnectionManager:
    """The connections of one endpoint by token, their heartbeat, and their end."""

    def __init__(self, mapped: MappedHub, tokens: Tokens) -> None:
        self._mapped = mapped
        self._tokens = tokens
        self._connections: dict[str, Connection] = {}
        #: By connection id, when its token expires: tokens made here and not used yet.
        self._unused: dict[str, float] = {}
        #: The same for tokens that were used, here or in another process.
        self._used: dict[str, float] = {}
        mapped.registry.handlers["token used"] = self._mark_used
        mapped.shared.on_end = self._on_end
        self._running: dict[asyncio.Task[None], HubConnection] = {}
        #: None before the start and from the stop on: then no connections are made.
        self._heartbeat: asyncio.Task[None] | None = None
        #: How many connections are not closed.
        self._open_connections = 0

    def negotiate(
        self, user_id: str | None, version: int, stateful: bool
    ) -> tuple[str, str]:
        """Return a new token and its connection id. Raises HTTP errors."""
        self._check_room(len(self._unused))
        lifetime = min(3600.0, self._mapped.options.disconnect_timeout or math.inf)
        token = self._tokens.create(user_id, lifetime, version, stateful)
        connection_id, _, expires_at = self._tokens.read(token, user_id)
        self._unused[connection_id] = expires_at
        return token, connection_id

    def _mark_used(self, connection_id: str, expires_at: float) -> None:
        self._unused.pop(connection_id, None)
        self._used[connection_id] = expires_at

    def _check_room(self, tokens: int = 0) -> None:
        """Raise HTTPServiceUnavailable if there are too many connections, or tokens."""
        limit = self._mapped.options.maximum_connections or math.inf
        if self._heartbeat is None or max(self._open_connections, tokens) >= limit:
            text = "Too many connections, or the server is shutting down: try later."
            raise web.HTTPServiceUnavailable(text=text, headers=_RETRY_LATER)

    def create(self, user_id: str | None, token: str, id: str) -> Connection:
        """Make a connection with this token and this connection id."""
        self._check_room()
        connection = Connection(self._mapped.shared, id, user_id)
        self._connections[token] = connection
        self._open_connections += 1
        self._mapped.registry.backplane.subscribe(f"connection:{id}")
        return connection

    def _on_end(self, connection: Connection) -> None:
        """Show other processes that a connection ends; make room once it is closed."""
        if connection.state == CLOSED:
            self._open_connections -= 1
        self._mapped.registry.results.fail(connection.connection_id)
        channel = f"connection:{connection.connection_id}"
        self._mapped.registry.backplane.unsubscribe(channel)

    async def find(
        self, request: Request, user_id: str | None, transport: str
    ) -> Connection:
        """Return the connection that a request names. Raises HTTP errors.

        transport: the one that a GET asks for; "" for other methods.
        The first request with a token makes its connection; some clients POST the
        handshake before they poll. A WebSocket needs no token.
        """
        connection = None
        if token := _query(request).get("id"):
            connection = self._connections.get(token)
            connection = connection or await self._open(token, user_id)
            if connection is None:
                log.warning(_UNKNOWN_TOKEN, request.method)
            if connection is None or connection.state == CLOSED:
                raise web.HTTPNotFound(text="No Connection with that ID")
            if connection.user_id != user_id:
                log.warning("connection %s: used by another user", connection)
                text = "The user associated with this connection changed."
                raise web.HTTPForbidden(text=text)
        elif transport != WEBSOCKETS:
            raise web.HTTPBadRequest(text="Connection ID required")
        if transport and transport not in self._mapped.options.transports:
            text = f"{transport} transport not supported by this end point type"
            raise web.HTTPNotFound(text=text)
        return connection or self.create(user_id, _new_id(), _new_id())

    async def _open(self, token: str, user_id: str | None) -> Connection | None:
        """Create a token's connection; None if it is invalid, expired or used."""
        try:
            connection_id, stateful, expires_at = self._tokens.read(token, user_id)
        except ValueError:
            return None
        if expires_at < time.time() or connection_id in self._used:
            return None
        backplane = self._mapped.registry.backplane
        channel = f"connection:{connection_id}"
        backplane.subscribe(channel)
        elsewhere = False
        try:
            with contextlib.suppress(ConnectionError):  # serve clients without Redis
                if await backplane.subscribed(channel):
                    elsewhere = await backplane.subscribers(channel) > 1
            if (connection := self._connections.get(token)) is not None:
                return connection  # another request has made it meanwhile
            if elsewhere or connection_id in self._used:
                return None
            # If there is no room now, the token can be used later.
            connection = self.create(user_id, token, connection_id)
        finally:
            if token not in self._connections:
                backplane.unsubscribe(channel)
        self._mark_used(connection_id, expires_at)
        backplane.tell("all", "token used", connection_id, expires_at)
        if stateful:
            connection.reconnect = ReconnectBuffer()
        return connection

    def run(self, connection: Connection, request: Request) -> None:
        """Start serving a connection, at its first GET."""
        hub_connection = HubConnection(self._mapped, connection)
        task = asyncio.create_task(hub_connection.run(request))
        self._running[task] = hub_connection
        task.add_done_callback(self._running.pop)

    async def start(self, app: web.Application) -> None:
        """Start the heartbeat; aiohttp calls this when the application starts."""
        self._heartbeat = asyncio.create_task(self._heartbeat_loop())

    async def _heartbeat_loop(self) -> None:
        """Check all connections each second, or more often for short timeouts."""
        options = self._mapped.options
        checked = [options.keep_alive_interval, options.client_timeout_interval]
        checked += [options.disconnect_timeout, options.transport_send_timeout]
        checked += [options.close_timeout]
        interval = min(1.0, *((seconds or math.inf) / 4 for seconds in checked))
        while True:
            await asyncio.sleep(interval)
            # After a stall, let pending reads run before checking timeouts.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._check_all(time.monotonic())

    def _check_all(self, now: float) -> None:
        """Forget closed connections and expired tokens; apply all other timeouts."""
        # Separate from the loop, whose local variables would keep connections alive.
        found, clock = self._connections.items(), time.time()
        self._connections = {token: c for token, c in found if c.state != CLOSED}
        self._unused = {id: end for id, end in self._unused.items() if end >= clock}
        self._used = {id: end for id, end in self._used.items() if end >= clock}
        for connection in list(self._connections.values()):
            try:
                _apply_timeouts(connection, now)
            except Exception:  # one broken transport must not stop the heartbeat
                log.exception("connection %s", connection)
                connection.drop("transport error")
        for hub_connection in list(self._running.values()):
            hub_connection.check_timeouts(now)

    async def stop(self) -> None:
        """Close all connections, letting clients reconnect later; end all calls."""
        heartbeat, self._heartbeat = self._heartbeat, None
        for hub_connection in list(self._running.values()):
            hub_connection.shut_down()
        for connection in self._connections.values():
            if not connection.transport_name:  # no GET has opened it, and none may now
                connection.lost(End())
            elif isinstance(connection.transport, WebSocketTransport):
                # aiohttp reads nothing any more, so no close frame can arrive.
                connection.transport.close_socket(self._mapped.options.close_timeout)
        begun = time.monotonic()
        seconds = min(_CALLS_TIMEOUT, self._mapped.options.close_timeout or math.inf)
        await _end_tasks(self._mapped.tasks, (seconds, min(seconds, 0.5)))
        while (passed := time.monotonic() - begun) < _SHUTDOWN_TIMEOUT:
            if not (self._open_connections or self._running):
                break
            for connection in self._connections.values():
                if connection.transport is None and passed > _LAST_POLL_TIMEOUT:
                    connection.lost(End())  # no poll fetched its Close
            await asyncio.sleep(0.02)
        for connection in self._connections.values():
            connection.drop("shutdown")
        await _end_tasks(self._running, (0.0, 0.2))
        if heartbeat is not None:  # until here, it applies `close_timeout`
            heartbeat.cancel()
        self._connections.clear()


#: The managers of an application's hubs, which stop at the same time.
_MANAGERS = web.AppKey("kestrun_managers", list[ConnectionManager])


async def _stop_all(app: web.Application) -> None:
    await asyncio.gather(*(manager.stop() for manager in app[_MANAGERS]))


@dataclass(slots=True, eq=False)
class Endpoint:
    """The routes of one hub."""

    _options: HubOptions
    _manager: ConnectionManager

    async def handle_negotiate(self, request: Request) -> StreamResponse:
        """Answer POST {hub}/negotiate. (TransportProtocols.md)"""
        user_id = await self._check_request(request, "POST")
        answer = self._negotiate(_query(request), user_id)
        return web.json_response(answer, dumps=_dumps)

    async def handle(self, request: Request) -> StreamResponse:
        """Answer GET, POST and DELETE {hub}. (TransportProtocols.md)"""
        user_id = await self._check_request(request, "GET", "POST", "DELETE")
        try:
            transport = self._transport_of(request) if request.method == "GET" else ""
            connection = await self._manager.find(request, user_id, transport)
            if request.method == "POST":
                return await self._post(request, connection)
            if request.method == "DELETE":
                if connection.transport_name != LONG_POLLING:
                    text = "Cannot terminate this connection using the DELETE endpoint."
                    raise web.HTTPBadRequest(text=text)
                connection.lost(End(normal=True))  # which ends the pending poll, too
                return Response(status=202, text="")
            # Not in a helper: each coroutine costs memory while a socket is open.
            return await self._get(request, connection, transport)
        except web.HTTPException as error:
            if request.method == "GET":
                error.headers.update(_NO_CACHE)
            raise

    async def _check_request(self, request: Request, *methods: str) -> str | None:
        """Check headers and method, and return the user id; answer a CORS preflight.

        Raises what `authenticate` raises, with an empty body, as the reference does.
        """
        _check_headers(request, self._options.allowed_origins, reads=False)
        if request.method == "OPTIONS" and _CORS_ORIGIN in request:
            raise web.HTTPNoContent
        if request.method not in methods:
            raise web.HTTPMethodNotAllowed(request.method, methods, text="")
        if (authenticate := self._options.authenticate) is None:
            return None
        try:
            user_id = await authenticate(request)
        except web.HTTPException as error:
            error.body = b""
            raise
        except SystemExit as error:  # which would end the event loop
            raise RuntimeError("authenticate wanted to exit") from error
        if user_id is not None and not isinstance(user_id, str):
            raise TypeError(f"authenticate: a str or None, not {_a(user_id)}")
        return None if user_id is None else str.__str__(user_id)  # no subclass

    def _negotiate(self, query: dict[str, str], user_id: str | None) -> dict[str, Any]:
        """Make a token; return the answer of negotiate."""
        asked = query.get("negotiateversion", "0").strip()
        number = int(asked) if re.fullmatch(r"[+-]?[0-9]{1,10}", asked) else math.inf
        if not -(2**31) <= number < 2**31:
            return {"error": "The client requested a non-integer protocol version."}
        if number < 0:
            error = f"The client requested version '{number}', but the server does not "
            return {"error": f"{error}support this version."}
        version = min(int(number), 1)
        stateful = query.get("usestatefulreconnect", "").strip().lower() == "true"
        stateful = stateful and self._options.allow_stateful_reconnects
        token, connection_id = self._manager.negotiate(user_id, version, stateful)
        answer: dict[str, Any] = {"useStatefulReconnect": True} if stateful else {}
        answer |= {"negotiateVersion": version, "connectionId": connection_id}
        if version:  # in version 0, the connection id is the token
            answer["connectionToken"] = token
        both = ["Text", "Binary"]
        carried = {WEBSOCKETS: both, SERVER_SENT_EVENTS: ["Text"], LONG_POLLING: both}
        answer["availableTransports"] = [
            {"transport": name, "transferFormats": formats}
            for name, formats in carried.items()
            if name in self._options.transports
        ]
        return answer

    @staticmethod
    def _transport_of(request: Request) -> str:
        """Return the transport that a GET asks for."""
        if "text/event-stream" in request.headers.get("Accept", "").lower():
            return SERVER_SENT_EVENTS
        with contextlib.suppress(ValueError):  # from a key that is not ASCII
            if web.WebSocketResponse().can_prepare(request):
                return WEBSOCKETS
        return LONG_POLLING

    def _get(
        self, request: Request, connection: Connection, transport: str
    ) -> Awaitable[StreamResponse]:
        """Serve a GET: attach it to its connection as the transport.

        A second transport is refused, except polls and stateful reconnects.
        """
        first = not connection.transport_name
        if first:
            connection.transport_name = transport
            if transport != WEBSOCKETS:
                connection.reconnect = None
            self._manager.run(connection, request)
        elif connection.transport_name != transport:
            raise web.HTTPBadRequest(text="Cannot change transports mid-connection")
        elif transport != LONG_POLLING and not connection.can_resume():
            if connection.reconnect is not None and connection.state != OPENING:
                raise web.HTTPNotFound(text="")  # the client starts a new connection
            raise web.HTTPConflict(text="")
        if transport == LONG_POLLING:
            return serve_poll(request, connection, first)
        serve = serve_websocket if transport == WEBSOCKETS else serve_events
        return serve(request, connection)

    async def _post(self, request: Request, connection: Connection) -> Response:
        """Take bytes from the client; answer when it may send more."""
        if connection.transport_name == WEBSOCKETS:
            text = "POST requests are not allowed for WebSocket connections."
            raise web.HTTPMethodNotAllowed("POST", ["GET"], text=text)
        inbox = connection.inbox
        if inbox.posts >= 64:  # clients send one at a time
            raise web.HTTPTooManyRequests(text="", headers={"Retry-After": "1"})
        inbox.posts += 1
        try:
            async with inbox.lock:
                await receive_post(request, connection)
        except (aiohttp.ClientPayloadError, ConnectionError, TimeoutError):
            raise web.HTTPBadRequest(text="") from None  # the client left
        finally:
            inbox.posts -= 1
        response = Response(status=404 if connection.state == CLOSED else 200, text="")
        if not request.content.at_eof():  # the hub takes no more
            response.force_close()
        return response


def _query(request: Request) -> dict[str, str]:
    """Read the query as ASP.NET does: keys without case, repeated values joined."""
    query: dict[str, str] = {}
    # Not `request.query`, which is kept for as long as the request lives.
    for key, value in parse_qsl(request.rel_url.raw_query_string, True):
        key = key.lower()
        query[key] = f"{query[key]},{value}" if key in query else value
    return query


def _required_arguments(function: Any) -> str:
    """Return the names of the arguments without which a function cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # it has no signature
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in optional]
    return ", ".join(parameter.name for parameter in needed)


def map_hub(
    app: web.Application,
    path: str,
    hub_class: type[Hub],
    options: HubOptions | None = None,
    *,
    backplane: RedisBackplane | None = None,
    factory: Callable[[], Hub] | None = None,
    **overrides: typing.Unpack[HubOverrides],
) -> HubContext:
    """Serve a hub at `path` of an aiohttp application.

    path: such as "/hubs/chat"; "/hubs/chat/negotiate" belongs to it too.
    hub_class: a subclass of Hub. The same class may be mapped twice; the two hubs
        share nothing.
    factory: makes a hub of that class for each connection. A class that can be made
        without arguments needs none.
    backplane: connects the processes that serve this hub at this path; two hubs of
        one application may share it.
    options, overrides: a HubOptions, and fields of it to set or change.
    Returns the hub's context, for code outside of hub methods. Raises TypeError or
    ValueError for an unknown option, a class that is not a hub, a path that is taken,
    and two methods with the same wire name.
    """
    _check_hub_class(hub_class)
    make_hub = factory or hub_class
    if arguments := _required_arguments(make_hub):
        name = hub_class.__name__
        call = f"map_hub(app, path, {name}, factory=lambda: {name}({arguments}))"
        raise TypeError(f"a {name} is made without arguments; use {call}")
    if not isinstance(path, str) or not re.fullmatch("/[^{}]*", path):
        raise ValueError(f'path must start with "/" and be no pattern, got {path!r}')
    options = dataclasses.replace(options or HubOptions(), **overrides)
    path = path.rstrip("/")
    if any(r.canonical == (path or "/") for r in app.router.resources()):
        raise ValueError(f"path: {path or '/'!r} is taken by another route")
    mapped, key = MappedHub(app, hub_class, make_hub, options), secrets.token_bytes(32)
    if backplane is not None:
        key = backplane.key
        mapped.registry.backplane = backplane.for_hub(path, mapped.registry)
        if backplane.context not in app.cleanup_ctx:
            app.cleanup_ctx.append(backplane.context)
    manager = ConnectionManager(mapped, Tokens(key, path))
    endpoint = Endpoint(options, manager)
    for slash in ("", "/"):  # ASP.NET accepts both
        app.router.add_route("*", f"{path}{slash}", endpoint.handle)
        app.router.add_route("*", f"{path}/negotiate{slash}", endpoint.handle_negotiate)
    if _MANAGERS not in app:
        app[_MANAGERS] = []
        app.on_response_prepare.append(_add_cors)
        app.on_shutdown.append(_stop_all)
    app[_MANAGERS].append(manager)
    app.on_startup.append(manager.start)
    connections = types.MappingProxyType(mapped.contexts)
    return HubContext(mapped.registry, mapped.shared, backplane, connections)


# ------------------------------------------------------------------- client
#
# A client for tests and scripts, made of the same messages and protocols. It uses
# WebSockets only, without negotiation.


class HubClient:
    """A client's connection to a hub, made by `connect`."""

    def __init__(
        self, websocket: aiohttp.ClientWebSocketResponse[Any], protocol: HubProtocol
    ) -> None:
        self._websocket, self._protocol = websocket, protocol
        self._inbox = Inbox(math.inf)
        self._ids = map(str, itertools.count(1))
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: What has arrived: arguments by target, answers by invocation id.
        self._received = defaultdict[str, deque[Any]](lambda: deque(maxlen=1000))
        self._answers: dict[str, deque[StreamItem | Completion]] = {}
        self._arrival = asyncio.Event()
        #: Why the connection has ended, once it has.
        self._end = ""

    async def __aenter__(self) -> typing.Self:
        request = _dumps({"protocol": self._protocol.name, "version": 1})
        await self._websocket.send_str(request + "\x1e")
        async with asyncio.timeout(HubOptions().handshake_timeout):
            while (record := self._inbox.read_record()) is None:
                await self._read()
        try:
            response = _json_object(record)
        except ProtocolError as problem:
            response = {"error": f"This is no hub: {problem}"}
        if "protocol" in response:
            response = {"error": "This is no hub: it sends back what it gets."}
        if response.get("error") is not None:
            raise HubException(response["error"])
        self._start(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await _end_tasks(self._tasks, (0, 1))  # `connect` closes the WebSocket

    def on(self, target: str, handler: Callable[..., Any]) -> None:
        """Call a function, plain or async, when the server calls `target`.

        Its return value is the answer if the server waits for one; an exception is
        answered as an error. `receive` does not return these calls.
        """
        self._handlers[target.lower()] = handler

    async def receive(self, target: str, timeout: float = 5) -> list[Any]:
        """Return the arguments of the next call of `target`, in order of arrival.

        The newest 1,000 are kept for it. Raises TimeoutError after `timeout` seconds,
        ConnectionError once disconnected.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._next(self._received[target.lower()])
        except TimeoutError:
            text = f"The server did not call {target!r} in {timeout} s."
            raise TimeoutError(text) from None

    async def send(self, target: str, *arguments: Any) -> None:
        """Call a method of the hub without waiting for it."""
        await self._call(Invocation(target, list(arguments)))

    @typing.overload
    async def invoke(self, target: str, *arguments: Any, returns: type[T]) -> T: ...

    @typing.overload
    async def invoke(
        self, target: str, *arguments: Any, returns: types.UnionType = ...
    ) -> Any: ...

    async def invoke(self, target: str, *arguments: Any, returns: Any = Any) -> Any:
        """Call a method of the hub and return its result.

        arguments: of any type that hubs can send; async iterators are uploaded.
        returns: the type of the result, converted like an argument of a hub method.
        Raises HubException with the error that the hub reports, ValueError if the
        result does not fit `returns`, ConnectionError if the connection ends.
        """
        convert = Converters(HubOptions()).make(returns)
        call = Invocation(target, list(arguments))
        async with contextlib.aclosing(self._answers_of(call)) as answers:
            return convert(await anext(answers, None))

    def stream(self, target: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield the items of a stream; leaving the loop early cancels it."""
        return self._answers_of(Invocation(target, list(arguments), streaming=True))

    async def _answers_of(self, call: Invocation) -> AsyncGenerator[Any, None]:
        """Send a call; yield the items of its stream, or its result if any."""
        id = call.invocation_id = next(self._ids)
        answers = self._answers[id] = deque()
        answer, uploads = None, list[asyncio.Task[None]]()
        try:
            uploads = await self._call(call)
            while isinstance(answer := await self._next(answers), StreamItem):
                yield answer.item
            if answer.error is not None:
                raise HubException(answer.error)
            if answer.result is not NO_RESULT:
                yield answer.result
        finally:
            del self._answers[id]
            for upload in uploads:
                upload.cancel()
            if not isinstance(answer, Completion):
                with contextlib.suppress(ConnectionError):
                    await self._write(CancelInvocation(id))

    async def _next(self, waiting: deque[T]) -> T:
        """Return what arrived first. Raises ConnectionError at the end."""
        while not waiting:
            if self._end:
                raise ConnectionError(self._end)
            await self._arrival.wait()
        return waiting.popleft()

    async def _call(self, call: Invocation) -> list[asyncio.Task[None]]:
        """Send a call; return the uploads of its arguments that are async iterators."""
        streams = [a for a in call.arguments if isinstance(a, AsyncIterable)]
        call.arguments = [a for a in call.arguments if not isinstance(a, AsyncIterable)]
        call.stream_ids = tuple(next(self._ids) for _ in streams)
        await self._write(call)
        uploads = map(self._upload, call.stream_ids, streams)
        return [self._start(upload) for upload in uploads]

    async def _upload(self, stream_id: str, items: AsyncIterable[Any]) -> None:
        end = Completion(stream_id, NO_RESULT)
        try:
            async for item in items:
                await self._write(StreamItem(stream_id, item))
        except Exception as error:  # noqa: BLE001 (user code)
            end.error = str(error)
        await self._write(end)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return task

    async def _write(self, message: Message) -> None:
        if self._end:
            raise ConnectionError(self._end)
        data, binary = self._protocol.encode(message), self._protocol.binary
        kind = aiohttp.WSMsgType.BINARY if binary else aiohttp.WSMsgType.TEXT
        await self._websocket.send_frame(data, kind)

    async def _read(self) -> None:
        """Read what the server sends next. Raises ConnectionError at the end."""
        data = (await self._websocket.receive()).data
        if not isinstance(data, (str, bytes)):  # no message
            raise ConnectionError("The connection was closed.")
        self._inbox.extend(data.encode() if isinstance(data, str) else data)

    async def _run(self) -> None:
        """Handle what arrives until the connection ends."""
        try:
            while True:  # messages may have come with the handshake
                for message, _ in self._protocol.decode(self._inbox, math.inf):
                    self._take(message)
                self._arrival.set()  # wakes all that wait now
                self._arrival.clear()
                await self._read()
        except (OSError, ProtocolError, asyncio.CancelledError) as error:
            self._end = self._end or str(error) or "The connection was closed."
            self._arrival.set()

    def _take(self, message: Message | None) -> None:
        match message:
            case Invocation(target) if target.lower() in self._handlers:
                self._start(self._handle(message))
            case Invocation(target, arguments, invocation_id=id):
                self._received[target.lower()].append(arguments)
                if id is not None:
                    text = "Client didn't provide a result."
                    self._start(self._write(Completion(id, NO_RESULT, text)))
            case StreamItem(id) | Completion(id) if id in self._answers:
                self._answers[id].append(message)
            case Close(error):
                self._end = error or "The connection was closed."

    async def _handle(self, message: Invocation) -> None:
        """Call a handler; answer if the server waits."""
        id, target = message.invocation_id, message.target
        try:
            handler = self._handlers[target.lower()]
            result = await _result_of(handler(*message.arguments))
            if id is not None:
                await self._write(Completion(id, result))
        except Exception as error:
            log.exception("the handler of %r failed", target)
            if id is not None:
                text = str(error).encode(errors="replace").decode()
                await self._write(Completion(id, NO_RESULT, text))


@contextlib.asynccontextmanager
async def connect(
    client: Any, url: str, *, protocol: str = "json", **options: Any
) -> AsyncIterator[HubClient]:
    """Connect to a hub: `async with connect(client, "/hubs/chat") as connection`.

    client: an aiohttp.ClientSession, or aiohttp's TestClient.
    url: of the hub; for a TestClient its path.
    protocol: "json", or "messagepack" if that package is installed.
    options: of `client.ws_connect`, such as headers={"Authorization": "Bearer …"}.
    Raises HubException if the handshake is refused, aiohttp.ClientError if there is no
    hub at the URL, ConnectionError or TimeoutError if it does not answer, and ValueError
    for a protocol that is unknown or not installed.
    """
    chosen = _load_protocols(HubOptions()).get(protocol)
    if chosen is None:
        raise ValueError(f"protocol {protocol!r} is unknown, or its package is missing")
    async with (
        client.ws_connect(url, max_msg_size=0, **options) as websocket,
        HubClient(websocket, chosen) as connection,
    ):
        yield connection


# --------------------------------------------------------------- operations
#
# Long-running work on asyncio tasks. An operation belongs to no request: it is
# started, found by its id, cancelled, and forgotten some time after its end.
# Pass `on_change` to report its progress to others.

NOT_STARTED, RUNNING = "NotStarted", "Running"
COMPLETED, FAULTED, CANCELED = "Completed", "Faulted", "Canceled"


class TooManyOperations(RuntimeError):
    """Too many operations are running, so another cannot start."""


@dataclass(eq=False, repr=False)
class Operation:
    """One piece of work. Read it at any time; only `Operations` changes it."""

    #: For people; given to `start`.
    name: str
    description: str
    #: Random, after the `prefix` of its Operations.
    id: str
    #: "NotStarted", then "Running", finally "Completed", "Faulted" or "Canceled".
    state: str = NOT_STARTED
    #: Percent, 0 to 100. Never falls, and is 100 only when completed.
    progress: int = 0
    #: How many times progress was reported, and the last status text.
    step: int = 0
    status: str = ""
    started_at: datetime | None = None
    completed_at: datetime | None = None
    #: What the work returned, or the exception it raised.
    result: Any = None
    error: BaseException | None = None
    #: Whether `cancel` was called; the work may go on for a while.
    cancel_requested: bool = False
    #: What runs it, and what forgets it once it is final; not in `to_dict`.
    task: asyncio.Task[None] = field(init=False)
    timer: asyncio.TimerHandle = field(init=False)

    def __repr__(self) -> str:
        return f"<Operation {self.name!r} {self.state} {self.progress}%>"

    def to_dict(self) -> dict[str, Any]:
        """Return the public fields as JSON values: times and the error as text."""
        fields = {k: v for k, v in vars(self).items() if k not in ("task", "timer")}
        for name in ("started_at", "completed_at"):
            fields[name] = fields[name] and fields[name].isoformat()
        fields["error"] = self.error and f"{type(self.error).__name__}: {self.error}"
        try:
            fields["result"] = json.loads(JSON.dumps_result(self.result))
        except (TypeError, ValueError, RecursionError):
            fields["result"] = repr(self.result)
        return fields

    @property
    def final(self) -> bool:
        """Whether the state can no longer change."""
        return self.state in (COMPLETED, FAULTED, CANCELED)

    async def wait(self) -> Operation:
        """Return the operation once it is final and `on_change` has returned.

        Cancelling this does not cancel the work.
        """
        await asyncio.wait([self.task])
        return self


@dataclass(frozen=True)
class Progress:
    """Reports progress from inside the work: `await progress(40, "sorting")`."""

    _operation: Operation
    _announce: Callable[[Operation], Awaitable[None]]
    _thread: threading.Thread = field(default_factory=threading.current_thread)

    def from_thread(self, percent: float, status: str = "") -> None:
        """Report progress from a thread, as of `asyncio.to_thread`, and wait for it.

        Cancelling an operation does not end its threads. This then raises
        asyncio.CancelledError in them, which ends the thread's function.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("use `await progress(…)` outside of threads")
        if self._operation.cancel_requested or self._operation.final:
            raise asyncio.CancelledError
        loop = self._operation.task.get_loop()
        asyncio.run_coroutine_threadsafe(self(percent, status), loop).result()

    async def __call__(self, percent: float, status: str = "") -> None:
        """Report progress; return after `on_change` has returned.

        percent: 0 to 100. A lower value than before changes nothing. 100 is shown
            and announced when the work returns, not while it still runs.
        status: a text for people; if empty, the last one is kept.
        Raises ValueError for a percentage out of range.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be from 0 to 100, got {percent!r}")
        operation = self._operation
        if operation.final:
            return
        operation.step += 1
        operation.progress = max(operation.progress, min(round(percent), 99))
        operation.status = status or operation.status
        if percent < 100:
            await self._announce(operation)


#: Async: takes a Progress, then the arguments given to `Operations.start`.
Work = Callable[..., Awaitable[Any]]


@dataclass(eq=False, repr=False, kw_only=True)
class Operations:
    """Starts operations, keeps the newest, and cancels them all on `close`.

    running: how many may be under way; `start` refuses more.
    limit: how many are kept; only final ones are forgotten, the oldest first.
    retention: seconds for which a final operation is kept.
    on_change: a function, plain or async, called with the operation when it
        starts, reports progress and ends. Its exceptions are only logged.
    prefix: what each id begins with, such as the id of a process.
    Raises ValueError for a limit below 1 or a negative retention.
    """

    running: int = 32
    limit: int = 1000
    retention: float = 3600
    on_change: Callable[[Operation], Awaitable[None] | None] | None = None
    prefix: str = ""
    _operations: dict[str, Operation] = field(default_factory=dict, init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if min(self.running, self.limit) < 1 or self.retention < 0:
            raise ValueError("running and limit: at least 1; retention: at least 0")

    def start(
        self, work: Work, *arguments: Any, name: str = "", description: str = ""
    ) -> Operation:
        """Run `await work(progress, *arguments)` in a task of its own.

        name, description: for people; the default name is the function's.
        Raises TooManyOperations if `running` are under way, RuntimeError after `close`,
        TypeError if `work` is not an async function.
        """
        if not _is_async(work):
            needed = "a function such as `async def work(progress, n)` and arguments"
            raise TypeError(f"start(work, 3) takes {needed}, not {work!r}")
        if self._closed:
            raise RuntimeError("Operations is closed; create a new one")
        if sum(not o.final for o in self._operations.values()) >= self.running:
            raise TooManyOperations(f"{self.running} operations are already running")
        name = name or getattr(work, "__name__", "operation")
        operation = Operation(name, description, self.prefix + _new_id())
        call = functools.partial(work, Progress(operation, self._announce), *arguments)
        operation.task = asyncio.create_task(self._run(operation, call))
        self._operations[operation.id] = operation
        self._forget_surplus()
        return operation

    def get(self, id: str) -> Operation | None:
        """Return an operation, or None if it is unknown or forgotten."""
        return self._operations.get(id)

    def list(self) -> list[Operation]:
        """Return the operations that are kept, newest first."""
        return list(self._operations.values())[::-1]

    def cancel(self, id: str) -> bool:
        """Cancel an operation. Return False if it is unknown or final already."""
        operation = self.get(id)
        if operation is None or operation.final:
            return False
        # A task that is cancelled before its first step would not become final.
        if operation.state == RUNNING and not operation.cancel_requested:
            operation.task.cancel()
        operation.cancel_requested = True
        return True

    def remove(self, id: str) -> bool:
        """Forget a final operation. Return False if it is unknown or running."""
        operation = self.get(id)
        if operation is None or not operation.final:
            return False
        self._operations.pop(id).timer.cancel()
        return True

    def _forget_surplus(self) -> None:
        final = [o.id for o in self._operations.values() if o.final]
        for id in final[: max(0, len(self._operations) - self.limit)]:
            self.remove(id)

    async def context(self, app: object) -> AsyncIterator[None]:
        """Open and close with an aiohttp application (for `app.cleanup_ctx`)."""
        self._closed = False
        yield
        await self.close()

    async def close(self) -> None:
        """Cancel all operations, wait up to 2 s for them, and refuse new ones."""
        self._closed = True
        operations = self.list()
        for operation in operations:
            self.cancel(operation.id)
        await _end_tasks([operation.task for operation in operations])

    async def _run(self, operation: Operation, call: Callable[[], Any]) -> None:
        """Take an operation through its states and announce each once."""
        try:
            if operation.cancel_requested:  # before the first step
                raise asyncio.CancelledError
            operation.state, operation.started_at = RUNNING, datetime.now(UTC)
            await self._announce(operation)
            operation.result = await call()
            operation.state, operation.progress = COMPLETED, 100
        except asyncio.CancelledError as error:
            operation.state, operation.error = CANCELED, error
        except (Exception, SystemExit) as error:
            operation.state, operation.error = FAULTED, error
            log.exception("operation %r failed", operation.name)
        operation.completed_at, forget = datetime.now(UTC), self._operations.pop
        loop = asyncio.get_running_loop()
        operation.timer = loop.call_later(self.retention, forget, operation.id, None)
        self._forget_surplus()
        await self._announce(operation)

    async def _announce(self, operation: Operation) -> None:
        try:
            if self.on_change is not None:
                await _result_of(self.on_change(operation))
        except (Exception, SystemExit):
            log.exception("on_change failed for operation %r", operation.name)


# ----------------------------------------------------------------- schedule
#
# Jobs on the wall clock. For each, one task sleeps until it is due; each run is a
# task of its own, so a slow job delays no other. A due time that passes while the
# loop is busy or the machine sleeps runs late, once for all that were missed.

#: The fields of a cron expression: lowest and highest value, words for 0, 1, 2, …
_CRON_FIELDS = {
    "seconds": (0, 59, ""),
    "minutes": (0, 59, ""),
    "hours": (0, 23, ""),
    "day of month": (1, 31, ""),
    "month": (1, 12, "- jan feb mar apr may jun jul aug sep oct nov dec"),
    "day of week": (0, 7, "sun mon tue wed thu fri sat"),
}


def _parse_cron_field(name: str, field: str) -> set[int]:
    """Read lists of *, ?, values, words, ranges and steps. Raises ValueError."""
    low, high, words = _CRON_FIELDS[name]
    values = {form % n: n for n in range(low, high + 1) for form in ("%d", "%02d")}
    values |= {word: n for n, word in enumerate(words.split())}
    found: set[int] = set()
    for item in field.lower().split(","):
        match = re.fullmatch(r"(?:[*?]|(\w+)(?:-(\w+))?)(?:/0*([1-9][0-9]*))?", item)
        if match is None or not {*match.group(1, 2)} <= {None, *values}:
            raise ValueError(f"{name}: {item!r} is no value or range in {low}-{high}")
        first, last, step = match.groups()
        start = values[first] if first else low
        end = start if first and not step else high  # 5/10 goes to the end
        if last:
            end = values[last]
        if start > end and name == "day of week":
            end += 7  # fri-mon goes on into the next week
        if start > end:
            raise ValueError(f"{name}: {item!r} runs backwards")
        found.update(range(start, end + 1, int(step or 1)))
    return found


#: Finds the first due time after a moment, both in seconds since 1970.
DueAfter = Callable[[float], float]


def _parse_cron(expression: str) -> DueAfter:
    """Read a six-field cron expression, seconds first, in local time.

    An hour that summer time skips has no due times. One that it repeats has them
    twice for jobs of every hour, once for others.
    """
    parts = str.split(expression)  # raises TypeError for anything else
    if len(parts) != len(_CRON_FIELDS):
        names = ", ".join(_CRON_FIELDS)
        raise ValueError(f"cron() needs six fields ({names}), got {expression!r}")
    values = map(_parse_cron_field, _CRON_FIELDS, parts)
    seconds, minutes, hours, days, months, weekdays = values
    weekdays = {day % 7 for day in weekdays}
    # As in every cron: if both kinds of day are restricted, either may match.
    both_restricted = parts[3][0] not in "*?" and parts[5][0] not in "*?"
    needed = any if both_restricted else all
    hourly = len(hours) == 24

    def after(moment: float) -> float:
        stamp = math.floor(moment) + 1
        end = stamp + 366 * 8 * 86400  # a 29 February may be eight years away
        while stamp < end:
            shown = datetime.fromtimestamp(stamp)
            day_fits = (shown.day in days, shown.isoweekday() % 7 in weekdays)
            if shown.month not in months or not needed(day_fits):
                today = shown.replace(hour=0, minute=0, second=0, fold=0)
                stamp = int((today + timedelta(days=1)).timestamp())
            elif shown.hour not in hours or (shown.fold and not hourly):
                stamp += 3600 - 60 * shown.minute - shown.second
            elif shown.minute not in minutes:
                stamp += 60 - shown.second
            elif shown.second not in seconds:
                stamp += 1
            else:
                return stamp
        return math.inf

    if after(1e9) == math.inf:
        raise ValueError(f"day of month: no date matches {expression!r}")
    return after


@dataclass(eq=False)
class _Job:
    """A function, its due times and its runs."""

    name: str
    function: Callable[[], Any]
    schedule: str
    due_after: DueAfter
    #: The last due time and the next.
    due: float = -math.inf
    next: float = math.inf
    last_run: datetime | None = None
    #: Seconds between the last run and its due time.
    late: float = 0.0
    suspended: bool = False
    runs: int = 0
    failures: int = 0
    #: What waits for the due times, and the last run.
    timer: asyncio.Task[None] | None = None
    task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def next_run(self) -> datetime | None:
        return None if self.suspended else datetime.fromtimestamp(self.next, UTC)

    def plan(self, now: float) -> None:
        """Set the next due time; never one that already ran, if the clock is set back."""
        self.next = self.due_after(now)
        if self.next == self.due:
            self.next = self.due_after(self.next)

    def start(self, now: float) -> None:
        """Start a run, however late, unless the last one still runs."""
        self.due = self.next
        if self.running:
            log.warning("job %s skipped a run: the last one still runs", self.name)
            return
        self.late = now - self.due
        if self.late > 1:
            log.warning("job %s started %.1f s late", self.name, self.late)
        self.runs += 1
        self.last_run = datetime.fromtimestamp(now, UTC)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await _result_of(self.function())
        except (Exception, SystemExit):
            self.failures += 1
            log.exception("job %s failed and runs again next time", self.name)


@dataclass(eq=False, repr=False, kw_only=True)
class Schedule:
    """Runs functions on the clock, without an external scheduler.

    Register jobs with `every` or `cron`. They run between `start` and `close`, or
    with an application: `app.cleanup_ctx.append(schedule.context)`. Registering
    a job while an event loop runs starts the schedule by itself.

    clock, sleep: the time in seconds since 1970 and an async sleep, for tests.
    """

    clock: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    _jobs: dict[str, _Job] = field(default_factory=dict, init=False)
    _closed: bool = field(default=False, init=False)

    def every(self, seconds: float, *, name: str = "") -> Callable[[F], F]:
        """Run the decorated function at every multiple of `seconds`.

        Multiples are of the clock: 30 means :00 and :30 of each minute. The job
        has the function's name unless `name` is given. Raises TypeError if
        `seconds` is no number, ValueError below 0.001 s or for a name in use.
        """
        if isinstance(seconds, bool) or not 0.001 <= seconds < math.inf:
            raise ValueError(f"every() needs at least 0.001 seconds, got {seconds!r}")

        def after(moment: float) -> float:
            due = (moment // seconds + 1) * seconds
            return due if due > moment else (moment // seconds + 2) * seconds

        return functools.partial(self._register, name, f"every {seconds:g} s", after)

    def cron(self, expression: str, *, name: str = "") -> Callable[[F], F]:
        """Run the decorated function when six fields match the local time.

        expression: seconds, minutes, hours, day of month, month, day of week;
            each with lists (1,15), ranges (mon-fri), steps (*/10) and names.
        Raises ValueError that names the wrong field, or for a name in use, and
        TypeError if `expression` is no string.
        """
        after = _parse_cron(expression)
        return functools.partial(self._register, name, expression, after)

    def _register(self, name: str, schedule: str, after: DueAfter, function: F) -> F:
        name = name or getattr(function, "__name__", "job")
        if name in self._jobs:
            raise ValueError(f"job name {name!r} is in use; choose another")
        job = self._jobs[name] = _Job(name, function, schedule, after)
        job.plan(self.clock())
        with contextlib.suppress(RuntimeError):  # no loop yet: start() comes later
            asyncio.get_running_loop()
            if not self._closed:
                self.start()
        return function

    def report(self) -> list[dict[str, Any]]:
        """Describe every job: name, schedule, state, last and next run, counts.

        "late" is the number of seconds from the last run's due time to its start.
        """
        keys = ["name", "schedule", "suspended", "running", "last_run", "late"]
        keys += ["next_run", "runs", "failures"]
        return [{k: getattr(job, k) for k in keys} for job in self._jobs.values()]

    def suspend(self, name: str) -> None:
        """Do not run a job until `resume`. Raises KeyError for an unknown name."""
        self._jobs[name].suspended = True

    def resume(self, name: str) -> None:
        """Run a suspended job at its next due time. Raises KeyError."""
        job = self._jobs[name]
        job.suspended = False
        job.plan(self.clock())

    def cancel(self, name: str) -> None:
        """Remove a job, and cancel its run if there is one. Raises KeyError."""
        job = self._jobs.pop(name)
        for task in filter(None, (job.timer, job.task)):
            task.cancel()

    def start(self) -> None:
        """Begin to run jobs, from now on. Needs a running event loop."""
        self._closed = False
        for job in self._jobs.values():
            if job.timer is None or job.timer.done() or job.timer.cancelling():
                job.plan(self.clock())
                job.timer = asyncio.create_task(self._serve(job))

    async def close(self) -> None:
        """Stop, and cancel the jobs that run."""
        self._closed = True
        jobs = self._jobs.values()
        tasks = {task for job in jobs for task in (job.timer, job.task) if task}
        for task in tasks - {asyncio.current_task()}:
            task.cancel()
        await _end_tasks(tasks)

    async def context(self, app: object) -> AsyncIterator[None]:
        """Run with an aiohttp application (for `app.cleanup_ctx`)."""
        self.start()
        yield
        await self.close()

    async def _serve(self, job: _Job) -> None:
        """Start a job whenever it is due."""
        while True:
            now = self.clock()
            if job.next <= now and not job.suspended:
                job.start(now)
            job.plan(now)  # each time: the clock may have been set back
            # Never for long: the clock may be set during this sleep.
            await self.sleep(max(0.0, min(job.next - self.clock(), 30.0)))


# --------------------------------------------------------------------- page
#
# The demo's page and a small SignalR client in plain JavaScript, which pages of your
# own can import as well. They need no other file and no other host. `create_app`
# writes the hub's path into the page's meta tag.

CLIENT_JS = r"""// A SignalR client in plain JavaScript:
//
//   import { HubConnection } from "./kestrun.js";
//   const connection = new HubConnection("hubs/kestrun");
//   connection.on("ReceiveEcho", (text) => console.log(text));
//   await connection.start();
//   await connection.invoke("Echo", "Hello");
//
// It speaks the JSON protocol: each hub message is a JSON object followed by the
// character 0x1E. Messages travel over a WebSocket or, where WebSockets are blocked,
// over Server-Sent Events and POST. Out of scope: long polling, upload streams,
// MessagePack, stateful reconnect.

const INVOCATION = 1, COMPLETION = 3, STREAM_INVOCATION = 4;
const CANCEL_INVOCATION = 5, PING = 6, CLOSE = 7, END = "\x1e";
const PING_INTERVAL = 10_000, SERVER_TIMEOUT = 30_000;  // milliseconds
const RETRY_DELAYS = [0, 2, 10, 30];                    // seconds; the last one repeats

export class HubConnection {
  state = "Disconnected";   // or Connecting, Connected, Reconnecting, Unauthorized
  transport = "";           // the name of the transport in use
  onstate = () => {};       // called with the new state and { reason, delay }
  onmessage = () => {};     // called with "sent" or "received" and each hub message
  #handlers = new Map();    // what `on` registered: name in lower case -> function
  #pending = new Map();     // invocation id -> function that takes items and completion
  #failures = 0;            // transports that did not open; the next one is tried
  #link = null;             // this attempt's transport; what comes of others is ignored
  #timer = 0;               // of the server's silence, or until the next attempt
  #retries = 0;             // since a connection lasted long enough to send a ping
  #lastId = 0;
  #lastPing = 0;
  #started = null;          // the promise of `start`, with resolve and reject

  /** token: a function that returns the access token, called for each attempt. */
  constructor(url, { token = () => null } = {}) {
    this.url = new URL(url, location.href).href;
    this.token = token;
  }

  /** Call a function when the server calls `target`. Its result is the answer. */
  on(target, handler) {
    this.#handlers.set(target.toLowerCase(), handler);
  }

  /** Connect, maybe after retries; throw if the token is refused, or after `stop`. */
  start() {
    this.#reset();
    this.#retries = this.#failures = 0;
    this.#started = Promise.withResolvers();
    this.#started.promise.catch(() => {});   // callers may rely on `onstate` instead
    this.#connect();
    return this.#started.promise;
  }

  stop() {
    this.#reset();
    this.#setState("Disconnected");
  }

  /** Call a method of the hub; return its result, or throw its error. */
  async invoke(target, ...args) {
    return (await this.#call(INVOCATION, target, args).next()).value;
  }

  /** Yield the items of a stream: `for await (const n of c.stream("Counter", 3))`. */
  stream(target, ...args) {
    return this.#call(STREAM_INVOCATION, target, args);
  }

  async *#call(type, target, args) {   // yields items, returns the result
    if (this.state !== "Connected") throw new Error("There is no connection.");
    const invocationId = String(++this.#lastId), answers = [];
    let wake;
    this.#pending.set(invocationId, (answer) => { answers.push(answer); wake?.(); });
    this.#send({ type, invocationId, target, arguments: args });
    try {
      while (true) {
        if (!answers.length) await new Promise((resolve) => { wake = resolve; });
        const { type, item, result, error } = answers.shift();
        if (error) throw new Error(error);
        if (type === COMPLETION) return result;
        yield item;
      }
    } finally {             // also when the reader leaves the loop
      if (this.#pending.delete(invocationId)) {
        this.#send({ type: CANCEL_INVOCATION, invocationId });
      }
    }
  }

  // Connecting: negotiate, open a transport, shake hands.

  async #connect() {
    const attempt = this.#link = { close() {} };   // until there is a transport
    this.#setState(this.state === "Reconnecting" ? "Reconnecting" : "Connecting");
    try {
      const url = `${this.url}/negotiate?negotiateVersion=1`;
      const answer = await request("POST", url, { token: this.token() })
        .catch((error) => { this.#failures = 0; throw error; });   // no transport's fault
      if (attempt === this.#link) this.#open(answer);
    } catch (error) {
      if (attempt !== this.#link) return;
      if (error.status === 401) return this.#setState("Unauthorized");
      this.#lost(error.message);
    }
  }

  #open({ error, connectionId, connectionToken, availableTransports: available }) {
    if (error) throw new Error(error);
    this.connectionId = connectionId;   // no secret, unlike the token
    const names = available.map((one) => one.transport).filter((name) => name in TRANSPORTS);
    if (!names.length) throw new Error("The server offers no transport of this client.");
    const name = this.transport = names[this.#failures % names.length];
    this.#failures += 1;                // until the handshake has succeeded
    const query = new URLSearchParams({ id: connectionToken });
    // Neither transport can send an Authorization header, so the query has the token.
    if (this.token()) query.set("access_token", this.token());
    const link = this.#link = TRANSPORTS[name](`${this.url}?${query}`);
    link.onopen = () => this.#send({ protocol: "json", version: 1 });
    link.onmessage = ({ data }) => this.#receive(data, link);
    link.onclose = link.onerror = () => {
      if (link === this.#link) this.#lost(this.state === "Connected"
        ? "The connection was lost." : `${name} did not reach the server.`);
    };
    this.#expectData();
  }

  // Messages.

  #send(message) {
    this.#link?.send(JSON.stringify(message) + END);
    this.onmessage("sent", message);
  }

  #receive(data, link) {    // data: one or several whole messages
    this.#expectData();
    for (const text of data.split(END).slice(0, -1)) {
      if (link !== this.#link) return;       // the previous message has ended it
      const message = JSON.parse(text);
      this.onmessage("received", message);
      this.#dispatch(message);
    }
    // The server pings every 15 s. A ping in reply needs no timer, which the browser
    // would slow down while the page is hidden.
    if (this.state === "Connected" && Date.now() - this.#lastPing >= PING_INTERVAL) {
      this.#lastPing = Date.now();
      this.#retries = 0;       // this connection has lasted
      this.#send({ type: PING });
    }
  }

  #dispatch(message) {
    const { type, invocationId, error, allowReconnect = false } = message;
    if (this.state !== "Connected") {        // this is the handshake's answer
      if (error) return this.#lost(error);
      this.#failures -= 1;
      this.#lastPing = Date.now();
      return this.#setState("Connected");
    }
    if (type === INVOCATION) return this.#answer(message);
    this.#pending.get(invocationId)?.(message);
    if (type === COMPLETION) this.#pending.delete(invocationId);
    if (type === CLOSE) this.#lost(error, allowReconnect);
  }

  async #answer({ invocationId, target, arguments: args }) {
    const link = this.#link, answer = { type: COMPLETION, invocationId };
    const handler = this.#handlers.get(target.toLowerCase());
    try {
      if (invocationId && !handler) throw new Error(`Nothing handles ${target}.`);
      answer.result = await handler?.(...args) ?? null;
    } catch (error) {
      if (!invocationId) return reportError(error);   // to the console
      answer.error = error.message;
    }
    if (invocationId && link === this.#link) this.#send(answer);
  }

  // The end of a connection.

  #expectData() {           // restart the server timeout
    clearTimeout(this.#timer);
    this.#timer = setTimeout(
      () => this.#lost("The server sent nothing for 30 seconds."), SERVER_TIMEOUT);
  }

  #lost(reason = "The server closed the connection.", reconnect = true) {
    this.#reset();
    if (!reconnect) return this.#setState("Disconnected", { reason });
    const delay = RETRY_DELAYS[Math.min(this.#retries++, RETRY_DELAYS.length - 1)];
    this.#timer = setTimeout(() => this.#connect(), delay * 1000);
    const state = this.state === "Connecting" ? this.state : "Reconnecting";
    this.#setState(state, { reason, delay });
  }

  #reset() {                // close the transport, ignore its events, fail pending calls
    clearTimeout(this.#timer);
    this.#link?.close();
    this.#link = null;
    const error = "The connection was lost before the server answered.";
    this.#pending.forEach((take) => take({ type: COMPLETION, error }));
    this.#pending.clear();
  }

  #setState(state, detail = {}) {
    this.state = state;
    if (state === "Connected") this.#started.resolve();
    const ended = ["Disconnected", "Unauthorized"].includes(state);
    if (ended) this.#started?.reject(new Error(detail.reason ?? `${state}.`));
    this.onstate(state, detail);
  }
}

// A transport opens a URL. Its events and methods are those of a WebSocket.

const TRANSPORTS = {
  WebSockets: (url) => new WebSocket(url.replace("http", "ws")),

  ServerSentEvents(url) {               // events bring messages, POST takes them
    const source = new EventSource(url);
    let posted = Promise.resolve();     // one POST after another keeps the order
    const post = (body) => request("POST", url, { body }).catch(() => source.onerror());
    source.send = (text) => { posted = posted.then(() => post(text)); };
    return source;
  },
};

/** Return the body of a response; throw an error in a sentence if there is none. */
export async function request(method, url, { token, body } = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const signal = AbortSignal.timeout(SERVER_TIMEOUT);
  const response = await fetch(url, { method, headers, body, signal })
    .catch(() => { throw new Error("The server cannot be reached. Is it running?"); });
  const type = response.headers.get("Content-Type") ?? "", { status } = response;
  const answer = await (type.includes("json") ? response.json() : response.text());
  if (response.ok) return answer;
  // The API explains errors in JSON, the hub in plain text or not at all.
  const text = type.startsWith("text/plain") ? answer : answer.Message;
  const message = text || `The server answered with status ${status}.`;
  throw Object.assign(new Error(message), { status });
}
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="hub" content="hubs/kestrun">
<title>Kestrun</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg
  xmlns='http:%2F%2Fwww.w3.org%2F2000%2Fsvg' viewBox='0 0 24 24' fill='none'
  stroke='%23b8683a' stroke-width='2.6' stroke-linecap='round' %3E%3Cpath
  d='M3 21C4 10 11 3 21 3M3 21C8 14 13 11 20 11M3 21C8 18 12 17 17 18'/%3E%3C/svg%3E">
<style>
  :root {
    color-scheme: light dark;
    --paper: light-dark(#eef2f5, #10161c); --panel: light-dark(#fdfefe, #182028);
    --raised: light-dark(#edf2f6, #232e38); --ink: light-dark(#17222c, #dfe7ee);
    --muted: light-dark(#51606d, #9aa9b6); --line: light-dark(#dbe2e9, #2a3540);
    --edge: light-dark(#7a8997, #677683); --accent: light-dark(#235f8c, #86b9e2);
    --feather: light-dark(#a9582b, #e0935f); --good: light-dark(#1c6b48, #7ccba2);
    --warn: light-dark(#855000, #e6b566); --bad: light-dark(#b02a20, #f0938a);
  }
  * { box-sizing: border-box; min-width: 0; margin: 0; padding: 0; scrollbar-width: thin; }
  [hidden], #operations:empty { display: none !important; }
  body { display: flex; flex-direction: column; gap: 1rem; min-height: 100dvh;
    max-width: 90rem; margin: auto; padding: 1rem; color: var(--ink);
    background: var(--paper); font: .875rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
  .row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
  header.row, aside { column-gap: 2rem; }
  #connection, #log-panel h2, .short, .message { margin-right: auto; }
  path { fill: none; stroke: var(--feather); vector-effect: non-scaling-stroke; }
  h1 { font-size: 1.5rem; line-height: 1.2; }
  h2 { font-size: 1.0625rem; overflow-wrap: normal; }
  p, label, dt, summary, time, #detail, ::after, [data-kind="Answer"] * { color: var(--muted); }
  b, a { color: var(--ink); }
  pre, time, #frames li { font: .75rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
  main, fieldset, section { display: grid; gap: 1rem; border: 0; }
  section, #wire, #token-form { padding: 1rem 1.125rem; border: 1px solid var(--line);
    border-radius: .75rem; background: var(--panel); gap: .625rem; }
  form.row { align-items: end; line-height: 1.75; }
  label, input { display: block; flex: 1 1 4.75rem; width: 100%; max-width: 27rem; }
  input, button { min-height: 2.75rem; padding: 0 .75rem; border: 1px solid var(--edge);
    border-radius: .5rem; background: var(--panel); color: var(--ink); font: inherit; }
  button { border-color: var(--line); background: var(--raised); cursor: pointer; }
  :is(#operations, #log-panel) button { min-width: 2.75rem; padding: 0 .5rem; }
  button:hover { border-color: var(--edge); }
  .main { border-color: var(--accent); background: var(--accent); color: var(--panel); }
  :is(button, input):disabled { opacity: .5; cursor: default; }
  summary, a { margin: -.5rem 0 -.75rem; padding: 1rem 0; cursor: pointer; }
  pre { margin: .5rem -.5rem 0; padding: .625rem .5rem; border-radius: .5rem;
    background: var(--raised); white-space: pre-wrap; }
  :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }

  #numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr));
    flex: 0 1 36rem; gap: .25rem 1rem; white-space: nowrap; }
  body:not([data-state="Connected"]) :is(dd, #groups) { opacity: .6; }
  dd, #state { font-size: 1rem; font-weight: 600; font-variant-numeric: tabular-nums; }
  dt[class]::before { content: "▬" / ""; margin-right: .375rem; color: var(--feather); }
  .clients { --feather: var(--accent); }
  #plot { display: block; width: 100%; height: 1.5rem; box-shadow: 0 1px var(--line); }
  #connection { min-width: 17rem; min-height: 2.875rem; }   /* with or without its button */
  #state::before { content: "●" / ""; margin-right: .375rem; color: var(--warn); }
  [data-state="Connected"] #state::before { color: var(--good); }

  li { list-style: none; padding: .3125rem 0; border-bottom: 1px solid var(--line); }
  #groups li { padding: .125rem .75rem; border: 1px solid var(--edge); border-radius: 1rem; }
  #groups [data-size]::after { content: " · " attr(data-size); }
  [data-ended] .cancel, #operations li:not([data-ended]) .remove,
  body:not(:has([data-ended])) #clear-finished { display: none; }
  progress, #token-hint { flex: 1 0 100%; accent-color: var(--feather); }

  #log-panel { grid-template-rows: auto 1fr; }
  #scroll { overflow-y: auto; border-top: 1px solid var(--line); }
  #frames { overflow-y: auto; max-height: 18rem; margin-top: .5rem; }
  :is(#log, #frames):not(:has(> :not([hidden])))::after { content: "No entries"; }
  #groups:empty::after { content: "This page is in no group."; }
  #log li { gap: 0 .75rem; align-items: baseline; }
  strong { flex: 0 0 13.25rem; color: var(--accent); font-size: .8125rem; }
  #log span, aside p { flex: 1 1 15rem; }    /* below its heading if space is short */
  [data-kind~="Warning"] strong { color: var(--warn); }
  [data-kind~="Error"] strong { color: var(--bad); }
  @media (width < 46rem) {                   /* the log is docked at the bottom */
    html { scroll-padding-bottom: 50dvh; }   /* keeps the focus above it */
    #log-panel { max-height: 50dvh; position: sticky; bottom: 0; margin: 0 -1rem -1rem;
      padding: .5rem 1rem; gap: .5rem; border-width: 1px 0 0; border-radius: 0; }
    .folded :is(#filter, #pause, #copy, #clear, #scroll),
    #log-panel:not(.folded) #newest { display: none; }
    #newest { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
    #log-panel:not(.folded) h2 { position: absolute; clip-path: inset(50%); }
  }
  @media (width >= 46rem) {                  /* two columns that scroll on their own */
    body { height: max(100dvh, 40rem); padding: 1.25rem 2rem 2rem; }
    #fold, #newest { display: none; }
    main { flex: 1; min-height: 0; grid-template: minmax(0, 1fr) / clamp(20rem, 38%, 29rem) 1fr; }
    .controls { overflow-y: auto; grid-auto-rows: max-content; border-radius: .75rem; }
  }
</style>
</head>
<body>
<header class="row">
  <div class="brand row">
    <svg viewBox="0 0 24 24" width="44" stroke-width="4" stroke-linecap="round" aria-hidden="true">
      <path d="M3 21C4 10 11 3 21 3M3 21C8 14 13 11 20 11M3 21C8 18 12 17 17 18"/></svg>
    <div><h1>Kestrun</h1> <p>A SignalR server in one Python file</p></div>
  </div>
  <div id="connection" class="row">
    <div><output id="state">Connecting</output> <div id="detail"></div></div>
    <button id="retry" form="actions" hidden>Try now</button>
  </div>
  <dl id="numbers">
    <div><dt class="clients">Clients</dt> <dd id="clients">–</dd></div>
    <div><dt class="rate">Messages/s</dt> <dd id="rate">–</dd></div>
    <div><dt>Round trip</dt> <dd id="round-trip">–</dd></div>
    <div><dt>Uptime</dt> <dd id="uptime">–</dd></div>
    <div><dt>Last minute</dt> <dd>
      <svg id="plot" viewBox="0 0 59 20" preserveAspectRatio="none" role="img">
        <title>Clients and messages a second during the last minute</title>
        <path class="clients"/><path class="rate"/></svg></dd></div>
  </dl>
</header>

<form id="token-form" class="row" aria-label="Access" hidden>
  <p id="token-hint">This server requires a token.</p>
  <label>Token <input id="token" type="password" autocomplete="off" required
    pattern="[ -~]+" title="Latin letters, digits and signs"></label>
  <button id="token-send" class="main">Connect</button>
</form>

<aside class="row"><p><b>New to SignalR?</b> It keeps a connection open, over which the server
  calls functions of this page, and the page those of the server. Open this page in
  <a href="" target="_blank" rel="noopener">a&nbsp;second&nbsp;tab</a>, press <b>Join</b> in both,
  then <b>Broadcast</b>.</p> <a id="monitor" href="monitor" hidden>Watch the server</a></aside>

<main>
  <fieldset class="controls" disabled>
    <noscript>This page needs JavaScript to talk to the server.</noscript>
    <section>
      <h2>To everyone</h2>
      <p>The server calls a function in every open page.</p>
      <form class="row">
        <button id="log-information" name="log" value="Information">Information</button>
        <button id="log-warning" name="log" value="Warning">Warning</button>
        <button id="log-error" name="log" value="Error">Error</button>
        <button id="event">Custom event</button>
      </form>
      <form class="row">
        <label>Echo, to this page only <input id="echo" value="Hello" required></label>
        <button id="echo-send">Send</button>
      </form>
      <details><summary>The code behind this</summary>
<pre>import { HubConnection } from "./kestrun.js";
const connection = new HubConnection("hubs/kestrun");
connection.on("ReceiveLog", (log) => console.log(log));
await connection.start();
await connection.invoke("Echo", "Hello");</pre>
<pre>class MyHub(kestrun.Hub):
    async def echo(self, hi):
        await self.clients.caller.send("ReceiveEcho", hi)
        await self.clients.all.send("ReceiveLog", hi)
hub = kestrun.map_hub(app, "/hubs/kestrun", MyHub)</pre>
      </details>
    </section>

    <section>
      <h2>Groups</h2>
      <p>A message to a group reaches its members only.</p>
      <form class="row">
        <label>Group <input id="group" value="Admins" required></label>
        <button id="join" class="main">Join</button>
        <button id="leave">Leave</button>
        <button id="broadcast" name="group" value="broadcast">Broadcast</button>
        <button id="ask-join" name="group" value="join">Ask others to join</button>
        <button id="ask-leave" name="group" value="leave">Ask others to leave</button>
      </form>
      <ul id="groups" class="row" aria-label="Groups this page is in"></ul>
      <details><summary>The code behind this</summary>
<pre>connection.on("GroupJoined", (name) => console.log(name));
connection.on("ReceiveGroupMessage", (message) => {
  console.log(message);
});
await connection.invoke("JoinGroup", "Admins");</pre>
<pre>class MyHub(kestrun.Hub):
    async def join_group(self, name):
        me, group = self.context, self.clients.group(name)
        await self.groups.add(me.connection_id, name)
        await group.send("ReceiveGroupMessage", "Hi")</pre>
      </details>
    </section>

    <section>
      <h2>Long operations</h2>
      <p>Work on the server reports its progress to every page.</p>
      <form class="row">
        <label>Seconds <input id="seconds" type="number" min="1" max="3600" value="5"></label>
        <button id="start" class="main">Start</button>
        <button id="clear-finished" formnovalidate>Clear finished</button>
      </form>
      <ul id="operations" aria-label="Operations, newest first"></ul>
      <template id="operation"><li class="row">
        <b class="name">Operation</b> <span class="short"></span>
        <span class="elapsed"></span> <output class="state"></output>
        <progress max="100" value="0"></progress> <p class="message"></p>
        <form class="row"><button name="status" class="status">Status</button>
          <button name="cancel" class="cancel">Cancel</button>
          <button name="remove" class="remove">Remove</button></form>
      </li></template>
      <details><summary>The code behind this</summary>
<pre>connection.on("ReceiveEvent", ({ eventName, data }) => {
  if (eventName !== "OperationProgress") return;
  console.log(data.Progress, data.Message);
});
await fetch("api/operation/start", { method: "POST" });</pre>
<pre>async def work(progress):
    for step in range(1, 6):
        await asyncio.sleep(1)
        await progress(20 * step, f"Step {step} of 5")
operation = operations.start(work, name="LongOperation")</pre>
      </details>
    </section>

    <details id="wire"><summary><b>Hub messages as they travel</b></summary>
      <p>Type 1 calls a function, 3 is an answer, 4 starts a stream, 6 is a ping that
        keeps the connection open. Newest first, without streams' items, type 2.</p>
      <ol id="frames" tabindex="0" aria-label="Hub messages, newest first"></ol>
    </details>
  </fieldset>

  <section id="log-panel" class="folded" aria-labelledby="log-title">
    <div class="row">
      <h2 id="log-title">Log</h2> <p id="newest"></p>
      <input id="filter" type="search" placeholder="Filter" aria-label="Filter the log">
      <button id="pause" form="actions">Pause</button>
      <button id="copy" form="actions" title="Copy as JSON lines">Copy</button>
      <button id="clear" form="actions">Clear</button>
      <button id="fold" form="actions" aria-expanded="false">Unfold</button>
    </div>
    <div id="scroll" role="log" tabindex="0" aria-labelledby="log-title">
      <form id="actions"><fieldset disabled><ol id="log"></ol></fieldset></form></div>
  </section>
</main>

<script type="module">
// The page. Everything received is written with textContent, never as HTML: what other
// clients send stays text.

import { HubConnection, request } from "./kestrun.js";

const byId = (id) => document.getElementById(id);
const token = () => sessionStorage.getItem("kestrun-token");
const hubPath = document.querySelector("meta[name=hub]").content;
const connection = new HubConnection(hubPath, { token });   // works under a sub-path
const call = (method, path) => request(method, `api/${path}`, { token: token() });

function element(name, text, properties) {
  return Object.assign(document.createElement(name), { textContent: text }, properties);
}

// The log: its newest entries, drawn once a frame, however many come.

const waiting = [];         // entries that are not drawn yet
let paused = false;

function note(kind, text, more) {
  if (!waiting.length) requestAnimationFrame(drawLog);
  waiting.push({ time: new Date().toISOString(), kind, text, ...more });
  if (waiting.length > 500) waiting.shift();
}

function drawLog() {        // adds 20 at most, so that the page stays quick
  const list = byId("log"), { scrollHeight, scrollTop, clientHeight } = byId("scroll");
  const wanted = byId("filter").value.toLowerCase();
  list.append(...waiting.splice(0, paused ? 0 : 20).map(makeItem));
  while (list.children.length > 500) list.firstChild.remove();
  for (const item of list.children) {
    item.hidden = !item.textContent.toLowerCase().includes(wanted);
  }
  const atEnd = scrollHeight - scrollTop - clientHeight < 32;   // it was, before this
  if (atEnd) byId("scroll").scrollTop = byId("scroll").scrollHeight;
  if (waiting.length && !paused) requestAnimationFrame(drawLog);
}

function makeItem(entry) {
  const { time, kind, text, action, group } = entry;
  const item = element("li", "", { className: "row", entry });
  const clock = element("time", new Date(time).toTimeString().slice(0, 8), { dateTime: time });
  item.dataset.kind = kind;
  item.append(clock, element("strong", kind), element("span", text));
  const name = action?.toLowerCase();         // such as "join" in an invitation
  if (action) item.append(element("button", action, { name, value: group }));
  byId("newest").textContent = text;          // all that a folded log shows
  return item;
}

/** Run an action and write its answer or its error to the log. */
async function perform(action) {
  try {
    const answer = await action();
    const { TaskId, Message = answer } = answer ?? {};
    if (Message) note("Answer", TaskId ? `${short(TaskId)} · ${Message}` : Message);
  } catch (error) {
    note("Error", error.message);
  }
}

// The connection.

const states = { Reconnecting: "Connection lost.", Unauthorized: "Token required" };
const transports = { WebSockets: "WebSockets", ServerSentEvents: "Server-Sent Events" };
let countdown = 0, focused = null, explained = false;

connection.onstate = (state, { reason, delay }) => {
  const connected = state === "Connected", previous = document.body.dataset.state;
  document.body.dataset.state = state;
  byId("state").textContent = states[state] ?? state;
  byId("retry").hidden = !delay && state !== "Disconnected";
  byId("token-form").hidden ||= connected;
  if (previous === "Connected") focused = document.activeElement;
  document.querySelectorAll("fieldset").forEach((set) => { set.disabled = !connected; });
  showDetail(connected ? `over ${transports[connection.transport]}` : "", delay);
  if (reason && !explained) note("Connection", reason);   // once, not for each attempt
  explained = !connected && (explained || reason);
  if (state === "Unauthorized") {
    if (token()) byId("token-hint").textContent = "This token was refused. Check it and try again.";
    byId("token-form").hidden = false;
    byId("token").focus();
  }
  if (connected) {
    note("Connection", previous === "Reconnecting" ? "Connected again." : "Connected.");
    if (document.activeElement === document.body) focused?.focus();
    // A new connection is in no group, so the page joins its groups again.
    for (const name of groups) perform(() => buttons.join(name));
    for (const action of [refreshOperations, echo, watchStats]) perform(action);
  }
};

function showDetail(text, seconds = 0) {
  clearTimeout(countdown);
  byId("detail").textContent = seconds ? `Trying again in ${seconds} s` : text;
  if (seconds) countdown = setTimeout(() => showDetail("", seconds - 1), 1000);
}

async function echo(message = "") {     // an empty one only measures the round trip
  const begun = performance.now();
  await connection.invoke("Echo", message);
  byId("round-trip").textContent = `${(performance.now() - begun).toFixed(1)} ms`;
}

// The header: the server's numbers, which it sends once a second.

let stats = null;           // the newest of them
const history = { clients: [], rate: [] };   // of the last minute, newest first

async function watchStats() {
  try {
    for await (const item of connection.stream("Stats")) showStats(item);
  } catch (error) {
    if (connection.state === "Connected") throw error;   // else it starts again then
  }
}

function showStats(item) {
  const before = stats ?? item, seconds = item.Uptime - before.Uptime;
  const count = (s) => s.MessagesIn + s.MessagesOut;
  stats = item;
  plot("clients", item.Clients);
  plot("rate", seconds > 0 ? Math.max(0, count(item) - count(before)) / seconds : 0);
  byId("uptime").textContent = duration(item.Uptime);
  showGroups();
  const states = (s) => JSON.stringify(s.Operations);   // of others' operations, too
  if (states(item) !== states(before)) perform(refreshOperations);
}

function plot(name, value) {
  const values = history[name] = [value, ...history[name].slice(0, 59)];
  const scale = 18 / Math.max(1, ...values);
  const points = values.map((v, age) => `${59 - age} ${19 - scale * v}`);
  document.querySelector(`#plot .${name}`).setAttribute("d", `M${points.join("L")}`);
  byId(name).textContent = Math.round(value);
}

function duration(seconds) {
  const [s, m, h] = [seconds % 60, seconds / 60 % 60, seconds / 3600].map(Math.floor);
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

// Groups, and operations: each has a row, made when the page first receives its id.

const groups = new Set();   // the names of the groups that this page is in

function changeGroups(change, groupName, verb) {
  groups[change](groupName);
  showGroups();
  note("Group", `${verb} ${groupName}.`);
}

function showGroups() {
  const sizes = new Map(Object.entries(stats?.YourGroups ?? {}));
  byId("groups").replaceChildren(...Array.from(groups, (name) => {
    const item = element("li", name), size = sizes.get(name);
    if (size) item.dataset.size = size === 1 ? "1 member" : `${size} members`;
    return item;
  }));
}

const rows = () => Array.from(byId("operations").children);
const short = (taskId) => taskId.slice(-4);
const isFinal = (row) => "ended" in row.dataset;

function addRow(taskId) {
  const row = byId("operation").content.firstElementChild.cloneNode(true);
  row.dataset.taskId = taskId;
  row.querySelector(".short").textContent = short(taskId);
  row.querySelector("progress").ariaLabel = `Progress of operation ${short(taskId)}`;
  row.querySelectorAll("button").forEach((button) => Object.assign(button,
    { value: taskId, ariaLabel: `${button.textContent} operation ${short(taskId)}` }));
  byId("operations").prepend(row);
  rows().filter(isFinal).slice(20).forEach((old) => old.remove());
  return row;
}

/** Update the row of an operation; return its state in words. */
function showOperation({ TaskId, State = "Running", Progress = 0, ...more }) {
  const row = rows().find(({ dataset }) => dataset.taskId === TaskId) ?? addRow(TaskId);
  const text = `${Progress} %, ${more.Status || more.Message}`;
  if (more.Name) row.querySelector(".name").textContent = more.Name;
  if (more.StartedAt) row.dataset.started = more.StartedAt;
  if (!isFinal(row)) {          // else this answer is older than the operation's end
    if (!["NotStarted", "Running"].includes(State)) row.dataset.ended = "";
    row.querySelector("progress").value = Progress;
    row.querySelector(".state").textContent = State;
    row.querySelector(".message").textContent = text;
  }
  const now = more.CompletedAt ?? more.Timestamp;   // by the server's clock
  const seconds = (Date.parse(now) - Date.parse(row.dataset.started)) / 1000;
  if (seconds >= 0) row.querySelector(".elapsed").textContent = duration(seconds);
  if (more.Success) row.scrollIntoView({ block: "nearest" });   // this page started it
  return `${short(TaskId)} · ${State}: ${text}`;
}

async function refreshOperations() {
  const list = await call("GET", "operation/list");
  const known = new Set(list.map(({ TaskId }) => TaskId));
  rows().forEach((row) => known.has(row.dataset.taskId) || row.remove());
  list.reverse().forEach(showOperation);        // oldest first, so the newest is on top
}

// The tables: what the server calls, and what the buttons do.

const methods = {
  ReceiveLog: ({ level, message }) => note(`Log · ${level}`, message),
  ReceiveEvent({ eventName, data }) {
    const [, action] = /^Group(Join|Leave)Request$/.exec(eventName) ?? [];
    const { TaskId, GroupName: group, Message = JSON.stringify(data) } = data ?? {};
    note(`Event · ${eventName}`, TaskId ? showOperation(data) : Message, { action, group });
  },
  ReceiveGroupMessage: ({ Message, Sender }) =>
    note("Group message", `${Message} (from ${Sender})`),
  ReceiveAdminUpdate: ({ Message, SystemInfo: { PythonVersion, MemoryMB } }) =>
    note("Admin update", `${Message} (Python ${PythonVersion}, ${MemoryMB} MB)`),
  ReceiveEcho: (text) => text && note("Echo", text),
  GroupJoined: (groupName) => changeGroups("add", groupName, "Joined"),
  GroupLeft: (groupName) => changeGroups("delete", groupName, "Left"),
};

const group = () => byId("group").value;
const remove = (taskId) => call("DELETE", `operation/${taskId}`);

const buttons = {           // by name, or by id; each gets the button's value
  log: (level) => call("GET", `ps/log/${level}`),
  event: () => call("GET", "ps/event"),
  "echo-send": () => echo(byId("echo").value),
  join: (name) => connection.invoke("JoinGroup", name || group()),
  leave: (name) => connection.invoke("LeaveGroup", name || group()),
  group: (verb) => call("POST", `group/${verb}/${encodeURIComponent(group())}`),
  start: () => call("POST", `operation/start?seconds=${byId("seconds").value}`).then(showOperation),
  "token-send"() {
    sessionStorage.setItem("kestrun-token", byId("token").value);
    byId("token-form").reset();
    connection.start();
  },
  status: (taskId) => call("GET", `operation/status/${taskId}`).then(showOperation),
  cancel: (taskId) => call("POST", `operation/cancel/${taskId}`),
  remove: (taskId) => remove(taskId).finally(refreshOperations),
  "clear-finished": () =>
    Promise.all(rows().filter(isFinal).map((row) => remove(row.dataset.taskId)))
      .finally(refreshOperations).then(() => "Removed what is finished"),
  retry() { connection.start(); },
  pause() {
    paused = !paused;
    byId("pause").textContent = paused ? "Resume" : "Pause";
    drawLog();
  },
  clear: () => { byId("log").replaceChildren(); byId("newest").textContent = ""; },
  async copy() {
    const shown = document.querySelectorAll("#log li:not([hidden])");
    const lines = Array.from(shown, ({ entry }) => `${JSON.stringify(entry)}\n`);
    if (!navigator.clipboard) throw new Error("Copying needs HTTPS or localhost.");
    await navigator.clipboard.writeText(lines.join(""));
    return `Copied ${lines.length} entries as JSON lines`;
  },
  fold() {
    const folded = byId("log-panel").classList.toggle("folded");
    byId("fold").textContent = folded ? "Unfold" : "Fold";
    byId("fold").ariaExpanded = !folded;
    byId("scroll").scrollTop = byId("scroll").scrollHeight;
  },
};

document.addEventListener("submit", (event) => {
  event.preventDefault();
  const { name, id, value } = event.submitter;
  perform(() => buttons[name || id](value));
});
byId("filter").oninput = drawLog;
for (const [name, react] of Object.entries(methods)) {
  connection.on(name, (...args) => perform(() => react(...args)));
}
connection.onmessage = (way, message) => {
  if (!byId("wire").open || message.type === 2) return;
  byId("frames").prepend(element("li", `${way} ${JSON.stringify(message)}`));
  if (byId("frames").children.length > 100) byId("frames").lastChild.remove();
};
connection.start();
</script>
</body>
</html>
"""


# --------------------------------------------------------------------- demo
#
# The sample application, written as yours would be with this file next to it: a
# hub of four methods, routes that broadcast, operations that report progress,
# two jobs. Names and payloads are those of Kestrun's PowerShell sample "SignalR".

#: Where the demo application keeps its hub, `app[kestrun.HUB]`, and itself.
HUB: web.AppKey[HubContext] = web.AppKey("kestrun_hub", HubContext)
_DEMO: web.AppKey[Demo] = web.AppKey("kestrun_demo")

#: The levels of the sample, with Python's number for each.
LEVELS = {"Trace": 5, "Verbose": 5, "Debug": 10, "Information": 20}
LEVELS |= {"Warning": 30, "Error": 40, "Critical": 50, "Fatal": 50}

Handler = Callable[[Request], Awaitable[StreamResponse]]


def _stamp(moment: datetime | None = None) -> str:
    """Format a time in UTC, by default now, for payloads: ISO 8601, ending in Z."""
    text = (moment or datetime.now(UTC)).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


async def broadcast_log(hub: HubContext, level: str, message: str) -> None:
    """Send `ReceiveLog` to everyone: {level, message, timestamp}.

    level: a name in LEVELS, in any case. Raises ValueError for another.
    """
    level = level.title()
    if level not in LEVELS:
        raise ValueError(f"The level must be one of {', '.join(LEVELS)}.")
    entry = {"level": level, "message": message, "timestamp": _stamp()}
    await hub.clients.all.send("ReceiveLog", entry)


async def broadcast_event(hub: HubContext, event_name: str, data: Any) -> None:
    """Send `ReceiveEvent` to everyone: {eventName, data, timestamp}.

    Raises TypeError or ValueError for data that cannot be written.
    """
    event = {"eventName": event_name, "data": data, "timestamp": _stamp()}
    await hub.clients.all.send("ReceiveEvent", event)


async def broadcast_to_group(
    hub: HubContext, group_name: str, method: str, message: Any
) -> None:
    """Call `method(message)` on every member of a group.

    Raises TypeError or ValueError for a message that cannot be written.
    """
    await hub.clients.group(group_name).send(method, message)


def _payload(message: str, **fields: Any) -> dict[str, Any]:
    return {"Message": message, "Timestamp": _stamp(), **fields}


def _check_name(text: str) -> str:
    """Return a name that can be shown and logged. Raises HubException for another."""
    if not re.fullmatch(r"[^\0-\x1f\x7f-\x9f\ud800-\udfff]{1,256}", text):
        raise HubException("A name has 1 to 256 characters and no control characters.")
    return text


def _host_name(host: str) -> str:
    """Return a host name without port and final dot; "" if it is none."""
    pattern = r"(\[[0-9a-f:.]+\]|[^:@/\[\]*\s]+?)\.?(?::[0-9]*)?"
    found = re.fullmatch(pattern, host.strip().lower())
    return found[1] if found else ""


def _is_loopback(host: str) -> bool:
    """Return True for a name or an address of this machine for itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]"))
        # A socket for both versions writes IPv4 addresses as ::ffff:127.0.0.1.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return False


def _check_host(request: Request, allowed: Collection[str] | None) -> None:
    """Raise HTTPMisdirectedRequest for a host name that is not this server's.

    Otherwise a page could reach a server on its visitor's machine by giving its own
    host name the address 127.0.0.1 (DNS rebinding).
    """
    address = request.get_extra_info("sockname")
    local = isinstance(address, tuple) and _is_loopback(address[0])
    if allowed is None or not (allowed or local):
        return
    for host in map(_host_name, request.headers.getall("Host", ())):
        if not (_is_loopback(host) or host in allowed):
            text = "This host name is not one of allowed_hosts (--allow-host)."
            raise web.HTTPMisdirectedRequest(text=text)


async def _read_body(request: Request) -> None:
    """Read the body of a request that needs none. Raises HTTP errors for a bad one."""
    try:
        async with asyncio.timeout(10):
            await request.read()
    except (aiohttp.ClientPayloadError, ConnectionError, TimeoutError):
        raise web.HTTPBadRequest(text="The body is incomplete.") from None


async def _add_security_headers(request: Request, response: StreamResponse) -> None:
    """Forbid guessed content types, referrers and frames in every answer."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Server"] = "kestrun"


def _content_security_policy(page: str) -> str:
    """Allow a page its one script and style, by their hashes, and its server."""
    rules = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    rules += "form-action 'self'; frame-ancestors 'none'"
    for tag, text in re.findall(r"(?s)<(script|style)\b[^>]*>(.*?)</\1>", page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        more = " 'self'" if tag == "script" else ""  # kestrun.js
        rules += f"; {tag}-src 'sha256-{digest}'{more}"
    return rules


class KestrunHub(Hub):
    """The hub of the sample."""

    async def join_group(self, group_name: str) -> None:
        await self.groups.add(self.context.connection_id, _check_name(group_name))
        await self.clients.caller.send("GroupJoined", group_name)

    async def leave_group(self, group_name: str) -> None:
        await self.groups.remove(self.context.connection_id, _check_name(group_name))
        await self.clients.caller.send("GroupLeft", group_name)

    async def echo(self, message: Any) -> None:
        await self.clients.caller.send("ReceiveEcho", message)

    async def stats(self) -> AsyncGenerator[dict[str, Any], None]:
        """Stream the numbers of the server once a second, and your groups' sizes."""
        while True:
            numbers = await self.app[_DEMO].numbers()
            yours = {
                name: numbers["Groups"].get(name) or len(self.groups.members(name))
                for name in self.groups.of(self.context.connection_id)
            }
            yield {**numbers, "YourGroups": yours}
            await asyncio.sleep(1)


def _memory_mb() -> float:
    """Return the memory of this process in MiB, or 0 where it is unknown."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return 0.0


def _success(message: str, **fields: Any) -> Response:
    return web.json_response({"Success": True, "Message": message, **fields})


def _status(operation: Operation) -> dict[str, Any]:
    """Describe an operation as the status and list routes do."""
    return {
        "OperationId": operation.id,
        "TaskId": operation.id,
        "Name": operation.name,
        "State": operation.state,
        "StartedAt": operation.started_at and _stamp(operation.started_at),
        "CompletedAt": operation.completed_at and _stamp(operation.completed_at),
        "Progress": operation.progress,
        "Status": operation.status,
        "Message": f"{operation.name} is {operation.state} at {operation.progress} %.",
    }


def _json_error(request: Request, error: web.HTTPException) -> Response:
    """Answer an exception of aiohttp in JSON, with its status and headers."""
    message = error.text
    if isinstance(error, web.HTTPMethodNotAllowed):
        message = f"Use {' or '.join(sorted(error.allowed_methods))} for this path."
    elif error is request.match_info.http_exception:
        message = "There is nothing at this path: check it."
    body = {"Success": False, "Message": message}
    error.headers.pop("Content-Type", None)
    return web.json_response(body, status=error.status, headers=error.headers)


class Guard:
    """Decides who may use the demo, and answers errors in JSON."""

    def __init__(
        self, token: str | None, origins: Collection[str], hosts: Collection[str] | None
    ) -> None:
        if token is not None and (not token or token != token.strip()):
            raise ValueError("token must not be empty or begin or end with a space")
        if isinstance(hosts, str) or not all(map(_host_name, hosts or ())):
            raise ValueError("allowed_hosts: names such as 'example.com'")
        self.token = (token or "").encode(errors="surrogateescape")
        self.origins = origins
        self.hosts = None if hosts is None else {_host_name(host) for host in hosts}
        #: The resources of the API, which need the token.
        self.api: Collection[web.AbstractResource | None] = ()

    async def authenticate(self, request: Request) -> None:
        """Check the token, if there is one. Raises HTTPUnauthorized."""
        given = (access_token(request) or "").encode(errors="surrogateescape")
        if self.token and not secrets.compare_digest(given, self.token):
            text = "The token is missing or wrong. Send 'Authorization: Bearer TOKEN'."
            headers = {"WWW-Authenticate": "Bearer"}
            raise web.HTTPUnauthorized(text=text, headers=headers)

    @web.middleware
    async def handle(self, request: Request, handler: Handler) -> StreamResponse:
        """Check a request, and answer errors in JSON. The hub does both by itself."""
        if isinstance(getattr(request.match_info.handler, "__self__", None), Endpoint):
            _check_host(request, self.hosts)
            return await handler(request)
        try:
            _check_host(request, self.hosts)
            resource = request.match_info.route.resource
            # The demo may be below another path, and broadcasts by GET.
            sends = resource is not None and "/api/ps/" in resource.canonical
            reads = request.method in ("GET", "HEAD") and not sends
            _check_headers(request, self.origins, reads)
            if request.method == "OPTIONS" and _CORS_ORIGIN in request:
                return Response(status=204)
            if resource in self.api:
                await self.authenticate(request)
                await _read_body(request)
                for part in map(unquote_to_bytes, request.rel_url.raw_parts):
                    _check_name(part.decode(errors="surrogateescape"))
            return await handler(request)
        except web.HTTPException as error:
            refusal = error
        except HubException as error:
            refusal = web.HTTPBadRequest(text=str(error))
        except ConnectionError as error:  # another process cannot be asked
            refusal = web.HTTPServiceUnavailable(text=f"Try again later. {error}")
        except Exception:
            log.exception("%s %s failed", request.method, request.rel_url.raw_path)
            text = "An error occurred on the server; see its log. Try again later."
            refusal = web.HTTPInternalServerError(text=text)
        return _json_error(request, refusal)


class Demo:
    """The sample: its operations, its jobs, its routes and its numbers."""

    hub: HubContext
    operations: Operations

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.schedule = Schedule()
        self.schedule.every(30, name="heartbeat")(self._send_heartbeat)
        self.schedule.cron("0 * * * * *", name="admin_status")(self._send_admin_status)
        #: By how many seconds timers were late during the last second.
        self._delays = deque([0.0], maxlen=20)
        #: The newest numbers of all processes, when they were collected, and the lock.
        self._numbers: dict[str, Any] = {}
        self._collected_at = -math.inf
        self._collecting = asyncio.Lock()

    async def context(self, app: object) -> AsyncIterator[None]:
        """Take operations and measure the lag while an application runs."""
        id = self.hub.everywhere.process_id
        self.operations = Operations(on_change=self._announce, prefix=id and f"{id}.")
        task = asyncio.create_task(self._measure_lag())
        yield
        await _end_tasks([task], (0, 1))

    def list_api(self) -> list[web.RouteDef]:
        """List the routes of the API. HEAD is not allowed where GET sends something."""
        return [
            web.get("/api/ps/log/{level}", self.send_log, allow_head=False),
            web.get("/api/ps/event", self.send_event, allow_head=False),
            web.post("/api/group/join/{groupName}", self.send_group_request),
            web.post("/api/group/leave/{groupName}", self.send_group_request),
            web.post("/api/group/broadcast/{groupName}", self.send_to_group),
            web.post("/api/operation/start", self.start_operation),
            web.get("/api/operation/status/{taskId}", self.handle_operation),
            web.get("/api/operation/list", self.list_operations),
            web.post("/api/operation/cancel/{taskId}", self.handle_operation),
            web.delete("/api/operation/{taskId}", self.handle_operation),
        ]

    async def send_log(self, request: Request) -> Response:
        level = request.match_info["level"].title()
        text = f"Test {level} message from Kestrun at {datetime.now():%H:%M:%S}"
        message = request.query.get("message") or text
        try:
            await broadcast_log(self.hub, level, message)
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        log.log(LEVELS[level], "%s", message)
        return Response(text=f"Broadcasted {level} log message")

    async def send_event(self, request: Request) -> Response:
        data = _payload("Hello from Kestrun", Random=random.randint(1, 100))
        await broadcast_event(self.hub, "PowerShellEvent", data)
        return Response(text="Broadcasted custom event")

    async def send_group_request(self, request: Request) -> Response:
        """Ask everyone to join or leave a group."""
        verb, group = request.rel_url.parts[-2:]
        data = _payload(f"Please {verb} the group {group}", GroupName=group)
        await broadcast_event(self.hub, f"Group{verb.title()}Request", data)
        return _success(f"Everyone was asked to {verb} {group}", GroupName=group)

    async def send_to_group(self, request: Request) -> Response:
        group = request.match_info["groupName"]
        message = _payload(f"Hello to the members of {group}", Sender="Kestrun")
        await broadcast_to_group(self.hub, group, "ReceiveGroupMessage", message)
        return _success(f"Broadcasted to the group {group}", GroupName=group)

    async def start_operation(self, request: Request) -> Response:
        number = re.fullmatch("0*([0-9]{1,4})", _query(request).get("seconds", "2"))
        seconds = int(number[1]) if number else 0
        if not 1 <= seconds <= 3600:
            raise web.HTTPBadRequest(text="seconds must be an integer from 1 to 3600.")

        async def work(progress: Progress) -> None:
            for step in range(1, seconds + 1):
                await asyncio.sleep(1)
                await progress(step * 100 / seconds, f"Step {step} of {seconds}")

        try:
            operation = self.operations.start(work, name="LongOperation")
        except RuntimeError:
            text = "No more operations can be started now. Try again later."
            raise web.HTTPTooManyRequests(text=text, headers=_RETRY_LATER) from None
        log.info("operation %s of %d s started", operation.id, seconds)
        return _success(f"Started an operation of {seconds} s", TaskId=operation.id)

    async def handle_operation(self, request: Request) -> Response:
        """Show, cancel or remove an operation of any process, which its id names."""
        id, ask = request.match_info["taskId"], self.hub.everywhere.ask_process
        answer = await ask(id.rpartition(".")[0], "operation", request.method, id)
        status, shown = answer or (404, "There is no operation with this id.")
        if isinstance(shown, str):
            shown = {"Success": status == 200, "Message": shown, "TaskId": id}
        return web.json_response(shown, status=status)

    async def act_on_operation(self, method: str, id: str) -> tuple[int, Any] | None:
        """Do it in this process; return None if the operation is not here."""
        operation = self.operations.get(id)
        if operation is None:
            return None
        if method == "POST":
            done = self.operations.cancel(id)
            await operation.wait()
            text = f"The operation is {operation.state}{'' if done else ' already'}."
        elif method == "DELETE":
            done = self.operations.remove(id)
            text = "It was removed." if done else "It still runs. Cancel it first."
        else:
            return 200, _status(operation)
        return 200 if done else 409, text

    async def list_operations(self, request: Request) -> Response:
        """List the operations of all processes, newest first."""
        answers = await self.hub.everywhere.ask("operations")
        entries = [entry for answer in answers for entry in answer]
        # Those that have not started come first: letters sort behind digits.
        entries.sort(key=lambda entry: entry["StartedAt"] or "new", reverse=True)
        return web.json_response(entries)

    async def show_health(self, request: Request) -> Response:
        health: dict[str, Any] = {
            "Status": "Healthy",
            "Uptime": round(time.monotonic() - self.started, 1),
            "ConnectedClients": len(self.hub.connections),
            "Groups": len(self.hub.groups.names()),
            "Operations": len(self.operations.list()),
            "Hub": self.hub.stats(),
        }
        if backplane := health["Hub"].pop("backplane", None):
            health["Backplane"] = {key.title(): v for key, v in backplane.items()}
            if backplane["state"] == "Disconnected":
                health["Status"] = "Degraded"  # the clients of this process are served
        return web.json_response(health)

    async def _announce(self, operation: Operation) -> None:
        """Broadcast the progress and the end of an operation."""
        text = operation.status or operation.state
        data = _payload(text, TaskId=operation.id, Progress=operation.progress)
        if operation.step and operation.state in (RUNNING, COMPLETED):
            step = {**data, "Step": operation.step}
            await broadcast_event(self.hub, "OperationProgress", step)
        if operation.final:
            log.info("operation %s: %s", operation.id, operation.state)
            end = {**data, "State": operation.state}
            await broadcast_event(self.hub, "OperationComplete", end)

    async def _send_heartbeat(self) -> None:
        """Send a heartbeat to this process's clients; the others do the same."""
        numbers, now = await self.numbers(), _stamp()
        data = {"Type": "Heartbeat", "ServerTime": now, "Message": "Server is running"}
        data |= {"Uptime": numbers["Uptime"], "ConnectedClients": numbers["Clients"]}
        event = {"eventName": "ServerHeartbeat", "data": data, "timestamp": now}
        await self.hub.local.all.send("ReceiveEvent", event)

    async def _send_admin_status(self) -> None:
        system: dict[str, Any] = {"ProcessorCount": os.cpu_count()}
        system["PythonVersion"] = platform.python_version()
        system["MemoryMB"] = _memory_mb()
        update = _payload("Admin status update", Type="AdminUpdate", SystemInfo=system)
        await self.hub.local.group("Admins").send("ReceiveAdminUpdate", update)

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + 0.05
            await asyncio.sleep(0.05)
            self._delays.append(time.monotonic() - due)

    def count(self) -> dict[str, Any]:
        """Count what belongs to this process."""
        hub, stats = self.hub, self.hub.stats()
        # The largest 100 of 10,000 groups, because there may be any number.
        names = hub.groups.names()[:10_000]
        sizes = {name: len(hub.groups.members(name)) for name in names}
        return {
            "Clients": stats["connections"],
            "MessagesIn": stats["messages_in"],
            "MessagesOut": stats["messages_out"],
            "QueuedBytes": stats["queued_bytes"],
            "Transports": stats["transports"],
            "Groups": dict(Counter(sizes).most_common(100)),
            "Operations": dict(Counter(o.state for o in self.operations.list())),
            "LoopLag": round(1000 * max(self._delays), 1),
        }

    async def numbers(self) -> dict[str, Any]:
        """Add up the counts of all processes, once a second for all that watch."""
        async with self._collecting:
            now = time.monotonic()
            if now - self._collected_at < 0.9:  # timers may be early
                return self._numbers
            try:
                counts = await self.hub.everywhere.ask("stats")
            except ConnectionError:
                counts = [self.count()]
            total = {"Uptime": round(now - self.started, 1), "Timestamp": _stamp()}
            total["Processes"] = len(counts)
            total["LoopLag"] = max(count.pop("LoopLag") for count in counts)
            for name, value in counts[0].items():
                kind: type[Any] = Counter if isinstance(value, dict) else int
                total[name] = sum((kind(count[name]) for count in counts), kind())
            self._numbers, self._collected_at = total, time.monotonic()
            return total


def _page_route(path: str, page: str, hub_path: str) -> web.RouteDef:
    """Serve a page, which finds the hub's path in its meta tag, or a script."""
    relative = html.escape(hub_path.lstrip("/"))
    page = page.replace('content="hubs/kestrun"', f'content="{relative}"')
    headers = {"Content-Security-Policy": _content_security_policy(page)}
    kind = "text/javascript" if path.endswith(".js") else "text/html"

    async def show(request: Request) -> Response:
        return Response(text=page, content_type=kind, headers=headers)

    return web.get(path, show)


def create_app(
    *,
    hub_path: str = "/hubs/kestrun",
    allowed_origins: Collection[str] = (),
    allowed_hosts: Collection[str] | None = (),
    token: str | None = None,
    backplane: RedisBackplane | None = None,
    sticky: bool = True,
) -> web.Application:
    """Build the demo application: hub, routes, jobs and page.

    hub_path: path of the hub.
    allowed_origins: further origins, such as "https://example.com", whose pages
        may use hub and API.
    allowed_hosts: host names under which a proxy passes requests on. Requests that
        come in at a loopback address are served under these names and loopback's;
        all requests are, if there are any names. None: every name will do.
    token: required by hub and API, if given; pages, /kestrun.js and /healthz are open.
    backplane: connects the processes that run this application.
    sticky: whether all requests of one connection reach the same process. If not,
        clients can use WebSockets only, and cannot resume a lost one.
    Raises ValueError for a path, origin, host or token that cannot be used.
    """
    guard, demo = Guard(token, allowed_origins, allowed_hosts), Demo()
    app = web.Application(middlewares=[guard.handle], client_max_size=65_536)
    app.on_response_prepare.append(_add_security_headers)
    # Before the hub's own: clients still receive how operations end.
    app.on_shutdown.append(lambda app: demo.operations.close())
    guard.api = {route.resource for route in app.add_routes(demo.list_api())}
    pages = {"/": PAGE, "/kestrun.js": CLIENT_JS}
    file = Path(__file__).parent / "static" / "monitor.html"  # it may be missing
    monitor = file.read_text("utf-8") if file.is_file() else ""
    if '<meta name="hub"' in monitor:  # it is not another project's
        page = PAGE.replace('href="monitor" hidden', 'href="monitor"')
        pages |= {"/": page, "/monitor": monitor}
    app.add_routes(_page_route(path, text, hub_path) for path, text in pages.items())
    app.router.add_get("/healthz", demo.show_health)
    app[_DEMO] = demo
    demo.hub = app[HUB] = map_hub(
        app,
        hub_path,
        KestrunHub,
        backplane=backplane,
        transports=TRANSPORTS if sticky else [WEBSOCKETS],
        allow_stateful_reconnects=sticky,
        maximum_groups_per_client=100,
        allowed_origins=allowed_origins,
        authenticate=guard.authenticate,
    )
    everywhere = demo.hub.everywhere
    everywhere.handle("operation", demo.act_on_operation)
    everywhere.handle("operations", lambda: [*map(_status, demo.operations.list())])
    everywhere.handle("stats", demo.count)
    app.cleanup_ctx.extend([demo.context, demo.schedule.context])
    return app


# --------------------------------------------------------------------- main
#
# The command line of the demo. Only this section configures logging and signals,
# which a library leaves to the program that imports it.


class _OneLine(logging.Formatter):
    """One line for each event, whatever its message contains; then a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        match record.exc_info:
            case (_, aiohttp.http.HttpProcessingError(code=code), _):
                # Without its text, which may contain a token.
                record.message = f"refused a malformed request: {code}"
                record.levelname, record.exc_info = "WARNING", None
        return _one_line(super().formatMessage(record))


class _AccessLog(AbstractAccessLogger):
    """Logs requests by path only: a query may contain tokens."""

    def log(
        self, request: web.BaseRequest, response: StreamResponse, time: float
    ) -> None:
        path, ms = request.rel_url.raw_path, time * 1000
        fields = (request.remote, request.method, path, response.status, ms)
        self.logger.info("%s %s %s -> %d in %.0f ms", *fields)


def _set_up_logging(level: str) -> None:
    logging.addLevelName(LEVELS["Trace"], "TRACE")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    logging.basicConfig(level=LEVELS[level], handlers=[handler])


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    text = "A SignalR server with a page that shows it."
    parser = argparse.ArgumentParser(prog="kestrun.py", description=text)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    text = "port, 0 for any free one (environment PORT, else 5000)"
    add("--port", type=int, default=os.environ.get("PORT") or "5000", help=text)
    add("--hub-path", default="/hubs/kestrun", help="path of the hub (%(default)s)")
    text = "another origin whose pages may connect; may be repeated"
    add("--allow-origin", action="append", default=[], metavar="URL", help=text)
    text = "host name, besides localhost, under which to serve; may be repeated"
    add("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "token that hub and API require (environment KESTRUN_TOKEN)"
    add("--token", default=os.environ.get("KESTRUN_TOKEN"), help=text)
    add("--insecure", action="store_true", help="allow a public --host without a token")
    text = "least important level to log (%(default)s)"
    add("--log-level", type=str.title, choices=LEVELS, default="Information", help=text)
    text = "Redis that connects several processes (environment KESTRUN_REDIS)"
    add("--redis", metavar="URL", default=os.environ.get("KESTRUN_REDIS"), help=text)
    text = "their common secret, 16 characters or more (environment KESTRUN_SECRET)"
    add("--secret", default=os.environ.get("KESTRUN_SECRET", ""), help=text)
    text = "processes that serve the port together; needs --redis (%(default)s)"
    add("--workers", type=int, default=1, metavar="N", help=text)
    add("--worker", type=int, default=0, help=argparse.SUPPRESS)  # which of them
    text = "print a hub's methods and types as JSON (default: the demo's), then exit"
    demo = "kestrun:KestrunHub"
    add("--describe", nargs="?", const=demo, metavar="MODULE:HUB", help=text)
    add("--probe", metavar="URL", help="connect to a hub, time a call, then exit")
    add("--uvloop", action="store_true", help="run on uvloop, if it is installed")
    add("--version", action="version", version=f"kestrun {__version__}")
    return parser.parse_args(argv)


def _stop_event() -> asyncio.Event:
    """Return an event that SIGINT or SIGTERM sets; the next one ends the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def take(*_: object) -> None:
        loop.call_soon_threadsafe(stop.set)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, take)
    return stop


async def _bind(arguments: argparse.Namespace) -> asyncio.Server:
    """Bind the address, which workers share, without listening yet."""
    where, shared = (arguments.host, arguments.port), arguments.workers > 1
    bind = asyncio.get_running_loop().create_server
    return await bind(asyncio.Protocol, *where, reuse_port=shared, start_serving=False)


async def _serve(app: web.Application, arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM, then shut down."""
    runner = web.AppRunner(
        app,
        access_log_class=_AccessLog,
        access_log=logging.getLogger("kestrun.access"),
        keepalive_timeout=15,  # until all headers of the next request have arrived
        shutdown_timeout=1,
        # To read the rest of a refused body: a client cut off may miss its answer.
        lingering_time=2,
        # Or aiohttp would decompress the rest of a refused body, however large it is.
        auto_decompress=False,
    )
    stop, loop = _stop_event(), asyncio.get_running_loop()
    await runner.setup()
    try:
        bound = await _bind(arguments)
        for listener in [bound_socket.dup() for bound_socket in bound.sockets]:
            # Accept one by one: asyncio logs each that lacks a file descriptor.
            await web.SockSite(runner, listener, backlog=1).start()
            listener.listen(1024)
        bound.close()
        if arguments.worker <= 1:  # the others serve the same address
            host, port = runner.addresses[0][:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"page  {address}/", flush=True)
            print(f"hub   {address}{arguments.hub_path}", flush=True)
        if arguments.worker:  # its input ends with the process that started it
            loop.add_reader(sys.stdin.fileno(), stop.set)
        await stop.wait()
        if arguments.worker:
            loop.remove_reader(sys.stdin.fileno())
        log.info("shutting down")
        # Still listening: the next long poll of a client fetches its Close message.
        await app.shutdown()
    finally:
        await runner.cleanup()


async def _keep_worker(command: list[str]) -> None:
    """Run a worker process, and another when it dies; end it when cancelled."""
    while True:
        pipe = asyncio.subprocess.PIPE
        worker = await asyncio.create_subprocess_exec(*command, stdin=pipe)
        try:
            status = await worker.wait()
        finally:
            # Close its input: after Ctrl-C, which all processes get, a signal kills it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.communicate(b""), _SHUTDOWN_TIMEOUT + 2)
            if worker.returncode is None:
                worker.kill()
        log.warning("worker %d ended with status %d", worker.pid, status)
        await asyncio.sleep(0.5)


async def _run_workers(
    backplane: RedisBackplane | None, arguments: argparse.Namespace, argv: list[str]
) -> None:
    """Run `--workers` processes that share one port, until SIGINT or SIGTERM."""
    if arguments.workers < 1:
        raise ValueError("--workers must be at least 1")
    if backplane is None:
        raise ValueError("--workers needs --redis, which connects the workers")
    async for _ in backplane.context(None):
        pass  # connects once, so that an error shows before any worker runs
    stop = _stop_event()
    # Bound here without listening, so that the port is known and stays ours.
    server = await _bind(arguments)
    port = str(server.sockets[0].getsockname()[1])
    command = [sys.executable, os.path.abspath(__file__), *argv, "--port", port]
    async with server, asyncio.TaskGroup() as group:
        keepers = [
            group.create_task(_keep_worker([*command, "--worker", str(number)]))
            for number in range(1, arguments.workers + 1)
        ]
        await stop.wait()
        for keeper in keepers:
            keeper.cancel()


def _print_description(name: str) -> None:
    """Print what clients may call on a hub. name: such as "chat:ChatHub"."""
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise ValueError(f"--describe {name}: give MODULE:HUB, such as chat:ChatHub")
    sys.path.insert(0, os.getcwd())
    sys.modules.setdefault("kestrun", sys.modules[__name__])
    try:
        module = importlib.import_module(module_name)
        description = describe(getattr(module, class_name))
    except (ImportError, AttributeError, TypeError, NameError) as error:
        raise ValueError(f"--describe {name}: {error}") from None
    print(json.dumps(description, indent=2))


#: What a refused WebSocket means.
_PROBLEMS = {
    200: "this is a page, not a hub",
    400: "this is not a hub, or a proxy does not forward the Upgrade header",
    401: "the token is missing or wrong; give --token",
    403: "this user may not connect",
    404: "there is no hub at this path",
    421: "the server does not know this host name; see --allow-host",
    502: "the server behind the proxy is not running",
    503: "the server is full or shutting down",
}


async def _probe(url: str, token: str | None) -> None:
    """Print the round trip of a call. Raises ConnectionError with what is wrong."""
    shown = url.partition("?")[0]  # the query may have a token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with (
            asyncio.timeout(10),
            aiohttp.ClientSession() as session,
            connect(session, url, headers=headers) as connection,
        ):
            begun = time.perf_counter()
            with contextlib.suppress(HubException):  # an error is an answer, too
                await connection.invoke("Echo", "probe")
            trip = 1000 * (time.perf_counter() - begun)
    except (aiohttp.ClientError, HubException, ConnectionError, TimeoutError) as error:
        text = f"{shown} cannot be used: {str(error) or 'no answer in 10 s'}"
        if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
            text = f"{shown!r} is no URL such as http://127.0.0.1:5000/hubs/kestrun"
        elif isinstance(error, aiohttp.ClientSSLError):
            text = f"{shown} cannot be used over TLS: {error}"
        elif isinstance(error, aiohttp.ClientConnectorError):
            text = f"{shown} cannot be reached: is the server running there?"
        elif isinstance(error, aiohttp.WSServerHandshakeError):
            reason = _PROBLEMS.get(error.status, "this is no hub")
            text = f"{shown} answers {error.status}: {reason}"
        raise ConnectionError(text) from None
    print(f"{shown} answers in {trip:.1f} ms")


def _run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run the demo, or its workers, until SIGINT or SIGTERM."""
    public = not _is_loopback(arguments.host)
    if public and not (arguments.token or arguments.insecure):
        exposed = f"--host {arguments.host} can be reached from other machines"
        raise ValueError(f"{exposed}: give --token, or --insecure to let anybody in")
    if arguments.workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("--workers needs SO_REUSEPORT, which this platform lacks")
    redis, secret = arguments.redis, arguments.secret
    backplane = RedisBackplane(redis, secret=secret) if redis else None
    app = create_app(
        hub_path=arguments.hub_path,
        allowed_origins=arguments.allow_origin,
        allowed_hosts=arguments.allow_host or (None if public else ()),
        token=arguments.token,
        backplane=backplane,
        sticky=not arguments.worker,
    )
    new_loop = None
    if arguments.uvloop:
        try:
            new_loop = importlib.import_module("uvloop").new_event_loop
        except ImportError:
            raise ValueError("--uvloop needs a package: pip install uvloop") from None
    with asyncio.Runner(loop_factory=new_loop) as runner:
        if arguments.workers == 1 or arguments.worker:
            runner.run(_serve(app, arguments))
        else:
            runner.run(_run_workers(backplane, arguments, argv))


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line; return its exit status."""
    arguments, prefix = _parse_arguments(argv), ""
    _set_up_logging(arguments.log_level)
    try:
        if arguments.describe is not None:
            _print_description(arguments.describe)
        elif arguments.probe is not None:
            asyncio.run(_probe(arguments.probe, arguments.token))
        else:
            prefix = "kestrun cannot start: "
            _run(arguments, sys.argv[1:] if argv is None else argv)
    except (OSError, ValueError, OverflowError, ImportError) as error:
        print(f"{prefix}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before `_stop_event` is made
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
