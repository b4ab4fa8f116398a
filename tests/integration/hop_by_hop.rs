//! What of a head goes through, in both directions, and what ends at the proxy (RFC 9110 section 7.6.1, contract section 4 "Clean").

use crate::support::wire::{OK, Wire, field_lines};

/// A GET with these field lines.
fn get_with(lines: &[&[u8]]) -> Vec<u8> {
    let mut request = b"GET /x HTTP/1.1\r\nHost: localhost\r\n".to_vec();
    for line in lines {
        request.extend_from_slice(line);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    request
}

/// A row: the field lines sent, and those of them that arrive.
type Row<'a> = (&'a [&'a [u8]], &'a [&'a [u8]]);

fn check(rows: &[Row]) {
    let wire = Wire::start();
    for (sent, arriving) in rows {
        let forwarded = wire.forwarded(get_with(sent));
        wire.assert_head(&forwarded, "GET /x HTTP/1.1", arriving);
    }
}

#[test]
fn a01_fields_named_by_connection_end_here() {
    check(&[
        (&[b"Connection: close, X-Foo", b"X-Foo: 1", b"X-Bar: 2"], &[b"x-bar: 2"]),
        (&[b"X-Foo: 1", b"X-Foo: 2", b"Connection: x-foo"], &[]),
        (&[b"Connection: cookie", b"Cookie: a=b"], &[]),
    ]);
}

#[test]
fn a02_connection_cannot_take_away_what_the_proxy_sets() {
    check(&[
        (&[b"Connection: authorization", b"Authorization: dummy"], &[]),
        (&[b"Connection: close, authorization, host, via, content-length", b"Via: 1.0 other"], &[]),
        (&[b"Connection: content-type", b"Content-Type: text/plain"], &[]),
        (&[b"Connection: Authorization, Authorization, Host, Host"], &[]),
    ]);
}

#[test]
fn a02_connection_cannot_take_away_the_framing() {
    let wire = Wire::start();
    for framing in [
        "Content-Length: 5\r\nConnection: content-length\r\n\r\nhello",
        "Transfer-Encoding: chunked\r\nConnection: transfer-encoding\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ] {
        let forwarded = wire.forwarded(format!("POST /x HTTP/1.1\r\nHost: localhost\r\n{framing}"));
        assert_eq!(forwarded.body, b"hello");
    }
}

#[test]
fn a03_all_connection_lines_are_one_list() {
    check(&[
        (&[b"Connection:", b"Connection: X-Foo", b"X-Foo: 1"], &[]),
        (&[b"Connection: ,, ,\t, x-FOO ,", b"X-Foo: 1", b"X-Bar: 2"], &[b"x-bar: 2"]),
        (&[b"Connection: x-a", b"X-A: 1", b"cOnNeCtIoN:\tx-b\t", b"X-B: 2", b"X-C: 3"], &[b"x-c: 3"]),
    ]);
}

#[test]
fn a04_bytes_that_no_name_can_hold_do_no_harm_in_connection() {
    let wire = Wire::start();
    for value in [&b"caf\xe9"[..], b"\xff\xff, x-foo", b"x-foo, \x80", b"\"x-foo\"", b"x foo, x-foo"] {
        let request = get_with(&[&[b"Connection: ", value].concat(), b"X-Kept: 1"]);
        let mut downstream = wire.proxy.connect();
        downstream.send(&request);
        // Either is right: the request goes through without the field, or it is refused.
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        wire.assert_head(&forwarded, "GET /x HTTP/1.1", &[b"x-kept: 1"]);
        upstream.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    }
}

#[test]
fn a05_hop_by_hop_fields_end_here_without_being_named() {
    check(&[(
        &[
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: keep-alive",
            b"Proxy-Authorization: Basic eDp5",
            b"Proxy-Authenticate: Basic",
            b"TE: gzip",
            b"Trailer: X-T",
            b"Upgrade: foo/1",
            b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
            b"X-End-To-End: 1",
        ],
        &[b"x-end-to-end: 1"],
    )]);
}

#[test]
fn a05_a06_hop_by_hop_fields_of_a_reply_end_here() {
    let wire = Wire::start();
    for (reply, arriving) in [
        (
            "Connection: close, X-Bar\r\nX-Bar: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: close\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\nX-Kept: 1\r\n",
            &["x-kept: 1"][..],
        ),
        ("Connection:\r\nConnection: X-A\r\nX-A: 1\r\nConnection: , x-b,close\r\nX-B: 2\r\n", &[]),
        ("Connection: close, content-length, date\r\n", &[]),
    ] {
        let answer = wire.answered(format!("HTTP/1.1 200 OK\r\nDate: Tue, 01 Jan 2030 00:00:00 GMT\r\n{reply}Content-Length: 2\r\n\r\nok"));
        assert_eq!((answer.status(), &*answer.body, answer.complete), (200, &b"ok"[..], true));
        let lines: Vec<_> =
            field_lines(&answer).into_iter().filter(|line| !line.starts_with("date:") && line != "content-length: 2").collect();
        assert_eq!(lines, arriving);
    }
}

#[test]
fn a07_te_goes_on_as_trailers_or_not_at_all() {
    let wire = Wire::start();
    for value in ["trailers, gzip;q=0.5", "trailers", "gzip", "trailers;q=1", "TRAILERS , deflate"] {
        let forwarded = wire.forwarded(get_with(&[format!("TE: {value}").as_bytes(), b"Connection: te"]));
        assert!(matches!(forwarded.header("te"), None | Some("trailers")), "{value}: {forwarded:?}");
    }
}

#[test]
fn a08_everything_else_goes_through_byte_for_byte() {
    let lines: &[&[u8]] = &[
        b"x-unknown: some value",
        b"x-obs-text: caf\xe9 \x80\xff",
        b"x-empty: ",
        b"x-api-requestid: 1",
        b"accept: */*",
        b"user-agent: python-requests/2.31.0",
        b"x-quoted: \"a, b\"; c=\"d\\\"\"",
    ];
    check(&[(lines, lines)]);
}

#[test]
fn a08_repeated_fields_keep_their_order_both_ways() {
    let wire = Wire::start();
    let reply = "HTTP/1.1 200 OK\r\nX-R: 3\r\nSet-Cookie: b=1\r\nX-R: 1\r\nset-cookie: a=2; Path=/\r\nX-R: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let (forwarded, answer) = wire.exchange(get_with(&[b"X-M: b", b"Accept: x", b"x-m: a", b"X-M: b, c"]), reply);
    assert_eq!(forwarded.all("x-m"), ["b", "a", "b, c"]);
    assert_eq!(answer.all("x-r"), ["3", "1", "2"]);
    assert_eq!(answer.all("set-cookie"), ["b=1", "a=2; Path=/"]);
}

#[test]
fn a08_a_reply_goes_through_byte_for_byte() {
    let wire = Wire::start();
    let lines: &[&[u8]] = &[
        b"date: Tue, 01 Jan 2030 00:00:00 GMT",
        b"x-obs: \xe9\xff",
        b"x-empty: ",
        b"x-api-requestid: 17",
        b"server: nginx",
        b"content-length: 2",
    ];
    let mut reply = b"HTTP/1.1 299 Quite All Right\r\nConnection: close\r\n".to_vec();
    for line in lines {
        reply.extend_from_slice(line);
        reply.extend_from_slice(b"\r\n");
    }
    reply.extend_from_slice(b"\r\nok");
    let answer = wire.answered(reply);
    assert_eq!(answer.start, "HTTP/1.1 299 Quite All Right");
    let mut expected: Vec<_> = lines.iter().map(|line| line.escape_ascii().to_string()).collect();
    expected.sort();
    assert_eq!(field_lines(&answer), expected);
}

#[test]
fn a09_via_is_appended_once() {
    let wire = Wire::start();
    for (sent, expected) in [
        (&[][..], "1.1 upsolver-auth-proxy"),
        (&[&b"Via: 1.0 fred, 1.1 p.example.net"[..]], "1.0 fred, 1.1 p.example.net, 1.1 upsolver-auth-proxy"),
        (&[b"Via: 1.0 fred", b"Via: 1.1 ethel (not upsolver)"], "1.0 fred, 1.1 ethel (not upsolver), 1.1 upsolver-auth-proxy"),
    ] {
        assert_eq!(wire.forwarded(get_with(sent)).all("via").join(", "), expected);
    }
}

#[test]
fn b19_b20_b21_the_downstreams_credentials_never_leave() {
    check(&[
        (&[b"Authorization: dummy"], &[]),
        (&[b"Authorization: one", b"authorization: two", b"AUTHORIZATION: three"], &[]),
        (&[b"Authorization: Bearer x", b"Connection: authorization"], &[]),
        (&[b"x-api-email: a@b.c", b"x-api-password: p", b"X-Api-Password: q", b"X_API_PASSWORD: r", b"x_api-email: s"], &[]),
        (&[b"proxy_authorization: x", b"X-Upsolver-Auth-Proxy-Token: y", b"x_upsolver_auth_proxy_token: z"], &[]),
        // Names that only look alike are the app's own business.
        (
            &[b"x_under_score: 1", b"x-authorization: 2", b"x-api-passwords: 3"],
            &[b"x_under_score: 1", b"x-authorization: 2", b"x-api-passwords: 3"],
        ),
    ]);
}

#[test]
fn b20_one_authorization_leaves_whatever_the_twin() {
    let wire = Wire::start();
    for name in ["authorization_", "Authorization", "authorization"] {
        let forwarded = wire.forwarded(get_with(&[format!("{name}: dummy").as_bytes()]));
        assert!(!String::from_utf8_lossy(&forwarded.head).contains("dummy"), "{forwarded:?}");
    }
}

#[test]
fn b17_method_overrides_end_here() {
    check(&[(&[b"X-HTTP-Method-Override: POST", b"X-HTTP-Method: DELETE", b"X-Method-Override: PUT"], &[])]);
}

#[test]
fn b32_b48_forwarding_fields_and_cookies_go_through() {
    let lines: &[&[u8]] =
        &[b"x-forwarded-for: 10.0.0.1", b"forwarded: for=10.0.0.1;proto=http", b"cookie: AWSALB=x; session=y", b"x-real-ip: 10.0.0.1"];
    check(&[(lines, lines)]);
    let answer = Wire::start().answered("HTTP/1.1 200 OK\r\nSet-Cookie: AWSALB=x; Path=/\r\nSet-Cookie: AWSALBCORS=y; Secure\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert_eq!(answer.all("set-cookie"), ["AWSALB=x; Path=/", "AWSALBCORS=y; Secure"]);
}

#[test]
fn a49_end_to_end_fields_are_not_ours_to_touch() {
    let request: &[&[u8]] = &[
        b"if-none-match: W/\"x\"",
        b"if-modified-since: Tue, 01 Jan 2030 00:00:00 GMT",
        b"range: bytes=0-4",
        b"accept-encoding: gzip, br",
        b"cache-control: no-transform",
    ];
    check(&[(request, request)]);
    let wire = Wire::start();
    // Not gzip at all: whoever tries to decompress it fails.
    let reply = "HTTP/1.1 206 Partial Content\r\nContent-Encoding: gzip\r\nContent-Range: bytes 0-4/10\r\nETag: \"x\"\r\nWWW-Authenticate: Basic realm=\"x\"\r\nAllow: GET\r\nCache-Control: no-transform\r\nVary: *\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
    let answer = wire.answered(reply);
    assert_eq!((answer.status(), &*answer.body), (206, &b"hello"[..]));
    for (name, value) in [
        ("content-encoding", "gzip"),
        ("content-range", "bytes 0-4/10"),
        ("etag", "\"x\""),
        ("www-authenticate", "Basic realm=\"x\""),
        ("allow", "GET"),
        ("cache-control", "no-transform"),
        ("vary", "*"),
    ] {
        assert_eq!(answer.header(name), Some(value));
    }
    for status in ["412 Precondition Failed", "416 Range Not Satisfiable"] {
        let answer = wire.answered(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
        assert_eq!(answer.start, format!("HTTP/1.1 {status}"));
    }
}
