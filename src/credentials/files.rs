//! Reading credential files: bounded, never hanging, and a pair from one moment.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::OFlags;
use zeroize::Zeroizing;

use super::{FixedToken, Loaded, Pair};
use crate::config::{CredentialsSource, Source};
use crate::secret::{Email, InvalidSecret, Password, Token};

/// The longest secret file, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// How often a pair is read again because the volume was swapped meanwhile.
const ATTEMPTS: usize = 5;

/// What one look at the sources found.
#[derive(Debug)]
pub struct Read {
    /// The credentials, or why there are none.
    pub credentials: Loaded,
    /// All files came through one version of a Kubernetes volume, so that none can be half-written.
    pub atomic: bool,
}

impl Read {
    pub(super) fn missing(reason: String) -> Self {
        Self { credentials: Loaded::Missing { reason }, atomic: false }
    }
}

/// Reads the credentials once. Blocks on the file system.
pub fn read(source: &CredentialsSource) -> Read {
    let result = match source {
        CredentialsSource::Pair { email, password } => read_pair(email, password),
        CredentialsSource::TokenFile(path) => read_token(path),
        CredentialsSource::Unconfigured => Err("no credentials are configured".to_owned()),
    };
    result.unwrap_or_else(Read::missing)
}

fn read_token(path: &Path) -> Result<Read, String> {
    let volume = volume_of(path);
    let token = read_secret(path, Token::new)?;
    let atomic = volume.is_some() && volume == volume_of(path);
    let fixed = FixedToken { token, source: path.display().to_string(), loaded_at: SystemTime::now() };
    Ok(Read { credentials: Loaded::Token(Arc::new(fixed)), atomic })
}

fn read_pair(email: &Source<Email>, password: &Source<Password>) -> Result<Read, String> {
    for _ in 0..ATTEMPTS {
        let before = volumes(email, password);
        let pair = Pair {
            email: resolve(email, Email::new)?,
            password: resolve(password, Password::new)?,
            source: format!("{} and {}", describe(email), describe(password)),
            loaded_at: SystemTime::now(),
        };
        // The link is the same before and after, so both files come from the version that it names: kubelet never changes a published one.
        if before == volumes(email, password) {
            let atomic = before.iter().all(|volume| volume.is_some());
            return Ok(Read { credentials: Loaded::Pair(Arc::new(pair)), atomic });
        }
    }
    Err(format!("{} and {}: they change while they are read", describe(email), describe(password)))
}

/// The version of the Kubernetes volume behind each file; nothing for a plain file. A value never changes and counts as its own version.
fn volumes(email: &Source<Email>, password: &Source<Password>) -> [Option<PathBuf>; 2] {
    let of = |path: Option<&Path>| path.map_or_else(|| Some(PathBuf::new()), volume_of);
    [of(file_of(email)), of(file_of(password))]
}

fn file_of<T>(source: &Source<T>) -> Option<&Path> {
    match source {
        Source::File(path) => Some(path),
        Source::Value { .. } => None,
    }
}

/// What `..data` beside the file points to, if the file is a link through it.
fn volume_of(path: &Path) -> Option<PathBuf> {
    let link = std::fs::read_link(path).ok()?;
    if !link.starts_with("..data") {
        return None;
    }
    let data = path.parent()?.join("..data");
    Some(data.parent()?.join(std::fs::read_link(&data).ok()?))
}

fn describe<T>(source: &Source<T>) -> String {
    match source {
        Source::Value { origin, .. } => origin.clone(),
        Source::File(path) => path.display().to_string(),
    }
}

fn resolve<T: Clone>(source: &Source<T>, make: impl FnOnce(String) -> Result<T, InvalidSecret>) -> Result<T, String> {
    match source {
        Source::Value { value, .. } => Ok(value.clone()),
        Source::File(path) => read_secret(path, make),
    }
}

/// The content of one file, without a byte order mark and one line end at its end. The reason never quotes it.
pub(crate) fn read_secret<T>(path: &Path, make: impl FnOnce(String) -> Result<T, InvalidSecret>) -> Result<T, String> {
    let problem = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let bytes = read_bounded(path).map_err(|error| problem(&error))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| problem(&"it is not UTF-8 text"))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    make(text.to_owned()).map_err(|reason| problem(&reason))
}

/// Opens without waiting (a FIFO would), takes regular files only, reads so much and no more.
fn read_bounded(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::CLOEXEC).bits()).expect("flags fit the type that open(2) takes");
    let file: File = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(std::io::Error::other("it is larger than 64 KiB"));
    }
    // Sized before reading, so that no copy is left behind by growing.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_FILE_BYTES).expect("a small constant") + 1));
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other("it is larger than 64 KiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn pair(email: &Path, password: &Path) -> CredentialsSource {
        CredentialsSource::Pair { email: Source::File(email.to_owned()), password: Source::File(password.to_owned()) }
    }

    fn reason(read: &Read) -> &str {
        match &read.credentials {
            Loaded::Missing { reason } => reason,
            other => panic!("{other:?}"),
        }
    }

    /// C33: one line end and a byte order mark go, inner spaces stay, what a header cannot carry is named by file and not by value.
    #[test]
    fn c33_line_ends_and_marks() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        for (content, expected) in [
            ("secret", Ok("secret")),
            ("secret\n", Ok("secret")),
            ("secret\r\n", Ok("secret")),
            ("\u{feff}secret\n", Ok("secret")),
            ("two words\n", Ok("two words")),
            ("secret\n\n", Err("control character")),
            (" secret", Err("white space")),
            ("sec\0ret", Err("control character")),
            ("", Err("empty")),
            ("\n", Err("empty")),
        ] {
            fs::write(&file, content).unwrap();
            let read = read_secret(&file, Password::new);
            match expected {
                Ok(value) => assert_eq!(read.unwrap().expose(), value, "{content:?}"),
                Err(what) => {
                    let reason = read.unwrap_err();
                    assert!(reason.contains(what) && reason.contains("password:") && !reason.contains("secret"), "{content:?}: {reason}");
                }
            }
        }
        fs::write(&file, b"\xff\xfe").unwrap();
        assert!(read_secret(&file, Password::new).unwrap_err().contains("not UTF-8"));
    }

    /// C34: absent, empty, huge, a directory, a FIFO: a reason each time, and no hang.
    #[test]
    fn c34_anything_but_a_small_regular_file_is_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::write(path.join("huge"), vec![b'x'; 10 << 20]).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path.join("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        fs::write(path.join("email"), "a@b").unwrap();
        for (name, what) in [("absent", "No such file"), ("huge", "64 KiB"), ("fifo", "regular file"), (".", "regular file")] {
            let read = read(&pair(&path.join("email"), &path.join(name)));
            assert!(reason(&read).contains(what), "{name}: {}", reason(&read));
        }
    }

    /// C35: both files always come from one version of the volume, however fast it is swapped.
    #[test]
    fn c35_a_pair_is_never_mixed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let publish = |version: u32| {
            let name = format!("..v{version}");
            fs::create_dir(path.join(&name)).unwrap();
            fs::write(path.join(&name).join("email"), format!("e{version}")).unwrap();
            fs::write(path.join(&name).join("password"), format!("p{version}")).unwrap();
            std::os::unix::fs::symlink(&name, path.join("..data_tmp")).unwrap();
            fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
            if version > 1 {
                fs::remove_dir_all(path.join(format!("..v{}", version - 1))).unwrap();
            }
        };
        publish(1);
        for name in ["email", "password"] {
            std::os::unix::fs::symlink(format!("..data/{name}"), path.join(name)).unwrap();
        }
        let source = pair(&path.join("email"), &path.join("password"));
        std::thread::scope(|scope| {
            let swapping = scope.spawn(|| (2..300).for_each(publish));
            let mut pairs = 0;
            while !swapping.is_finished() || pairs == 0 {
                if let Read { credentials: Loaded::Pair(pair), atomic } = read(&source) {
                    assert_eq!(pair.email.expose()[1..], pair.password.expose()[1..]);
                    assert!(atomic);
                    pairs += 1;
                }
            }
        });
    }

    #[test]
    fn a_token_file_is_read_with_its_source() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        fs::write(&file, "abc\n").unwrap();
        match read(&CredentialsSource::TokenFile(file.clone())).credentials {
            Loaded::Token(token) => assert_eq!((token.token.expose(), token.source.as_str()), ("abc", file.to_str().unwrap())),
            other => panic!("{other:?}"),
        }
    }
}
