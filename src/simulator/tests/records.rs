//! What is recorded of requests.

use std::time::Duration;

use super::client::{Client, LIMIT, ask, start};
use crate::simulator::{MAX_RECORDED_BODY, Options, Simulator};

#[test]
fn requests_are_recorded_byte_for_byte() {
    let simulator = start();
    simulator.ignore_authorization(true);
    let mut client = Client::connect(&simulator);
    let first = "POST /sink?q=%41 HTTP/1.1\r\nHoSt: x\r\nX-Odd:   two  words \r\nx-odd: again\r\nTransfer-Encoding: chunked\r\n\r\n";
    let second = "PUT /sink HTTP/1.1\r\nb: 1\r\nA: 2\r\nhost: x\r\nContent-Length: 3\r\n\r\n";
    // Pipelined, so that the second head comes in the same read as the first body.
    client.send(&format!("{first}2\r\nab\r\n1;ext\r\nc\r\n0\r\ntrail: er\r\n\r\n{second}xyz"));
    client.reply();
    client.reply();

    let [one, two] = &simulator.requests()[..] else { panic!("two requests were sent") };
    assert_eq!(String::from_utf8_lossy(&one.head), first);
    assert_eq!((one.target.as_str(), one.path(), one.is("POST", "/sink")), ("/sink?q=%41", "/sink", true));
    assert_eq!(one.header_all("x-ODD"), [&b"two  words"[..], b"again"]);
    assert_eq!((one.header("x-odd"), one.header("host")), (None, Some("x")));
    assert_eq!((one.body.as_slice(), one.body_length, one.complete), (&b"abc"[..], 3, true));
    assert_eq!(one.trailers, [("trail".to_owned(), b"er".to_vec())]);
    assert_eq!(String::from_utf8_lossy(&two.head), second);
    let names: Vec<_> = two.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["b", "A", "host", "Content-Length"]);
    assert_eq!((two.body.as_slice(), one.connection, two.connection, two.number), (&b"xyz"[..], 1, 1, 2));

    simulator.clear_requests();
    assert!(simulator.requests().is_empty());
}

#[test]
fn a_cut_upload_is_recorded_as_incomplete_and_a_long_one_in_part() {
    let simulator = start();
    simulator.ignore_authorization(true);
    let mut client = Client::connect(&simulator);
    client.send("POST /sink HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc");
    simulator.wait_for(|requests| requests.iter().any(|request| request.body_length == 3), LIMIT).unwrap();
    drop(client);
    simulator.wait_for_connections(|counters| counters.open == 0, LIMIT).unwrap();
    assert!(!simulator.requests()[0].complete);

    let long = "x".repeat(MAX_RECORDED_BODY + 1);
    ask(&simulator, "POST", "/sink", "", &long);
    let received = &simulator.requests()[1];
    assert_eq!((received.body.len(), received.body_length, received.complete), (MAX_RECORDED_BODY, MAX_RECORDED_BODY as u64 + 1, true));
}

#[test]
fn nothing_is_recorded_where_recording_is_off() {
    let simulator = Simulator::start(Options { record: false, ..Options::default() }).unwrap();
    assert_eq!(ask(&simulator, "GET", "/users", "", "").0, 403);
    assert!(simulator.requests().is_empty());
}

#[test]
fn a_wait_that_runs_out_says_what_came_instead() {
    let simulator = start();
    ask(&simulator, "GET", "/users?secret", "authorization: canary\r\n", "");
    let error = simulator.wait_for(|requests| requests.len() == 2, Duration::from_millis(10)).unwrap_err().to_string();
    assert!(error.contains("GET /users?secret") && !error.contains("canary"), "{error}");
}
