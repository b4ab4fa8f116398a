//! The authorities that the proxy answers to: names that no attacker can point here (matrix B26, B27), each with the ports that an app would write.

use std::net::Ipv6Addr;

use crate::config::Origin;
use crate::proxy::error::Error;

/// Names of this host that no resolver is asked for.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// Every authority that is accepted, written out: there are few, so that a request costs a handful of comparisons and no parsing.
#[derive(Debug)]
pub(super) struct Authorities(Vec<String>);

impl Authorities {
    /// Loopback and `allowed_hosts` without a port or with one of the listeners' `ports`, an entry of `allowed_hosts` that has a port with exactly that
    /// one, and the upstream's own name also with 443, 80 and its configured port: an app may have been told to use the proxy as its `http_proxy`.
    pub(super) fn new(allowed_hosts: &[String], ports: &[u16], upstream: &Origin) -> Self {
        let upstream_host = if upstream.host.contains(':') { format!("[{}]", upstream.host) } else { upstream.host.clone() };
        let mut allowed = Vec::new();
        let names = LOOPBACK.into_iter().chain([upstream_host.as_str()]).chain(allowed_hosts.iter().map(String::as_str));
        for name in names {
            allowed.push(name.to_owned());
            if split_authority(name.as_bytes()).is_some_and(|(_, port)| port.is_none()) {
                allowed.extend(ports.iter().map(|port| format!("{name}:{port}")));
            }
        }
        allowed.extend([443, 80, upstream.port].map(|port| format!("{upstream_host}:{port}")));
        Self(allowed)
    }

    /// 421 for an authority that is not allowed, 400 for what is none. Case does not matter (RFC 9110 section 4.2.3), everything else does.
    pub(super) fn check(&self, authority: &[u8]) -> Result<(), Error> {
        if self.contains(authority) {
            Ok(())
        } else if split_authority(authority).is_some() {
            Err(Error::MisdirectedRequest)
        } else {
            Err(Error::BadRequest("the Host field or the target's authority is not a host with an optional port"))
        }
    }

    /// Whether an `Origin` is one of the proxy's own; neither `null` nor what is malformed is (RFC 6454 section 7.1).
    pub(super) fn is_own_origin(&self, origin: &[u8]) -> bool {
        let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
        authority.is_some_and(|authority| self.contains(authority))
    }

    fn contains(&self, authority: &[u8]) -> bool {
        self.0.iter().any(|allowed| allowed.as_bytes().eq_ignore_ascii_case(authority))
    }
}

/// Host, an IPv6 address in its brackets, and port of an authority; nothing where it is not exactly that. User information is refused (RFC 9110 section
/// 4.2.4), and so is a port that is empty: nobody sends it, and parsers differ on it.
pub(in crate::proxy) fn split_authority(authority: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let host_end = match authority {
        [b'[', rest @ ..] => rest.iter().position(|byte| *byte == b']')? + 2,
        _ => authority.iter().position(|byte| *byte == b':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(host_end);
    let valid = match host {
        [b'[', address @ .., b']'] => std::str::from_utf8(address).is_ok_and(|address| address.parse::<Ipv6Addr>().is_ok()),
        [] => false,
        // RFC 3986 section 3.2.2, less the comma: a list of hosts is not a host.
        name => name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=".contains(byte)),
    };
    if !valid {
        return None;
    }
    match port {
        [] => Some((host, None)),
        [b':', digits @ ..] if digits.iter().all(u8::is_ascii_digit) => Some((host, Some(std::str::from_utf8(digits).ok()?.parse().ok()?))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authorities() -> Authorities {
        let upstream = Origin { tls: true, host: "api.upsolver.com".to_owned(), port: 8443 };
        Authorities::new(&["proxy.internal".to_owned(), "other.internal:9".to_owned()], &[8080, 18080], &upstream)
    }

    #[test]
    fn b27_allowed_authorities_are_exact() {
        let authorities = authorities();
        for allowed in [
            "localhost",
            "LocalHost:8080",
            "localhost:18080",
            "127.0.0.1",
            "127.0.0.1:8080",
            "[::1]",
            "[::1]:8080",
            "proxy.internal",
            "PROXY.internal:8080",
            "other.internal:9",
            "api.upsolver.com",
            "API.Upsolver.com:443",
            "api.upsolver.com:80",
            "api.upsolver.com:8443",
            "api.upsolver.com:8080",
        ] {
            assert!(authorities.check(allowed.as_bytes()).is_ok(), "{allowed}");
        }
        for refused in [
            "localhost:80",
            "localhost:443",
            "localhost.",
            "127.0.0.1.",
            "127.0.0.2",
            "127.1",
            "2130706433",
            "0.0.0.0:8080",
            "127.0.0.1.nip.io",
            "localhost.evil.example",
            "evil-localhost",
            "[::ffff:7f00:1]",
            "[0:0:0:0:0:0:0:1]",
            "other.internal",
            "other.internal:8080",
            "x.proxy.internal",
            "api.upsolver.com:444",
            "api.upsolver.com.:443",
            "localhost%2eevil.example",
        ] {
            assert!(matches!(authorities.check(refused.as_bytes()), Err(Error::MisdirectedRequest)), "{refused}");
        }
    }

    #[test]
    fn a12_what_is_no_authority_is_a_bad_request() {
        let authorities = authorities();
        for malformed in [
            &b""[..],
            b":8080",
            b"a, b",
            b"localhost,localhost",
            b"local host",
            b"user@localhost",
            b"localhost/",
            b"localhost?",
            b"localhost#",
            b"http://localhost",
            b"localhost:",
            b"localhost:x",
            b"localhost:+80",
            b"localhost:-1",
            b"localhost:99999",
            b"localhost:80:80",
            b"::1",
            b"[::1",
            b"[::1]x",
            b"[::g]",
            b"[::1%25lo]",
            b"[localhost]",
            b"[",
            b"[]",
            b"localhost\\evil",
            b"loc\xe9alhost",
            b"\"localhost\"",
        ] {
            assert!(matches!(authorities.check(malformed), Err(Error::BadRequest(_))), "{}", malformed.escape_ascii());
        }
    }

    #[test]
    fn b28_only_the_proxys_own_origins_are_no_other_sites() {
        let authorities = authorities();
        for own in ["http://localhost:8080", "http://localhost", "https://127.0.0.1:8080", "http://[::1]:8080", "https://api.upsolver.com"]
        {
            assert!(authorities.is_own_origin(own.as_bytes()), "{own}");
        }
        for other in [
            "",
            "null",
            "https://evil.example",
            "http://localhost:3000",
            "http://localhost.evil.example",
            "http://user@localhost",
            "http://localhost/",
            "file://",
            "chrome-extension://localhost",
            "localhost",
            "http://localhost http://localhost",
        ] {
            assert!(!authorities.is_own_origin(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn an_ipv6_upstream_is_allowed_in_brackets() {
        let authorities = Authorities::new(&[], &[], &Origin { tls: false, host: "::1".to_owned(), port: 9 });
        assert!(authorities.check(b"[::1]:9").is_ok() && authorities.check(b"[::1]:10").is_err());
    }
}
