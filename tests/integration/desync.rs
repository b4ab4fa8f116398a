//! Requests made so that two readers disagree on where one ends: B01 (the classes that HTTP Garden found in real servers and proxies), B03, B04.

use std::time::Duration;

use crate::support::raw::{Message, Raw};
use crate::support::wire::{OK, OK_KEPT, Wire};

/// What a strict reader of RFC 9112 finds in a payload.
enum Strictly {
    /// Nothing that may be forwarded as a complete request.
    Nothing,
    /// These requests: method and target, and body.
    These(&'static [(&'static str, &'static str)]),
}

use Strictly::{Nothing, These};

/// Each row is one of the bugs listed in HTTP Garden's `TROPHIES.md`, with the `Host` that it would need to get past the guard.
const GARDEN: &[(&[u8], Strictly)] = &[
    // Servers.
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0_2e\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nHeader: v\x00\ralue\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length : 34\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\n\tContent-Length: 1\r\nHost: localhost\r\n\r\nX", Nothing),
    (b"GET /test HTTP/1.32\r\nHost: localhost\r\n\r\n", Nothing),
    (b"G=\":<>(e),[T];?\" /get HTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET ! HTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\xefoo: bar\r\n\r\n", Nothing),
    (b"GET /\nHTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1_0\r\n\r\n0123456789", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nZ\r\n0\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: \xa0chunked\xa0\r\n\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nVisible: :/\rSmuggled: :)\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\x01\x02\x03\x04\x05\x06\x07\x08\t\x0b\x0c \"(),/;<=>?@[/]{}: whatever\r\n\r\n", Nothing),
    (b"GET / HTTP/\r\r1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: \r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\n: ignored\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: ,chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length\x85: 10\r\n\r\n0123456789", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 0\r\n\r\nZ", Nothing),
    (b"GET / HTTP/4294967295.255\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -48\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\n:\r\nHost: localhost\r\nI: am chopped off\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length 10\r\n\r\n0123456789", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1Z\r\n\r\nZ", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\rZGET /evil: HTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\r;ABCD\r\n34\r\nE\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\nZ", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nHeader: va\rlue\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTest: test\x00THESE BYTES GET DROPPED\r\nConnection: close\r\n\r\n", Nothing),
    (b"POST /abc HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\rXXXXX\r\n0\r\n\r\nGET /bad_path/pwned HTTP/1.1\r\nHost: localhost\r\nContent-Length: 41\r\n\r\n0\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-\r\nEncoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: \r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"\x00 / HTTP/............0596.7407.\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: \r\nContent-Length: 43\r\n\r\nPOST /evil HTTP/1.1\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nEvil: evil\x00\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: blegh\r\n\r\n1\r\nZ\r\n0\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: \xfflocalhost\xff\r\nTransfer-Encoding: \xffchunked\xff\r\n\r\n1\r\nZ\r\n0\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nINVALID!!!\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 010\r\n\r\n0123456789", These(&[("GET /", "0123456789")])),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX:POST / HTTP/1.1\r\n\r\n", These(&[("GET /", "")])),
    (b"GET /login HTTP/1.1\r\nHost: localhost\r\nUser: \x85admin\xa0\r\n\r\n", These(&[("GET /login", "")])),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nInvalid\r\n\r\n", These(&[("GET /", "")])),
    (
        b"POST /0 HTTP/1.1\r\nContent-Length: 0\r\nConnection:keep-alive\r\nHost: localhost\r\n\r\nPOST /1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 36\r\n\r\nGET /2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        These(&[("POST /0", ""), ("POST /1", "GET /2 HTTP/1.1\r\nHost: localhost\r\n\r\n")]),
    ),
    // A bare LF ends a line here (RFC 9112 section 2.2 allows it), so this is one request and the beginning of another.
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nUseless:\n\nGET /2 HTTP/1.1\r\nHost: localhost\r\n\r\n", These(&[("GET /", ""), ("GET /2", "")])),
    // Proxies.
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0x10\r\n\r\nZ", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\nZZ\r\nZZZ\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\r;a\r\n02\r\n41\r\n0\r\n\r\nGET /bad_path/pwned HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", Nothing),
    (b"POST /  HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r0\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r0\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nHeader\x85: value\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1these-bytes-never-get-validated\r\nZ\r\n0\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nInvalid-Header: this\rvalue\ris\rinvalid\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\ncontent-length: \r\ncontent-length: 59\r\n\r\nPOST /evil HTTP/1.1\r\nhost: localhost\r\ncontent-length: 34\r\n\r\nGET / HTTP/1.1\r\nhost: localhost\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\x00.kallus.org\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\n0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTe\nst: test\r\nConnection: close\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: ,chunked\r\nContent-Length: 5\r\nConnection: close\r\n\r\n0r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n17\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n\r\n\r\n0\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-0x0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\na:b\r\nc\x00\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 31\r\n\r\nGET /evil HTTP/1.1\r\nHost: a\r\n\r\n", Nothing),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n           0\r\n\r\n", Nothing),
    (b"GET / HTTP/1.1\nHost: localhost\nConnection: close\n\n", These(&[("GET /", "")])),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n1234567890", These(&[("GET /", "1234567890")])),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", These(&[("POST /", "")])),
    // Its bonus bugs.
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n\x00", These(&[("GET /", "")])),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", Nothing),
];

/// Sends a payload and answers whatever leaves, until the downstream's connection ends.
fn leaving(wire: &Wire, payload: &[u8]) -> Vec<Message> {
    let mut downstream = wire.proxy.connect();
    downstream.try_send(payload);
    let mut complete = Vec::new();
    let answers = std::thread::spawn(move || downstream.read_to_end());
    loop {
        let done = answers.is_finished();
        if let Some(mut upstream) = wire.upstream.try_accept() {
            complete.extend(answer_all(&mut upstream));
        } else if done {
            break;
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let answers = answers.join().expect("reading does not panic");
    assert!(!answers.windows(12).any(|window| window.starts_with(b"HTTP/1.1 40") && matches!(window[11], b'1' | b'3')), "B50");
    complete
}

/// The complete requests that come on one connection; each is answered, then the connection ends.
fn answer_all(upstream: &mut Raw) -> Vec<Message> {
    let mut complete = Vec::new();
    while let Some(request) = upstream.read_request() {
        if !request.complete {
            break;
        }
        complete.push(request);
        upstream.try_send(OK);
    }
    complete
}

#[test]
fn b01_http_garden_never_gets_a_second_request_through() {
    // Short, since some payloads leave the proxy waiting for more.
    let wire = Wire::set(&["listen.header_timeout=1s", "listen.idle_timeout=200ms", "upstream.body_idle_timeout=1s"]);
    for (payload, strictly) in GARDEN {
        let forwarded = leaving(&wire, payload);
        for request in &forwarded {
            wire.assert_ours(request);
        }
        let got: Vec<_> =
            forwarded.iter().map(|request| (request.start.trim_end_matches(" HTTP/1.1"), String::from_utf8_lossy(&request.body))).collect();
        let got: Vec<_> = got.iter().map(|(start, body)| (*start, &**body)).collect();
        let expected: &[(&str, &str)] = match strictly {
            Nothing => &[],
            These(requests) => requests,
        };
        assert_eq!(got, expected, "{}", payload.escape_ascii());
    }
}

/// B03, pause-based and "CL.0": the upstream answers before it has the body, and the body looks like a request. It must be one on neither side.
#[test]
fn b03_a_body_that_looks_like_a_request_stays_a_body() {
    let wire = Wire::start();
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for (framing, body) in [
        (format!("Content-Length: {}", smuggled.len()), smuggled.to_owned()),
        ("Transfer-Encoding: chunked".to_owned(), format!("{:x}\r\n{smuggled}\r\n0\r\n\r\n", smuggled.len())),
    ] {
        for method in ["POST", "GET", "OPTIONS"] {
            for expect in ["", "Expect: 100-continue\r\n"] {
                let mut downstream = wire.proxy.connect();
                downstream.send(format!("{method} /x HTTP/1.1\r\nHost: localhost\r\n{expect}{framing}\r\n\r\n"));
                // In the middle of the body, as if the network paused.
                let mut upstream = wire.upstream.accept();
                upstream.read_head().expect("a head");
                upstream.send(OK_KEPT);
                let mut answer = downstream.read_response(false).expect("an answer");
                if answer.status() == 100 {
                    answer = downstream.read_response(false).expect("an answer");
                }
                assert_eq!(answer.status(), 200);
                downstream.try_send(&body);
                // The rest may still be forwarded as the body that it is, but then the connection ends: nobody waits on it for another request.
                let rest = upstream.read_to_end();
                assert!(!String::from_utf8_lossy(&rest).contains("authorization"), "{}", rest.escape_ascii());
                downstream.half_close();
                assert_eq!(downstream.read_to_end(), b"", "{method} {framing}: a second answer");
                assert!(wire.upstream.saw_nothing(), "{method} {framing}: a second request");
            }
        }
    }
}
