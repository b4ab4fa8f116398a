//! Which strike accounts for which error. What none accounts for is a failure of the proxy.
//!
//! | what the app saw | explained by |
//! |---|---|
//! | 403 | the simulated API refused this request's token, and it is an upload too large to be kept for a replay |
//! | a reply cut; `POST`: 502 | the simulated API ended the connection while it had this request |
//! | `GET`: 502 `upstream_protocol` | the same, and this was the first request on its connection: only on a connection that was used before can the close be older than the request, so only there it is repeated (contract section 4.3) |
//! | `POST`: 502 `upstream_protocol` | a connection ended at rest as the request set out: nobody knows whether it was processed (D10). At most one for each such connection |
//! | `GET`: the same | a connection ended before it had any request, its handshake perhaps complete on the proxy's side alone; at most one each |
//! | a reply cut | a connection was reset at rest: the reset destroyed the reply's end on its way; at most one each |
//! | 502 `upstream_unreachable` | nobody listened meanwhile; or a connection ended in its TLS handshake, at most one each |
//! | 504 `upstream_timeout` | nobody listened meanwhile: the listener's end leaves connections that were being made without an answer |
//!
//! An HTTP/2 connection has many requests at a time, and those that the simulated API did not read, or whose replies did not leave, show nowhere. "At
//! rest" then is each connection, once for each app.

use std::collections::{BTreeMap, HashMap, HashSet};

use upsolver_auth_proxy::simulator::{End, Ended};

use crate::client::{Failure, Symptom};
use crate::disturb::{Strike, What};

/// `token.replay_buffer`, by default: an upload up to this long is sent again with the new token.
const REPLAY_BUFFER: u64 = 64 * 1024;

#[derive(Default)]
pub(crate) struct Verdict {
    /// How many, by reason.
    pub(crate) explained: BTreeMap<String, u64>,
    pub(crate) unexplained: Vec<String>,
}

/// `ended` is what the simulated API noted of each order to end connections, `refused` the requests that it refused for their token.
/// `streams` is how many requests a connection can have at a time.
pub(crate) fn explain(failures: &[Failure], strikes: &[Strike], ended: &[Ended], refused: &[String], streams: u64) -> Verdict {
    let refused: HashSet<&str> = refused.iter().map(String::as_str).collect();
    let mut interrupted = HashMap::new();
    for request in ended.iter().flat_map(|ended| &ended.interrupted) {
        if let Some(id) = &request.id {
            // Interrupted twice: the repetition may have been the first on its connection.
            *interrupted.entry(id.as_str()).or_insert(false) |= request.first;
        }
    }
    let ends = strikes.iter().filter(|strike| strike.orders_an_end());
    let mut ends: Vec<_> = ends.zip(ended).map(|(strike, ended)| EndOfConnections::new(*strike, ended, streams)).collect();
    let gone: Vec<_> = strikes.iter().filter(|strike| strike.what == What::Restart).collect();

    // An exchange that spans two strikes may have been hit by either. In the order of their ends, each taking the earliest strike that has something
    // left, none takes what only one before it could have met.
    let mut failures: Vec<_> = failures.iter().collect();
    failures.sort_by_key(|failure| failure.to);
    let mut verdict = Verdict::default();
    for failure in failures {
        let Failure { method, what, .. } = failure;
        let was_first = interrupted.get(failure.id.as_str()).copied();
        let nobody_listened = gone.iter().any(|strike| strike.overlaps(failure));
        let mut one_of = |count: fn(&mut EndOfConnections) -> &mut u64| {
            ends.iter_mut().filter(|end| end.strike.overlaps(failure)).map(count).find(|left| **left > 0).map(|left| *left -= 1).is_some()
        };
        let reason = match what {
            Symptom::Status(403, None) if *method == "POST" && failure.length > REPLAY_BUFFER && refused.contains(failure.id.as_str()) => {
                Some("403, its token revoked and its body too large to be kept")
            }
            Symptom::Cut if was_first.is_some() => Some("cut with the upstream's connection"),
            Symptom::Cut if one_of(|end| &mut end.reset_at_rest) => Some("its reply's end destroyed by a reset"),
            Symptom::Status(502, Some(code)) if code == "upstream_protocol" => match (*method, was_first) {
                ("POST", Some(_)) => Some("502, its connection ended meanwhile"),
                ("GET", Some(true)) => Some("502, its connection ended meanwhile, on which it was the first"),
                ("POST", None) if one_of(|end| &mut end.at_rest) => Some("502, its connection ended as it set out"),
                (_, None) if one_of(|end| &mut end.fresh) || one_of(|end| &mut end.handshakes) => {
                    Some("502, its connection ended as it set out, as the first")
                }
                _ => None,
            },
            Symptom::Status(502, Some(code)) if code == "upstream_unreachable" => {
                if nobody_listened {
                    Some("502, nobody listened")
                } else if one_of(|end| &mut end.handshakes) {
                    Some("502, its connection ended in the handshake")
                } else {
                    None
                }
            }
            Symptom::Status(504, Some(code)) if code == "upstream_timeout" && nobody_listened => Some("504, nobody listened"),
            Symptom::Cut | Symptom::Status(..) => None,
        };
        match reason {
            Some(reason) => *verdict.explained.entry(format!("{method}: {reason}")).or_default() += 1,
            None => verdict.unexplained.push(describe(failure, was_first, strikes)),
        }
    }
    verdict
}

fn describe(failure: &Failure, was_first: Option<bool>, strikes: &[Strike]) -> String {
    let Failure { id, method, length, what, from, to } = failure;
    let last = strikes.iter().rev().find(|strike| strike.from <= *to);
    let since = last.map(|strike| format!("{:?} {:?} before its end", strike.what, *to - strike.from));
    let known = match was_first {
        None => "not interrupted",
        Some(true) => "interrupted as the first",
        Some(false) => "interrupted",
    };
    format!("{id} {method} with {length} bytes: {what:?} after {:?}; {known}; {}", *to - *from, since.unwrap_or_default())
}

impl Strike {
    fn orders_an_end(&self) -> bool {
        matches!(self.what, What::End(_) | What::Restart)
    }

    fn overlaps(&self, failure: &Failure) -> bool {
        failure.from <= self.to && failure.to >= self.from
    }
}

/// A strike on connections, and how many errors those can still explain that had no request upstream.
struct EndOfConnections {
    strike: Strike,
    handshakes: u64,
    fresh: u64,
    at_rest: u64,
    reset_at_rest: u64,
}

impl EndOfConnections {
    fn new(strike: Strike, ended: &Ended, streams: u64) -> Self {
        let Ended { handshakes, connections, fresh, at_rest, .. } = *ended;
        if streams > 1 {
            let many = connections * streams;
            return Self { strike, handshakes, fresh, at_rest: many, reset_at_rest: many };
        }
        let reset = matches!(strike.what, What::End(End::Reset) | What::Restart);
        Self { strike, handshakes, fresh, at_rest, reset_at_rest: if reset { at_rest } else { 0 } }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;
    use upsolver_auth_proxy::simulator::Interrupted;

    use super::*;

    #[test]
    fn each_error_needs_its_own_strike() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let strike = |what, seconds| Strike { what, from: at(seconds), to: at(seconds + 1) };
        let strikes = [strike(What::Revoke, 1), strike(What::End(End::Reset), 3), strike(What::Restart, 5)];
        let interrupted = |id: &str, first| Interrupted { id: Some(id.to_owned()), first };
        let ended = [
            Ended {
                handshakes: 1,
                connections: 4,
                fresh: 1,
                at_rest: 1,
                interrupted: vec![interrupted("a", false), interrupted("b", true)],
            },
            Ended::default(),
        ];
        let refused = ["r".to_owned()];
        let status = |status, code: &str| Symptom::Status(status, (!code.is_empty()).then(|| code.to_owned()));
        let (protocol, unreachable) = (status(502, "upstream_protocol"), status(502, "upstream_unreachable"));
        let rows: Vec<(&str, &str, u64, Symptom, u64, [bool; 2])> = vec![
            // id, method, body, symptom, second; explained once, explained twice
            ("r", "POST", 70_000, status(403, ""), 1, [true, true]),
            ("r", "POST", 60_000, status(403, ""), 1, [false, false]),
            ("r", "GET", 0, status(403, ""), 1, [false, false]),
            ("x", "POST", 70_000, status(403, ""), 1, [false, false]),
            ("a", "GET", 0, Symptom::Cut, 3, [true, true]),
            ("a", "POST", 1, protocol.clone(), 3, [true, true]),
            ("a", "GET", 0, protocol.clone(), 3, [false, false]),
            ("b", "GET", 0, protocol.clone(), 3, [true, true]),
            ("x", "GET", 0, protocol.clone(), 3, [true, true]),
            ("x", "GET", 0, protocol.clone(), 7, [false, false]),
            ("x", "GET", 0, Symptom::Cut, 3, [true, false]),
            ("x", "GET", 0, Symptom::Cut, 7, [false, false]),
            ("x", "GET", 0, unreachable.clone(), 3, [true, false]),
            ("x", "GET", 0, unreachable.clone(), 5, [true, true]),
            ("x", "GET", 0, unreachable, 9, [false, false]),
            ("x", "GET", 0, status(504, "upstream_timeout"), 5, [true, true]),
            ("x", "GET", 0, status(504, "upstream_timeout"), 3, [false, false]),
            ("x", "GET", 0, status(503, "token_unavailable"), 1, [false, false]),
            ("x", "GET", 0, status(500, ""), 5, [false, false]),
        ];
        for (id, method, length, what, second, expected) in rows {
            let failure = Failure { id: id.to_owned(), method, length, what, from: at(second), to: at(second) };
            let name = format!("{failure:?}");
            let once = explain(std::slice::from_ref(&failure), &strikes, &ended, &refused, 1);
            assert_eq!(once.unexplained.is_empty(), expected[0], "{name}");
            let twice = explain(&[failure.clone(), failure], &strikes, &ended, &refused, 1);
            assert_eq!(twice.unexplained.is_empty(), expected[1], "{name}");
        }
        // A POST may have met a connection that was at rest, one that was fresh, or one in its handshake; a GET is repeated where it met the first.
        for (method, explained) in [("POST", 3), ("GET", 2)] {
            let failure = Failure { id: "x".to_owned(), method, length: 1, what: protocol.clone(), from: at(3), to: at(3) };
            let verdict = explain(&vec![failure; 4], &strikes, &ended, &refused, 1);
            assert_eq!(verdict.unexplained.len(), 4 - explained, "{method}");
        }
    }

    #[test]
    fn what_spans_two_strikes_leaves_the_first_to_whom_it_alone_can_have_hit() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let strike = |from, to| Strike { what: What::End(End::Reset), from: at(from), to: at(to) };
        let ended = || Ended { handshakes: 1, ..Ended::default() };
        let failure = |from, to| {
            let what = Symptom::Status(502, Some("upstream_unreachable".to_owned()));
            Failure { id: "x".to_owned(), method: "GET", length: 0, what, from: at(from), to: at(to) }
        };
        // In the order of the apps, not of time.
        let failures = [failure(1999, 2001), failure(1001, 1002)];
        let verdict = explain(&failures, &[strike(1000, 2000), strike(2000, 3000)], &[ended(), ended()], &[], 1);
        assert_eq!(verdict.unexplained, [""; 0]);
    }
}
