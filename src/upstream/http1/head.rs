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
    let target = request.target.as_str();
    if !target.starts_with('/') {
        // The absolute form may leave the path out; the origin form may not (RFC 9112 section 3.2.1).
        out.push(b'/');
    }
    out.extend_from_slice(target.as_bytes());
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
