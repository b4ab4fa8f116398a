//! Heads on the wire (RFC 9112 sections 2 to 5): a request's is written, a response's is read. Pure.

use std::mem::MaybeUninit;

use bytes::BytesMut;
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version, response};
use hyper::ext::ReasonPhrase;

use super::{Error, RequestHead};

/// Of a response head; more is a broken upstream (502).
pub(crate) const MAX_BYTES: usize = 64 * 1024;
/// Likewise, the number of its fields.
pub(super) const MAX_FIELDS: usize = 100;

/// A response's head.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) parts: response::Parts,
    /// Whether the upstream keeps the connection open behind the response (RFC 9112 section 9.3).
    pub(super) keep_alive: bool,
}

/// How a message says where its body ends (RFC 9112 section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    Chunked,
    /// In bytes.
    Length(u64),
    /// It does not: at the end of the connection.
    None,
}

/// Appends the head to `out`. The types of the `http` crate hold nothing that could end a line.
pub(super) fn encode(out: &mut Vec<u8>, request: &RequestHead) {
    out.extend_from_slice(request.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(request.target.as_str().as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in &request.headers {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Takes the first head off `received`; nothing before its end is there.
pub(super) fn take(received: &mut BytesMut) -> Result<Option<Head>, Error> {
    const MALFORMED: Error = Error::Malformed("its response is not HTTP");
    const START: &[u8] = b"HTTP/1.";
    // Whoever speaks something else would never send the end of a head.
    let compared = START.len().min(received.len());
    if received[..compared] != START[..compared] {
        return Err(MALFORMED);
    }
    let Some(length) = end(received) else {
        return if received.len() > MAX_BYTES { Err(Error::Malformed("the head of its response is too long")) } else { Ok(None) };
    };
    if length > MAX_BYTES {
        return Err(Error::Malformed("the head of its response is too long"));
    }
    let bytes = received.split_to(length).freeze();
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let status = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, &bytes, &mut fields);
    match status {
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Error::Malformed("the head of its response has too many fields")),
        Ok(httparse::Status::Partial) | Err(_) => return Err(MALFORMED),
    }
    let (Some(version), Some(code), Some(reason)) = (parsed.version, parsed.code, parsed.reason) else { return Err(MALFORMED) };

    let (mut parts, ()) = Response::new(()).into_parts();
    parts.version = if version == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    parts.status = StatusCode::from_u16(code).map_err(|_| MALFORMED)?;
    if !reason.is_empty() && Some(reason) != parts.status.canonical_reason() {
        parts.extensions.insert(ReasonPhrase::try_from(bytes.slice_ref(reason.as_bytes())).map_err(|_| MALFORMED)?);
    }
    parts.headers.reserve(parsed.headers.len());
    for field in &*parsed.headers {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| MALFORMED)?;
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(field.value)).map_err(|_| MALFORMED)?;
        parts.headers.append(name, value);
    }
    let keep_alive = keeps_alive(parts.version, &parts.headers);
    Ok(Some(Head { parts, keep_alive }))
}

/// Where the first head ends: behind its first empty line. A line feed alone ends a line too (RFC 9112 section 2.2).
fn end(received: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', received).find_map(|at| match received[at + 1..] {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

fn keeps_alive(version: Version, headers: &HeaderMap) -> bool {
    let (mut close, mut keep_alive) = (false, version == Version::HTTP_11);
    for line in headers.get_all(CONNECTION) {
        for option in line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            close |= option.eq_ignore_ascii_case(b"close");
            keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    keep_alive && !close
}

const TWO_FRAMINGS: &str = "its framing is ambiguous: both transfer-encoding and content-length";

/// RFC 9112 section 6.3: one framing, said once; else what is wrong with it. Others prefer one of two silently (matrix A44, A60).
pub(crate) fn framing(headers: &HeaderMap) -> Result<Framing, &'static str> {
    // One pass: cheaper than to look two names up.
    let mut framing = Framing::None;
    for (name, value) in headers {
        if *name == TRANSFER_ENCODING {
            if framing == Framing::Chunked || !value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
                return Err("its framing is ambiguous: transfer-encoding is not chunked alone");
            }
            if framing != Framing::None {
                return Err(TWO_FRAMINGS);
            }
            framing = Framing::Chunked;
        } else if *name == CONTENT_LENGTH {
            let Some(length) = parse_length(value) else { return Err("its framing is ambiguous: content-length is not a number") };
            match framing {
                Framing::Chunked => return Err(TWO_FRAMINGS),
                Framing::Length(earlier) if earlier != length => return Err("its framing is ambiguous: several content-lengths"),
                Framing::Length(_) | Framing::None => framing = Framing::Length(length),
            }
        }
    }
    Ok(framing)
}

/// Digits alone (RFC 9110 section 8.6), and at least one; `parse` would take a sign.
fn parse_length(value: &HeaderValue) -> Option<u64> {
    let digits = value.as_bytes();
    let length = digits.iter().try_fold(0_u64, |length, digit| match digit {
        b'0'..=b'9' => length.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    });
    length.filter(|_| !digits.is_empty())
}

#[cfg(test)]
mod tests {
    use http::Method;
    use http::uri::PathAndQuery;

    use super::*;

    fn taken(bytes: impl AsRef<[u8]>) -> Result<Option<Head>, Error> {
        take(&mut BytesMut::from(bytes.as_ref()))
    }

    fn complete(bytes: impl AsRef<[u8]>) -> Head {
        taken(bytes).expect("a head").expect("all of it")
    }

    /// A head of `length` bytes, its end included.
    fn long(length: usize) -> Vec<u8> {
        let (start, end) = ("HTTP/1.1 200 OK\r\nx: ", "\r\n\r\n");
        format!("{start}{}{end}", "v".repeat(length - start.len() - end.len())).into_bytes()
    }

    #[test]
    fn a_head_is_taken_with_its_last_byte_and_nothing_behind_it() {
        for head in ["HTTP/1.1 200 OK\r\nA: 1\r\nb:\t2 \r\na: 3\r\n\r\n", "HTTP/1.1 200 OK\nA: 1\nb:\t2 \r\na: 3\n\n"] {
            for length in 0..head.len() {
                let mut received = BytesMut::from(&head[..length]);
                assert!(take(&mut received).expect("no error").is_none(), "{:?}", &head[..length]);
                assert_eq!(received.len(), length, "taken too early");
            }
            let mut received = BytesMut::from(format!("{head}\r\n{head}").as_str());
            let taken = take(&mut received).expect("a head").expect("all of it");
            assert_eq!((taken.parts.status, taken.parts.version), (StatusCode::OK, Version::HTTP_11));
            assert_eq!(taken.parts.headers.get_all("a").iter().collect::<Vec<_>>(), ["1", "3"]);
            assert_eq!(taken.parts.headers["b"], "2");
            assert_eq!(received, format!("\r\n{head}"));
        }
    }

    #[test]
    fn a45_a57_what_is_no_head_is_refused() {
        for head in [
            &b"HTTP/1.1 200 OK\r\na: 1\r\n b\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\n a: 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na : 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n: 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na: \0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na: 1\r2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na: \x7f\r\n\r\n",
            b"HTTP/1.1 200 O\0K\r\n\r\n",
            b"HTTP/1.1 200 O\rK\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 099 OK\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 OK\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"HTTP/1.2 200 OK\r\n\r\n",
            b"HTTP/1.10 200 OK\r\n\r\n",
        ] {
            assert!(matches!(taken(head), Err(Error::Malformed(_))), "{:?}", String::from_utf8_lossy(head));
        }
    }

    /// Whoever speaks something else would be waited for in vain.
    #[test]
    fn a45_a57_what_does_not_begin_like_a_head_is_refused_with_its_first_byte() {
        for start in [&b"h"[..], b"HTTQ", b"HTTP/2", b"HTTP/1/", b" ", b"\r", b"\n", b"\x15\x03\x03", b"<html>", b"ICY"] {
            assert!(matches!(taken(start), Err(Error::Malformed(_))), "{start:?}");
        }
    }

    #[test]
    fn d31_the_limits_are_met_exactly() {
        assert!(taken(long(MAX_BYTES)).is_ok_and(|head| head.is_some()));
        assert!(matches!(taken(long(MAX_BYTES + 1)), Err(Error::Malformed("the head of its response is too long"))));
        let endless = long(MAX_BYTES + 9);
        assert!(taken(&endless[..MAX_BYTES]).is_ok_and(|head| head.is_none()));
        assert!(matches!(taken(&endless[..=MAX_BYTES]), Err(Error::Malformed("the head of its response is too long"))));

        let fields = |count| format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: 1\r\n".repeat(count));
        assert_eq!(complete(fields(MAX_FIELDS)).parts.headers.len(), MAX_FIELDS);
        assert!(matches!(taken(fields(MAX_FIELDS + 1)), Err(Error::Malformed("the head of its response has too many fields"))));
    }

    #[test]
    fn a_reason_of_the_upstreams_own_is_kept() {
        for (line, reason) in [
            (&b"HTTP/1.1 200 OK"[..], None),
            (b"HTTP/1.1 200 ", None),
            (b"HTTP/1.1 200", None),
            (b"HTTP/1.1 200 ok", Some(&b"ok"[..])),
            (b"HTTP/1.1 404 No\tSuch  Thing: 5", Some(b"No\tSuch  Thing: 5")),
            (b"HTTP/1.1 299 Odd", Some(b"Odd")),
            // The parser leaves it out where it is not ASCII.
            (b"HTTP/1.1 200 d\xe9j\xe0 vu", None),
        ] {
            let head = complete([line, b"\r\n\r\n"].concat());
            assert_eq!(head.parts.extensions.get::<ReasonPhrase>().map(ReasonPhrase::as_bytes), reason, "{line:?}");
        }
    }

    #[test]
    fn a58_who_keeps_the_connection_open() {
        for (version, connection, expected) in [
            ("1.1", &[][..], true),
            ("1.1", &["close"], false),
            ("1.1", &["Close"], false),
            ("1.1", &["keep-alive, close"], false),
            ("1.1", &["keep-alive", "x ,\tCLOSE "], false),
            ("1.1", &["closed", "x-close"], true),
            ("1.1", &["", "keep-alive"], true),
            ("1.0", &[], false),
            ("1.0", &["keep-alive"], true),
            ("1.0", &["x, Keep-Alive"], true),
            ("1.0", &["keep-alive", "close"], false),
            ("1.0", &["x"], false),
        ] {
            let lines = connection.iter().map(|line| format!("Connection: {line}\r\n")).collect::<Vec<_>>().concat();
            let head = complete(format!("HTTP/{version} 200 OK\r\n{lines}\r\n"));
            assert_eq!(head.keep_alive, expected, "{version} {connection:?}");
        }
    }

    #[test]
    fn a44_a60_one_framing_said_once() {
        let framing = |fields: &[(&str, &str)]| {
            let field = |(name, value): &(&str, &str)| {
                (HeaderName::from_bytes(name.as_bytes()).expect("a name"), HeaderValue::from_str(value).expect("a value"))
            };
            framing(&fields.iter().map(field).fold(HeaderMap::new(), |mut map, (name, value)| {
                map.append(name, value);
                map
            }))
        };
        let (length, coding) = ("content-length", "transfer-encoding");
        for (fields, expected) in [
            (&[][..], Framing::None),
            (&[(length, "0")], Framing::Length(0)),
            (&[(length, "007")], Framing::Length(7)),
            (&[(length, "18446744073709551615")], Framing::Length(u64::MAX)),
            (&[(length, "5"), (length, "05")], Framing::Length(5)),
            (&[(coding, "chunked")], Framing::Chunked),
            (&[(coding, " CHUNKED ")], Framing::Chunked),
        ] {
            assert_eq!(framing(fields), Ok(expected), "{fields:?}");
        }
        for fields in [
            &[(length, "")][..],
            &[(length, "+5")],
            &[(length, "-5")],
            &[(length, "5 ")],
            &[(length, "0x5")],
            &[(length, "5, 5")],
            &[(length, "18446744073709551616")],
            &[(length, "5"), (length, "6")],
            &[(length, "5"), (length, "5"), (length, "x")],
            &[(length, "0"), (coding, "chunked")],
            &[(coding, "chunked"), (length, "5")],
            &[(coding, "")],
            &[(coding, "identity")],
            &[(coding, "gzip, chunked")],
            &[(coding, "chunked, chunked")],
            &[(coding, "chunked"), (coding, "chunked")],
            &[(coding, "chunked;x")],
        ] {
            assert!(framing(fields).is_err(), "{fields:?}");
        }
    }

    #[test]
    fn a_request_is_written_as_it_stands() {
        for target in ["/a?b=c%20d", "/"] {
            let mut headers = HeaderMap::new();
            headers.append("b", HeaderValue::from_static("1"));
            headers.append("a", HeaderValue::from_static(""));
            headers.append("b", HeaderValue::from_bytes(b"d\xe9j\xe0\tvu").expect("a value"));
            let written = target.as_bytes();
            let target = PathAndQuery::from_static(target);
            let mut out = b"before".to_vec();
            encode(&mut out, &RequestHead { method: Method::from_bytes(b"PROPFIND").expect("a method"), target, headers });
            let expected = [b"beforePROPFIND ", written, b" HTTP/1.1\r\nb: 1\r\nb: d\xe9j\xe0\tvu\r\na: \r\n\r\n"].concat();
            assert_eq!(out, expected, "{}", String::from_utf8_lossy(&out));
        }
    }
}
