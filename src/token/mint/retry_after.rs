//! `Retry-After` (RFC 9110 section 10.2.3): seconds or a date.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::{DATE, RETRY_AFTER};

/// Sooner than this is never asked for in earnest, later than that would leave the proxy down long after the upstream is back.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(15);

/// How long the upstream asks to wait, between 1 s and 15 min; `None` where it asks nothing intelligible. A date is taken relative to the reply's own
/// `date`, where it has one, so that a clock that is wrong on either side does no harm; else relative to `now`. One in the past asks nothing.
pub(crate) fn read(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let asked = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are a long time, too.
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        let until = httpdate::parse_http_date(text).ok()?;
        let replied = headers.get(DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        until.duration_since(replied.unwrap_or(now)).ok()?
    };
    Some(asked.clamp(SHORTEST, LONGEST))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    /// C02: what is asked is honoured within bounds; garbage asks nothing.
    #[test]
    fn c02_seconds_and_dates_are_clamped_and_garbage_ignored() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let rows: [(&str, Option<&str>, Option<Duration>); 16] = [
            ("7", None, seconds(7)),
            (" 7 ", None, seconds(7)),
            ("0", None, seconds(1)),
            ("901", None, seconds(900)),
            ("99999999999999999999999999", None, seconds(900)),
            ("", None, None),
            ("-1", None, None),
            ("+1", None, None),
            ("1.5", None, None),
            ("soon", None, None),
            ("\u{e9}", None, None),
            ("Thu, 01 Jan 1970 00:01:40 GMT", None, seconds(40)),
            ("Thu, 01 Jan 1970 00:00:30 GMT", None, None),
            ("Fri, 01 Jan 2100 00:00:00 GMT", None, seconds(900)),
            ("Fri, 01 Jan 2100 00:00:20 GMT", Some("Fri, 01 Jan 2100 00:00:00 GMT"), seconds(20)),
            ("Thu, 01 Jan 1970 00:01:40 GMT", Some("yesterday"), seconds(40)),
        ];
        let now = SystemTime::UNIX_EPOCH + Duration::from_mins(1);
        for (text, date, expected) in rows {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_bytes(text.as_bytes()).unwrap());
            if let Some(date) = date {
                headers.insert(DATE, HeaderValue::from_static(date));
            }
            assert_eq!(read(&headers, now), expected, "{text:?} with date {date:?}");
        }
        assert_eq!(read(&HeaderMap::new(), now), None);
    }
}
