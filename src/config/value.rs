//! From a TOML value to the type that a key wants, or the rule that it broke. The rule completes the sentence "token.wait …"; who asks adds what was
//! given, where that may be shown.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use humantime::format_duration;
use toml::Value;
use tracing_subscriber::EnvFilter;

use super::error::shorten;
use super::suggest;
use crate::secret::InvalidSecret;

/// A value, or the rule that it broke.
pub(super) type Checked<T> = Result<T, String>;

/// The bounds of timeouts: shorter than a millisecond is a slip, longer than an hour is none.
pub(super) const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_hours(1);
/// The bounds of timeouts that may also be zero, for "not at all".
pub(super) const TIMEOUT_OR_ZERO: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_hours(1);
/// The bounds of intervals.
pub(super) const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_hours(24);
/// The bounds of intervals that may also be zero, for "none".
pub(super) const INTERVAL_OR_ZERO: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_hours(24);

/// Any string.
pub(super) fn text(value: &Value) -> Checked<&str> {
    value.as_str().ok_or_else(|| "must be a string in quotes".to_owned())
}

/// A string with something in it.
pub(super) fn optional_text(value: &Value) -> Checked<Option<String>> {
    text(value).map(|text| (!text.is_empty()).then(|| text.to_owned()))
}

/// A path; `None` where empty.
pub(super) fn optional_path(value: &Value) -> Checked<Option<PathBuf>> {
    const RULE: &str = r#"must be the path of a file, or "" for none"#;
    let path = optional_text(value).map_err(|_| RULE)?;
    if path.as_ref().is_some_and(|path| path.contains('\0')) { Err(RULE.into()) } else { Ok(path.map(PathBuf::from)) }
}

/// A path.
pub(super) fn path(value: &Value) -> Checked<PathBuf> {
    optional_path(value).ok().flatten().ok_or_else(|| "must be the path of a file".to_owned())
}

/// `true` or `false`.
pub(super) fn flag(value: &Value) -> Checked<bool> {
    value.as_bool().ok_or_else(|| "must be true or false".to_owned())
}

/// A whole number within `range`.
pub(super) fn number(range: RangeInclusive<u32>) -> impl Fn(&Value) -> Checked<u32> {
    move |value| {
        let number = value.as_integer().and_then(|number| u32::try_from(number).ok());
        number
            .filter(|number| range.contains(number))
            .ok_or_else(|| format!("must be a whole number from {} to {}", range.start(), range.end()))
    }
}

/// A limit: a whole number from 1 to `max`.
pub(super) fn limit(max: u32) -> impl Fn(&Value) -> Checked<NonZeroUsize> {
    move |value| {
        let number = number(1..=max)(value)?;
        Ok(NonZeroUsize::new(number as usize).expect("the range begins with 1"))
    }
}

/// A duration within `range`.
pub(super) fn duration(range: RangeInclusive<Duration>) -> impl Fn(&Value) -> Checked<Duration> {
    move |value| {
        let duration = value.as_str().and_then(|text| humantime::parse_duration(text.trim()).ok());
        duration.filter(|duration| range.contains(duration)).ok_or_else(|| {
            let (least, most) = (format_duration(*range.start()), format_duration(*range.end()));
            format!(r#"must be a duration from {least} to {most}, such as "30s""#)
        })
    }
}

/// A duration within `range`, or `None` for `"off"`.
pub(super) fn duration_or_off(range: RangeInclusive<Duration>) -> impl Fn(&Value) -> Checked<Option<Duration>> {
    or_off(duration(range))
}

/// A size in bytes within `range`: a number, or a string with a unit.
pub(super) fn size(range: RangeInclusive<u64>) -> impl Fn(&Value) -> Checked<u64> {
    move |value| {
        let size = match value {
            Value::Integer(bytes) => u64::try_from(*bytes).ok(),
            Value::String(text) => text.trim().parse().ok().map(|ByteSize(bytes)| bytes),
            _ => None,
        };
        size.filter(|size| range.contains(size))
            .ok_or_else(|| format!(r#"must be a size from {} to {}, such as "64KiB""#, shown(*range.start()), shown(*range.end())))
    }
}

/// A size within `range`, or `None` for `"off"`.
pub(super) fn size_or_off(range: RangeInclusive<u64>) -> impl Fn(&Value) -> Checked<Option<u64>> {
    or_off(size(range))
}

fn or_off<T>(inner: impl Fn(&Value) -> Checked<T>) -> impl Fn(&Value) -> Checked<Option<T>> {
    move |value| {
        if value.as_str() == Some("off") { Ok(None) } else { inner(value).map(Some).map_err(|rule| format!(r#"{rule}, or "off""#)) }
    }
}

/// As people write it in the file, in the largest unit that leaves no fraction: `1MiB`. [`ByteSize`] would take a logarithm for it, the only one in the
/// program, for which every process would load the C library's mathematics.
fn shown(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = if bytes == 0 { 0 } else { bytes.trailing_zeros() / 10 };
    format!("{}{}", bytes >> (10 * unit), UNITS[unit as usize])
}

/// One of a few words.
pub(super) fn choice<T: Copy>(options: &'static [(&'static str, T)]) -> impl Fn(&Value) -> Checked<T> {
    move |value| {
        let given = value.as_str().unwrap_or_default();
        if let Some((_, option)) = options.iter().find(|(word, _)| *word == given) {
            return Ok(*option);
        }
        let words = options.iter().map(|(word, _)| *word);
        let listed = words.clone().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ");
        let meant = suggest::closest(given, words).map(|word| format!(" (did you mean {word:?}?)")).unwrap_or_default();
        Err(format!("must be one of {listed}{meant}"))
    }
}

/// Permission bits in octal, as `chmod` takes them.
pub(super) fn mode(value: &Value) -> Checked<u32> {
    let digits =
        value.as_str().map(|text| text.strip_prefix("0o").unwrap_or(text)).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits
        .and_then(|digits| u32::from_str_radix(digits, 8).ok())
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| r#"must be permission bits as an octal string, such as "0660""#.to_owned())
}

/// A secret that was written into the configuration; `None` where empty.
pub(super) fn secret<T>(new: impl Fn(String) -> Result<T, InvalidSecret>) -> impl Fn(&Value) -> Checked<Option<T>> {
    move |value| match optional_text(value)? {
        None => Ok(None),
        Some(text) => new(text).map(Some).map_err(|reason| format!("cannot be used: {reason}")),
    }
}

/// The path of a request to the upstream, in origin-form (RFC 9112 section 3.2.1).
pub(super) fn request_path(value: &Value) -> Checked<String> {
    const RULE: &str = r#"must be the path of a URL, such as "/users""#;
    let path = text(value).map_err(|_| RULE)?;
    // A path that begins with two slashes reads as a host elsewhere. `PathAndQuery` is more generous than RFC 3986 section 3.3.
    let allowed = |byte: u8| byte.is_ascii_graphic() && !br##""#<>\^`{|}"##.contains(&byte);
    let legal = path.starts_with('/') && !path.starts_with("//") && path.bytes().all(allowed);
    if legal && path.parse::<http::uri::PathAndQuery>().is_ok() { Ok(path.to_owned()) } else { Err(RULE.into()) }
}

/// `token.revoke_path`: a path in which `{id}` stands for the token; `None` where empty.
pub(super) fn revoke_path(value: &Value) -> Checked<Option<String>> {
    const RULE: &str = r#"must be the path of a URL with {id} in it, such as "/api-tokens/{id}", or "" for none"#;
    let Some(path) = optional_text(value).map_err(|_| RULE)? else { return Ok(None) };
    request_path(&Value::from(path.replace("{id}", "0"))).map_err(|_| RULE)?;
    if path.contains("{id}") { Ok(Some(path)) } else { Err(RULE.into()) }
}

/// A display name or description of tokens, of at most `max` characters; an unknown placeholder is a slip.
pub(super) fn template(max: usize) -> impl Fn(&Value) -> Checked<String> {
    const KNOWN: [&str; 5] = ["hostname", "pod", "namespace", "node", "version"];
    move |value| {
        let template = text(value)?;
        if template.trim().is_empty() || template.chars().count() > max || template.chars().any(char::is_control) {
            return Err(format!("must have 1 to {max} characters and no control characters"));
        }
        for piece in template.split('{').skip(1) {
            let Some((word, _)) = piece.split_once('}') else { continue };
            if !KNOWN.contains(&word) && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
                let meant = suggest::closest(word, KNOWN).map(|word| format!(" (did you mean {{{word}}}?)")).unwrap_or_default();
                return Err(format!("knows the placeholders {{{}}}, not {{{word}}}{meant}", KNOWN.join("}, {")));
            }
        }
        Ok(template.to_owned())
    }
}

const LOG_FILTER_RULE: &str = r#"must be a tracing filter, such as "info" or "info,upsolver_auth_proxy=debug""#;

/// `log.level`: see [`parse_log_filter`].
pub(super) fn log_filter(value: &Value) -> Checked<String> {
    let filter = text(value).map_err(|_| LOG_FILTER_RULE)?;
    parse_log_filter(filter).map(|_| filter.to_owned())
}

/// What [`EnvFilter`] parses, less one trap: it takes a misspelt level for the name of a module, and silences all others. The error is the rule that was
/// broken, for people. Every filter comes through here, wherever it was given.
pub(crate) fn parse_log_filter(filter: &str) -> Result<EnvFilter, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    const RULE: &str = LOG_FILTER_RULE;
    let filter = filter.trim();
    if filter.is_empty() {
        return Err(RULE.into());
    }
    for word in filter.split(',').map(str::trim) {
        let is_level = LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
        if !is_level && word.bytes().all(|byte| byte.is_ascii_alphabetic()) && !word.is_empty() {
            let meant = suggest::closest(word, LEVELS).map(|level| format!(" (did you mean {level:?}?)"));
            return Err(format!("{} is no level{}: {RULE}", shorten(word), meant.unwrap_or_default()));
        }
    }
    EnvFilter::builder().parse(filter).map_err(|_| RULE.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: std::fmt::Debug + PartialEq>(parse: impl Fn(&Value) -> Checked<T>, rows: &[(&str, Option<T>)]) {
        for (toml, expected) in rows {
            let value: Value = toml.parse().unwrap();
            assert_eq!(&parse(&value).ok(), expected, "{toml}");
        }
    }

    #[test]
    fn durations() {
        check(
            duration(TIMEOUT),
            &[
                (r#""1ms""#, Some(Duration::from_millis(1))),
                (r#"" 5m ""#, Some(Duration::from_mins(5))),
                (r#""1h""#, Some(Duration::from_hours(1))),
                (r#""3601s""#, None),
                (r#""999us""#, None),
                (r#""0s""#, None),
                (r#""10""#, None),
                (r#""-1s""#, None),
                (r#""99999999999999999999s""#, None),
                (r#""off""#, None),
                (r#""""#, None),
                ("10", None),
            ],
        );
        check(duration(TIMEOUT_OR_ZERO), &[(r#""0s""#, Some(Duration::ZERO))]);
        check(duration_or_off(INTERVAL), &[(r#""off""#, Some(None)), (r#""1d""#, Some(Some(Duration::from_hours(24)))), (r#""2d""#, None)]);
        let rule = duration(TIMEOUT)(&Value::from(1)).unwrap_err();
        assert_eq!(rule, r#"must be a duration from 1ms to 1h, such as "30s""#);
    }

    #[test]
    fn sizes() {
        let kib = |count: u64| count << 10;
        check(
            size(kib(8)..=kib(1024)),
            &[
                (r#""64KiB""#, Some(kib(64))),
                (r#""64 KiB""#, Some(kib(64))),
                (r#""64kB""#, Some(64_000)),
                (r#""65536""#, Some(kib(64))),
                ("65536", Some(kib(64))),
                (r#""1MiB""#, Some(kib(1024))),
                (r#""1025KiB""#, None),
                ("8191", None),
                ("-1", None),
                (r#""64 bananas""#, None),
                ("1.5", None),
            ],
        );
        check(size_or_off(1..=u64::MAX), &[(r#""off""#, Some(None)), (r#""1GiB""#, Some(Some(1 << 30))), ("0", None)]);
        assert_eq!(size(kib(8)..=kib(1024))(&Value::from(1)).unwrap_err(), r#"must be a size from 8KiB to 1MiB, such as "64KiB""#);
        let rows =
            [(0, "0"), (1023, "1023"), (1 << 10, "1KiB"), (1536, "1536"), (1_023 << 10, "1023KiB"), (16 << 20, "16MiB"), (1 << 50, "1PiB")];
        for (bytes, text) in rows {
            assert_eq!(shown(bytes), text);
        }
    }

    #[test]
    fn numbers_and_modes() {
        check(number(0..=512), &[("0", Some(0)), ("512", Some(512)), ("513", None), ("-1", None), (r#""1""#, None), ("1.0", None)]);
        check(
            mode,
            &[
                (r#""0660""#, Some(0o660)),
                (r#""0o600""#, Some(0o600)),
                (r#""0888""#, None),
                (r#""1777""#, None),
                (r#""+1""#, None),
                ("0o660", None),
            ],
        );
    }

    #[test]
    fn choices_suggest() {
        let parse = choice(&[("json", 1), ("pretty", 2)]);
        check(&parse, &[(r#""json""#, Some(1)), (r#""JSON""#, None), ("1", None)]);
        assert_eq!(parse(&Value::from("jsno")).unwrap_err(), r#"must be one of "json", "pretty" (did you mean "json"?)"#);
        let version = choice(&[("1.1", 1), ("2", 2)]);
        for unlike in [Value::from(true), Value::from("3"), Value::from("")] {
            assert_eq!(version(&unlike).unwrap_err(), r#"must be one of "1.1", "2""#, "{unlike}");
        }
    }

    #[test]
    fn request_paths() {
        for path in ["/", "/users", "/a?b=c", "/a%20b"] {
            assert_eq!(request_path(&Value::from(path)), Ok(path.to_owned()));
        }
        for path in ["", "users", "//evil.com/", "/a b", "/ä", "/a#b", "/a\n", "http://x/"] {
            assert!(request_path(&Value::from(path)).is_err(), "{path}");
        }
        assert_eq!(revoke_path(&Value::from("/api-tokens/{id}")), Ok(Some("/api-tokens/{id}".to_owned())));
        assert_eq!(revoke_path(&Value::from("")), Ok(None));
        for path in ["/api-tokens/", "api-tokens/{id}", "/api-tokens/{name}/{id}"] {
            assert!(revoke_path(&Value::from(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn templates() {
        for text in ["a", "{pod}/{namespace}-{node} {version} {hostname}", "{", "{}x", "a } b", "{A}"] {
            assert_eq!(template(50)(&Value::from(text)).is_ok(), text != "{}x", "{text}");
        }
        for text in ["", " ", "a\nb", "{host}", "{hostnam}"] {
            assert!(template(50)(&Value::from(text)).is_err(), "{text}");
        }
        assert!(template(50)(&Value::from("x".repeat(51))).is_err());
    }

    #[test]
    fn log_filters() {
        for text in ["info", "INFO", "info,upsolver_auth_proxy=debug", "upsolver_auth_proxy", "hyper::proto=trace", "warn,hyper=off"] {
            assert!(log_filter(&Value::from(text)).is_ok(), "{text}");
        }
        for text in ["", "inof", "info,debgu", "a=b=c", "hyper=loud"] {
            assert!(log_filter(&Value::from(text)).is_err(), "{text}");
        }
        assert!(log_filter(&Value::from("x".repeat(5000))).unwrap_err().len() < 200);
        assert!(log_filter(&Value::from("inof")).unwrap_err().starts_with(r#"inof is no level (did you mean "info"?): must be"#));
    }
}
