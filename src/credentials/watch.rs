//! Keeps looking at the credentials, and publishes what changed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::RecommendedWatcher;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::settle::{Decision, SETTLE, Settling};
use super::{Loaded, Reading, describe, events, files, read};
use crate::config::{Credentials, CredentialsSource};
use crate::metrics::TokenMetrics;
use crate::task;

/// A file that cannot be read in this time is on a mount that hangs; it is said so, and what is in force stays.
const READ_DEADLINE: Duration = Duration::from_secs(5);
/// One change makes several events. This long after the first one the files are read, once for all of them.
const EVENT_PAUSE: Duration = Duration::from_millis(100);
/// Part of the poll interval by which each wait is longer or shorter, so that a fleet does not read a network mount in step.
const POLL_JITTER: f64 = 0.1;

/// The credentials as they change. Dropping it ends the watching; receivers then keep the last value.
#[derive(Debug)]
pub struct Watch {
    receiver: watch::Receiver<Loaded>,
    reload: Arc<Notify>,
    source: Kept,
}

/// What keeps the channel open.
#[derive(Debug)]
enum Kept {
    /// The sender of values that never change. Were it dropped, each wait for a change would end at once.
    Values { _sender: watch::Sender<Loaded> },
    /// The task that reads the files; it holds the sender.
    Files(JoinHandle<()>),
}

impl Watch {
    /// Starts watching on the current thread's runtime. Values that are no files are there at once and never change; files are
    /// [`Loaded::Missing`] for the moment until they have been read for the first time.
    pub fn start(config: Credentials, metrics: Arc<TokenMetrics>) -> Self {
        let files: Vec<PathBuf> = files(&config.source).into_iter().map(Path::to_owned).collect();
        let reload = Arc::new(Notify::new());
        if files.is_empty() {
            // No file is touched, so nothing blocks.
            let (sender, receiver) = watch::channel(read(&config.source));
            return Self { receiver, reload, source: Kept::Values { _sender: sender } };
        }
        let source_name = describe(&config.source);
        let (sender, receiver) = watch::channel(Loaded::Missing { reason: format!("{source_name}: not read yet") });
        let watcher = Watcher {
            reader: Reader { source: Arc::new(config.source), running: None },
            source_name,
            poll_interval: config.poll_interval,
            settling: Settling::default(),
            sender,
            metrics,
        };
        let task = task::spawn("credentials", watcher.run(files, Arc::clone(&reload)));
        Self { receiver, reload, source: Kept::Files(task) }
    }

    /// The last good credentials, and every change of them.
    pub fn receiver(&self) -> watch::Receiver<Loaded> {
        self.receiver.clone()
    }

    /// [`Watch::reload`] for somebody who outlives this value.
    pub fn reloader(&self) -> impl Fn() + use<> {
        let reload = Arc::clone(&self.reload);
        move || reload.notify_one()
    }

    /// Reads the files now instead of at the next poll (SIGHUP, `/reload`). Any number of calls before the reading makes one reading; changed content is
    /// used once it has settled, as ever.
    pub fn reload(&self) {
        self.reload.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Kept::Files(task) = &self.source {
            // It holds nothing that must be finished.
            task.abort();
        }
    }
}

/// The task behind a [`Watch`].
struct Watcher {
    reader: Reader,
    source_name: String,
    poll_interval: Duration,
    settling: Settling,
    sender: watch::Sender<Loaded>,
    metrics: Arc<TokenMetrics>,
}

impl Watcher {
    async fn run(mut self, files: Vec<PathBuf>, reload: Arc<Notify>) {
        let mut settled_in = self.look().await;
        // Events only from here on: a start must not wait for them.
        let changed = Arc::new(Notify::new());
        let _events = self.watch_events(files, Arc::clone(&changed)).await;
        loop {
            let jitter = 1.0 + POLL_JITTER * (2.0 * fastrand::f64() - 1.0);
            let poll = self.poll_interval.mul_f64(jitter);
            // Whichever comes first makes one reading; a notification that loses stays stored in its `Notify` and makes the next one.
            tokio::select! {
                () = sleep(settled_in.map_or(poll, |settled_in| settled_in.min(poll))) => {}
                () = reload.notified() => {}
                () = changed.notified() => sleep(EVENT_PAUSE).await,
            }
            settled_in = self.look().await;
        }
    }

    async fn watch_events(&self, files: Vec<PathBuf>, changed: Arc<Notify>) -> Option<RecommendedWatcher> {
        let watching = tokio::task::spawn_blocking(move || events::watch(&files, changed));
        let reason = match timeout(READ_DEADLINE, watching).await {
            Ok(Ok(Ok(events))) => return Some(events),
            Ok(Ok(Err(reason))) => reason,
            Ok(Err(panic)) => panic.to_string(),
            Err(_) => "no answer from the file system".to_owned(),
        };
        tracing::warn!(reason, poll_interval = ?self.poll_interval, "cannot watch the credential files; changes are found by polling alone");
        None
    }

    /// Reads once and acts on it. Returns when to look again where a change has not settled yet.
    async fn look(&mut self) -> Option<Duration> {
        let reading = self.reader.read().await;
        match self.settling.judge(reading, tokio::time::Instant::now()) {
            Decision::Take(content) => {
                self.metrics.credentials_reload("changed");
                tracing::info!(source = self.source_name, "credentials read; they are new");
                self.sender.send_replace(content.into_loaded(&self.reader.source, SystemTime::now()));
                None
            }
            Decision::LookAgain(settled_in) => {
                tracing::debug!(source = self.source_name, after = ?SETTLE, "the credentials changed; used when they have settled");
                Some(settled_in)
            }
            Decision::Unchanged { recovered } => {
                self.metrics.credentials_reload("unchanged");
                if recovered {
                    tracing::info!(source = self.source_name, "the credentials can be read again and are unchanged");
                }
                None
            }
            Decision::Failed { reason, news } => {
                self.metrics.credentials_reload("failed");
                self.report_failure(reason, news);
                None
            }
        }
    }

    fn report_failure(&self, reason: String, news: bool) {
        if !news {
            return;
        }
        if self.settling.has_any() {
            tracing::warn!(reason, "cannot read the credentials; those in force stay");
        } else {
            tracing::warn!(reason, "no usable credentials yet; waiting for them");
            self.sender.send_replace(Loaded::Missing { reason });
        }
    }
}

/// Reads on a blocking thread, one at a time: a mount that hangs costs one thread, and the control plane goes on.
struct Reader {
    source: Arc<CredentialsSource>,
    /// A reading that did not end in time.
    running: Option<JoinHandle<Reading>>,
}

impl Reader {
    /// Cancel safe: a reading that was begun is waited for by the next call.
    async fn read(&mut self) -> Reading {
        // What a late reading saw may be old by now.
        self.running.take_if(|running| running.is_finished());
        let source = Arc::clone(&self.source);
        let running = self.running.get_or_insert_with(|| tokio::task::spawn_blocking(move || Reading::take(&source)));
        let failed = |problem: &str| Reading { content: Err(format!("{}: {problem}", describe(&self.source))), atomic: false };
        let reading = match timeout(READ_DEADLINE, running).await {
            Ok(Ok(reading)) => reading,
            Ok(Err(_)) => failed("reading failed; this is a defect of the proxy"),
            // The thread stays with the hung read, and no second one is sent after it.
            Err(_) => return failed(&format!("no answer from the file system within {}", humantime::format_duration(READ_DEADLINE))),
        };
        self.running = None;
        reading
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use tokio::time::Instant;

    use super::*;
    use crate::config::Source;
    use crate::secret::{Email, Password};

    /// Long enough that nothing found in less can have been found by polling.
    const POLL: Duration = Duration::from_mins(10);

    struct Files {
        directory: tempfile::TempDir,
    }

    impl Files {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().unwrap() }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn write(&self, name: &str, content: &str) {
            fs::write(self.path(name), content).unwrap();
        }

        /// Replaces `..data` as the kubelet does.
        fn swap(&self, version: &str, password: &str) {
            fs::create_dir(self.path(version)).unwrap();
            fs::write(self.path(version).join("password"), password).unwrap();
            symlink(version, self.path("..data_tmp")).unwrap();
            fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
        }

        fn watch(&self, poll_interval: Duration) -> (Watch, watch::Receiver<Loaded>) {
            let email = Source::Value { value: Email::new("me@example.com".to_owned()).unwrap(), origin: "a test".to_owned() };
            let source = CredentialsSource::Pair { email, password: Source::File(self.path("password")) };
            let watch = Watch::start(Credentials { source, poll_interval }, Arc::default());
            let receiver = watch.receiver();
            (watch, receiver)
        }
    }

    fn password(loaded: &Loaded) -> &str {
        match loaded {
            Loaded::Missing { .. } => "missing",
            Loaded::Pair(pair) => pair.password.expose(),
            Loaded::Token(_) => "token",
        }
    }

    async fn next(receiver: &mut watch::Receiver<Loaded>) -> String {
        receiver.changed().await.expect("the watching goes on");
        password(&receiver.borrow_and_update()).to_owned()
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn c39_a_change_is_published_once_and_only_when_it_has_settled() {
        let files = Files::new();
        files.write("password", "old");
        let (_watch, mut receiver) = files.watch(Duration::from_millis(200));
        assert_eq!(next(&mut receiver).await, "old");
        files.write("password", "half");
        sleep(SETTLE / 2).await;
        files.write("password", "half and half");
        let before = Instant::now();
        assert_eq!(next(&mut receiver).await, "half and half");
        assert!(before.elapsed() >= SETTLE);
        let quiet = timeout(POLL, receiver.changed()).await;
        assert!(quiet.is_err(), "nothing more is published");
    }

    /// C36, C37: the file is a link into another directory, so that no event tells of the change, and its modification time is put back.
    #[tokio::test(flavor = "local", start_paused = true)]
    async fn c36_c37_polling_finds_a_change_by_content_alone() {
        let (files, elsewhere) = (Files::new(), Files::new());
        elsewhere.write("password", "old");
        symlink(elsewhere.path("password"), files.path("password")).unwrap();
        let (_watch, mut receiver) = files.watch(Duration::from_secs(15));
        assert_eq!(next(&mut receiver).await, "old");
        let modified = fs::metadata(elsewhere.path("password")).unwrap().modified().unwrap();
        elsewhere.write("password", "new");
        File::options().write(true).open(elsewhere.path("password")).unwrap().set_modified(modified).unwrap();
        assert_eq!(next(&mut receiver).await, "new");
    }

    /// C42: a reload reads at once; a thousand of them change nothing where the content is the same.
    #[tokio::test(flavor = "local", start_paused = true)]
    async fn c42_a_reload_does_not_wait_for_the_next_poll() {
        let (files, elsewhere) = (Files::new(), Files::new());
        elsewhere.write("password", "old");
        symlink(elsewhere.path("password"), files.path("password")).unwrap();
        let (watch, mut receiver) = files.watch(POLL);
        assert_eq!(next(&mut receiver).await, "old");
        for _ in 0..1000 {
            watch.reload();
        }
        assert!(timeout(POLL / 2, receiver.changed()).await.is_err(), "the content is the same");
        elsewhere.write("password", "new");
        let before = Instant::now();
        watch.reload();
        assert_eq!(next(&mut receiver).await, "new");
        assert!(before.elapsed() < POLL / 4);
    }

    /// C35: a swapped volume was complete when it appeared.
    #[tokio::test(flavor = "local", start_paused = true)]
    async fn c35_a_swapped_volume_need_not_settle() {
        let files = Files::new();
        files.swap("..1", "old");
        symlink("..data/password", files.path("password")).unwrap();
        let (watch, mut receiver) = files.watch(POLL);
        assert_eq!(next(&mut receiver).await, "old");
        files.swap("..2", "new");
        let before = Instant::now();
        watch.reload();
        assert_eq!(next(&mut receiver).await, "new");
        assert!(before.elapsed() < SETTLE);
    }

    /// C34: absent at first is waited for. C41: gone or emptied later changes nothing.
    #[tokio::test(flavor = "local", start_paused = true)]
    async fn c34_c41_absence_is_waited_out() {
        let files = Files::new();
        let (_watch, mut receiver) = files.watch(Duration::from_secs(15));
        assert_eq!(next(&mut receiver).await, "missing");
        let Loaded::Missing { reason } = receiver.borrow().clone() else { panic!("nothing is there yet") };
        assert!(reason.contains("password: No such file"), "{reason}");
        files.write("password", "first\n");
        assert_eq!(next(&mut receiver).await, "first");
        files.write("password", "");
        assert!(timeout(POLL, receiver.changed()).await.is_err(), "an emptied file takes nothing away");
        fs::remove_file(files.path("password")).unwrap();
        assert!(timeout(POLL, receiver.changed()).await.is_err(), "nor does a removed one");
        files.write("password", "second");
        assert_eq!(next(&mut receiver).await, "second");
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn values_are_there_at_once_and_the_channel_stays_open() {
        let email = Source::Value { value: Email::new("me@example.com".to_owned()).unwrap(), origin: "UPSOLVER_EMAIL".to_owned() };
        let password = Source::Value { value: Password::new("secret".to_owned()).unwrap(), origin: "UPSOLVER_PASSWORD".to_owned() };
        let config = Credentials { source: CredentialsSource::Pair { email, password }, poll_interval: POLL };
        let watch = Watch::start(config, Arc::default());
        let mut receiver = watch.receiver();
        let Loaded::Pair(pair) = receiver.borrow_and_update().clone() else { panic!("both values are there") };
        assert_eq!((pair.source.as_str(), pair.read_again), ("UPSOLVER_EMAIL and UPSOLVER_PASSWORD", false));
        watch.reload();
        assert!(timeout(POLL, receiver.changed()).await.is_err(), "values never change");
    }

    /// A mount that hangs: the reading fails in time, no second thread is sent after the first, and what comes late is not used.
    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_hung_read_fails_in_time() {
        let files = Files::new();
        files.write("token", "fresh");
        let late = task::spawn("hung", async {
            sleep(READ_DEADLINE * 3).await;
            Reading { content: Err("late".to_owned()), atomic: false }
        });
        let source = Arc::new(CredentialsSource::TokenFile(files.path("token")));
        let mut reader = Reader { source, running: Some(late) };
        for _ in 0..2 {
            let reason = reader.read().await.content.unwrap_err();
            assert!(reason.ends_with("token: no answer from the file system within 5s"), "{reason}");
        }
        sleep(READ_DEADLINE * 2).await;
        assert!(reader.read().await.content.is_ok(), "a new reading, not the late one");
    }
}
