//! Addresses: where to listen, where the upstream is, through which proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use http::Uri;
use http::uri::Authority;
use hyper_util::client::proxy::matcher::Matcher;
use toml::Value;

use super::value::{Checked, text};
use super::{EgressProxy, ListenAddress, Origin};

/// `sun_path` holds 108 bytes with the final NUL (unix(7)).
const MAX_UNIX_PATH_BYTES: usize = 107;

/// One element of `listen.address` or `admin.address`.
pub(super) fn listen(value: &Value) -> Checked<ListenAddress> {
    const RULE: &str = r#"must be "localhost:PORT", "IP:PORT", "[IPv6]:PORT" or "unix:/path""#;
    let text = text(value).map_err(|_| RULE)?;
    if let Some(path) = text.strip_prefix("unix:") {
        let fits = path.starts_with('/') && path.len() <= MAX_UNIX_PATH_BYTES && !path.contains('\0');
        return if fits {
            Ok(ListenAddress::Unix(PathBuf::from(path)))
        } else {
            Err("must be an absolute path of at most 107 bytes after unix:".into())
        };
    }
    if let Some((host, port)) = text.rsplit_once(':')
        && host.eq_ignore_ascii_case("localhost")
    {
        return Ok(ListenAddress::Localhost(port.parse().map_err(|_| RULE)?));
    }
    Ok(ListenAddress::Socket(text.parse().map_err(|_| RULE)?))
}

impl ListenAddress {
    /// Whether only this machine reaches it.
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Localhost(_) | Self::Unix(_) => true,
            Self::Socket(address) => address.ip().is_loopback(),
        }
    }

    /// Whether a socket at one keeps the other from being bound. Port 0 is a free one each time.
    pub(super) fn collides(&self, other: &Self) -> bool {
        let sockets = |address: &Self| match *address {
            Self::Localhost(port) => vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))],
            Self::Socket(address) => vec![address],
            Self::Unix(_) => vec![],
        };
        if let (Self::Unix(one), Self::Unix(other)) = (self, other) {
            return one == other;
        }
        sockets(self).iter().any(|one| {
            sockets(other).iter().any(|other| {
                let unspecified = one.ip().is_unspecified() || other.ip().is_unspecified();
                one.port() == other.port() && one.port() != 0 && (one.ip() == other.ip() || unspecified)
            })
        })
    }
}

impl std::fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Localhost(port) => write!(f, "localhost:{port}"),
            Self::Socket(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// One element of `listen.allowed_hosts`: what a `Host` field may hold (RFC 9110 section 7.2), in lower case.
pub(super) fn host(value: &Value) -> Checked<String> {
    const RULE: &str = r#"must be a host name or IP address, with or without a port, such as "api.example.com" or "[fd00::1]:8080""#;
    let host = text(value).map_err(|_| RULE)?;
    let authority: Authority = host.parse().map_err(|_| RULE)?;
    // A pattern would match by suffix, which is how a page that an attacker controls gets in.
    if host.contains(['@', '*']) || authority.host().is_empty() || !has_sound_port(&authority) {
        return Err(RULE.into());
    }
    Ok(host.to_ascii_lowercase())
}

/// `upstream.url`: scheme, host and port, nothing else. Plain HTTP only to loopback, since the token would be readable on the way.
pub(super) fn origin(value: &Value) -> Checked<Origin> {
    const RULE: &str = r#"must be an address such as "https://api.upsolver.com", without path, query or user information"#;
    let text = text(value).map_err(|_| RULE)?;
    // `Uri` drops a fragment without a word.
    let uri: Uri = if text.contains('#') { return Err(RULE.into()) } else { text.parse().map_err(|_| RULE)? };
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(RULE.into()),
    };
    let authority = uri.authority().ok_or(RULE)?;
    if authority.as_str().contains('@') || !matches!(uri.path(), "" | "/") || uri.query().is_some() || !has_sound_port(authority) {
        return Err(RULE.into());
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    if host.is_empty() {
        return Err(RULE.into());
    }
    if !tls && !is_loopback_host(&host) {
        return Err("must be https:// unless the host is localhost or a loopback address: the token would travel in the clear".into());
    }
    Ok(Origin { tls, host, port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }) })
}

/// Whether `host` (an IPv6 address without brackets) is this machine: `localhost`, 127.0.0.0/8 or `::1`.
pub(super) fn is_loopback_host(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// `upstream.proxy`: `http://[user:password@]host[:port]`; the scheme may be left out, as in most programs' `HTTPS_PROXY`. `None` where empty.
pub(super) fn egress_proxy(value: &Value) -> Checked<Option<EgressProxy>> {
    const RULE: &str =
        r#"must be an HTTP proxy such as "http://proxy.example.com:3128", with user:password@ before the host where it asks for them"#;
    let text = text(value).map_err(|_| RULE)?;
    if text.is_empty() {
        return Ok(None);
    }
    // Parses any URL, and makes the value of `proxy-authorization` (RFC 7617) as it does so.
    let parsed = Matcher::builder().all(text).build().intercept(&Uri::from_static("https://upstream")).ok_or(RULE)?;
    let authority = parsed.uri().authority().filter(|authority| has_sound_port(authority) && !authority.host().is_empty()).ok_or(RULE)?;
    if parsed.uri().scheme_str() != Some("http") {
        return Err(RULE.into());
    }
    let authority = match authority.port() {
        Some(_) => authority.clone(),
        None => format!("{authority}:80").parse().map_err(|_| RULE)?,
    };
    Ok(Some(EgressProxy { authority, authorization: parsed.basic_auth().cloned() }))
}

/// `upstream.resolve`: `ip:port`. `None` where empty.
pub(super) fn socket(value: &Value) -> Checked<Option<SocketAddr>> {
    const RULE: &str = r#"must be an IP address and a port, such as "10.0.0.7:443" or "[fd00::7]:443""#;
    let text = text(value).map_err(|_| RULE)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().ok().filter(|address: &SocketAddr| address.port() != 0).map(Some).ok_or(RULE.into())
}

/// `Authority` lets a port of any digits, or none after the colon, pass.
fn has_sound_port(authority: &Authority) -> bool {
    let after_host = authority.as_str().rsplit('@').next().and_then(|rest| rest.strip_prefix(authority.host())).unwrap_or_default();
    after_host.is_empty() || authority.port_u16().is_some_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses() {
        let accepted = ["localhost:8080", "localhost:0", "127.0.0.1:80", "[::1]:8080", "0.0.0.0:1", "unix:/run/x.sock"];
        for text in accepted {
            assert_eq!(listen(&Value::from(text)).map(|address| address.to_string()), Ok(text.to_owned()));
        }
        let refused = [
            "",
            "8080",
            ":8080",
            "localhost",
            "localhost:",
            "localhost:65536",
            "example.com:80",
            "::1:8080",
            "127.0.0.1",
            "unix:x",
            "unix:",
        ];
        for text in refused {
            assert!(listen(&Value::from(text)).is_err(), "{text}");
        }
        assert!(listen(&Value::from(8080)).is_err());
        assert!(listen(&Value::from(format!("unix:/{}", "x".repeat(107)))).is_err());
    }

    #[test]
    fn which_addresses_collide() {
        let address = |text: &str| listen(&Value::from(text)).unwrap();
        let rows = [
            ("localhost:1", "localhost:1", true),
            ("localhost:1", "localhost:2", false),
            ("localhost:0", "localhost:0", false),
            ("localhost:1", "[::1]:1", true),
            ("127.0.0.2:1", "localhost:1", false),
            ("0.0.0.0:1", "127.0.0.2:1", true),
            ("unix:/a", "unix:/a", true),
            ("unix:/a", "localhost:1", false),
        ];
        for (one, other, expected) in rows {
            assert_eq!(address(one).collides(&address(other)), expected, "{one} {other}");
            assert_eq!(address(other).collides(&address(one)), expected, "{other} {one}");
        }
    }

    #[test]
    fn allowed_hosts() {
        assert_eq!(host(&Value::from("Example.COM:8080")), Ok("example.com:8080".to_owned()));
        assert_eq!(host(&Value::from("[fd00::1]")), Ok("[fd00::1]".to_owned()));
        for text in ["", "*", "*.example.com", "me@example.com", "a b", "http://a", "a/b", "a:", "a:x", ":80", "a:99999"] {
            assert!(host(&Value::from(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn upstream_urls() {
        let rows = [
            ("https://api.upsolver.com", Some("https://api.upsolver.com")),
            ("https://API.upsolver.com/", Some("https://api.upsolver.com")),
            ("https://api.upsolver.com:443", Some("https://api.upsolver.com")),
            ("https://[fd00::1]:8443", Some("https://[fd00::1]:8443")),
            ("http://localhost:8081", Some("http://localhost:8081")),
            ("http://127.1.2.3", Some("http://127.1.2.3")),
            ("http://[::1]:1", Some("http://[::1]:1")),
            ("http://api.upsolver.com", None),
            ("http://localhost.evil.com", None),
            ("http://10.0.0.1", None),
            ("https://me:secret@api.upsolver.com", None),
            ("https://api.upsolver.com/v1", None),
            ("https://api.upsolver.com?x", None),
            ("https://api.upsolver.com#x", None),
            ("https://api.upsolver.com:", None),
            ("https://api.upsolver.com:0", None),
            ("https://api.upsolver.com:70000", None),
            ("api.upsolver.com", None),
            ("ftp://api.upsolver.com", None),
            ("https://", None),
            ("", None),
        ];
        for (text, expected) in rows {
            assert_eq!(origin(&Value::from(text)).ok().map(|origin| origin.to_string()), expected.map(ToOwned::to_owned), "{text}");
        }
    }

    #[test]
    fn egress_proxies() {
        let rows = [
            ("http://proxy:3128", Some("proxy:3128")),
            ("http://proxy:3128/", Some("proxy:3128")),
            ("proxy:3128", Some("proxy:3128")),
            ("http://proxy", Some("proxy:80")),
            ("http://[fd00::1]:3128", Some("[fd00::1]:3128")),
            ("http://me:pass%20word@proxy:3128", Some("proxy:3128 Basic bWU6cGFzcyB3b3Jk")),
            ("https://proxy:3128", None),
            ("socks5://proxy:1080", None),
            ("http://proxy:", None),
            ("http://", None),
            ("http://me@:80", None),
            ("a b", None),
        ];
        for (text, expected) in rows {
            let proxy = egress_proxy(&Value::from(text)).ok().flatten();
            let shown = proxy.as_ref().map(|proxy| {
                let authorization = proxy.authorization.as_ref().map(|value| format!(" {}", value.to_str().unwrap()));
                format!("{}{}", proxy.authority, authorization.unwrap_or_default())
            });
            assert_eq!(shown.as_deref(), expected, "{text}");
            assert!(proxy.and_then(|proxy| proxy.authorization).is_none_or(|value| value.is_sensitive()));
        }
        assert_eq!(egress_proxy(&Value::from("")), Ok(None));
    }

    #[test]
    fn resolved_addresses() {
        assert_eq!(socket(&Value::from("")), Ok(None));
        assert!(socket(&Value::from("[::1]:443")).unwrap().is_some());
        for text in ["10.0.0.1", "localhost:443", "10.0.0.1:0"] {
            assert!(socket(&Value::from(text)).is_err(), "{text}");
        }
    }
}
