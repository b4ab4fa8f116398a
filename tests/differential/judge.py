"""Compares the three readings of every case: what the downstream's bytes hold, what left the proxy, what the server saw."""
import collections
import re
from dataclasses import dataclass, field

import reading
import relay


@dataclass
class Report:
    """What one server's run found. Accepted is a case of which at least one whole request left; forwarded and agreed are requests."""

    name: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    forwarded: int = 0
    agreed: int = 0
    refused_by_server: int = 0
    canaries: int = 0
    seconds: float = 0
    disagreements: list = field(default_factory=list)

    def disagree(self, kind, what, **bytes_of):
        self.disagreements.append((kind, what, bytes_of))


def judge(name, cases, answers, between, entries, token, host):
    """Everything at once, for one server."""
    report = Report(name, cases=len(cases))
    seen = collections.defaultdict(list)
    for peer, *what in entries:
        seen[peer].append(what)
    left = collections.defaultdict(list)
    for connection in between.connections:
        requests, fault = reading.read_all(bytes(connection.sent), reading.STRICT)
        if fault:
            report.disagree("malformed", fault, left=bytes(connection.sent))
        for request in requests:
            if token and (request.values(b"host") != [host.encode()] or request.values(b"authorization") != [token.encode()]):
                report.disagree("malformed", "not our host and authorization", left=bytes(connection.sent))
            match = re.search(rb"c\d{5}", request.target)
            number = int(match[0][1:]) if match else -1
            left[number].append((connection.arrived(request.start), request))
        compare_server(report, connection, requests, seen.pop(connection.peer, []))
    for peer, rest in seen.items():
        report.disagree("server", f"requests from nowhere ({peer}): {rest}")
    for case in cases:
        requests = [request for _, request in sorted(left.pop(case.number, []), key=lambda pair: pair[0])]
        compare_downstream(report, case, requests, answers[case.number])
    for number, strangers in left.items():
        report.disagree("proxy", f"requests of no case ({number}): {[(request.method, request.target) for _, request in strangers]}")
    return report


# B02, B05: a request that broke off is followed by none on its connection, whose reading would show it.
def compare_server(report, connection, requests, seen):
    """What the server saw on one connection must be what was sent on it."""
    bytes_of = {"left": bytes(connection.sent), "replies": bytes(connection.replies)}
    responses = reading.read_responses(bytes(connection.replies), [request.method for request in requests])
    # An error at the end may also be the word on a request that broke off, or never came.
    spare = not (requests and requests[-1].complete) and bool(responses) and responses[-1][0] >= 400
    if len(responses) > len(requests) + spare:
        report.disagree("server", f"{len(responses)} responses to {len(requests)} requests", **bytes_of)
    rest = list(seen)
    for index, request in enumerate(requests):
        sent = relay.entry(request.method, request.target, request.body)
        unread = [*sent[:2], None, None]
        status = responses[index][0] if index < len(responses) else None
        if rest and (rest[0] == sent and request.complete or rest[0] == unread and b"/early/" in request.target):
            rest.pop(0)
            report.agreed += 1
        elif not request.complete or (b"/early/" in request.target and status == 200):
            # What was answered early may have been given up by a server that passes on.
            continue
        elif status is not None and status >= 400:
            report.refused_by_server += 1
        elif status is None:
            report.disagree("server", f"no answer to {sent}", **bytes_of)
        else:
            report.disagree("server", f"sent {sent}, answered {status}, seen {rest[:1]}", **bytes_of)
            return
    for what in rest:
        report.canaries += what[1].startswith("/smuggled")
        report.disagree("server", f"seen but never sent: {what}", **bytes_of)


# A23 to A32, B01, B03, B04: nothing leaves that the downstream's bytes do not hold.
def compare_downstream(report, case, left, answer):
    """What left the proxy must be what the downstream asked for, and each answer the one to its request."""
    asked, fault = reading.read_all(case.bytes, reading.TOLERANT)
    bytes_of = {"case": case.bytes, "answer": answer}
    if any(request.complete for request in left):
        report.accepted += 1
    else:
        report.refused += 1
    report.forwarded += sum(request.complete for request in left)
    candidates = iter(asked)
    for request in left:
        wanted = next((one for one in candidates if is_part(request, one)), None)
        if wanted is None:
            report.canaries += request.target.startswith(b"/smuggled")
            report.disagree("proxy", f"left: {request.method} {request.target} {request.body[:200]} complete={request.complete}; asked: "
                            f"{[(one.method, one.target, one.body[:200], one.complete) for one in asked]} {fault or ''}", **bytes_of)
            return
    if case.plain and [request.complete for request in left] != [True] * len(asked):
        report.disagree("proxy", "a plain request did not leave", **bytes_of)
    try:
        responses = reading.read_responses(answer, [request.method for request in asked])
    except (ValueError, IndexError):
        report.disagree("proxy", "its responses can't be read", **bytes_of)
        return
    # One more for what is no request.
    if len(responses) > len(asked) + 1:
        report.disagree("proxy", f"{len(responses)} responses to {len(asked)} requests", **bytes_of)
    expected = iter(left)
    for status, fields, _ in responses:
        said = dict(fields).get(b"x-echo", b"").decode()
        if said and not any(said in echoes(request) for request in expected):
            report.disagree("proxy", f"a response that is not its own: {status} {said}", **bytes_of)


def echoes(request):
    return [relay.echo(relay.entry(request.method, request.target, body)) for body in (request.body, None)]


def is_part(left, asked):
    if (left.method, left.target) != (asked.method, asked.target):
        return False
    return asked.complete and left.body == asked.body if left.complete else asked.body.startswith(left.body)
