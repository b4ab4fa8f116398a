"""What stands around the proxy and the servers: the recording relay between the two, and the recorder behind servers that only pass on."""
import asyncio
import contextlib
import hashlib
import itertools
import json

import reading


def entry(method, target, body):
    """A request as a server saw it, for comparison. A `body` of None was not read by the application."""
    return [method.decode("latin-1"), target.decode("latin-1"), None if body is None else len(body), None if body is None else hashlib.sha256(body).hexdigest()[:16]]


def echo(seen):
    """The same in a field of the response, so that the downstream can tell whose response it got."""
    return "/".join([seen[0], "-" if seen[2] is None else str(seen[2]), seen[3] or "-"])


class Connection:
    """One connection of the proxy: the bytes of both directions, and when they came."""

    def __init__(self, peer):
        self.peer = peer
        self.sent = bytearray()
        self.replies = bytearray()
        self.marks = []

    def arrived(self, offset):
        """The relay's count of reads at the one that brought the byte at `offset`."""
        return max((turn for start, turn in self.marks if start <= offset), default=0)


class Relay:
    """Passes bytes on unchanged and keeps them. The server knows each connection by an address of its own out of 127.0.0.0/8.

    `tamper` changes what goes on after it was kept: for the proof that a disagreement of a server is found.
    """

    def __init__(self, server, tamper=None):
        self.server = server
        self.tamper = tamper or (lambda data: data)
        self.connections = []
        self.turns = itertools.count(1)
        self.tasks = set()

    async def finished(self):
        """Waits for the end of all connections, for a time."""
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=5)

    async def start(self):
        listener = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        return listener.sockets[0].getsockname()

    async def accept(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        number = len(self.connections)
        connection = Connection(f"127.{64 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}")
        self.connections.append(connection)
        try:
            server_reader, server_writer = await asyncio.open_connection(*self.server, local_addr=(connection.peer, 0))
        except OSError:
            writer.transport.abort()
            return
        async def up():
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    connection.marks.append((len(connection.sent), next(self.turns)))
                    connection.sent += data
                    server_writer.write(self.tamper(data))
                    await server_writer.drain()
                server_writer.write_eof()
        async def down():
            with contextlib.suppress(ConnectionError):
                while data := await server_reader.read(65536):
                    connection.replies += data
                    writer.write(data)
                    await writer.drain()
        upward = asyncio.create_task(up())
        await down()
        writer.close()
        # A server that closed wants nothing more.
        upward.cancel()
        server_writer.close()
        with contextlib.suppress(asyncio.CancelledError):
            await upward


class Recorder:
    """A strict origin: records every complete request and answers with what it saw. What is malformed it answers with 400 and closes."""

    def __init__(self):
        self.entries = []

    async def start(self):
        listener = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        return listener.sockets[0].getsockname()

    async def accept(self, reader, writer):
        data, answered = b"", False
        # Cancelled when everything ends.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while True:
                try:
                    request = reading.read_one(data)
                except reading.Fault:
                    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    break
                except reading.Unfinished:
                    request = None
                if request and not answered and (request.complete or b"/early/" in request.target):
                    answered = True
                    seen = entry(request.method, request.target, request.body if request.complete else None)
                    self.answer(writer, request.method, seen)
                if request and request.complete:
                    self.record(request)
                    data, answered = data[request.end:], False
                    continue
                more = await reader.read(65536)
                if not more:
                    break
                data += more
        writer.close()

    def record(self, request):
        peer = (request.values(b"x-peer") or [b"?"])[0].decode()
        self.entries.append([peer, *entry(request.method, request.target, request.body)])

    def answer(self, writer, method, seen):
        body = b"" if method == b"HEAD" else b"seen"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Echo: %s\r\n\r\n" % echo(seen).encode() + body)


def read_entries(path):
    """The entries of a server that writes them itself, one JSON list a line: peer, method, target, length, hash."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
