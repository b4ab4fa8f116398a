//! What a client sees of each fault.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::runtime::{Builder, LocalOptions};
use tokio::time::Instant;

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
        let (bytes, seen) = client.rest_after(beginning.len(), if end == Seen::Open { quiet } else { LIMIT });
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
fn a_cut_at_the_very_end_takes_the_last_chunk_away() {
    let simulator = start();
    simulator.ignore_authorization(true);
    simulator.fault(Fault::at("/echo", Action::Cut(Point::Body(5), End::Fin)));
    let mut client = Client::connect(&simulator);
    client.send("POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n");
    let (reply, seen) = client.rest(LIMIT);
    assert_eq!((content(&reply).1, seen), (b"abcde".to_vec(), Seen::Fin));
}

#[test]
fn a_limit_that_a_reply_does_not_reach_ends_with_it() {
    let simulator = start();
    simulator.ignore_authorization(true);
    simulator.fault(Fault::at("/users", Action::cut_after(1000)).once());
    let mut client = Client::connect(&simulator);
    client.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    client.reply();
    client.send("GET /bytes/2000 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let (reply, seen) = client.rest(LIMIT);
    assert_eq!((content(&reply).1.len(), seen), (2000, Seen::CloseNotify));
}

#[test]
fn faults_read_the_request_to_its_end_or_not_as_they_say() {
    let early = || Action::ReplyEarly(Response::new("early".into()));
    for (action, complete) in [(Action::status(500), true), (Action::hang_after_body(), true), (early(), false), (Action::Hang, false)] {
        let simulator = start();
        let name = format!("{action:?}");
        simulator.fault(Fault::everywhere(action));
        let mut client = Client::connect(&simulator);
        client.send("POST /sink HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nab");
        simulator.wait_for(|requests| requests.len() == 1, LIMIT).unwrap();
        client.send("cde");
        if complete {
            simulator.wait_for(|requests| requests[0].complete, LIMIT).unwrap();
        } else {
            client.rest(Duration::from_millis(100));
        }
        assert_eq!((simulator.requests()[0].complete, simulator.requests()[0].body == b"abcde"), (complete, complete), "{name}");
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
    let delay = Duration::from_millis(100);
    simulator.fault(Fault::everywhere(Action::Delay(delay)).once());
    let mut client = Client::connect(&simulator);
    let sent = Instant::now();
    client.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(client.reply().0.starts_with("HTTP/1.1 200 "));
    assert!(sent.elapsed() >= delay);
}

#[test]
fn a_held_request_goes_on_when_its_fault_is_removed() {
    let simulator = start();
    simulator.ignore_authorization(true);
    let hold = simulator.fault(Fault::everywhere(Action::Hold).once());
    let mut client = Client::connect(&simulator);
    client.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    simulator.wait_for(|requests| requests.len() == 1, LIMIT).unwrap();
    assert_eq!(client.rest(Duration::from_millis(50)), (Vec::new(), Seen::Open));
    simulator.remove_fault(hold);
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
        let io = TokioIo::new(tcp);
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        let connection = crate::task::spawn("client", connection);
        let request = Request::get(format!("http://localhost{path}")).header("authorization", &token);
        let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await;
        let outcome = match response {
            Ok(response) => (response.status().as_u16(), received(response.into_body()).await),
            Err(_) => (0, Err(0)),
        };
        connection.abort();
        outcome
    };
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        assert_eq!(get("/users").await, (200, Ok(2)));
        assert_eq!(get("/bytes/300000").await, (200, Ok(300_000)));
        simulator.fault(Fault::at("/bytes/1", Action::reset()));
        assert_eq!(get("/bytes/1").await, (0, Err(0)));
        simulator.fault(Fault::at("/bytes/300000", Action::Cut(Point::Body(20_000), End::Fin)));
        let cut = get("/bytes/300000").await;
        assert!(matches!(cut, (200, Err(1..=20_000))), "{cut:?}");
        simulator.fault(Fault::at("/bytes/16000", Action::Cut(Point::Body(16_000), End::Fin)));
        let cut = get("/bytes/16000").await;
        assert!(matches!(cut, (200, Err(_))), "the end of the stream was not announced: {cut:?}");
        let requests = simulator.wait_for_async(|requests| requests.len() == 5, LIMIT).await.unwrap();
        assert_eq!((requests[0].version, requests[0].target.as_str()), (Version::HTTP_2, "/users"));
        assert_eq!((requests[0].header("authorization"), requests[0].complete), (Some(token.as_str()), true));
    });
}

/// How many bytes of a body came: `Ok` with its end, `Err` where it broke off.
async fn received(mut body: Incoming) -> Result<usize, usize> {
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes += frame.data_ref().map_or(0, Bytes::len),
            Err(_) => return Err(bytes),
        }
    }
    Ok(bytes)
}
