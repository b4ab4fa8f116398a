//! One element of `policy.rules`.

use globset::GlobBuilder;
use http::Method;
use toml::Value;

use super::value::{Checked, choice, text};
use super::{Action, Rule, suggest};

/// What a rule does, by its word; `policy.default` uses the same.
pub(super) const ACTIONS: &[(&str, Action)] = &[("allow", Action::Allow), ("deny", Action::Deny)];

/// A rule, or everything that is wrong with it.
pub(super) fn rule(value: &Value) -> Checked<Rule> {
    const KEYS: [&str; 3] = ["action", "methods", "path"];
    let Value::Table(table) = value else {
        return Err(r#"must be a table such as { action = "deny", methods = ["DELETE"], path = "/inputs/**" }"#.into());
    };
    let mut wrong = Vec::new();
    for name in table.keys().filter(|name| !KEYS.contains(&name.as_str())) {
        let meant = suggest::closest(name, KEYS).map(|key| format!(" (did you mean {key}?)")).unwrap_or_default();
        wrong.push(format!("has no key {name}{meant}"));
    }
    let mut part = |name: &str, checked: Checked<()>| {
        if let Err(rule) = checked {
            wrong.push(format!("{name} {rule}"));
        }
    };
    let (mut action, mut methods, mut path) = (Action::Deny, Vec::new(), String::new());
    part("action", table.get("action").ok_or_else(|| "is missing".to_owned()).and_then(choice(ACTIONS)).map(|value| action = value));
    part("methods", table.get("methods").map_or(Ok(Vec::new()), methods_of).map(|value| methods = value));
    part("path", table.get("path").ok_or_else(|| "is missing".to_owned()).and_then(glob).map(|value| path = value));
    if wrong.is_empty() { Ok(Rule { action, methods, path }) } else { Err(wrong.join("; ")) }
}

/// Methods are compared exactly (RFC 9110 section 9.1), so a rule for `get` would match nothing that anybody sends.
fn methods_of(value: &Value) -> Checked<Vec<String>> {
    const RULE: &str = r#"must be a list of upper-case methods such as ["GET", "POST"]"#;
    let method = |item: &Value| {
        let name = text(item).ok()?;
        let legal = Method::from_bytes(name.as_bytes()).is_ok() && !name.bytes().any(|byte| byte.is_ascii_lowercase());
        legal.then(|| name.to_owned())
    };
    value.as_array().and_then(|items| items.iter().map(method).collect()).ok_or(RULE.into())
}

/// A glob that begins where every path does.
fn glob(value: &Value) -> Checked<String> {
    const RULE: &str = r#"must be a pattern such as "/inputs/**" or "**/secret""#;
    let pattern = text(value).map_err(|_| RULE)?;
    if !pattern.starts_with('/') && !pattern.starts_with("**") {
        return Err(format!("{RULE}, beginning with / or **"));
    }
    match GlobBuilder::new(pattern).literal_separator(true).build() {
        Ok(_) => Ok(pattern.to_owned()),
        Err(error) => Err(format!("{RULE}: {}", error.kind())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let rows = [
            (r#"{ action = "deny", methods = ["GET", "X-Y"], path = "/a/**" }"#, Ok(())),
            (r#"{ action = "allow", path = "**" }"#, Ok(())),
            (r#"{ action = "allow", methods = [], path = "/" }"#, Ok(())),
            (r#"{ path = "/" }"#, Err("action is missing")),
            (r#"{ action = "deny", path = "inputs" }"#, Err("path must be a pattern")),
            (r#"{ action = "deny", path = "/[" }"#, Err("path must be a pattern")),
            (r#"{ action = "deny", path = "/", methods = ["get"] }"#, Err("methods must be a list of upper-case")),
            (r#"{ action = "deny", path = "/", methods = ["A B"] }"#, Err("methods must be a list of upper-case")),
            (r#"{ action = "deny", path = "/", methods = "GET" }"#, Err("methods must be a list of upper-case")),
            (r#"{ action = "dney", path = "/", metods = [] }"#, Err("has no key metods (did you mean methods?); action must be one of")),
            (r#""deny /""#, Err("must be a table")),
        ];
        for (toml, expected) in rows {
            match (rule(&toml.parse().unwrap()), expected) {
                (Ok(_), Ok(())) => {}
                (Err(message), Err(start)) => assert!(message.starts_with(start), "{toml}: {message}"),
                (result, _) => panic!("{toml}: {result:?}"),
            }
        }
    }
}
