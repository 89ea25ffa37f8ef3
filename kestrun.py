#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.3"]
# ///
"""kestrun 1.0.0: a SignalR server in one file. MIT licence, safe to vendor.

Any ASP.NET Core SignalR client connects to it unchanged: JavaScript, .NET,
Python; over WebSockets, Server-Sent Events or long polling; in JSON, or in
MessagePack where the `msgpack` package is installed. It needs aiohttp only.

Run it, then open http://127.0.0.1:5000/ for a page that shows it all live:

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

What happens between a client's bytes and yours:

    bytes in ─► transport ─► Connection.inbox ─► decode ─► Session ─► hub method
                                                                          │
                                       self.clients.group("x").send(…)    │
                                                                          ▼
    bytes out ◄─ transport ◄─ Connection.outbox ◄─ encode once ◄─ Registry.publish

The file reads from top to bottom; each section uses only what stands above it.
`grep -n '^# ---' kestrun.py` prints the contents:

    options        every limit and interval, in one place
    wire protocol  hub messages, and how JSON and MessagePack write them
    connection     a duplex pipe between one client and one hub; turns
    transports     WebSocket (RFC 6455), Server-Sent Events, long polling
    registry       who is connected and in which group; publish
    hub            what user code sees: Hub, clients, groups, context
    hub methods    finding them, binding and converting their arguments
    dispatcher     the life of a connection, calls, streams, client results
    endpoint       negotiate, routes, origins, users; map_hub
    operations     long-running work on asyncio tasks
    schedule       jobs on the clock, by interval or cron expression
    page           what a browser sees at /
    demo           the sample application: hub, routes, jobs
    main           the command line

Not here, on purpose: more than one process (a backplane would subclass
`Registry`), TLS (aiohttp and proxies do it well), old ASP.NET SignalR.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import codecs
import contextlib
import contextvars
import dataclasses
import functools
import gc
import hashlib
import hmac
import html
import inspect
import json
import logging
import math
import operator
import os
import platform
import random
import re
import secrets
import signal
import struct
import sys
import time
import types
import typing
import unicodedata
import uuid
import weakref
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, Flag
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

_NEEDS_AIOHTTP = "kestrun needs aiohttp 3.14.3 or newer: pip install -U aiohttp"
try:
    import aiohttp
    from aiohttp import web
    from aiohttp.abc import AbstractAccessLogger

    # Older releases let a request smuggled behind an upgrade through.
    if [int(n) for n in re.findall(r"\d+", aiohttp.__version__)[:3]] < [3, 14, 3]:
        raise ImportError(f"{_NEEDS_AIOHTTP} (found {aiohttp.__version__})")
except ModuleNotFoundError:
    if __name__ == "__main__":
        sys.exit(_NEEDS_AIOHTTP)
    raise
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(str(error))
    raise

__version__ = "1.0.0"
__all__ = [
    "Hub",
    "HubCallerContext",
    "HubContext",
    "HubException",
    "HubOptions",
    "Operation",
    "Operations",
    "Progress",
    "Schedule",
    "access_token",
    "broadcast_event",
    "broadcast_log",
    "broadcast_to_group",
    "create_app",
    "hub_method",
    "map_hub",
]

log = logging.getLogger("kestrun")

F = TypeVar("F", bound=Callable[..., Any])

# ------------------------------------------------------------------ options
#
# One home for every number. Names and defaults are SignalR's (in snake case);
# seconds are floats, sizes are bytes, and None means no limit. Options are
# checked when they are made, so that a running server never meets a wrong one.

WEBSOCKETS = "WebSockets"
SERVER_SENT_EVENTS = "ServerSentEvents"
LONG_POLLING = "LongPolling"
TRANSPORTS = (WEBSOCKETS, SERVER_SENT_EVENTS, LONG_POLLING)

_ORIGIN = re.compile(
    r"(?!(?:http://.*:80|https://.*:443)$)"
    r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?",
    re.IGNORECASE,
)

Authenticate = Callable[[web.Request], Awaitable["str | None"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """The settings of one mapped hub; `map_hub` takes them as keywords too.

    Raises TypeError or ValueError, naming the field, for what makes no sense.
    """

    #: Seconds between the server's pings (none on long polling).
    keep_alive_interval: float | None = 15
    #: Seconds of silence after which a client that has pinged is given up.
    client_timeout_interval: float | None = 30
    #: Seconds for the handshake, counted from the opening of the transport.
    handshake_timeout: float | None = 15
    #: Bytes of one hub message, its separator or length prefix included.
    maximum_receive_message_size: int | None = 32768
    #: Calls of one client that run at the same time; further ones wait.
    maximum_parallel_invocations_per_client: int | None = 1
    #: Items of one upload stream that wait for the method to read them.
    stream_buffer_capacity: int | None = 10
    #: Send the text of every exception to the caller. For development only.
    enable_detailed_errors: bool = False
    #: What negotiate offers, out of `TRANSPORTS`.
    transports: Collection[str] = TRANSPORTS
    #: Seconds after which a long poll without data is answered empty.
    poll_timeout: float | None = 90
    #: Seconds that an unused token, a gap between two polls, or a client of
    #: stateful reconnect without a socket is remembered.
    disconnect_timeout: float | None = 15
    #: Seconds to wait for the peer's WebSocket close frame.
    close_timeout: float | None = 5
    #: Let clients resume a lost WebSocket without losing messages.
    allow_stateful_reconnects: bool = False
    #: Bytes sent but not acknowledged, beyond which that client's writers wait.
    stateful_reconnect_buffer_size: int | None = 100_000
    #: Bytes waiting for one slow client before it is cut.
    outbox_limit: int | None = 1_048_576
    #: Seconds in which a client takes nothing of what waits before it is cut.
    transport_send_timeout: float | None = 10
    #: Origins, such as "https://example.com", besides the server's own.
    allowed_origins: Collection[str] = ()
    #: Tells the user id from a request, or raises web.HTTPUnauthorized or
    #: web.HTTPForbidden. Asked for every request, the preflight excepted.
    authenticate: Authenticate | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field.name, field.type, getattr(self, field.name))
        if unknown := set(self.transports) - set(TRANSPORTS):
            raise ValueError(f"transports: {sorted(unknown)} not in {TRANSPORTS}")
        if not self.transports:
            raise ValueError("transports: at least one is needed")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allowed_origins: {origin!r} is not an origin as browsers send it, "
                    "such as 'https://example.com' (no path, no final slash, no '*', "
                    "no port that is the scheme's own, ASCII)"
                )

    @staticmethod
    def _check(name: str, annotation: Any, value: Any) -> None:
        if annotation in ("float | None", "int | None"):
            if value is None:
                return
            whole = annotation == "int | None"
            kinds = int if whole else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{name}: a number or None, not {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: more than 0 and finite, not {value!r}")
        elif annotation == "bool" and not isinstance(value, bool):
            raise TypeError(f"{name}: True or False, not {value!r}")
        elif annotation == "Collection[str]":
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise TypeError(f"{name}: a list of strings, not {value!r}")
        elif name == "authenticate" and value is not None and not callable(value):
            raise TypeError("authenticate: async (request) -> user id, or None")


def _or_forever(seconds: float | None) -> float:
    """Read an option in seconds, None being forever, for comparisons."""
    return math.inf if seconds is None else seconds


# ------------------------------------------------------------ wire protocol
#
# A hub message is a small value; a protocol turns messages into bytes and
# bytes into messages. No sockets and no asyncio here: bytes in, values out.
# The wire's own spelling (invocationId) never leaves this section. Follows
# HubProtocol.md of ASP.NET Core SignalR; where that text and the shipped
# clients disagree, the clients are right.


class Invocation(NamedTuple):
    """Call `target`. Without an invocation id nobody waits for an answer."""

    target: str
    arguments: list[Any]
    invocation_id: str | None = None
    stream_ids: tuple[str, ...] = ()


class StreamInvocation(NamedTuple):
    """Call the streaming method `target`; its items answer the invocation id."""

    target: str
    arguments: list[Any]
    invocation_id: str
    stream_ids: tuple[str, ...] = ()


class StreamItem(NamedTuple):
    """One item of a stream, either way."""

    invocation_id: str
    item: Any


class Completion(NamedTuple):
    """The end of a call or stream: a result, an error, or neither (VOID)."""

    invocation_id: str
    result: Any = None
    error: str | None = None


class CancelInvocation(NamedTuple):
    """The client no longer wants the answer."""

    invocation_id: str


class Ping(NamedTuple):
    """Nothing but a sign of life."""


class Close(NamedTuple):
    """The last message of a connection; may invite the client to come back."""

    error: str | None = None
    allow_reconnect: bool = False


class Ack(NamedTuple):
    """Stateful reconnect: everything up to `sequence_id` has arrived."""

    sequence_id: int


class Sequence(NamedTuple):
    """Stateful reconnect: `sequence_id` numbers the next message sent."""

    sequence_id: int


Message = (
    Invocation
    | StreamInvocation
    | StreamItem
    | Completion
    | CancelInvocation
    | Ping
    | Close
    | Ack
    | Sequence
)


class _Void:
    """A completion's missing result, which is not the same as a null."""

    def __repr__(self) -> str:
        return "VOID"


VOID = _Void()
PING = Ping()

#: The messages that stateful reconnect numbers, keeps and replays.
COUNTED = (Invocation, StreamInvocation, StreamItem, Completion, CancelInvocation)


class HubException(Exception):
    """An error meant for the client: its message travels, others' are hidden."""


class ProtocolError(Exception):
    """The peer broke the protocol: the connection ends, the server goes on."""

    reported_as = "InvalidDataException"


class HandshakeError(ProtocolError):
    """The handshake is refused with this text."""


def _detail(message: str, error: BaseException, options: HubOptions) -> str:
    """Word an error for the client: its own text only where it may be told."""
    if isinstance(error, HubException) or options.enable_detailed_errors:
        with contextlib.suppress(Exception):  # it is user code
            name = getattr(error, "reported_as", type(error).__name__)
            return f"{message} {name}: {error}"
    return message


def _one_line(text: str, longest: int | None = None) -> str:
    """Escape what would break or forge a line of a log."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text[:longest]
    )


def _camel(name: str) -> str:
    """Spell a Python name as JavaScript and .NET do: user_name -> userName."""
    first, *others = name.strip("_").split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in others)


@functools.cache
def _members(kind: type) -> list[tuple[str, str]]:
    """List a dataclass's fields, each with its spelling on the wire."""
    return [(field.name, _camel(field.name)) for field in dataclasses.fields(kind)]


def _iso(moment: datetime) -> str:
    """Write a time as ISO 8601; UTC ends in Z, a naive one has no offset."""
    return moment.isoformat().replace("+00:00", "Z")


def _to_plain(value: Any) -> Any:
    """Turn what the encoders do not know into what they do.

    Raises TypeError for a value that no client could read.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {wire: getattr(value, name) for name, wire in _members(type(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return _iso(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    raise TypeError(
        f"a {type(value).__name__} cannot be sent; send numbers, text, bytes, lists, "
        "dicts, dataclasses, enums, datetimes or UUIDs"
    )


def _take_string(value: Any, name: str) -> str:
    if type(value) is not str:
        raise ProtocolError(f"Expected '{name}' to be of type String.")
    return value


def _take_id(value: Any, *, required: bool = True) -> str | None:
    if value is None or value == "":
        if required:
            raise ProtocolError("Missing required property 'invocationId'.")
        return None
    return _take_string(value, "invocationId")


class HubProtocol(Protocol):
    """How hub messages look on the wire."""

    name: ClassVar[str]
    binary: ClassVar[bool]

    def encode(self, message: Message) -> bytes:
        """Write one message, ready to be sent; `item_encoder` writes stream items.

        Raises TypeError or ValueError for values that cannot be written.
        """

    def encode_result(self, invocation_id: str, result: Any) -> bytes:
        """Write the completion of a call by the shortest way; raises as `encode`."""

    def item_encoder(self, invocation_id: str) -> Callable[[Any], bytes]:
        """Make what writes the items of one stream: they share all but the value.

        It raises as `encode` does.
        """

    def decode(self, inbox: bytearray, limit: int | None) -> Iterator[Message | None]:
        """Cut messages off the front of `inbox`, for as long as it lives.

        Yields None when the next message is not complete yet: ask again when
        bytes were added. `limit` bounds the bytes of one message, its frame
        included. Raises ProtocolError, after which it has ended.
        """


def _too_big(limit: int) -> ProtocolError:
    return ProtocolError(
        f"The maximum message size of {limit}B was exceeded. "
        "The message size can be configured in AddHubOptions."
    )


RECORD_SEPARATOR = b"\x1e"

_JSON_SPACE = " \t\r\n"

#: Nesting of one JSON message; the reference server's limit.
_JSON_DEPTH = 64


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


# One scanner and one encoder are kept for good: json.loads and json.dumps build
# theirs anew each time, which costs more than a short message does. The C encoder
# has no public name; without it (PyPy) the public class does the same.
_scan_json: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
    parse_constant=_refuse_constant
).scan_once  # type: ignore[attr-defined]
_quote = json.encoder.encode_basestring_ascii
_make_encoder = getattr(json.encoder, "c_make_encoder", None)


def _build_json_encoder() -> Callable[[Any], str]:
    """Make the compact writer: ASCII only, no NaN, no check for cycles."""
    if _make_encoder is None:
        return json.JSONEncoder(
            separators=(",", ":"), allow_nan=False, default=_to_plain
        ).encode
    pieces = _make_encoder(
        None, _to_plain, _quote, None, ":", ",", False, False, False
    )  # markers, default, encoder, indent, separators, sort, skip keys, allow NaN
    return lambda value: "".join(pieces(value, 0))


_encode_json = _build_json_encoder()


def _write_json(value: Any) -> str:
    try:
        return _encode_json(value)
    except TypeError:  # the encoder's own error for a key is of no use to anyone
        return _encode_json(_with_plain_keys(value))


def _with_plain_keys(value: Any) -> Any:
    """Write the keys of dicts, however deep, as `_to_plain` writes values."""
    if isinstance(value, dict):
        return {
            key
            if key is None or isinstance(key, (str, int, float))
            else _to_plain(key): _with_plain_keys(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_with_plain_keys(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return _with_plain_keys(_to_plain(value))


def _write_value(value: Any) -> str:
    """Write any value as JSON; text and whole numbers by the shortest way."""
    kind = type(value)
    if kind is str:
        return _quote(value)
    return repr(value) if kind is int else _write_json(value)


_TOO_DEEP = "nested too deeply, or containing itself"


class JsonProtocol:
    """One JSON object a message, each ended by the byte 0x1E. UTF-8 in, ASCII out."""

    name: ClassVar[str] = "json"
    binary: ClassVar[bool] = False

    def encode(self, message: Message) -> bytes:
        try:
            return (self._text(message) + "\x1e").encode()
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None

    def encode_result(self, invocation_id: str, result: Any) -> bytes:
        if result is VOID:
            return self.encode(Completion(invocation_id, VOID))
        try:
            return (
                f'{{"type":3,"invocationId":{_quote(invocation_id)}'
                f',"result":{_write_value(result)}}}\x1e'
            ).encode()
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None

    def item_encoder(self, invocation_id: str) -> Callable[[Any], bytes]:
        head = f'{{"type":2,"invocationId":{_quote(invocation_id)},"item":'

        def encode(item: Any) -> bytes:
            try:
                return f"{head}{_write_value(item)}}}\x1e".encode()
            except RecursionError:
                raise ValueError(_TOO_DEEP) from None

        return encode

    def _text(self, message: Message) -> str:
        # Written as text, since building dictionaries first costs twice as much;
        # and told apart by type, the most frequent first.
        if isinstance(message, Completion):
            head = f'{{"type":3,"invocationId":{_quote(message.invocation_id)}'
            if message.error is not None:
                return f'{head},"error":{_quote(message.error)}}}'
            if message.result is VOID:
                return head + "}"
            return f'{head},"result":{_write_value(message.result)}}}'
        if isinstance(message, Invocation):
            asks = message.invocation_id
            number = "" if asks is None else f'"invocationId":{_quote(asks)},'
            return (
                f'{{"type":1,{number}"target":{_quote(message.target)}'
                f',"arguments":{_write_json(message.arguments)}}}'
            )
        match message:
            case Ping():
                return '{"type":6}'
            case Close(error, allow_reconnect):
                reason = "" if error is None else f',"error":{_quote(error)}'
                again = ',"allowReconnect":true' if allow_reconnect else ""
                return f'{{"type":7{reason}{again}}}'
            case Ack(sequence_id):
                return f'{{"type":8,"sequenceId":{sequence_id}}}'
            case Sequence(sequence_id):
                return f'{{"type":9,"sequenceId":{sequence_id}}}'
        raise TypeError(f"a server does not send {type(message).__name__} like this")

    def decode(self, inbox: bytearray, limit: int | None) -> Iterator[Message | None]:
        while True:
            *records, rest = inbox.split(RECORD_SEPARATOR)
            inbox[:] = rest
            for record in records:
                if limit is not None and len(record) >= limit:
                    raise _too_big(limit)
                message = self._read(record)
                if message is not None:
                    yield message
            if RECORD_SEPARATOR not in inbox:  # none came while these were used
                if limit is not None and len(inbox) > limit:
                    raise _too_big(limit)
                yield None

    def _read(self, record: bytearray) -> Message | None:
        """Read one record; None for a type that a later version may define."""
        try:
            text = record.decode().strip(_JSON_SPACE)
            fields, end = _scan_json(text, 0)
            if end != len(text):
                raise ValueError("text behind the value")
            if (
                end > 2 * _JSON_DEPTH
                and text.count("[") + text.count("{") > _JSON_DEPTH
            ):  # there are brackets enough to nest so deep
                _check_depth(text)
        except (StopIteration, ValueError, RecursionError):
            raise ProtocolError("Error reading JSON.") from None
        if type(fields) is not dict:
            raise ProtocolError(
                f"Unexpected JSON Token Type '{_json_kind(fields)}'. "
                "Expected a JSON Object."
            )
        kind = fields.get("type", VOID)
        if type(kind) is not int:
            if kind is VOID:
                raise ProtocolError("Missing required property 'type'.")
            raise ProtocolError("Expected 'type' to be of type Number.")
        if "headers" in fields and 1 <= kind <= 5:
            _check_headers(fields["headers"])
        return self._build(kind, fields)

    def _build(self, kind: int, fields: dict[str, Any]) -> Message | None:
        if kind == 1 or kind == 4:
            try:
                target, arguments = fields["target"], fields["arguments"]
            except KeyError:
                raise self._incomplete(fields) from None
            if type(target) is not str or type(arguments) is not list:
                raise self._incomplete(fields)
            stream_ids = fields.get("streamIds")
            if stream_ids is not None:
                stream_ids = self._stream_ids(stream_ids)
            invocation_id = fields.get("invocationId")
            if type(invocation_id) is not str or not invocation_id:
                invocation_id = _take_id(invocation_id, required=kind == 4)
            if kind == 4:
                assert invocation_id is not None
                return StreamInvocation(
                    target, arguments, invocation_id, stream_ids or ()
                )
            return Invocation(target, arguments, invocation_id, stream_ids or ())
        match kind:
            case 2:
                invocation_id = self._id(fields)
                if "item" not in fields:
                    raise ProtocolError("Missing required property 'item'.")
                return StreamItem(invocation_id, fields["item"])
            case 3:
                return self._read_completion(fields)
            case 5:
                return CancelInvocation(self._id(fields))
            case 6:
                return PING
            case 7:
                return self._read_close(fields)
            case 8:
                return Ack(self._sequence_id(fields))
            case 9:
                return Sequence(self._sequence_id(fields))
        return None

    @staticmethod
    def _incomplete(fields: dict[str, Any]) -> ProtocolError:
        """Say what an invocation lacks."""
        for name, kind, word in (
            ("target", str, "String"),
            ("arguments", list, "Array"),
        ):
            if name not in fields:
                return ProtocolError(f"Missing required property '{name}'.")
            if type(fields[name]) is not kind:
                break
        return ProtocolError(f"Expected '{name}' to be of type {word}.")

    def _read_completion(self, fields: dict[str, Any]) -> Completion:
        invocation_id = self._id(fields)
        error = fields.get("error")
        if error is not None:
            _take_string(error, "error")
            if "result" in fields:
                raise ProtocolError(
                    "The 'error' and 'result' properties are mutually exclusive."
                )
        return Completion(invocation_id, fields.get("result", VOID), error)

    def _read_close(self, fields: dict[str, Any]) -> Close:
        error = fields.get("error")
        if error is not None:
            _take_string(error, "error")
        allow_reconnect = fields.get("allowReconnect", False)
        if type(allow_reconnect) is not bool:
            raise ProtocolError("Expected 'allowReconnect' to be true or false.")
        return Close(error, allow_reconnect)

    @staticmethod
    def _id(fields: dict[str, Any]) -> str:
        return _take_id(fields.get("invocationId")) or ""

    @staticmethod
    def _stream_ids(value: Any) -> tuple[str, ...]:
        if type(value) is not list:
            raise ProtocolError("Expected 'streamIds' to be of type Array.")
        for stream_id in value:
            if stream_id is None:
                raise ProtocolError("Null value for 'streamIds' is not valid.")
            _take_string(stream_id, "streamIds")
        return tuple(value)

    @staticmethod
    def _sequence_id(fields: dict[str, Any]) -> int:
        if "sequenceId" not in fields:
            raise ProtocolError("Missing required property 'sequenceId'.")
        value = fields["sequenceId"]
        if type(value) is not int:
            raise ProtocolError("Expected 'sequenceId' to be of type Number.")
        return value


def _check_headers(headers: Any) -> None:
    """Look at headers, which nothing here uses, as strictly as .NET does."""
    if headers is None:
        return
    if type(headers) is not dict:
        raise ProtocolError("Expected 'headers' to be of type StartObject.")
    for key, value in headers.items():
        if type(value) is not str:
            raise ProtocolError(f"Expected header '{key}' to be of type String.")


def _check_depth(text: str) -> None:
    """Raise ValueError for JSON nested deeper than the reference reads."""
    depth = deepest = 0
    for bracket in re.sub(r'"(?:[^"\\]|\\.)*"|[^][}{]', "", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _JSON_DEPTH:
        raise ValueError(f"nested {deepest} deep")


def _json_kind(value: Any) -> str:
    """Name a JSON value as .NET's reader names its token."""
    if isinstance(value, bool):
        return str(value)
    kinds: dict[type, str] = {list: "Array", str: "String", type(None): "Null"}
    return kinds.get(type(value), "Number")


class MessagePackProtocol:
    """One MessagePack array a message, each led by its length as a VarInt.

    Needs the `msgpack` package; raises ImportError without it.
    """

    name: ClassVar[str] = "messagepack"
    binary: ClassVar[bool] = True

    def __init__(self) -> None:
        import msgpack  # type: ignore[import-untyped,import-not-found,unused-ignore]

        # Text that is none, half a surrogate for example, is replaced, as in .NET.
        self._unpack = functools.partial(
            msgpack.unpackb, strict_map_key=False, unicode_errors="replace"
        )
        self._pack = functools.partial(
            msgpack.packb,
            datetime=True,
            default=self._to_plain,
            unicode_errors="replace",
        )

    @staticmethod
    def _to_plain(value: Any) -> Any:
        # msgpack asks here only for times without a zone: they are taken as UTC.
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC)
        return _to_plain(value)

    def encode(self, message: Message) -> bytes:
        return self._measured(self._packed(self._fields(message)))

    def encode_result(self, invocation_id: str, result: Any) -> bytes:
        return self.encode(Completion(invocation_id, result))

    def item_encoder(self, invocation_id: str) -> Callable[[Any], bytes]:
        # An array is its elements one after the other, behind their number (4).
        head = b"\x94" + b"".join(map(self._packed, (2, {}, invocation_id)))
        return lambda item: self._measured(head + self._packed(item))

    def _packed(self, value: Any) -> bytes:
        try:
            packed: bytes = self._pack(value)
        except OverflowError as error:
            raise ValueError(f"an integer beyond 64 bits: {error}") from None
        return packed

    @staticmethod
    def _measured(body: bytes) -> bytes:
        """Lead a body by its length."""
        length, prefix = len(body), bytearray()
        while length > 0x7F:
            prefix.append(length & 0x7F | 0x80)
            length >>= 7
        prefix.append(length)
        return bytes(prefix) + body

    def _fields(self, message: Message) -> list[Any]:
        match message:
            case Completion(invocation_id, result, None):
                if result is VOID:
                    return [3, {}, invocation_id, 2]
                return [3, {}, invocation_id, 3, result]
            case Completion(invocation_id, _, error):
                return [3, {}, invocation_id, 1, error]
            case Invocation(target, arguments, invocation_id):
                return [1, {}, invocation_id, target, arguments, []]
            case Ping():
                return [6]
            case Close(error, allow_reconnect):
                return [7, error, allow_reconnect]
            case Ack(sequence_id):
                return [8, sequence_id]
            case Sequence(sequence_id):
                return [9, sequence_id]
        raise TypeError(f"a server does not send {type(message).__name__} like this")

    def decode(self, inbox: bytearray, limit: int | None) -> Iterator[Message | None]:
        while True:
            length, start = self._length(inbox)
            if limit is not None and start + length > limit:
                raise _too_big(limit)
            if not start or len(inbox) < start + length:
                yield None
                continue
            body = bytes(inbox[start : start + length])
            del inbox[: start + length]
            message = self._read(body)
            if message is not None:
                yield message

    @staticmethod
    def _length(inbox: bytearray) -> tuple[int, int]:
        """Read the prefix: the body's length and where it starts (0: incomplete)."""
        length = 0
        for position, byte in enumerate(inbox[:5]):
            length |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                if length <= 0x7FFFFFFF:
                    return length, position + 1
                break
        else:
            if len(inbox) < 5:
                return 0, 0
        raise ProtocolError("Messages over 2GB in size are not supported.")

    def _read(self, body: bytes) -> Message | None:
        """Read one array; None for a type that a later version may define."""
        try:
            try:
                fields = self._unpack(body, timestamp=3)  # as datetime
            except (ValueError, OverflowError):  # a year beyond Python's?
                fields = self._unpack(body)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"Error reading MessagePack: {error}") from None
        if type(fields) is not list or not fields:
            raise ProtocolError("Reading array length for 'elementCount' failed.")
        kind = fields[0]
        if type(kind) is not int:
            raise ProtocolError("Reading 'messageType' as Int32 failed.")
        if 1 <= kind <= 5 and len(fields) > 1:
            _check_headers(fields[1])
        try:
            return self._build(kind, fields)
        except IndexError:
            raise ProtocolError(
                f"A message of type {kind} has more than {len(fields)} elements."
            ) from None

    def _build(self, kind: int, fields: list[Any]) -> Message | None:
        match kind:
            case 1 | 4:
                return self._build_invocation(kind, fields)
            case 2:
                return StreamItem(self._id(fields), fields[3])
            case 3:
                return self._build_completion(fields)
            case 5:
                return CancelInvocation(self._id(fields))
            case 6:
                return PING
            case 7:
                error = fields[1]
                if error is not None:
                    self._string(error, "error")
                return Close(error, len(fields) > 2 and fields[2] is True)
            case 8:
                return Ack(self._sequence_id(fields))
            case 9:
                return Sequence(self._sequence_id(fields))
        return None

    def _build_invocation(self, kind: int, fields: list[Any]) -> Message:
        target = self._string(fields[3], "target")
        arguments = fields[4]
        if type(arguments) is not list:
            raise ProtocolError("Reading array length for 'arguments' failed.")
        stream_ids = fields[5] if len(fields) > 5 and fields[5] is not None else []
        if type(stream_ids) is not list:
            raise ProtocolError("Reading array length for 'streamIds' failed.")
        for stream_id in stream_ids:
            self._string(stream_id, "streamIds")
        if kind == 4:
            return StreamInvocation(
                target, arguments, self._id(fields), tuple(stream_ids)
            )
        invocation_id = fields[2]
        if invocation_id is not None:
            invocation_id = self._string(invocation_id, "invocationId") or None
        return Invocation(target, arguments, invocation_id, tuple(stream_ids))

    def _build_completion(self, fields: list[Any]) -> Completion:
        invocation_id = self._id(fields)
        match fields[3] if len(fields) > 3 else 2:  # signalrcore sends three elements
            case 1:
                error = self._string(fields[4], "error")
                return Completion(invocation_id, VOID, error)
            case 2:
                return Completion(invocation_id, VOID)
            case 3:
                return Completion(invocation_id, fields[4])
        raise ProtocolError("Invalid invocation result kind.")

    @staticmethod
    def _string(value: Any, name: str) -> str:
        if type(value) is not str:
            raise ProtocolError(f"Reading '{name}' as String failed.")
        return value

    def _id(self, fields: list[Any]) -> str:
        if not self._string(fields[2], "invocationId"):
            raise ProtocolError("Missing required property 'invocationId'.")
        return str(fields[2])

    @staticmethod
    def _sequence_id(fields: list[Any]) -> int:
        if type(fields[1]) is not int:
            raise ProtocolError("Reading 'sequenceId' as Int64 failed.")
        return fields[1]


def _load_protocols() -> dict[str, HubProtocol]:
    """Make the protocols that this installation can speak, by name."""
    protocols: dict[str, HubProtocol] = {"json": JsonProtocol()}
    with contextlib.suppress(ImportError):
        protocols["messagepack"] = MessagePackProtocol()
    return protocols


class HandshakeRequest(NamedTuple):
    """The first thing that a client says; JSON whatever protocol it asks for."""

    protocol: str
    version: int


#: The newest version of either protocol: 2 added stateful reconnect.
PROTOCOL_VERSION = 2


def _read_handshake(record: bytes) -> HandshakeRequest:
    """Read the handshake request without its separator. Raises ProtocolError."""
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError):
        raise ProtocolError("Error reading JSON.") from None
    if type(fields) is not dict:
        kind = _json_kind(fields)
        raise ProtocolError(
            f"Unexpected JSON Token Type '{kind}'. Expected a JSON Object."
        )
    for name, kind_of, word in (
        ("protocol", str, "String"),
        ("version", int, "Number"),
    ):
        if name not in fields:
            content = record.decode(errors="replace")
            raise ProtocolError(
                f"Missing required property '{name}'. Message content: {content}"
            )
        if type(fields[name]) is not kind_of:
            raise ProtocolError(f"Expected '{name}' to be of type {word}.")
    return HandshakeRequest(fields["protocol"], fields["version"])


def _handshake_response(error: str | None = None) -> bytes:
    """Write the answer to a handshake: empty for success, else the error."""
    return f"{'{}' if error is None else _write_json({'error': error})}\x1e".encode()


# --------------------------------------------------------------- connection
#
# A connection is a duplex pipe. A transport holds one end, the hub the other,
# and neither knows the other. Two rules keep clients out of each other's way:
# what comes in waits (a full inbox stops the reading, so TCP slows the peer),
# what goes out never does (a full outbox cuts the peer as slow). Only a sender
# with a single receiver may wait, for `room`.
#
# Both happen in turns (`Turn`): what came for the hub's connections is heard, then
# what goes to each leaves in one write. There are no locks: one thread, and no
# await between a look and an act, is the lock.

#: Bytes that may wait, either way, before somebody has to: SignalR's 64 KiB.
_HIGH_WATER = 65_536

#: Bytes for many that gain nothing by waiting for more.
_LARGE = 8192

#: Seconds that one client's messages may take before others have their turn.
_PATIENCE = 0.01

#: A connected stateful client may owe acknowledgements for so many outboxes.
_REPLAY_SURPLUS = 8


class Link(Protocol):
    """What a transport offers to the connection that it serves just now."""

    #: False while the peer takes no more, and after the goodbye.
    writable: bool
    #: Writes ready bytes, for a transport that needs nothing around them.
    direct: Callable[[bytes], None] | None

    def flush(self) -> None:
        """Send what is in the outbox, now or as soon as the peer takes it."""

    def finish(self, failed: bool) -> None:
        """Send what is left, then say goodbye in the transport's own way."""

    def abort(self) -> None:
        """Drop the peer at once."""

    def unsent(self) -> int:
        """Count the bytes taken from the outbox but not yet by the peer."""

    def alive(self) -> bool:
        """Tell whether the peer is still there, as far as one can see."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Traffic:
    """Counters of one hub, for `HubContext.stats`."""

    __slots__ = ("bytes_in", "bytes_out", "cuts", "messages_in", "messages_out")

    def __init__(self) -> None:
        self.messages_in = self.messages_out = 0
        self.bytes_in = self.bytes_out = 0
        self.cuts: dict[str, int] = {}

    def count_cut(self, reason: str) -> None:
        self.cuts[reason] = self.cuts.get(reason, 0) + 1


class Wire:
    """How messages travel on a connection: a protocol, in frames or bare.

    Few exist and all connections share them, so that a message to a thousand
    clients is encoded once for each wire in use, not once for each client.
    """

    __slots__ = ("_binary", "_frame", "encode", "ping", "protocol")

    def __init__(
        self, protocol: HubProtocol, frame: Callable[[bytes, bool], bytes] | None
    ) -> None:
        self.protocol = protocol
        self._binary = protocol.binary
        self._frame = frame
        self.encode: Callable[[Message], bytes] = self._framed(protocol.encode)
        self.ping = self.encode(PING)

    def encode_result(self, invocation_id: str, result: Any) -> bytes:
        """Write the result of one call (see `HubProtocol`)."""
        data = self.protocol.encode_result(invocation_id, result)
        return data if self._frame is None else self._frame(data, self._binary)

    def item_encoder(self, invocation_id: str) -> Callable[[Any], bytes]:
        """Make what writes the items of one stream (see `HubProtocol`)."""
        return self._framed(self.protocol.item_encoder(invocation_id))

    def _framed(self, encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        frame, binary = self._frame, self._binary
        if frame is None:
            return encode
        return lambda value: frame(encode(value), binary)


class Replay:
    """What stateful reconnect remembers: messages sent and not acknowledged.

    Each side counts the messages of `COUNTED` types that it sends, from 1; the
    numbers never travel, except in Ack and Sequence.
    """

    __slots__ = ("acked", "frames", "latest", "next_in", "sent", "size")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.size = 0
        #: Messages sent so far; the last of them are in `frames`.
        self.sent = 0
        #: The number that the next counted message of the peer will have.
        self.next_in = 1
        #: The highest number received, and the highest acknowledged to the peer.
        self.latest = self.acked = 0

    def keep(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.size += len(frame)
        self.sent += 1

    def first(self) -> int:
        """Number the oldest message that a reconnecting peer will be sent."""
        return self.sent - len(self.frames) + 1

    def acknowledge(self, number: int) -> None:
        """Forget what the peer has; a number never sent changes nothing."""
        done = number - self.first() + 1
        if 0 < done <= len(self.frames):
            self.size -= sum(map(len, self.frames[:done]))
            del self.frames[:done]

    def accept(self) -> bool:
        """Count a message from the peer; False for one that came before."""
        number = self.next_in
        self.next_in += 1
        if number <= self.latest:
            self.acked = 0  # the peer replays, so our last Ack never reached it
            return False
        self.latest = number
        return True

    def resume(self, number: int) -> None:
        """Continue counting where the peer says that its replay begins."""
        if number > self.next_in:
            raise ProtocolError(
                "Sequence ID greater than amount of messages we've received."
            )
        self.next_in = number


def _nothing(*ignored: object) -> None:
    """Stand in for a callback until somebody listens."""


class Connection:
    """One client's pipe. Created by negotiate, used by a transport and a hub."""

    __slots__ = (
        "_crowd",
        "_turn",
        "_waiters",
        "announced",
        "busy",
        "closing",
        "connection_id",
        "fed",
        "gone",
        "inbox",
        "last_seen",
        "link",
        "on_change",
        "on_data",
        "on_lost",
        "options",
        "outbox",
        "posting",
        "queued",
        "reading_paused",
        "replay",
        "request",
        "shortcut",
        "stall",
        "stateful",
        "taken",
        "task",
        "token",
        "traffic",
        "transport",
        "user_id",
        "wire",
    )

    def __init__(self, options: HubOptions, turn: Turn, token: str) -> None:
        self.options = options
        self.traffic = turn.traffic
        self._turn = turn
        limit = options.outbox_limit
        self._crowd = _HIGH_WATER if limit is None else min(limit, _HIGH_WATER)
        #: The public name, and the secret one that the requests carry.
        self.connection_id = self.token = token
        self.user_id: str | None = None
        self.stateful = False
        self.transport: str | None = None
        self.request: web.Request | None = None
        self.task: asyncio.Task[None] | None = None
        self.wire: Wire | None = None
        self.replay: Replay | None = None
        #: The hub has ended: no more is sent than what is in the outbox.
        self.closing = False
        #: Nobody will read the outbox any more; the token is dead.
        self.gone = False
        self.link: Link | None = None
        #: Writes bytes straight to the socket while nothing stands in the way: no
        #: transport that frames them, nothing that waits, no replay to count for.
        self.shortcut: Callable[[bytes], None] | None = None
        self.last_seen = time.monotonic()
        self.inbox = bytearray()
        #: Bytes ever put into the inbox.
        self.fed = 0
        self.outbox: list[bytes] = []
        #: Bytes in the outbox.
        self.queued = 0
        #: Bytes ever taken from the outbox.
        self.taken = 0
        #: What the client had taken when it last made progress, and the time.
        self.stall: tuple[tuple[int, int], float] | None = None
        #: The hub leaves whole messages in the inbox for now.
        self.busy = True
        self.reading_paused = False
        #: Keeps the bytes of two POSTs apart.
        self.posting: asyncio.Lock | None = None
        self._waiters: list[asyncio.Future[None]] | None = None
        #: Called in the turn that follows each `announce`; it is due if announced.
        self.on_data: Callable[[], None] = _nothing
        self.announced = False
        self.on_lost: Callable[[Exception | None], None] = _nothing
        #: Told when it gets a link, loses it, or is gone.
        self.on_change: Callable[[Connection], object] = _nothing

    # The hub's end

    def send(self, frame: bytes, counted: bool = True, messages: int = 1) -> None:
        """Queue an encoded message for the client. Never waits.

        frame: whole messages, `messages` of them; one only if they are counted
            for a replay.
        Beyond `outbox_limit` bytes the client is cut: one stopped reader must
        not hold everybody's memory. After the end this does nothing.
        """
        if self.closing:
            return
        self.traffic.messages_out += messages
        if self._turn.batch is not None:
            self._turn.batch.part(self)
        if self.replay is not None:
            if counted:
                self.replay.keep(frame)
            if self.link is None:  # the replay will bring it
                self._check_backlog()
                return
            if self.replay.size > _HIGH_WATER:
                self._check_backlog()
        if self.queued > self._crowd:
            self._crowded()  # what waits is judged without what comes now
        if not self.outbox:
            self._turn.flush_later(self)
            self.shortcut = None
        self.outbox.append(frame)
        self.queued += len(frame)

    def mention(self, frame: bytes) -> bool:
        """Send what only matters now, past what waits if that is quicker.

        Returns False if the peer takes nothing just now.
        """
        if self.shortcut is not None:
            self.traffic.messages_out += 1
            self.traffic.bytes_out += len(frame)
            self.shortcut(frame)
        elif self.link is not None and self.link.writable:
            self.send(frame, counted=False)
        else:
            return False
        return True

    def _crowded(self) -> None:
        """Hand a full outbox to the socket now; give up on a peer that is slow."""
        self.flush()
        self._check_backlog()

    def _check_backlog(self) -> None:
        limit = self.options.outbox_limit
        if limit is None:
            return
        if self.replay is not None:
            # Acknowledgements come once a second, so a client that takes all
            # at once may owe many for that long. One that is away may not.
            owed = self.replay.size / (_REPLAY_SURPLUS if self.link else 1)
            if owed > limit:
                self.cut("slow client")
                return
        if self.backlog() > limit:
            self.cut("slow client")

    def backlog(self) -> int:
        """Count the bytes that the client has not taken yet."""
        return self.queued + (self.link.unsent() if self.link else 0)

    def congested(self) -> bool:
        """Tell whether the client takes less than it is sent."""
        return self.queued > _HIGH_WATER  # it fills when the link takes no more

    def has_room(self) -> bool:
        """Tell whether a sender with this receiver only may go on."""
        if self.closing:
            return True
        if self.replay is None:
            return not self.congested()
        limit = self.options.stateful_reconnect_buffer_size
        full = limit is not None and self.replay.size > limit
        # What would make room, an Ack, may be behind what the hub does not read.
        return (self.busy or not full) and not self.congested()

    async def room(self) -> None:
        """Wait until the client has taken enough of what was sent, or is gone."""
        while not self.has_room():
            await self._wait()

    async def arrival(self) -> None:
        """Wait until more bytes arrive or the connection ends."""
        waiter = asyncio.get_running_loop().create_future()
        self.on_data = lambda: None if waiter.done() else waiter.set_result(None)
        if not self.closing:
            await waiter

    def finish(self, failed: bool = False) -> None:
        """End from the hub's side: deliver what is queued, then close."""
        self.shut()
        if self.link is not None:
            self.link.finish(failed)
        elif self.transport != LONG_POLLING:
            self.lost(None)
        self.wake()

    def cut(self, reason: str) -> None:
        """Drop the client now, whatever is queued. Counted and logged."""
        if self.gone:
            return
        self.traffic.count_cut(reason)
        log.warning("connection %s cut: %s", self.connection_id, reason)
        link = self.link
        self.lost(ConnectionAbortedError(f"The client was cut: {reason}."))
        if link is not None:
            link.abort()

    # The transport's end

    def attach(self, link: Link) -> None:
        """Give the pipe to a transport. A stateful one first gets the replay."""
        other, self.link = self.link, link
        self.look_for_shortcut()
        self.on_change(self)
        if other is not None:  # two came back at once: the later one is real
            other.abort()
        if self.replay is not None and self.wire is not None:
            self.inbox.clear()  # half a message that the client will send again
            first = self.wire.encode(Sequence(self.replay.first()))
            self.outbox[:] = [first, *self.replay.frames]
            self.queued = sum(map(len, self.outbox))
            self.flush()

    def detach(self) -> None:
        """Take the pipe back: the peer may come again until it is too late."""
        self.link = self.shortcut = None
        self.reading_paused = False
        self.last_seen = time.monotonic()
        self.on_change(self)
        if self.replay is not None:
            self.outbox.clear()
            self.queued = 0

    def feed(self, data: bytes) -> None:
        """Take bytes from the client; reading stops while too many wait."""
        if self.closing:
            return
        self.traffic.bytes_in += len(data)
        self.fed += len(data)
        self.inbox += data
        self.announce()
        if self.busy and len(self.inbox) > _HIGH_WATER and self.link:
            self.reading_paused = True
            self.link.pause_reading()

    def taken_in(self, busy: bool) -> None:
        """Hear from the hub that it took what it could; it may be too busy for all.

        What it leaves without being busy is the front of a message whose rest
        must be let in, however long it is.
        """
        self.busy = busy
        crowded = busy and len(self.inbox) > _HIGH_WATER // 2
        if self.reading_paused and self.link is not None and not crowded:
            self.reading_paused = False
            self.link.resume_reading()
        self.wake()  # a POST may have room now; `has_room` depends on `busy`

    async def inbox_room(self) -> None:
        """Wait until the hub has caught up: a POST is answered only then."""
        while self.busy and len(self.inbox) > _HIGH_WATER and not self.closing:
            await self._wait()

    def flush(self) -> None:
        """Hand what waits to the transport; a broken one must not hold up others."""
        try:
            if self.outbox and self.link is not None:
                self.link.flush()
        except Exception:
            log.exception("connection %s", self.connection_id)
            self.cut("transport error")

    def take(self) -> bytes:
        """Take all that waits, whole messages, in order."""
        outbox = self.outbox
        data = outbox[0] if len(outbox) == 1 else b"".join(outbox)
        self.traffic.bytes_out += len(data)
        self.taken += len(data)
        outbox.clear()
        if self.queued > _HIGH_WATER:
            # Calls wait while a client does not take the answers: they may go on.
            self.announce()
        self.queued = 0
        self.look_for_shortcut()
        if self._waiters:
            self.wake()
        return data

    def lost(self, error: Exception | None) -> None:
        """End from the transport's side: the client is gone."""
        if not self.gone:
            self.gone = True
            self.shut()
            self.outbox.clear()
            self.queued = 0
            self.on_change(self)
            self.on_lost(error)
            self.announce()
            self.wake()

    def stalled(self, now: float) -> bool:
        """Tell whether bytes wait and the client has taken none for too long."""
        if self.link is None:
            return False
        unsent = self.link.unsent()
        if not (self.queued or unsent) and (self.replay is None or self.has_room()):
            self.stall = None
            return False
        moved = (self.taken - unsent, self.replay.first() if self.replay else 0)
        if self.stall is None or self.stall[0] != moved:
            self.stall = (moved, now)
        return now - self.stall[1] > _or_forever(self.options.transport_send_timeout)

    # Both ends

    def announce(self, again: bool = False) -> None:
        """Have the hub look at the inbox, or at what waits, in the turn to come.

        again: it just did, and ran out of time.
        """
        if not self.announced:
            self.announced = True
            self._turn.hear_later(self, again)

    def shut(self) -> None:
        """Take nothing more, from either side."""
        self.closing, self.shortcut = True, None

    def look_for_shortcut(self) -> None:
        """Find out whether bytes may go straight to the socket just now."""
        link = self.link
        blocked = self.outbox or self.closing or self.replay is not None
        ready = link is not None and link.writable and not blocked
        self.shortcut = link.direct if link is not None and ready else None

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        """Let everyone who waits look again."""
        if self._waiters:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


class Batch:
    """Messages that wait for the same receivers, kept once for all of them.

    address: where the messages go; one to another address ends the batch.
    wires: those of all connections, of which the receivers use some or all.
    """

    __slots__ = (
        "_apart",
        "_count",
        "_frames",
        "_receivers",
        "_shares",
        "_size",
        "_traffic",
        "_wires",
        "address",
    )

    def __init__(
        self,
        address: object,
        receivers: dict[str, Connection],
        wires: Collection[Wire],
        traffic: Traffic,
    ) -> None:
        self.address = address
        # By connection id. The batch is settled before these ever change.
        self._receivers = receivers
        if len(wires) > 1:
            wires = {c.wire for c in receivers.values() if c.wire is not None}
        self._wires = wires
        self._frames: dict[Wire | None, list[bytes]] = {wire: [] for wire in wires}
        self._shares: dict[Wire | None, bytes] = {}
        self._count = self._size = 0
        self._traffic = traffic
        self._apart: dict[str, Connection] = {}

    def encode(self, message: Message) -> dict[Wire | None, bytes]:
        """Write a message once for each wire in use.

        Raises TypeError or ValueError if it cannot be written.
        """
        return {wire: wire.encode(message) for wire in self._wires}

    def add(self, frames: dict[Wire | None, bytes]) -> int:
        """Add an encoded message; return its size in bytes."""
        size = 0
        for wire, frame in frames.items():
            self._frames[wire].append(frame)
            size = len(frame)  # another wire's is about the same
        self._count += 1
        self._size += size
        self._shares.clear()
        for connection in list(self._apart.values()):
            connection.send(frames[connection.wire])
        return size

    def part(self, connection: Connection) -> None:
        """Move one receiver's share to its outbox, from where it goes on alone."""
        name = connection.connection_id
        if name in self._receivers and name not in self._apart:
            self._apart[name] = connection
            self._queue(connection)

    def spill(self) -> None:
        """Move everyone's share to their outboxes, or what is large to the sockets."""
        if self._size > _LARGE:
            self.deliver()
            return
        for name, connection in list(self._receivers.items()):
            if name not in self._apart:
                self._queue(connection)

    def _queue(self, connection: Connection) -> None:
        if connection.replay is None:
            connection.send(self._share(connection.wire), messages=self._count)
            return
        for frame in self._frames[connection.wire]:  # each has a number of its own
            connection.send(frame)

    def _share(self, wire: Wire | None) -> bytes:
        """Join the messages for one wire: the same bytes for all who get them."""
        share = self._shares.get(wire)
        if share is None:
            share = self._shares[wire] = b"".join(self._frames[wire])
        return share

    def deliver(self) -> None:
        """Write everyone's share at once; who cannot take it gets it queued."""
        apart = self._apart.values()
        for connection in apart:
            connection.shortcut = None  # it has its share already
        writes = {wire: self._writes(wire) for wire in self._frames}
        if sum(map(len, writes.values())) + len(apart) < len(self._receivers):
            for name, connection in list(self._receivers.items()):
                if connection.shortcut is None and name not in self._apart:
                    self._queue(connection)
        for wire in self._frames:
            self._write_all(self._share(wire), writes[wire])
        for connection in apart:
            connection.look_for_shortcut()

    def _writes(self, wire: Wire | None) -> list[Callable[[bytes], None]]:
        """List the shortcuts of one wire: a loop over nothing else is a tenth faster."""
        return [
            write
            for connection in self._receivers.values()
            if (write := connection.shortcut) is not None and connection.wire is wire
        ]

    def _write_all(self, data: bytes, writes: list[Callable[[bytes], None]]) -> None:
        for write in writes:
            try:
                write(data)
            except Exception as error:  # noqa: BLE001 (it must not hold up the others)
                self._give_up(write, error)
        self._traffic.messages_out += self._count * len(writes)
        self._traffic.bytes_out += len(data) * len(writes)

    def _give_up(self, write: Callable[[bytes], None], error: Exception) -> None:
        for connection in self._receivers.values():
            if connection.shortcut is write:
                log.error("connection %s", connection.connection_id, exc_info=error)
                connection.cut("transport error")


class Turn:
    """One turn of the event loop: what came is heard, then what goes leaves.

    All sockets are read before the first client is heard, and all are heard before
    messages are written. That keeps each step's code in the processor's cache, and it
    joins what leaves: messages for one connection wait in its outbox, in order.
    Broadcasts to one set of receivers wait once for all of them, as a `Batch`, until
    another set is addressed or this one changes. A receiver who is sent something
    alone goes on apart from the others. Only pings, goodbyes, answers to frames, and
    what an outbox cannot hold, leave at once.
    """

    __slots__ = (
        "_arrived",
        "_context",
        "_leaving",
        "_scheduled",
        "_unfinished",
        "batch",
        "published",
        "traffic",
    )

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        #: That of nobody in particular, whoever has something to say first.
        self._context = contextvars.copy_context()
        self._arrived: deque[Connection] = deque()
        self._unfinished: deque[Connection] = deque()
        self._leaving: list[Connection] = []
        #: What many will get at the end of the turn, if anything.
        self.batch: Batch | None = None
        self._scheduled = False
        #: Bytes published since the last flush, counted once for all receivers (see
        #: `ClientProxy.send`).
        self.published = 0

    def hear_later(self, connection: Connection, again: bool = False) -> None:
        """Tell the hub of this connection as a turn begins.

        again: it had more to say than fits into a turn, and others go before it.
        """
        (self._unfinished if again else self._arrived).append(connection)
        self._schedule()

    def flush_later(self, connection: Connection) -> None:
        """Flush this connection's outbox at the end of the turn."""
        self._leaving.append(connection)
        self._schedule()

    def begin(self, batch: Batch) -> None:
        """Let messages wait in this batch from here on; another one ends."""
        if batch is not self.batch:
            self.settle()
            self.batch = batch
            self._schedule()

    def settle(self) -> None:
        """Give the batch to its receivers, before anything changes (see `Batch.spill`)."""
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.spill()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._run, context=self._context)

    def _run(self) -> None:
        try:
            self._hear_all()
        finally:  # a hub method may end the program
            self._scheduled = False
            if self._arrived or self._unfinished:
                self._schedule()
            self._flush_all()

    def _hear_all(self) -> None:
        until = time.perf_counter() + _PATIENCE
        for _ in range(len(self._arrived)):  # who comes meanwhile, comes next time
            self._hear(self._arrived.popleft())
        for _ in range(len(self._unfinished)):
            self._hear(self._unfinished.popleft())
            if time.perf_counter() > until:
                break

    def _hear(self, connection: Connection) -> None:
        connection.announced = False
        try:
            connection.on_data()
        except Exception:  # one client's fault must not hold up the others
            log.exception("connection %s", connection.connection_id)
            connection.cut("internal error")

    def _flush_all(self) -> None:
        self.published = 0
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.deliver()
        leaving, self._leaving = self._leaving, []
        for connection in leaving:
            connection.flush()


# --------------------------------------------------------------- transports
#
# Three ways to carry the pipe's bytes over HTTP; none looks inside them. The
# WebSocket is RFC 6455 written out on aiohttp's own transport, because the hub
# needs so little of it: incoming frames are one stream of bytes, and outgoing
# ones are ready before their receivers are known (a server does not mask, so
# the same bytes serve everyone). Left out: compression and sub-protocols.

TEXT, BINARY, CLOSE, PING_FRAME, PONG = 1, 2, 8, 9, 10

_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

#: How a client's frame may begin: between messages, and within a fragmented one.
_BETWEEN, _WITHIN = (
    frozenset(b"\x01\x02\x81\x82\x88\x89\x8a"),
    frozenset(b"\x00\x80\x88\x89\x8a"),
)

_utf8_decoder = codecs.getincrementaldecoder("utf-8")

#: Frames without payload in one fragmented message, after which it is a flood.
_EMPTY_FRAGMENTS = 100

#: The heads of short text and binary frames, by the length of their payload.
_HEADS = [[bytes((0x80 | opcode, n)) for n in range(126)] for opcode in (TEXT, BINARY)]
_long_head, _longest_head = struct.Struct("!BBH").pack, struct.Struct("!BBQ").pack


def _frame(payload: bytes, binary: bool = False) -> bytes:
    """Wrap a message into one final, unmasked WebSocket frame."""
    if len(payload) < 126:
        return _HEADS[binary][len(payload)] + payload
    return _frame_of(BINARY if binary else TEXT, payload)


def _frame_of(opcode: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return bytes((0x80 | opcode, length)) + payload
    if length < 65_536:
        return _long_head(0x80 | opcode, 126, length) + payload
    return _longest_head(0x80 | opcode, 127, length) + payload


_to_integer = int.from_bytes


def _unmask(payload: bytes, mask: bytes) -> bytes:
    """Undo the client's mask: one long XOR, the fastest way in plain Python."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (_to_integer(payload) ^ _to_integer(key)).to_bytes(size)


class FrameError(Exception):
    """The peer broke RFC 6455: the close code says how."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class FrameReader:
    """Reads a client's frames: bytes in, payload out. (RFC 6455, section 5)

    Data frames are one stream of bytes; where messages begin and end, the hub
    protocol knows. A long frame is passed on as it comes, never collected.
    """

    __slots__ = (
        "_decoder",
        "_empty",
        "_final",
        "_in_message",
        "_left",
        "_mask",
        "_rest",
        "error",
        "goodbye",
        "ping",
    )

    def __init__(self) -> None:
        self._rest = b""  # the head of a frame that is not complete yet
        self._left, self._mask = 0, b""  # of a frame in pieces: what is to come
        self._final = True  # it ends its message
        self._in_message = False  # a fragmented message is under way
        self._empty = 0  # its fragments without payload
        self._decoder: codecs.IncrementalDecoder | None = None  # if it is text
        #: The last ping, which answers for all (section 5.5.3).
        self.ping: bytes | None = None
        #: The peer's close frame, and what the peer did wrong: the end of reading.
        self.goodbye: bytes | None = None
        self.error: FrameError | None = None

    def read(self, data: bytes) -> bytes:
        """Return the payload of data frames; note a ping, a goodbye, an error."""
        payloads: list[bytes] = []
        try:
            self._rest = self._read(self._rest + data if self._rest else data, payloads)
        except FrameError as error:
            self.error = error
        except UnicodeDecodeError:
            self.error = FrameError(1007, "text that is not UTF-8")
        return payloads[0] if len(payloads) == 1 else b"".join(payloads)

    def _read(self, data: bytes, payloads: list[bytes]) -> bytes:
        """Collect payloads; return the head of a frame that is not complete."""
        position, size = 0, len(data)
        while self.goodbye is None:
            if self._left:
                if position == size:
                    break
                piece = self._take(data[position : position + self._left])
                position += len(piece)
                payloads.append(piece)
                continue
            if size - position < 2:
                break
            head, second = data[position], data[position + 1]
            length, start = second & 0x7F, position + 6
            if (
                head not in (_WITHIN if self._in_message else _BETWEEN)
                or second < 0x80  # not masked
                or (head >= 0x88 and length > 125)
            ):
                raise FrameError(1002, f"a frame that begins {head:02x} {second:02x}")
            if length > 125:
                start += 2 if length == 126 else 8
                length = int.from_bytes(data[position + 2 : start - 4], "big")
            if start > size:
                break
            mask, end = data[start - 4 : start], start + length
            if head > 0x80 and end <= size:  # whole: the usual case
                payload, position = _unmask(data[start:end], mask), end
                if head >= 0x88:
                    self._note(head & 0x0F, payload)
                    continue
                if head == 0x81 and not payload.isascii():
                    payload.decode()
                payloads.append(payload)
            elif head >= 0x88:
                break  # a control frame counts when it is whole
            else:
                self._begin(head, length, mask)
                position = start
        return data[position:]

    def _begin(self, head: int, length: int, mask: bytes) -> None:
        """Enter a frame that comes in pieces, or is itself a piece of a message."""
        if length >= 1 << 63:
            raise FrameError(1002, "a length with the highest bit set")
        if opcode := head & 0x0F:
            self._empty = 0
            self._decoder = _utf8_decoder() if opcode == TEXT else None
        self._final = head >= 0x80
        self._in_message = not self._final
        self._left, self._mask = length, mask
        if not length:
            self._take(b"")
            self._empty += 1
            if self._empty > _EMPTY_FRAGMENTS:
                raise FrameError(1008, "a flood of empty fragments")

    def _take(self, piece: bytes) -> bytes:
        """Unmask the next piece of a frame; text must be text."""
        payload, shift = _unmask(piece, self._mask), len(piece) % 4
        self._left -= len(piece)
        self._mask = self._mask[shift:] + self._mask[:shift]
        if self._decoder is not None:
            self._decoder.decode(payload, self._final and not self._left)
        return payload

    def _note(self, opcode: int, payload: bytes) -> None:
        if opcode == PING_FRAME:
            self.ping = payload
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1000
            known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
            if len(payload) == 1 or not (known or 3000 <= code <= 4999):
                raise FrameError(1002, f"close code {code}")
            payload[2:].decode()
            self.goodbye = payload


class WebSocket(FrameReader, asyncio.Protocol):
    """The server's side of one WebSocket, and the `Link` of its connection.

    It takes over the transport of an aiohttp request (see `serve_websocket`).
    """

    __slots__ = (
        "_connection",
        "_sent_close",
        "_timer",
        "_transport",
        "direct",
        "writable",
    )

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        super().__init__()
        self._connection = connection
        self._transport = transport
        self.writable = True
        self.direct: Callable[[bytes], None] | None = transport.write
        self._sent_close = False
        self._timer: asyncio.TimerHandle | None = None

    # From the peer (asyncio calls these)

    def data_received(self, data: bytes) -> None:
        if self.goodbye is not None or self.error is not None:
            return
        payload = self.read(data)
        if payload and not self._sent_close:
            self._connection.feed(payload)
        if self.ping is not None:
            self._answer_ping()
        if self.error is not None:  # what came before it is heard first
            asyncio.get_running_loop().call_soon(self._fail, self.error)
        elif self.goodbye is not None:
            self._send_close(self.goodbye[:2])
            self._transport.close()  # once everything is sent, or the timer runs out

    def eof_received(self) -> None:
        """Let the transport close; `connection_lost` follows."""

    def connection_lost(self, error: Exception | None) -> None:
        self.writable = False
        if self._timer is not None:
            self._timer.cancel()
        connection = self._connection
        if connection.link is not self:
            return
        connection.detach()
        # Without a close frame a stateful client may come back on a new socket.
        if connection.replay is None or connection.closing or self._sent_close:
            connection.lost(error)

    def pause_writing(self) -> None:
        self._set_writable(False)

    def resume_writing(self) -> None:
        self._set_writable(not self._sent_close)
        self._answer_ping()
        self._connection.flush()

    # From the connection (see Link)

    def flush(self) -> None:
        if self.writable:
            self._transport.write(self._connection.take())

    def finish(self, failed: bool) -> None:
        if self._connection.outbox and not self._sent_close:
            self._transport.write(self._connection.take())
        self._send_close((1011 if failed else 1000).to_bytes(2, "big"))
        if self._connection.reading_paused:  # the peer's close frame is behind it
            self._connection.reading_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        self._transport.abort()

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def alive(self) -> bool:
        return not self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def _answer_ping(self) -> None:
        """Answer the last ping; a peer that takes no data gets no pile of pongs."""
        if self.ping is not None and self.writable:
            self._transport.write(_frame_of(PONG, self.ping))
            self.ping = None

    # The end

    def _fail(self, error: FrameError) -> None:
        """Answer a broken frame with its close code, then hang up."""
        connection = self._connection
        if connection.link is not self:
            return
        log.warning("connection %s broke RFC 6455: %s", connection.connection_id, error)
        self._send_close(error.code.to_bytes(2, "big"))
        connection.detach()
        connection.lost(ProtocolError(str(error)))
        if self._transport.can_write_eof() and not self._transport.is_closing():
            with contextlib.suppress(OSError):  # the peer left without a word
                self._transport.write_eof()

    def _set_writable(self, writable: bool) -> None:
        self.writable = writable
        if self._connection.link is self:
            self._connection.look_for_shortcut()

    def _send_close(self, code: bytes) -> None:
        """Send a close frame and give the peer `close_timeout` for its part."""
        if self._sent_close or self._transport.is_closing():
            return
        self._sent_close = True
        self._set_writable(False)
        self._transport.write(_frame_of(CLOSE, code))
        timeout = self._connection.options.close_timeout
        if timeout is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(timeout, self._transport.abort)


async def serve_websocket(
    request: web.Request, connection: Connection
) -> web.StreamResponse:
    """Answer 101 and give the socket to the connection; return at once.

    The upgrade is aiohttp's, the frames are ours: the transport gets a new
    protocol, and aiohttp's own is told that its connection is over, so that
    neither a task nor a parser of it stays behind for an idle client.
    """
    key = request.headers.get("Sec-WebSocket-Key", "")
    accept = base64.b64encode(hashlib.sha1(key.encode() + _WEBSOCKET_GUID).digest())
    response = web.StreamResponse(
        status=101,
        headers={
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Accept": accept.decode(),
        },
    )
    with contextlib.suppress(ConnectionError):  # the client did not wait for it
        await response.prepare(request)
        await response.write_eof()
    transport = request.transport
    if transport is not None and connection.gone:  # meanwhile
        transport.close()
    if transport is None or transport.is_closing():
        if connection.replay is None:
            connection.lost(None)
        return response
    socket = WebSocket(connection, transport)
    tail = _Tail()
    request.protocol.set_parser(tail)  # type: ignore[arg-type]
    transport.set_protocol(socket)
    request.protocol.transport = None  # or the next line would close it
    request.protocol.connection_lost(None)
    connection.attach(socket)
    if tail.data:
        socket.data_received(tail.data)
    return response


class _Tail:
    """Takes from aiohttp what a hasty client sent right behind its upgrade."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """Nothing to end: the parser is used for what has already come."""


def _check_upgrade(request: web.Request) -> None:
    """Raise HTTPBadRequest or HTTPUpgradeRequired for a broken upgrade."""
    headers = request.headers
    if request.method != "GET" or request.version < aiohttp.HttpVersion11:
        raise web.HTTPBadRequest(text="A WebSocket upgrade is a GET of HTTP/1.1.")
    if "upgrade" not in headers.get("Connection", "").lower():
        raise web.HTTPBadRequest(text="A WebSocket needs 'Connection: Upgrade'.")
    if headers.get("Sec-WebSocket-Version", "") != "13":
        raise web.HTTPUpgradeRequired(
            text="Only version 13 of the WebSocket protocol is supported.",
            headers={"Sec-WebSocket-Version": "13"},
        )
    try:
        key = base64.b64decode(headers.get("Sec-WebSocket-Key", ""), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 16:
        raise web.HTTPBadRequest(text="Sec-WebSocket-Key must be 16 bytes in base64.")


class ParkedRequest:
    """The `Link` of a request whose answer waits for data: a poll or a stream."""

    __slots__ = (
        "_connection",
        "_waiter",
        "direct",
        "ended",
        "released",
        "transport",
        "writable",
    )

    def __init__(self, request: web.Request, connection: Connection) -> None:
        self.transport = request.transport
        self._connection = connection
        self.writable = True
        self.direct: Callable[[bytes], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        #: A newer poll wants to take its place.
        self.released = False
        self.ended = asyncio.Event()

    def flush(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def finish(self, failed: bool) -> None:
        timeout = self._connection.options.close_timeout
        if timeout is not None and not self.ended.is_set():
            asyncio.get_running_loop().call_later(timeout, self._give_up)
        self.flush()

    def _give_up(self) -> None:
        if not self.ended.is_set():
            self.abort()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self.flush()

    def release(self) -> None:
        self.released = True
        self.flush()

    def unsent(self) -> int:
        if self.transport is None or self.transport.is_closing():
            return 0
        return self.transport.get_write_buffer_size()

    def alive(self) -> bool:
        alive = self.transport is not None and not self.transport.is_closing()
        if not alive:
            self.flush()
        return alive

    def pause_reading(self) -> None:
        """The POST that brought the bytes is not answered; nothing to stop."""

    def resume_reading(self) -> None:
        """See `pause_reading`."""

    async def ready(self) -> bool:
        """Wait for data or the end of it all; True if there is data to send."""
        connection = self._connection
        while self.alive() and not self.released and not connection.gone:
            if connection.outbox:
                return True
            if connection.closing:
                return False
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return False


async def serve_events(
    request: web.Request, connection: Connection
) -> web.StreamResponse:
    """Stream the outbox as Server-Sent Events until either side ends."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache,no-store",
            "Pragma": "no-cache",
            "Content-Encoding": "identity",
        }
    )
    link = ParkedRequest(request, connection)
    try:
        await response.prepare(request)
        await response.write(b":\r\n")  # some browsers open on the first bytes only
        connection.attach(link)
        while await link.ready():
            event = connection.take()
            # Encoded messages hold no line feed, so one data line carries them.
            await response.write(b"data: " + event + b"\r\n\r\n")
        if not connection.gone:
            await response.write_eof()
    except ConnectionError:
        pass  # the client left while being written to, as clients do
    finally:
        link.ended.set()
        connection.detach()
        connection.lost(None)
    return response


_NO_CACHE = {
    "Cache-Control": "no-cache, no-store",
    "Pragma": "no-cache",
    "Expires": "Thu, 01 Jan 1970 00:00:00 GMT",
}


def _poll_answer(status: int, body: bytes = b"", data: bool = False) -> web.Response:
    kind = "application/octet-stream" if data else "text/plain"
    return web.Response(status=status, body=body, content_type=kind, headers=_NO_CACHE)


async def serve_poll(
    request: web.Request, connection: Connection, first: bool
) -> web.StreamResponse:
    """Answer one long poll: with data, empty after a while, 204 at the end.

    A newer poll takes the place of an older one, which must have ended before:
    two readers of one outbox would lose messages between them.
    """
    while isinstance(connection.link, ParkedRequest):
        connection.link.release()
        await connection.link.ended.wait()
    if connection.gone:
        return _poll_answer(404)
    link = ParkedRequest(request, connection)
    connection.attach(link)
    try:
        if first:
            return _poll_answer(200, data=True)
        try:
            async with asyncio.timeout(connection.options.poll_timeout):
                has_data = await link.ready()
        except TimeoutError:
            return _poll_answer(200)
        if has_data:
            return await _send_poll(request, connection)
        if connection.closing and not (link.released or connection.outbox):
            connection.lost(None)  # this 204 is the goodbye; the token dies
        return _poll_answer(204)
    finally:
        link.ended.set()
        if connection.link is link:
            connection.detach()


async def _send_poll(
    request: web.Request, connection: Connection
) -> web.StreamResponse:
    """Write what waits as the answer, for as long as the client takes it."""
    response = _poll_answer(200, connection.take(), data=True)
    try:
        await response.prepare(request)
        await response.write_eof()
    except ConnectionError as error:
        connection.lost(error)  # taken from the outbox, but nobody has it
    except asyncio.CancelledError:
        connection.lost(ConnectionResetError("The poll was dropped."))
        raise
    return response


# ----------------------------------------------------------------- registry
#
# Who is connected, who is in which group, and the one way out: an address says
# who shall have a message; publish finds them, encodes it once for each wire in
# use and keeps it once for all of them until the turn ends. An address is a
# value, not a closure: it can be logged, compared and sent to another process.
# A backplane is a subclass that overrides `publish`.


class Address(NamedTuple):
    """The receivers of a message: a kind, its names, and who is left out."""

    kind: str  # "all", "connections", "groups" or "users"
    names: tuple[str, ...] = ()
    excluding: frozenset[str] = frozenset()


class Registry:
    """The connections of one hub, their groups and users, and what they owe us."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.turn = Turn(self.traffic)
        self.connections: dict[str, Connection] = {}
        self._wires: dict[Wire, int] = {}  # in use, by how many
        self._groups: dict[str, dict[str, Connection]] = {}
        self._groups_of: dict[str, set[str]] = {}
        self._users: dict[str, dict[str, Connection]] = {}
        self._results: dict[str, tuple[Connection, asyncio.Future[Any]]] = {}
        self._owed: dict[Connection, dict[str, asyncio.Future[Any]]] = {}
        self._last_result = 0

    # Presence

    def add(self, connection: Connection) -> None:
        self.turn.settle()
        connection_id = connection.connection_id
        self.connections[connection_id] = connection
        if connection.wire is not None:
            self._wires[connection.wire] = self._wires.get(connection.wire, 0) + 1
        if connection.user_id is not None:
            of_user = self._users.setdefault(connection.user_id, {})
            of_user[connection_id] = connection

    def remove(self, connection: Connection) -> None:
        """Forget a connection, its memberships and the results it owed."""
        self.turn.settle()
        connection_id = connection.connection_id
        if self.connections.pop(connection_id, None) and connection.wire is not None:
            self._wires[connection.wire] -= 1
            if not self._wires[connection.wire]:
                del self._wires[connection.wire]
        for name in self.groups_of(connection_id):
            self.leave(connection_id, name)
        if connection.user_id is not None:
            of_user = self._users.get(connection.user_id, {})
            of_user.pop(connection_id, None)
            if not of_user:
                self._users.pop(connection.user_id, None)
        self.disown(connection)

    def join(self, connection_id: str, name: str) -> None:
        """Add to a group; a connection that is gone is silently left out."""
        connection = self.connections.get(connection_id)
        if connection is not None:
            self.turn.settle()
            self._groups.setdefault(name, {})[connection_id] = connection
            self._groups_of.setdefault(connection_id, set()).add(name)

    def leave(self, connection_id: str, name: str) -> None:
        self.turn.settle()
        members = self._groups.get(name)
        if members is not None and members.pop(connection_id, None) is not None:
            if not members:
                del self._groups[name]
            names = self._groups_of[connection_id]
            names.discard(name)
            if not names:
                del self._groups_of[connection_id]

    def members(self, name: str) -> list[str]:
        return list(self._groups.get(name, ()))

    def group_names(self) -> list[str]:
        return list(self._groups)

    def groups_of(self, connection_id: str) -> list[str]:
        return list(self._groups_of.get(connection_id, ()))

    # Sending

    def publish(self, address: Address, message: Invocation) -> None:
        """Send a message to everyone at the address, at the end of this turn.

        Raises TypeError or ValueError, before anyone got it, when the message
        cannot be written.
        """
        batch = self.turn.batch
        if batch is None or batch.address != address:
            receivers = self._receivers(address)
            if len(receivers) < 2:
                for connection in receivers.values():
                    self._send(connection, message)
                if not receivers:  # a mistake shows, whoever happens to be there
                    _write_json(message.arguments)
                return
            batch = Batch(address, receivers, self._wires, self.traffic)
        waits = batch is self.turn.batch
        frames = batch.encode(message)
        if waits and batch is not self.turn.batch:  # reading an argument published, too
            batch = Batch(address, self._receivers(address), self._wires, self.traffic)
        self.turn.begin(batch)
        self.turn.published += batch.add(frames)

    def _send(self, connection: Connection, message: Invocation) -> None:
        assert connection.wire is not None
        frame = connection.wire.encode(message)
        connection.send(frame)
        self.turn.published += len(frame)

    def _receivers(self, address: Address) -> dict[str, Connection]:
        """Find the connections at an address; the usual ones without copying."""
        kind, names, excluding = address
        if kind == "all":
            found = self.connections
        elif kind == "connections":
            found = {n: self.connections[n] for n in names if n in self.connections}
        else:
            sets = self._groups if kind == "groups" else self._users
            if len(names) == 1:
                found = sets.get(names[0], {})
            else:
                found = {}
                for name in names:
                    found.update(sets.get(name, {}))
        if not excluding:
            return found
        return {name: c for name, c in found.items() if name not in excluding}

    # Client results

    def expect(self, connection: Connection) -> tuple[str, asyncio.Future[Any]]:
        """Make an invocation id and a future for a result that a client owes."""
        self._last_result += 1
        invocation_id = f"s{self._last_result}"  # clients count without a letter
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._results[invocation_id] = connection, future
        self._owed.setdefault(connection, {})[invocation_id] = future
        return invocation_id, future

    def expects(self, invocation_id: str) -> bool:
        """Tell whether some client owes this result."""
        return invocation_id in self._results

    def forget(self, invocation_id: str) -> None:
        connection, _ = self._results.pop(invocation_id)
        owed = self._owed[connection]
        del owed[invocation_id]
        if not owed:
            del self._owed[connection]

    def answer(self, connection: Connection, completion: Completion) -> None:
        """Hand a client's result to whoever waits for it; others are ignored.

        Raises ProtocolError when another client was asked.
        """
        owner, future = self._results.get(completion.invocation_id, (None, None))
        if owner is None or future is None:
            return
        if owner is not connection:
            raise ProtocolError(
                f"Connection ID '{connection.connection_id}' is not valid for "
                f"invocation ID '{completion.invocation_id}'."
            )
        if future.done():
            return
        if completion.error is not None:
            future.set_exception(HubException(completion.error))
        elif completion.result is VOID:
            future.set_exception(HubException("Client didn't provide a result."))
        else:
            future.set_result(completion.result)

    def disown(self, connection: Connection) -> None:
        """Fail the results that a connection still owes."""
        for future in self._owed.get(connection, {}).values():
            if not future.done():
                future.set_exception(
                    ConnectionError(
                        f"Connection '{connection.connection_id}' disconnected."
                    )
                )


# ---------------------------------------------------------------------- hub
#
# All that user code sees. A hub method names its receivers through
# `self.clients` and sends; the same proxies serve routes and jobs through the
# HubContext that `map_hub` returns.


class _Slot(Protocol):
    """What must give way while user code waits for a client's answer."""

    def yield_slot(self) -> None:
        """Let the client's next call start. Raises HubException if impossible."""


#: The hub method call, or the on_connected, to which the current context belongs.
_current_call: contextvars.ContextVar[_Slot | None] = contextvars.ContextVar(
    "kestrun_call", default=None
)


class ClientProxy:
    """Receivers of messages. Made anew by each access; costs next to nothing."""

    __slots__ = ("_address", "_registry")

    def __init__(self, registry: Registry, address: Address) -> None:
        self._registry = registry
        self._address = address

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._address}>"

    async def send(self, method: str, *args: Any) -> None:
        """Call `method` on every receiver, without waiting for any of them.

        method: the name under which clients registered their handler.
        args: numbers, text, bytes, lists, dicts, dataclasses, enums, datetimes,
            UUIDs, None, nested as you like.
        Returns when the message is queued, and never fails for clients that are
        gone. Raises TypeError or ValueError for arguments that no client could
        read; then nobody has received anything.
        """
        self._registry.publish(self._address, _invocation(method, args))
        if self._registry.turn.published > _HIGH_WATER:
            # One broadcast never waits for a client. A long run of them still
            # lets the event loop write and read in between.
            await asyncio.sleep(0)


class SingleClientProxy(ClientProxy):
    """One receiver, who can also be asked for a result."""

    __slots__ = ()

    async def send(self, method: str, *args: Any) -> None:
        """Call `method` on the client; waits while it takes nothing.

        Like `ClientProxy.send`, but a single receiver sets the pace: with
        64 KiB on the way this waits until the client has taken some, or has
        been cut because it does not.
        """
        await super().send(method, *args)
        connection = self._connection()
        if connection is not None and not connection.has_room():
            await connection.room()

    async def invoke(
        self, method: str, *args: Any, timeout: float | None = None
    ) -> Any:
        """Call `method` on the client and return what its handler returns.

        timeout: seconds to wait for the answer; None waits for the connection's
            whole life.
        Meanwhile the caller's other calls may run. Raises ConnectionError when
        there is no such client or it leaves, HubException with the client's
        text when its handler fails or is missing, TimeoutError, and TypeError
        or ValueError for arguments that cannot be written. Inside
        `on_connected` it raises HubException: the client does not listen yet.
        """
        if (slot := _current_call.get()) is not None:
            slot.yield_slot()
        connection = self._connection()
        if connection is None or connection.wire is None or connection.closing:
            name = self._address.names[0]
            raise ConnectionError(f"Connection '{name}' does not exist.")
        invocation_id, future = self._registry.expect(connection)
        try:
            message = _invocation(method, args)._replace(invocation_id=invocation_id)
            connection.send(connection.wire.encode(message))
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._registry.forget(invocation_id)

    def _connection(self) -> Connection | None:
        return self._registry.connections.get(self._address.names[0])


def _invocation(method: str, args: tuple[Any, ...]) -> Invocation:
    if not isinstance(method, str):
        raise TypeError(f"a client method's name is a str, not {method!r}")
    return Invocation(method, list(args))


def _names(names: Iterable[str], what: str) -> tuple[str, ...]:
    """Check a collection of names; a lone string is a mistake, not a list."""
    if isinstance(names, str):
        raise TypeError(f"{what}: a list of strings, not the string {names!r}")
    return tuple(dict.fromkeys(names))


class HubClients:
    """Everyone that can be named: `hub.clients` outside of hub methods."""

    __slots__ = ("_registry",)

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def _proxy(
        self, kind: str, names: tuple[str, ...] = (), excluding: Iterable[str] = ()
    ) -> ClientProxy:
        address = Address(kind, names, frozenset(excluding))
        return ClientProxy(self._registry, address)

    @property
    def all(self) -> ClientProxy:
        """Every connection of this hub."""
        return self._proxy("all")

    def all_except(self, ids: Iterable[str]) -> ClientProxy:
        """Every connection but those with these connection ids."""
        return self._proxy("all", (), _names(ids, "ids"))

    def client(self, id: str) -> SingleClientProxy:
        """The connection with this connection id."""
        return SingleClientProxy(self._registry, Address("connections", (id,)))

    def clients(self, ids: Iterable[str]) -> ClientProxy:
        """The connections with these connection ids."""
        return self._proxy("connections", _names(ids, "ids"))

    def group(self, name: str) -> ClientProxy:
        """The members of a group."""
        return self._proxy("groups", (name,))

    def groups(self, names: Iterable[str]) -> ClientProxy:
        """The members of any of these groups, each of them once."""
        return self._proxy("groups", _names(names, "names"))

    def group_except(self, name: str, ids: Iterable[str]) -> ClientProxy:
        """The members of a group but those with these connection ids."""
        return self._proxy("groups", (name,), _names(ids, "ids"))

    def user(self, id: str) -> ClientProxy:
        """All connections of one user, compared exactly."""
        return self._proxy("users", (id,))

    def users(self, ids: Iterable[str]) -> ClientProxy:
        """All connections of these users."""
        return self._proxy("users", _names(ids, "ids"))


class HubCallerClients(HubClients):
    """The same as seen by one caller: `self.clients` inside a hub."""

    __slots__ = ("_caller",)

    def __init__(self, registry: Registry, caller: str) -> None:
        super().__init__(registry)
        self._caller = caller

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
        return self._proxy("groups", (name,), (self._caller,))


class GroupManager:
    """Groups of connections by name, case-sensitive, in memory, with presence."""

    __slots__ = ("_registry",)

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def add(self, connection_id: str, name: str) -> None:
        """Add a connection; nothing happens if it is gone or in it already."""
        self._registry.join(connection_id, name)

    async def remove(self, connection_id: str, name: str) -> None:
        """Remove a connection; nothing happens if it is not a member."""
        self._registry.leave(connection_id, name)

    def members(self, name: str) -> list[str]:
        """List the connection ids in a group, in the order of their joining."""
        return self._registry.members(name)

    def names(self) -> list[str]:
        """List the groups that have members."""
        return self._registry.group_names()

    def of(self, connection_id: str) -> list[str]:
        """List the groups that a connection is in."""
        return self._registry.groups_of(connection_id)


class HubCallerContext:
    """One connection as user code sees it: `self.context`."""

    __slots__ = ("_abort", "_aborted", "_connection", "_items")

    def __init__(self, connection: Connection, abort: Callable[[], None]) -> None:
        self._connection = connection
        self._abort = abort
        self._items: dict[Any, Any] | None = None
        self._aborted: asyncio.Event | bool = False

    def __repr__(self) -> str:
        return f"<HubCallerContext {self.connection_id} over {self.transport}>"

    @property
    def connection_id(self) -> str:
        """The public id of the connection: not a secret, unlike its token."""
        return self._connection.connection_id

    @property
    def user_id(self) -> str | None:
        """What `authenticate` returned when the connection was made."""
        return self._connection.user_id

    @property
    def items(self) -> dict[Any, Any]:
        """Anything that user code wants to keep with the connection."""
        if self._items is None:
            self._items = {}
        return self._items

    @property
    def request(self) -> web.Request:
        """The aiohttp request that opened the connection."""
        assert self._connection.request is not None
        return self._connection.request

    @property
    def transport(self) -> str:
        """ "WebSockets", "ServerSentEvents" or "LongPolling"."""
        return self._connection.transport or ""

    @property
    def protocol(self) -> str:
        """ "json" or "messagepack"."""
        wire = self._connection.wire
        return "" if wire is None else wire.protocol.name

    def abort(self) -> None:
        """Close the connection, from any code; returns at once.

        The client is told not to reconnect by itself.
        """
        self._abort()

    @property
    def aborted(self) -> bool:
        """Whether the connection has ended, for whatever reason."""
        aborted = self._aborted
        return aborted if isinstance(aborted, bool) else aborted.is_set()

    async def wait_aborted(self) -> None:
        """Wait until the connection has ended."""
        if self._aborted is False:
            self._aborted = asyncio.Event()
        if isinstance(self._aborted, asyncio.Event):
            await self._aborted.wait()

    def mark_aborted(self) -> None:
        if isinstance(self._aborted, asyncio.Event):
            self._aborted.set()
        self._aborted = True


class HubInvocation:
    """One call of a hub method, as `Hub.on_invocation` sees it."""

    __slots__ = ("arguments", "target")

    def __init__(self, target: str, arguments: list[Any]) -> None:
        #: The method's name as the client spelled it.
        self.target = target
        #: The arguments as the method will get them; the list may be changed.
        self.arguments = arguments


class Hub:
    """Base of all hubs: subclass it, and every public method can be called.

    There is one instance for each connection, so `self` may hold that
    connection's own state. Methods may be plain, async, or async generators
    (streams to the client); a parameter annotated AsyncIterator takes a stream
    from the client. Wire names match without regard to case and underscores.
    """

    #: The connection: id, user, items, transport, abort().
    context: HubCallerContext
    #: Whom to send to.
    clients: HubCallerClients
    #: Groups of connections.
    groups: GroupManager

    async def on_connected(self) -> None:
        """Run after the handshake and before the client's first call.

        An exception refuses the connection.
        """

    async def on_disconnected(self, error: Exception | None) -> None:
        """Run when a connection that had been accepted has ended.

        error: None after a proper end, else what went wrong.
        """

    async def on_invocation(
        self,
        invocation: HubInvocation,
        call_next: Callable[[], Awaitable[Any]],
    ) -> Any:
        """Run around every call of a hub method. Override it to look or refuse.

        invocation: the target and the arguments, ready to be called.
        call_next: calls the method and returns its result (of a streaming
            method: the iterator).
        Return what `call_next()` returned, or raise HubException to refuse.
        """
        return await call_next()


class _Connections(Mapping[str, HubCallerContext]):
    """A live, read-only view: connection id -> context."""

    def __init__(self, contexts: dict[str, HubCallerContext]) -> None:
        self._contexts = contexts

    def __getitem__(self, connection_id: str) -> HubCallerContext:
        return self._contexts[connection_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._contexts)

    def __len__(self) -> int:
        return len(self._contexts)


class HubContext:
    """A hub seen from outside: from routes, operations and jobs."""

    def __init__(
        self,
        registry: Registry,
        options: HubOptions,
        contexts: dict[str, HubCallerContext],
    ) -> None:
        self._registry = registry
        #: Whom to send to.
        self.clients = HubClients(registry)
        #: Groups of connections.
        self.groups = GroupManager(registry)
        #: The connections there are, by id; a live read-only mapping.
        self.connections: Mapping[str, HubCallerContext] = _Connections(contexts)
        #: The options this hub was mapped with.
        self.options = options

    def stats(self) -> dict[str, Any]:
        """Count: connections by transport and protocol, traffic, cuts by reason.

        Returns plain numbers and dicts, ready for JSON. Bytes in are hub messages,
        bytes out the same with their WebSocket frames; `queued_bytes` wait for
        clients just now. A message counts as out when it is queued.
        """
        transports: dict[str, int] = {}
        protocols: dict[str, int] = {}
        queued = 0
        for connection in self._registry.connections.values():
            transport = connection.transport or ""
            transports[transport] = transports.get(transport, 0) + 1
            if connection.wire is not None:
                protocol = connection.wire.protocol.name
                protocols[protocol] = protocols.get(protocol, 0) + 1
            queued += connection.backlog()
        traffic = self._registry.traffic
        return {
            "connections": len(self._registry.connections),
            "transports": transports,
            "protocols": protocols,
            "groups": len(self._registry.group_names()),
            "messages_in": traffic.messages_in,
            "messages_out": traffic.messages_out,
            "bytes_in": traffic.bytes_in,
            "bytes_out": traffic.bytes_out,
            "queued_bytes": queued,
            "cuts": dict(traffic.cuts),
        }


# -------------------------------------------------------------- hub methods
#
# What a client may call is collected once for each hub class, from what the
# subclass adds; a name that came over the wire is looked up in that table and
# nowhere else. Signatures are read once too: every annotated parameter gets a
# converter, a function that returns the checked value or raises ValueError.

Converter = Callable[[Any], Any]


def hub_method(name: str) -> Callable[[F], F]:
    """Give a hub method another name on the wire.

    name: matched, like all names, without regard to case and underscores.
    Raises TypeError when used without a name.
    """
    if not isinstance(name, str) or not name.strip("_"):
        raise TypeError('hub_method takes the wire name: @hub_method("OtherName")')

    def decorate(function: F) -> F:
        function.__kestrun_name__ = name  # type: ignore[attr-defined]
        return function

    return decorate


def _fold(name: str) -> str:
    """Reduce a name to what counts when names are compared."""
    return name.replace("_", "").lower()


#: What user code raises to end more than itself.
_EXITS = (KeyboardInterrupt, SystemExit)


class BindingError(Exception):
    """The arguments of a call do not fit the method."""

    reported_as = "InvalidDataException"


class HubMethod:
    """One method of a hub class that clients can call."""

    def __init__(
        self, name: str, function: Callable[..., Any], takes_hub: bool = True
    ) -> None:
        self.name = name
        #: Called with the hub and the arguments: a result, or a coroutine or
        #: iterator of what follows.
        self.function: Callable[..., Any] = function
        if not takes_hub:
            self.function = functools.partial(_without_hub, function)
        parameters = list(inspect.signature(function).parameters.values())
        if takes_hub:
            parameters = parameters[1:]
        self._names: list[str] = []
        self._converters: list[Converter] = []
        #: Each upload stream: its position, its name, what converts its items.
        self.uploads: list[tuple[int, str, Converter | None]] = []
        self.required = 0
        self._defaults: list[Any] = []
        self._rest: Converter | None = None
        for parameter in parameters:
            self._add(parameter, _annotation(function, parameter.name))
        result = _annotation(function, "return", lenient=True)
        self.streaming = inspect.isasyncgenfunction(
            inspect.unwrap(function)
        ) or _is_stream(result)
        #: Neither sends a stream nor takes one: its calls take turns.
        self.takes_turns = not (self.streaming or self.uploads)

    def _add(self, parameter: inspect.Parameter, annotation: Any) -> None:
        if parameter.kind is parameter.VAR_KEYWORD:
            return
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty:
                raise TypeError(
                    f"{self.name}: clients pass arguments by position, so "
                    f"keyword-only {parameter.name!r} needs a default"
                )
            return
        convert = _converter(annotation) or _pass
        if parameter.kind is parameter.VAR_POSITIONAL:
            self._names.append(parameter.name)
            self._rest = convert
        elif _is_stream(annotation):
            (item,) = typing.get_args(annotation)[:1] or (Any,)
            position = len(self._converters) + len(self.uploads)
            self.uploads.append((position, parameter.name, _converter(item)))
        else:
            self._names.append(parameter.name)
            self._converters.append(convert)
            self._defaults.append(parameter.default)
            if parameter.default is parameter.empty:
                self.required = len(self._converters)

    def bind(self, values: list[Any]) -> list[Any]:
        """Check and convert the arguments of one call. Raises BindingError."""
        count, most = len(values), len(self._converters)
        if count < self.required or count > most and self._rest is None:
            log.warning(
                "%s: %d argument(s) do not fit (%s)",
                self.name,
                count,
                ", ".join(self._names),
            )
            raise BindingError(
                f"Invocation provides {count} argument(s) but target expects {most}."
            )
        converters = self._converters
        if count > most and self._rest is not None:
            converters = converters + [self._rest] * (count - most)
        try:
            bound = list(map(operator.call, converters, values))
            if len(bound) < count:  # `map` takes a StopIteration for its own end
                raise ValueError("a converter stopped")
        except _EXITS:
            raise
        except BaseException as error:
            self._log_misfit(converters, values)
            raise BindingError(
                "Error binding arguments. Make sure that the types of the provided "
                "values match the types of the hub method being invoked."
            ) from error
        if self.uploads:  # their places are fixed, so none before may be left out
            bound += self._defaults[count:]
        return bound

    def _log_misfit(self, converters: list[Converter], values: list[Any]) -> None:
        """Find and name the argument that does not fit, once one did not."""
        names = self._names + [self._names[-1]] * len(values)
        for name, convert, value in zip(names, converters, values, strict=False):
            try:
                convert(value)
            except BaseException as error:  # noqa: BLE001 (user code may check it)
                log.warning("%s: argument %r does not fit: %s", self.name, name, error)
                return


def _without_hub(function: Callable[..., Any], hub: Hub, *arguments: Any) -> Any:
    return function(*arguments)


def _pass(value: Any) -> Any:
    """Convert nothing: the parameter takes whatever comes."""
    return value


def _collect_methods(hub_class: type[Hub]) -> dict[str, HubMethod]:
    """Find what clients may call, by folded name.

    Raises TypeError for names that collide or hide what Hub gives a method.
    """
    methods: dict[str, HubMethod] = {}
    for name in dir(hub_class):
        static = inspect.getattr_static(hub_class, name)
        is_method = inspect.isfunction(static) or isinstance(
            static, (staticmethod, classmethod)
        )
        if name.startswith("_") or hasattr(Hub, name) or not is_method:
            continue
        if name in Hub.__annotations__:
            raise TypeError(f"{hub_class.__name__}.{name} hides the hub's own {name}")
        takes_hub = inspect.isfunction(static)
        function = static if takes_hub else getattr(hub_class, name)
        wire_name = getattr(function, "__kestrun_name__", name)
        method = HubMethod(f"{hub_class.__name__}.{name}", function, takes_hub)
        other = methods.setdefault(_fold(wire_name), method)
        if other is not method:
            raise TypeError(
                f"{method.name} and {other.name} are the same name for clients; "
                'rename one with @hub_method("OtherName")'
            )
    return methods


def _annotation(function: Callable[..., Any], name: str, lenient: bool = False) -> Any:
    """Evaluate one annotation; Any where there is none.

    Raises TypeError for a name that does not exist where the method was defined.
    """
    function = inspect.unwrap(function)
    annotation = function.__annotations__.get(name, Any)
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    scope = dict(function.__globals__)
    with contextlib.suppress(ValueError):  # an empty closure cell
        scope.update(inspect.getclosurevars(function).nonlocals)
    try:
        return typing.get_type_hints(holder, scope)[name]
    except Exception as error:  # an annotation is any expression of the user's
        if lenient:
            return Any
        raise TypeError(
            f"{function.__qualname__}: the annotation {annotation!r} of {name!r} "
            f"cannot be evaluated: {error}"
        ) from error


def _is_stream(annotation: Any) -> bool:
    origin = typing.get_origin(annotation) or annotation
    return origin in (AsyncIterator, AsyncIterable, AsyncGenerator)


def _converter(annotation: Any) -> Converter | None:
    """Choose what checks values of this annotation; None lets everything pass."""
    if annotation in (Any, object, inspect.Parameter.empty):
        return None
    if annotation is None or annotation is type(None):
        return _to_none
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _converter(args[0])
    if origin in (typing.Union, types.UnionType):
        return _union(args)
    if annotation in _PLAIN_CONVERTERS:
        return _PLAIN_CONVERTERS[annotation]
    if annotation is list or origin is list:
        return _list(args)
    if annotation is dict or origin is dict:
        return _dict(args)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return functools.partial(_to_enum, annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _to_dataclass(annotation)
    return None


def _mismatch(expected: str, value: Any) -> ValueError:
    return ValueError(f"{expected} expected, not {type(value).__name__}")


def _to_none(value: Any) -> None:
    if value is not None:
        raise _mismatch("null", value)


def _to_int(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # JavaScript has one kind of number
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mismatch("an integer", value)
    return value


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _mismatch("a number", value)
    return float(value)


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise _mismatch("a string", value)
    return value


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _mismatch("true or false", value)
    return value


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, str):  # JSON has no bytes of its own
        return base64.b64decode(value, validate=True)
    if not isinstance(value, bytes):
        raise _mismatch("bytes", value)
    return value


def _to_datetime(value: Any) -> datetime:
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        raise _mismatch("an ISO 8601 time", value)
    return value


def _to_uuid(value: Any) -> uuid.UUID:
    return uuid.UUID(_to_str(value))


_PLAIN_CONVERTERS: dict[Any, Converter] = {
    int: _to_int,
    float: _to_float,
    str: _to_str,
    bool: _to_bool,
    bytes: _to_bytes,
    datetime: _to_datetime,
    uuid.UUID: _to_uuid,
}


def _union(members: tuple[Any, ...]) -> Converter | None:
    """Take the first member that fits; one that takes anything makes all of it pass."""
    converters = []
    for member in members:
        if (convert_member := _converter(member)) is None:
            return None
        converters.append(convert_member)

    def convert(value: Any) -> Any:
        for convert_member in converters:
            try:
                return convert_member(value)
            except (ValueError, TypeError, OverflowError):
                continue
        raise _mismatch(" or ".join(map(_type_name, members)), value)

    return convert


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _list(args: tuple[Any, ...]) -> Converter:
    convert_item = _converter(args[0]) if args else None

    def convert(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _mismatch("an array", value)
        return [convert_item(item) for item in value] if convert_item else value

    return convert


def _dict(args: tuple[Any, ...]) -> Converter:
    convert_key = _key_converter(args[0]) if args else None
    convert_value = _converter(args[1]) if args else None

    def convert(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise _mismatch("an object", value)
        return {
            convert_key(key) if convert_key else key: (
                convert_value(item) if convert_value else item
            )
            for key, item in value.items()
        }

    return convert


def _key_converter(annotation: Any) -> Converter | None:
    """Convert dict keys, which JSON always writes as strings."""
    if annotation in (int, float):
        convert = _PLAIN_CONVERTERS[annotation]
        return lambda key: convert(annotation(key) if isinstance(key, str) else key)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return functools.partial(_to_enum_by_key, annotation)
    return _converter(annotation)


def _to_enum_by_key(kind: type[Enum], key: Any) -> Enum:
    try:
        return _to_enum(kind, key)
    except ValueError:
        return _to_enum(kind, int(key))  # a value that is a number, written as text


def _to_enum(kind: type[Enum], value: Any) -> Enum:
    """Read an enum by value, or by name without regard to case."""
    if issubclass(kind, Flag) and isinstance(value, int):
        bits = functools.reduce(operator.or_, (flag.value for flag in kind), 0)
        if value & ~bits:  # IntFlag would remember every number that it is asked for
            raise ValueError(f"{value!r} is no {kind.__name__}")
    try:
        return kind(value)
    except ValueError:
        for name, member in kind.__members__.items():
            if isinstance(value, str) and _fold(name) == _fold(value):
                return member
        raise ValueError(f"{value!r} is no {kind.__name__}") from None


def _to_dataclass(kind: type) -> Converter:
    """Read a dataclass from an object; unknown members are skipped."""
    fields = {_fold(field.name): field for field in dataclasses.fields(kind)}

    @functools.cache
    def converters() -> dict[str, Converter | None]:
        # Evaluated at the first use, so that a dataclass may contain itself.
        hints = typing.get_type_hints(kind)
        return {name: _converter(hints[field.name]) for name, field in fields.items()}

    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(f"an object ({kind.__name__})", value)
        members = {}
        for key, item in value.items():
            field = fields.get(_fold(key)) if isinstance(key, str) else None
            if field is None or not field.init:
                continue
            convert_item = converters()[_fold(field.name)]
            try:
                members[field.name] = convert_item(item) if convert_item else item
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{kind.__name__}.{field.name}: {error}") from None
        try:
            return kind(**members)
        except TypeError as error:
            raise ValueError(f"{kind.__name__}: {error}") from None

    return convert


# --------------------------------------------------------------- dispatcher
#
# `Dispatcher.run` is the life of a connection on one screen. Between connected
# and disconnected it sleeps: messages are dispatched in the turn that follows the
# bytes (`Session._pump`), outside of any task, so an idle client costs no work. A
# method is called right there, too: an async one begins in a task that stands by
# (`Workers`), and keeps it only if it has to wait. Most never do.
#
# Calls and stream items have their turn in the order of their arrival. One that
# may not begin yet, for want of a slot or of room, waits, and so do those behind
# it. Everything else is heard at once: pings, cancels, acknowledgements, results,
# items of open streams and the client's goodbye pass what waits, or the two sides
# could wait for each other. Reading stops only when much waits already.

#: Reading stops when so many messages wait and so many bytes have come meanwhile.
#: A stateful client sends up to 100,000 bytes before it waits for our Ack, and its
#: own may stand behind them: so far the server reads in any case.
_WAITING_MESSAGES, _READ_AHEAD = 32, 131_072

#: Messages of one client that are dispatched before others have their turn, and
#: calls that are cancelled before they do.
_PORTION = 500

#: Streams of one client that may be under way, and calls that await its answers.
_RUNNING_CALLS = 1000

#: Workers that may come for the calls of one client at once.
_MOST_WORKERS = 32

#: Seconds that a hub method may hold the event loop before it is named.
_BLOCKING = 0.1


class OperationCanceled(Exception):
    """Something took too long or was called off; .NET's name goes to clients."""

    reported_as = "OperationCanceledException"


class UploadStream:
    """The items that a client streams to a method; `async for` reads them."""

    def __init__(
        self,
        name: str,
        convert: Converter | None,
        options: HubOptions,
        on_room: Callable[[], object],
    ) -> None:
        self._name = name
        self._convert = convert
        self._options = options
        self._on_room = on_room
        self._items: deque[Any] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._readers: list[asyncio.Future[None]] = []

    def excess(self) -> int:
        """Count the items beyond the capacity: the client's calls wait for them."""
        capacity = self._options.stream_buffer_capacity
        return 0 if capacity is None else max(0, len(self._items) - capacity)

    def put(self, item: Any) -> None:
        """Take an item from the client."""
        if self._ended:
            return
        try:
            self._items.append(self._convert(item) if self._convert else item)
        except _EXITS:
            raise
        except BaseException as error:  # noqa: BLE001 (user code may check it)
            log.warning("%s does not fit: %s", self._name, error)
            message = "Failed to bind Stream message."
            self.end(HubException(_detail(message, error, self._options)))
        self._wake()

    def end(self, error: Exception | None = None) -> None:
        """No more items: the reader stops after those it has, or gets `error`."""
        if not self._ended:
            self._ended, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            if not reader.done():
                reader.set_result(None)

    def __aiter__(self) -> UploadStream:
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            reader = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            await reader
        item = self._items.popleft()
        self._on_room()
        return item


@types.coroutine
def _perform(
    work: Coroutine[Any, Any, Any],
    name: str,
    context: contextvars.Context,
    *awaited: Any,
) -> Generator[Any, Any, Any]:
    """Run a coroutine to its end in a context of its own; name a step that is slow.

    awaited: what it waits for, if it has begun already.
    """
    step: Callable[[Any], Any] = work.send
    value = None
    while True:
        if awaited:
            try:
                step, value = work.send, (yield awaited[0])
            except BaseException as error:  # noqa: BLE001 (handed on, as await does)
                step, value = work.throw, error
        started = time.perf_counter()
        try:
            awaited = (context.run(step, value),)
        except StopIteration as end:
            return end.value
        finally:
            value = None  # an error holds this frame by its traceback, and so the call
            if time.perf_counter() - started > _BLOCKING:
                _warn_blocking(name, started)


def _warn_blocking(name: str, started: float) -> None:
    log.warning(
        "%s held the event loop for %.0f ms; nobody else was served meanwhile. "
        "Use await, or asyncio.to_thread for work that cannot.",
        name,
        (time.perf_counter() - started) * 1000,
    )


class Worker:
    """A task that stands by, to make whatever call comes next (see `Workers`).

    It waits for a future that nobody resolves. What would wake it then is called by
    hand when there is a call: this begins here and now, in a true step of a task, and
    costs hardly more than a function. The task bears the name of its latest call.
    """

    __slots__ = ("_workers", "call", "door", "task", "wake")

    def __init__(self, workers: Workers, loop: asyncio.AbstractEventLoop) -> None:
        self._workers = workers
        #: What the task shall do, or is at. Woken without a call, it ends.
        self.call: Call | None = None
        #: What the task waits for. It is done only if the task was cancelled.
        self.door: asyncio.Future[None] = loop.create_future()
        #: Lets the task take `call`, or end, at once; never within another task.
        self.wake: Callable[[asyncio.Future[None]], object] = _nothing
        self.task = asyncio.Task(
            self._work(),
            loop=loop,
            name="kestrun worker",
            context=contextvars.Context(),
        )
        loop.call_soon(self._stand_by)  # when it has come to the door

    def _stand_by(self) -> None:
        # asyncio's own name, in C and in Python, up to 3.14 at least: what the future
        # would call, with itself, once it is done. Here it is the task's next step.
        if self.door._callbacks:  # or it was cancelled before
            self.wake = self.door._callbacks[0][0]
            self.wake(self._workers.done)
            self._workers.idle.append(self)

    def end(self) -> None:
        """Let the task end, which nobody will give a call any more."""
        if not self.door.done():
            self.wake(self._workers.done)

    async def _work(self) -> None:
        await self._make_calls()

    @types.coroutine
    def _make_calls(self) -> Generator[Any, Any, None]:
        """Make calls that need not wait, and then one that does."""
        door = self.door
        door._asyncio_future_blocking = True  # as `await` says it to a task
        yield door
        # From the second wait on, the task is held by one reference more than before,
        # and by no more than that: `Workers.begin` can compare.
        while True:
            door.remove_done_callback(self.wake)
            door._asyncio_future_blocking = True
            yield door
            if (call := self.call) is None:
                return
            _current_call.set(call)
            try:
                awaited = call.work.send(None)
            except StopIteration as end:
                call.session.complete(call.message, call.method, end.value)
            except BaseException as error:  # noqa: BLE001 (user code)
                call.session.fail(call.message, call.method, error)
            else:
                yield from call.go_on(self.task, awaited)
                return
            if call.uploads:
                call.session.close_uploads(call.uploads)
            del call.context
            self.call = call = None  # nothing of a client's outlives its calls


#: Counts who keeps hold of a task. Where Python cannot tell, no count equals another,
#: and each call gets a task of its own.
_references = getattr(sys, "getrefcount", lambda task: math.nan)
_weak_references = weakref.getweakrefcount


class Workers:
    """Has workers stand by for the calls of one hub.

    A task of its own costs a call more than most methods do. A worker makes any number
    of calls, until one of them has to wait; that one keeps the worker's task.
    """

    __slots__ = ("done", "idle")

    def __init__(self) -> None:
        self.idle: list[Worker] = []
        #: What a worker is told to have waited for, of the loop that runs now.
        self.done: asyncio.Future[None]

    def begin(self, call: Call) -> bool:
        """Make a call, as far as it goes without waiting; never from within a task.

        Returns False if nobody stands by.
        """
        while self.idle:
            worker = self.idle.pop()
            if not worker.door.done():  # or somebody cancelled its task
                break
        else:
            return False
        task, worker.call = worker.task, call
        task.set_name(call.method.name)
        strong, weak = _references(task), _weak_references(task)
        call.context.run(worker.wake, self.done)
        if worker.call is None:  # it stands by again
            if (
                strong == _references(task)
                and weak == _weak_references(task)
                and not getattr(task, "_callbacks", None)
            ):
                self.idle.append(worker)
            else:  # what the call left at its task must not meet another
                asyncio.get_running_loop().call_soon(worker.end)
        if not self.idle:
            self.stand_by()
        return True

    def stand_by(self, count: float = 1) -> None:
        """Have more workers from the next turn of the event loop on."""
        loop = asyncio.get_running_loop()
        self.done = loop.create_future()
        self.done.set_result(None)
        for _ in range(int(min(count, _MOST_WORKERS))):
            Worker(self, loop)

    def dismiss(self, keep: int = 0) -> None:
        """Let those who stand by end, all but some that are kept."""
        self.idle, dismissed = self.idle[:keep], self.idle[keep:]
        for worker in dismissed:
            asyncio.get_running_loop().call_soon(worker.end)


class BoundCall(NamedTuple):
    """A call that was checked, and waits for a slot."""

    message: Invocation | StreamInvocation
    method: HubMethod
    arguments: list[Any]


#: Stands for the result of a stream that has answered already.
_ANSWERED = object()


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class Call:
    """One call of a hub method whose result is to be awaited, or streamed."""

    __slots__ = (
        "canceled",
        "context",
        "holds_slot",
        "message",
        "method",
        "returned",
        "session",
        "task",
        "uploads",
        "work",
    )

    def __init__(
        self,
        session: Session,
        message: Invocation | StreamInvocation,
        method: HubMethod,
        result: Any,
        context: contextvars.Context,
        uploads: dict[str, UploadStream] | None,
    ) -> None:
        self.session = session
        self.message = message
        self.method = method
        #: Where the method runs and its answer is written. The context knows the call,
        #: so the call drops it in the end, or the two would keep each other alive.
        self.context = context
        #: The client's streams among the arguments.
        self.uploads = uploads
        #: What the method returned, and what is left to do with it.
        self.returned = result
        self.work: Coroutine[Any, Any, Any]
        if method.streaming:
            self.work = self._stream(result)
        elif type(result) is types.CoroutineType:
            self.work = result
        else:
            self.work = _await(result)
        #: A call that waits takes one of the client's slots, until it lets others in.
        self.holds_slot = method.takes_turns
        self.canceled = False
        #: What it goes on in, once it has to wait.
        self.task: asyncio.Task[None] | None = None

    async def go_on(self, task: asyncio.Task[None], awaited: Any) -> None:
        """Make what is left of a call that waits, in the task that began it."""
        session, context, self.task = self.session, self.context, task
        session.call_goes_on(self)
        try:
            result = await _perform(self.work, self.method.name, context, awaited)
        except GeneratorExit:  # the event loop is gone
            raise
        except BaseException as error:  # noqa: BLE001 (user code)
            context.run(session.fail, self.message, self.method, error)
        else:
            context.run(session.complete, self.message, self.method, result)
        finally:
            del self.context
            session.call_ended(self)
            session.go_on()

    def cancel(self) -> None:
        """Stop it on the client's behalf; a completion is sent all the same."""
        if not self.canceled and self.task is not None:
            self.canceled = True  # once, since its cleanup may take a while
            self.task.cancel()

    def yield_slot(self) -> None:
        """Let the client's next call start while this one waits for an answer."""
        if self.holds_slot and len(self.session.tasks) <= _RUNNING_CALLS:
            self.session.free_slot(self)
            self.session.go_on()

    async def _stream(self, items: Any) -> Any:
        """Send every item; a completion without a result follows."""
        session, target = self.session, self.message.target
        if hasattr(items, "__await__"):
            items = await items
        if not hasattr(items, "__aiter__"):
            text = (
                f"The value returned by the streaming method '{target}' "
                "is not a ChannelReader<> or IAsyncEnumerable<>."
            )
            session.reply(
                self.message, Completion(session.id_of(self.message), VOID, text)
            )
            return _ANSWERED
        try:
            await self._send_items(items)
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 (user code)
            problem = "An error occurred on the server while streaming results."
            session.fail(self.message, self.method, error, problem)
            return _ANSWERED
        return VOID

    async def _send_items(self, items: AsyncIterable[Any]) -> None:
        """Send items as fast as the client takes them: it is the only receiver."""
        connection, in_a_row = self.session.connection, 0
        encode = self.session.wire.item_encoder(self.session.id_of(self.message))
        try:
            async for item in items:
                if connection.closing:
                    return
                frame = encode(item)
                connection.send(frame)
                in_a_row += len(frame)
                if in_a_row > _HIGH_WATER or not connection.has_room():
                    in_a_row = 0
                    await asyncio.sleep(0)  # also where the generator never waits
                    await connection.room()
                    if self.session.go_on():  # before the next item fills the outbox
                        await asyncio.sleep(0)
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()


def _failed_invoking(target: str) -> str:
    return f"An unexpected error occurred invoking '{target}' on the server."


class _Connecting:
    """The slot of `on_connected`, in which no client can be asked anything."""

    def __init__(self) -> None:
        self.over = False

    def yield_slot(self) -> None:
        if not self.over:
            raise HubException(
                "Client results inside OnConnectedAsync Hub methods are not allowed."
            )


class Session:
    """What a hub and one connection have going: calls, streams, timers."""

    __slots__ = (
        "_calls",
        "_clock",
        "_dispatcher",
        "_heard",
        "_intercepts",
        "_last_heard",
        "_left",
        "_mark",
        "_messages",
        "_methods",
        "_next_ping",
        "_pinged",
        "_running",
        "_slots",
        "_uploads",
        "_variables",
        "_waiting",
        "_workers",
        "connection",
        "context",
        "due",
        "ended",
        "hub",
        "options",
        "tasks",
        "wire",
    )

    def __init__(
        self, dispatcher: Dispatcher, connection: Connection, wire: Wire
    ) -> None:
        self._dispatcher = dispatcher
        self._methods = dispatcher.methods
        self._intercepts = dispatcher.intercepts
        self._workers = dispatcher.workers
        self.options = dispatcher.options
        self.connection = connection
        self.wire = wire
        self.context = HubCallerContext(connection, self.abort)
        self.hub = dispatcher.make_hub(self.context)
        #: The context variables with which each call begins, whoever set it off.
        self._variables = contextvars.copy_context()
        #: Resolved when the session ends, with what ended it, if anything went wrong.
        self.ended: asyncio.Future[Exception | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._calls: dict[str, Call] = {}
        self._uploads: dict[str, UploadStream] = {}
        self.tasks: dict[asyncio.Task[None], Call] = {}
        #: What may not begin yet, in order; its first is what the rest waits for.
        self._waiting: list[Message | BoundCall | Call] = []
        self._mark = 0  # what had been fed when the waiting began
        #: Slots that are taken.
        self._running = 0
        limit = self.options.maximum_parallel_invocations_per_client
        self._slots = math.inf if limit is None else limit
        self._messages: Iterator[Message | None] | None = None
        #: When the last method gave the event loop back, for `_PATIENCE`.
        self._clock = 0.0
        self._left = False
        self._heard = self._pinged = False
        self._last_heard = now = time.monotonic()
        self._next_ping = now + _or_forever(self.options.keep_alive_interval)
        if connection.transport == LONG_POLLING:  # its polls keep it alive
            self._next_ping = math.inf
        #: When `look_after` has something to do next.
        self.due = now

    # From the client

    def start(self) -> None:
        """Begin to dispatch; what arrived before has been waiting."""
        limit = self.options.maximum_receive_message_size
        self._messages = self.wire.protocol.decode(self.connection.inbox, limit)
        self.connection.on_data = self._pump
        self.connection.announce()

    def _pump(self) -> None:
        """Dispatch what has arrived, as far as the client may go on just now."""
        if self._messages is None or self.ended.done():
            return
        busy, connection = False, self.connection
        try:
            busy = self._read(self._messages)
        except ProtocolError as error:
            text = _one_line(str(error), 200)
            log.warning("connection %s: %s", connection.connection_id, text)
            self.end(error, self._farewell(error))
        if busy or connection.busy:
            connection.taken_in(busy)

    def _read(self, messages: Iterator[Message | None]) -> bool:
        """Read and dispatch messages; tell whether whole ones are left unread."""
        connection, traffic = self.connection, self.connection.traffic
        self._clock = time.perf_counter()
        until = self._clock + _PATIENCE
        if self._waiting:
            self._advance(until)
        for _ in range(_PORTION):
            if self._clock > until:
                break
            if connection.closing:
                return False
            if (self._waiting or self._uploads) and self._has_enough():
                return True
            if (message := next(messages)) is None:
                return False
            traffic.messages_in += 1
            self._heard = True
            # The usual message goes without detours.
            if type(message) is not Invocation or connection.replay is not None:
                self._dispatch(message)
            elif self._waiting:
                self._waiting.append(message)
            elif (rest := self._begin_call(message)) is not None:
                self._wait(rest)
        connection.announce(again=True)
        return True

    def _has_enough(self) -> bool:
        """Tell whether the client has said more than it may before others begin."""
        waiting, fed = len(self._waiting) + self._excess(), self.connection.fed
        if not waiting:
            self._mark = fed
        return waiting >= _WAITING_MESSAGES and fed - self._mark > _READ_AHEAD

    def _excess(self) -> int:
        """Count the items that upload streams hold beyond what they may."""
        if not self._uploads:
            return 0
        return sum(stream.excess() for stream in self._uploads.values())

    def go_on(self) -> bool:
        """Let what waits for a slot or for room have its turn, if anything does."""
        if waits := bool(self._waiting or self.connection.busy):
            self.connection.announce()
        return waits

    def _dispatch(self, message: Message) -> None:
        replay = self.connection.replay
        if replay is not None and isinstance(message, COUNTED) and not replay.accept():
            return
        match message:
            case Completion() if self._is_result(message):
                self._dispatcher.registry.answer(self.connection, message)
            case Invocation() | StreamInvocation() | StreamItem() | Completion():
                self._queue(message)
            case CancelInvocation(invocation_id):
                self._cancel(invocation_id)
            case Ping():
                self._pinged = True
            case Close(error):
                failure = None if error is None else HubException(error)
                self.end(failure, Close(), by_client=True)
            case Ack(sequence_id) if replay is not None:
                replay.acknowledge(sequence_id)
                self.connection.wake()
            case Sequence(sequence_id) if replay is not None:
                replay.resume(sequence_id)

    def _is_result(self, message: Completion) -> bool:
        """Tell whether it answers the server, and does not end an upload stream."""
        name = message.invocation_id
        return name not in self._uploads and self._dispatcher.registry.expects(name)

    # The line

    def _queue(self, message: Message) -> None:
        """Let a message begin, or wait behind those that came before it."""
        if self._waiting and not self._is_of_open_stream(message):
            self._waiting.append(message)
        elif (rest := self._begin(message)) is not None:
            self._wait(rest)

    def _wait(self, item: Message | BoundCall | Call) -> None:
        if not self._waiting:
            self._mark = self.connection.fed
        self._waiting.append(item)

    def _is_of_open_stream(self, message: Message | BoundCall | Call) -> bool:
        """Tell whether it is an item, or the end, of a stream that a method reads."""
        return (
            isinstance(message, (StreamItem, Completion))
            and message.invocation_id in self._uploads
        )

    def _advance(self, until: float) -> None:
        """Let what waits begin, in order, as far as it may and there is time."""
        while self._waiting and self._clock <= until:
            # Taken out first, since what begins may look here for what is next.
            rest = self._begin(self._waiting.pop(0))
            if rest is not None:
                self._waiting.insert(0, rest)
                return

    def _begin(
        self, item: Message | BoundCall | Call
    ) -> Message | BoundCall | Call | None:
        """Act on a message whose turn has come; return what still has to wait."""
        match item:
            case Invocation() | StreamInvocation():
                return self._begin_call(item)
            case BoundCall():
                if self._running >= self._slots or self._must_wait():
                    return item
                return self._call(*item)
            case Call():
                started = time.perf_counter()
                rest = self._follow(item)
                self._clock = time.perf_counter()
                if self._clock - started > _BLOCKING:
                    _warn_blocking(item.method.name, started)
                return rest
            case StreamItem(invocation_id, value):
                if (stream := self._uploads.get(invocation_id)) is not None:
                    stream.put(value)
            case Completion(invocation_id, _, error):
                stream = self._uploads.pop(invocation_id, None)
                if stream is not None:
                    stream.end(None if error is None else HubException(error))
        return None

    def _must_wait(self) -> bool:
        """Tell whether no call of the client may begin just now."""
        connection = self.connection  # who takes no answers gets no more of them
        if connection.queued > _HIGH_WATER and not connection.closing:
            return True
        return self._excess() > 0

    def _begin_call(
        self, message: Invocation | StreamInvocation
    ) -> Message | BoundCall | Call | None:
        """Check a call in the reference's order, then make it or let it wait."""
        crowded = self.connection.queued > _HIGH_WATER
        if (crowded or self._uploads) and self._must_wait():  # usually neither
            return message
        method = self._methods.get(_fold(message.target))
        try:
            if method is None:
                raise HubException("Method does not exist.")
            arguments = method.bind(message.arguments)
        except (HubException, BindingError) as error:
            text = f"Failed to invoke '{message.target}' due to an error on the server."
            self._refuse(message, _detail(text, error, self.options))
            return None
        fits = (
            method.takes_turns
            and type(message) is Invocation
            and not message.stream_ids
        )  # as nearly all do
        if not fits and (refusal := self._misfit(message, method)) is not None:
            self._refuse(message, refusal)
            return None
        if self._running >= self._slots and method.takes_turns:
            return BoundCall(message, method, arguments)
        return self._call(message, method, arguments)

    # Calls

    def _misfit(
        self, message: Invocation | StreamInvocation, method: HubMethod
    ) -> str | None:
        """Tell why a method cannot be called in this way, if it cannot."""
        target, streaming = message.target, type(message) is StreamInvocation
        if streaming != method.streaming:
            kinds = ("non-streaming", "streaming")
            return (
                f"The client attempted to invoke the {kinds[method.streaming]} "
                f"'{target}' method with a {kinds[streaming]} invocation."
            )
        sent, expected = len(message.stream_ids), len(method.uploads)
        if sent != expected:
            error = HubException(
                f"Client sent {sent} stream(s), Hub method expects {expected}."
            )
            return _detail(_failed_invoking(target), error, self.options)
        if streaming and message.invocation_id in self._calls:
            return f"Invocation ID '{message.invocation_id}' is already in use."
        if len(self.tasks) >= _RUNNING_CALLS:
            return "The client has too many calls and streams under way."
        for position, name in enumerate(message.stream_ids):
            if name in self._uploads or name in message.stream_ids[:position]:
                return f"Stream ID '{name}' is already in use."
        return None

    def _refuse(self, message: Invocation | StreamInvocation, text: str) -> None:
        shown = _one_line(text, 200)
        log.info("connection %s: %s", self.connection.connection_id, shown)
        self.reply(message, Completion(self.id_of(message), VOID, text))

    def _call(
        self,
        message: Invocation | StreamInvocation,
        method: HubMethod,
        arguments: list[Any],
    ) -> Call | None:
        """Call a method; return the call if what it returned still has to wait."""
        started, context = time.perf_counter(), self._variables.copy()
        uploads, rest = None, None
        if method.uploads:
            arguments, uploads = self._open_uploads(message, method, arguments)
        try:
            if self._intercepts:
                result = context.run(self._intercept, message, method, arguments)
            else:
                result = context.run(method.function, self.hub, *arguments)
        except BaseException as error:  # noqa: BLE001 (user code)
            context.run(self.fail, message, method, error)
            if uploads:
                self.close_uploads(uploads)
        else:
            if method.streaming or hasattr(result, "__await__"):
                call = Call(self, message, method, result, context, uploads)
                rest = self._follow(call)
            else:
                self.complete(message, method, result)
        self._clock = time.perf_counter()
        if self._clock - started > _BLOCKING:
            _warn_blocking(method.name, started)
        return rest

    def _follow(self, call: Call) -> Call | None:
        """Begin what a method returned; return the call if no worker stands by."""
        if self._workers.begin(call):
            return None
        room = max(self._slots - self._running - call.holds_slot, 0)
        self._workers.stand_by(1 + min(len(self._waiting), room))
        self.connection.announce()
        return call

    def _intercept(
        self,
        message: Invocation | StreamInvocation,
        method: HubMethod,
        arguments: list[Any],
    ) -> Any:
        """Let the hub's `on_invocation` make the call."""
        invocation = HubInvocation(message.target, arguments)

        async def call_next() -> Any:
            result = method.function(self.hub, *invocation.arguments)
            return await result if hasattr(result, "__await__") else result

        return self.hub.on_invocation(invocation, call_next)

    def _open_uploads(
        self,
        message: Invocation | StreamInvocation,
        method: HubMethod,
        arguments: list[Any],
    ) -> tuple[list[Any], dict[str, UploadStream]]:
        """Put the client's streams among the arguments, in the method's order."""
        arguments, uploads = list(arguments), {}
        places = zip(message.stream_ids, method.uploads, strict=True)
        for stream_id, (position, name, convert) in places:
            name = f"{method.name}: an item of {name!r}"
            stream = UploadStream(name, convert, self.options, self.go_on)
            self._uploads[stream_id] = uploads[stream_id] = stream
            arguments.insert(position, stream)
        line, self._waiting = self._waiting, []
        for item in line:  # what came for these streams need not wait any more
            if self._is_of_open_stream(item):
                self._begin(item)
            else:
                self._waiting.append(item)
        return arguments, uploads

    def call_goes_on(self, call: Call) -> None:
        """Record a call that waits: its slot, its task, its id."""
        assert call.task is not None
        self.tasks[call.task] = call
        self._running += call.holds_slot
        if call.message.invocation_id is not None:
            self._calls.setdefault(call.message.invocation_id, call)

    def _cancel(self, invocation_id: str) -> None:
        """Call off a call, or one that waits; an id that is unknown is ignored."""
        if (call := self._calls.get(invocation_id)) is not None:
            call.cancel()
            return
        for position, item in enumerate(self._waiting):
            message = item.message if isinstance(item, (BoundCall, Call)) else item
            if (
                isinstance(message, (Invocation, StreamInvocation))
                and message.invocation_id == invocation_id
            ):
                del self._waiting[position]
                if isinstance(item, Call):
                    self._drop(item)
                self.answer_canceled(message)
                self.go_on()
                return

    def call_ended(self, call: Call) -> None:
        """Forget a call, its task, its streams and its slot."""
        assert call.task is not None
        del self.tasks[call.task]
        name = call.message.invocation_id
        if name is not None and self._calls.get(name) is call:
            del self._calls[name]
        if call.holds_slot:
            self.free_slot(call)
        if call.uploads:
            self.close_uploads(call.uploads)

    def _drop(self, call: Call) -> None:
        """Give up a call that no worker has begun."""
        del call.context
        call.work.close()
        if inspect.iscoroutine(call.returned):
            call.returned.close()
        if call.uploads:
            self.close_uploads(call.uploads)

    def _drop_line(self) -> None:
        """Let nothing that waits begin any more."""
        line, self._waiting = self._waiting, []
        for item in line:
            if isinstance(item, Call):
                self._drop(item)

    def close_uploads(self, uploads: dict[str, UploadStream]) -> None:
        """Take no more items for a call that has ended."""
        for stream_id, stream in uploads.items():
            stream.end()
            if self._uploads.get(stream_id) is stream:
                del self._uploads[stream_id]
        self.go_on()

    def free_slot(self, call: Call) -> None:
        call.holds_slot = False
        if call.task is not None:
            self._running -= 1

    # To the client

    @staticmethod
    def id_of(message: Invocation | StreamInvocation) -> str:
        return message.invocation_id or ""

    def reply(
        self, message: Invocation | StreamInvocation, completion: Completion
    ) -> None:
        """Answer a call, unless the client did not ask for an answer."""
        if message.invocation_id is not None:
            self.connection.send(self.wire.encode(completion))

    def complete(
        self,
        message: Invocation | StreamInvocation,
        method: HubMethod,
        result: Any,
    ) -> None:
        """Answer with a result; one that cannot be written becomes an error."""
        if message.invocation_id is None or result is _ANSWERED:
            return
        try:
            frame = self.wire.encode_result(message.invocation_id, result)
        except BaseException as error:  # noqa: BLE001 (reading it may run user code)
            self.fail(message, method, error)
        else:
            self.connection.send(frame)

    def fail(
        self,
        message: Invocation | StreamInvocation,
        method: HubMethod,
        error: BaseException,
        problem: str | None = None,
    ) -> None:
        """Answer with what the client may know of an error; log the rest.

        problem: what failed, if it was not the call itself.
        A cancelled call is completed as such; what ends the program is raised again.
        """
        if isinstance(error, _EXITS):
            raise error
        if isinstance(error, asyncio.CancelledError):
            self.answer_canceled(message)
            return
        problem = problem or _failed_invoking(message.target)
        text = _detail(problem, error, self.options)
        self.reply(message, Completion(self.id_of(message), VOID, text))
        self._log_failure(method, error)

    def answer_canceled(self, message: Invocation | StreamInvocation) -> None:
        """Complete a call that was called off, as its caller still expects."""
        if isinstance(message, StreamInvocation):
            text = None
        else:
            error = OperationCanceled("The invocation was canceled.")
            text = _detail(_failed_invoking(message.target), error, self.options)
        self.reply(message, Completion(self.id_of(message), VOID, text))

    def _log_failure(self, method: HubMethod, error: BaseException) -> None:
        """Log an error of user code: in full, unless it is one of the client's."""
        left = isinstance(error, ConnectionError) and self.ended.done()
        if isinstance(error, HubException) or left:
            log.info("%s ended: %s", method.name, error)
        else:
            log.error(
                "%s failed for connection %s",
                method.name,
                self.connection.connection_id,
                exc_info=error,
            )

    # The end

    def _farewell(self, error: Exception, allow_reconnect: bool = True) -> Close:
        text = _detail("Connection closed with an error.", error, self.options)
        return Close(text, allow_reconnect)

    def end(
        self,
        error: Exception | None,
        closing: Close | None = None,
        by_client: bool = False,
    ) -> None:
        """End the session once: say `closing`, tell `error` to on_disconnected.

        by_client: the client ended it, and what it had said before still counts.
        """
        if self.ended.done():
            return
        if closing is not None:
            self.connection.send(self.wire.encode(closing), counted=False)
            if self.ended.done():  # that was more than the client may owe
                return
            self._messages = None  # nothing counts behind a Close
        self._left = by_client
        if not by_client:
            self._drop_line()
        self.connection.shut()
        self.context.mark_aborted()
        self.ended.set_result(error)

    def lost(self, error: Exception | None) -> None:
        """End because the transport did."""
        self.end(error, by_client=error is None)

    def abort(self) -> None:
        """End on user code's behalf (`context.abort`)."""
        self.end(None, Close())

    def refuse(self, error: Exception) -> None:
        """End because `on_connected` failed: coming back would not help."""
        self.end(None, self._farewell(error, allow_reconnect=False))

    async def wind_up(self, error: Exception | None) -> Exception | None:
        """End everything that still runs when the session has ended.

        error: what ended it. Returns what `on_disconnected` shall see.
        """
        if self._left and error is None:
            error = self._hear_out()
        gone = ConnectionError("The underlying connection was closed.")
        for stream in self._uploads.values():
            stream.end(gone)
        self._dispatcher.registry.disown(self.connection)
        await asyncio.sleep(0)  # whoever reads a stream or awaits a result is told
        await self._cancel_tasks()
        await self._run_out()
        return error

    def _hear_out(self) -> Exception | None:
        """Read what a client sent just before it left; only half a message is wrong."""
        if self._messages is None:  # it said goodbye, and no more counts
            return None
        replay = self.connection.replay
        try:
            while (message := next(self._messages, None)) is not None:
                if isinstance(message, COUNTED) and replay and not replay.accept():
                    continue
                # A stream is left out, since nobody would take its items.
                if isinstance(message, (Invocation, StreamItem, Completion)):
                    self._waiting.append(message)
        except ProtocolError as broken:
            return broken
        if self.connection.inbox:
            return ProtocolError("Connection terminated while reading a message.")
        return None

    async def _run_out(self) -> None:
        """Let calls that waited when the client left begin all the same.

        Nobody takes their answers, so they are cancelled where they wait.
        """
        while self._waiting:
            first = self._waiting[0]
            await self._advance_a_little()
            if self._waiting and self._waiting[0] is first:
                await self._cancel_tasks()
                await self._advance_a_little()
                if self._waiting and self._waiting[0] is first:
                    name = self.connection.connection_id
                    count = len(self._waiting)
                    log.error("connection %s: %d calls never began", name, count)
                    break
        await self._cancel_tasks()

    def abandon(self) -> None:
        """Give up what is left, as when the connection's own task was cancelled."""
        self._drop_line()
        for task in self.tasks:
            if not task.cancelling():  # its cleanup may take a while
                task.cancel()

    async def _advance_a_little(self) -> None:
        """Let some of what waits begin: outside of this task, each in its own."""
        loop = asyncio.get_running_loop()
        for _ in range(2):  # first to ask for workers, then before others get them
            self._clock = time.perf_counter()
            loop.call_soon(self._advance, self._clock + _PATIENCE)
            await asyncio.sleep(0)

    async def _cancel_tasks(self) -> None:
        for count, task in enumerate(list(self.tasks), 1):
            if not task.cancelling():
                task.cancel()
            if count % _PORTION == 0:
                await asyncio.sleep(0)
        if self.tasks:
            timeout = self.options.close_timeout
            _, running = await asyncio.wait(self.tasks, timeout=timeout)
            for task in running:
                log.error("a hub method ignores its cancellation: %r", task)

    # Timers

    def look_after(self, now: float) -> None:
        """See to silence, stalled writes, pings and acknowledgements when due."""
        connection, replay = self.connection, self.connection.replay
        if self.ended.done():
            return
        if self._heard or connection.busy:  # it may have said more than we read
            self._heard, self._last_heard = False, now
        elif self._pinged and now - self._last_heard > _or_forever(
            self.options.client_timeout_interval
        ):
            error = OperationCanceled(
                "Client hasn't sent a message/ping within the configured "
                "ClientTimeoutInterval."
            )
            connection.traffic.count_cut("client timeout")
            self.end(error, self._farewell(error))
            return
        if connection.stalled(now):
            connection.cut("send timeout")
            return
        if now >= self._next_ping:
            self._next_ping = now + _or_forever(self.options.keep_alive_interval)
            connection.mention(self.wire.ping)
        if replay is not None:
            # What waits is not acknowledged: the client shall not send more of it.
            begun = replay.latest - len(self._waiting) - self._excess()
            if begun > replay.acked and connection.mention(
                self.wire.encode(Ack(begun))
            ):
                replay.acked = begun
        # Acknowledgements are due each time, the rest seldom, unless bytes wait.
        patience = self._dispatcher.patience * (2 if connection.stall is None else 1)
        if replay is not None:
            patience = 0.0
        self.due = min(now + patience, self._next_ping)


class Dispatcher:
    """Runs connections on one hub class."""

    def __init__(
        self,
        hub_class: type[Hub],
        options: HubOptions,
        protocols: dict[str, HubProtocol],
    ) -> None:
        self.options = options
        self.registry = Registry()
        self.methods = _collect_methods(hub_class)
        #: Whether the hub wants to see every call.
        self.intercepts = hub_class.on_invocation is not Hub.on_invocation
        #: Seconds from one look to the next at a connection for which bytes wait;
        #: twice that if none do.
        self.patience = 0.25 * min(
            _or_forever(options.client_timeout_interval),
            _or_forever(options.transport_send_timeout),
        )
        self.contexts: dict[str, HubCallerContext] = {}
        self.sessions: dict[str, Session] = {}
        self.workers = Workers()
        self.protocols = protocols
        self._hub_class = hub_class
        self._groups = GroupManager(self.registry)
        self._wires = {
            (name, framed): Wire(protocol, _frame if framed else None)
            for name, protocol in protocols.items()
            for framed in (False, True)
        }

    async def run(self, connection: Connection) -> None:
        """Live the life of a connection, from handshake to farewell."""
        wire = await self._shake_hands(connection)
        if wire is None:
            connection.finish()
            return
        try:
            session = Session(self, connection, wire)
        except Exception as failure:
            log.exception("%s cannot be made", self._hub_class.__name__)
            text = _detail("Connection closed with an error.", failure, self.options)
            connection.send(wire.encode(Close(text)), counted=False)
            connection.finish()
            return
        failed = False
        try:
            self._register(session)
            if await self._connect(session):
                session.start()
                error = await session.wind_up(await session.ended)
                failed = not await self._disconnect(session, error)
        finally:
            self._unregister(session)
            connection.finish(failed)

    async def _shake_hands(self, connection: Connection) -> Wire | None:
        """Agree on a protocol, or answer why not. (HubProtocol.md, Handshake)"""
        framed = connection.transport == WEBSOCKETS
        try:
            record = await self._first_record(connection)
            if record is None:
                return None
            request = _read_handshake(record)
            wire = self._choose_wire(connection, request)
        except ProtocolError as error:
            text = str(error)
            shown = _one_line(text, 200)
            log.warning("connection %s: %s", connection.connection_id, shown)
            if not isinstance(error, HandshakeError):
                text = "An unexpected error occurred during connection handshake."
                text = _detail(text, error, self.options)
            self.refuse_handshake(connection, text)
            return None
        answer = _handshake_response()
        connection.send(_frame(answer, wire.protocol.binary) if framed else answer)
        connection.wire = wire
        if framed and connection.stateful and request.version >= 2:
            connection.replay = Replay()
            connection.look_for_shortcut()
        return wire

    @staticmethod
    def refuse_handshake(connection: Connection, text: str) -> None:
        """Answer a handshake with an error, before or after it came."""
        answer = _handshake_response(text)
        framed = connection.transport == WEBSOCKETS
        connection.send(_frame(answer) if framed else answer)

    async def _first_record(self, connection: Connection) -> bytes | None:
        """Wait for the handshake; what follows it stays in the inbox."""
        inbox, limit = connection.inbox, self.options.maximum_receive_message_size
        try:
            async with asyncio.timeout(self.options.handshake_timeout):
                while (end := inbox.find(RECORD_SEPARATOR, 0, limit)) < 0:
                    if connection.closing:
                        return None
                    if limit is not None and len(inbox) >= limit:
                        raise HandshakeError("Handshake was canceled.")
                    await connection.arrival()
        except TimeoutError:
            raise HandshakeError("Handshake was canceled.") from None
        record = bytes(inbox[:end])
        del inbox[: end + 1]
        return record

    def _choose_wire(self, connection: Connection, request: HandshakeRequest) -> Wire:
        name, version = request
        protocol = self.protocols.get(name.lower())
        if protocol is None:
            if name.lower() == "messagepack":
                log.warning("a client asks for MessagePack: pip install msgpack")
            raise HandshakeError(f"The protocol '{name}' is not supported.")
        if version > PROTOCOL_VERSION:
            raise HandshakeError(
                f"The server does not support version {version} of the '{name}' "
                "protocol."
            )
        if protocol.binary and connection.transport == SERVER_SENT_EVENTS:
            raise HandshakeError(
                f"Cannot use the '{protocol.name}' protocol on the current transport. "
                "The transport does not support 'Binary' transfer format."
            )
        return self._wires[protocol.name, connection.transport == WEBSOCKETS]

    def make_hub(self, context: HubCallerContext) -> Hub:
        hub = self._hub_class()
        hub.context = context
        hub.clients = HubCallerClients(self.registry, context.connection_id)
        hub.groups = self._groups
        return hub

    def _register(self, session: Session) -> None:
        connection = session.connection
        self.sessions[connection.connection_id] = session
        self.contexts[connection.connection_id] = session.context
        self.registry.add(connection)
        connection.on_data = _nothing
        connection.on_lost = session.lost
        if connection.gone:
            session.lost(None)
        log.debug("connection %s opened: %r", connection.connection_id, session.context)

    def _unregister(self, session: Session) -> None:
        connection = session.connection
        connection.on_data = connection.on_lost = _nothing
        session.abandon()
        self.registry.remove(connection)
        self.contexts.pop(connection.connection_id, None)
        self.sessions.pop(connection.connection_id, None)
        session.context.mark_aborted()
        log.debug("connection %s closed", connection.connection_id)

    async def _connect(self, session: Session) -> bool:
        """Run `on_connected`; False if it refused the connection."""
        connecting = _Connecting()
        _current_call.set(connecting)
        try:
            await self._run_hook(session, session.hub.on_connected)
        except Exception as error:  # noqa: BLE001 (user code)
            self._log_hook(session, "on_connected", error)
            session.refuse(error)
            return False
        finally:
            connecting.over = True
        return True

    async def _disconnect(self, session: Session, error: Exception | None) -> bool:
        """Run `on_disconnected`; False if it failed."""
        try:
            await self._run_hook(session, session.hub.on_disconnected, error)
        except Exception as failure:  # noqa: BLE001 (user code)
            self._log_hook(session, "on_disconnected", failure)
            return False
        return True

    @staticmethod
    async def _run_hook(
        session: Session, hook: Callable[..., Any], *arguments: Any
    ) -> None:
        async def run() -> None:
            result = hook(*arguments)
            if hasattr(result, "__await__"):
                await result

        context = contextvars.copy_context()
        await _perform(run(), _hook(session, hook.__name__), context)

    @staticmethod
    def _log_hook(session: Session, name: str, error: Exception) -> None:
        level = logging.INFO if isinstance(error, HubException) else logging.ERROR
        log.log(
            level,
            "%s failed for connection %s",
            _hook(session, name),
            session.connection.connection_id,
            exc_info=error if level == logging.ERROR else None,
        )

    def tick(self, now: float) -> None:
        self.workers.dismiss(keep=1)  # a rush may be over
        for session in [s for s in self.sessions.values() if s.due <= now]:
            try:
                session.look_after(now)
            except Exception:  # one broken transport must not hold up the others
                name = session.connection.connection_id
                log.exception("connection %s", name)
                session.connection.cut("transport error")


def _hook(session: Session, name: str) -> str:
    return f"{type(session.hub).__name__}.{name}"


# ----------------------------------------------------------------- endpoint
#
# The HTTP side of a hub: negotiate makes connections, GET gives them a
# transport, POST brings bytes, DELETE ends long polling. Each request is checked in
# the same order: origin, user, connection, transport. Bodies and status codes
# are those of the reference server, which clients and their tests know.

#: Where the response hook finds the origin that may read the answer.
_CORS_ORIGIN = web.RequestKey("kestrun_cors_origin", str)

#: Seconds for everyone to go at shutdown before they are cut, and for the next
#: poll of those who had none pending.
_SHUTDOWN, _LAST_POLL = 3.0, 0.3


class _Refused(Exception):
    """A request ends here, with this answer."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def access_token(request: web.Request) -> str | None:
    """Find the token of a request: `Authorization: Bearer`, or `access_token`.

    Browsers cannot set headers on WebSockets and event streams, so SignalR
    clients put the token into the query there. For use in `authenticate`.
    Returns None if there is none.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.query.get("access_token")


def _check_origin(request: web.Request, allowed: Collection[str]) -> None:
    """Raise HTTPForbidden for a page of another origin that is not allowed.

    A browser tells the origin of the page whose script makes the request. What
    is no browser sends none, and needs no protection from one.
    """
    origin = request.headers.get("Origin")
    if origin is None:
        return
    if origin.lower() in allowed:
        request[_CORS_ORIGIN] = origin
    elif origin.lower().partition("://")[2] != request.host.lower():
        log.warning(
            "refused %s %s for origin %r: allowed_origins (--allow-origin) may name it",
            request.method,
            request.rel_url.raw_path,
            origin,
        )
        raise web.HTTPForbidden(
            text="Pages of this origin may not connect: the server does not list it "
            "(allowed_origins, --allow-origin)."
        )


def _is_preflight(request: web.Request) -> bool:
    return (
        request.method == "OPTIONS"
        and _CORS_ORIGIN in request
        and "Access-Control-Request-Method" in request.headers
    )


async def _add_cors(request: web.Request, response: web.StreamResponse) -> None:
    """Let an allowed origin read any answer, errors and streams included."""
    if (origin := request.get(_CORS_ORIGIN)) is None:
        return
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Allow-Credentials"] = "true"
    headers["Vary"] = "Origin"
    if request.method == "OPTIONS":
        asked = request.headers.get("Access-Control-Request-Headers", "")
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
        headers["Access-Control-Allow-Headers"] = asked or "x-requested-with"


def _new_id() -> str:
    """Make a name that nobody guesses and that needs no escaping in a URL."""
    return secrets.token_urlsafe(16)


class Endpoint:
    """The routes of one hub, and the connections that were negotiated there."""

    def __init__(self, hub_class: type[Hub], options: HubOptions) -> None:
        self.options = options
        self.dispatcher = Dispatcher(hub_class, options, _load_protocols())
        self.context = HubContext(
            self.dispatcher.registry, options, self.dispatcher.contexts
        )
        self._connections: dict[str, Connection] = {}
        #: Those of them that no WebSocket speaks for: their going must be noticed.
        self._watched: dict[str, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._origins = frozenset(origin.lower() for origin in options.allowed_origins)
        self._sweeper: asyncio.Task[None] | None = None
        self._stopping = False

    # Requests

    async def handle_negotiate(self, request: web.Request) -> web.StreamResponse:
        """Answer POST {hub}/negotiate. (TransportProtocols.md)"""
        return await self._answer(request, self._negotiate)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer GET, POST and DELETE {hub}. (TransportProtocols.md)"""
        return await self._answer(request, self._serve)

    async def _answer(
        self,
        request: web.Request,
        serve: Callable[[web.Request, str | None], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        authenticate = self.options.authenticate
        try:
            _check_origin(request, self._origins)
            if _is_preflight(request):
                return web.Response(status=204)
            user_id = await authenticate(request) if authenticate else None
            if user_id is not None and not isinstance(user_id, str):
                raise TypeError(f"authenticate: a str or None, not {user_id!r}")
            return await serve(request, user_id)
        except _Refused as refused:
            headers = _NO_CACHE if request.method == "GET" else None
            return web.Response(
                status=refused.status, text=refused.text, headers=headers
            )
        except web.HTTPException as error:
            return _error_answer(error)

    async def _negotiate(
        self, request: web.Request, user_id: str | None
    ) -> web.StreamResponse:
        if request.method != "POST":
            raise _Refused(405)
        query = _query(request)
        text = query.get("negotiateversion", "0").strip()
        number = re.fullmatch(r"[+-]?\d{1,10}", text, re.ASCII)
        if number is None or not -(2**31) <= int(text) < 2**31:
            error = "The client requested a non-integer protocol version."
            return _json_answer({"error": error})
        if int(text) < 0:
            error = (
                f"The client requested version '{int(text)}', but the server does not "
                "support this version."
            )
            return _json_answer({"error": error})
        version = min(int(text), 1)
        connection = self._create(user_id)
        answer: dict[str, Any] = {}
        wanted = query.get("usestatefulreconnect", "").strip().lower() == "true"
        if wanted and self.options.allow_stateful_reconnects:
            connection.stateful = answer["useStatefulReconnect"] = True
        answer["negotiateVersion"] = version
        if version:  # version 0 has one name for both purposes
            connection.connection_id = _new_id()
        answer["connectionId"] = connection.connection_id
        if version:
            answer["connectionToken"] = connection.token
        answer["availableTransports"] = [
            {
                "transport": transport,
                "transferFormats": ["Text"]
                if transport == SERVER_SENT_EVENTS
                else ["Text", "Binary"],
            }
            for transport in TRANSPORTS
            if transport in self.options.transports
        ]
        return _json_answer(answer)

    async def _serve(
        self, request: web.Request, user_id: str | None
    ) -> web.StreamResponse:
        match request.method:
            case "GET":
                return await self._open(request, user_id)
            case "POST":
                return await self._receive(request, user_id)
            case "DELETE":
                return self._delete(request, user_id)
        raise _Refused(405)

    async def _open(
        self, request: web.Request, user_id: str | None
    ) -> web.StreamResponse:
        """Give a connection its transport, or a new request of the same one."""
        transport = _asked_transport(request)
        if transport == WEBSOCKETS and not _query(request).get("id"):
            connection = None  # skipNegotiation
        else:
            connection = self._find(request, user_id)
        if transport not in self.options.transports:
            raise _Refused(
                404, f"{transport} transport not supported by this end point type"
            )
        if transport == WEBSOCKETS:
            _check_upgrade(request)
        if connection is None:
            connection = self._create(user_id)
        first = connection.transport is None
        if first:
            connection.transport, connection.request = transport, request
        elif connection.transport != transport:
            raise _Refused(400, "Cannot change transports mid-connection")
        elif transport == WEBSOCKETS and connection.replay is not None:
            self._make_way(connection)
        elif transport != LONG_POLLING:
            raise _Refused(409)
        if first:
            self._run(connection)
        if transport == WEBSOCKETS:
            return await serve_websocket(request, connection)
        if transport == SERVER_SENT_EVENTS:
            return await serve_events(request, connection)
        return await serve_poll(request, connection, first)

    def _make_way(self, connection: Connection) -> None:
        """Stop the old socket of a client that reconnects; it may look alive."""
        if connection.closing:
            raise _Refused(404)
        old = connection.link
        connection.detach()
        if old is not None:
            old.abort()

    async def _receive(
        self, request: web.Request, user_id: str | None
    ) -> web.StreamResponse:
        """Take bytes from the client; answer when the hub has caught up."""
        connection = self._find(request, user_id)
        if connection.transport == WEBSOCKETS:
            raise _Refused(
                405, "POST requests are not allowed for WebSocket connections."
            )
        if connection.posting is None:
            connection.posting = asyncio.Lock()
        async with connection.posting:
            try:
                await self._feed(request, connection)
            except (aiohttp.ClientPayloadError, ConnectionError, TimeoutError):
                raise _Refused(400) from None  # the client left half-way
        if connection.gone:
            raise _Refused(404)
        return web.Response(text="")

    async def _feed(self, request: web.Request, connection: Connection) -> None:
        """Give the body to the connection, for as long as both go on."""
        while not connection.closing:
            async with asyncio.timeout(self.options.disconnect_timeout):
                chunk = await request.content.readany()
            if not chunk:
                return
            connection.feed(chunk)
            await connection.inbox_room()
        request.protocol.keep_alive(False)  # nobody wants the rest

    def _delete(self, request: web.Request, user_id: str | None) -> web.StreamResponse:
        connection = self._find(request, user_id)
        if connection.transport != LONG_POLLING:
            raise _Refused(
                400, "Cannot terminate this connection using the DELETE endpoint."
            )
        connection.lost(None)
        return web.Response(status=202, text="")

    def _find(self, request: web.Request, user_id: str | None) -> Connection:
        token = _query(request).get("id")
        if not token:
            raise _Refused(400, "Connection ID required")
        connection = self._connections.get(token)
        if connection is None or connection.gone:
            raise _Refused(404, "No Connection with that ID")
        if connection.user_id != user_id:
            log.warning(
                "connection %s of another user was asked for", connection.connection_id
            )
            raise web.HTTPForbidden(text="This connection belongs to another user.")
        return connection

    # Connections

    def _create(self, user_id: str | None) -> Connection:
        if self._stopping:
            raise _Refused(503, "The server is shutting down.")
        registry = self.dispatcher.registry
        token = _new_id()
        connection = Connection(self.options, registry.turn, token)
        connection.user_id = user_id
        connection.on_change = self._track
        self._connections[token] = self._watched[token] = connection
        return connection

    def _track(self, connection: Connection) -> None:
        """Keep a connection for as long as it lives, and watch it while need be."""
        token = connection.token
        if connection.gone:
            self._connections.pop(token, None)
        watched = connection.link is None or connection.transport != WEBSOCKETS
        if watched and not connection.gone:
            self._watched[token] = connection
        else:
            self._watched.pop(token, None)

    def _run(self, connection: Connection) -> None:
        task = asyncio.create_task(self.dispatcher.run(connection))
        connection.task = task
        self._tasks.add(task)
        task.add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._stopping and not self._tasks:
            self.dispatcher.workers.dismiss()  # the last calls may have had some come
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection failed", exc_info=error)

    # The clock

    async def start(self, app: web.Application) -> None:
        """Start the sweep; aiohttp calls this when the application starts."""
        self._stopping = False
        self.dispatcher.workers.stand_by()
        self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        """See every second, if not oftener, to those whose time has come."""
        seconds = (
            self.options.keep_alive_interval,
            self.options.client_timeout_interval,
            self.options.disconnect_timeout,
            self.options.transport_send_timeout,
        )
        interval = min(1.0, *(_or_forever(value) / 4 for value in seconds))
        while True:
            await asyncio.sleep(interval)
            # If the whole process stood still, what came meanwhile is read first.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            try:
                self._look_after(time.monotonic())
            except Exception:
                log.exception("the sweep failed and goes on")

    def _look_after(self, now: float) -> None:
        timeout = _or_forever(self.options.disconnect_timeout)
        for connection in list(self._watched.values()):
            if connection.link is not None:
                connection.link.alive()
            elif now - connection.last_seen > timeout:
                log.debug("connection %s did not come back", connection.connection_id)
                connection.lost(None)
        self.dispatcher.tick(now)

    async def stop(self, app: web.Application) -> None:
        """Tell everyone to come back later, and wait until they have gone."""
        self._stopping = True
        for session in list(self.dispatcher.sessions.values()):
            session.end(None, Close(allow_reconnect=True))
        for connection in list(self._connections.values()):
            if connection.task is None:
                connection.lost(None)
            elif connection.wire is None:
                self.dispatcher.refuse_handshake(connection, "Handshake was canceled.")
                connection.shut()
                connection.announce()  # the handshake need not be waited for
        begun = time.monotonic()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_SHUTDOWN)
        while self._connections and (gone := time.monotonic() - begun) < _SHUTDOWN:
            await asyncio.sleep(0.02)
            for connection in list(self._connections.values()):
                # A poll on its way may still fetch the Close; later ones cannot come.
                waits = connection.link is None and gone > _LAST_POLL
                if connection.transport == LONG_POLLING and (
                    waits or not connection.outbox
                ):
                    connection.lost(None)
        for connection in list(self._connections.values()):
            connection.cut("shutdown")
        if self._sweeper is not None:
            self._sweeper.cancel()
        for _ in range(2):  # the last may come only in the turn in which the others end
            self.dispatcher.workers.dismiss()
            await asyncio.sleep(0)


def _query(request: web.Request) -> dict[str, str]:
    """Read the query as ASP.NET does: keys without case, values joined."""
    query: dict[str, str] = {}
    for key, value in request.query.items():
        key = key.lower()
        query[key] = f"{query[key]},{value}" if key in query else value
    return query


def _asked_transport(request: web.Request) -> str:
    """Tell by its headers which transport a GET wants. (Always an answer.)"""
    headers = request.headers
    accepted = headers.get("Accept", "").lower().split(",")
    if any(part.split(";")[0].strip() == "text/event-stream" for part in accepted):
        return SERVER_SENT_EVENTS
    if headers.get("Upgrade", "").lower() == "websocket":
        return WEBSOCKETS
    return LONG_POLLING


def _json_answer(value: Any) -> web.Response:
    text = json.dumps(value, separators=(",", ":"))
    return web.Response(text=text, content_type="application/json")


#: What errors say that were raised without a text.
_WHAT_TO_DO = {
    401: "Say who you are: send a valid token.",
    403: "You may not do this: ask with another token.",
    500: "The server failed at this; its log says why. Try again later.",
}


def _error_answer(
    error: web.HTTPException, message: str | None = None, **extra: Any
) -> web.Response:
    """Turn an aiohttp error into the JSON that every error of kestrun is."""
    headers = error.headers.copy()
    for name in ("Content-Type", "Content-Length"):
        headers.pop(name, None)
    message = message or error.text or error.reason
    if message == f"{error.status}: {error.reason}":  # aiohttp's, if nobody said more
        message = _WHAT_TO_DO.get(error.status, f"{error.reason}.")
    answer = {"Success": False, "Message": message, **extra}
    return web.json_response(answer, status=error.status, headers=headers)


def map_hub(
    app: web.Application,
    path: str,
    hub_class: type[Hub],
    options: HubOptions | None = None,
    **overrides: Any,
) -> HubContext:
    """Serve a hub at `path` of an aiohttp application.

    path: such as "/hubs/chat"; "/hubs/chat/negotiate" belongs to it too.
    hub_class: a subclass of Hub that can be made without arguments. The same
        class may be mapped twice; the two hubs know nothing of each other.
    options, overrides: a HubOptions, and fields of it to set or change.
    Returns the hub's context, for everything outside of hub methods. Raises
    TypeError or ValueError for an unknown option, for a class that is no hub,
    for a path that is taken, and for two methods that clients could not tell
    apart.
    """
    if not (isinstance(hub_class, type) and issubclass(hub_class, Hub)):
        raise TypeError(f"hub_class: a subclass of Hub, not {hub_class!r}")
    if not isinstance(path, str) or not path.startswith("/"):
        raise ValueError(f"path: begins with '/', unlike {path!r}")
    if "{" in path or "}" in path:
        raise ValueError(f"path: a hub has one path, not a pattern such as {path!r}")
    options = dataclasses.replace(options or HubOptions(), **overrides)
    endpoint = Endpoint(hub_class, options)
    path = path.rstrip("/")
    if any(r.canonical == (path or "/") for r in app.router.resources()):
        raise ValueError(f"path: {path or '/'!r} is taken by another route")
    for slash in ("", "/") if path else ("/",):  # ASP.NET takes both
        app.router.add_route("*", f"{path}{slash}", endpoint.handle)
    for slash in ("", "/"):
        app.router.add_route("*", f"{path}/negotiate{slash}", endpoint.handle_negotiate)
    if _add_cors not in app.on_response_prepare:
        app.on_response_prepare.append(_add_cors)
    app.on_startup.append(endpoint.start)
    app.on_shutdown.append(endpoint.stop)
    return endpoint.context


# --------------------------------------------------------------- operations
#
# Long-running work on asyncio tasks. An operation belongs to nobody's request:
# it is started, looked at by its id, called off, and forgotten a while after
# its end. Whoever wants to tell the world about it passes `on_change`.

NOT_STARTED, RUNNING = "NotStarted", "Running"
COMPLETED, FAULTED, CANCELED = "Completed", "Faulted", "Canceled"


def _now() -> datetime:
    return datetime.now(UTC)


async def _end_tasks(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for tasks that were cancelled; insist once, then give up on them."""
    left = set(tasks) - {asyncio.current_task()}
    for _ in range(2):
        if left:
            _, left = await asyncio.wait(left, timeout=1.0)
        for task in left:
            task.cancel()
    for task in left:
        log.error("a task ignores its cancellation: %r", task)


class Operation:
    """One piece of work. Read it at any time; only `Operations` changes it."""

    def __init__(self, name: str, description: str) -> None:
        #: The id, unguessable and safe in URLs.
        self.id = _new_id()
        self.name = name
        self.description = description
        #: "NotStarted", "Running"; then for good "Completed", "Faulted" or "Canceled".
        self.state = NOT_STARTED
        #: Percent, 0 to 100. It only rises, and is 100 only when completed.
        self.progress = 0
        #: How often progress was reported, and the text that came with it last.
        self.step = 0
        self.status = ""
        self.started_at: datetime | None = None
        self.completed_at: datetime | None = None
        #: What the work returned, and what it raised.
        self.result: Any = None
        self.error: BaseException | None = None
        self._ended = asyncio.Event()
        self._expires = math.inf
        self._canceled = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Operation {self.name!r} {self.state} {self.progress}%>"

    @property
    def final(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in (COMPLETED, FAULTED, CANCELED)

    async def wait(self) -> Operation:
        """Wait for the final state and its announcement by `on_change`.

        Returns the operation. Cancelling this does not cancel the work.
        """
        await self._ended.wait()
        return self


class Progress:
    """What the work calls to say how far it is: `await progress(40, "sorting")`."""

    def __init__(
        self, operation: Operation, changed: Callable[[Operation], Awaitable[None]]
    ) -> None:
        self._operation = operation
        self._changed = changed

    async def __call__(self, percent: float, status: str = "") -> None:
        """Report progress.

        percent: 0 to 100; less than before counts as before. 100 is shown and
            announced when the work has returned, not while it still runs.
        status: a text for people; empty leaves the last one.
        Returns when `on_change` has been told. Raises ValueError for a percentage
        out of range.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent: 0 to 100, not {percent!r}")
        operation = self._operation
        if operation.final:
            return
        operation.step += 1
        operation.progress = max(operation.progress, min(round(percent), 99))
        operation.status = status or operation.status
        if percent < 100:
            await self._changed(operation)


class Operations:
    """Starts operations, keeps the newest, and ends them all with the program.

    limit: how many are kept; the oldest finished ones go first, running ones stay.
    retention: seconds after its end in which a finished one is kept.
    on_change: called, or awaited if it is async, with the operation when it
        starts, at each progress and at its end; its errors are logged only.
    Raises ValueError for a limit below 1 or a negative retention.
    """

    def __init__(
        self,
        *,
        limit: int = 1000,
        retention: float = 3600,
        on_change: Callable[[Operation], Awaitable[None] | None] | None = None,
    ) -> None:
        if limit < 1 or retention < 0:
            raise ValueError("limit: at least 1; retention: at least 0 seconds")
        self._limit = limit
        self._retention = retention
        self._on_change = on_change
        self._operations: dict[str, Operation] = {}
        self._closed = False

    def start(
        self,
        work: Callable[[Progress], Awaitable[Any]],
        *,
        name: str = "",
        description: str = "",
    ) -> Operation:
        """Start `await work(progress)` in a task of its own.

        name, description: for people; the name is the function's unless given.
        Raises RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError("these Operations are closed")
        loop = asyncio.get_running_loop()
        name = name or getattr(work, "__name__", "operation")
        operation = Operation(name, description)
        self._operations[operation.id] = operation
        self._forget_old()
        operation._task = loop.create_task(self._run(operation, work))
        return operation

    def get(self, id: str) -> Operation | None:
        """Find an operation; None if it is unknown or forgotten."""
        self._forget_old()
        return self._operations.get(id)

    def list(self) -> list[Operation]:
        """List the operations that are kept, newest first."""
        self._forget_old()
        return list(self._operations.values())[::-1]

    def cancel(self, id: str) -> bool:
        """Call off an operation. False if it is unknown or final already."""
        operation = self.get(id)
        if operation is None or operation.final:
            return False
        if not operation._canceled and operation._task is not None:
            operation._canceled = True
            if operation.state == RUNNING:
                operation._task.cancel()
        return True

    def remove(self, id: str) -> bool:
        """Forget a final operation. False if it is unknown or still running."""
        operation = self.get(id)
        if operation is None or not operation.final:
            return False
        del self._operations[id]
        return True

    async def close(self) -> None:
        """Cancel what runs and wait until it has ended; start nothing more.

        Work that goes on all the same is cancelled once more after a second; if
        that does not end it either, it is logged and left behind.
        """
        self._closed = True
        running = [o for o in self._operations.values() if not o._ended.is_set()]
        for operation in running:
            self.cancel(operation.id)
        await _end_tasks([o._task for o in running if o._task is not None])

    async def _run(
        self, operation: Operation, work: Callable[[Progress], Awaitable[Any]]
    ) -> None:
        """Take an operation through its states; each is announced once."""
        state, result = CANCELED, None
        error: BaseException | None = None
        try:
            if not operation._canceled:  # before the first step
                operation.state, operation.started_at = RUNNING, _now()
                await self._changed(operation)
                result = await work(Progress(operation, self._changed))
                state = COMPLETED
        except asyncio.CancelledError as canceled:
            error = canceled
        except BaseException as failure:
            state, error = FAULTED, failure
            log.error("operation %r failed", operation.name, exc_info=failure)
            if not isinstance(failure, Exception):
                raise
        finally:
            await self._end(operation, state, result, error)

    async def _end(
        self,
        operation: Operation,
        state: str,
        result: Any,
        error: BaseException | None,
    ) -> None:
        """Make an operation final and announce it."""
        operation.state, operation.result, operation.error = state, result, error
        operation.completed_at = _now()
        if state == COMPLETED:
            operation.progress = 100
        operation._expires = time.monotonic() + self._retention
        try:
            await self._changed(operation)
        finally:
            operation._ended.set()

    async def _changed(self, operation: Operation) -> None:
        if self._on_change is None:
            return
        try:
            told = self._on_change(operation)
            if told is not None:
                await told
        except Exception:
            log.exception("on_change failed for operation %r", operation.name)

    def _forget_old(self) -> None:
        now = time.monotonic()
        surplus = len(self._operations) - self._limit
        for operation in list(self._operations.values()):
            if not operation.final:
                continue
            if surplus > 0 or operation._expires <= now:
                del self._operations[operation.id]
                surplus -= 1


# ----------------------------------------------------------------- schedule
#
# Jobs on the wall clock. One task sleeps until the next job is due; each run is
# a task of its own, so a slow job delays nobody. A time that was missed, because
# the machine slept or the loop was blocked, stays missed: no bursts afterwards.

#: Seconds that a job may start late before that run is skipped.
_LATE = 1.0


class _Interval:
    """Every so many seconds, counted from midnight UTC, 1 January 1970."""

    def __init__(self, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"every: a number of seconds, not {seconds!r}")
        if not 0.001 <= seconds < math.inf:
            raise ValueError(f"every: at least 0.001 seconds, not {seconds!r}")
        self._seconds = seconds

    def __str__(self) -> str:
        return f"every {self._seconds:g} s"

    def after(self, moment: float) -> float:
        count = math.floor(moment / self._seconds) + 1
        following = count * self._seconds
        return following if following > moment else (count + 1) * self._seconds


_MONTHS = (
    *("jan", "feb", "mar", "apr", "may", "jun"),
    *("jul", "aug", "sep", "oct", "nov", "dec"),
)
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


class _Cron:
    """A six-field cron expression, seconds first, in local time."""

    _FIELDS: ClassVar[tuple[tuple[str, int, int, dict[str, int]], ...]] = (
        ("seconds", 0, 59, {}),
        ("minutes", 0, 59, {}),
        ("hours", 0, 23, {}),
        ("day of month", 1, 31, {}),
        ("month", 1, 12, {name: i for i, name in enumerate(_MONTHS, 1)}),
        ("day of week", 0, 7, {name: i for i, name in enumerate(_DAYS)}),
    )

    def __init__(self, expression: str) -> None:
        if not isinstance(expression, str):
            raise TypeError(f"cron: a string of six fields, not {expression!r}")
        parts = expression.split()
        if len(parts) != len(self._FIELDS):
            raise ValueError(
                f"cron {expression!r}: six fields are needed (seconds, minutes, hours, "
                f"day of month, month, day of week), not {len(parts)}"
            )
        self._expression = expression
        values = []
        for part, field in zip(parts, self._FIELDS, strict=True):
            try:
                values.append(self._parse(part, *field[1:]))
            except ValueError as error:
                raise ValueError(
                    f"cron {expression!r}: {field[0]} {part!r}: {error}"
                ) from None
        self._seconds, self._minutes, self._hours = map(sorted, values[:3])
        self._days, self._months, weekdays = values[3:]
        self._weekdays = {day % 7 for day in weekdays}
        # Cron's oldest rule: with both days restricted, either may match.
        self._either = parts[3][0] not in "*?" and parts[5][0] not in "*?"
        self._any_hour = len(self._hours) == 24
        if not any(self._days_from(datetime(2024, 1, 1), 366 * 8)):
            raise ValueError(f"cron {expression!r}: day of month: there is no such day")

    def __str__(self) -> str:
        return self._expression

    @staticmethod
    def _parse(part: str, low: int, high: int, names: dict[str, int]) -> set[int]:
        """Read one field: *, ?, lists, ranges, steps, names."""

        def number(text: str) -> int:
            digits = text.isascii() and text.isdecimal()
            value = names.get(text.lower(), int(text) if digits else -1)
            if not low <= value <= high:
                raise ValueError(f"{text!r} is not between {low} and {high}")
            return value

        found: set[int] = set()
        for item in part.split(","):
            span, slash, step = item.partition("/")
            if slash and not (step.isascii() and step.isdecimal() and int(step)):
                raise ValueError(f"the step {step!r} is not a number above 0")
            first, dash, last = span.partition("-")
            if span in ("*", "?"):
                start, end = low, high
            elif dash:
                start, end = number(first), number(last)
            else:
                start = number(first)
                end = high if slash else start
            if start > end and names and high == 7:
                end += 7  # fri-mon: the week is a circle, which `% 7` closes
            if start > end:
                raise ValueError(f"{span!r} runs backwards")
            found.update(range(start, end + 1, int(step) if slash else 1))
        return found

    def _matches(self, day: datetime) -> bool:
        in_month = day.day in self._days
        in_week = day.isoweekday() % 7 in self._weekdays
        fits = in_month or in_week if self._either else in_month and in_week
        return fits and day.month in self._months

    def _days_from(self, day: datetime, count: int) -> Iterator[datetime]:
        for _ in range(count):
            if self._matches(day):
                yield day
            day += timedelta(days=1)

    def after(self, moment: float) -> float:
        """Find the first matching second after a moment (seconds since 1970)."""
        if self._any_hour and (soon := self._within_two_hours(moment)) is not None:
            return soon
        local = datetime.fromtimestamp(math.floor(moment) + 1).replace(fold=0)
        today = local.replace(hour=0, minute=0, second=0)
        for day in self._days_from(today, 366 * 8 + 1):
            for found in self._times(day, local):
                stamp = found.timestamp()
                # Summer time skips an hour, whose times do not exist, and repeats
                # one, whose times count once.
                if stamp > moment and datetime.fromtimestamp(stamp) == found:
                    return stamp
        return math.inf

    def _within_two_hours(self, moment: float) -> float | None:
        """Look at the next minutes one by one, as the clock will show them.

        Where any hour will do, an hour that is shown twice is two hours.
        """
        first = math.floor(moment / 60) * 60
        for minute in range(first, first + 7260, 60):
            shown = datetime.fromtimestamp(minute)
            if shown.minute in self._minutes and self._matches(shown):
                for second in self._seconds:
                    if minute + second > moment:
                        return float(minute + second)
        return None

    def _times(self, day: datetime, earliest: datetime) -> Iterator[datetime]:
        """Go through a day's matching times that are not too early."""
        for hour in self._hours:
            if day.replace(hour=hour, minute=59, second=59) < earliest:
                continue
            for minute in self._minutes:
                if day.replace(hour=hour, minute=minute, second=59) < earliest:
                    continue
                for second in self._seconds:
                    yield day.replace(hour=hour, minute=minute, second=second)


class _Job:
    """A function and when it runs."""

    def __init__(
        self, name: str, function: Callable[[], Any], when: _Interval | _Cron
    ) -> None:
        self.name = name
        self.function = function
        self.when = when
        self.next = math.inf
        #: When the schedule looked at it last.
        self.seen = 0.0
        self.last: float | None = None
        self.suspended = False
        self.runs = self.failures = 0
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Run once; an error is logged, and the next time comes all the same."""
        try:
            result = self.function()
            if hasattr(result, "__await__"):
                await result
        except Exception:
            self.failures += 1
            log.exception("job %s failed and runs again next time", self.name)


class Schedule:
    """Runs functions on the clock, without an external scheduler.

    Register with `every` or `cron`; jobs run between `start` and `close`, or as
    long as an application does: `app.cleanup_ctx.append(schedule.context)`.
    Registering while an event loop runs starts the schedule by itself.

    clock, sleep: the time in seconds since 1970 and an async sleep, for tests.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._jobs: dict[str, _Job] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def every(self, seconds: float, *, name: str = "") -> Callable[[F], F]:
        """Run the decorated function at every multiple of `seconds`.

        Multiples are of the clock: 30 means :00 and :30 of each minute. The job
        is named after the function unless `name` is given. Raises TypeError for
        what is no number, ValueError for less than 0.001 s or a name that is taken.
        """
        return self._register(_Interval(seconds), name)

    def cron(self, expression: str, *, name: str = "") -> Callable[[F], F]:
        """Run the decorated function when six fields match the local time.

        expression: seconds, minutes, hours, day of month, month, day of week;
            each with lists (1,15), ranges (mon-fri), steps (*/10) and names.
        Raises ValueError that points at the wrong field, or for a name that is
        taken, and TypeError for what is no string.
        """
        return self._register(_Cron(expression), name)

    def _register(self, when: _Interval | _Cron, name: str) -> Callable[[F], F]:
        def decorate(function: F) -> F:
            job = _Job(name or function.__name__, function, when)
            if job.name in self._jobs:
                raise ValueError(f"there is a job named {job.name!r} already")
            job.next = when.after(self._clock())
            self._jobs[job.name] = job
            with contextlib.suppress(RuntimeError):  # no loop yet: start() comes later
                asyncio.get_running_loop()
                self._restart()
            return function

        return decorate

    def report(self) -> list[dict[str, Any]]:
        """Describe every job: name, when, suspended, last and next run, counts."""

        def moment(seconds: float | None) -> datetime | None:
            if seconds is None or seconds == math.inf:
                return None
            return datetime.fromtimestamp(seconds, UTC)

        return [
            {
                "name": job.name,
                "schedule": str(job.when),
                "suspended": job.suspended,
                "running": job.task is not None,
                "last_run": moment(job.last),
                "next_run": None if job.suspended else moment(job.next),
                "runs": job.runs,
                "failures": job.failures,
            }
            for job in self._jobs.values()
        ]

    def suspend(self, name: str) -> None:
        """Let a job's times pass. Raises KeyError for an unknown name."""
        self._jobs[name].suspended = True

    def resume(self, name: str) -> None:
        """Let a suspended job run at its next time. Raises KeyError."""
        job = self._jobs[name]
        job.suspended, job.next = False, job.when.after(self._clock())
        if self._task is not None:
            self._restart()

    def cancel(self, name: str) -> None:
        """Forget a job, and end it if it runs. Raises KeyError."""
        job = self._jobs.pop(name)
        if job.task is not None:
            job.task.cancel()

    def start(self) -> None:
        """Begin to run jobs; needs a running event loop."""
        self._closed = False
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop, ending the jobs that run."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if self._task is not None:
            tasks.append(self._task)
            self._task = None
        self._closed = True
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await _end_tasks(tasks)

    async def context(self, app: object) -> AsyncIterator[None]:
        """Run with an aiohttp application (for `app.cleanup_ctx`)."""
        self.start()
        yield
        await self.close()

    def _restart(self) -> None:
        """Look at the jobs anew: one of them may be due earlier now."""
        if self._closed:
            return
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            now = self._clock()
            for job in list(self._jobs.values()):
                self._run_if_due(job, now)
            nearest = min((job.next for job in self._jobs.values()), default=math.inf)
            # Never for long: the clock may be set while this sleeps.
            await self._sleep(max(0.0, min(nearest - self._clock(), 30.0)))

    def _run_if_due(self, job: _Job, now: float) -> None:
        if job.next > now:
            if now < job.seen:  # the clock was set back
                job.next = job.when.after(now)
            job.seen = now
            return
        late, job.next = now - job.next, job.when.after(now)
        job.seen = now
        if job.suspended:
            return
        if late > _LATE:
            log.warning("job %s skipped a run: %.1f s late", job.name, late)
        elif job.task is not None:
            log.warning("job %s skipped a run: the last one is not over", job.name)
        else:
            job.last, job.runs = now, job.runs + 1
            job.task = asyncio.create_task(job.run())
            job.task.add_done_callback(functools.partial(self._job_done, job))

    @staticmethod
    def _job_done(job: _Job, task: asyncio.Task[None]) -> None:
        job.task = None


# --------------------------------------------------------------------- page
#
# The second half of the lesson: a hub client of its own in plain JavaScript.
# A raw literal without placeholders. One value differs, the hub's path, which
# `Demo.mount` puts into the meta tag.

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
    --paper: #eef2f5; --panel: #fdfefe; --raised: #edf2f6; --ink: #17222c;
    --muted: #51606d; --line: #d6dee5; --edge: #7a8997; --accent: #235f8c;
    --on-accent: #fff; --feather: #a9582b; --good: #1c6b48; --warn: #855000;
    --bad: #b02a20;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --paper: #10161c; --panel: #182028; --raised: #232e38; --ink: #dfe7ee;
      --muted: #9aa9b6; --line: #2c3843; --edge: #677683; --accent: #86b9e2;
      --on-accent: #0d1a25; --feather: #e0935f; --good: #7ccba2; --warn: #e6b566;
      --bad: #f0938a;
    }
  }
  * { box-sizing: border-box; min-width: 0; min-height: 0; margin: 0;
    overflow-wrap: anywhere; scrollbar-width: thin; }
  [hidden] { display: none !important; }
  html { scroll-padding-bottom: 40dvh; }    /* what has the focus stays above the log */
  body { display: flex; flex-direction: column; gap: 1rem; min-height: 100dvh;
    max-width: 84rem; margin: auto; padding: 1rem; color: var(--ink);
    background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
  header, .row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
  header svg { width: 2.75rem; margin-right: .25rem; fill: none; stroke: var(--feather);
    stroke-width: 2.2; stroke-linecap: round; }
  h1 { font-size: 1.5rem; line-height: 1.2; }
  h2 { font-size: 1.0625rem; }
  p, label, .state { color: var(--muted); font-size: .875rem; }
  code, time { font: .8125rem ui-monospace, Menlo, Consolas, monospace; }
  ul, ol { padding: 0; list-style: none; }
  main, .controls, .controls section { display: grid; gap: 1rem; align-content: start; }
  .controls section { gap: .75rem; }
  section, #token-form { padding: 1rem 1.125rem; border: 1px solid var(--line);
    border-radius: .75rem; background: var(--panel); }
  label { display: grid; flex: 1 1 8rem; gap: .25rem; }
  .row:has(label) { align-items: end; }
  input, button { padding: .375rem .65rem; border: 1px solid var(--edge);
    border-radius: .5rem; background: var(--panel); color: var(--ink); font: inherit; }
  input { width: 100%; font-size: 1rem; }
  button { border-color: var(--line); background: var(--raised); font-size: .875rem;
    line-height: 1.7; cursor: pointer; }
  button:hover { border-color: var(--edge); }
  .main { border-color: var(--accent); background: var(--accent);
    color: var(--on-accent); }
  :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }

  #state { font-weight: 600; }
  #state::before { content: "●"; margin-right: .375rem; color: var(--warn); }
  [data-state="Connected"] #state::before { color: var(--good); }
  #groups { display: flex; flex-wrap: wrap; gap: .375rem; font-size: .875rem; }
  #groups li { padding: 0 .75rem; border: 1px solid var(--edge); border-radius: 1rem; }
  #groups:empty::after { content: "In no group yet"; color: var(--muted); }
  #operations:empty { display: none; }
  #operations li { display: grid; gap: .5rem; padding: .75rem 0;
    border-top: 1px solid var(--line); }
  #operations button, #clear, #retry { padding: 0 .625rem; }
  li code { flex: 1 1 0; overflow: hidden; text-overflow: ellipsis;
    white-space: nowrap; }
  .state { color: var(--ink); font-weight: 600; }
  progress { width: 100%; height: .5rem; border: 0; appearance: none;
    border-radius: 1rem; background: var(--line); overflow: hidden; }
  progress::-webkit-progress-bar { background: none; }
  progress::-webkit-progress-value { background: var(--feather); transition: .4s; }
  progress::-moz-progress-bar { background: var(--feather); }

  [role="log"] { display: grid; grid-template-rows: auto 1fr; gap: .5rem; height: 38dvh;
    position: sticky; bottom: 0; margin: 0 -1rem -1rem; border-width: 1px 0 0;
    border-radius: 0; }                      /* docked below the buttons that fill it */
  [role="log"] .row { justify-content: space-between; }
  #log { overflow-y: auto; }
  #log:empty::after { content: "Nothing yet"; color: var(--muted); }
  #log li { display: grid; grid-template-columns: 4.5rem 1fr; gap: 0 .75rem;
    align-items: baseline; padding: .3125rem 0; font-size: .9375rem;
    animation: arrive .4s; }
  #log li + li { border-top: 1px solid var(--line); }
  #log strong { color: var(--accent); font-size: .8125rem; }
  #log span { grid-column: 1 / -1; }
  #log :is(time, [data-kind="Connection"] *, [data-kind="Answer"] *) {
    color: var(--muted); }
  #log [data-kind~="Warning"] strong { color: var(--warn); }
  #log [data-kind~="Error"] strong { color: var(--bad); }
  @keyframes arrive { from { opacity: 0; } }
  @media (min-width: 56rem) {                /* two columns, each scrolls by itself */
    body { height: 100dvh; padding: 1.25rem 2rem 2rem; }
    #connection { margin-left: auto; text-align: right; }
    main { flex: 1; grid-template: minmax(0, 1fr) / 27rem 1fr; align-content: stretch; }
    .controls { overflow-y: auto; }
    [role="log"] { height: auto; margin: 0; border-width: 1px; border-radius: .75rem; }
    #log li { grid-template-columns: 4.5rem 13.25rem 1fr; }
    #log span { grid-column: auto; }
  }
  @media (prefers-reduced-motion: reduce) {
    #log li { animation: none; }
    progress::-webkit-progress-value { transition: none; }
  }
</style>
</head>
<body>
<header>
  <svg viewBox="0 0 24 24" aria-hidden="true">
    <path d="M3 21C4 10 11 3 21 3M3 21C8 14 13 11 20 11M3 21C8 18 12 17 17 18"/></svg>
  <div><h1>Kestrun</h1> <p>A SignalR server in one Python file</p></div>
  <div id="connection">
    <button id="retry" type="button" hidden>Try now</button>
    <output id="state"><span id="state-words">Connecting</span>
      <span id="transport"></span></output>
    <p>Connection id <code id="connection-id">none yet</code></p>
  </div>
</header>

<form id="token-form" class="row" hidden>
  <label><span id="token-hint">Token</span>
    <input id="token" type="password" autocomplete="off" required pattern="[ -~]+"
      title="Latin letters, digits and signs"></label>
  <button id="token-send" class="main">Use this token</button>
</form>

<main>
  <div class="controls">
    <noscript>This page needs JavaScript to talk to the server.</noscript>
    <section>
      <h2>To everyone</h2>
      <form class="row">
        <button id="log-information">Information</button>
        <button id="log-warning">Warning</button>
        <button id="log-error">Error</button>
        <button id="event">Custom event</button>
      </form>
      <form class="row">
        <label>Echo, to this page only <input id="echo" value="Hello" required></label>
        <button id="echo-send">Send</button>
      </form>
    </section>

    <section>
      <h2>Groups</h2>
      <form class="row">
        <label>Group <input id="group" value="Admins" required></label>
        <button id="join" class="main">Join</button>
        <button id="leave">Leave</button>
        <button id="broadcast">Broadcast</button>
        <button id="ask-join">Ask others to join</button>
        <button id="ask-leave">Ask others to leave</button>
      </form>
      <ul id="groups" aria-label="Groups this page is in"></ul>
    </section>

    <section>
      <h2>Long operations</h2>
      <form class="row">
        <label>Seconds <input id="seconds" type="number" min="1" max="3600" value="5"
          required></label>
        <button id="start" class="main">Start</button>
      </form>
      <ul id="operations" aria-label="Operations, newest first"></ul>
      <template id="operation">
        <li>
          <div class="row"><code></code> <output class="state"></output></div>
          <progress max="100" value="0"></progress>
          <p class="message"></p>
          <div class="row">
            <button type="button" class="status">Status</button>
            <button type="button" class="cancel">Cancel</button>
            <button type="button" class="remove" hidden>Remove</button>
          </div>
        </li>
      </template>
    </section>
  </div>

  <section role="log" aria-labelledby="log-title">
    <div class="row">
      <h2 id="log-title">Log</h2> <button id="clear" type="button">Clear</button></div>
    <ol id="log" tabindex="0" aria-labelledby="log-title"></ol>
  </section>
</main>

<script type="module">
// ------------------------------------------------------------------ hub connection
//
// A SignalR client: the JSON protocol over a WebSocket. A hub message is a JSON object
// and the character 0x1E. Left out, because this page needs none of it: the other
// transports, streams, client results, MessagePack, stateful reconnect.

const INVOCATION = 1, COMPLETION = 3, PING = 6, CLOSE = 7, END = "\x1e";
const PING_INTERVAL = 15_000, SERVER_TIMEOUT = 30_000;  // milliseconds, as in SignalR
const RETRY_DELAYS = [0, 2, 10, 30];                    // seconds; the last one repeats

class HubConnection {
  state = "Disconnected";   // or Connecting, Connected, Reconnecting, Unauthorized
  #handlers = new Map();    // method name in lower case -> function
  #pending = new Map();     // invocation id -> {resolve, reject}
  #buffer = "";             // the start of a message whose rest has not arrived yet
  #tries = 0;               // reconnects since the connection was last a steady one
  #socket = null;
  #timers = {};
  #lastId = 0;
  #pingedAt = 0;

  constructor(url, token, onstate) {   // token() is asked anew at each attempt
    Object.assign(this, { url, token, onstate });
  }

  on(method, handler) {     // SignalR compares these names without regard to case
    this.#handlers.set(method.toLowerCase(), handler);
  }

  async invoke(target, ...args) {
    if (this.state !== "Connected") throw new Error("There is no connection now.");
    const invocationId = String(++this.#lastId);
    this.#send({ type: INVOCATION, invocationId, target, arguments: args });
    return new Promise((resolve, reject) => {
      this.#pending.set(invocationId, { resolve, reject });
    });
  }

  start() {                 // from the beginning, without waiting for the next attempt
    this.#drop();
    this.#tries = 0;
    this.#connect();
  }

  async #connect() {
    this.#setState(this.connectionId ? "Reconnecting" : "Connecting");
    try {
      this.#open(await this.#negotiate());
    } catch (error) {
      if (error.status === 401) this.#setState("Unauthorized");
      else this.#lost(error.message, true);
    }
  }

  async #negotiate() {      // the id is public, the token that opens the socket is not
    const url = new URL(this.url);
    url.pathname += "/negotiate";
    url.searchParams.set("negotiateVersion", 1);
    const answer = await (await request("POST", url, this.token())).json();
    if (answer.error) throw new Error(answer.error);
    this.connectionId = answer.connectionId;
    return answer.connectionToken;
  }

  #open(connectionToken) {
    this.#drop();
    const url = new URL(this.url);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("id", connectionToken);
    // A browser sends no headers of ours with a WebSocket, so the query carries it.
    if (this.token()) url.searchParams.set("access_token", this.token());
    const socket = this.#socket = new WebSocket(url);
    const current = (act) => (event) => socket === this.#socket && act(event);
    socket.onopen = current(() => this.#send({ protocol: "json", version: 1 }));
    socket.onmessage = current(({ data }) => this.#receive(data));
    socket.onclose = current(() => this.#lost("The connection broke off.", true));
    this.#watch();
  }

  #send(message) {
    this.#socket.send(JSON.stringify(message) + END);
  }

  #receive(data) {          // a frame may hold several messages, or only a part of one
    this.#watch();
    const messages = (this.#buffer + data).split(END);
    this.#buffer = messages.pop();
    for (const text of messages) {
      if (!this.#socket) return;                 // the message before was a Close
      if (this.state === "Connected") this.#dispatch(JSON.parse(text));
      else this.#shakeHands(JSON.parse(text));
    }
  }

  #shakeHands({ error }) {
    if (error) return this.#lost(error, true);
    this.#timers.ping = setInterval(() => this.#ping(), PING_INTERVAL);
    // Whoever is cut at once, again and again, asks less and less often.
    this.#timers.steady = setTimeout(() => { this.#tries = 0; }, 2_000);
    this.#ping();
    this.#setState("Connected");
  }

  #dispatch(message) {
    const { type, target, arguments: args, invocationId, result, error } = message;
    if (type === INVOCATION) this.#handlers.get(target.toLowerCase())?.(...args);
    if (type === COMPLETION) {
      const { resolve, reject } = this.#pending.get(invocationId);
      this.#pending.delete(invocationId);
      if (error) reject(new Error(error)); else resolve(result);
    }
    if (type === CLOSE) {
      this.#lost(error ?? "The server said goodbye.", message.allowReconnect);
    }                       // a ping has done its work by arriving
  }

  #ping() {
    this.#pingedAt = Date.now();
    this.#send({ type: PING });
  }

  #watch() {                // something arrived: the clock of silence starts anew
    clearTimeout(this.#timers.silence);
    this.#timers.silence = setTimeout(
      () => this.#lost("The server was silent for 30 seconds.", true), SERVER_TIMEOUT);
    // In a hidden page timers run about once a minute, too seldom for the server's
    // patience. Messages arrive in time all the same, so they drive pings as well.
    const due = Date.now() - this.#pingedAt >= PING_INTERVAL;
    if (due && this.state === "Connected") this.#ping();
  }

  #lost(reason, again = false) {
    this.#drop();
    if (!again) return this.#setState("Disconnected", { reason });
    const delay = RETRY_DELAYS[Math.min(this.#tries++, RETRY_DELAYS.length - 1)];
    this.#timers.retry = setTimeout(() => this.#connect(), delay * 1000);
    this.#setState("Reconnecting", { reason, delay });
  }

  #drop() {
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    this.#socket?.close();
    this.#socket = null;    // from here on the old socket's events are ignored
    this.#buffer = "";
    const error = new Error("The connection was lost before the server answered.");
    for (const { reject } of this.#pending.values()) reject(error);
    this.#pending.clear();
  }

  #setState(state, detail) {
    const previous = this.state;
    this.state = state;
    this.onstate(state, { previous, ...detail });
  }
}

/** Fetch with the token; whatever goes wrong becomes a sentence for the reader. */
async function request(method, url, token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const signal = AbortSignal.timeout(SERVER_TIMEOUT);
  const response = await fetch(url, { method, headers, signal })
    .catch(() => { throw new Error("The server cannot be reached. Is it running?"); });
  if (response.ok) return response;
  const { status } = response;
  const { Message = `The server answered ${status}.` } = await response.json()
    .catch(() => ({}));
  throw Object.assign(new Error(Message), { status });
}

// ------------------------------------------------------------------------ the page
//
// Everything received is written with textContent, never as HTML: whatever another
// client sends stays text.

const byId = (id) => document.getElementById(id);
const address = (path) => new URL(path, document.baseURI);   // works under a sub-path
const token = () => sessionStorage.getItem("kestrun-token");
const hubPath = document.querySelector("meta[name=hub]").content;
const connection = new HubConnection(address(hubPath), token, showState);
const groups = new Map();   // name -> "" or what is to be said about it

function element(name, text, properties) {
  return Object.assign(document.createElement(name), { textContent: text }, properties);
}

function note(kind, text, timestamp = Date.now()) {
  const log = byId("log"), date = new Date(timestamp), entry = element("li");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 32;
  const time = date.toLocaleTimeString([], { hourCycle: "h23" });
  entry.dataset.kind = kind;
  entry.append(element("time", time, { dateTime: date.toISOString() }),
    element("strong", kind), element("span", text));
  log.append(entry);
  while (log.childElementCount > 500) log.firstElementChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;   // else somebody is reading further up
}

/** Ask a route of the API; some answer in JSON, some in plain text. */
async function call(method, path) {
  try {
    const response = await request(method, address(`api/${path}`), token());
    const isJson = response.headers.get("Content-Type")?.includes("json");
    return await (isJson ? response.json() : response.text());
  } catch (error) {
    if (error.status === 401) askForToken();
    throw error;
  }
}

/** Do what was asked for; its answer or its error goes to the log. */
async function perform(action) {
  try {
    const answer = await action();
    if (answer) note("Answer", answer.Message ?? answer);
  } catch (error) {
    note("Error", error.message);
  }
}

function showState(state, { previous, reason, delay }) {
  const connected = state === "Connected";
  document.body.dataset.state = state;
  byId("state-words").textContent = delay ? `${state}, next try in ${delay} s` : state;
  byId("transport").textContent = connected ? "over WebSockets" : "";
  byId("connection-id").textContent = connected ? connection.connectionId : "none";
  byId("retry").hidden = !delay && state !== "Disconnected";
  if (connected) {
    byId("token-form").hidden = true;
    note("Connection", previous === "Reconnecting" ? "Connected again." : "Connected.");
    // Groups end with the connection: the page remembers its own and joins them again.
    for (const name of groups.keys()) perform(() => joinGroup(name));
    perform(refreshOperations);
  } else {
    for (const name of groups.keys()) groups.set(name, ", to be joined again");
    showGroups();
    if (state === "Unauthorized") askForToken();
    // Said once when the connection is lost, not at every vain attempt.
    const isNews = reason && previous !== "Reconnecting";
    if (isNews) note("Connection", `${reason} ${state}.`);
  }
}

function askForToken() {
  if (!byId("token-form").hidden) return;
  byId("token-hint").textContent = token()
    ? "The server did not accept this token. Please check it and try again."
    : "This server asks for a token.";
  byId("token-form").hidden = false;
  byId("token").focus();
}

function showGroups() {
  const items = Array.from(groups, ([name, remark]) => element("li", name + remark));
  byId("groups").replaceChildren(...items);
}

// Operations have a row each, made when the page first hears of them.

const rows = () => Array.from(byId("operations").children);
const isFinal = (row) => !row.querySelector(".remove").hidden;

function operationRow(taskId) {
  const known = rows().find((row) => row.dataset.taskId === taskId);
  if (known) return known;
  const row = byId("operation").content.firstElementChild.cloneNode(true);
  row.dataset.taskId = taskId;
  row.querySelector("code").textContent = taskId;
  row.querySelector("progress").ariaLabel = `Progress of ${taskId}`;
  byId("operations").prepend(row);
  rows().filter(isFinal).slice(20).forEach((old) => old.remove());
  return row;
}

function showOperation({ TaskId, State, Progress, Status, Message }) {
  const row = operationRow(TaskId), progress = row.querySelector("progress");
  if (isFinal(row)) return; // an answer that was overtaken by the end
  const text = Status || Message, running = ["NotStarted", "Running"].includes(State);
  progress.value = Progress ?? progress.value;
  row.querySelector(".state").textContent = State;
  row.querySelector(".message").textContent = `${progress.value} %, ${text}`;
  row.querySelector(".cancel").hidden = !running;
  row.querySelector(".remove").hidden = running;
}

async function refreshOperations() {
  const before = rows().map((row) => row.dataset.taskId);
  const list = await call("GET", "operation/list");
  list.reverse().forEach(showOperation);        // the newest last, so it ends up on top
  const known = new Set(list.map(({ TaskId }) => TaskId));
  for (const TaskId of before.filter((id) => !known.has(id))) {
    showOperation({ TaskId, State: "Unknown", Message: "the server does not know it" });
  }
}

// The tables: what the server invokes, what its events do, what the buttons do.

const methods = {
  ReceiveLog({ level, message, timestamp }) {
    note(`Log · ${level}`, message, timestamp);
  },
  ReceiveEvent({ eventName, data, timestamp }) {
    const text = (data && events[eventName]?.(data)) ?? JSON.stringify(data);
    note(`Event · ${eventName}`, text, timestamp);
  },
  ReceiveGroupMessage({ Message, Timestamp, Sender }) {
    note("Group message", `${Message} (from ${Sender})`, Timestamp);
  },
  ReceiveAdminUpdate({ Message, SystemInfo, Timestamp }) {
    const { ProcessorCount, PythonVersion, MemoryMB } = SystemInfo;
    note("Admin update", `${Message} (Python ${PythonVersion}, ${MemoryMB} MB, `
      + `${ProcessorCount} processors)`, Timestamp);
  },
  ReceiveEcho(message) {
    note("Echo", message);
  },
  GroupJoined(groupName) {
    groups.set(groupName, "");
    showGroups();
    note("Group", `This page is in ${groupName}.`);
  },
  GroupLeft(groupName) {
    groups.delete(groupName);
    showGroups();
    note("Group", `This page has left ${groupName}.`);
  },
};

const events = {            // each returns its text for the log
  __proto__: null,          // so that an event called "constructor" finds nothing
  PowerShellEvent: ({ Message, Random }) => `${Message} (random number ${Random})`,
  GroupJoinRequest: ({ Message }) => Message,
  GroupLeaveRequest: ({ Message }) => Message,
  OperationProgress(data) {
    showOperation({ ...data, State: "Running" });
    return `${data.Progress} %, ${data.Message}`;
  },
  OperationComplete(data) {
    showOperation(data);
    return `${data.State}, ${data.Message}`;
  },
  ServerHeartbeat: ({ Message, Uptime, ConnectedClients }) =>
    `${Message} (up ${Uptime} s, ${ConnectedClients} connected)`,
};

const group = () => byId("group").value;
const joinGroup = (groupName) => connection.invoke("JoinGroup", groupName);
const groupPath = (verb) => `group/${verb}/${encodeURIComponent(group())}`;
const buttons = {
  "log-information": () => call("GET", "ps/log/Information"),
  "log-warning": () => call("GET", "ps/log/Warning"),
  "log-error": () => call("GET", "ps/log/Error"),
  "event": () => call("GET", "ps/event"),
  "echo-send": () => connection.invoke("Echo", byId("echo").value),
  "join": () => joinGroup(group()),
  "leave": () => connection.invoke("LeaveGroup", group()),
  "broadcast": () => call("POST", groupPath("broadcast")),
  "ask-join": () => call("POST", groupPath("join")),
  "ask-leave": () => call("POST", groupPath("leave")),
  async "start"() {
    const seconds = byId("seconds").value;
    const answer = await call("POST", `operation/start?seconds=${seconds}`);
    showOperation({ ...answer, State: "Running" });
    return answer;
  },
  "token-send"() {
    sessionStorage.setItem("kestrun-token", byId("token").value);
    byId("token-form").hidden = true;
    byId("token-form").reset();
    connection.start();
  },
};

const rowButtons = {
  async status(taskId) {
    const operation = await call("GET", `operation/status/${taskId}`);
    showOperation(operation);
    return operation;
  },
  cancel: (taskId) => call("POST", `operation/cancel/${taskId}`),
  async remove(taskId) {
    const answer = await call("DELETE", `operation/${taskId}`).catch((error) => {
      if (error.status !== 404) throw error;     // else the server forgot it by itself
    });
    operationRow(taskId).remove();
    return answer;
  },
};

for (const [name, handler] of Object.entries(methods)) {
  connection.on(name, (...args) => perform(() => handler(...args)));
}
document.addEventListener("submit", (event) => {
  event.preventDefault();
  perform(buttons[event.submitter.id]);
});
byId("operations").addEventListener("click", ({ target }) => {
  const act = target.matches("button") && rowButtons[target.className];
  if (act) perform(() => act(target.closest("li").dataset.taskId));
});
byId("clear").addEventListener("click", () => byId("log").replaceChildren());
byId("retry").addEventListener("click", () => connection.start());
connection.start();
</script>
</body>
</html>
"""


# --------------------------------------------------------------------- demo
#
# The sample application, as one would write it with this file next to it: a
# hub of three methods, routes that broadcast, operations that report, two jobs.
# Names and payloads are those of Kestrun's PowerShell sample "SignalR".

#: Where the demo application keeps its hub: `app[kestrun.HUB]`.
HUB: web.AppKey[HubContext] = web.AppKey("kestrun_hub", HubContext)

#: The levels of the sample, each with Python's number for it.
LEVELS = {
    "Trace": 5,
    "Verbose": 5,
    "Debug": logging.DEBUG,
    "Information": logging.INFO,
    "Warning": logging.WARNING,
    "Error": logging.ERROR,
    "Critical": logging.CRITICAL,
    "Fatal": logging.CRITICAL,
}

_LONGEST_NAME = 256
_LONGEST_OPERATION = 3600

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _stamp(moment: datetime) -> str:
    """Write a time as all payloads carry it: ISO 8601, UTC, ending in Z."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _level_name(text: str) -> str:
    """Spell the name of a level, given in any case. Raises ValueError."""
    for level in LEVELS:
        if level.lower() == text.lower():
            return level
    raise ValueError(f"The level must be one of {', '.join(LEVELS)}.")


async def broadcast_log(hub: HubContext, level: str, message: str) -> None:
    """Send `ReceiveLog` to everyone: {level, message, timestamp}.

    level: one of the eight names in LEVELS, in any case. Raises ValueError for
        another.
    """
    level = _level_name(level)
    entry = {"level": level, "message": message, "timestamp": _stamp(_now())}
    await hub.clients.all.send("ReceiveLog", entry)


async def broadcast_event(hub: HubContext, event_name: str, data: Any) -> None:
    """Send `ReceiveEvent` to everyone: {eventName, data, timestamp}.

    Raises TypeError or ValueError for data that cannot be written.
    """
    event = {"eventName": event_name, "data": data, "timestamp": _stamp(_now())}
    await hub.clients.all.send("ReceiveEvent", event)


async def broadcast_to_group(
    hub: HubContext, group_name: str, method: str, message: Any
) -> None:
    """Call `method(message)` on every member of a group.

    Raises TypeError or ValueError for a message that cannot be written.
    """
    await hub.clients.group(group_name).send(method, message)


def _check_name(text: str, what: str) -> str:
    """Let a name pass that can be shown and logged. Raises ValueError."""
    if not 0 < len(text) <= _LONGEST_NAME:
        raise ValueError(f"{what}: 1 to {_LONGEST_NAME} characters are needed.")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError(f"{what}: control characters are not allowed.")
    return text


class KestrunHub(Hub):
    """The hub of the sample."""

    async def join_group(self, group_name: str) -> None:
        await self.groups.add(self.context.connection_id, self._checked(group_name))
        await self.clients.caller.send("GroupJoined", group_name)

    async def leave_group(self, group_name: str) -> None:
        await self.groups.remove(self.context.connection_id, self._checked(group_name))
        await self.clients.caller.send("GroupLeft", group_name)

    async def echo(self, message: Any) -> None:
        await self.clients.caller.send("ReceiveEcho", message)

    @staticmethod
    def _checked(group_name: str) -> str:
        try:
            return _check_name(group_name, "groupName")
        except ValueError as error:
            raise HubException(str(error)) from None


def _status(operation: Operation) -> dict[str, Any]:
    """Describe an operation as the status and list routes do."""
    started, ended = operation.started_at, operation.completed_at
    return {
        "OperationId": operation.id,
        "TaskId": operation.id,
        "Name": operation.name,
        "State": operation.state,
        "StartedAt": started and _stamp(started),
        "CompletedAt": ended and _stamp(ended),
        "Progress": operation.progress,
        "Status": operation.status,
        "Message": f"{operation.name} is {operation.state} at {operation.progress} %.",
    }


def _memory_mb() -> float:
    """Measure what this process holds in memory, in MiB (0 where unknown)."""
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class Demo:
    """The sample's routes and jobs around one hub."""

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._started = time.monotonic()
        self._page: str
        self.hub: HubContext
        self.operations: Operations
        self.schedule = Schedule()
        self.schedule.every(30, name="heartbeat")(self._heartbeat)
        self.schedule.cron("0 * * * * *", name="admin_status")(self._admin_status)

    def mount(
        self, app: web.Application, hub_path: str, origins: Collection[str]
    ) -> None:
        """Put hub, routes, jobs and their ends into an application."""
        app.on_startup.append(self._open_operations)
        app.on_shutdown.append(self._end_operations)  # announced before the hub ends
        self.hub = app[HUB] = map_hub(
            app,
            hub_path,
            KestrunHub,
            allow_stateful_reconnects=True,
            allowed_origins=origins,
            authenticate=self._authenticate,
        )
        relative = html.escape(hub_path.lstrip("/"))
        self._page = PAGE.replace('content="hubs/kestrun"', f'content="{relative}"')
        app.cleanup_ctx.append(self.schedule.context)
        route = app.router
        route.add_get("/", self._show_page)
        route.add_get("/healthz", self._healthz)
        # HEAD must not fire anything, so it is not offered here.
        api = self._api
        route.add_get("/api/ps/log/{level}", api(self._log), allow_head=False)
        route.add_get("/api/ps/event", api(self._event), allow_head=False)
        route.add_post("/api/group/join/{groupName}", api(self._ask_to_join))
        route.add_post("/api/group/leave/{groupName}", api(self._ask_to_leave))
        route.add_post("/api/group/broadcast/{groupName}", api(self._broadcast))
        route.add_post("/api/operation/start", api(self._start_operation))
        route.add_get("/api/operation/status/{taskId}", api(self._operation_status))
        route.add_get("/api/operation/list", api(self._list_operations))
        route.add_post("/api/operation/cancel/{taskId}", api(self._cancel_operation))
        route.add_delete("/api/operation/{taskId}", api(self._remove_operation))

    # Who may come in

    async def _authenticate(self, request: web.Request) -> str | None:
        """Ask for the token, if there is one. Raises HTTPUnauthorized."""
        if self._token is not None:
            given = access_token(request) or ""
            pair = (
                text.encode(errors="surrogateescape") for text in (given, self._token)
            )
            if not hmac.compare_digest(*pair):
                raise web.HTTPUnauthorized(
                    text="The token is missing or wrong. Send it as 'Authorization: "
                    "Bearer TOKEN'.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None

    def _api(self, handler: Handler) -> Handler:
        """Guard a route with the token, and its names against control characters."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            await self._authenticate(request)
            try:
                unquote_to_bytes(request.rel_url.raw_path).decode()
                for name, value in request.match_info.items():
                    _check_name(value, name)
            except UnicodeDecodeError:
                text = "The path must be UTF-8, percent-encoded."
                raise web.HTTPBadRequest(text=text) from None
            except ValueError as error:
                raise web.HTTPBadRequest(text=str(error)) from None
            return await handler(request)

        return guarded

    # Page and health

    async def _show_page(self, request: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html")

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "Status": "Healthy",
                "Uptime": self._uptime(),
                "ConnectedClients": len(self.hub.connections),
                "Groups": len(self.hub.groups.names()),
                "Operations": len(self.operations.list()),
                "Hub": self.hub.stats(),
            }
        )

    def _uptime(self) -> float:
        return round(time.monotonic() - self._started, 1)

    # Logs and events

    async def _log(self, request: web.Request) -> web.Response:
        try:
            level = _level_name(request.match_info["level"])
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        now = datetime.now().strftime("%H:%M:%S")
        message = request.query.get("message")
        if not message:
            message = f"Test {level} message from Kestrun at {now}"
        log.log(LEVELS[level], "%s", message)
        await broadcast_log(self.hub, level, message)
        return web.Response(text=f"Broadcasted {level} log message")

    async def _event(self, request: web.Request) -> web.Response:
        data = {
            "Message": "Hello from Kestrun",
            "Timestamp": _stamp(_now()),
            "Random": random.randint(1, 100),
        }
        await broadcast_event(self.hub, "PowerShellEvent", data)
        return web.Response(text="Broadcasted custom event")

    # Groups

    async def _ask_to_join(self, request: web.Request) -> web.Response:
        return await self._ask(request, "GroupJoinRequest", "join")

    async def _ask_to_leave(self, request: web.Request) -> web.Response:
        return await self._ask(request, "GroupLeaveRequest", "leave")

    async def _ask(self, request: web.Request, event: str, verb: str) -> web.Response:
        name = request.match_info["groupName"]
        message = f"Please {verb} the group {name}"
        data = {"GroupName": name, "Message": message, "Timestamp": _stamp(_now())}
        await broadcast_event(self.hub, event, data)
        return self._done(f"Everyone was asked to {verb} {name}", GroupName=name)

    async def _broadcast(self, request: web.Request) -> web.Response:
        name = request.match_info["groupName"]
        message = {
            "Message": f"Hello to the members of {name}",
            "Timestamp": _stamp(_now()),
            "Sender": "Kestrun",
        }
        await broadcast_to_group(self.hub, name, "ReceiveGroupMessage", message)
        return self._done(f"Broadcasted to the group {name}", GroupName=name)

    @staticmethod
    def _done(message: str, **fields: Any) -> web.Response:
        return web.json_response({"Success": True, "Message": message, **fields})

    # Operations

    async def _start_operation(self, request: web.Request) -> web.Response:
        text = ",".join(request.query.getall("seconds", ["2"]))
        number = re.fullmatch("0*([0-9]{1,4})", text)
        seconds = 0 if number is None else int(number[1])
        if not 1 <= seconds <= _LONGEST_OPERATION:
            raise web.HTTPBadRequest(
                text=f"seconds must be an integer from 1 to {_LONGEST_OPERATION}."
            )

        async def work(progress: Progress) -> int:
            for step in range(1, seconds + 1):
                await asyncio.sleep(1)
                await progress(step * 100 / seconds, f"Step {step} of {seconds}")
            return seconds

        try:
            operation = self.operations.start(
                work,
                name="LongOperation",
                description=f"{seconds} steps of one second each",
            )
        except RuntimeError:
            raise web.HTTPServiceUnavailable(
                text="The server is shutting down; start it again later."
            ) from None
        log.info("operation %s of %d s started", operation.id, seconds)
        return self._done(f"Started an operation of {seconds} s", TaskId=operation.id)

    async def _announce(self, operation: Operation) -> None:
        """Tell everyone about a step or the end of an operation."""
        if operation.step and operation.state in (RUNNING, COMPLETED):
            await self._announce_as(
                "OperationProgress", operation, "Step", operation.step
            )
        if operation.state in (COMPLETED, FAULTED, CANCELED):
            log.info("operation %s: %s", operation.id, operation.state)
            await self._announce_as(
                "OperationComplete", operation, "State", operation.state
            )

    async def _announce_as(
        self, event: str, operation: Operation, key: str, value: Any
    ) -> None:
        data = {
            "TaskId": operation.id,
            key: value,
            "Progress": operation.progress,
            "Message": operation.status or operation.state,
            "Timestamp": _stamp(_now()),
        }
        await broadcast_event(self.hub, event, data)

    def _find(self, request: web.Request) -> Operation:
        operation = self.operations.get(request.match_info["taskId"])
        if operation is None:
            raise web.HTTPNotFound(
                text="There is no such operation. It may have been removed."
            )
        return operation

    async def _operation_status(self, request: web.Request) -> web.Response:
        return web.json_response(_status(self._find(request)))

    async def _list_operations(self, request: web.Request) -> web.Response:
        return web.json_response([_status(o) for o in self.operations.list()])

    async def _cancel_operation(self, request: web.Request) -> web.Response:
        operation = self._find(request)
        if not self.operations.cancel(operation.id):
            raise web.HTTPConflict(
                text=f"The operation is {operation.state} already: nothing to cancel."
            )
        await operation.wait()
        message = f"The operation is {operation.state}"
        return self._done(message, TaskId=operation.id)

    async def _remove_operation(self, request: web.Request) -> web.Response:
        operation = self._find(request)
        if not self.operations.remove(operation.id):
            raise web.HTTPConflict(text="The operation still runs. Cancel it first.")
        return self._done("The operation was removed", TaskId=operation.id)

    async def _open_operations(self, app: web.Application) -> None:
        self.operations = Operations(on_change=self._announce)

    async def _end_operations(self, app: web.Application) -> None:
        await self.operations.close()

    # Jobs

    async def _heartbeat(self) -> None:
        data = {
            "Type": "Heartbeat",
            "ServerTime": _stamp(_now()),
            "Uptime": self._uptime(),
            "ConnectedClients": len(self.hub.connections),
            "Message": "Server is running",
        }
        await broadcast_event(self.hub, "ServerHeartbeat", data)

    async def _admin_status(self) -> None:
        update = {
            "Type": "AdminUpdate",
            "SystemInfo": {
                "ProcessorCount": os.cpu_count(),
                "PythonVersion": platform.python_version(),
                "MemoryMB": _memory_mb(),
            },
            "Timestamp": _stamp(_now()),
            "Message": "Admin status update",
        }
        await broadcast_to_group(self.hub, "Admins", "ReceiveAdminUpdate", update)


def _guard(origins: Collection[str]) -> Any:
    """Make the middleware that checks origins and turns errors into JSON."""
    allowed = frozenset(origin.lower() for origin in origins)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check_origin(request, allowed)
            if _is_preflight(request):
                return web.Response(status=204)
            return await handler(request)
        except web.HTTPMethodNotAllowed as error:
            methods = " or ".join(sorted(error.allowed_methods))
            return _error_answer(error, f"Use {methods} for this path.")
        except web.HTTPException as error:
            if request.match_info.http_exception is error:
                return _error_answer(error, "There is nothing at this path: check it.")
            task_id = request.match_info.get("taskId")
            extra = {} if task_id is None else {"TaskId": task_id}
            return _error_answer(error, **extra)
        except Exception:
            log.exception("%s %s failed", request.method, request.rel_url.raw_path)
            return _error_answer(web.HTTPInternalServerError())

    return guard


def create_app(
    *,
    hub_path: str = "/hubs/kestrun",
    allowed_origins: Collection[str] = (),
    token: str | None = None,
) -> web.Application:
    """Build the demo application: hub, routes, jobs and page.

    hub_path: where the hub is.
    allowed_origins: further origins, such as "https://example.com", whose pages
        may use hub and API.
    token: what hub and API ask for, if anything; the page and /healthz do not.
    Raises ValueError for a path, origin or token that cannot be used.
    """
    if token is not None and not token.strip():
        raise ValueError("token: not empty; leave it out to ask for none")
    app = web.Application(middlewares=[_guard(allowed_origins)])
    Demo(token).mount(app, hub_path, allowed_origins)
    return app


# --------------------------------------------------------------------- main
#
# The command line around the demo. It alone sets up logging and signals, which
# in somebody else's program are not ours to touch.


class _OneLine(logging.Formatter):
    """One readable line an event, whatever a message holds; then a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _one_line(super().formatMessage(record))


class _AccessLog(AbstractAccessLogger):
    """Requests by path only: a query may hold tokens."""

    def log(
        self, request: web.BaseRequest, response: web.StreamResponse, time: float
    ) -> None:
        self.logger.info(
            "%s %s %s -> %d in %.0f ms",
            request.remote,
            request.method,
            request.rel_url.raw_path,
            response.status,
            time * 1000,
        )


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kestrun.py", description="A SignalR server with a page that shows it."
    )
    levels = {level.lower(): level for level in LEVELS}
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add(
        "--port",
        type=int,
        default=os.environ.get("PORT") or "5000",
        help="port, 0 for any free one (environment PORT, else 5000)",
    )
    add("--hub-path", default="/hubs/kestrun", help="path of the hub (%(default)s)")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="another origin whose pages may connect; may be repeated",
    )
    add(
        "--token",
        default=os.environ.get("KESTRUN_TOKEN"),
        help="ask hub and API clients for this token (environment KESTRUN_TOKEN)",
    )
    add(
        "--log-level",
        type=lambda text: levels.get(text.lower(), text),
        choices=list(LEVELS),
        default="Information",
        help="least important level to log (%(default)s)",
    )
    add("--uvloop", action="store_true", help="run on uvloop, if it is installed")
    add("--version", action="version", version=f"kestrun {__version__}")
    return parser.parse_args(argv)


def _shorten_bad_request(record: logging.LogRecord) -> bool:
    """Leave out of the log what a malformed request said: it may hold a token."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, aiohttp.http_exceptions.HttpProcessingError):
        record.msg, record.args = f"refused a malformed request: {error.code}", ()
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = None
    return True


def _set_up_logging(level: str) -> None:
    logging.addLevelName(LEVELS["Trace"], "TRACE")
    logging.getLogger("aiohttp.server").addFilter(_shorten_bad_request)
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    logging.basicConfig(level=LEVELS[level], handlers=[handler])


async def _serve(app: web.Application, arguments: argparse.Namespace) -> None:
    """Listen until SIGINT or SIGTERM, then end in good order."""
    runner = web.AppRunner(
        app,
        access_log_class=_AccessLog,
        access_log=logging.getLogger("kestrun.access"),
        handler_cancellation=True,
        shutdown_timeout=1.0,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop.set)
    await runner.setup()
    try:
        await web.TCPSite(runner, arguments.host, arguments.port, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"page  {address}/", flush=True)
        print(f"hub   {address}{arguments.hub_path}", flush=True)
        gc.collect()
        gc.freeze()  # what lives as long as the program need not be looked at again
        await stop.wait()
        log.info("shutting down")
        await app.shutdown()  # while it still listens: a poll may come for its Close
    finally:
        await runner.cleanup()


def _loop_factory(wants_uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Choose the event loop. Raises ValueError if uvloop is asked for and missing."""
    if not wants_uvloop:
        return None
    try:
        import uvloop  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError("--uvloop needs a package: pip install uvloop") from None
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new_event_loop


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line; return its exit status."""
    arguments = _parse_arguments(argv)
    _set_up_logging(arguments.log_level)
    try:
        app = create_app(
            hub_path=arguments.hub_path,
            allowed_origins=arguments.allow_origin,
            token=arguments.token,
        )
        with asyncio.Runner(loop_factory=_loop_factory(arguments.uvloop)) as runner:
            runner.run(_serve(app, arguments))
    except (OSError, ValueError, OverflowError) as error:
        print(f"kestrun cannot start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # where signals cannot be handled
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
