//! The HTTP/2 leg to the upstream: a valid field section (A55), the token never indexed (B40), refused streams sent again.

use bytes::Bytes;
use http::{Request, Response};

use crate::support::raw::Raw;
use crate::support::wire::Wire;

fn wire() -> Wire {
    Wire::set(&["upstream.http_version=2"])
}

/// Serves HTTP/2 on one connection: `answer` gets each request with its number, and whether it was answered with a refusal.
fn serve(
    connection: &Raw,
    requests: usize,
    mut answer: impl FnMut(usize, &Request<()>) -> Option<Response<()>>,
) -> Vec<(Request<()>, Bytes)> {
    let stream = connection.stream().try_clone().expect("a socket");
    stream.set_nonblocking(true).expect("a socket");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::from_std(stream).expect("a runtime");
        let mut connection = h2::server::handshake(stream).await.expect("a preface");
        let mut seen = Vec::new();
        while seen.len() < requests {
            let (request, mut respond) = connection.accept().await.expect("a request").expect("a valid one");
            let (head, mut body) = request.into_parts();
            let head = Request::from_parts(head, ());
            let mut received = Vec::new();
            match answer(seen.len(), &head) {
                None => respond.send_reset(h2::Reason::REFUSED_STREAM),
                Some(response) => {
                    // The connection has to be driven while the body comes.
                    let reading = async {
                        while let Some(data) = body.data().await {
                            let data = data.expect("a body");
                            body.flow_control().release_capacity(data.len()).expect("what was received");
                            received.extend_from_slice(&data);
                        }
                    };
                    tokio::select! {
                        () = reading => {}
                        _ = futures_util::future::poll_fn(|cx| connection.poll_closed(cx)) => {}
                    }
                    let mut sending = respond.send_response(response, false).expect("an open stream");
                    sending.send_data(Bytes::from_static(b"ok"), true).expect("an open stream");
                }
            }
            seen.push((head, Bytes::from(received)));
        }
        connection.graceful_shutdown();
        let _ =
            tokio::time::timeout(std::time::Duration::from_secs(5), futures_util::future::poll_fn(|cx| connection.poll_closed(cx))).await;
        seen
    })
}

#[test]
fn a55_no_connection_specific_field_leaves() {
    let wire = wire();
    let mut downstream = wire.proxy.connect();
    downstream.send(
        "POST /x/%2F?a=b HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, X-Foo\r\nX-Foo: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: gzip\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\nX-UPPER: Value\r\nCookie: a=b\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    );
    // h2 refuses connection-specific fields and upper-case names by itself (RFC 9113 section 8.2).
    let seen = serve(&wire.upstream.accept(), 1, |_, _| Some(Response::new(())));
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.start.as_str(), answer.text().as_str()), ("HTTP/1.1 200 OK", "ok"));
    let (head, body) = &seen[0];
    assert_eq!(head.uri().to_string(), format!("http://{}/x/%2F?a=b", wire.upstream.address()));
    let mut fields: Vec<_> = head.headers().iter().map(|(name, value)| format!("{name}: {}", value.to_str().expect("ASCII"))).collect();
    fields.sort();
    let authorization = format!("authorization: {}", wire.token);
    let mut expected = [authorization.as_str(), "cookie: a=b", "via: 1.1 upsolver-auth-proxy", "x-upper: Value"];
    expected.sort_unstable();
    assert_eq!(fields, expected);
    assert_eq!(body.as_ref(), b"hello");
}

#[test]
fn a55_hop_by_hop_fields_of_a_reply_end_here_and_te_trailers_may_leave() {
    let wire = wire();
    let mut downstream = wire.proxy.connect();
    downstream.send("GET /x HTTP/1.1\r\nHost: localhost\r\nTE: trailers\r\nConnection: te\r\n\r\n");
    let seen =
        serve(&wire.upstream.accept(), 1, |_, _| Some(Response::builder().status(418).header("x-kept", "1").body(()).expect("valid")));
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.header("x-kept"), answer.text().as_str()), (418, Some("1"), "ok"));
    assert!(seen[0].0.headers().get("te").is_none_or(|te| te == "trailers"));
}

/// RFC 9113 section 8.7: a refused stream was not processed, so any method may be sent again.
#[test]
fn a_refused_stream_is_sent_again() {
    let wire = wire();
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello");
    let seen = serve(&wire.upstream.accept(), 2, |number, _| (number > 0).then(|| Response::new(())));
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"));
    assert_eq!(seen[1].1.as_ref(), b"hello");
}

#[test]
fn b40_the_token_is_never_indexed() {
    let wire = wire();
    let mut downstream = wire.proxy.connect();
    downstream.send("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut upstream = wire.upstream.accept();
    assert_eq!(upstream.take(24), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    // An empty SETTINGS frame is the server's preface.
    upstream.send([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    let block = loop {
        let head = upstream.take(9);
        assert_eq!(head.len(), 9, "the proxy closed");
        let payload = upstream.take(u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize);
        if head[3] == 1 {
            break payload;
        }
    };
    // RFC 7541 section 6.2.3: a literal never indexed begins with 0001, and `authorization` is entry 23 of the static table: 15 in the prefix, then 8.
    assert!(block.windows(2).any(|pair| pair == [0x1f, 0x08]), "{}", block.escape_ascii());
}
