"""Records every complete request and answers with what it saw, on Python's own http.server; http_server.py PORT RECORD.

That server parses heads as e-mail and leaves bodies to its user, who here is as careless as many are.
"""
import hashlib
import http.server
import json
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError
        return body

    def answer(self, length, digest):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.send_header("X-Echo", f"{self.command}/{length}/{digest}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"seen")

    def handle_any(self):
        # As it was sent: `self.path` has leading slashes folded.
        target = self.requestline.split()[1]
        early = "/early/" in target
        if early:
            self.answer("-", "-")
        body = self.body()
        seen = [self.client_address[0], self.command, target, len(body), hashlib.sha256(body).hexdigest()[:16]]
        # One write to a file opened for appending, so that lines of several threads stay whole.
        with open(RECORD, "a") as record:
            record.write(json.dumps(seen) + "\n")
        if not early:
            self.answer(*seen[3:])

    def __getattr__(self, name):
        # Any method is answered.
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 4096

    def handle_error(self, *_):
        # A request that breaks off is no news here.
        pass


PORT, RECORD = int(sys.argv[1]), sys.argv[2]
Server(("127.0.0.1", PORT), Handler).serve_forever()
