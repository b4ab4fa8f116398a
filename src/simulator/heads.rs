//! Finds the request heads in the bytes of an HTTP/1.1 connection, so that a record can hold them exactly as they arrived.
//!
//! hyper hands out a parsed request; odd case, order and spacing are gone by then. This follows the framing beside it (RFC 9112 section 6) and
//! keeps each head's bytes. It judges nothing: a request that hyper refuses never asks for its head.

use std::collections::VecDeque;

/// The heads of one connection, in order of arrival.
#[derive(Debug, Default)]
pub(super) struct Heads {
    expecting: Expecting,
    /// Bytes of the unfinished head or line.
    partial: Vec<u8>,
    complete: VecDeque<Vec<u8>>,
}

/// What the next byte belongs to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Expecting {
    #[default]
    Head,
    /// So many more bytes of a body.
    Body(u64),
    ChunkSize,
    /// So many more bytes of a chunk, its line end included.
    Chunk(u64),
    Trailers,
    /// Framing that this does not understand: no further heads.
    Lost,
}

impl Heads {
    /// Takes the next bytes as they were read.
    pub(super) fn received(&mut self, mut bytes: &[u8]) {
        while let Some((&byte, rest)) = bytes.split_first() {
            match self.expecting {
                Expecting::Body(left) | Expecting::Chunk(left) => {
                    let taken = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    bytes = &bytes[taken..];
                    self.skipped(left - taken as u64);
                }
                Expecting::Lost => return,
                Expecting::Head | Expecting::ChunkSize | Expecting::Trailers => {
                    bytes = rest;
                    self.partial.push(byte);
                    self.line_bytes();
                }
            }
        }
    }

    /// The oldest head that was not taken yet; `None` for framing that was lost.
    pub(super) fn take(&mut self) -> Option<Vec<u8>> {
        self.complete.pop_front()
    }

    fn skipped(&mut self, left: u64) {
        self.expecting = match (self.expecting, left) {
            (Expecting::Chunk(_), 0) => Expecting::ChunkSize,
            (Expecting::Chunk(_), left) => Expecting::Chunk(left),
            (_, 0) => Expecting::Head,
            (_, left) => Expecting::Body(left),
        };
    }

    /// Looks whether the byte just added to `partial` completes a head, a chunk's size line or a trailer section.
    fn line_bytes(&mut self) {
        let partial = &self.partial;
        if !partial.ends_with(b"\r\n") {
            return;
        }
        match self.expecting {
            // Empty lines before a request line are skipped (RFC 9112 section 2.2).
            Expecting::Head if partial == b"\r\n" => self.partial.clear(),
            Expecting::Head if partial.ends_with(b"\r\n\r\n") => {
                self.expecting = body_of(partial);
                self.complete.push_back(std::mem::take(&mut self.partial));
            }
            Expecting::ChunkSize => {
                let digits: Vec<u8> = partial.iter().copied().take_while(u8::is_ascii_hexdigit).collect();
                let size = std::str::from_utf8(&digits).ok().and_then(|digits| u64::from_str_radix(digits, 16).ok());
                self.expecting = match size {
                    Some(0) => Expecting::Trailers,
                    Some(size) => size.checked_add(2).map_or(Expecting::Lost, Expecting::Chunk),
                    None => Expecting::Lost,
                };
                self.partial.clear();
            }
            Expecting::Trailers if partial == b"\r\n" || partial.ends_with(b"\r\n\r\n") => {
                self.expecting = Expecting::Head;
                self.partial.clear();
            }
            _ => {}
        }
    }
}

/// The fields of a head as they arrived: name and value, white space around the value removed, in order.
pub(super) fn fields(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    head.split(|&byte| byte == b'\n').skip(1).filter_map(|line| {
        let colon = line.iter().position(|&byte| byte == b':')?;
        Some((&line[..colon], line[colon + 1..].trim_ascii()))
    })
}

fn body_of(head: &[u8]) -> Expecting {
    let mut length = 0;
    for (name, value) in fields(head) {
        if name.eq_ignore_ascii_case(b"transfer-encoding") {
            return if value.eq_ignore_ascii_case(b"chunked") { Expecting::ChunkSize } else { Expecting::Lost };
        }
        if name.eq_ignore_ascii_case(b"content-length") {
            match std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok()) {
                Some(value) => length = value,
                None => return Expecting::Lost,
            }
        }
    }
    if length == 0 { Expecting::Head } else { Expecting::Body(length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: &str = "GET /a HTTP/1.1\r\nhOsT:  x \r\n\r\n";
    const SIZED: &str = "POST /b HTTP/1.1\r\nContent-Length: 6\r\n\r\n";
    const CHUNKED: &str = "POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";

    #[test]
    fn heads_are_found_whatever_stands_between_them_and_however_they_are_read() {
        let chunks = "5;x=y\r\n\r\n\r\nz\r\n0\r\n\r\n";
        let trailers = "0\r\na: b\r\nc: d\r\n\r\n";
        let rows: [(String, Vec<&str>); 5] = [
            (format!("{GET}{GET}"), vec![GET, GET]),
            (format!("\r\n\r\n{GET}"), vec![GET]),
            (format!("{SIZED}\r\n\r\nab{GET}"), vec![SIZED, GET]),
            (format!("{CHUNKED}{chunks}{GET}{CHUNKED}{trailers}{GET}"), vec![CHUNKED, GET, CHUNKED, GET]),
            (format!("{CHUNKED}nonsense\r\n{GET}"), vec![CHUNKED]),
        ];
        for (stream, expected) in rows {
            for size in [1, 2, 7, stream.len()] {
                let mut heads = Heads::default();
                stream.as_bytes().chunks(size).for_each(|part| heads.received(part));
                let found: Vec<_> = std::iter::from_fn(|| heads.take()).map(|head| String::from_utf8(head).unwrap()).collect();
                assert_eq!(found, expected, "in pieces of {size}: {stream:?}");
            }
        }
    }

    #[test]
    fn fields_keep_case_and_order() {
        let head = b"GET / HTTP/1.1\r\nB: 1\r\na:2 \r\nB:\r\n\r\n";
        let found: Vec<_> = fields(head).collect();
        assert_eq!(found, [(&b"B"[..], &b"1"[..]), (b"a", b"2"), (b"B", b"")]);
    }
}
