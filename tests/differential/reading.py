"""A reader of HTTP/1.1 requests after RFC 9112, written for this check: it shares no code with the proxy or with any server.

It reads in two ways. `STRICT` is what must leave the proxy: the one form of a request that no reader can take for something else. `TOLERANT` is what a
downstream's bytes mean where the proxy may accept them: the strict form and the deviations that RFC 9112 allows a recipient, each of them named below.
"""
import re
from dataclasses import dataclass, field

STRICT, TOLERANT = "strict", "tolerant"

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# The target is not looked into: bytes outside ASCII are no URI (RFC 3986), but they can't end a request line either.
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])" % TOKEN)
FIELD_LINE = re.compile(rb"(%s):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*" % TOKEN)
ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")
# Tolerated: whitespace behind the size ("bad" whitespace before an extension, RFC 9112 section 7.1.1), and any extension that stays on its line.
CHUNK_LINE = re.compile(rb"(0*[0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?")


class Fault(Exception):
    """Bytes that are no request in this way of reading."""


class Unfinished(Exception):
    """The bytes end before the request does."""


@dataclass
class Request:
    """One request; `complete` where the end that its framing promised was there."""

    start: int
    method: bytes = b""
    target: bytes = b""
    fields: list = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    last: bool = False
    end: int = 0

    def values(self, name):
        return [value for other, value in self.fields if other == name]


def read_all(data, way):
    """All requests in `data`, the last of which may be incomplete, and what is wrong with the bytes behind them, if anything."""
    requests, position = [], 0
    while True:
        if way == TOLERANT:
            # RFC 9112 section 2.2: empty lines before a request are ignored.
            position += len(re.match(rb"(?:\r?\n)*", data[position:])[0])
        if position == len(data):
            return requests, None
        request = Request(position)
        try:
            read_head(request, data, way)
            requests.append(request)
            read_body(request, data, way)
        except Unfinished:
            return requests, None
        except Fault as fault:
            return requests, str(fault)
        position = request.end
        if request.last:
            return requests, None


def read_one(data):
    """The strict request at the beginning of `data`; its body is complete or not. Raises `Unfinished` before its head is, `Fault` where it is none."""
    request = Request(0)
    read_head(request, data, STRICT)
    try:
        read_body(request, data, STRICT)
    except Unfinished:
        pass
    return request


def read_line(data, position, way):
    """The line at `position` and where the next one begins."""
    end = data.find(b"\n", position)
    if end < 0:
        raise Unfinished
    line = data[position:end]
    if line.endswith(b"\r"):
        line = line[:-1]
    elif way == STRICT:
        raise Fault("a line ends with a bare LF")
    if b"\r" in line:
        raise Fault("a bare CR")
    return line, end + 1


def read_head(request, data, way):
    line, position = read_line(data, request.start, way)
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Fault(f"no request line: {line!r}")
    request.method, request.target, minor = match.groups()
    while True:
        line, position = read_line(data, position, way)
        if not line:
            break
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise Fault(f"no field line: {line!r}")
        request.fields.append((match[1].lower(), match[2]))
    request.end = position
    if way == TOLERANT:
        # Only path and query leave (RFC 9112 section 3.2.1); a fragment is no part of a target.
        target = ABSOLUTE.sub(b"", request.target, count=1).split(b"#")[0]
        request.target = target if target.startswith((b"/", b"*")) else b"/" + target
        close = any(b"close" in value.lower() for value in request.values(b"connection"))
        request.last = close or (minor == b"0" and not request.values(b"connection"))
    elif minor == b"0":
        raise Fault("HTTP/1.0 leaves")
    request.minor = minor


def read_body(request, data, way):
    lengths, codings = request.values(b"content-length"), request.values(b"transfer-encoding")
    if codings:
        if [coding.lower() for coding in codings] != [b"chunked"] or request.minor == b"0":
            raise Fault(f"transfer codings {codings}")
        if lengths and way == STRICT:
            raise Fault("a length beside chunks")
        # RFC 9112 section 6.3: the chunks count, and nothing may follow on the connection.
        request.last = request.last or bool(lengths)
        read_chunks(request, data, way)
    elif lengths:
        # RFC 9110 section 8.6: one length said twice may be taken for one.
        if len(set(lengths)) > 1 or (way == STRICT and len(lengths) > 1) or not re.fullmatch(rb"0*[0-9]{1,19}", lengths[0]):
            raise Fault(f"lengths {lengths}")
        end = request.end + int(lengths[0])
        request.body = data[request.end:end]
        request.end = end
        if len(data) < end:
            raise Unfinished
    request.complete = True


def read_chunks(request, data, way):
    position = request.end
    while True:
        # In chunks a bare LF never ends a line: readers that disagree on it are what such attacks live on.
        line, position = read_line(data, position, STRICT)
        match = CHUNK_LINE.fullmatch(line) if way == TOLERANT else CHUNK_SIZE.fullmatch(line)
        if not match:
            raise Fault(f"no chunk size: {line!r}")
        size = int(match[1] if way == TOLERANT else match[0], 16)
        if size == 0:
            break
        request.body += data[position:position + size]
        position += size
        if len(data) < position + 2:
            if data[position:] not in (b"", b"\r"):
                raise Fault("no line end behind a chunk")
            raise Unfinished
        if data[position:position + 2] != b"\r\n":
            raise Fault("no line end behind a chunk")
        position += 2
    while True:
        # Trailers are fields, whose lines may end with a bare LF (RFC 9112 section 2.2). Readers disagree there, so that nothing may follow.
        begin = position
        line, position = read_line(data, position, way)
        request.last = request.last or data[begin:position] != b"\r\n"
        if not line:
            break
        if way == STRICT:
            raise Fault("a trailer leaves")
        if not FIELD_LINE.fullmatch(line):
            raise Fault(f"no trailer: {line!r}")
    request.end = position


def read_responses(data, methods):
    """The final responses in `data` to requests with these methods: status, fields and body of each, as far as they came."""
    responses, position = [], 0
    while position < len(data):
        end = data.find(b"\r\n\r\n", position)
        if end < 0:
            break
        head = data[position:end].split(b"\r\n")
        position = end + 4
        status = int(head[0].split(b" ")[1])
        if status < 200:
            continue
        fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in head[1:])]
        named = dict(fields)
        body = b""
        method = methods[len(responses)] if len(responses) < len(methods) else b""
        if method == b"HEAD" or status in (204, 304):
            pass
        elif named.get(b"transfer-encoding") == b"chunked":
            while True:
                line_end = data.find(b"\r\n", position)
                if line_end < 0:
                    position = len(data)
                    break
                size = int(data[position:line_end].split(b";")[0], 16)
                body += data[line_end + 2:line_end + 2 + size]
                position = line_end + 2 + size + 2
                if size == 0:
                    break
        elif b"content-length" in named:
            length = int(named[b"content-length"])
            body = data[position:position + length]
            position += length
        else:
            body = data[position:]
            position = len(data)
        responses.append((status, fields, body))
    return responses
