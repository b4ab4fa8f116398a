//! What happens to the upstream and the credentials meanwhile.

use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use upsolver_auth_proxy::simulator::{Account, End, Simulator};

/// How long nobody listens upstream.
const GONE: Duration = Duration::from_millis(200);

/// One thing that happened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strike {
    pub(crate) what: What,
    pub(crate) from: Instant,
    /// When everything was as before; of a strike on connections, when the next strike began.
    pub(crate) to: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// All tokens are deleted.
    Revoke,
    /// The password changes, first upstream and then in the proxy's file.
    Rotate,
    /// All connections end.
    End(End),
    /// All connections are reset, and for a moment nobody listens.
    Restart,
}

const TURNS: [What; 6] = [What::Revoke, What::End(End::Close), What::Rotate, What::End(End::Reset), What::End(End::Fin), What::Restart];

/// Strikes in turn, with a pause before each, until it is told to stop; returns all strikes.
pub(crate) fn run(simulator: &Simulator, account: &Account, directory: &Path, pause: Duration, stop: &AtomicBool) -> Vec<Strike> {
    let mut strikes: Vec<Strike> = Vec::new();
    for (number, what) in TURNS.into_iter().cycle().enumerate() {
        let next = Instant::now() + pause;
        while Instant::now() < next {
            if stop.load(Ordering::Relaxed) {
                return strikes;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let from = Instant::now();
        if let Some(last) = strikes.last_mut()
            && let What::End(_) = last.what
        {
            last.to = from;
        }
        strike(what, number, simulator, account, directory);
        // Until the next one begins.
        let to = if let What::End(_) = what { from + Duration::from_hours(1) } else { Instant::now() };
        strikes.push(Strike { what, from, to });
    }
    strikes
}

fn strike(what: What, number: usize, simulator: &Simulator, account: &Account, directory: &Path) {
    match what {
        What::Revoke => drop(simulator.revoke_all()),
        What::Rotate => {
            let password = format!("password-{number}");
            simulator.change_password(&account.email, &password);
            let fresh = directory.join("password.new");
            let replaced = std::fs::write(&fresh, password).and_then(|()| std::fs::rename(&fresh, directory.join("password")));
            if let Err(error) = replaced {
                println!("cannot rotate the password: {error}");
            }
        }
        What::End(end) => simulator.end_connections(end),
        What::Restart => {
            simulator.refuse_connections(true);
            simulator.end_connections(End::Reset);
            std::thread::sleep(GONE);
            simulator.refuse_connections(false);
            while TcpStream::connect(simulator.address()).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
