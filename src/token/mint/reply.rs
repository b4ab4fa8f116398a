//! The body of a mint's reply. Only `apiToken` is certain (contract section 1); everything else may be missing, added or reordered.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use zeroize::Zeroizing;

use crate::secret::Token;

/// What is taken from it.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) token: Token,
    pub(super) id: Option<String>,
}

/// An id goes into logs and into the revocation's path, so it must be harmless there.
const MAX_ID_BYTES: usize = 128;

/// Reads a reply. The reason of a failure quotes nothing: `serde_json` does, so its errors end here (B38).
pub(super) fn parse(body: &[u8]) -> Result<Parsed, String> {
    let reply: Reply = serde_json::from_slice(body).map_err(|error| {
        let what = match error.classify() {
            serde_json::error::Category::Eof => "ends early",
            serde_json::error::Category::Syntax => "is not JSON",
            serde_json::error::Category::Data | serde_json::error::Category::Io => "is not of the documented form",
        };
        format!("the reply's body {what} (line {}, column {})", error.line(), error.column())
    })?;
    let token = reply.token.ok_or("the reply has no apiToken")?;
    let token = Token::new(token.as_str().to_owned()).map_err(|reason| format!("the reply's apiToken cannot be used: {reason}"))?;
    let id = reply.id.filter(|id| {
        (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    });
    Ok(Parsed { token, id })
}

#[derive(Default)]
struct Reply {
    token: Option<Zeroizing<String>>,
    id: Option<String>,
}

impl<'de> Deserialize<'de> for Reply {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Reply;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Reply, A::Error> {
                let mut reply = Reply::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        // Two of them would leave open which one counts.
                        "apiToken" if reply.token.is_some() => return Err(serde::de::Error::custom("repeated")),
                        "apiToken" => reply.token = map.next_value::<Option<String>>()?.map(Zeroizing::new),
                        // Optional, and of no use where it is not text.
                        "id" => reply.id = map.next_value::<serde_json::Value>()?.as_str().map(str::to_owned),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(reply)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C12, C13, B38: what is no usable reply is refused, and the reason quotes nothing of it.
    #[test]
    fn c12_c13_b38_unusable_replies_are_refused_without_a_quote() {
        let deep = format!("{{\"x\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        let long = format!("{{\"apiToken\":\"{}\"}}", "canary".repeat(1000));
        for body in [
            "",
            "\"canary\"",
            "[\"canary\"]",
            "{\"apiToken\":\"canary",
            "{\"apiToken\":123456}",
            "{\"apiToken\":null}",
            "{\"apiToken\":\"\"}",
            "{\"apiToken\":{\"canary\":1}}",
            "{\"apiToken\":\"canary1\",\"apiToken\":\"canary2\"}",
            "{\"apiToken\":\"canary\\r\\nx\"}",
            "{\"apiToken\":\"canary\\u0000\"}",
            "{\"apiToken\":\"canar\u{e9}\"}",
            "{\"apiToken\":\" canary\"}",
            "{\"id\":\"canary\"}",
            "<html>canary</html>",
            "\u{feff}{\"apiToken\":\"canary\"}",
            &deep,
            &long,
        ] {
            let reason = parse(body.as_bytes()).expect_err(body);
            assert!(!reason.contains("canar"), "{reason}");
        }
        assert!(parse(b"{\"apiToken\":\"can\xff\"}").is_err());
    }

    /// C15: unknown fields, another order and a missing id are fine; an id that could do harm is left out.
    #[test]
    fn c15_only_the_token_is_needed() {
        let documented = r#"{"id":"12345678-1234-1234-1234-1234567890ab","organizationId":"o","displayData":{"name":"n","x":[1,{}]},
            "apiToken":"abc12345678901234567890123456789","createdBy":"docs@upsolver.com"}"#;
        let parsed = parse(documented.as_bytes()).unwrap();
        assert_eq!(parsed.token.expose(), "abc12345678901234567890123456789");
        assert_eq!(parsed.id.as_deref(), Some("12345678-1234-1234-1234-1234567890ab"));
        for (body, id) in [
            (r#"{"apiToken":"t"}"#, None),
            (r#"{"new":{"a":[]},"apiToken":"t","id":"i"}"#, Some("i")),
            (r#"{"apiToken":"t","id":7}"#, None),
            (r#"{"apiToken":"t","id":"../users"}"#, None),
            (r#"{"apiToken":"t","id":""}"#, None),
        ] {
            assert_eq!(parse(body.as_bytes()).unwrap().id.as_deref(), id, "{body}");
        }
    }
}
