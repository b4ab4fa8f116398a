//! `[policy]`: rules over method and path, the first match wins. Pure.
//!
//! A rule sees the path percent-decoded, with repeated slashes as one and without `;` parameters. A path that two servers could read differently
//! (an encoded slash or backslash, a dot segment, NUL, an encoded percent sign) cannot be decided and is refused while rules are set (Envoy's
//! CVE-2021-29492 was a path that was judged in one form and routed in another).

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

    /// Judges a request. A denial names the methods that would pass.
    pub fn decide(&self, method: &Method, path: &str) -> Result<Decision, Error> {
        if self.rules.is_empty() && self.default == Action::Allow {
            return Ok(Decision::Allow);
        }
        let path = decidable(path)?;
        let (action, rule) = self.first_match(method, &path);
        if action == Action::Allow {
            return Ok(Decision::Allow);
        }
        let rule = rule.map_or_else(|| "default".to_owned(), |index| index.to_string());
        if self.dry_run {
            return Ok(Decision::WouldDeny { rule });
        }
        let allow = METHODS.into_iter().filter(|method| self.first_match(method, &path).0 == Action::Allow).collect();
        Err(Error::PolicyDenied { allow, rule })
    }

    fn first_match(&self, method: &Method, path: &str) -> (Action, Option<usize>) {
        let matching = self.rules.iter().enumerate().find(|(_, rule)| {
            (rule.methods.is_empty() || rule.methods.iter().any(|name| name == method.as_str()))
                && rule.globs.iter().any(|glob| glob.is_match(path))
        });
        matching.map_or((self.default, None), |(index, rule)| (rule.action, Some(index)))
    }
}

/// `*` stays within a segment. `/inputs/**` is everything below `/inputs/`, and `/inputs` and `/inputs/` themselves.
fn globs(pattern: &str) -> Vec<GlobMatcher> {
    let mut patterns = vec![pattern.to_owned()];
    if let Some(parent) = pattern.strip_suffix("/**") {
        patterns.push(format!("{parent}/"));
        patterns.extend((!parent.is_empty()).then(|| parent.to_owned()));
    }
    let compile = |pattern: String| GlobBuilder::new(&pattern).literal_separator(true).build().ok().map(|glob| glob.compile_matcher());
    patterns.into_iter().filter_map(compile).collect()
}

/// The one form of a path that rules are held against.
fn decidable(path: &str) -> Result<String, Error> {
    const UNDECIDABLE: Error = Error::BadRequest("the path can be read in more than one way, and policy rules are set");
    let lower = path.to_ascii_lowercase();
    if ["%2f", "%5c", "%00", "%25", "\\", "\0"].iter().any(|odd| lower.contains(odd)) {
        return Err(UNDECIDABLE);
    }
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8().map_err(|_| UNDECIDABLE)?;
    let mut decided = String::with_capacity(decoded.len());
    for segment in decoded.split('/').map(|segment| segment.split(';').next().unwrap_or_default()) {
        if matches!(segment, "." | "..") {
            return Err(UNDECIDABLE);
        }
        if !segment.is_empty() {
            decided.push('/');
            decided.push_str(segment);
        }
    }
    if decided.is_empty() || decoded.ends_with('/') {
        decided.push('/');
    }
    Ok(decided)
}
