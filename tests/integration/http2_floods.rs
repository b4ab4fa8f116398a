//! B07: an HTTP/2 upstream that floods. Memory stays flat whatever it sends without end, other requests are retried or 502, and the proxy serves on
//! afterwards. Frames that cost work or memory also cost the upstream its connection; frames that are done with at once, such as a PING, need not.
//!
//! Frames are sent as fast as the proxy takes them, bounded in number.

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, NO_ERROR, PADDED, PING, PRIORITY, PUSH_PROMISE, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, frame,
};
use crate::support::raw::Raw;
use crate::support::wire::{GET, Wire};

const POST: &str = "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody";
/// How often the pattern of a flood is repeated, at most.
const TIMES: u32 = 100_000;
/// What the process may grow by, in bytes: the buffers of one connection and the allocator's slack. What piles up is far beyond it.
const GROWTH: u64 = 8 * 1024 * 1024;
/// The head of a 200 is one indexed field (RFC 7541 appendix A).
const STATUS_200: &[u8] = &[0x88];
/// The head of a 103: a literal with an indexed name.
const STATUS_103: &[u8] = &[0x08, 3, b'1', b'0', b'3'];
/// The field `x: y`, never indexed.
const FIELD: &[u8] = &[0x10, 1, b'x', 1, b'y'];

/// What became of the flooded connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The proxy closed it.
    Dropped,
    /// All of the flood was taken.
    Taken,
    /// The proxy stopped reading, which holds the flood back.
    HeldBack,
}

/// What is sent, given the stream of the flooded request.
struct Flood<'a> {
    opening: &'a (dyn Fn(u32) -> Vec<u8> + Sync),
    /// Given the round, too.
    pattern: &'a (dyn Fn(u32, u32) -> Vec<u8> + Sync),
    times: u32,
    /// Whether the upstream reads what the proxy says meanwhile.
    reads: bool,
}

impl Flood<'_> {
    /// Floods a proxy, and checks what must hold afterwards.
    fn run(&self) -> End {
        // At level trace the log would be a flood of its own.
        let wire = Wire::with(|builder| builder.set("upstream.http_version=2").env("RUST_LOG", "info"));
        let mut warm = send(&wire, GET);
        let mut connection = Frames::accept(&wire);
        let stream = connection.whole_request();
        connection.answer(stream, b"warm");
        assert_eq!(warm.read_response(false).expect("an answer").text(), "warm");

        let mut victim = send(&wire, POST);
        let flooded = connection.whole_request();
        let mut bystander = send(&wire, GET);
        connection.whole_request();
        let before = wire.proxy.peak_bytes();
        connection.0.try_send((self.opening)(flooded));
        let end = self.pour(connection, flooded);

        serving(&wire, || {
            // Nobody knows whether the POST was processed, so that it is not repeated; what came of its answer before is relayed, and may be cut anywhere.
            let answer = victim.read_response(false);
            assert!(answer.as_ref().is_none_or(|answer| matches!(answer.status(), 200 | 502)), "{answer:?}");
            let answer = bystander.read_response(false).expect("an answer");
            assert!(matches!((answer.status(), answer.text().as_str()), (200, "again") | (502, _)), "{answer:?}");
            for _ in 0..3 {
                assert_eq!(send(&wire, GET).read_response(false).expect("an answer").text(), "again");
            }
            assert_flat(&wire, before);
        });
        end
    }

    /// Sends the pattern until the flood or the connection ends.
    fn pour(&self, mut connection: Frames, stream: u32) -> End {
        let mut writer = connection.0.stream().try_clone().expect("a socket");
        if !self.reads {
            writer.set_write_timeout(Some(Duration::from_secs(1))).expect("a socket");
        }
        let end_mark = *b"the end!";
        let mut write = || {
            let mut buffer = Vec::new();
            for round in 0..self.times {
                buffer.extend((self.pattern)(stream, round));
                if buffer.len() > 32 * 1024 {
                    writer.write_all(&buffer)?;
                    buffer.clear();
                }
            }
            buffer.extend(frame(PING, 0, 0, &end_mark));
            writer.write_all(&buffer)
        };
        // The proxy closes, or answers the last PING.
        let mut read = || {
            loop {
                match connection.next() {
                    None => return End::Dropped,
                    Some((PING, ACK, _, payload)) if payload == end_mark => return End::Taken,
                    Some(_) => {}
                }
            }
        };
        if self.reads {
            std::thread::scope(|scope| {
                // Its error is the connection's end, which the reader sees.
                scope.spawn(|| write().ok());
                read()
            })
        } else {
            match write() {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => End::HeldBack,
                Ok(()) | Err(_) => read(),
            }
        }
    }
}

fn send(wire: &Wire, request: &str) -> Raw {
    let mut downstream = wire.proxy.connect();
    downstream.send(request);
    downstream
}

/// Runs `check` while an upstream that behaves answers all new connections; ends with the proxy.
fn serving(wire: &Wire, check: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let Some(connection) = wire.upstream.try_accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                let mut connection = Frames::begin(connection);
                scope.spawn(move || {
                    while let Some((kind, flags, stream)) = connection.read() {
                        if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
                            connection.answer(stream, b"again");
                        }
                    }
                });
            }
        });
        let _ending = Ending { wire, done: &done };
        check();
    });
}

/// Ends the upstream of [`serving`], a failed check included: without the proxy its connections end, and with them their threads.
struct Ending<'a> {
    wire: &'a Wire,
    done: &'a AtomicBool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        self.wire.proxy.signal(rustix::process::Signal::TERM);
    }
}

/// `before` is what the process had at its peak until the flood.
fn assert_flat(wire: &Wire, before: u64) {
    let grown = wire.proxy.peak_bytes().saturating_sub(before);
    assert!(grown < GROWTH, "{grown} bytes more");
}

fn nothing(_stream: u32) -> Vec<u8> {
    Vec::new()
}

/// The head of a 200 whose body is to come.
fn head(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, STATUS_200)
}

fn be(number: u32) -> [u8; 4] {
    number.to_be_bytes()
}

/// Floods twice: by an upstream that reads, and by one that does not and so may fill the proxy's buffers with answers. The first one's end.
fn flood(opening: &(dyn Fn(u32) -> Vec<u8> + Sync), pattern: &(dyn Fn(u32, u32) -> Vec<u8> + Sync)) -> End {
    let end = Flood { opening, pattern, times: TIMES, reads: true }.run();
    Flood { opening, pattern, times: TIMES, reads: false }.run();
    end
}

/// CVE-2023-44487 from the other side: streams that the upstream opens and resets.
#[test]
fn b07_rapid_reset_of_pushed_streams() {
    let end = flood(&nothing, &|stream, round| {
        let pushed = 2 * round + 2;
        let promise = frame(PUSH_PROMISE, END_HEADERS, stream, &[&be(pushed)[..], &[0x82, 0x86, 0x84]].concat());
        [promise, frame(RST_STREAM, 0, pushed, &be(NO_ERROR))].concat()
    });
    assert_eq!(end, End::Dropped);
}

/// RUSTSEC-2024-0332: a head without end.
#[test]
fn b07_continuations() {
    let opening = |stream| frame(HEADERS, 0, stream, STATUS_200);
    for payload in [&[][..], FIELD, &FIELD.repeat(1000)] {
        assert_eq!(flood(&opening, &|stream, _| frame(CONTINUATION, 0, stream, payload)), End::Dropped, "{}", payload.len());
    }
}

/// RUSTSEC-2026-0258: frames of a body that carry none of it, or hardly any.
#[test]
fn b07_empty_data() {
    assert_eq!(flood(&head, &|stream, _| frame(DATA, 0, stream, &[])), End::Dropped);
    assert_eq!(flood(&head, &|stream, _| frame(DATA, PADDED, stream, &[255; 256])), End::Dropped);
    flood(&head, &|stream, _| frame(DATA, 0, stream, b"x"));
}

/// RUSTSEC-2024-0003, RUSTSEC-2023-0034: frames for streams that have ended, which the protocol answers with resets.
#[test]
fn b07_frames_for_ended_streams() {
    let ended = |stream| [head(stream), frame(DATA, END_STREAM, stream, b"")].concat();
    flood(&ended, &|stream, _| frame(DATA, 0, stream, b"late"));
    flood(&ended, &|stream, _| frame(HEADERS, END_HEADERS, stream, STATUS_200));
    flood(&ended, &|stream, _| frame(RST_STREAM, 0, stream, &be(NO_ERROR)));
    assert_eq!(flood(&nothing, &|_, round| frame(HEADERS, END_HEADERS, 2 * round + 101, STATUS_200)), End::Dropped);
    assert_eq!(flood(&nothing, &|_, round| frame(RST_STREAM, 0, 2 * round + 101, &be(NO_ERROR))), End::Dropped);
}

/// Frames that ask for an answer or for work each.
#[test]
fn b07_settings_and_pings() {
    flood(&nothing, &|_, _| frame(PING, 0, 0, b"pingping"));
    flood(&nothing, &|_, _| frame(SETTINGS, 0, 0, &[]));
    flood(&nothing, &|_, round| frame(SETTINGS, 0, 0, &[&[0, 4][..], &be(round)].concat()));
    flood(&nothing, &|_, round| frame(SETTINGS, 0, 0, &[&[0, 1][..], &be(round)].concat()));
}

/// Frames that ask for nothing.
#[test]
fn b07_priorities_windows_unknown_frames_and_interim_heads() {
    flood(&nothing, &|stream, _| frame(PRIORITY, 0, stream, &[0, 0, 0, 0, 1]));
    flood(&nothing, &|_, _| frame(WINDOW_UPDATE, 0, 0, &be(1)));
    flood(&nothing, &|stream, _| frame(WINDOW_UPDATE, 0, stream, &be(1)));
    flood(&nothing, &|_, _| frame(0xf0, 0, 0, &[0; 100]));
    flood(&nothing, &|_, _| frame(GOAWAY, 0, 0, &[&be(i32::MAX.unsigned_abs())[..], &be(NO_ERROR), &[b'x'; 100]].concat()));
    flood(&nothing, &|stream, _| frame(HEADERS, END_HEADERS, stream, STATUS_103));
}

/// A table entry of 4 kB, named 16,000 times in a head of 16 kB.
#[test]
fn b07_hpack_bomb() {
    let entry = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'y'; 4000]].concat();
    let opening = |stream| frame(HEADERS, END_HEADERS, stream, &[STATUS_200, &entry, &[0xbe; 12_000]].concat());
    let pattern = |stream, _| frame(HEADERS, END_HEADERS, stream, &[0xbe; 16_000]);
    // Few: each of them is 64 MB for whoever unpacks it.
    assert_eq!(Flood { opening: &opening, pattern: &pattern, times: 20, reads: true }.run(), End::Dropped);
}

/// A response of 10,000 fields.
#[test]
fn b07_ten_thousand_fields() {
    let fields = FIELD.repeat(10_000);
    let opening = |stream| {
        let mut frames = frame(HEADERS, 0, stream, STATUS_200);
        for part in fields.chunks(16_000) {
            frames.extend(frame(CONTINUATION, 0, stream, part));
        }
        frames.extend(frame(CONTINUATION, END_HEADERS, stream, &[]));
        frames
    };
    Flood { opening: &opening, pattern: &|_, _| Vec::new(), times: 0, reads: true }.run();
}

/// CVE-2025-8671, `MadeYouReset`: frames that make the proxy reset its own requests. Each such request fails, and in the end the connection.
#[test]
fn b07_made_you_reset() {
    let wire = Wire::with(|builder| builder.set("upstream.http_version=2").env("RUST_LOG", "info"));
    let mut downstream = wire.proxy.connect();
    let mut connections = 0;
    let mut flooder: Option<Frames> = None;
    let before = wire.proxy.peak_bytes();
    for _ in 0..3000 {
        downstream.send(GET);
        let stream = loop {
            match flooder.as_mut().map(Frames::read) {
                Some(Some((HEADERS, _, stream))) => break stream,
                Some(Some(_)) => {}
                Some(None) | None => {
                    connections += 1;
                    flooder = Some(Frames::accept(&wire));
                }
            }
        };
        // An increment of zero is an error of the stream (RFC 9113 section 6.9).
        flooder.as_mut().expect("accepted").write(WINDOW_UPDATE, 0, stream, &be(0));
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 502);
    }
    assert!(connections > 1, "the connection survived");
    assert_flat(&wire, before);
}
