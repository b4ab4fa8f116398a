//! From a signal to a finished process: the stages that everything which serves watches, and what makes them go on.

use tokio::sync::watch;

/// How far the shutdown has gone. Only ever moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Serving. Also during `shutdown.delay`, when readiness already says no.
    Serve,
    /// Taking nothing new, finishing what is in flight.
    Drain,
    /// Closing what is left.
    Cut,
}

/// Resolves when `stage` has reached `at_least`, or its sender is gone, which means the same. Cancel safe.
pub async fn reached(stage: &mut watch::Receiver<Stage>, at_least: Stage) {
    // An error means that the sender is gone.
    let _ = stage.wait_for(|stage| *stage >= at_least).await;
}

/// The signals that stop the process, and the one that reloads it.
#[derive(Debug)]
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, SIGINT or SIGQUIT, by name.
    Stop(&'static str),
    /// SIGHUP.
    Reload,
}

impl Signals {
    /// Must be called on a runtime; from then on the signals no longer end the process by themselves. As process 1 of a container this is what makes
    /// them work at all.
    pub fn listen() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal. Cancel safe.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Signal::Stop("SIGINT"),
            _ = self.quit.recv() => Signal::Stop("SIGQUIT"),
            _ = self.hangup.recv() => Signal::Reload,
        }
    }
}
