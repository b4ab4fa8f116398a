//! What an HTTP/2 upstream can do to a request, frame by frame: D12, D13, D17.

use crate::support::frames::{
    CANCEL, DATA, END_STREAM, ENHANCE_YOUR_CALM, Frames, GOAWAY, HEADERS, INTERNAL_ERROR, NO_ERROR, REFUSED_STREAM, RST_STREAM,
};
use crate::support::raw::{Message, Raw};
use crate::support::wire::Wire;

fn wire() -> Wire {
    Wire::set(&["upstream.http_version=2"])
}

const GET: &str = "GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n";
const POST: &str = "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody";

fn send(wire: &Wire, request: &str) -> Raw {
    let mut downstream = wire.proxy.connect();
    downstream.send(request);
    downstream
}

fn answer(mut downstream: Raw) -> Message {
    downstream.read_response(false).expect("an answer")
}

/// D12: above the last stream nothing was processed, so the request goes to another connection, a POST too; below it the answer still comes.
#[test]
fn d12_a_goaway_sends_the_streams_above_it_elsewhere() {
    let wire = wire();
    let first = send(&wire, GET);
    let mut connection = Frames::accept(&wire);
    assert_eq!(connection.whole_request(), 1);
    let second = send(&wire, POST);
    assert_eq!(connection.whole_request(), 3);
    connection.go_away(1, NO_ERROR);
    let mut another = Frames::accept(&wire);
    let stream = another.whole_request();
    another.answer(stream, b"second");
    assert_eq!(answer(second).text(), "second");
    connection.answer(1, b"first");
    assert_eq!(answer(first).text(), "first");
    // And nothing new comes to the connection that goes away.
    let third = send(&wire, GET);
    let stream = another.whole_request();
    another.answer(stream, b"third");
    assert_eq!(answer(third).text(), "third");
}

/// D12: whether a stream that the GOAWAY includes was processed nobody knows; a POST is not sent again.
#[test]
fn d12_a_stream_below_the_goaway_that_breaks_is_an_error() {
    let wire = wire();
    let post = send(&wire, POST);
    let mut connection = Frames::accept(&wire);
    assert_eq!(connection.whole_request(), 1);
    connection.go_away(1, INTERNAL_ERROR);
    drop(connection);
    let answer = answer(post);
    assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_protocol"));
    assert!(wire.upstream.saw_nothing(), "sent again");
}

/// B36: a GOAWAY may carry words (RFC 9113 section 6.8), and a faulty upstream the token in them. `Wire` searches the log for it.
#[test]
fn b36_the_words_of_a_goaway_are_not_repeated() {
    let wire = wire();
    let downstream = send(&wire, POST);
    let mut connection = Frames::accept(&wire);
    assert_eq!(connection.whole_request(), 1);
    let words = format!("denied to {}", wire.token);
    connection.write(GOAWAY, 0, 0, &[&0_u32.to_be_bytes(), &INTERNAL_ERROR.to_be_bytes(), words.as_bytes()].concat());
    drop(connection);
    assert_eq!(answer(downstream).code(), "upstream_protocol");
    wire.proxy.wait_for_log("\"a request failed\"");
}

/// D13: `REFUSED_STREAM` says that nothing was processed: once more, whatever the method, on the same connection or another.
#[test]
fn d13_a_refused_stream_is_sent_again_once() {
    for request in [GET, POST] {
        let wire = wire();
        let warm = send(&wire, GET);
        let mut connection = Frames::accept(&wire);
        let stream = connection.whole_request();
        connection.answer(stream, b"warm");
        assert_eq!(answer(warm).text(), "warm");

        let downstream = send(&wire, request);
        let refused = connection.whole_request();
        connection.reset(refused, REFUSED_STREAM);
        let again = connection.whole_request();
        assert!(again > refused);
        connection.answer(again, b"again");
        let answer = answer(downstream);
        assert_eq!((answer.status(), answer.text().as_str()), (200, "again"));
    }
}

/// D13: anything else may have been processed, or is a wish to be left alone: never sent again.
#[test]
fn d13_other_resets_are_an_error_and_no_storm() {
    for reason in [ENHANCE_YOUR_CALM, CANCEL, INTERNAL_ERROR] {
        for request in [GET, POST] {
            let wire = wire();
            let downstream = send(&wire, request);
            let mut connection = Frames::accept(&wire);
            let stream = connection.whole_request();
            connection.reset(stream, reason);
            let refused = answer(downstream);
            assert_eq!((refused.status(), refused.code().as_str()), (502, "upstream_protocol"), "{reason}");
            // What comes next on the connection is the next request, not a second try.
            let next = send(&wire, GET);
            let stream = connection.whole_request();
            connection.answer(stream, b"next");
            assert_eq!(answer(next).text(), "next", "{reason}");
            assert!(wire.upstream.saw_nothing(), "{reason}");
        }
    }
}

/// D13: an upstream that refuses for ever is asked a few times at most.
#[test]
fn d13_endless_refusals_end() {
    for request in [GET, POST] {
        let wire = wire();
        let mut downstream = send(&wire, request);
        let mut connection = Frames::accept(&wire);
        let tries = std::thread::scope(|scope| {
            let refusals = scope.spawn(|| {
                let mut tries = 0;
                while let Some((kind, flags, stream)) = connection.read() {
                    if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
                        tries += 1;
                        assert!(tries < 20, "a storm");
                        connection.reset(stream, REFUSED_STREAM);
                    }
                }
                tries
            });
            let answer = downstream.read_response(false).expect("an answer");
            assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_protocol"));
            // Ends the connection to the upstream, and with it the thread.
            wire.proxy.signal(rustix::process::Signal::TERM);
            refusals.join().expect("no storm")
        });
        assert!((2..=3).contains(&tries), "{tries} tries");
    }
}

/// D13, A50: a complete reply before the upload's end, then `NO_ERROR`: the reply is delivered.
#[test]
fn d13_a_full_early_reply_is_delivered() {
    let wire = wire();
    let mut downstream = send(&wire, "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nonly this");
    let mut connection = Frames::accept(&wire);
    let stream = connection.request();
    connection.answer(stream, b"enough");
    connection.reset(stream, NO_ERROR);
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.text().as_str(), answer.complete), (200, "enough", true));
}

/// D17: a stream that is reset in the middle of its body is cut downstream.
#[test]
fn d17_a_reset_in_the_body_is_a_cut() {
    for reason in [CANCEL, INTERNAL_ERROR, NO_ERROR, REFUSED_STREAM] {
        let wire = wire();
        let mut downstream = send(&wire, GET);
        let mut connection = Frames::accept(&wire);
        let stream = connection.whole_request();
        connection.ok(stream, 0);
        connection.write(DATA, 0, stream, b"part");
        let head = downstream.read_head().expect("the reply begins");
        assert_eq!(head.status(), 200);
        assert_eq!(downstream.take(9), b"4\r\npart\r\n");
        connection.reset(stream, reason);
        assert_eq!(downstream.read_to_end(), b"", "{reason}: no last chunk");
        // The connection lives on for others.
        let next = send(&wire, GET);
        let stream = connection.whole_request();
        connection.answer(stream, b"next");
        assert_eq!(answer(next).text(), "next");
    }
}

/// A downstream that leaves resets its stream and leaves the connection to the others.
#[test]
fn d24_a_downstream_that_leaves_resets_its_stream() {
    let wire = wire();
    let downstream = send(&wire, GET);
    let mut connection = Frames::accept(&wire);
    let stream = connection.whole_request();
    drop(downstream);
    loop {
        if let (RST_STREAM, _, reset) = connection.read().expect("the connection lives on") {
            assert_eq!(reset, stream);
            break;
        }
    }
    let next = send(&wire, GET);
    let stream = connection.whole_request();
    connection.answer(stream, b"next");
    assert_eq!(answer(next).text(), "next");
}
