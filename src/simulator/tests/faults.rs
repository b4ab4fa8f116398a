//! What a client sees of each fault.

use std::time::Duration;

use http::{Method, Response};
use tokio::runtime::{Builder, LocalOptions};

use super::client::{Client, LIMIT, MINT, Seen, ask, content, mint_fields, start};
use crate::simulator::{Action, End, Fault, Options, Point, Protocols, Simulator, Transport, byte_at};

/// What a client sees of each fault: the beginning of the reply, its length where it is certain, and the end of the connection.
#[test]
fn each_fault_looks_as_it_says() {
    let quiet = Duration::from_millis(300);
    let early = || Response::builder().status(413).body("too large".into()).unwrap();
    let rows: Vec<(Action, &str, Option<usize>, Seen)> = vec![
        (Action::status(503), "HTTP/1.1 503 ", None, Seen::Open),
        (Action::json(403, "{}"), "HTTP/1.1 403 ", None, Seen::Open),
        (Action::ReplyEarly(early()), "HTTP/1.1 413 ", None, Seen::Open),
        (Action::garbage(b"\0garbage"), "\0garbage", Some(8), Seen::CloseNotify),
        (Action::Raw(b"HTTP/1.1 200 OK\r\n".to_vec(), End::Stay), "HTTP/1.1 200 OK\r\n", Some(17), Seen::Open),
        (Action::close_before_reply(), "", Some(0), Seen::CloseNotify),
        (Action::reset(), "", Some(0), Seen::Reset),
        (Action::reset_after_body(), "", Some(0), Seen::Reset),
        (Action::Break(End::Fin), "", Some(0), Seen::Fin),
        (Action::Hang, "", Some(0), Seen::Open),
        (Action::hang_after_body(), "", Some(0), Seen::Open),
        (Action::drop_reply(), "", Some(0), Seen::CloseNotify),
        (Action::cut_after(11), "HTTP/1.1 20", Some(11), Seen::Fin),
        (Action::Cut(Point::Reply(11), End::Reset), "HTTP/1.1 20", None, Seen::Reset),
        (Action::Cut(Point::Reply(1_000_000), End::Fin), "HTTP/1.1 200 ", None, Seen::Open),
        (Action::Cut(Point::Body(7), End::Fin), "HTTP/1.1 200 ", None, Seen::Fin),
        (Action::stall_body(7), "HTTP/1.1 200 ", None, Seen::Open),
    ];
    let simulator = start();
    simulator.ignore_authorization(true);
    for (action, beginning, length, end) in rows {
        let name = format!("{action:?}");
        simulator.fault(Fault::at("/bytes/40000", action).once());
        let mut client = Client::connect(&simulator);
        client.send("GET /bytes/40000 HTTP/1.1\r\nhost: x\r\n\r\n");
        let (bytes, seen) = client.rest(if end == Seen::Open { quiet } else { LIMIT });
        assert_eq!(seen, end, "{name}");
        // A reset may overtake what was written before it.
        if seen != Seen::Reset {
            assert!(bytes.starts_with(beginning.as_bytes()), "{name}: {}", String::from_utf8_lossy(&bytes));
        }
        assert!(length.is_none_or(|length| bytes.len() == length), "{name}: {} bytes", bytes.len());
    }
    assert_eq!(ask(&simulator, "GET", "/users", "", "").0, 200, "no fault is left");
}

#[test]
fn a_cut_body_has_as_many_bytes_as_ordered_in_both_framings() {
    let simulator = start();
    simulator.ignore_authorization(true);
    for bytes in [0, 1, 16384, 20000, 40000] {
        simulator.fault(Fault::below("/bytes/", Action::Cut(Point::Body(bytes), End::Fin)).times(2));
        for framing in ["length", "chunked"] {
            let mut client = Client::connect(&simulator);
            client.send(&format!("GET /bytes/40000?framing={framing} HTTP/1.1\r\nhost: x\r\n\r\n"));
            let (reply, seen) = client.rest(LIMIT);
            let (head, content) = content(&reply);
            assert_eq!(seen, Seen::Fin, "{framing} {bytes}");
            assert_eq!(head.contains("content-length: 40000"), framing == "length", "{head}");
            assert!(content == (0..bytes).map(byte_at).collect::<Vec<_>>(), "{framing} {bytes}: {} came", content.len());
        }
    }
}

#[test]
fn a_lost_mint_reply_leaves_a_token_behind() {
    let simulator = start();
    let fault = simulator.fault(Fault::at("/api-tokens/", Action::drop_reply()).method(Method::POST).once());
    let mut client = Client::connect(&simulator);
    let fields = mint_fields("a@example.com", "first");
    client.send(&format!("POST /api-tokens/ HTTP/1.1\r\nhost: x\r\n{fields}content-length: {}\r\n\r\n{MINT}", MINT.len()));
    assert_eq!(client.rest(LIMIT), (Vec::new(), Seen::CloseNotify));
    assert_eq!((simulator.mints().len(), simulator.live_tokens().len(), simulator.strikes(fault)), (1, 1, 1));
}

#[test]
fn a_delay_holds_the_honest_answer_back() {
    let simulator = start();
    simulator.ignore_authorization(true);
    simulator.fault(Fault::everywhere(Action::Delay(Duration::from_millis(300))).once());
    let mut client = Client::connect(&simulator);
    client.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(client.rest(Duration::from_millis(50)), (Vec::new(), Seen::Open));
    assert!(client.reply().0.starts_with("HTTP/1.1 200 "));
}

/// HTTP/2 with prior knowledge, so that the test needs no TLS of its own.
#[test]
fn http2_requests_are_answered_recorded_and_cut() {
    let options = Options { transport: Transport::Plain, protocols: Protocols::Http2, ..Options::default() };
    let simulator = Simulator::start(options).unwrap();
    let token = simulator.make_token();
    let get = async |path: &str| {
        let tcp = tokio::net::TcpStream::connect(simulator.address()).await.unwrap();
        let io = hyper_util::rt::TokioIo::new(tcp);
        let (mut sender, connection) = hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
        let connection = crate::task::spawn("client", connection);
        let request = http::Request::get(format!("http://localhost{path}")).header("authorization", &token);
        let response = sender.send_request(request.body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap()).await;
        let outcome = match response {
            Ok(response) => (response.status().as_u16(), http_body_util::BodyExt::collect(response.into_body()).await.is_ok()),
            Err(_) => (0, false),
        };
        connection.abort();
        outcome
    };
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        assert_eq!(get("/users").await, (200, true));
        assert_eq!(get("/bytes/300000").await, (200, true));
        simulator.fault(Fault::at("/bytes/1", Action::reset()));
        assert_eq!(get("/bytes/1").await, (0, false));
        simulator.fault(Fault::at("/bytes/300000", Action::Cut(Point::Body(1000), End::Fin)));
        assert_eq!(get("/bytes/300000").await, (200, false));
        let requests = simulator.wait_for_async(|requests| requests.len() == 4, LIMIT).await.unwrap();
        assert_eq!((requests[0].version, requests[0].target.as_str()), (http::Version::HTTP_2, "/users"));
        assert_eq!((requests[0].header("authorization"), requests[0].complete), (Some(token.as_str()), true));
    });
}
