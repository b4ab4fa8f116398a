//! B54: a panic while one request is served ends that request and nothing else. The program has no switch to panic on, so this drives the server, which
//! contains panics, with a service that does.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Semaphore, watch};
use upsolver_auth_proxy::config::ListenAddress;
use upsolver_auth_proxy::server::clock::{Clock, Limits};
use upsolver_auth_proxy::server::{self, Refusal, Settings, listen};
use upsolver_auth_proxy::shutdown::Stage;

use crate::support::raw::Raw;

async fn serve(request: Request<Incoming>, _clock: Rc<Clock>) -> Response<Full<Bytes>> {
    assert_ne!(request.uri().path(), "/panic", "as asked");
    Response::new(Full::new(Bytes::from_static(b"ok")))
}

/// Runs the server on a thread of its own; the sender ends it when dropped.
fn start() -> (SocketAddr, watch::Sender<Stage>, std::thread::JoinHandle<usize>) {
    let (stage, receiver) = watch::channel(Stage::Serve);
    let (bound, address) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).expect("a runtime");
        runtime.block_on(async {
            let mut lists = listen::bind(&[ListenAddress::Socket(SocketAddr::from(([127, 0, 0, 1], 0)))], 0o600, 1).expect("a free port");
            let sockets = lists.pop().expect("one worker");
            bound.send(sockets[0].tcp_address().expect("TCP")).expect("the test waits");
            let listeners = sockets.into_iter().map(|socket| socket.into_listener().expect("a runtime")).collect();
            let second = Duration::from_secs(30);
            let refusal = Refusal { message: Bytes::new(), status: StatusCode::REQUEST_TIMEOUT, code: "request_timeout" };
            let settings = Settings {
                limits: Limits { idle: second, head: second, body_idle: second, response: second },
                max_header_size: 65536,
                connections: Arc::new(Semaphore::new(16)),
                max_refusals: 2,
                too_slow: refusal.clone(),
                too_many: refusal,
                metrics: Arc::default(),
            };
            server::run(listeners, None, settings, receiver, serve).await
        })
    });
    (address.recv().expect("the server binds"), stage, thread)
}

#[test]
fn b54_a_panic_ends_one_request_and_no_other() {
    let (address, stage, thread) = start();
    let get = |connection: &mut Raw, path: &str| {
        connection.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        connection.read_response(false).map(|answer| (answer.status(), answer.text()))
    };
    let ok = Some((200, "ok".to_owned()));
    let mut before = Raw::connect(address);
    assert_eq!(get(&mut before, "/x"), ok);
    for _ in 0..20 {
        let mut unlucky = Raw::connect(address);
        assert!(matches!(get(&mut unlucky, "/panic"), None | Some((500, _))));
        assert!(unlucky.is_closed());
    }
    assert_eq!(get(&mut before, "/x"), ok);
    assert_eq!(get(&mut Raw::connect(address), "/x"), ok);
    drop(before);
    stage.send_replace(Stage::Drain);
    assert_eq!(thread.join().expect("the server outlives the panics"), 0);
}
