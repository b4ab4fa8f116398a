//! Whether every worker still answers: the question behind `/liveness`.
//!
//! A worker is one thread with one event loop. It answers by running a task of its own on that loop, so an answer proves that the loop turns: a
//! worker that is stuck in a computation, deadlocked or gone does not answer. Nothing else is asked, least of all the upstream; a restart of this
//! process heals nothing there (contract §6).
//!
//! The protocol, for whoever starts a worker: make a [`channel`], keep the [`WorkerPing`] for the admin server, move the [`WorkerPings`] to the
//! worker's thread, and run [`WorkerPings::answer`] there as a task until the worker ends.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How long a worker may take to answer. Half of a probe's usual patience of several seconds, and far more than any event loop should lag.
pub const DEADLINE: Duration = Duration::from_secs(2);

/// A question of each of several probes at a time; more wait for their turn within the deadline.
const WAITING: usize = 8;

/// Asks one worker.
#[derive(Debug, Clone)]
pub struct WorkerPing(mpsc::Sender<oneshot::Sender<()>>);

/// The worker's end.
#[derive(Debug)]
pub struct WorkerPings(mpsc::Receiver<oneshot::Sender<()>>);

/// What came back from a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// It answered.
    Alive,
    /// It did not within [`DEADLINE`].
    Stuck,
    /// Its end is gone: the worker has ended.
    Ended,
}

/// The two ends of the question to one worker.
pub fn channel() -> (WorkerPing, WorkerPings) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (WorkerPing(sender), WorkerPings(receiver))
}

impl WorkerPing {
    /// Asks the worker and waits for at most [`DEADLINE`]. When cancelled, the question is void.
    pub async fn ask(&self) -> Pulse {
        let ask = async {
            let (answer, answered) = oneshot::channel();
            match self.0.send(answer).await {
                Ok(()) if answered.await.is_ok() => Pulse::Alive,
                _ => Pulse::Ended,
            }
        };
        timeout(DEADLINE, ask).await.unwrap_or(Pulse::Stuck)
    }
}

impl WorkerPings {
    /// Answers until nobody can ask any more; to be run on the worker's event loop. Dropping it says that the worker has ended.
    pub async fn answer(mut self) {
        while let Some(answer) = self.0.recv().await {
            let _ = answer.send(()); // Fails where the question is void.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worker on a thread and a runtime of its own, as in production.
    #[tokio::test]
    async fn an_answer_comes_from_the_workers_thread() {
        let (ping, pings) = channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let worker = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = pings.answer() => {}
                    _ = stopped => {}
                }
            });
        });
        assert_eq!(ping.ask().await, Pulse::Alive);
        assert_eq!(ping.ask().await, Pulse::Alive);
        stop.send(()).unwrap();
        worker.join().unwrap();
        assert_eq!(ping.ask().await, Pulse::Ended);
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_does_not_turn_is_stuck() {
        let (ping, pings) = channel();
        for _ in 0..=WAITING {
            assert_eq!(ping.ask().await, Pulse::Stuck); // The last one finds the channel full.
        }
        let answering = pings.answer();
        tokio::pin!(answering);
        tokio::select! {
            () = &mut answering => unreachable!("the ping is still there"),
            pulse = ping.ask() => assert_eq!(pulse, Pulse::Alive, "it turns again"),
        }
    }
}
