//! Redirects are never followed; those to the upstream itself are rewritten to the proxy, so that the app comes back through it (contract section 4,
//! "Relay").

use crate::support::raw::RawUpstream;
use crate::support::wire::Wire;

fn moved(status: u16, location: &str) -> String {
    format!("HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

#[test]
fn b23_redirects_are_relayed_and_not_followed() {
    let wire = Wire::start();
    let elsewhere = RawUpstream::start();
    for status in [301, 302, 303, 307, 308] {
        for location in [
            format!("http://{}/x", elsewhere.address()),
            format!("https://{}/x", elsewhere.address()),
            "http://evil.example/x".to_owned(),
            "https://evil.api.upsolver.com/x".to_owned(),
            format!("//{}/x", elsewhere.address()),
        ] {
            let answer = wire.answered(moved(status, &location));
            assert_eq!((answer.status(), answer.header("location")), (status, Some(location.as_str())));
        }
    }
    assert!(elsewhere.saw_nothing());
    assert!(wire.upstream.saw_nothing());
}

#[test]
fn b24_a_location_at_the_upstream_becomes_one_at_the_proxy() {
    let wire = Wire::start();
    let upstream = wire.upstream.address();
    let port = wire.proxy.address.port();
    for (host, location, expected) in [
        ("localhost", format!("http://{upstream}/a/b?c=d#e"), "http://localhost/a/b?c=d#e".to_owned()),
        (&format!("localhost:{port}"), format!("http://{upstream}/a"), format!("http://localhost:{port}/a")),
        (&format!("127.0.0.1:{port}"), format!("HTTP://{upstream}/a"), format!("http://127.0.0.1:{port}/a")),
        (&format!("[::1]:{port}"), format!("http://{upstream}"), format!("http://[::1]:{port}")),
        (
            "localhost",
            format!("http://{upstream}/%2F//x/../y?u=http://{upstream}/z"),
            format!("http://localhost/%2F//x/../y?u=http://{upstream}/z"),
        ),
        ("localhost", format!("http://{upstream}?q"), "http://localhost?q".to_owned()),
    ] {
        let request = format!("GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n");
        for status in [201, 202, 302] {
            let answer = wire.exchange(&request, moved(status, &location)).1;
            assert_eq!(answer.header("location"), Some(expected.as_str()), "{host} {location}");
        }
    }
    let answer = wire.exchange("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n", moved(302, &format!("//{upstream}/a"))).1;
    assert!(matches!(answer.header("location"), Some("//localhost/a" | "http://localhost/a")), "{answer:?}");
}

/// The app used the proxy as its `http_proxy`: the origin that it knows is the upstream's own.
#[test]
fn b24_an_app_with_an_http_proxy_keeps_the_upstreams_origin() {
    let wire = Wire::start();
    let upstream = wire.upstream.address();
    let location = format!("http://{upstream}/a");
    let request = format!("GET http://{upstream}/x HTTP/1.1\r\nHost: {upstream}\r\n\r\n");
    assert_eq!(wire.exchange(request, moved(302, &location)).1.header("location"), Some(location.as_str()));
}

#[test]
fn b24_any_other_location_is_left_alone() {
    let wire = Wire::start();
    let upstream = wire.upstream.address();
    for location in [
        "/a/b".to_owned(),
        "a/b".to_owned(),
        "?q".to_owned(),
        String::new(),
        "https://evil.example/".to_owned(),
        format!("http://{upstream}.evil.example/"),
        format!("http://{upstream}@evil.example/"),
        format!("http://user@{upstream}/"),
        format!("http://evil.example/http://{upstream}/"),
        format!("http://127.0.0.1:{}/", upstream.port() ^ 1),
        format!("http:/{upstream}/"),
        format!("http:\\\\{upstream}/"),
        format!("ftp://{upstream}/"),
        "mailto:a@b".to_owned(),
    ] {
        let answer = wire.answered(moved(302, &location));
        assert_eq!(answer.header("location"), Some(location.as_str()));
    }
}
