//! What happens to the header fields of a request and of a response in passing. Pure.
//!
//! [`request`] makes a downstream's head into the one that goes to the upstream, [`response`] the other way; here is what both share: the fields that end
//! at this proxy. Both remove first and write last, so that nothing that a peer names in `Connection` can take away what the proxy sets (Apache's
//! CVE-2022-31813 was that).

use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue};

use crate::config::Origin;

pub(super) use request::max_forwards;
pub use request::{Cleaned, authorize, clean_request};
pub use response::{clean_response, clean_trailers};

mod request;
mod response;

/// This proxy's name in `Via` (RFC 9110 section 7.6.3) and `Proxy-Status` (RFC 9209). No host name: those tell about the inside of a cluster.
pub const PSEUDONYM: &str = "upsolver-auth-proxy";

/// Where requests go, as their heads need it.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// Scheme, host and port.
    pub origin: Origin,
    /// The value of `host`.
    pub host: HeaderValue,
}

impl Upstream {
    /// Made once.
    pub fn new(origin: &Origin) -> Self {
        let host = HeaderValue::from_str(&origin.authority()).expect("an authority is a legal field value");
        Self { origin: origin.clone(), host }
    }
}

/// Removes every field that any `Connection` line names (RFC 9110 section 7.6.1). Lines are one list; empty members and odd bytes name nothing.
fn remove_nominated(headers: &mut HeaderMap) {
    // By number, since a line must not be borrowed while fields go. `Connection` itself may be named; it goes with the hop-by-hop fields.
    let mut number = 0;
    while let Some(line) = headers.get_all(CONNECTION).iter().nth(number).cloned() {
        let members = line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        // Most lines say `keep-alive`, of which there is nothing to look up.
        for member in members.filter(|member| !member.eq_ignore_ascii_case(b"keep-alive") && !member.eq_ignore_ascii_case(b"connection")) {
            if let Ok(name) = HeaderName::from_bytes(member) {
                headers.remove(name);
            }
        }
        number += 1;
    }
}

/// Removes every field whose name is `unwanted`, all its lines. Few fields of a head go and a head has at most 100, so that looking again from the start
/// after each is cheaper than a list of names, which would have to be allocated.
fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    while let Some(name) = headers.keys().find(|name| unwanted(name.as_str())).cloned() {
        headers.remove(name);
    }
}

/// Fields that end at this proxy whether or not `Connection` names them (RFC 9110 section 7.6.1, RFC 9113 section 8.2.2).
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-authentication-info"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(lines: &[(&'static str, &'static [u8])]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap())).collect()
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        headers.keys().map(HeaderName::as_str).collect()
    }

    #[test]
    fn a01_a03_a04_fields_that_connection_names_go() {
        let rows: &[(&[&[u8]], &[&str])] = &[
            (&[b"close, X-Foo"], &["x-bar", "connection"]),
            (&[b"", b"X-Foo"], &["x-bar", "connection"]),
            (&[b",, ,\t, x-FOO ,"], &["x-bar", "connection"]),
            (&[b"connection", b"x-foo\t", b"\tx-bar"], &["connection"]),
            (&[b"x-bar, x-foo"], &["connection"]),
            (&[b"caf\xe9, x foo, \"x-foo\", \xff\xff"], &["x-foo", "x-bar", "connection"]),
            (&[b"\x80, x-foo"], &["x-bar", "connection"]),
        ];
        for (lines, left) in rows {
            let mut headers = map(&[("x-foo", b"1"), ("x-foo", b"2"), ("x-bar", b"1")]);
            for line in *lines {
                headers.append(CONNECTION, HeaderValue::from_bytes(line).unwrap());
            }
            remove_nominated(&mut headers);
            let (mut actual, mut expected) = (names(&headers), left.to_vec());
            actual.sort_unstable();
            expected.sort_unstable();
            assert_eq!(actual, expected, "{lines:?}");
        }
    }

    proptest! {
        /// A04, E06: no bytes of a peer panic, and what goes is gone with all its lines.
        #[test]
        fn a04_any_connection_line_is_survived(lines in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..4)) {
            let mut headers = map(&[("x-foo", b"1"), ("keep-alive", b"1"), ("te", b"trailers")]);
            for line in lines {
                if let Ok(value) = HeaderValue::from_bytes(&line) {
                    headers.append(CONNECTION, value);
                }
            }
            remove_nominated(&mut headers);
            remove_where(&mut headers, is_hop_by_hop);
            prop_assert!(headers.keys().all(|name| name == "x-foo"));
        }
    }
}
