//! Where a request ends (RFC 9112 sections 6 and 7): what is ambiguous is refused, what goes on is framed anew.

use std::time::Duration;

use crate::support::raw::Message;
use crate::support::wire::{GET, OK, OK_KEPT, Wire};

/// A request that a careless reader would find in the body of another.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn post(fields_and_body: &str) -> String {
    format!("POST /x HTTP/1.1\r\nHost: localhost\r\n{fields_and_body}")
}

#[test]
fn a23_chunked_wins_over_a_length_and_the_connection_ends() {
    let wire = Wire::start();
    let body = format!("0\r\n\r\n{SMUGGLED}");
    let length = body.len();
    for fields in [
        format!("Content-Length: {length}\r\nTransfer-Encoding: chunked"),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {length}"),
        format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\nContent-Length: {length}"),
        "Content-Length: 0\r\nTransfer-Encoding: chunked".to_owned(),
        "Transfer-Encoding: chunked\r\nContent-Length: 0\r\nContent-Length: 7".to_owned(),
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(post(&format!("{fields}\r\n\r\n{body}")));
        // The contract allows a refusal as well as this.
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        assert!(forwarded.complete && forwarded.body.is_empty(), "{fields}: {forwarded:?}");
        wire.assert_ours(&forwarded);
        upstream.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200, "{fields}");
        assert!(downstream.is_closed(), "left open behind {fields}");
        assert!(upstream.is_closed(), "more than one request left for {fields}");
        assert!(wire.upstream.saw_nothing(), "more than one request left for {fields}");
    }
}

#[test]
fn a24_any_transfer_coding_but_one_chunked_is_refused() {
    let wire = Wire::start();
    for coding in [
        "gzip, chunked",
        "identity",
        "chunked, chunked",
        ", chunked",
        "chunked,",
        "chunked\r\nTransfer-Encoding: chunked",
        "gzip\r\nTransfer-Encoding: chunked",
        "chunked\r\nTransfer-Encoding: identity",
        "xchunked",
        "chunkedx",
        "\"chunked\"",
        "chunked;q=1",
        "chunked foo",
        "\u{b}chunked",
        "",
        "gzip",
        "chunked, gzip",
    ] {
        let answer = wire.refused_and_closed(post(&format!("Transfer-Encoding: {coding}\r\n\r\n5\r\nhello\r\n0\r\n\r\n{SMUGGLED}")));
        assert!(matches!(answer.status(), 400 | 501), "{coding:?}: {answer:?}");
    }
    for (name, value) in [("Transfer-Encoding", "Chunked"), ("TRANSFER-ENCODING", "chunked\t"), ("transfer-encoding", "\tCHUNKED")] {
        let forwarded = wire.forwarded(post(&format!("{name}:{value}\r\n\r\n5\r\nhello\r\n0\r\n\r\n")));
        assert_eq!((forwarded.body.as_slice(), forwarded.all("transfer-encoding").as_slice()), (&b"hello"[..], &["chunked"][..]));
    }
}

#[test]
fn a25_http_1_0_has_no_transfer_coding() {
    let answer = Wire::start()
        .refused_and_closed("POST /x HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    assert_eq!(answer.status(), 400);
}

#[test]
fn a26_lengths_that_are_none_are_refused() {
    let wire = Wire::start();
    for length in [
        "",
        " ",
        "+5",
        "-1",
        "0x5",
        "5_0",
        "5 5",
        "5,6",
        "1234567890123456789012345",
        "18446744073709551616",
        "5\r\nContent-Length: 6",
        "5;",
        "5.0",
        "\u{b}5",
        "five",
    ] {
        let answer = wire.refused_and_closed(post(&format!("Content-Length: {length}\r\n\r\nhello{SMUGGLED}")));
        assert_eq!(answer.status(), 400, "{length:?}");
    }
}

#[test]
fn a27_one_length_said_twice_goes_on_once_or_not_at_all() {
    let wire = Wire::start();
    let forwarded = wire.forwarded(post("Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"));
    assert_eq!((forwarded.header("content-length"), forwarded.body.as_slice()), (Some("5"), &b"hello"[..]));
    assert_eq!(wire.refused_and_closed(post("Content-Length: 5, 5\r\n\r\nhello")).status(), 400);
}

#[test]
fn a28_lines_that_are_no_fields_are_refused() {
    let wire = Wire::start();
    for lines in [
        "X-A: 1\r\n folded",
        "X-A: 1\r\n\tfolded",
        "X-A:\r\n 1",
        "Transfer-\r\n Encoding: chunked",
        "X-A : 1",
        "X-A\t: 1",
        "Content-Length : 5",
        ": no name",
        ":",
        "no colon",
        "no-colon",
    ] {
        assert_eq!(wire.refused_and_closed(format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n")).status(), 400, "{lines:?}");
    }
    for first in [" X-A: 1", "\tContent-Length: 1", "\r X-A: 1"] {
        assert_eq!(wire.refused_and_closed(format!("GET /x HTTP/1.1\r\n{first}\r\nHost: localhost\r\n\r\nX")).status(), 400, "{first:?}");
    }
}

#[test]
fn a29_control_bytes_are_refused() {
    let wire = Wire::start();
    for value in [&b"a\0b"[..], b"a\rb", b"a\r", b"\rb", b"a\nb", b"a\x01b", b"a\x7fb", b"a\x0bb", b"a\x0cb", b"a\x1bb", b"a\x08b"] {
        let request = [b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-A: ", value, b"\r\n\r\n"].concat();
        assert_eq!(wire.refused_and_closed(request).status(), 400, "{}", value.escape_ascii());
    }
    for name in [
        &b"X\0A"[..],
        b"X A",
        b"X\x01",
        b"X\xe9",
        b"\xefoo",
        b"X\x85",
        b"X\xa0",
        b"X(A)",
        b"X\"A",
        b"X/A",
        b"X[A]",
        b"X@A",
        b"X{A}",
        b"X=A",
        b"X,A",
        b"X;A",
        b"X\rA",
    ] {
        let request = [b"GET /x HTTP/1.1\r\nHost: localhost\r\n", name, b": 1\r\n\r\n"].concat();
        assert_eq!(wire.refused_and_closed(request).status(), 400, "{}", name.escape_ascii());
    }
}

#[test]
fn a30_bare_line_feeds_end_lines_here_and_leave_as_pairs() {
    let wire = Wire::start();
    let forwarded = wire.forwarded("POST /x HTTP/1.1\nHost: localhost\nX-A: 1\nContent-Length: 5\n\nhello");
    wire.assert_head(&forwarded, "POST /x HTTP/1.1", &[b"x-a: 1", b"content-length: 5"]);
    assert_eq!(forwarded.body, b"hello");
    assert!(!forwarded.head.windows(2).any(|pair| pair[0] != b'\r' && pair[1] == b'\n'), "{forwarded:?}");
}

#[test]
fn a31_b04_broken_chunks_never_make_a_request() {
    let wire = Wire::start();
    for body in [
        // Sizes.
        "\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "-0x0\r\n\r\n",
        "5g\r\nhello\r\n0\r\n\r\n",
        "0_5\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "           0\r\n\r\n",
        "5 junk\r\nhello\r\n0\r\n\r\n",
        "5junk\r\nhello\r\n0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff1\r\nhello\r\n0\r\n\r\n",
        "fffffffffffffffffffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "Z\r\nZZ\r\nZZZ\r\n\r\n",
        "INVALID!!!\r\n",
        // Line ends.
        "5\nhello\r\n0\r\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "5\r\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello\r0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "5\r\nhello\r\n\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\n\n",
        "5\r\nhello\r\n0\r\rX\r\n",
        // Extensions.
        "5;a=b\nhello\r\n0\r\n\r\n",
        "5;a\rX\r\nhello\r\n0\r\n\r\n",
        "5\r;a\r\nhello\r\n0\r\n\r\n",
        "5;\rhello\r\n0\r\n\r\n",
        "5;a\nxx\r\nhello\r\n0\r\n\r\n",
    ] {
        let status = wire.never_completed(post(&format!("Transfer-Encoding: chunked\r\n\r\n{body}{SMUGGLED}")));
        assert!(matches!(status, None | Some(400)), "{body:?}: {status:?}");
    }
}

#[test]
fn a32_chunk_extensions_end_here_and_are_bounded() {
    let wire = Wire::start();
    let forwarded = wire.forwarded(post("Transfer-Encoding: chunked\r\n\r\n5;a=b;c=\"d;\"\r\nhello\r\n6 ;x\r\n world\r\n0;last\r\n\r\n"));
    assert_eq!(forwarded.body, b"hello world");
    let mut body = String::new();
    for _ in 0..(1024 * 1024 / 32) {
        body.push_str("1;eeeeeeeeeeeeeeeeeeeeeeeeeeee\r\nx\r\n");
    }
    let status = wire.never_completed(post(&format!("Transfer-Encoding: chunked\r\n\r\n{body}0\r\n\r\n")));
    assert!(matches!(status, None | Some(400 | 413)), "{status:?}");
}

#[test]
fn a33_b19_request_trailers_end_here() {
    let wire = Wire::start();
    let trailers = "Authorization: dummy\r\nContent-Length: 500\r\nHost: evil.example\r\nX-Api-Password: p\r\nX-Other: 1\r\n";
    let forwarded = wire.forwarded(post(&format!(
        "Transfer-Encoding: chunked\r\nTrailer: X-Other, Authorization\r\n\r\n5\r\nhello\r\n0\r\n{trailers}\r\n"
    )));
    wire.assert_head(&forwarded, "POST /x HTTP/1.1", &[b"transfer-encoding: chunked"]);
    assert_eq!((forwarded.body.as_slice(), forwarded.trailers.len()), (&b"hello"[..], 0), "{forwarded:?}");
}

/// A33, B04: some readers end a trailer's line, and with it perhaps the request, at a bare line feed, others do not. Behind trailers, and behind chunks
/// that were not read to their end, nothing is taken for a request.
#[test]
fn a33_b04_nothing_is_read_behind_trailers() {
    let wire = Wire::start();
    // One reader ends the request at the bare line feed and finds a POST whose body is the canary; another takes the POST's head for trailers.
    let hidden = format!("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{SMUGGLED}", SMUGGLED.len());
    for trailers in
        [format!("\n\r\n{hidden}"), format!("X: y\n\r\n{hidden}"), format!("X: y\r\n\n\r\n{hidden}"), format!("X: y\r\n\r\n{SMUGGLED}")]
    {
        let mut downstream = wire.proxy.connect();
        downstream.send(post(&format!("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n{trailers}")));
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        assert!(forwarded.complete && forwarded.body == b"hello", "{forwarded:?}");
        upstream.send(OK_KEPT);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.header("connection")), (200, Some("close")), "{trailers:?}");
        assert!(downstream.is_closed(), "left open behind {trailers:?}");
        assert!(upstream.is_silent_for(Duration::from_millis(10)), "a second request left for {trailers:?}");
        drop(upstream);

        // The same behind an early answer.
        let mut downstream = wire.proxy.connect();
        downstream.send(post("Transfer-Encoding: chunked\r\n\r\n"));
        let mut upstream = wire.upstream.accept();
        upstream.read_head().expect("a head");
        upstream.send(OK);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.header("connection")), (200, Some("close")), "{trailers:?}");
        downstream.try_send(format!("5\r\nhello\r\n0\r\n{trailers}"));
        downstream.half_close();
        assert!(downstream.is_closed(), "an answer to what is behind {trailers:?}");
        assert!(wire.upstream.saw_nothing(), "a second request left for {trailers:?}");
    }
}

#[test]
fn a35_request_trailers_are_bounded() {
    let wire = Wire::start();
    let before = wire.proxy.resident_bytes();
    let many = "X-T: 1\r\n".repeat(10_000);
    let long = format!("X-T: {}\r\n", "t".repeat(1024 * 1024));
    for trailers in [many, long] {
        let status = wire.never_completed(post(&format!("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n{trailers}\r\n")));
        assert!(matches!(status, None | Some(400 | 431)), "{status:?}");
    }
    assert!(wire.proxy.resident_bytes() < before + 16 * 1024 * 1024);
    wire.forwarded(GET);
}

#[test]
fn a53_bodies_of_methods_that_rarely_have_one_go_on() {
    let wire = Wire::start();
    for method in ["GET", "DELETE", "OPTIONS", "HEAD", "PROPFIND"] {
        let forwarded =
            wire.forwarded(format!("{method} /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{SMUGGLED}", SMUGGLED.len()));
        assert_eq!((forwarded.start, forwarded.body), (format!("{method} /x HTTP/1.1"), SMUGGLED.as_bytes().to_vec()));
    }
}

#[test]
fn a54_framing_is_kept_and_none_is_invented() {
    let wire = Wire::start();
    let framing = |forwarded: &Message| {
        (forwarded.header("content-length").map(str::to_owned), forwarded.header("transfer-encoding").map(str::to_owned))
    };
    assert_eq!(framing(&wire.forwarded(post("Content-Length: 0\r\n\r\n"))), (Some("0".to_owned()), None));
    assert_eq!(framing(&wire.forwarded(post("Content-Length: 5\r\n\r\nhello"))), (Some("5".to_owned()), None));
    assert_eq!(
        framing(&wire.forwarded(post("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))),
        (None, Some("chunked".to_owned()))
    );
    for method in ["GET", "HEAD", "DELETE"] {
        assert_eq!(framing(&wire.forwarded(format!("{method} /x HTTP/1.1\r\nHost: localhost\r\n\r\n"))), (None, None), "{method}");
    }
    let (length, coding) = framing(&wire.forwarded(post("\r\n")));
    assert!(matches!(length.as_deref(), None | Some("0")) && coding.is_none(), "{length:?} {coding:?}");
}

#[test]
fn a59_a_chunked_get_or_head_keeps_its_body() {
    let wire = Wire::start();
    for method in ["GET", "HEAD"] {
        for size in [1, 1024 * 1024] {
            let body = "b".repeat(size);
            let forwarded = wire.forwarded(format!(
                "{method} /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{size:x}\r\n{body}\r\n0\r\n\r\n"
            ));
            assert_eq!(forwarded.body.len(), size, "{method}");
            assert!(forwarded.body.iter().all(|byte| *byte == b'b'));
        }
    }
}

#[test]
fn a57_versions_that_are_not_1_x_are_refused_and_ours_leaves() {
    let wire = Wire::start();
    for version in [
        "HTTP/1.2",
        "HTTP/2.0",
        "HTTP/2",
        "HTTP/1.32",
        "HTTP/1",
        "HTTP/0.9",
        "HTTP/4294967295.255",
        "http/1.1",
        "HTTP/1.1.1",
        "HTP/1.1",
        "HTTP/ 1.1",
        "",
    ] {
        let answer = wire.refused_and_closed(format!("GET /x {version}\r\nHost: localhost\r\n\r\n"));
        assert!(matches!(answer.status(), 400 | 505), "{version}: {answer:?}");
    }
    assert!(matches!(wire.refused_and_closed("GET /x\r\n\r\n").status(), 400 | 505));
    // `forwarded` checks that 1.1 leaves.
    wire.forwarded("GET /x HTTP/1.0\r\nHost: localhost\r\n\r\n");
    wire.forwarded("POST /x HTTP/1.0\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello");
}

/// A56, B08: what is never served cannot flood.
#[test]
fn a56_b08_the_listener_speaks_http_1_only() {
    let wire = Wire::start();
    for preface in ["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0", "PRI * HTTP/2.0\r\n\r\n"] {
        let mut downstream = wire.proxy.connect();
        downstream.send(preface);
        let answer = downstream.read_to_end();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4") || answer.starts_with(b"HTTP/1.1 505"), "{}", answer.escape_ascii());
        assert!(wire.upstream.saw_nothing());
    }
}

/// TLS records, a bare line, nothing at all: whatever a port scanner sends.
#[test]
fn what_is_not_http_is_refused_and_closed() {
    let wire = Wire::start();
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\0 / HTTP/............0596.7407.\r\n\r\n",
        b"G=\":<>(e),[T];?\" /get HTTP/1.1\r\n\r\n",
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(bytes);
        downstream.half_close();
        let answer = downstream.read_to_end();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{}", answer.escape_ascii());
    }
    assert!(wire.upstream.saw_nothing());
}
