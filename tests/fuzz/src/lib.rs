//! What several fuzz targets share: a proxy's guard, and heads read from bytes in a form that seeds can be written in.

use std::sync::LazyLock;

use http::{HeaderName, HeaderValue, Request, Response, request, response};
use upsolver_auth_proxy::config::Config;
use upsolver_auth_proxy::proxy::guard::Guard;
use upsolver_auth_proxy::secret::{AuthorizationValue, Token};

/// The token of every target.
pub const TOKEN: &str = "canaryTokenOfTheFuzzTargets";
/// The upstream of every target.
pub const UPSTREAM: &str = "api.upsolver.com";

/// A guard with a default configuration, listening on port 8080.
pub static GUARD: LazyLock<Guard> = LazyLock::new(|| {
    let config = Config::from_toml("credentials.token_file = \"/token\"").expect("a valid configuration");
    Guard::new(&config, &[8080], None)
});

/// Our `authorization`.
pub static AUTHORIZATION: LazyLock<AuthorizationValue> =
    LazyLock::new(|| AuthorizationValue::new(&Token::new(TOKEN.to_owned()).expect("a legal token")));

/// Lines: method and target, separated by a space, then `name: value`. `None` where the `http` crate, and so hyper, would not let it into a request.
pub fn request_head(bytes: &[u8]) -> Option<request::Parts> {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let first = lines.next()?;
    let space = first.iter().position(|byte| *byte == b' ')?;
    let mut head = Request::builder().method(&first[..space]).uri(&first[space + 1..]);
    for (name, value) in fields(lines)? {
        head = head.header(name, value);
    }
    Some(head.body(()).ok()?.into_parts().0)
}

/// Lines: the status, then `name: value`.
pub fn response_head(bytes: &[u8]) -> Option<response::Parts> {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut head = Response::builder().status(lines.next()?);
    for (name, value) in fields(lines)? {
        head = head.header(name, value);
    }
    Some(head.body(()).ok()?.into_parts().0)
}

fn fields<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Option<Vec<(HeaderName, HeaderValue)>> {
    let field = |line: &[u8]| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        Some((HeaderName::from_bytes(&line[..colon]).ok()?, value))
    };
    lines.filter(|line| !line.is_empty()).take(100).map(field).collect()
}

/// Fields that end at a hop (RFC 9110 section 7.6.1), as this test knows them; deliberately not the proxy's own list.
pub const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "upgrade",
    "http2-settings",
];
