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
#[derive(Debug, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
        // RFC 9112 section 6.1 to 6.3: no framing belongs there, and what it announces may come, and pass for the next response.
        let is_doubtful = head.status == StatusCode::NO_CONTENT && !matches!(framing, Framing::None | Framing::Length(0));
        *self = match framing {
            _ if has_no_body => Self::Ended,
            Framing::Length(0) => Self::Ended,
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunk::Size),
            Framing::None => Self::UntilClose,
        };
        Ok(*self != Self::UntilClose && !is_doubtful && head.status != StatusCode::SWITCHING_PROTOCOLS)
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
            // The parser ends a line at a line feed alone, where others do not: what they take for more trailers would be the next response here.
            if memchr::memchr_iter(b'\n', &received[..length]).any(|at| at == 0 || received[at - 1] != b'\r') {
                return Err(MALFORMED);
            }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// What came of a body.
    #[derive(Debug, PartialEq, Eq)]
    struct Outcome {
        body: Vec<u8>,
        trailers: Option<HeaderMap>,
        /// What is behind it; whether it ended, or why it never will.
        end: Result<(bool, Vec<u8>), String>,
    }

    /// Decodes `pieces` as they arrive one after another.
    fn decoded<'a>(mut decoder: Decoder, pieces: impl IntoIterator<Item = &'a [u8]>) -> Outcome {
        let (mut body, mut trailers) = (Vec::new(), None);
        let mut received = BytesMut::new();
        for piece in pieces {
            received.extend_from_slice(piece);
            loop {
                match decoder.decode(&mut received) {
                    Ok(None) => break,
                    Ok(Some(frame)) => match frame.into_data() {
                        Ok(data) => {
                            assert!(!data.is_empty() && trailers.is_none());
                            body.extend_from_slice(&data);
                        }
                        Err(frame) => assert_eq!(trailers.replace(frame.into_trailers().expect("trailers")), None),
                    },
                    Err(error) => return Outcome { body, trailers, end: Err(error.to_string()) },
                }
            }
        }
        Outcome { body, trailers, end: Ok((decoder.is_ended(), received.to_vec())) }
    }

    fn chunked(bytes: &[u8]) -> Outcome {
        decoded(Decoder::Chunked(Chunk::Size), [bytes])
    }

    fn head(version: Version, status: u16, fields: &[(&'static str, &'static str)]) -> response::Parts {
        let response = http::Response::builder().version(version).status(status);
        let response = fields.iter().fold(response, |response, (name, value)| response.header(*name, *value));
        response.body(()).expect("a response").into_parts().0
    }

    #[test]
    fn a41_a42_a44_the_head_says_where_the_body_ends() {
        let (length, none, coding) = (&[("content-length", "5")][..], &[][..], &[("transfer-encoding", "chunked")][..]);
        let no_length = &[("content-length", "0")][..];
        let chunks = || Decoder::Chunked(Chunk::Size);
        for (to_head, status, fields, expected, delimited) in [
            (false, 200, length, Decoder::Length(5), true),
            (false, 200, no_length, Decoder::Ended, true),
            (false, 200, coding, chunks(), true),
            (false, 200, none, Decoder::UntilClose, false),
            (false, 205, none, Decoder::UntilClose, false),
            (false, 404, length, Decoder::Length(5), true),
            (true, 200, length, Decoder::Ended, true),
            (true, 200, coding, Decoder::Ended, true),
            (true, 404, none, Decoder::Ended, true),
            (false, 304, length, Decoder::Ended, true),
            (false, 304, coding, Decoder::Ended, true),
            (false, 304, none, Decoder::Ended, true),
            (false, 204, none, Decoder::Ended, true),
            (false, 204, no_length, Decoder::Ended, true),
            // It may come all the same, and late.
            (false, 204, length, Decoder::Ended, false),
            (false, 204, coding, Decoder::Ended, false),
            (false, 101, none, Decoder::Ended, false),
        ] {
            let mut decoder = Decoder::awaiting_head(to_head);
            assert_eq!(decoder.begin(&head(Version::HTTP_11, status, fields)).expect("one framing"), delimited, "{status} {fields:?}");
            assert_eq!(decoder, expected, "{status} {fields:?}");
        }
        let mut decoder = Decoder::awaiting_head(false);
        assert!(decoder.begin(&head(Version::HTTP_10, 200, length)).expect("one framing"));
        assert!(decoder.begin(&head(Version::HTTP_10, 200, coding)).is_err(), "chunks in HTTP/1.0");
        assert!(decoder.begin(&head(Version::HTTP_11, 204, &[length, coding].concat())).is_err(), "two framings");
    }

    #[test]
    fn a43_a60_a_length_is_met_exactly() {
        for (bytes, body, ended, leftover) in
            [("", "", false, ""), ("hell", "hell", false, ""), ("hello", "hello", true, ""), ("hello world", "hello", true, " world")]
        {
            let outcome = decoded(Decoder::Length(5), [bytes.as_bytes()]);
            assert_eq!(outcome, Outcome { body: body.into(), trailers: None, end: Ok((ended, leftover.into())) });
        }
        assert_eq!(decoded(Decoder::UntilClose, [&b"any"[..], b"thing"]).body, b"anything");
        let nothing_taken = Outcome { body: Vec::new(), trailers: None, end: Ok((true, b"x".to_vec())) };
        assert_eq!(decoded(Decoder::Ended, [&b"x"[..]]), nothing_taken);
    }

    #[test]
    fn a32_a43_chunks_are_read_to_their_end_and_no_further() {
        for (bytes, body, leftover) in [
            ("0\r\n\r\n", "", ""),
            ("000\r\n\r\nx", "", "x"),
            ("5\r\nhello\r\n0\r\n\r\n", "hello", ""),
            ("5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n\r\n", "hello world", "\r\n"),
            ("A\r\n0123456789\r\n0\r\n\r\n", "0123456789", ""),
            ("a;name=\"v;\";x\r\n0123456789\r\n0;y\r\n\r\n", "0123456789", ""),
            ("5 \t;x\r\nhello\r\n0 \r\n\r\n", "hello", ""),
            ("0000000000000005\r\nhello\r\n0\r\n\r\n", "hello", ""),
        ] {
            assert_eq!(
                chunked(bytes.as_bytes()),
                Outcome { body: body.into(), trailers: None, end: Ok((true, leftover.into())) },
                "{bytes:?}"
            );
        }
        assert_eq!(chunked(b"ffffffffffffffff\r\nx"), Outcome { body: b"x".to_vec(), trailers: None, end: Ok((false, Vec::new())) });
    }

    #[test]
    fn a31_b04_broken_chunks_are_refused() {
        for bytes in [
            "\r\n",
            "\n",
            ";x\r\n",
            " 5\r\n",
            "-5\r\n",
            "+5\r\n",
            "0x5\r\n",
            "5x\r\n",
            "5 5\r\n",
            "5\n",
            "5\rx",
            "5;x\n\r\n",
            "5;x\rx",
            "00000000000000005\r\n",
            "10000000000000000\r\n",
            "1\r\nxy\r\n",
            "1\r\nx\n0",
            "1\r\nx\r\r",
            "1\r\nx0\r\n\r\n",
        ] {
            let outcome = chunked(bytes.as_bytes());
            assert!(outcome.end.is_err(), "{bytes:?}: {outcome:?}");
            assert!(outcome.body.len() <= 1);
        }
    }

    #[test]
    fn a32_a_line_with_a_size_is_bounded() {
        let line = |length: usize| format!("5;{}\r\n", "x".repeat(length - 4));
        assert_eq!(chunked(format!("{}hello\r\n0\r\n\r\n", line(MAX_SIZE_LINE)).as_bytes()).body, b"hello");
        assert!(chunked(line(MAX_SIZE_LINE + 1).as_bytes()).end.is_err());
        assert!(chunked(&line(MAX_SIZE_LINE + 9).as_bytes()[..MAX_SIZE_LINE]).end.is_ok());
        assert!(chunked(&line(MAX_SIZE_LINE + 9).as_bytes()[..=MAX_SIZE_LINE]).end.is_err());
    }

    #[test]
    fn a34_a35_trailers_are_read_and_bounded() {
        let behind = |trailers: &str| chunked(format!("0\r\n{trailers}").as_bytes());
        let outcome = behind("A: 1\r\nb:\r\na: 2 \r\n\r\nx");
        let trailers = outcome.trailers.expect("trailers");
        assert_eq!(trailers.get_all("a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!((trailers.len(), outcome.end), (3, Ok((true, b"x".to_vec()))));

        for malformed in
            ["a\r\n\r\n", "a : 1\r\n\r\n", " a: 1\r\n\r\n", "a: 1\r\n b\r\n\r\n", "a: \0\r\n\r\n", ": 1\r\n\r\n", "a: 1\r2\r\n\r\n"]
        {
            assert!(behind(malformed).end.is_err(), "{malformed:?}");
        }

        // Others go on reading behind a line feed alone, and what is behind the trailers would be the next response to us.
        for malformed in ["\n", "a: 1\n\r\n", "a: 1\r\n\n", "a: 1\nb: 2\r\n\r\n", "a:\n\r\n"] {
            assert!(behind(malformed).end.is_err(), "{malformed:?}");
        }

        let long = |length: usize| format!("a: {}\r\n\r\n", "v".repeat(length - 7));
        assert!(behind(&long(MAX_TRAILERS)).end.is_ok_and(|(ended, _)| ended));
        assert!(behind(&long(MAX_TRAILERS + 1)).end.is_err());
        assert!(behind(&long(MAX_TRAILERS + 9)[..MAX_TRAILERS]).end.is_ok_and(|(ended, _)| !ended));
        assert!(behind(&long(MAX_TRAILERS + 9)[..=MAX_TRAILERS]).end.is_err());

        let many = |count| format!("{}\r\n", "a: 1\r\n".repeat(count));
        assert_eq!(behind(&many(head::MAX_FIELDS)).trailers.map(|trailers| trailers.len()), Some(head::MAX_FIELDS));
        assert!(behind(&many(head::MAX_FIELDS + 1)).end.is_err());
    }

    #[test]
    fn d15_only_an_open_ended_body_ends_with_its_connection() {
        for mut complete in [Decoder::UntilClose, Decoder::Ended] {
            assert!(complete.end_of_connection().is_ok() && complete.is_ended());
        }
        let chunks = [Chunk::Size, Chunk::Data(1), Chunk::DataEnd, Chunk::Trailers].map(Decoder::Chunked);
        for mut cut in chunks.into_iter().chain([Decoder::awaiting_head(false), Decoder::awaiting_head(true), Decoder::Length(1)]) {
            assert!(matches!(cut.end_of_connection(), Err(Error::Closed)) && !cut.is_ended(), "{cut:?}");
        }
    }

    #[test]
    fn the_size_is_known_where_there_is_a_length() {
        let mut decoder = Decoder::Length(5);
        decoder.decode(&mut BytesMut::from("he")).expect("data");
        assert_eq!(decoder.size_hint().exact(), Some(3));
        assert_eq!(Decoder::Ended.size_hint().exact(), Some(0));
        for unknown in [Decoder::awaiting_head(true), Decoder::Chunked(Chunk::Size), Decoder::UntilClose] {
            assert_eq!((unknown.size_hint().lower(), unknown.size_hint().upper()), (0, None));
        }
    }

    /// Bytes that mean something to a decoder, among others.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            prop::sample::select(vec![
                "\r\n",
                "\r\n\r\n",
                "\n",
                "\r",
                "0",
                "5",
                "5\r\nhello\r\n",
                "0\r\n\r\n",
                ";x",
                " ",
                "a: 1\r\n",
                "0\r\na: 1\r\n\r\n"
            ])
            .prop_map(|piece| piece.as_bytes().to_vec()),
            prop::collection::vec(any::<u8>(), 0..8),
        ];
        prop::collection::vec(piece, 0..16).prop_map(|pieces| pieces.concat())
    }

    fn decoder() -> impl Strategy<Value = Decoder> {
        prop_oneof![
            (1..40_u64).prop_map(Decoder::Length),
            Just(Decoder::Chunked(Chunk::Size)),
            (1..40_u64).prop_map(|left| Decoder::Chunked(Chunk::Data(left))),
            Just(Decoder::Chunked(Chunk::DataEnd)),
            Just(Decoder::Chunked(Chunk::Trailers)),
            Just(Decoder::UntilClose),
            Just(Decoder::Ended),
        ]
    }

    proptest! {
        /// A60: whatever arrives in whatever pieces, the same comes of it as if it had arrived at once, and no more than the framing says.
        #[test]
        fn a60_how_the_bytes_are_split_makes_no_difference(bytes in bytes(), decoder in decoder(), cuts in prop::collection::vec(any::<Index>(), 0..8)) {
            let at_once = decoded(decoder.clone(), [&bytes[..]]);
            if let Decoder::Length(left) = &decoder {
                prop_assert!(at_once.body.len() as u64 <= *left);
            }
            let left = at_once.end.as_ref().map_or(0, |(_, leftover)| leftover.len());
            prop_assert!(at_once.body.len() + left <= bytes.len());

            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]);
            prop_assert_eq!(decoded(decoder, pieces), at_once);
        }

        /// What was put into chunks comes out of them, trailers and the bytes behind included.
        #[test]
        fn a60_what_is_in_the_chunks_comes_out(
            chunks in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40), "(;[a-z=\"\t ]{0,8})?"), 0..6),
            trailers in prop::collection::vec("[a-z]{1,8}", 0..4),
            behind in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut bytes = Vec::new();
            for (data, extension) in &chunks {
                bytes.extend_from_slice(format!("{:X}{extension}\r\n", data.len()).as_bytes());
                bytes.extend_from_slice(data);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n");
            for name in &trailers {
                bytes.extend_from_slice(format!("{name}: {name}\r\n").as_bytes());
            }
            bytes.extend_from_slice(b"\r\n");
            bytes.extend_from_slice(&behind);
            let outcome = chunked(&bytes);
            prop_assert_eq!(outcome.body, chunks.iter().flat_map(|(data, _)| data).copied().collect::<Vec<_>>());
            prop_assert_eq!(outcome.trailers.map_or(0, |fields| fields.len()), trailers.len());
            prop_assert_eq!(outcome.end, Ok((true, behind)));
        }
    }
}
