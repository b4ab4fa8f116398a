//! The store in one file: who may have written it, how it is replaced, how it is locked.
//!
//! The file is trusted as far as the process alone can have written it: opened without following a link, and then judged by what was opened (a regular file,
//! with this one name, of this user, mode 0600). Its directory is not judged, since the usual one, a Kubernetes `emptyDir`, is open to all users of its pod;
//! those can remove the file, but not make one that is trusted.
//!
//! It is replaced, never changed: written beside its place, made durable, renamed. Whoever reads sees the old or the new one. The lock is a second file, which
//! stays: a lock on the file itself would be on whichever file had that name at the time.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::format::{self, Masked, Payload, Salt, TokenEntry};
use super::mask::{Mask, Range, SALT_BYTES};
use super::{Contents, Operation, StoreError, StoredToken};
use crate::credentials::Pair;
use crate::secret::Token;
use crate::token::mint::is_safe_id;

/// A save makes at most half of this; a longer file is not read.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// How often a file is opened again that was replaced between opening and judging it.
const OPEN_ATTEMPTS: usize = 5;
/// The token in use, its predecessor, and what other credentials made of either.
const MAX_KNOWN: usize = 4;
const TEMPORARY_SUFFIX: &str = ".tmp";

/// One file, and what is beside it: its lock, and while it is replaced its successor.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
    upstream: String,
    /// Whether leftovers of a killed predecessor were looked for.
    cleaned: AtomicBool,
    /// The last tokens that were saved or loaded, each with its masked form: see [`FileStore::mask`].
    known: Mutex<VecDeque<(Token, Masked)>>,
}

/// An advisory lock; closing the file gives it up.
#[derive(Debug)]
pub(super) struct HeldLock {
    _file: OwnedFd,
}

impl FileStore {
    pub(super) fn new(path: PathBuf, upstream: String) -> Self {
        Self { path, upstream, cleaned: AtomicBool::new(false), known: Mutex::default() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn load(&self, pair: &Pair, now: SystemTime) -> Result<Contents, StoreError> {
        if !self.cleaned.swap(true, Ordering::Relaxed) {
            self.remove_leftovers();
        }
        let Some(bytes) = self.read()? else { return Ok(Contents::default()) };
        let payload = format::decode(&bytes).map_err(|reason| self.refused(Operation::Read, reason))?;
        if payload.upstream != self.upstream {
            return Err(self.refused(Operation::Read, format!("it is for {}, not for {}", payload.upstream, self.upstream)));
        }
        let token = payload.token.map(|token| self.unmask(token, pair)).transpose()?;
        let attempts = payload.attempts_unix_ms.into_iter().map(from_unix_ms).collect();
        Ok(Contents { token, attempts }.prune(now))
    }

    pub(super) fn save(&self, contents: Contents, pair: &Pair, now: SystemTime) -> Result<(), StoreError> {
        let contents = contents.prune(now);
        let failed = |source| self.io(Operation::Write, source);
        let token = match contents.token {
            None => None,
            Some(StoredToken { token, id, name, created }) => {
                let masked = self.mask(&token, pair).map_err(failed)?;
                Some(TokenEntry { masked, id, name, created_unix_ms: to_unix_ms(created) })
            }
        };
        let attempts_unix_ms = contents.attempts.into_iter().map(to_unix_ms).collect();
        let text = format::encode(Payload { upstream: self.upstream.clone(), token, attempts_unix_ms });
        self.replace(&text).map_err(failed)
    }

    /// `None` where another process holds it.
    pub(super) fn try_lock(&self) -> Result<Option<HeldLock>, StoreError> {
        let failed = |source: io::Error| self.io(Operation::Lock, source);
        let path = self.lock_path();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| failed(error.into()))?);
        let opened = file.metadata().map_err(failed)?;
        if !opened.is_file() {
            return Err(self.refused(Operation::Lock, format!("{} is not a regular file", path.display())));
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK | Errno::INTR) => return Ok(None),
            Err(error) => return Err(failed(error.into())),
        }
        // Somebody may have removed the lock file in between: then others would lock another one under the same name.
        let in_place = fs::symlink_metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (opened.dev(), opened.ino()));
        Ok(in_place.then(|| HeldLock { _file: file.into() }))
    }

    /// C27, C28: bounded, from a trusted regular file, without ever waiting. `None` where there is no file.
    fn read(&self) -> Result<Option<Vec<u8>>, StoreError> {
        for _ in 0..OPEN_ATTEMPTS {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = match rustix::fs::open(&self.path, flags, Mode::empty()) {
                Ok(file) => File::from(file),
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::LOOP) => return Err(self.refused(Operation::Read, "it is a symbolic link".to_owned())),
                Err(error) => return Err(self.io(Operation::Read, error.into())),
            };
            let opened = file.metadata().map_err(|error| self.io(Operation::Read, error))?;
            if opened.is_file() && opened.nlink() == 0 {
                // Replaced since it was opened.
                continue;
            }
            judge(&opened).map_err(|reason| self.refused(Operation::Read, reason))?;
            let mut bytes = Vec::new();
            file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| self.io(Operation::Read, error))?;
            if bytes.len() as u64 > MAX_FILE_BYTES {
                return Err(self.refused(Operation::Read, format!("it is longer than {MAX_FILE_BYTES} bytes")));
            }
            return Ok(Some(bytes));
        }
        Err(self.io(Operation::Read, io::Error::new(io::ErrorKind::ResourceBusy, "it is replaced again and again")))
    }

    /// C29: durable before it is visible. Whatever fails, the old file stays and the new one goes.
    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let directory = self.directory();
        // Created with O_EXCL and mode 0600; removed on drop.
        let mut successor = tempfile::Builder::new().prefix(&self.temporary_prefix()).suffix(TEMPORARY_SUFFIX).tempfile_in(directory)?;
        successor.write_all(text)?;
        successor.as_file().sync_all()?;
        successor.persist(&self.path).map_err(|error| error.error)?;
        // The rename itself, too, must survive a power failure.
        File::open(directory)?.sync_all()
    }

    /// C29: what a process that was killed between writing and renaming left behind. Only with the lock in hand, so that nobody is writing; without it, the
    /// next start looks again.
    fn remove_leftovers(&self) {
        let Ok(Some(_lock)) = self.try_lock() else { return };
        let Ok(entries) = fs::read_dir(self.directory()) else { return };
        let prefix = self.temporary_prefix();
        for entry in entries.flatten() {
            let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix) && name.ends_with(TEMPORARY_SUFFIX));
            if ours && entry.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.uid() == own_uid()) {
                match fs::remove_file(entry.path()) {
                    Ok(()) => tracing::debug!(file = %entry.path().display(), "removed what an interrupted save left behind"),
                    Err(error) => {
                        tracing::warn!(file = %entry.path().display(), %error, "cannot remove what an interrupted save left behind");
                    }
                }
            }
        }
    }

    /// A token is masked once: saved again, under whatever credentials, it has the form that it had. Two forms of one token would be what the module `mask`
    /// avoids, since only the right guess unmasks both to the same.
    fn mask(&self, token: &Token, pair: &Pair) -> io::Result<Masked> {
        if let Some((_, masked)) = self.known().iter().find(|(known, _)| known == token) {
            return Ok(masked.clone());
        }
        let mut salt = [0; SALT_BYTES];
        SystemRandom::new().fill(&mut salt).map_err(|_| io::Error::other("the system gives no random numbers"))?;
        let ranges = Range::of(token.expose());
        let text = Mask::new(pair, &self.upstream, &salt).mask(token.expose(), &ranges);
        let masked = Masked { text, ranges, salt: Salt(salt) };
        self.remember(token.clone(), masked.clone());
        Ok(masked)
    }

    fn unmask(&self, stored: TokenEntry, pair: &Pair) -> Result<StoredToken, StoreError> {
        let TokenEntry { masked, id, name, created_unix_ms } = stored;
        let text = Mask::new(pair, &self.upstream, &masked.salt.0).unmask(&masked.text, &masked.ranges);
        let token = Token::new(text.as_str().to_owned())
            .map_err(|problem| self.refused(Operation::Read, format!("its token cannot be used: {problem}")))?;
        self.remember(token.clone(), masked);
        // Ids go into the paths of revocations.
        Ok(StoredToken { token, id: id.filter(|id| is_safe_id(id)), name, created: from_unix_ms(created_unix_ms) })
    }

    fn remember(&self, token: Token, masked: Masked) {
        let mut known = self.known();
        known.retain(|(other, _)| *other != token);
        known.push_front((token, masked));
        known.truncate(MAX_KNOWN);
    }

    fn known(&self) -> MutexGuard<'_, VecDeque<(Token, Masked)>> {
        // Nothing is ever left half done in it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory(&self) -> &Path {
        self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    fn lock_path(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".lock");
        name.into()
    }

    fn temporary_prefix(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        format!(".{}.", name.to_string_lossy())
    }

    fn refused(&self, operation: Operation, reason: String) -> StoreError {
        StoreError::Refused { operation, path: self.path.clone(), reason }
    }

    fn io(&self, operation: Operation, source: io::Error) -> StoreError {
        StoreError::Io { operation, path: self.path.clone(), source }
    }
}

/// Whether only this process's user can have written what was opened, and only that user can have read it.
fn judge(opened: &fs::Metadata) -> Result<(), String> {
    let mode = opened.mode() & 0o7777;
    if !opened.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if opened.nlink() != 1 {
        return Err(format!("it has {} names (hard links)", opened.nlink()));
    }
    if opened.uid() != own_uid() {
        return Err(format!("it belongs to user {}, and this process runs as user {}", opened.uid(), own_uid()));
    }
    if mode & 0o077 != 0 {
        return Err(format!("its mode is {mode:04o}; anything but 0600 may have let others read or change it"));
    }
    Ok(())
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Times before the epoch are nobody's; they become the epoch.
fn to_unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Times beyond what the system can express become the epoch: very old.
fn from_unix_ms(milliseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::secret::{Email, Password};

    const TOKEN: &str = "CanaryToken0123456789abcdefXYZ";

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    fn pair(password: &str) -> Pair {
        Pair {
            email: Email::new("canary@example.com".to_owned()).unwrap(),
            password: Password::new(password.to_owned()).unwrap(),
            source: "a test".to_owned(),
            loaded_at: now(),
        }
    }

    fn contents() -> Contents {
        let token = StoredToken {
            token: Token::new(TOKEN.to_owned()).unwrap(),
            id: Some("t-1".to_owned()),
            name: Some("upsolver-auth-proxy/x".to_owned()),
            created: now() - Duration::from_millis(1_234),
        };
        Contents { token: Some(token), attempts: vec![now() - Duration::from_secs(30), now()] }
    }

    struct Place {
        directory: tempfile::TempDir,
        store: FileStore,
    }

    impl Place {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = FileStore::new(directory.path().join("token.json"), "https://api.upsolver.com".to_owned());
            Self { directory, store }
        }

        fn saved() -> Self {
            let place = Self::new();
            place.store.save(contents(), &pair("canary password"), now()).unwrap();
            place
        }

        fn load(&self) -> Result<Contents, StoreError> {
            self.store.load(&pair("canary password"), now())
        }

        fn entries(&self) -> Vec<String> {
            let mut names: Vec<_> =
                fs::read_dir(self.directory.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        fn assert_refused(&self, expected: &str) {
            let error = self.load().unwrap_err();
            assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().contains(expected), "{error}");
        }
    }

    /// C10, C30, section 7: what was saved comes back for the same credentials; for others another token of the same look; the file shows none of them.
    #[test]
    fn c30_a_token_comes_back_for_its_credentials_alone() {
        let place = Place::saved();
        assert_eq!(place.load().unwrap(), contents());
        let foreign = place.store.load(&pair("other"), now()).unwrap().token.unwrap().token;
        assert_ne!(foreign.expose(), TOKEN);
        assert_eq!(foreign.expose().len(), TOKEN.len());
        let text = fs::read_to_string(place.store.path()).unwrap();
        assert!(["Canary", "canary", "0123456789", "example.com"].iter().all(|secret| !text.contains(secret)), "{text}");
        assert_eq!(fs::metadata(place.store.path()).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(place.entries(), ["token.json", "token.json.lock"]);
    }

    /// C30: one token is never there in two forms, which only the right credentials would unmask alike; another token shares nothing with it.
    #[test]
    fn c30_a_token_is_masked_once() {
        let place = Place::saved();
        let first = fs::read(place.store.path()).unwrap();
        place.store.save(contents(), &pair("canary password"), now()).unwrap();
        assert_eq!(fs::read(place.store.path()).unwrap(), first);

        let restarted = FileStore::new(place.store.path().to_owned(), "https://api.upsolver.com".to_owned());
        let loaded = restarted.load(&pair("canary password"), now()).unwrap();
        restarted.load(&pair("rotated"), now()).unwrap();
        restarted.save(loaded, &pair("rotated"), now()).unwrap();
        assert_eq!(fs::read(place.store.path()).unwrap(), first, "nor is there a second form after a restart and a rotation");

        let salt = |bytes: &[u8]| format::decode(bytes).unwrap().token.unwrap().masked.salt;
        let mut other = contents();
        other.token.as_mut().unwrap().token = Token::new("another".to_owned()).unwrap();
        restarted.save(other, &pair("rotated"), now()).unwrap();
        assert_ne!(salt(&fs::read(place.store.path()).unwrap()), salt(&first));
    }

    #[test]
    fn c30_a_file_of_another_upstream_is_refused() {
        let place = Place::saved();
        let other = FileStore::new(place.store.path().to_owned(), "https://other.example".to_owned());
        let error = other.load(&pair("canary password"), now()).unwrap_err();
        assert!(error.to_string().ends_with("it is for https://api.upsolver.com, not for https://other.example"), "{error}");
    }

    /// C27: nothing there is no error; all that is not a store is refused.
    #[test]
    fn c27_absent_is_empty_and_anything_else_is_refused() {
        let place = Place::new();
        assert_eq!(place.load().unwrap(), Contents::default());
        let write = |bytes: &[u8]| {
            fs::write(place.store.path(), bytes).unwrap();
            fs::set_permissions(place.store.path(), fs::Permissions::from_mode(0o600)).unwrap();
        };
        let huge = vec![b' '; usize::try_from(MAX_FILE_BYTES).unwrap() + 1];
        let rows: [(&[u8], &str); 5] = [
            (b"", "damaged (line 1, column 0)"),
            (b"{}", "damaged"),
            (b"\0\xff", "damaged"),
            (br#"{"version":2}"#, "version 2"),
            (&huge, "longer than 65536 bytes"),
        ];
        for (bytes, expected) in rows {
            write(bytes);
            place.assert_refused(expected);
        }
    }

    /// C28: what others can have written or read, or what is not a file at all, is not used.
    #[test]
    fn c28_only_a_private_regular_file_is_trusted() {
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
            let place = Place::saved();
            fs::set_permissions(place.store.path(), fs::Permissions::from_mode(mode)).unwrap();
            place.assert_refused(&format!("its mode is {mode:04o}"));
        }
        let place = Place::saved();
        fs::hard_link(place.store.path(), place.directory.path().join("other")).unwrap();
        place.assert_refused("2 names");

        let place = Place::saved();
        fs::rename(place.store.path(), place.directory.path().join("real")).unwrap();
        symlink("real", place.store.path()).unwrap();
        place.assert_refused("symbolic link");
        // A save replaces the link, not what it leads to.
        place.store.save(Contents::default(), &pair("x"), now()).unwrap();
        assert!(fs::symlink_metadata(place.store.path()).unwrap().is_file());
        assert_ne!(fs::read(place.directory.path().join("real")).unwrap(), fs::read(place.store.path()).unwrap());

        let place = Place::new();
        fs::create_dir(place.store.path()).unwrap();
        place.assert_refused("not a regular file");

        let place = Place::new();
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, place.store.path(), kind, Mode::RUSR | Mode::WUSR, 0).unwrap();
        place.assert_refused("not a regular file");

        // Only root can give a file away.
        let place = Place::saved();
        if std::os::unix::fs::chown(place.store.path(), Some(own_uid() + 1), None).is_ok() {
            place.assert_refused("it belongs to user");
        }
    }

    /// C29: where the disk fails, it is an error, the old file stays and no new one is left beside it.
    #[test]
    fn c29_a_failed_save_leaves_nothing_behind() {
        let place = Place::new();
        let missing = FileStore::new(place.directory.path().join("missing/token.json"), "https://api.upsolver.com".to_owned());
        let error = missing.save(contents(), &pair("x"), now()).unwrap_err();
        assert_eq!(error.operation(), Operation::Write);
        assert!(missing.try_lock().is_err());
        assert_eq!(missing.load(&pair("x"), now()).unwrap(), Contents::default());
        // The last step, the rename, fails on a directory.
        fs::create_dir_all(place.store.path().join("occupied")).unwrap();
        place.store.save(contents(), &pair("x"), now()).unwrap_err();
        assert_eq!(place.entries(), ["token.json"]);
    }

    /// C29: killed between write and rename: the next start removes what was left, unless somebody may be writing it.
    #[test]
    fn c29_leftovers_go_at_the_next_start() {
        let place = Place::saved();
        let keep = ["other.tmp", ".token.json.keep", ".other.json.x.tmp"];
        for name in keep.iter().chain(&[".token.json.a1B2c3.tmp"]) {
            fs::write(place.directory.path().join(name), "{").unwrap();
        }
        let another = FileStore::new(place.store.path().to_owned(), "https://api.upsolver.com".to_owned());
        let writing = another.try_lock().unwrap().expect("it is free");
        place.load().unwrap();
        assert_eq!(place.entries().len(), 6, "the lock is held: {:?}", place.entries());
        drop(writing);
        another.load(&pair("canary password"), now()).unwrap();
        assert_eq!(place.entries(), [".other.json.x.tmp", ".token.json.keep", "other.tmp", "token.json", "token.json.lock"]);
    }

    /// C31: the lock excludes, ends with its holder, and does not hold when its file was removed.
    #[test]
    fn c31_the_lock_excludes() {
        let place = Place::new();
        let held = place.store.try_lock().unwrap().expect("it is free");
        assert!(place.store.try_lock().unwrap().is_none());
        drop(held);
        let held = place.store.try_lock().unwrap().expect("it is free again");
        fs::remove_file(place.store.lock_path()).unwrap();
        let other = place.store.try_lock().unwrap().expect("another file, another lock");
        drop((held, other));
        fs::remove_file(place.store.lock_path()).unwrap();
        symlink("/dev/null", place.store.lock_path()).unwrap();
        place.store.try_lock().unwrap_err();
    }

    /// C31: readers beside a writer see one whole content or another, never a torn one.
    #[test]
    fn c31_no_reader_sees_half_a_save() {
        let place = Place::new();
        let save = |count: u64| {
            let attempts = vec![now(); usize::try_from(count).unwrap()];
            place.store.save(Contents { token: None, attempts }, &pair("x"), now()).unwrap();
        };
        save(1);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..200).for_each(|round| save(round % 50)));
            while !writer.is_finished() {
                place.load().expect("always whole");
            }
        });
    }
}
