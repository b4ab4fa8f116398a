//! `[policy]`: rules over method and path, the first match wins. Pure.
//!
//! A rule sees the path percent-decoded, with repeated slashes as one and without `;` parameters. A path that two servers could read differently
//! (an encoded slash or backslash, a dot segment, a control character, an encoded percent sign) cannot be decided and is refused while rules are set
//! (Envoy's CVE-2021-29492 was a path that was judged in one form and routed in another). Case counts, in methods and in paths.

use std::borrow::Cow;
use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};
use http::Method;

use super::error::Error;
use crate::config::{self, Action};

/// The methods that an `allow` field can name.
const METHODS: [Method; 7] = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];

/// The compiled rules. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Policy {
    rules: Arc<[Rule]>,
    default: Action,
    dry_run: bool,
}

#[derive(Debug)]
struct Rule {
    action: Action,
    methods: Vec<String>,
    globs: Vec<GlobMatcher>,
}

/// What becomes of a request that is not denied.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// It passes.
    Allow,
    /// It passes because of `policy.dry_run`; this rule (its index, or `default`) would have denied it.
    WouldDeny {
        /// The label `rule` of `policy_denials_total`.
        rule: String,
    },
}

impl Policy {
    /// The globs were checked when the configuration was read.
    pub fn new(config: &config::Policy) -> Self {
        let rules = config.rules.iter().map(|rule| Rule { action: rule.action, methods: rule.methods.clone(), globs: globs(&rule.path) });
        Self { rules: rules.collect(), default: config.default, dry_run: config.dry_run }
    }

    /// Judges a request. A denial names the methods that would pass. In a dry run nothing is refused, and a path that cannot be decided counts for the
    /// default.
    pub fn decide(&self, method: &Method, path: &str) -> Result<Decision, Error> {
        if self.rules.is_empty() && self.default == Action::Allow {
            return Ok(Decision::Allow);
        }
        let Some(path) = decidable(path) else {
            return if self.dry_run {
                Ok(Decision::WouldDeny { rule: label(None) })
            } else {
                Err(Error::BadRequest("the path can be read in more than one way, and policy rules are set"))
            };
        };
        let (action, rule) = self.first_match(method, &path);
        if action == Action::Allow {
            return Ok(Decision::Allow);
        }
        if self.dry_run {
            return Ok(Decision::WouldDeny { rule: label(rule) });
        }
        let allow = METHODS.into_iter().filter(|method| self.first_match(method, &path).0 == Action::Allow).collect();
        Err(Error::PolicyDenied { allow, rule: label(rule) })
    }

    fn first_match(&self, method: &Method, path: &str) -> (Action, Option<usize>) {
        let matching = self.rules.iter().enumerate().find(|(_, rule)| {
            (rule.methods.is_empty() || rule.methods.iter().any(|name| name == method.as_str()))
                && rule.globs.iter().any(|glob| glob.is_match(path))
        });
        matching.map_or((self.default, None), |(index, rule)| (rule.action, Some(index)))
    }
}

/// The label `rule` of `policy_denials_total`.
fn label(rule: Option<usize>) -> String {
    rule.map_or_else(|| "default".to_owned(), |index| index.to_string())
}

/// `*` stays within a segment. `/inputs/**` is `/inputs` itself and everything below.
fn globs(pattern: &str) -> Vec<GlobMatcher> {
    let compile = |pattern: &str| GlobBuilder::new(pattern).literal_separator(true).build().map(|glob| glob.compile_matcher());
    let mut globs = vec![compile(pattern).expect("the configuration holds no glob that does not compile")];
    if let Some(parent) = pattern.strip_suffix("/**") {
        // What is left of a pattern can be none: of `/a\/**`, say, where the slash is escaped.
        globs.extend(compile(parent).ok());
    }
    globs
}

/// The one form of a path that rules are held against, where there is only one.
fn decidable(path: &str) -> Option<Cow<'_, str>> {
    let odd = |byte: u8| matches!(byte, b'%' | b'\\' | b';');
    if !path.bytes().any(odd) && !path.contains("//") && !path.contains("/.") {
        return Some(Cow::Borrowed(path));
    }
    // A slash or a percent sign that was encoded is told from one that was not before anything is decoded.
    let lower = path.to_ascii_lowercase();
    if ["%2f", "%5c", "%25", "\\"].iter().any(|ambiguous| lower.contains(ambiguous)) {
        return None;
    }
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8().ok()?;
    if decoded.contains(char::is_control) {
        return None;
    }
    let mut form = String::with_capacity(decoded.len());
    let mut ends_in_slash = false;
    for segment in decoded.split('/').map(|segment| segment.split(';').next().unwrap_or_default()) {
        if matches!(segment, "." | "..") {
            return None;
        }
        ends_in_slash = segment.is_empty();
        if !ends_in_slash {
            form.push('/');
            form.push_str(segment);
        }
    }
    if ends_in_slash {
        form.push('/');
    }
    Some(Cow::Owned(form))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn policy(toml: &str) -> Policy {
        let config = Config::from_toml(&format!("credentials.token_file = \"/token\"\n[policy]\n{toml}")).expect("a valid configuration");
        Policy::new(&config.policy)
    }

    /// `allow`, `would deny RULE`, `deny RULE: METHODS` or `bad request`.
    fn decide(policy: &Policy, method: &str, path: &str) -> String {
        match policy.decide(&method.parse().unwrap(), path) {
            Ok(Decision::Allow) => "allow".to_owned(),
            Ok(Decision::WouldDeny { rule }) => format!("would deny {rule}"),
            Err(Error::PolicyDenied { allow, rule }) => {
                format!("deny {rule}: {}", allow.iter().map(Method::as_str).collect::<Vec<_>>().join(" "))
            }
            Err(Error::BadRequest(_)) => "bad request".to_owned(),
            Err(other) => panic!("{other}"),
        }
    }

    const RULES: &str = r#"rules = [
        { action = "allow", methods = ["GET", "HEAD"], path = "/inputs/**" },
        { action = "deny", path = "/inputs/**" },
        { action = "deny", methods = ["DELETE"], path = "/*/x" },
    ]"#;

    #[test]
    fn the_first_rule_that_matches_decides() {
        let policy = policy(RULES);
        for (method, path, expected) in [
            ("GET", "/inputs", "allow"),
            ("GET", "/inputs/", "allow"),
            ("GET", "/inputs/a/b", "allow"),
            ("POST", "/inputs", "deny 1: GET HEAD"),
            ("POST", "/inputs/", "deny 1: GET HEAD"),
            ("POST", "/inputs/a/b", "deny 1: GET HEAD"),
            ("get", "/inputs/a", "deny 1: GET HEAD"),
            ("POST", "/inputsx", "allow"),
            ("POST", "/x/inputs/a", "allow"),
            ("DELETE", "/a/x", "deny 2: GET HEAD POST PUT PATCH OPTIONS"),
            ("DELETE", "/a/b/x", "allow"),
            ("DELETE", "/x", "allow"),
        ] {
            assert_eq!(decide(&policy, method, path), expected, "{method} {path}");
        }
    }

    /// B16: spellings that every server reads alike are judged alike.
    #[test]
    fn b16_a_path_is_judged_as_it_will_be_read() {
        let policy = policy(RULES);
        for path in [
            "//inputs/a",
            "/%69nputs/a",
            "/inputs//a",
            "/inputs;x=1/a",
            "/inputs/a%20b",
            "/inputs/.hidden",
            "/inputs/caf%C3%A9",
            "/inputs/%",
        ] {
            assert_eq!(decide(&policy, "POST", path), "deny 1: GET HEAD", "{path}");
        }
    }

    /// B16: tidying up neither adds nor takes away a slash at the end, and never leaves nothing.
    #[test]
    fn b16_a_slash_at_the_end_stays() {
        let policy = policy(r#"rules = [{ action = "deny", path = "/" }, { action = "deny", path = "/inputs/" }]"#);
        for (path, expected) in [
            ("/;x", "deny 0: "),
            ("//", "deny 0: "),
            ("//inputs/", "deny 1: "),
            ("//inputs", "allow"),
            ("/inputs/;x", "deny 1: "),
            ("/inputs;x", "allow"),
        ] {
            assert_eq!(decide(&policy, "GET", path), expected, "{path}");
        }
    }

    #[test]
    fn b16_what_can_be_read_in_two_ways_is_a_bad_request() {
        let policy = policy(RULES);
        for path in [
            "/x/../inputs/a",
            "/x/%2e%2E/inputs/a",
            "/./inputs",
            "/inputs/..",
            "/x/..;/inputs",
            "/inputs%2fa",
            "/x%2F..%2Finputs",
            "/inputs%5ca",
            "/inputs\\a",
            "/inputs%00",
            "/inputs%0d%0a",
            "/%2569nputs/a",
            "/%c0%afinputs",
            "/%ff",
        ] {
            assert_eq!(decide(&policy, "POST", path), "bad request", "{path}");
        }
    }

    #[test]
    fn without_rules_the_default_decides() {
        assert_eq!(decide(&policy(""), "POST", "/x/../%2f"), "allow");
        assert_eq!(decide(&policy("default = \"deny\""), "POST", "/x"), "deny default: ");
        let allow_list = policy("default = \"deny\"\nrules = [{ action = \"allow\", path = \"/**\" }]");
        assert_eq!((decide(&allow_list, "GET", "/"), decide(&allow_list, "GET", "/a/b")), ("allow".to_owned(), "allow".to_owned()));
    }

    #[test]
    fn a_dry_run_denies_nothing_and_says_what_it_would() {
        let policy = policy(&format!("dry_run = true\n{RULES}"));
        assert_eq!(decide(&policy, "POST", "/inputs/a"), "would deny 1");
        assert_eq!(decide(&policy, "POST", "/x/../inputs"), "would deny default");
        assert_eq!(decide(&policy, "GET", "/inputs/a"), "allow");
    }

    /// The short cut for plain paths does not change a decision.
    #[test]
    fn a_plain_path_is_its_own_form() {
        for path in ["/", "/inputs", "/inputs/", "/a/b-c/d.e", "/\u{e9}"] {
            assert!(matches!(decidable(path), Some(Cow::Borrowed(same)) if same == path), "{path}");
        }
    }
}
