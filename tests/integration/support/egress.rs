//! An egress proxy that speaks nothing but CONNECT.

use std::io::{Write, copy};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use super::raw::{Message, Raw};

/// What it does with a CONNECT.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tunnel {
    /// Connects to where the request says.
    Open,
    /// Answers this status, with a body, and closes.
    Refuse(u16),
    /// Never answers.
    Silence,
}

/// A running egress proxy. Its threads end with their connections, or with the test process.
pub(crate) struct EgressProxy {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Message>>>,
}

impl EgressProxy {
    pub(crate) fn start(tunnel: Tunnel) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let seen = Arc::clone(&all);
                thread::spawn(move || serve(stream, tunnel, &seen));
            }
        });
        Self { address, seen }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The heads that it received so far.
    pub(crate) fn seen(&self) -> Vec<Message> {
        self.seen.lock().expect("no thread panics with it").clone()
    }
}

fn serve(stream: TcpStream, tunnel: Tunnel, seen: &Mutex<Vec<Message>>) {
    let Ok(mut downstream) = stream.try_clone() else { return };
    // The client of a tunnel sends nothing behind its head before the answer, so nothing is left in the buffer.
    let Some(head) = Raw::new(stream).read_head() else { return };
    let target = head.start.split(' ').nth(1).unwrap_or_default().to_owned();
    seen.lock().expect("no thread panics with it").push(head);
    match tunnel {
        Tunnel::Refuse(status) => {
            // The client may have left.
            let _ = write!(downstream, "HTTP/1.1 {status} No\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope");
        }
        Tunnel::Silence => thread::park(),
        Tunnel::Open => {
            let Ok(mut upstream) = TcpStream::connect(target) else { return };
            if downstream.set_read_timeout(None).is_err() || downstream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").is_err() {
                return;
            }
            let (Ok(mut back_from), Ok(mut back_to)) = (upstream.try_clone(), downstream.try_clone()) else { return };
            thread::spawn(move || {
                let _ = copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(Shutdown::Write);
            });
            let _ = copy(&mut downstream, &mut upstream);
            let _ = upstream.shutdown(Shutdown::Write);
        }
    }
}
