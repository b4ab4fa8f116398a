//! Exchanges moved by hand, step by step, on a real socket: what a connection does when the two directions of an exchange meet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::*;

/// A request body that the test sends piece by piece.
struct Pieces {
    receiver: mpsc::UnboundedReceiver<Result<Frame<Bytes>, ()>>,
    length: Option<u64>,
}

type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, ()>>;

impl Pieces {
    /// `length` is what the request announces; chunks where it is nothing.
    fn new(length: Option<u64>) -> (Sender, Self) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (sender, Self { receiver, length })
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = ();

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ()>>> {
        self.receiver.poll_recv(cx)
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

#[expect(clippy::unnecessary_wraps, reason = "what a body yields")]
fn data(bytes: &'static [u8]) -> Result<Frame<Bytes>, ()> {
    Ok(Frame::data(Bytes::from_static(bytes)))
}

/// Tells whether it was woken.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

async fn connected() -> (Http1<Pieces>, TcpStream) {
    connected_for().await
}

/// A connection, and the upstream's end of it.
async fn connected_for<B: Body<Data = Bytes> + Unpin>() -> (Http1<B>, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let near = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("a connection");
    let (far, _) = listener.accept().await.expect("a connection");
    (Http1::new(Connection::plain(near)), far)
}

fn request(method: Method) -> RequestHead {
    RequestHead { method, target: PathAndQuery::from_static("/x"), headers: HeaderMap::new() }
}

/// As the upstream received it, up to `end`.
async fn received(upstream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        assert!(upstream.read_buf(&mut bytes).await.expect("a request") > 0, "closed after {bytes:?}");
    }
    String::from_utf8(bytes).expect("text")
}

/// Ends the connection by a reset, without the end of the stream before it (`SO_LINGER` of zero).
async fn reset(connection: &Http1<Pieces>, upstream: TcpStream) {
    socket2::SockRef::from(&upstream).set_linger(Some(std::time::Duration::ZERO)).expect("a socket");
    drop(upstream);
    connection.io.wait_for_reading().await;
}

/// What the queue of departures does with a request.
fn begin(connection: &mut Http1<Pieces>, request: &RequestHead, body: Pieces) {
    connection.begin(request, body);
    connection.depart();
}

async fn head(connection: &mut Http1<Pieces>) -> Result<response::Parts, Error> {
    poll_fn(|cx| connection.poll_head(cx)).await
}

async fn frame(connection: &mut Http1<Pieces>) -> Option<Result<Frame<Bytes>, Error>> {
    poll_fn(|cx| connection.poll_body(cx)).await
}

async fn upload(connection: &mut Http1<Pieces>) -> Result<(), Error> {
    poll_fn(|cx| connection.poll_upload(cx)).await
}

/// The data of the next frame.
async fn piece(connection: &mut Http1<Pieces>) -> Bytes {
    frame(connection).await.expect("a frame").expect("no error").into_data().expect("data")
}

#[tokio::test]
async fn a43_bytes_that_nobody_asked_for_are_seen_by_a_task_that_is_out_of_budget() {
    let (mut connection, mut upstream) = connected().await;
    assert!(connection.is_quiet());
    upstream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.expect("sent");
    connection.io.wait_for_reading().await;
    while coop::has_budget_remaining() {
        coop::consume_budget().await;
    }
    assert!(!connection.is_quiet());
}

#[tokio::test]
async fn d16_a_reset_that_the_upload_met_is_not_the_end_of_the_response() {
    let (mut connection, mut upstream) = connected().await;
    let (sender, body) = Pieces::new(None);
    begin(&mut connection, &request(Method::POST), body);
    upstream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf").await.expect("sent");
    head(&mut connection).await.expect("a head");
    assert_eq!(piece(&mut connection).await, "half");

    received(&mut upstream, "\r\n\r\n").await;
    reset(&connection, upstream).await;
    sender.send(data(b"more")).expect("taken");
    drop(sender);
    upload(&mut connection).await.expect("an upload into the void");
    let end = frame(&mut connection).await;
    assert!(matches!(end, Some(Err(Error::Io(_)))), "{end:?}");
}

/// The other order: the response ended, and what was sent to an upstream that had closed was reset.
#[tokio::test]
async fn a50_a_response_that_ended_before_the_reset_is_complete() {
    let (mut connection, mut upstream) = connected().await;
    let (sender, body) = Pieces::new(None);
    begin(&mut connection, &request(Method::POST), body);
    upstream.write_all(b"HTTP/1.1 200 OK\r\n\r\nall").await.expect("sent");
    head(&mut connection).await.expect("a head");
    assert_eq!(piece(&mut connection).await, "all");

    received(&mut upstream, "\r\n\r\n").await;
    drop(upstream);
    connection.io.wait_for_reading().await;
    // The first is answered by a reset, which the second meets.
    while !connection.io.is_closed_for_writing() {
        sender.send(data(b"more")).expect("taken");
        let sent = upload(&mut connection);
        assert!(tokio::time::timeout(std::time::Duration::ZERO, sent).await.is_err(), "the upload is not over");
        tokio::task::yield_now().await;
    }
    let end = frame(&mut connection).await;
    assert!(end.is_none(), "{end:?}");
    assert!(!connection.is_complete());
}

#[tokio::test]
async fn b05_an_upload_that_fails_wakes_who_reads_the_response() {
    let (mut connection, mut upstream) = connected().await;
    let (sender, body) = Pieces::new(Some(5));
    begin(&mut connection, &request(Method::POST), body);
    upstream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await.expect("sent");
    head(&mut connection).await.expect("a head");

    let reader = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&reader));
    assert!(connection.poll_body(&mut Context::from_waker(&waker)).is_pending());
    sender.send(Err(())).expect("taken");
    assert!(matches!(upload(&mut connection).await, Err(Error::RequestBody)));
    assert!(reader.0.load(Ordering::SeqCst), "the reader sleeps on");
    assert!(matches!(frame(&mut connection).await, Some(Err(Error::RequestBody))));
    assert!(!connection.is_complete());
}

/// Panics as soon as it is read.
struct Panics;

impl Body for Panics {
    type Data = Bytes;
    type Error = ();

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ()>>> {
        panic!("as asked")
    }
}

/// B54: many requests depart in one task; a panic reaches the one that waits for this response.
#[tokio::test]
async fn b54_a_body_that_panics_is_left_to_its_own_request() {
    let (mut connection, _upstream) = connected_for().await;
    connection.begin(&request(Method::POST), Panics);
    let reader = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&reader));
    assert!(connection.poll_head(&mut Context::from_waker(&waker)).is_pending());
    connection.depart();
    assert!(reader.0.load(Ordering::SeqCst), "the request waits on");
    let again = std::panic::AssertUnwindSafe(|| connection.poll_head(&mut Context::from_waker(&waker)));
    assert!(std::panic::catch_unwind(again).is_err());
}

#[tokio::test]
async fn an_upload_that_succeeds_lets_go_of_who_reads_the_response() {
    let (mut connection, mut upstream) = connected().await;
    let (sender, body) = Pieces::new(None);
    begin(&mut connection, &request(Method::POST), body);
    upstream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await.expect("sent");
    head(&mut connection).await.expect("a head");

    let reader = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&reader));
    assert!(connection.poll_body(&mut Context::from_waker(&waker)).is_pending());
    drop(sender);
    upload(&mut connection).await.expect("an upload");
    upstream.write_all(b"hello").await.expect("sent");
    assert_eq!(piece(&mut connection).await, "hello");
    assert!(connection.is_complete());
    drop(waker);
    assert_eq!(Arc::strong_count(&reader), 1, "an idle connection holds a task");
}

#[tokio::test]
async fn d09_a_request_that_met_a_closed_connection_comes_back_unread() {
    let (mut connection, upstream) = connected().await;
    let (sender, body) = Pieces::new(Some(4));
    sender.send(data(b"body")).expect("taken");
    reset(&connection, upstream).await;
    begin(&mut connection, &request(Method::POST), body);
    let error = head(&mut connection).await.expect_err("no head");
    assert!(matches!(error, Error::NotSent), "{error:?}");
    let mut body = connection.take_back().expect("the body");
    let frame = body.receiver.try_recv().expect("unread").expect("no error");
    assert_eq!(frame.into_data().expect("data"), "body");
}

#[tokio::test]
async fn a_request_of_which_a_byte_was_sent_does_not_come_back_as_unsent() {
    let (mut connection, mut upstream) = connected().await;
    let (_sender, body) = Pieces::new(Some(4));
    begin(&mut connection, &request(Method::POST), body);
    assert!(connection.poll_head(&mut Context::from_waker(Waker::noop())).is_pending());
    received(&mut upstream, "\r\n\r\n").await;
    reset(&connection, upstream).await;
    let error = head(&mut connection).await.expect_err("no head");
    assert!(matches!(error, Error::Io(_)), "{error:?}");
    assert!(!connection.has_received());
}

#[tokio::test]
async fn a60_a_body_that_differs_from_its_length_is_never_sent_to_its_end() {
    for (length, pieces) in [(5, &[&b"four"[..]][..]), (5, &[b"four", b"more"]), (0, &[b"x"])] {
        let (mut connection, mut upstream) = connected().await;
        let (sender, body) = Pieces::new(Some(length));
        for piece in pieces {
            sender.send(data(piece)).expect("taken");
        }
        drop(sender);
        begin(&mut connection, &request(Method::POST), body);
        let sent = upload(&mut connection).await;
        // Nobody asks for more than was announced: what is behind it is not seen.
        assert!(if length == 0 { sent.is_ok() } else { matches!(sent, Err(Error::RequestBody)) }, "{length} {pieces:?}: {sent:?}");
        drop(connection);
        let mut wire = String::new();
        upstream.read_to_string(&mut wire).await.expect("text");
        assert_eq!(wire, if length == 0 { "POST /x HTTP/1.1\r\n\r\n" } else { "POST /x HTTP/1.1\r\n\r\nfour" });
    }
}

#[tokio::test]
async fn a33_chunks_are_sent_as_they_come_and_trailers_not_at_all() {
    let (mut connection, mut upstream) = connected().await;
    let (sender, body) = Pieces::new(None);
    let trailers = Ok(Frame::trailers(HeaderMap::from_iter([(http::header::AGE, http::HeaderValue::from_static("1"))])));
    // An empty piece would be the last chunk.
    for piece in [data(b""), data(b"0123456789abcdef"), data(b""), data(b"x"), trailers] {
        sender.send(piece).expect("taken");
    }
    drop(sender);
    begin(&mut connection, &request(Method::POST), body);
    upload(&mut connection).await.expect("an upload");
    drop(connection);
    let mut wire = String::new();
    upstream.read_to_string(&mut wire).await.expect("text");
    assert_eq!(wire, "POST /x HTTP/1.1\r\n\r\n10\r\n0123456789abcdef\r\n1\r\nx\r\n0\r\n\r\n");
}

#[tokio::test]
async fn a36_a22_interim_responses_are_skipped_but_a_101_is_the_last() {
    for (response, status, complete) in [
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", 204, true),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n", 101, false),
    ] {
        let (mut connection, mut upstream) = connected().await;
        begin(&mut connection, &request(Method::GET), Pieces::new(Some(0)).1);
        upstream.write_all(response.as_bytes()).await.expect("sent");
        let head = head(&mut connection).await.expect("a head");
        assert_eq!((head.status.as_u16(), connection.is_complete()), (status, complete));
        assert!(frame(&mut connection).await.is_none());
    }
}

#[tokio::test]
async fn a41_a43_a58_a_connection_in_any_doubt_is_not_complete() {
    for (method, response, complete) in [
        (Method::GET, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", true),
        (Method::GET, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokx", false),
        (Method::GET, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", false),
        (Method::GET, "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", false),
        (Method::GET, "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", true),
        (Method::GET, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true),
        (Method::GET, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n", false),
        (Method::HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", true),
        (Method::HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false),
        (Method::GET, "HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n", true),
    ] {
        let (mut connection, mut upstream) = connected().await;
        begin(&mut connection, &request(method), Pieces::new(Some(0)).1);
        upstream.write_all(response.as_bytes()).await.expect("sent");
        head(&mut connection).await.expect("a head");
        while let Some(frame) = frame(&mut connection).await {
            assert_eq!(frame.expect("no error").into_data().expect("data"), "ok");
        }
        assert_eq!(connection.is_complete(), complete, "{response}");
    }
}
