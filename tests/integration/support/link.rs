//! A bad network between the proxy and its upstream: a relay of bytes that delays, throttles, splits, stalls, loses and cuts them. What needs the kernel,
//! dropped packets above all, is in `tests/namespaces`. With the simulated API, whose faults are inside the protocol, it is what the matrix calls the fake upstream (E02).

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// What happens to the bytes of a connection, in each direction. The default is a good network. A connection keeps what it began with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conditions {
    /// Each segment arrives so much later.
    pub(crate) delay: Duration,
    /// And up to so much more, at random. Order is kept, as TCP keeps it.
    pub(crate) jitter: Duration,
    /// Segments have at most so many bytes, a random number of them; 0: whatever comes.
    pub(crate) segment: usize,
    /// Throughput of each direction; 0: whatever goes.
    pub(crate) bytes_per_second: u32,
    /// What happens once, after how many bytes in either direction.
    pub(crate) after: Option<(u64, Accident)>,
}

/// What can happen to a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Accident {
    /// A reset, in both directions: what too much loss looks like in the end.
    Reset,
    /// An end of both directions in order, which TLS knows to be none.
    Fin,
    /// Nothing arrives any more, and nobody is told.
    Silence,
    /// Nothing arrives for so long; then all does.
    Stall(Duration),
}

/// A running relay. Its threads end with their connections, or with the test process.
pub(crate) struct Link {
    address: SocketAddr,
    conditions: Arc<Mutex<Conditions>>,
}

impl Link {
    /// To `upstream`. The proxy gets there with `upstream.resolve`, so that the name it verifies stays.
    pub(crate) fn to(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let conditions = Arc::new(Mutex::new(Conditions::default()));
        let current = Arc::clone(&conditions);
        thread::spawn(move || {
            for downstream in listener.incoming().map_while(Result::ok) {
                let conditions = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // Nobody listens there: the connection closes.
                let Ok(upstream) = TcpStream::connect(upstream) else { continue };
                relay(downstream, upstream, &conditions);
            }
        });
        Self { address, conditions }
    }

    /// For `--set`.
    pub(crate) fn setting(&self) -> String {
        format!("upstream.resolve={}", self.address)
    }

    /// For connections from now on.
    pub(crate) fn set(&self, conditions: Conditions) {
        *self.conditions.lock().unwrap_or_else(PoisonError::into_inner) = conditions;
    }
}

fn relay(downstream: TcpStream, upstream: TcpStream, conditions: &Conditions) {
    let (Ok(()), Ok(())) = (downstream.set_nodelay(true), upstream.set_nodelay(true)) else { return };
    let (Ok(back_to), Ok(back_from)) = (downstream.try_clone(), upstream.try_clone()) else { return };
    // Both directions count towards the accident.
    let passed = Arc::new(Mutex::new(0));
    for (from, to) in [(downstream, upstream), (back_from, back_to)] {
        let (conditions, passed) = (conditions.clone(), Arc::clone(&passed));
        thread::spawn(move || pass(from, to, &conditions, &passed));
    }
}

/// One direction, until its end or the accident.
fn pass(mut from: TcpStream, mut to: TcpStream, conditions: &Conditions, passed: &Mutex<u64>) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let most = if conditions.segment == 0 { buffer.len() } else { fastrand::usize(1..=conditions.segment) };
        let Ok(read @ 1..) = from.read(&mut buffer[..most]) else { break };
        let before = {
            let mut passed = passed.lock().unwrap_or_else(PoisonError::into_inner);
            let before = *passed;
            *passed += read as u64;
            before
        };
        let mut pause = conditions.delay + conditions.jitter.mul_f64(fastrand::f64());
        if conditions.bytes_per_second > 0 {
            pause += Duration::from_secs(1) * u32::try_from(read).expect("a small buffer") / conditions.bytes_per_second;
        }
        thread::sleep(pause);
        if let Some((at, accident)) = conditions.after
            && before + read as u64 > at
        {
            match accident {
                Accident::Stall(time) if before <= at => thread::sleep(time),
                Accident::Stall(_) => {}
                // Reads on: whoever sends finds no full window.
                Accident::Silence => {
                    while let Ok(1..) = from.read(&mut buffer) {}
                    return;
                }
                Accident::Reset => {
                    for socket in [&from, &to] {
                        // A socket that is gone already is as good as reset.
                        let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
                        let _ = socket.shutdown(Shutdown::Read);
                    }
                    return;
                }
                Accident::Fin => {
                    for socket in [&from, &to] {
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                    return;
                }
            }
        }
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // The other side may have left first.
    let _ = to.shutdown(Shutdown::Write);
}
