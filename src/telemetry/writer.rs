//! Log lines on their way to stderr: whoever logs copies a line into a bounded buffer, one thread writes the buffer out.
//!
//! So a request never waits for stderr, not even for a pipe that nobody reads: when the buffer is full, lines are dropped and counted, access lines
//! first. It also saves a system call per line, since the thread lets lines gather for [`LINGER`]. A stderr that fails (closed, `EPIPE`) costs its
//! lines and nothing else.
//!
//! One event is one line: control characters inside it are escaped here, whatever the formatter does (RUSTSEC-2025-0055 is what happens otherwise).

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

use crate::sandbox;

/// Bytes that may wait for stderr.
const CAPACITY: usize = 512 << 10;
/// Access lines leave this much of it to lines that matter more.
const RESERVE: usize = 128 << 10;
/// How long lines gather before they are written; not noticed by a person, and a hundred writes a second at most.
const LINGER: Duration = Duration::from_millis(10);
/// Enough to be written without lingering.
const BATCH: usize = 64 << 10;
/// How long the end of the program waits for stderr to take the last lines.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// The near end of the buffer, as the formatter wants it. Cloning shares the buffer.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    shared: Arc<Shared>,
    /// Whether the formatter writes escape sequences for colour, which must then pass. The same in a value can do no more than colour.
    colour: bool,
}

#[derive(Debug)]
struct Shared {
    buffer: Mutex<Buffer>,
    wake: Condvar,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Buffer {
    lines: Vec<u8>,
    closing: bool,
}

/// Writes what is buffered and ends the thread when it is dropped, within [`FLUSH_DEADLINE`].
#[derive(Debug)]
pub(super) struct FlushGuard {
    shared: Arc<Shared>,
    ended: mpsc::Receiver<()>,
}

/// Starts the thread, which writes to `out`; it ends with the guard. Sandboxed, it can open nothing: it runs before [`sandbox::Prepared::enter`], which
/// holds for later threads only. Also returns the count of dropped lines.
pub(super) fn start(out: impl Write + Send + 'static, colour: bool, sandboxed: bool) -> io::Result<(Lines, FlushGuard, Arc<AtomicU64>)> {
    let dropped = Arc::new(AtomicU64::new(0));
    let shared = Arc::new(Shared { buffer: Mutex::default(), wake: Condvar::new(), dropped: Arc::clone(&dropped) });
    let (end, ended) = mpsc::channel();
    let thread = Arc::clone(&shared);
    std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || {
        if sandboxed {
            sandbox::close_thread();
        }
        thread.write_until_closed(out);
        let _ = end.send(()); // Fails where the guard gave up waiting.
    })?;
    Ok((Lines { shared: Arc::clone(&shared), colour }, FlushGuard { shared, ended }, dropped))
}

impl Shared {
    /// A panic while the lock was held leaves at worst a line cut short.
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8], colour: bool, limit: usize) {
        let mut buffer = self.lock();
        let before = buffer.lines.len();
        if before + line.len() > limit || buffer.closing {
            self.dropped.fetch_add(1, Relaxed);
            return;
        }
        escape_into(&mut buffer.lines, line, colour);
        // The thread sleeps only while the buffer is empty, and lingers while it is small: no wake-up for the lines in between.
        if before == 0 || (before < BATCH && buffer.lines.len() >= BATCH) {
            self.wake.notify_one();
        }
    }

    fn write_until_closed(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        loop {
            let buffer = self.lock();
            let buffer = self.wake.wait_while(buffer, |buffer| buffer.lines.is_empty() && !buffer.closing);
            let buffer = buffer.unwrap_or_else(PoisonError::into_inner);
            let gathering = |buffer: &mut Buffer| buffer.lines.len() < BATCH && !buffer.closing;
            let mut buffer = self.wake.wait_timeout_while(buffer, LINGER, gathering).unwrap_or_else(PoisonError::into_inner).0;
            std::mem::swap(&mut buffer.lines, &mut batch);
            let closing = buffer.closing;
            drop(buffer);

            if out.write_all(&batch).and_then(|()| out.flush()).is_err() {
                let lines = batch.split(|byte| *byte == b'\n').count() - 1;
                self.dropped.fetch_add(lines as u64, Relaxed);
            }
            batch.clear();
            if closing {
                return;
            }
        }
    }
}

impl Drop for FlushGuard {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_one();
        // A stderr that blocks for ever must not keep the program from ending.
        let _ = self.ended.recv_timeout(FLUSH_DEADLINE);
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { lines: self, limit: CAPACITY }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line<'a> {
        let reserve = if event.target() == super::access::TARGET { RESERVE } else { 0 };
        Line { lines: self, limit: CAPACITY - reserve }
    }
}

/// Takes one event. The formatter hands it over in one piece, its line end included.
#[derive(Debug)]
pub(super) struct Line<'a> {
    lines: &'a Lines,
    limit: usize,
}

impl Write for Line<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.lines.shared.push(event, self.lines.colour, self.limit);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Appends `event` as one line. What is escaped reads the same in JSON, where it is a legal escape, and in plain text.
fn escape_into(lines: &mut Vec<u8>, event: &[u8], colour: bool) {
    let event = event.strip_suffix(b"\n").unwrap_or(event);
    let mut plain = 0;
    for (index, byte) in event.iter().enumerate() {
        let code = match byte {
            b'\t' => continue,
            0x1b if colour && begins_with_colour(&event[index..]) => continue,
            0x00..=0x1f | 0x7f => *byte,
            // C1 control characters, two bytes in UTF-8.
            0xc2 => match event.get(index + 1) {
                Some(second @ 0x80..=0x9f) => *second,
                _ => continue,
            },
            _ => continue,
        };
        // `plain` may already be past a byte that was escaped with its predecessor.
        lines.extend_from_slice(&event[plain..index]);
        plain = index + if *byte == 0xc2 { 2 } else { 1 };
        match code {
            b'\n' => lines.extend_from_slice(b"\\n"),
            b'\r' => lines.extend_from_slice(b"\\r"),
            _ => lines.extend_from_slice(format!("\\u{code:04x}").as_bytes()),
        }
    }
    lines.extend_from_slice(&event[plain..]);
    lines.push(b'\n');
}

/// Whether a "select graphic rendition" stands here, `ESC [ 0;31 m`: the one escape sequence that the formatter uses (ECMA-48 section 8.3.117).
fn begins_with_colour(text: &[u8]) -> bool {
    let parameters = text.strip_prefix(b"\x1b[").unwrap_or_default();
    parameters.iter().find(|byte| !matches!(byte, b'0'..=b'9' | b';')) == Some(&b'm')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B41: nothing inside an event ends its line or reaches a terminal as a command.
    #[test]
    fn b41_one_event_is_one_line_without_control_characters() {
        let rows: [(&str, bool, &str); 9] = [
            ("plain\n", false, "plain\n"),
            ("no line end", false, "no line end\n"),
            ("a\nb\r\nc\n", false, "a\\nb\\r\\nc\n"),
            ("\x1b[31mred\n", false, "\\u001b[31mred\n"),
            ("\x1b[31mred\x07\n", true, "\x1b[31mred\\u0007\n"),
            ("\x1b]0;title \x1b[2J\x1b[3\n", true, "\\u001b]0;title \\u001b[2J\\u001b[3\n"),
            ("nul \0 del \x7f tab \t\n", false, "nul \\u0000 del \\u007f tab \t\n"),
            ("c1 \u{80}\u{9f} kept ä\u{a0}\n", false, "c1 \\u0080\\u009f kept ä\u{a0}\n"),
            ("\n", false, "\n"),
        ];
        for (event, colour, expected) in rows {
            let mut lines = Vec::new();
            escape_into(&mut lines, event.as_bytes(), colour);
            assert_eq!(String::from_utf8(lines).unwrap(), expected, "{event:?}");
        }
    }

    #[test]
    fn writes_every_line_in_order_before_the_guard_is_gone() {
        let (out, written) = Shown::new();
        let (lines, guard, dropped) = start(out, false, false).unwrap();
        for number in 0..1000 {
            lines.make_writer().write_all(format!("line {number}\n").as_bytes()).unwrap();
        }
        drop(guard);
        let expected = (0..1000).map(|number| format!("line {number}\n")).collect::<Vec<_>>().concat();
        assert_eq!(String::from_utf8(written.lock().unwrap().clone()).unwrap(), expected);
        assert_eq!(dropped.load(Relaxed), 0);
    }

    /// A stderr that nobody reads: logging neither blocks nor grows, the lines are counted, and the end comes all the same.
    #[test]
    fn a_blocked_stderr_blocks_nobody() {
        let (unblock, blocked) = mpsc::channel::<()>();
        let (lines, guard, dropped) = start(Blocked(blocked), false, false).unwrap();
        let line = vec![b'x'; 1023];
        let count = 3 * CAPACITY / (line.len() + 1);
        for _ in 0..count {
            lines.make_writer().write_all(&line).unwrap();
        }
        // The thread holds one batch, the buffer another.
        assert!(dropped.load(Relaxed) >= count as u64 / 3, "{} of {count} dropped", dropped.load(Relaxed));
        drop(guard); // Returns at its deadline although the thread is still blocked.
        drop(unblock);
    }

    #[test]
    fn a_failing_stderr_costs_its_lines_alone() {
        let (lines, guard, dropped) = start(Broken, false, false).unwrap();
        lines.make_writer().write_all(b"one\n").unwrap();
        lines.make_writer().write_all(b"two\n").unwrap();
        drop(guard);
        assert_eq!(dropped.load(Relaxed), 2);
        lines.make_writer().write_all(b"after the end\n").unwrap();
        assert_eq!(dropped.load(Relaxed), 3);
    }

    struct Shown(Arc<Mutex<Vec<u8>>>);

    impl Shown {
        fn new() -> (Self, Arc<Mutex<Vec<u8>>>) {
            let written = Arc::default();
            (Self(Arc::clone(&written)), written)
        }
    }

    impl Write for Shown {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Blocked(mpsc::Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
