//! A file that this process's user alone can read and write: how it is opened, replaced and locked.
//!
//! It is trusted as far as nobody else can have written it: opened without following a link, and then judged by what was opened (a regular file, with this
//! one name, of this user, mode 0600).
//!
//! A directory in which every user may replace files is not used at all: nobody else can make a file that is trusted, but who may rename can bring back an
//! old one, and with it a history without the latest mints. Two such directories are used all the same. One with the sticky bit, as `/tmp` has it, leaves
//! each file to its owner. And one that is the root of a mount is a volume, whose users whoever mounted it chose: Kubernetes makes every `emptyDir` with mode
//! 0777, and only the pod's own containers see it.
//!
//! It is replaced, never changed: written beside its place, made durable, renamed. Whoever reads sees the old or the new one. The lock is a second file, which
//! stays: a lock on the file itself would be on whichever file had that name at the time.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

/// A save makes at most half of this; a longer file is not read.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// How often a file is opened again that was replaced between opening and judging it.
const OPEN_ATTEMPTS: usize = 5;
const TEMPORARY_SUFFIX: &str = ".tmp";

/// A file by name, and what is beside it: its lock, and while it is replaced its successor.
#[derive(Debug)]
pub(super) struct PrivateFile {
    path: PathBuf,
}

/// Why the file cannot be used.
#[derive(Debug)]
pub(super) enum Problem {
    /// A file is there, but none to be trusted; a save replaces it. For people.
    Refused(String),
    /// No file can be kept here. For people.
    Unusable(String),
    /// From the system.
    Io(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Problem {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// An advisory lock; closing the file gives it up.
#[derive(Debug)]
pub(super) struct HeldLock {
    _file: OwnedFd,
}

impl PrivateFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// C27, C28: bounded, from a trusted regular file, without ever waiting. `None` where there is no file.
    pub(super) fn read(&self) -> Result<Option<Vec<u8>>, Problem> {
        self.judge_directory()?;
        for _ in 0..OPEN_ATTEMPTS {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = match rustix::fs::open(&self.path, flags, Mode::empty()) {
                Ok(file) => File::from(file),
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::LOOP) => return Err(Problem::Refused("it is a symbolic link".to_owned())),
                // Another user's, or a socket: not a failure of the disk, which would be gone another time.
                Err(Errno::ACCESS) => return Err(Problem::Refused("this process may not read it".to_owned())),
                Err(Errno::NXIO) => return Err(Problem::Refused("it is not a regular file".to_owned())),
                Err(error) => return Err(error.into()),
            };
            let opened = file.metadata()?;
            if opened.is_file() && opened.nlink() == 0 {
                // Replaced since it was opened.
                continue;
            }
            if opened.is_dir() {
                return Err(Problem::Unusable("it is a directory".to_owned()));
            }
            judge(&opened).map_err(Problem::Refused)?;
            let mut bytes = Vec::new();
            file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > MAX_FILE_BYTES {
                return Err(Problem::Refused(format!("it is longer than {MAX_FILE_BYTES} bytes")));
            }
            return Ok(Some(bytes));
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is replaced again and again").into())
    }

    /// C29: durable before it is visible. Whatever fails, the old file stays and the new one goes.
    pub(super) fn replace(&self, text: &[u8]) -> Result<(), Problem> {
        self.judge_directory()?;
        let directory = self.directory();
        // Created with O_EXCL and mode 0600; removed on drop.
        let mut successor = tempfile::Builder::new().prefix(&self.temporary_prefix()).suffix(TEMPORARY_SUFFIX).tempfile_in(directory)?;
        successor.write_all(text)?;
        successor.as_file().sync_all()?;
        successor.persist(&self.path).map_err(|error| error.error)?;
        // The rename itself, too, must survive a power failure.
        Ok(File::open(directory)?.sync_all()?)
    }

    /// `None` where another process holds it.
    pub(super) fn try_lock(&self) -> Result<Option<HeldLock>, Problem> {
        self.judge_directory()?;
        let path = self.lock_path();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?);
        let opened = file.metadata()?;
        if !opened.is_file() {
            return Err(Problem::Unusable(format!("{} is not a regular file", path.display())));
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Somebody may have removed the lock file in between: then others would lock another one under the same name.
        let in_place = fs::symlink_metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (opened.dev(), opened.ino()));
        Ok(in_place.then(|| HeldLock { _file: file.into() }))
    }

    /// C29: what a process that was killed between writing and renaming left behind. Only with the lock in hand, so that nobody is writing; without it, the
    /// next start looks again.
    pub(super) fn remove_leftovers(&self) {
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

    /// C28: whether others may put files in the place of this one; see the module.
    fn judge_directory(&self) -> Result<(), Problem> {
        // Where there is no directory, or none to be seen, what is done in it fails with the system's own words.
        let Ok(directory) = fs::metadata(self.directory()) else { return Ok(()) };
        let mode = directory.mode() & 0o7777;
        if mode & 0o1002 != 0o002 || is_volume(self.directory(), &directory) {
            return Ok(());
        }
        Err(Problem::Unusable(format!("any user may replace files in its directory, whose mode is {mode:04o}; chmod o-w it")))
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

/// Whether a directory is the root of a mount. A kernel before 5.8 does not say, but then another device than that of the directory above does.
fn is_volume(path: &Path, opened: &fs::Metadata) -> bool {
    let told = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::empty());
    told.is_ok_and(|told| told.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
        || fs::metadata(path.join("..")).is_ok_and(|above| above.dev() != opened.dev())
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Place {
        directory: tempfile::TempDir,
        file: PrivateFile,
    }

    impl Place {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let file = PrivateFile::new(directory.path().join("token.json"));
            Self { directory, file }
        }

        fn written() -> Self {
            let place = Self::new();
            place.file.replace(b"old").unwrap();
            place
        }

        fn another_process(&self) -> PrivateFile {
            PrivateFile::new(self.file.path.clone())
        }

        fn entries(&self) -> Vec<String> {
            let entries = fs::read_dir(self.directory.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        fn assert_refused(&self, expected: &str) {
            match self.file.read() {
                Err(Problem::Refused(reason)) => assert!(reason.contains(expected), "{reason}"),
                other => panic!("refused because {expected}? {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_written_is_read_and_private() {
        let place = Place::new();
        assert!(place.file.read().unwrap().is_none());
        place.file.replace(b"old").unwrap();
        place.file.replace(b"new").unwrap();
        assert_eq!(place.file.read().unwrap().as_deref(), Some(b"new".as_slice()));
        assert_eq!(fs::metadata(&place.file.path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(place.entries(), ["token.json"]);
    }

    /// C28: what others can have written or read is not used.
    #[test]
    fn c28_only_a_private_file_with_one_name_is_trusted() {
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
            let place = Place::written();
            fs::set_permissions(&place.file.path, fs::Permissions::from_mode(mode)).unwrap();
            place.assert_refused(&format!("its mode is {mode:04o}"));
        }
        let place = Place::written();
        fs::hard_link(&place.file.path, place.directory.path().join("other")).unwrap();
        place.assert_refused("2 names");

        let place = Place::written();
        fs::rename(&place.file.path, place.directory.path().join("real")).unwrap();
        symlink("real", &place.file.path).unwrap();
        place.assert_refused("symbolic link");
        place.file.replace(b"new").unwrap();
        assert!(fs::symlink_metadata(&place.file.path).unwrap().is_file(), "the link is replaced");
        assert_eq!(fs::read(place.directory.path().join("real")).unwrap(), b"old", "what it led to is not");

        // Only root can give a file away.
        let place = Place::written();
        if std::os::unix::fs::chown(&place.file.path, Some(own_uid() + 1), None).is_ok() {
            place.assert_refused("it belongs to user");
        }
    }

    /// C28: where any user may replace files, nothing is read and nothing left; the sticky bit and a volume of its own keep them apart.
    #[test]
    fn c28_a_directory_that_is_open_to_all_is_not_used() {
        let place = Place::written();
        let mode = |mode| fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        for open in [0o777, 0o702, 0o2777] {
            mode(open);
            let expected = format!("any user may replace files in its directory, whose mode is {open:04o}; chmod o-w it");
            let told = [place.file.read().map(drop), place.file.replace(b"new"), place.file.try_lock().map(drop)];
            for told in told {
                assert!(matches!(&told, Err(Problem::Unusable(reason)) if *reason == expected), "{told:?}");
            }
        }
        assert_eq!(place.entries(), ["token.json"]);
        for fine in [0o1777, 0o775, 0o700] {
            mode(fine);
            assert_eq!(place.file.read().unwrap().as_deref(), Some(b"old".as_slice()), "{fine:o}");
        }
        let is_volume = |path: &Path| is_volume(path, &fs::metadata(path).unwrap());
        assert!(is_volume(Path::new("/proc")) && !is_volume(place.directory.path()));
    }

    /// C27: bounded, and no waiting for whoever might write into a FIFO.
    #[test]
    fn c27_only_a_short_regular_file_is_read() {
        let place = Place::new();
        place.file.replace(&vec![b' '; usize::try_from(MAX_FILE_BYTES).unwrap() + 1]).unwrap();
        place.assert_refused("longer than 65536 bytes");

        let place = Place::new();
        fs::create_dir(&place.file.path).unwrap();
        assert!(matches!(place.file.read(), Err(Problem::Unusable(reason)) if reason == "it is a directory"));

        let place = Place::new();
        rustix::fs::mknodat(rustix::fs::CWD, &place.file.path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        place.assert_refused("not a regular file");

        let place = Place::new();
        let _socket = std::os::unix::net::UnixListener::bind(&place.file.path).unwrap();
        place.assert_refused("not a regular file");

        PrivateFile::new("/dev/null".into()).read().unwrap_err();
    }

    /// C29: where the disk fails, it is an error, the old file stays and no new one is left beside it.
    #[test]
    fn c29_a_failed_replacement_leaves_nothing_behind() {
        let place = Place::new();
        let missing = PrivateFile::new(place.directory.path().join("missing/token.json"));
        missing.replace(b"new").unwrap_err();
        missing.try_lock().unwrap_err();
        assert!(missing.read().unwrap().is_none());
        // The last step, the rename, fails on a directory.
        fs::create_dir_all(place.file.path.join("occupied")).unwrap();
        place.file.replace(b"new").unwrap_err();
        assert_eq!(place.entries(), ["token.json"]);
    }

    /// C29: killed between write and rename: the next start removes what was left, unless somebody may be writing it.
    #[test]
    fn c29_leftovers_go_but_not_under_a_writer() {
        let place = Place::written();
        for name in [".token.json.a1B2c3.tmp", "other.tmp", ".token.json.keep", ".other.json.x.tmp"] {
            fs::write(place.directory.path().join(name), "{").unwrap();
        }
        let writer = place.another_process().try_lock().unwrap().expect("it is free");
        place.file.remove_leftovers();
        assert!(place.entries().iter().any(|name| name == ".token.json.a1B2c3.tmp"), "the lock is held");
        drop(writer);
        place.file.remove_leftovers();
        assert_eq!(place.entries(), [".other.json.x.tmp", ".token.json.keep", "other.tmp", "token.json", "token.json.lock"]);
    }

    /// C31: the lock excludes, ends with its holder, and does not hold when its file was removed.
    #[test]
    fn c31_the_lock_excludes() {
        let place = Place::new();
        let other = place.another_process();
        let held = place.file.try_lock().unwrap().expect("it is free");
        assert!(other.try_lock().unwrap().is_none());
        drop(held);
        let held = other.try_lock().unwrap().expect("it is free again");
        fs::remove_file(place.file.lock_path()).unwrap();
        let second = place.file.try_lock().unwrap().expect("another file, another lock");
        drop((held, second));
        fs::remove_file(place.file.lock_path()).unwrap();
        symlink("/dev/null", place.file.lock_path()).unwrap();
        place.file.try_lock().unwrap_err();
    }

    /// C31: readers beside a writer see one whole content or another, never a torn one, and never take the one just replaced for a foreign one.
    #[test]
    fn c31_no_reader_sees_half_a_file() {
        let place = Place::written();
        std::thread::scope(|scope| {
            let texts = [b"a".repeat(20_000), b"b".repeat(100)];
            let file = &place.file;
            let writer = scope.spawn(move || (0..300).for_each(|round| file.replace(&texts[round % 2]).unwrap()));
            while !writer.is_finished() {
                match place.file.read() {
                    Ok(text) => assert!([3, 100, 20_000].contains(&text.expect("never absent").len())),
                    Err(problem) => assert!(matches!(problem, Problem::Io(_)), "{problem:?}"),
                }
            }
        });
    }
}
