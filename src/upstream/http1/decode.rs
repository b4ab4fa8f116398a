//! Where the body of a response ends, and what is in it (RFC 9112 sections 6.3 and 7.1). Pure.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version, response};
use http_body::{Frame, SizeHint};

use super::Error;
use super::head::{self, Framing};

/// A line with a chunk's size and its extensions, in bytes.
const MAX_SIZE_LINE: usize = 16 * 1024;
/// All trailer fields together, in bytes.
const MAX_TRAILERS: usize = 16 * 1024;

/// What is left of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoder {
    /// All of it, its head included.
    Head {
        /// The request was a HEAD.
        to_head: bool,
    },
    /// So many bytes.
    Length(u64),
    Chunked(Chunk),
    /// Whatever comes before the connection ends.
    UntilClose,
    Ended,
}

/// What comes next in a chunked body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    Size,
    /// So many bytes, then a line end.
    Data(u64),
    DataEnd,
    Trailers,
}

impl Decoder {
    /// A response to come.
    pub(super) fn awaiting_head(to_head: bool) -> Self {
        Self::Head { to_head }
    }

    /// The head is there. Tells whether the response ends before its connection does, which could then carry another.
    pub(super) fn begin(&mut self, head: &response::Parts) -> Result<bool, Error> {
        let framing = head::framing(&head.headers).map_err(Error::Malformed)?;
        if head.version == Version::HTTP_10 && framing == Framing::Chunked {
            // RFC 9112 section 6.1: HTTP/1.0 has no transfer codings; the framing is faulty.
            return Err(Error::Malformed("its framing is ambiguous: transfer-encoding in HTTP/1.0"));
        }
        let has_no_body = *self == Self::Head { to_head: true }
            || head.status.is_informational()
            || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        *self = match framing {
            _ if has_no_body => Self::Ended,
            Framing::Length(0) => Self::Ended,
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunk::Size),
            Framing::None => Self::UntilClose,
        };
        Ok(*self != Self::UntilClose && head.status != StatusCode::SWITCHING_PROTOCOLS)
    }

    /// The next piece of the body, taken off `received`; nothing where more has to be received, or at the end.
    pub(super) fn decode(&mut self, received: &mut BytesMut) -> Result<Option<Frame<Bytes>>, Error> {
        loop {
            match self {
                Self::Head { .. } | Self::Ended => return Ok(None),
                Self::UntilClose => return Ok(take(received, u64::MAX).map(Frame::data)),
                Self::Length(left) | Self::Chunked(Chunk::Data(left)) => {
                    let Some(data) = take(received, *left) else { return Ok(None) };
                    *left -= data.len() as u64;
                    if *left == 0 {
                        *self = if matches!(self, Self::Length(_)) { Self::Ended } else { Self::Chunked(Chunk::DataEnd) };
                    }
                    return Ok(Some(Frame::data(data)));
                }
                Self::Chunked(Chunk::Size) => {
                    let Some(size) = take_size(received)? else { return Ok(None) };
                    *self = Self::Chunked(if size == 0 { Chunk::Trailers } else { Chunk::Data(size) });
                }
                Self::Chunked(Chunk::DataEnd) => {
                    if received.len() < 2 {
                        return Ok(None);
                    }
                    if !received.starts_with(b"\r\n") {
                        return Err(Error::Malformed("a chunk is longer than its size says"));
                    }
                    received.advance(2);
                    *self = Self::Chunked(Chunk::Size);
                }
                Self::Chunked(Chunk::Trailers) => {
                    let Some(trailers) = take_trailers(received)? else { return Ok(None) };
                    *self = Self::Ended;
                    return Ok(if trailers.is_empty() { None } else { Some(Frame::trailers(trailers)) });
                }
            }
        }
    }

    /// The connection ended. Fails where the response did not.
    pub(super) fn end_of_connection(&mut self) -> Result<(), Error> {
        match self {
            Self::UntilClose | Self::Ended => {
                *self = Self::Ended;
                Ok(())
            }
            Self::Head { .. } | Self::Length(_) | Self::Chunked(_) => Err(Error::Closed),
        }
    }

    pub(super) fn is_ended(&self) -> bool {
        *self == Self::Ended
    }

    /// How much of the body is to come, where that is known.
    pub(super) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Length(left) => SizeHint::with_exact(*left),
            Self::Ended => SizeHint::with_exact(0),
            Self::Head { .. } | Self::Chunked(_) | Self::UntilClose => SizeHint::default(),
        }
    }
}

/// Up to `limit` bytes of what was received; nothing where there are none.
fn take(received: &mut BytesMut, limit: u64) -> Option<Bytes> {
    let length = usize::try_from(limit).unwrap_or(usize::MAX).min(received.len());
    (length > 0).then(|| received.split_to(length).freeze())
}

/// The line with a chunk's size, taken off `received`; nothing before its end is there.
fn take_size(received: &mut BytesMut) -> Result<Option<u64>, Error> {
    const MALFORMED: Error = Error::Malformed("a chunk's size is malformed");
    if received.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) {
        return Err(MALFORMED);
    }
    match httparse::parse_chunk_size(received) {
        Ok(httparse::Status::Complete((length, size))) => {
            // The parser takes anything for an extension, a line feed alone included, where others end the line (Kestrel's CVE-2025-55315).
            if length > MAX_SIZE_LINE || received[..length - 2].contains(&b'\n') {
                return Err(MALFORMED);
            }
            received.advance(length);
            Ok(Some(size))
        }
        Ok(httparse::Status::Partial) if received.len() <= MAX_SIZE_LINE => Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::InvalidChunkSize) => Err(MALFORMED),
    }
}

/// The trailer fields with the empty line behind them, taken off `received`; nothing before that is there.
fn take_trailers(received: &mut BytesMut) -> Result<Option<HeaderMap>, Error> {
    const MALFORMED: Error = Error::Malformed("its trailers are malformed");
    let mut fields = [httparse::EMPTY_HEADER; head::MAX_FIELDS];
    match httparse::parse_headers(received, &mut fields) {
        Ok(httparse::Status::Complete((length, fields))) if length <= MAX_TRAILERS => {
            let mut trailers = HeaderMap::with_capacity(fields.len());
            for field in fields {
                let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| MALFORMED)?;
                trailers.append(name, HeaderValue::from_bytes(field.value).map_err(|_| MALFORMED)?);
            }
            received.advance(length);
            Ok(Some(trailers))
        }
        Ok(httparse::Status::Partial) if received.len() <= MAX_TRAILERS => Ok(None),
        Ok(_) => Err(Error::Malformed("its trailers are too long")),
        Err(httparse::Error::TooManyHeaders) => Err(Error::Malformed("it has too many trailers")),
        Err(_) => Err(MALFORMED),
    }
}
