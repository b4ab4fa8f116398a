"""The cases: what a downstream sends, in parts with pauses between them.

Built from blocks, so that each oddity of one block meets those of the others, and then mutated byte by byte with a fixed seed. The classes are those of
published research: James Kettle's and others' on desynchronization (CL.TE, TE.CL, TE.TE, CL.0, 0.CL, TE.0, pauses, Expect), Jeppe Bonde Weikop's on
chunk extensions (TERM.EXT, EXT.TERM, TERM.SPILL, SPILL.TERM), HTTP Garden's on everything else.

`ID` stands for the case's number in every target, so that a request is known for its case's wherever it turns up.
"""
import itertools
import random
import re
from dataclasses import dataclass

ID = b"@@@@@@"
HOST = b"Host: localhost\r\n"
# What must never become a request, except where it is one: the readings of both sides decide that.
CANARY = b"GET /smuggled/" + ID + b" HTTP/1.1\r\n" + HOST + b"\r\n"
LAST = b"0\r\n\r\n"
PAUSE = 0.15


@dataclass(frozen=True)
class Case:
    number: int
    group: str
    parts: tuple
    # Nothing is wrong with it: it must leave, all of it.
    plain: bool

    @property
    def id(self):
        return b"c%05d" % self.number

    @property
    def bytes(self):
        return b"".join(part for part in self.parts if isinstance(part, bytes))


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def request(fields, body=b"", method=b"POST", target=b"/" + ID, version=b"HTTP/1.1", host=HOST):
    """`fields` with their line ends."""
    return method + b" " + target + b" " + version + b"\r\n" + host + fields + b"\r\n" + body


def lengths(body):
    """Ways to say a length, right and wrong."""
    right = b"%d" % len(body)
    off = b"%d" % (len(body) + 7)
    yield b""
    for value in [
        right, b"0", b"4", off, b"00" + right, b"+" + right, b"-" + right, b"-0", b"0x%x" % len(body), right + b"_0", right + b" " + right,
        right + b"," + right, right + b", 0", right + b".0", right + b";", b"", b" ", b"\x0b" + right, right + b"\x0c", b"9" * 25,
        b"18446744073709551616", b'"' + right + b'"', b"zero", right + b"\r\nContent-Length: " + right, right + b"\r\nContent-Length: 0",
        b"0\r\nContent-Length: " + right, right + b"\r\nContent_Length: 0", b"\r\n " + right,
    ]:
        yield b"Content-Length: " + value + b"\r\n"
    for name in [
        b"Content-Length ", b" Content-Length", b"Content-Length\t", b"\tContent-Length", b"Content_Length", b"Content-Length\0",
        b"Content-Length\xa0", b"Content\rLength", b"X: x\rContent-Length", b"X: x\nContent-Length", b"Content-Length\n", b"\rContent-Length",
        b"\nContent-Length", b"content-lengtH",
    ]:
        yield name + b": " + right + b"\r\n"
    yield b"Connection: content-length\r\nContent-Length: " + right + b"\r\n"


def codings():
    """Ways to say chunked, and ways to seem to."""
    yield b""
    for value in [
        b"chunked", b"Chunked", b"CHUNKED", b"chunked ", b"\tchunked", b"chunked\t", b"xchunked", b"chunkedx", b"chunk", b"identity",
        b"chunked, identity", b"identity, chunked", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"chunked chunked", b",chunked",
        b"chunked,", b", ,chunked", b"", b"cow", b'"chunked"', b"'chunked'", b"chunked;q=1", b"chunked; x=y", b"\x0bchunked", b"\x0cchunked",
        b"\xa0chunked", b"chunked\xa0", b"chunked\0", b"\0chunked", "chun\u212aed".encode(), b"\xffchunked", b"ch\x96nked", b"trailers",
        b"\r\n chunked", b"\n chunked", b"\r\n\tchunked", b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: identity",
        b"identity\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-encoding: cow", b"chunked\r\n x", b"chunked\rX: x", b"chunked\nX: x",
        b"gzip\r\nTransfer-Encoding: chunked",
    ]:
        yield b"Transfer-Encoding: " + value + b"\r\n"
    for name in [
        b"Transfer-Encoding ", b" Transfer-Encoding", b"Transfer-Encoding\t", b"\tTransfer-Encoding", b"Transfer_Encoding", b"Transfer-Encoding\0",
        b"Transfer-Encoding\n", b"Transfer-Encoding\r\n", b"X: x\nTransfer-Encoding", b"X: x\rTransfer-Encoding", b"\rTransfer-Encoding",
        b"\nTransfer-Encoding", b"X: x\r\n\rTransfer-Encoding", b"Transfer\rEncoding", b"Transfer-\r\n Encoding", b"transfer-encodinG",
        b"Transfer.Encoding", b"Content-Encoding", b"TE", b"Transfer-Encoding\x85", b"\xefTransfer-Encoding",
    ]:
        yield name + b": chunked\r\n"
    yield b"Transfer-Encoding:chunked\r\n"
    yield b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n"
    yield b"Transfer-Encoding chunked\r\n"


BODIES = [LAST + CANARY, chunk(CANARY) + LAST, CANARY, chunk(b"hello") + LAST, b""]


def framing():
    """Every length beside every coding; the bodies take turns."""
    bodies = itertools.cycle(BODIES)
    for first in (True, False):
        for coding in codings():
            for index in range(len(list(lengths(b"")))):
                body = next(bodies)
                length = list(lengths(body))[index]
                # The order matters only to two fields that a careless reader would both take: a quarter of them is enough.
                if first or (length and coding and index % 4 == 1):
                    yield request(length + coding if first else coding + length, body)


def thinned(cases, keep):
    """Every so many-th of many: evenly, and always the same."""
    cases = list(cases)
    return [cases[index * len(cases) // keep] for index in range(min(keep, len(cases)))]


def chunks():
    """Broken and odd chunks, with what a reader that takes them for whole would find behind."""
    size = b"%x" % len(CANARY)
    for line in [
        b"5", b"05", b"0000000000000005", b"00000000000000005", b"0x5", b"0X5", b"+5", b"-5", b"5g", b"g5", b" 5", b"\t5", b"5 ", b"5\t", b"5 5",
        b"5_", b"0_5", b"5.", b"5,", b"5;", b"5;a", b"5;a=b", b"5 ;a=b", b"5;a=\"b\"", b"5;a=\"\r\n\"", b"5;a=\"b;c\"", b"5;\0", b"5;\xff", b"5;;",
        b"5;=", b"5; a = b", b"", b";a", b"5\0", b"\0005", b"5\xa0", b"\xa05", b"ffffffffffffffff", b"10000000000000005",
        b"fffffffffffffffffffffffffffff", b"-1", b"5\x0b", b"5\x0c", b"5h", b"5\xb2", b"\xef\xbc\x95", b"5\r", b"5;" + b"e" * 200,
        b"5;" + b"e" * 20000,
    ]:
        for end in [b"\r\n", b"\n"]:
            yield line + end + b"hello\r\n" + LAST + CANARY
    for end in [b"\r", b"\r\r", b"\r\r\n", b"\n\n", b"\n\r", b"\r\n\r\n", b"\r\0\n", b" \r\n", b"\x0b\n", b"", b"XX", b"\r\n ", b"\rX", b"X\n"]:
        yield b"5" + end + b"hello\r\n" + LAST + CANARY
        yield b"5\r\nhello" + end + LAST + CANARY
        yield b"5\r\nhello\r\n0" + end + b"\r\n" + CANARY
        yield b"5\r\nhello\r\n0\r\n" + end + CANARY
    # TERM.EXT: one reader ends the line at a bare LF, the other reads an extension on. EXT.TERM: the other way round.
    for bare in [b"\n", b"\r", b"\r\r", b"\n\n", b"\0\n", b"\x0b"]:
        yield b"0;" + bare + b"xx\r\n\r\n" + CANARY
        yield b"2;" + bare + b"xx\r\n" + size + b"\r\n" + LAST + CANARY
        yield b"1;" + bare + b"x\r\n" + size + b"\r\n" + CANARY + b"\r\n" + LAST
        yield b"5;a=\"" + bare + b"\"\r\nhello\r\n" + LAST + CANARY
    # TERM.SPILL and SPILL.TERM: two bytes behind the data that are no line end, skipped by one reader and read by the other.
    for spill in [b"XX", b"\n", b"\r", b"0\r", b"5\r", b"\n0", b"\r0", b"", b"X\r\n", b"\r\nX"]:
        yield b"5\r\nhello" + spill + b"\r\n" + LAST + CANARY
        yield b"5\r\nhello" + spill + chunk(CANARY) + LAST
        yield b"5\r\nhello" + spill + size + b"\r\n" + CANARY + b"\r\n" + LAST
    for trailers in [
        b"X: y\r\n", b"X: y\n", b"X : y\r\n", b" X: y\r\n", b"X\r\n", b": y\r\n", b"X: y\r\n z\r\n", b"X:\0\r\n", b"X: y\rZ: z\r\n",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: evil.example\r\n", b"X: y\r\n" * 200, b"X: " + b"y" * 40000 + b"\r\n",
        b"X: y\n\r\n", b"\n", b"X: y\n\n", b"GET /smuggled/" + ID + b" HTTP/1.1\r\n" + HOST,
    ]:
        yield b"0\r\n" + trailers + b"\r\n"
        yield b"5\r\nhello\r\n0\r\n" + trailers + b"\r\n" + CANARY
        # A reader for whom the trailers go on to the next empty line finds the canary behind them, any other finds it in a body.
        yield b"5\r\nhello\r\n0\r\n" + trailers + b"\r\n" + request(b"Content-Length: %d\r\n" % len(CANARY), CANARY)


METHODS = [
    b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"PROPFIND", b"get", b"GeT", b"M-SEARCH", b"QUERY", b"X", b"!#$%&'*+.^_`|~", b"PRI",
    b"CONNECT", b"TRACE", b"G ET", b"GET\0", b"(GET)", b"\xc3\x89", b"G\tET", b"", b" GET", b"\tGET", b"GET/", b"\x00", b"POST\x0b", b"HTTP/1.1",
    b"A" * 300,
]
TARGETS = [
    b"/" + ID + b"?q=1", b"/" + ID + b"?", b"/" + ID + b"//", b"//" + ID, b"/./" + ID, b"/" + ID + b"/../x", b"/" + ID + b"%2f..%2F",
    b"/" + ID + b"%0d%0aX:%20y", b"/" + ID + b"%00", b"/" + ID + b"#frag", b"/" + ID + b"?a#b", b"/" + ID + b"\\", b"/" + ID + b"\\..\\x",
    b"/" + ID + b";x=y", b"/" + ID + b"\xc3\xa9", b"/" + ID + b"\xff", b"/" + ID + b"\x80", b"/" + ID + b"|<>^`{}\"", b"/" + ID + b"\0",
    b"/" + ID + b"\t", b"/" + ID + b"\x0b", b"/" + ID + b"\r", b"/" + ID + b"\nX", b"/" + ID + b" x", b"/" + ID + b" HTTP/1.1 ", b"  /" + ID,
    b"\t/" + ID, b"/" + ID + b"%", b"/" + ID + b"%zz", b"/" + ID + b"%u002f", b"/" + ID + b"\x7f", ID, b"*", b"*/" + ID, b"?" + ID,
    b"localhost:443/" + ID, b"http://localhost/" + ID, b"HTTP://LOCALHOST/" + ID, b"http://localhost?" + ID, b"http:///" + ID, b"http:/" + ID,
    b"http://user@localhost/" + ID, b"http://localhost:/" + ID, b"http://evil.example/" + ID, b"https://localhost/" + ID, b"ftp://localhost/" + ID,
    b"http://localhost/" + ID + b" http://localhost/", b"//evil.example/" + ID, b"/" + ID + b"/" + b"a" * 7000, b"/" + ID + b"/" + b"a" * 30000,
]
VERSIONS = [
    b"HTTP/1.0", b"HTTP/1.2", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1", b"HTTP/1.", b"HTTP/1.1.1", b"HTTP/01.1", b"HTTP/1.01", b"HTTP/1.10", b"HTTP/1.32",
    b"HTTP/11", b"http/1.1", b"HTP/1.1", b"HTTP /1.1", b"HTTP/ 1.1", b"HTTP/1.1 ", b"HTTP/1.1\t", b"HTTP/1.1\0", b"HTTP/1.1x", b"HTTP/\r\r1.1",
    b"HTTP/1,1", b"HTTPS/1.1", b"ICY", b"", b"HTTP/4294967295.255", b"HTTP/\xef\xbc\x91.1", b"RTSP/1.0",
]
FIELDS = [
    b"X: y\r\n", b"X:y\r\n", b"X:  y  \r\n", b"X:\ty\t\r\n", b"X:\r\n", b"X: \r\n", b"X\r\n", b"X y\r\n", b":\r\n", b": y\r\n", b":y\r\n",
    b" : y\r\n", b"X : y\r\n", b"X\t: y\r\n", b"X\x0b: y\r\n", b" X: y\r\n", b"\tX: y\r\n", b"X: y\r\n z\r\n", b"X: y\r\n\tz\r\n", b"X:\r\n y\r\n",
    b"X: y\r\n \r\n", b"X: a\0b\r\n", b"X: a\rb\r\n", b"X: a\r\r\n", b"X: a\nb\r\n", b"X: a\nY: b\r\n", b"X: a\n\r\n", b"X: a\x0bb\r\n",
    b"X: a\x0cb\r\n", b"X: a\x7fb\r\n", b"X: a\x1bb\r\n", b"X: caf\xc3\xa9\r\n", b"X: \x80\xff\r\n", b"X\0: y\r\n", b"X\x80: y\r\n", b"X\xff: y\r\n",
    b"\xefX: y\r\n", b"X(: y\r\n", b"X[: y\r\n", b"X{: y\r\n", b"X\": y\r\n", b"X/: y\r\n", b"X@: y\r\n", b"X=: y\r\n", b"X,: y\r\n", b"X;: y\r\n",
    b"X<: y\r\n", b"X?: y\r\n", b"X\\: y\r\n", b"X\n: y\r\n", b"X\r: y\r\n", b"!#$%&'*+-.^_`|~: y\r\n", b"X: y\n", b"X: y\r", b"X: y\n\n", b"\r\n",
    b"\n", b"\r", b"\r\r\n", b"X: y\r\n\r", b"X: y\r\n\n", b"\0\r\n", b"X: y\r\nHost: localhost\r\n", b"Host : localhost\r\n",
    b"Host: evil.example\r\n", b"Connection: host\r\n", b"Connection: close\r\n", b"Connection: keep-alive, close\r\n", b"Connection: X\r\nX: y\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n", b"Upgrade: h2c\r\n", b"Via: 1.1 x\r\n",
    b"Trailer: x\r\n", b"TE: trailers\r\n", b"Keep-Alive: timeout=5\r\n", b"Proxy-Connection: close\r\n", b"X-HTTP-Method-Override: GET\r\n",
    b"Max-Forwards: 0\r\n", b"Content-Type: multipart/byteranges\r\n", b"Content-Encoding: gzip\r\n", b"Range: bytes=0-0\r\n", b"X: y\r\n" * 90,
    b"X: y\r\n" * 150, b"X: " + b"y" * 6000 + b"\r\n", b"X: " + b"y" * 70000 + b"\r\n", b"X" * 5000 + b": y\r\n",
    b"X-A: y;\r\n\tContent-Length: 5\r\n",
]
HOSTS = [
    b"", b"Host:localhost\r\n", b"Host: LOCALHOST\r\n", b"Host: localhost:80\r\n", b"Host: localhost:\r\n", b"Host: localhost, localhost\r\n",
    b"Host: localhost localhost\r\n", b"Host: a@localhost\r\n", b"Host: localhost/x\r\n", b"Host: \r\n", b"Host: 127.0.0.1\r\n", b"Host: [::1]\r\n",
    b"Host: localhost\0\r\n", b"Host: localhost\r\nHost: localhost\r\n", b"Host: localhost\r\nHost: evil.example\r\n", b"Host : localhost\r\n",
    b" Host: localhost\r\n", b"Host: localhost\r\n evil.example\r\n", b"Host: localhost\rX: y\r\n", b"Host: localhost\t\r\n", b"Host: localhost#\r\n",
    b"Host: localhost?\r\n", b"Ho\0st: localhost\r\n",
]


def heads():
    """Oddities of the request line and of fields, with a body and behind it a second request, so that a head that ends elsewhere shows."""
    length = b"Content-Length: %d\r\n" % len(CANARY)
    chunked = b"Transfer-Encoding: chunked\r\n"
    for method in METHODS:
        yield request(length, CANARY, method=method)
        yield request(b"", CANARY, method=method)
        yield request(chunked, chunk(CANARY) + LAST, method=method)
    for target in TARGETS:
        yield request(b"", CANARY, method=b"GET", target=target)
        yield request(length, CANARY, target=target)
    for version in VERSIONS:
        yield request(length, CANARY, version=version)
        yield request(chunked, chunk(CANARY) + LAST, version=version)
        yield request(b"", CANARY, method=b"GET", version=version)
    for field in FIELDS:
        yield request(field, CANARY, method=b"GET")
        yield request(field + length, CANARY)
        yield request(length + field, CANARY)
        yield request(chunked + field, chunk(CANARY) + LAST)
        yield request(length, CANARY, host=field + HOST)
    for host in HOSTS:
        yield request(length, CANARY, host=host)
    for payload in [
        b"\r\n" + request(length, CANARY), b"\n" + request(length, CANARY), b"\r" + request(length, CANARY), b"\r\n\r\n\n" + request(b"", CANARY),
        b"\0" + request(b"", CANARY), b" " + request(b"", CANARY), b"\x16\x03\x01\x02\x00" + request(b"", CANARY),
        request(length, CANARY).replace(b"\r\n", b"\n"), request(length, CANARY).replace(b"\r\n", b"\r"),
        request(length, CANARY).replace(b"\r\n", b"\n\r"), request(b"", CANARY).replace(b"\r\n\r\n", b"\r\n\r", 1),
        request(b"", CANARY).replace(b"\r\n\r\n", b"\n\n", 1), request(b"", CANARY).replace(b"\r\n\r\n", b"\r\n\n", 1),
        request(b"", CANARY).replace(b"\r\n\r\n", b"\n\r\n", 1), request(b"", CANARY).replace(b"\r\n\r\n", b"\r\r", 1),
        b"GET /" + ID + b"\r\n" + CANARY, b"GET /" + ID + b"\r\n\r\n" + CANARY, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0" + CANARY,
    ]:
        yield payload


def exchanges():
    """What takes its form from several requests, or from time: pipelines, pauses, expectations, replies that come early."""
    get, post = request(b"", method=b"GET"), request(b"Content-Length: 5\r\n", b"hello")
    chunked = request(b"Transfer-Encoding: chunked\r\n", chunk(b"hello") + LAST)
    for pipeline in itertools.product([get, post, chunked, CANARY], repeat=3):
        yield b"".join(pipeline)
    for tail in [
        b"X", b"\0", b"GET", b"\r\n\r\n", b"GET /smuggled/" + ID, LAST, chunk(CANARY), b"\n" + CANARY, b" " + CANARY, b"X" + CANARY,
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ]:
        for whole in [get, post, chunked]:
            yield whole + tail
    bodies = [
        (b"Content-Length: %d\r\n" % len(CANARY), CANARY), (b"Transfer-Encoding: chunked\r\n", chunk(CANARY) + LAST),
        (b"Content-Length: 5\r\n", CANARY), (b"Transfer-Encoding: chunked\r\n", LAST + CANARY), (b"", CANARY),
        (b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (len(LAST) + len(CANARY)), LAST + CANARY), (b"Content-Length: 0\r\n", CANARY),
        (b"Content-Length: 900\r\n", CANARY), (b"Transfer-Encoding: chunked\r\n", b"900\r\n" + CANARY),
    ]
    expectations = [
        b"", b"Expect: 100-continue\r\n", b"Expect: 100-Continue\r\n", b"Expect: y 100-continue\r\n", b"Expect: banana\r\n",
        b"Expect:\r\n 100-continue\r\n", b"Expect : 100-continue\r\n", b"Expect: 100-continue, x\r\n", b"Expect:\r\n",
        b"Expect: 100-continue\r\nExpect: 100-continue\r\n", b"X: y\nExpect: 100-continue\r\n",
    ]
    for method, (framing, body), expect in itertools.product([b"POST", b"GET", b"HEAD"], bodies, expectations):
        if method == b"POST" or expect in expectations[:2]:
            yield request(expect + framing, body, method=method)
    # Early: the server answers before it has read the body, if it can.
    for (framing, body), expect, target in itertools.product(bodies, expectations[:2], [b"/" + ID, b"/early/" + ID]):
        head = request(expect + framing, target=target)
        yield (head, PAUSE, body)
        yield (head + body[:7], PAUSE, body[7:])
        yield (head[:-2], PAUSE, head[-2:] + body)
        yield (head[:-3], PAUSE, head[-3:] + body[:1], PAUSE, body[1:])
        yield (head, PAUSE, body, PAUSE, CANARY)
    for early in [b"/early/" + ID]:
        for (framing, body), method in itertools.product(bodies, [b"POST", b"GET", b"OPTIONS"]):
            yield request(framing, body, method=method, target=early)


BYTES = [
    b"\r", b"\n", b"\r\n", b"\0", b":", b"\t", b" ", b",", b";", b"0", b"1", b"f", b"\x0b", b"\x80", b"\xff", b"_", b"-", b"+", b"\"", b"\r\n\r\n",
    b"\r\n ", b"X",
]


def mutations(count, seed):
    """Cases with one to three bytes inserted, removed, replaced, doubled or moved; the number of the case is left alone."""
    chance = random.Random(seed)
    length = b"Content-Length: %d\r\n" % len(CANARY)
    seeds = [
        request(length, CANARY), request(b"Transfer-Encoding: chunked\r\n", chunk(b"hello") + chunk(CANARY) + LAST),
        request(b"Transfer-Encoding: chunked\r\n", b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n" + CANARY),
        request(b"Content-Length: 5\r\n", b"hello") + CANARY,
        request(b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % len(LAST + CANARY), LAST + CANARY),
        request(b"X: y\r\n", CANARY, method=b"GET"), request(b"Expect: 100-continue\r\n" + length, CANARY),
        request(b"Connection: keep-alive\r\n" + length, CANARY, target=b"http://localhost/" + ID), request(length, CANARY, version=b"HTTP/1.0"),
        request(b"Transfer-Encoding: chunked\r\n", chunk(b"hello") + LAST) + request(b"Content-Length: 5\r\n", b"hello") + CANARY,
    ]
    for index in range(count):
        payload = seeds[index % len(seeds)]
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            taken = {place for match in re.finditer(ID, payload) for place in range(match.start() + 1, match.end())}
            places = [place for place in range(len(payload)) if place not in taken and payload[place:place + 1] != ID[:1]]
            # Most places of a body are of no interest; those at a boundary are.
            edges = [place for place in places if payload[place] in b"\r\n:;, /" or payload[place - 1] in b"\r\n:;, /"]
            place = chance.choice(edges if chance.random() < 0.7 else places)
            what = chance.randrange(5)
            if what == 0:
                payload = payload[:place] + payload[place + 1:]
            elif what == 1:
                payload = payload[:place] + chance.choice(BYTES) + payload[place + 1:]
            elif what == 2:
                payload = payload[:place] + chance.choice(BYTES) + payload[place:]
            elif what == 3:
                payload = payload[:place] + payload[place:place + 1] + payload[place:]
            else:
                lines = payload.split(b"\r\n")
                one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
                lines[one], lines[other] = lines[other], lines[one]
                payload = b"\r\n".join(lines)
        yield payload


def plain():
    """Nothing wrong with these: they show that the check sees requests at all."""
    for method, size in itertools.product([b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"HEAD"], [0, 1, 1000, 70000]):
        body = (b"0\r\n\r\n" * size)[:size]
        yield request(b"Content-Length: %d\r\n" % size, body, method=method)
        pieces = b"".join(chunk(body[start:start + 900]) for start in range(0, size, 900))
        yield request(b"Transfer-Encoding: chunked\r\n", pieces + LAST, method=method)
    yield request(b"", method=b"GET")
    yield request(b"", method=b"HEAD")
    yield request(b"Content-Length: 5\r\n", b"hello", version=b"HTTP/1.0")
    yield request(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"hello")
    yield request(b"Content-Length: %d\r\n" % len(CANARY), CANARY, method=b"GET")
    yield request(b"Content-Length: 5\r\n", b"hello") + request(b"Transfer-Encoding: chunked\r\n", chunk(b"hello") + LAST) + request(b"", method=b"GET")
    yield request(b"", method=b"GET", target=b"http://localhost/" + ID)


def cases(size=1.0, seed=1):
    """All cases; `size` scales the two large groups."""
    groups = [
        ("plain", plain()), ("framing", thinned(framing(), int(900 * size))),
        ("chunks", (request(b"Transfer-Encoding: chunked\r\n", body) for body in chunks())), ("heads", heads()), ("exchanges", exchanges()),
        ("mutations", mutations(int(900 * size), seed)),
    ]
    found = []
    for group, payloads in groups:
        for payload in payloads:
            number = len(found)
            parts = payload if isinstance(payload, tuple) else (payload,)
            parts = tuple(part if isinstance(part, float) else part.replace(ID, b"c%05d" % number) for part in parts)
            found.append(Case(number, group, parts, group == "plain"))
    return found
