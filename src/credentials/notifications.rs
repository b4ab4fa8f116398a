//! Makes a poll come sooner when the file system says that something changed. Never the only way to notice: a watch can be lost (a limit, a network
//! file system, a directory that was replaced), and nobody says so.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use crate::config::{CredentialsSource, Source};

/// Tells of changes for as long as it lives.
pub(super) struct Notifications {
    changed: Arc<Notify>,
    _watcher: Option<RecommendedWatcher>,
}

impl Notifications {
    /// Resolves after something changed near the files. Cancel safe; several changes may be one.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Watches the folders of the files: a file that is replaced is another file, and `..data` lies beside the links.
pub(super) fn watch(source: &CredentialsSource) -> Notifications {
    let folders = folders(source);
    let changed = Arc::new(Notify::new());
    if folders.is_empty() {
        return Notifications { changed, _watcher: None };
    }
    let waker = Arc::clone(&changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the files is an event too; answering it with a read would never end. Errors lead to a poll, which is always right.
        if event.map_or(true, |event| !event.kind.is_access()) {
            waker.notify_one();
        }
    });
    let watcher = watcher.and_then(|mut watcher| {
        for folder in &folders {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    });
    match watcher {
        Ok(watcher) => Notifications { changed, _watcher: Some(watcher) },
        Err(error) => {
            tracing::warn!(%error, "changes of the credential files are noticed at the next poll only (credentials.poll_interval)");
            Notifications { changed, _watcher: None }
        }
    }
}

fn folders(source: &CredentialsSource) -> BTreeSet<PathBuf> {
    let folder = |path: &Path| match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => PathBuf::from("/"),
    };
    match source {
        CredentialsSource::Unconfigured => BTreeSet::new(),
        CredentialsSource::TokenFile(path) => BTreeSet::from([folder(path)]),
        CredentialsSource::Pair { email, password } => {
            let mut folders = BTreeSet::new();
            if let Source::File(path) = email {
                folders.insert(folder(path));
            }
            if let Source::File(path) = password {
                folders.insert(folder(path));
            }
            folders
        }
    }
}
