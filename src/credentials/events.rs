//! File events: they tell when to look, so that a change is seen at once and not only at the next poll.
//!
//! Nothing depends on them. Network mounts send none, a host may have run out of inotify watches, a watch dies with its directory: polling goes on in each
//! case, and a failure here is one warning.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::volume;

/// Wakes `changed` whenever something happened to one of `files` or to the link that Kubernetes swaps. Dropping the result ends it. Blocks on a hung
/// mount, so it is called on a blocking thread.
pub(super) fn watch(files: &[PathBuf], changed: Arc<Notify>) -> Result<RecommendedWatcher, String> {
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let mut names: Vec<OsString> = files.iter().filter_map(|file| file.file_name()).map(OsString::from).collect();
    names.push(volume::DATA.into());
    let handler = move |event: notify::Result<Event>| {
        // An error (the queue ran over) says that something happened, but not what.
        if event.map_or(true, |event| concerns(&event, &names)) {
            changed.notify_one();
        }
    };
    let mut watcher = notify::recommended_watcher(handler).map_err(|error| error.to_string())?;
    for directory in volume::directories(&files) {
        watcher.watch(&directory, RecursiveMode::NonRecursive).map_err(|error| format!("{}: {error}", directory.display()))?;
    }
    Ok(watcher)
}

/// Whether the event can mean another content. Our own reading makes events, too: to react to those would never end.
fn concerns(event: &Event, names: &[OsString]) -> bool {
    if event.kind.is_access() && event.kind != EventKind::Access(AccessKind::Close(AccessMode::Write)) {
        return false;
    }
    event.need_rescan() || event.paths.iter().any(|path| path.file_name().is_some_and(|name| names.iter().any(|known| known == name)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use notify::event::{CreateKind, Flag, ModifyKind, RemoveKind, RenameMode};

    use super::*;

    #[test]
    fn only_what_can_change_the_content_concerns() {
        let names = [OsString::from("password"), OsString::from("..data")];
        let rows = [
            (EventKind::Create(CreateKind::File), "/x/password", true),
            (EventKind::Modify(ModifyKind::Name(RenameMode::To)), "/x/..data", true),
            (EventKind::Modify(ModifyKind::Any), "/x/password", true),
            (EventKind::Remove(RemoveKind::File), "/x/password", true),
            (EventKind::Access(AccessKind::Close(AccessMode::Write)), "/x/password", true),
            (EventKind::Access(AccessKind::Open(AccessMode::Any)), "/x/password", false),
            (EventKind::Access(AccessKind::Close(AccessMode::Read)), "/x/password", false),
            (EventKind::Modify(ModifyKind::Any), "/x/other", false),
        ];
        for (kind, path, expected) in rows {
            assert_eq!(concerns(&Event::new(kind).add_path(path.into()), &names), expected, "{kind:?} {path}");
        }
        assert!(concerns(&Event::new(EventKind::Other).set_flag(Flag::Rescan), &names));
    }

    #[tokio::test]
    async fn a_replaced_file_wakes() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        fs::write(&file, "old").unwrap();
        let changed = Arc::new(Notify::new());
        let _watcher = watch(std::slice::from_ref(&file), Arc::clone(&changed)).unwrap();
        fs::write(directory.path().join("next"), "new").unwrap();
        fs::rename(directory.path().join("next"), &file).unwrap();
        tokio::time::timeout(Duration::from_secs(30), changed.notified()).await.expect("the rename is an event");
    }

    /// C36: what cannot be watched is an error to be told, not a panic.
    #[test]
    fn c36_a_directory_that_is_not_there_is_named() {
        let error = watch(&["/nonexistent/password".into()], Arc::default()).unwrap_err();
        assert!(error.starts_with("/nonexistent: "), "{error}");
    }
}
