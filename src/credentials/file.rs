//! Reads one secret file: bounded, from regular files only, and without what editors and `kubectl --from-file` leave around a value.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::volume::Resolver;
use crate::secret::InvalidSecret;

/// A longer file is no secret; nothing more of it is read.
const MAX_FILE_BYTES: usize = 64 * 1024;
/// What some editors put in front of UTF-8.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// Reads `path` from where `resolver` says and makes a secret of its text with `new`. The error names `path` and the problem, never the content.
pub(super) fn read<T>(path: &Path, resolver: &Resolver, new: fn(String) -> Result<T, InvalidSecret>) -> Result<T, String> {
    let explain = |problem: &str| format!("{}: {problem}", path.display());
    let bytes = read_bounded(&resolver.resolve(path)).map_err(|error| explain(&error.to_string()))?;
    let text = text(&bytes).map_err(explain)?;
    new(text.to_owned()).map_err(|problem| explain(&problem.to_string()))
}

/// Opens without waiting (a FIFO without a writer would hold an ordinary open up for ever) and looks at what was opened, not at the path again.
fn read_bounded(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    // One buffer of the final size: a growing one would leave copies behind that nobody clears.
    let mut bytes = Zeroizing::new(vec![0; MAX_FILE_BYTES + 1]);
    let mut length = 0;
    while length < bytes.len() {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if length > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// The text without a byte order mark and without one line end. Everything else belongs to the value, spaces included.
pub(crate) fn text(bytes: &[u8]) -> Result<&str, &'static str> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err("it is UTF-16, not UTF-8 text; save it as UTF-8");
    }
    let text = str::from_utf8(bytes).map_err(|_| "it is not UTF-8 text")?;
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let text = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
    if text.trim().is_empty() {
        return Err(if text.is_empty() { "it is empty" } else { "it holds only white space" });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::secret::Password;

    /// C33: one line end and a byte order mark go; what is left is the value, byte for byte, or is refused.
    #[test]
    fn c33_one_line_end_and_a_byte_order_mark_go() {
        let rows: [(&[u8], Result<&str, &str>); 15] = [
            (b"secret", Ok("secret")),
            (b"secret\n", Ok("secret")),
            (b"secret\r\n", Ok("secret")),
            (b"\xef\xbb\xbfsecret\n", Ok("secret")),
            (b"two words\n", Ok("two words")),
            (b" leading\n", Ok(" leading")),
            (b"secret\n\n", Ok("secret\n")),
            (b"secret\r", Ok("secret\r")),
            (b"sec\0ret", Ok("sec\0ret")),
            (b"", Err("it is empty")),
            (b"\n", Err("it is empty")),
            (b"\xef\xbb\xbf\r\n", Err("it is empty")),
            (b" \t\n\n", Err("it holds only white space")),
            (b"s\xe9cret", Err("it is not UTF-8 text")),
            (b"\xff\xfes\0", Err("it is UTF-16, not UTF-8 text; save it as UTF-8")),
        ];
        for (bytes, expected) in rows {
            assert_eq!(text(bytes), expected, "{bytes:?}");
        }
    }

    /// C33, C34: what cannot be used is refused with the name of the file and without a byte of its content.
    #[test]
    fn c34_messages_name_the_file_and_never_the_value() {
        let directory = tempfile::tempdir().unwrap();
        let rows: [(&str, Vec<u8>, &str); 6] = [
            ("empty", Vec::new(), "it is empty"),
            ("nul", b"canary\0canary".to_vec(), "control character"),
            ("inner-line", b"canary\ncanary\n".to_vec(), "control character"),
            ("leading", b" canary\n".to_vec(), "white space"),
            ("latin1", b"canary\xe9".to_vec(), "not UTF-8"),
            ("huge", vec![b'a'; MAX_FILE_BYTES + 1], "longer than 65536 bytes"),
        ];
        for (name, content, expected) in rows {
            let path = directory.path().join(name);
            fs::write(&path, content).unwrap();
            let message = read(&path, &Resolver::default(), Password::new).unwrap_err();
            assert!(message.starts_with(&path.display().to_string()) && message.contains(expected), "{message}");
            assert!(!message.contains("canary"), "{message}");
        }
        let message = read(&directory.path().join("absent"), &Resolver::default(), Password::new).unwrap_err();
        assert!(message.contains("absent: ") && message.contains("No such file"), "{message}");
    }

    /// C34: neither a directory nor a FIFO nor a device is read, and none of them holds the reader up.
    #[test]
    fn c34_only_regular_files_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for path in [&fifo, directory.path(), Path::new("/dev/zero")] {
            let message = read(path, &Resolver::default(), Password::new).unwrap_err();
            assert!(message.contains("not a regular file"), "{message}");
        }
    }
}
