//! Looks at several files as if at one moment, also while Kubernetes replaces them.
//!
//! In a Secret volume each entry is a link into `..data`, which is itself a link to a directory with a timestamp for its name. An update writes a new
//! directory and swaps `..data` by one rename (kubernetes `pkg/volume/util/atomic_writer.go`, steps 5 to 11). Reading `email` and `password` through
//! their links can therefore give one old and one new half. Here `..data` is resolved once, both are read from that directory, and the link is
//! compared afterwards. Other files offer nothing of the kind: they are read again until two looks agree.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

/// The link that Kubernetes swaps.
pub(super) const DATA: &str = "..data";
/// Looks at files that keep changing; what the last one saw is taken, and [`super::settle`] waits for it to settle.
const ATTEMPTS: usize = 8;

/// Where a file is to be read in this look: at its own path, or in the directory to which `..data` led when the look began.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    /// The volume, and where its `..data` leads.
    pinned: Option<(PathBuf, PathBuf)>,
}

impl Resolver {
    pub(super) fn resolve<'a>(&self, path: &'a Path) -> Cow<'a, Path> {
        match (&self.pinned, locate(path)) {
            (Some((volume, data)), Some(place)) if place.volume == *volume => Cow::Owned(volume.join(data).join(place.inside)),
            _ => Cow::Borrowed(path),
        }
    }
}

/// Calls `look` until what it saw is consistent over all `files`. The flag is true where one Kubernetes volume holds all of them, so that what was seen
/// had been put there as a whole.
pub(super) fn consistently<T: PartialEq>(files: &[&Path], look: impl Fn(&Resolver) -> T) -> (T, bool) {
    let mut seen = None;
    for _ in 0..ATTEMPTS {
        if let Some(volume) = common_volume(files)
            && let Ok(data) = fs::read_link(volume.join(DATA))
        {
            let resolver = Resolver { pinned: Some((volume, data)) };
            let now = look(&resolver);
            if resolver.still_holds() {
                return (now, true);
            }
            // Swapped meanwhile: the old directory may have been removed under the reader.
            seen = Some(now);
            continue;
        }
        let now = look(&Resolver::default());
        if seen.as_ref() == Some(&now) {
            return (now, false);
        }
        seen = Some(now);
    }
    (seen.unwrap_or_else(|| look(&Resolver::default())), false)
}

impl Resolver {
    fn still_holds(&self) -> bool {
        self.pinned.as_ref().is_some_and(|(volume, data)| fs::read_link(volume.join(DATA)).is_ok_and(|now| now == *data))
    }
}

/// A file of a Kubernetes volume.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// The directory with `..data` in it.
    volume: PathBuf,
    /// Below the directory to which `..data` leads.
    inside: PathBuf,
}

/// Finds the volume by its shape: somewhere on the way to the file a link leads into a `..data` beside it. `items` with a path of several components are
/// linked at the first one, and a file mounted by `subPath` is no link at all.
fn locate(path: &Path) -> Option<Place> {
    path.ancestors().skip(1).find_map(|volume| {
        let mut rest = path.strip_prefix(volume).ok()?.components();
        let entry = rest.next()?;
        let target = fs::read_link(volume.join(entry)).ok()?;
        let inside = target.strip_prefix(DATA).ok()?;
        Some(Place { volume: volume.to_owned(), inside: inside.components().chain(rest).collect() })
    })
}

/// The one volume that holds all the files.
fn common_volume(files: &[&Path]) -> Option<PathBuf> {
    let (first, others) = files.split_first()?;
    let volume = locate(first)?.volume;
    others.iter().all(|file| locate(file).is_some_and(|place| place.volume == volume)).then_some(volume)
}

/// The directories in which a change of the files would show, for [`super::events`]: where they are, and the volumes that hold them.
pub(super) fn directories(files: &[&Path]) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    for file in files {
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        directories.push(locate(file).map_or_else(|| parent.to_owned(), |place| place.volume));
    }
    directories.sort();
    directories.dedup();
    directories
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A Secret volume as the kubelet makes it.
    fn volume(entries: &[(&str, &str)]) -> tempfile::TempDir {
        let volume = tempfile::tempdir().unwrap();
        swap(volume.path(), "..1", entries);
        for (name, _) in entries {
            let first = Path::new(name).components().next().unwrap();
            // The second entry below one directory finds its link made already.
            let _ = symlink(Path::new(DATA).join(first), volume.path().join(first));
        }
        volume
    }

    fn swap(volume: &Path, version: &str, entries: &[(&str, &str)]) {
        for (name, content) in entries {
            let file = volume.join(version).join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        let old = fs::read_link(volume.join(DATA)).ok();
        symlink(version, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join(DATA)).unwrap();
        if let Some(old) = old {
            fs::remove_dir_all(volume.join(old)).unwrap();
        }
    }

    fn content(resolver: &Resolver, path: &Path) -> Option<String> {
        fs::read_to_string(resolver.resolve(path)).ok()
    }

    /// C35: the swap comes just between the reading of email and password, and the old directory is gone: one version is seen, never a mixture.
    #[test]
    fn c35_a_swap_between_two_files_is_never_seen_half() {
        let volume = volume(&[("email", "old"), ("password", "old")]);
        let (email, password) = (volume.path().join("email"), volume.path().join("password"));
        let looks = Cell::new(0);
        let (seen, atomic) = consistently(&[&email, &password], |resolver| {
            let first = content(resolver, &email);
            looks.set(looks.get() + 1);
            if looks.get() == 1 {
                swap(volume.path(), "..2", &[("email", "new"), ("password", "new")]);
            }
            (first, content(resolver, &password))
        });
        assert_eq!((seen, atomic), ((Some("new".to_owned()), Some("new".to_owned())), true));
        assert_eq!(looks.get(), 2, "the first look was thrown away");
    }

    /// C35 for plain files: the look is repeated until two agree.
    #[test]
    fn c35_plain_files_are_read_until_two_looks_agree() {
        let directory = tempfile::tempdir().unwrap();
        let (email, password) = (directory.path().join("email"), directory.path().join("password"));
        fs::write(&email, "old").unwrap();
        fs::write(&password, "old").unwrap();
        let looks = Cell::new(0);
        let (seen, atomic) = consistently(&[&email, &password], |resolver| {
            let first = content(resolver, &email);
            looks.set(looks.get() + 1);
            if looks.get() == 1 {
                fs::write(&email, "new").unwrap();
                fs::write(&password, "new").unwrap();
            }
            (first, content(resolver, &password))
        });
        assert_eq!((seen, atomic), ((Some("new".to_owned()), Some("new".to_owned())), false));
    }

    /// Files that never rest do not keep the reader: it gives up, and says that nothing held still.
    #[test]
    fn endless_change_ends_the_looking() {
        let looks = Cell::new(0);
        let (_, atomic) = consistently(&[Path::new("/nonexistent/email")], |_| looks.replace(looks.get() + 1));
        assert_eq!((looks.get(), atomic), (ATTEMPTS, false));
    }

    /// C38: only a link into `..data` is a file of a volume; a `subPath` mount is a plain file.
    #[test]
    fn c38_a_volume_is_known_by_its_links() {
        let volume = volume(&[("email", "a"), ("deep/er/password", "b")]);
        let root = volume.path();
        let place = |inside: &str| Some(Place { volume: root.to_owned(), inside: inside.into() });
        fs::write(root.join("plain"), "c").unwrap();
        symlink("plain", root.join("other")).unwrap();
        let rows = [
            ("email", place("email")),
            ("deep/er/password", place("deep/er/password")),
            ("plain", None),
            ("other", None),
            ("absent", None),
            ("..data/email", None),
        ];
        for (name, expected) in rows {
            assert_eq!(locate(&root.join(name)), expected, "{name}");
        }
        assert_eq!(locate(Path::new("relative")), None);
        assert_eq!(directories(&[&root.join("email"), &root.join("deep/er/password")]), [root]);
        assert_eq!(directories(&[Path::new("relative")]), [Path::new(".")]);
    }

    #[test]
    fn files_of_two_volumes_are_no_unit() {
        let (one, two) = (volume(&[("email", "a")]), volume(&[("password", "b")]));
        let (email, password) = (one.path().join("email"), two.path().join("password"));
        let (seen, atomic) = consistently(&[&email, &password], |resolver| (content(resolver, &email), content(resolver, &password)));
        assert_eq!((seen, atomic), ((Some("a".to_owned()), Some("b".to_owned())), false));
    }
}
