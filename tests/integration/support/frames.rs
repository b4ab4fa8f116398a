//! An HTTP/2 upstream written by hand, frame by frame, so that each test says which comes when. It speaks with prior knowledge over plain TCP.

use super::raw::Raw;
use super::wire::Wire;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const PADDED: u8 = 8;

pub(crate) const NO_ERROR: u32 = 0;
pub(crate) const INTERNAL_ERROR: u32 = 2;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const CANCEL: u32 = 8;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

/// The bytes of a frame (RFC 9113 section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// One connection of the proxy, the preface read and answered.
pub(crate) struct Frames(pub(crate) Raw);

impl Frames {
    pub(crate) fn accept(wire: &Wire) -> Self {
        Self::begin(wire.upstream.accept())
    }

    pub(crate) fn begin(connection: Raw) -> Self {
        let mut connection = Self(connection);
        assert_eq!(connection.0.take(24), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        connection.write(SETTINGS, 0, 0, &[]);
        connection
    }

    pub(crate) fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.0.try_send(frame(kind, flags, stream, payload));
    }

    /// The next frame: type, flags, stream, payload. `None` at the end of the connection.
    pub(crate) fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let head = self.0.take(9);
        let &[l0, l1, l2, kind, flags, s0, s1, s2, s3] = head.as_slice() else { return None };
        let payload = self.0.take(u32::from_be_bytes([0, l0, l1, l2]) as usize);
        Some((kind, flags, u32::from_be_bytes([s0, s1, s2, s3]), payload))
    }

    /// The next frame: type, flags, stream. Answers what the protocol wants answered. `None` at the end of the connection.
    pub(crate) fn read(&mut self) -> Option<(u8, u8, u32)> {
        let (kind, flags, stream, payload) = self.next()?;
        match kind {
            SETTINGS if flags & ACK == 0 => self.write(SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => self.write(PING, ACK, 0, &payload),
            _ => {}
        }
        Some((kind, flags, stream))
    }

    /// The stream of the next request, its head alone.
    pub(crate) fn request(&mut self) -> u32 {
        loop {
            if let (HEADERS, _, stream) = self.read().expect("a request") {
                return stream;
            }
        }
    }

    /// The stream of the next request, read to its end.
    pub(crate) fn whole_request(&mut self) -> u32 {
        loop {
            if let (HEADERS | DATA, flags, stream) = self.read().expect("a request")
                && flags & END_STREAM != 0
            {
                return stream;
            }
        }
    }

    /// The head of a 200, which is one indexed field (RFC 7541 appendix A).
    pub(crate) fn ok(&mut self, stream: u32, flags: u8) {
        self.write(HEADERS, END_HEADERS | flags, stream, &[0x88]);
    }

    pub(crate) fn answer(&mut self, stream: u32, body: &[u8]) {
        self.ok(stream, 0);
        self.write(DATA, END_STREAM, stream, body);
    }

    pub(crate) fn reset(&mut self, stream: u32, reason: u32) {
        self.write(RST_STREAM, 0, stream, &reason.to_be_bytes());
    }

    pub(crate) fn go_away(&mut self, last_stream: u32, reason: u32) {
        self.write(GOAWAY, 0, 0, &[last_stream.to_be_bytes(), reason.to_be_bytes()].concat());
    }
}
