//! The body of a mint's reply: bounded in depth, strict where the token is concerned, indifferent to the rest.
//!
//! Only `apiToken` is certain (contract section 1). An error says of what kind it is and where, never what stood there: `serde_json` quotes values in its
//! messages, so those are not kept.

use std::fmt;

use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, Visitor};
use serde_json::error::Category;
use zeroize::{Zeroize, Zeroizing};

use crate::secret::Token;
use crate::upstream::single::Reply;

/// The documented reply nests two deep.
const MAX_DEPTH: usize = 32;
/// Upsolver's ids are UUIDs.
const MAX_ID_BYTES: usize = 128;

/// Token and id, or what is wrong with the reply. The body is cleared where nobody else holds it.
pub(crate) fn parse(reply: Reply) -> Result<(Token, Option<String>), String> {
    let parsed = check_headers(&reply.headers).and_then(|()| parse_body(&reply.body));
    clear(reply.body);
    parsed
}

/// Whether an id can stand in a log line and in a path segment as it is: unreserved characters (RFC 3986 section 2.3), and no dot segment.
pub(crate) fn is_safe_id(id: &str) -> bool {
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(unreserved) && id.bytes().any(|byte| byte != b'.')
}

/// A body that says that it is something else is not read as JSON: a page of something in front of the API, or a coding that was not asked for. No type, or
/// one that says nothing, leaves the judgement to the content, since the token is made already.
fn check_headers(headers: &HeaderMap) -> Result<(), String> {
    let coded = |value: &http::HeaderValue| !value.is_empty() && !value.as_bytes().eq_ignore_ascii_case(b"identity");
    if headers.get_all(CONTENT_ENCODING).iter().any(coded) {
        return Err("the reply has a content-encoding, though none was asked for".to_owned());
    }
    let Some(content_type) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let essence = content_type.to_str().unwrap_or("?").split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match essence.as_str() {
        "" | "application/json" | "text/json" | "text/plain" | "application/octet-stream" => Ok(()),
        other if other.ends_with("+json") => Ok(()),
        _ => Err("the reply's content-type is not application/json".to_owned()),
    }
}

fn parse_body(body: &[u8]) -> Result<(Token, Option<String>), String> {
    if body.is_empty() {
        return Err("the reply's body is empty".to_owned());
    }
    let text = str::from_utf8(body).map_err(|error| format!("the reply is not UTF-8 from byte {} on", error.valid_up_to()))?;
    if is_too_deep(body) {
        return Err(format!("the reply is nested deeper than {MAX_DEPTH} levels"));
    }
    let fields: Fields = serde_json::from_str(text).map_err(|error| {
        let problem = match error.classify() {
            Category::Eof => "ends too early",
            Category::Syntax | Category::Io => "is not JSON",
            Category::Data => "is not one object with one text apiToken",
        };
        format!("the reply {problem} (line {}, column {})", error.line(), error.column())
    })?;
    let token = Token::new(fields.api_token.0.as_str().to_owned()).map_err(|problem| format!("apiToken cannot be used: {problem}"))?;
    let id = match fields.id {
        Some(Id::Text(id)) => Some(id),
        Some(Id::Number(id)) => Some(id.to_string()),
        Some(Id::Other(_)) | None => None,
    };
    Ok((token, id.filter(|id| is_safe_id(id))))
}

/// `serde_json` limits the depth of what it builds, but skips unknown fields without a limit.
fn is_too_deep(body: &[u8]) -> bool {
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' | b'[' if !in_text => depth += 1,
            b'}' | b']' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return true;
        }
    }
    false
}

/// Bytes that are shared stay: the reply's buffer is hyper's, and may hold more than this body.
fn clear(body: Bytes) {
    if let Ok(mut body) = body.try_into_mut() {
        body.as_mut().zeroize();
    }
}

/// A second `apiToken` or `id` is an error, as derived structs have it; other fields are skipped.
#[derive(Deserialize)]
struct Fields {
    #[serde(rename = "apiToken")]
    api_token: ApiToken,
    id: Option<Id>,
}

/// An id that is neither text nor number is no reason to lose a token.
#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Number(u64),
    Other(IgnoredAny),
}

struct ApiToken(Zeroizing<String>);

impl<'de> Deserialize<'de> for ApiToken {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = ApiToken;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ApiToken, E> {
                Ok(ApiToken(Zeroizing::new(text.to_owned())))
            }
        }

        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, StatusCode};
    use proptest::prelude::*;

    use super::*;

    fn parse_bytes(body: &[u8]) -> Result<(Token, Option<String>), String> {
        parse(Reply { status: StatusCode::OK, headers: HeaderMap::new(), body: Bytes::copy_from_slice(body) })
    }

    /// B38, C12, C13: every unusable body is refused with words that hold nothing of it.
    #[test]
    fn b38_c12_c13_unusable_bodies_are_refused_without_a_quote() {
        let deep = |levels: usize| format!(r#"{{"apiToken":"canary","x":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
        let (too_deep, far_too_deep) = (deep(MAX_DEPTH), deep(10_000));
        let long = format!(r#"{{"apiToken":"{}"}}"#, "canary".repeat(1000));
        let rows: [(&[u8], &str); 29] = [
            (b"", "empty"),
            (b" ", "ends too early (line 1, column 1)"),
            (b"<html>canary</html>", "is not JSON (line 1, column 1)"),
            (b"canary", "is not JSON"),
            (b"\"canary\"", "is not one object"),
            (b"[\"canary\"]", "is not one object"),
            (b"[{\"apiToken\":\"canary\"}]", "is not one object"),
            (b"null", "is not one object"),
            (b"{}", "is not one object with one text apiToken"),
            (br#"{"apitoken":"canary"}"#, "is not one object"),
            (br#"{"data":{"apiToken":"canary"}}"#, "is not one object"),
            (br#"{"apiToken":null}"#, "is not one object"),
            (br#"{"apiToken":123}"#, "is not one object"),
            (br#"{"apiToken":["canary"]}"#, "is not one object"),
            (br#"{"apiToken":{"value":"canary"}}"#, "is not one object"),
            (br#"{"apiToken":"canary","apiToken":"canary2"}"#, "is not one object"),
            (br#"{"apiToken":"canary","id":"a","id":"b"}"#, "is not one object"),
            (br#"{"apiToken":"canary""#, "ends too early"),
            (br#"{"apiToken":"canary"}{}"#, "is not JSON"),
            (b"\xef\xbb\xbf{\"apiToken\":\"canary\"}", "is not JSON"),
            (b"{\"apiToken\":\"canary\",\"x\":\"\xff\"}", "not UTF-8 from byte 26"),
            (br#"{"apiToken":""}"#, "cannot be used: it is empty"),
            (br#"{"apiToken":" canary"}"#, "white space"),
            (br#"{"apiToken":"can\r\nary: 1"}"#, "control character"),
            (br#"{"apiToken":"can\u0000ary"}"#, "control character"),
            ("{\"apiToken\":\"canary\u{e9}\"}".as_bytes(), "outside ASCII"),
            (long.as_bytes(), "longer than 4096 bytes"),
            (too_deep.as_bytes(), "deeper than 32"),
            (far_too_deep.as_bytes(), "deeper than 32"),
        ];
        for (body, expected) in rows {
            let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
            let reason = parse_bytes(body).expect_err(&shown);
            assert!(reason.contains(expected), "{shown}: {reason}");
            assert!(!reason.contains("canary") && !reason.contains("123"), "{shown}: {reason}");
        }
    }

    /// C15: unknown fields, any order, no id or a strange one.
    #[test]
    fn c15_only_the_token_is_certain() {
        let rows = [
            (r#"{"apiToken":"abc"}"#, None),
            (r#" { "id" : "7-f_x.~" , "apiToken" : "abc" } "#, Some("7-f_x.~")),
            (r#"{"organizationId":"o","displayData":{"name":"}]","x":[{"y":"\"["}]},"apiToken":"abc","id":"t"}"#, Some("t")),
            (r#"{"apiToken":"\u0061bc","id":42}"#, Some("42")),
            (r#"{"apiToken":"abc","id":null}"#, None),
            (r#"{"apiToken":"abc","id":{"a":1}}"#, None),
            (r#"{"apiToken":"abc","id":-1.5}"#, None),
            (r#"{"apiToken":"abc","id":"../users"}"#, None),
            (r#"{"apiToken":"abc","id":".."}"#, None),
            (r#"{"apiToken":"abc","id":""}"#, None),
            (r#"{"apiToken":"abc","id":"a\nb"}"#, None),
        ];
        for (body, expected) in rows {
            let (token, id) = parse_bytes(body.as_bytes()).expect(body);
            assert_eq!((token.expose(), id.as_deref()), ("abc", expected), "{body}");
        }
        assert!(is_safe_id(&"a".repeat(MAX_ID_BYTES)) && !is_safe_id(&"a".repeat(MAX_ID_BYTES + 1)));
    }

    /// C12: a body that says that it is something else is refused; one that says nothing is judged by its content.
    #[test]
    fn c12_type_and_coding() {
        let rows = [
            ("content-type", "application/json", true),
            ("content-type", "Application/JSON; charset=utf-8", true),
            ("content-type", "application/vnd.upsolver+json", true),
            ("content-type", "text/plain", true),
            ("content-type", "text/html", false),
            ("content-type", "application/xml", false),
            ("content-encoding", "identity", true),
            ("content-encoding", "gzip", false),
            ("content-encoding", "br", false),
        ];
        for (name, value, accepted) in rows {
            let headers = HeaderMap::from_iter([(http::HeaderName::from_static(name), HeaderValue::from_static(value))]);
            let reply = Reply { status: StatusCode::OK, headers, body: Bytes::from_static(br#"{"apiToken":"abc"}"#) };
            assert_eq!(parse(reply).is_ok(), accepted, "{name}: {value}");
        }
    }

    proptest! {
        /// C12: no bytes at all make it panic, and a reply that is cut anywhere is no reply.
        #[test]
        fn c12_any_bytes_are_safe(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_bytes(&bytes);
        }

        #[test]
        fn c12_a_cut_reply_is_refused(cut in 0_usize..54) {
            let whole = br#"{"id":"t-1","displayData":{"a":[1,2]},"apiToken":"abc"}"#;
            prop_assert!(parse_bytes(&whole[..cut]).is_err());
        }
    }
}
