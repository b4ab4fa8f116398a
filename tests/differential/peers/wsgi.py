"""Records every complete request and answers with what it saw: for gunicorn and waitress. The environment's RECORD names the file."""
import hashlib
import json
import os


def application(environ, start_response):
    target = environ.get("RAW_URI") or environ["REQUEST_URI"]
    length = digest = None
    if "/early/" not in target:
        body = environ["wsgi.input"].read()
        if len(body) < int(environ.get("CONTENT_LENGTH") or 0):
            raise ConnectionError("the body broke off")
        length, digest = len(body), hashlib.sha256(body).hexdigest()[:16]
    seen = [environ["REMOTE_ADDR"], environ["REQUEST_METHOD"], target, length, digest]
    with open(os.environ["RECORD"], "a") as record:
        record.write(json.dumps(seen) + "\n")
    echo = f"{seen[1]}/{'-' if length is None else length}/{digest or '-'}"
    start_response("200 OK", [("Content-Length", "4"), ("X-Echo", echo)])
    return [b"seen"]
