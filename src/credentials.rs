//! Reads the credentials as one consistent pair, watches their files, publishes changes.
//!
//! What a file says is decided by its content, never by its times: [`read`] takes the content, [`Watch`] asks for it again at every poll, and a file
//! system's notification only makes a poll come sooner. The last good credentials stay in force through whatever happens to the files.
//!
//! A changed content counts once two reads [`SETTLE`] apart agree, so that a half-written file is never used. The exception is a Kubernetes volume,
//! whose files change together by the swap of one link (`..data`, kubernetes `pkg/volume/util/atomic_writer.go`): what was read through one
//! version of that link is whole.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::config;
use crate::metrics::TokenMetrics;
use crate::secret::{Email, Password, Token};
use crate::task;

mod files;
mod notifications;

pub use files::read;
pub(crate) use files::read_secret;

/// Two reads this far apart must agree before a changed content is used.
const SETTLE: Duration = Duration::from_secs(1);
/// A read that takes longer hangs on a dead file system; the next poll tries again.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// What the token task works with; published on a watch channel, last good kept.
#[derive(Debug, Clone)]
pub enum Loaded {
    /// Nothing usable has been read yet; the reason is for people and quotes no secret.
    Missing {
        /// E.g. `/var/run/secrets/upsolver/password: is empty`.
        reason: String,
    },
    /// Email and password, read as one pair.
    Pair(Arc<Pair>),
    /// A token made in the UI.
    Token(Arc<FixedToken>),
}

/// Email and password.
#[derive(Debug)]
pub struct Pair {
    /// The email.
    pub email: Email,
    /// The password.
    pub password: Password,
    /// Where they came from, for people.
    pub source: String,
    /// When they were read.
    pub loaded_at: SystemTime,
}

/// The content of `credentials.token_file`.
#[derive(Debug)]
pub struct FixedToken {
    /// The token.
    pub token: Token,
    /// Where it came from, for people.
    pub source: String,
    /// When it was read.
    pub loaded_at: SystemTime,
}

impl Loaded {
    /// Whether both hold the same secrets, wherever and whenever they were read.
    pub fn same_secrets(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pair(one), Self::Pair(other)) => one.email == other.email && one.password == other.password,
            (Self::Token(one), Self::Token(other)) => one.token == other.token,
            (Self::Missing { .. }, Self::Missing { .. }) => true,
            _ => false,
        }
    }
}

/// The task that keeps the credentials current. Dropping it ends the watching.
#[derive(Debug)]
pub struct Watch {
    receiver: watch::Receiver<Loaded>,
    again: Rc<Notify>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Reads the credentials once, then starts to watch them.
    pub async fn start(config: config::Credentials, metrics: Arc<TokenMetrics>) -> Self {
        let first = read_elsewhere(&config.source).await.credentials;
        if let Loaded::Missing { reason } = &first {
            tracing::warn!(reason, "there are no usable credentials yet; waiting for them");
        }
        let (sender, receiver) = watch::channel(first);
        let again = Rc::new(Notify::new());
        let task = task::spawn("credentials", follow(config, sender, Rc::clone(&again), metrics));
        Self { receiver, again, task }
    }

    /// The credentials, and every change of them.
    pub fn receiver(&self) -> watch::Receiver<Loaded> {
        self.receiver.clone()
    }

    /// Reads the files again now, as on SIGHUP. Returns at once; many calls are one read.
    pub fn reload(&self) {
        self.again.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Polls until nobody listens.
async fn follow(config: config::Credentials, sender: watch::Sender<Loaded>, again: Rc<Notify>, metrics: Arc<TokenMetrics>) {
    let notifications = notifications::watch(&config.source);
    let mut complaint = None;
    loop {
        // Up to a tenth later, so that many proxies do not read one shared volume in step.
        let pause = config.poll_interval.mul_f64(1.0 + 0.1 * fastrand::f64());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = again.notified() => {}
            () = notifications.changed() => {}
            () = sender.closed() => return,
        }
        let result = match settled(&config.source, &sender.borrow().clone()).await {
            Settled::Unchanged => "unchanged",
            Settled::Unusable(reason) => {
                if complaint.as_ref() != Some(&reason) {
                    tracing::warn!(reason, "the credentials cannot be used as they are now; the last good ones stay in force");
                    complaint = Some(reason);
                }
                metrics.credentials_reload("failed");
                continue;
            }
            Settled::Changed(loaded) => {
                tracing::info!(source = loaded.source(), "the credentials changed");
                sender.send_replace(loaded);
                "changed"
            }
        };
        complaint = None;
        metrics.credentials_reload(result);
    }
}

enum Settled {
    Unchanged,
    Changed(Loaded),
    Unusable(String),
}

/// What the files say, once they say the same twice, or are replaced atomically.
async fn settled(source: &config::CredentialsSource, current: &Loaded) -> Settled {
    let mut before = read_elsewhere(source).await;
    loop {
        match &before.credentials {
            Loaded::Missing { reason } => return Settled::Unusable(reason.clone()),
            same if same.same_secrets(current) => return Settled::Unchanged,
            _ if before.atomic => return Settled::Changed(before.credentials),
            _ => {}
        }
        tokio::time::sleep(SETTLE).await;
        let now = read_elsewhere(source).await;
        if now.credentials.same_secrets(&before.credentials) {
            return Settled::Changed(now.credentials);
        }
        before = now;
    }
}

/// Files may lie on a network mount that hangs; the control plane must not.
async fn read_elsewhere(source: &config::CredentialsSource) -> files::Read {
    let owned = source.clone();
    match tokio::time::timeout(READ_DEADLINE, tokio::task::spawn_blocking(move || read(&owned))).await {
        Ok(Ok(read)) => read,
        Ok(Err(_)) => files::Read::missing("reading the credentials failed".to_owned()),
        Err(_) => files::Read::missing(format!("reading the credentials takes longer than {READ_DEADLINE:?}")),
    }
}

impl Loaded {
    /// Where they came from, for people.
    pub fn source(&self) -> &str {
        match self {
            Self::Missing { reason } => reason,
            Self::Pair(pair) => &pair.source,
            Self::Token(token) => &token.source,
        }
    }
}
