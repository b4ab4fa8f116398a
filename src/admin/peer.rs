//! Who asks, and who may change something.

use std::net::IpAddr;

use http::header::{HOST, ORIGIN};
use http::{Method, StatusCode, request};

use crate::server::listen::Peer;

/// Anyone who reaches the address may read. What changes something is for processes of this host or Pod, and not for web pages shown there: those
/// give themselves away by `Origin` (Fetch standard, section 3.1), or by the name under which they reached a loopback address (DNS rebinding).
pub(super) fn may_ask(head: &request::Parts, peer: &Peer) -> Result<(), (StatusCode, &'static str)> {
    if is_safe(&head.method) {
        return Ok(());
    }
    if !peer.is_local() {
        return Err((StatusCode::FORBIDDEN, "only GET and HEAD are allowed from another host"));
    }
    if head.headers.contains_key(ORIGIN) {
        return Err((StatusCode::FORBIDDEN, "only GET and HEAD are allowed from a web page (there is an Origin field)"));
    }
    // No browser can speak to a Unix socket.
    if matches!(peer, Peer::Tcp(_)) && !names_this_host(head) {
        return Err((StatusCode::MISDIRECTED_REQUEST, "Host must be localhost or an IP address"));
    }
    Ok(())
}

/// RFC 9110 section 9.2.1, of the methods that any page here takes.
pub(super) fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// Whether the authority is one that needs no DNS: `localhost` or an IP address. The target's own goes before `Host` (RFC 9112 section 3.2.2).
fn names_this_host(head: &request::Parts) -> bool {
    let mut hosts = head.headers.get_all(HOST).iter();
    let authority = match (head.uri.authority(), hosts.next(), hosts.next()) {
        (Some(authority), _, _) => Some(authority.clone()),
        (None, Some(host), None) => host.as_bytes().try_into().ok(),
        (None, _, _) => None,
    };
    authority.is_some_and(|authority| {
        let host = authority.host();
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
    })
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request};

    use super::*;

    fn head(method: &str, target: &str) -> request::Parts {
        Request::builder().method(method).uri(target).body(()).unwrap().into_parts().0
    }

    /// The status, 200 where nothing is refused.
    fn asked(head: &request::Parts, peer: Peer) -> u16 {
        may_ask(head, &peer).err().map_or(200, |(code, _)| code.as_u16())
    }

    /// B46: what changes something is for this host alone, and not for web pages.
    #[test]
    fn b46_only_local_processes_may_change_something() {
        let peer = |address: &str| Peer::Tcp(address.parse().unwrap());
        let rows = [
            (peer("127.0.0.1:1"), Some("localhost:9090"), None, 200),
            (peer("127.3.2.1:1"), Some("LOCALHOST"), None, 200),
            (peer("[::1]:1"), Some("[::1]:9090"), None, 200),
            (peer("[::ffff:127.0.0.1]:1"), Some("10.0.0.5:9090"), None, 200),
            (Peer::Unix, Some("anything.example"), None, 200),
            (Peer::Unix, None, None, 200),
            (peer("10.0.0.5:1"), Some("localhost"), None, 403),
            (peer("[::ffff:10.0.0.5]:1"), Some("localhost"), None, 403),
            (peer("[fe80::1]:1"), Some("localhost"), None, 403),
            (peer("127.0.0.1:1"), Some("localhost"), Some("https://evil.example"), 403),
            (peer("127.0.0.1:1"), Some("localhost"), Some("null"), 403),
            (Peer::Unix, Some("localhost"), Some("http://localhost"), 403),
            (peer("127.0.0.1:1"), Some("rebound.example:9090"), None, 421),
            (peer("127.0.0.1:1"), Some("localhost.evil.example"), None, 421),
            (peer("127.0.0.1:1"), Some("127.0.0.1.evil.example"), None, 421),
            (peer("127.0.0.1:1"), Some("not a host"), None, 421),
            (peer("127.0.0.1:1"), None, None, 421),
        ];
        for (peer, host, origin, expected) in rows {
            let mut request = head("POST", "/quitquitquit");
            for (name, value) in [(HOST, host), (ORIGIN, origin)] {
                if let Some(value) = value {
                    request.headers.insert(name, HeaderValue::from_static(value));
                }
            }
            assert_eq!(asked(&request, peer), expected, "{peer} {host:?} {origin:?}");
        }

        let mut repeated = head("POST", "/quitquitquit");
        for _ in 0..2 {
            repeated.headers.append(HOST, HeaderValue::from_static("localhost"));
        }
        assert_eq!(asked(&repeated, peer("127.0.0.1:1")), 421);
        let mut absolute = head("POST", "http://evil.example/quitquitquit");
        absolute.headers.insert(HOST, HeaderValue::from_static("localhost"));
        assert_eq!(asked(&absolute, peer("127.0.0.1:1")), 421);
        for method in ["GET", "HEAD"] {
            assert_eq!(asked(&head(method, "/metrics"), peer("10.0.0.5:1")), 200, "a scrape comes from elsewhere, under any name");
        }
    }
}
