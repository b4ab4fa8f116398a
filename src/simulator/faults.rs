//! Faults on demand: which requests they strike, how often, and what then happens instead of an honest answer.
//!
//! A test reads as a sentence: `simulator.fault(Fault::at("/api-tokens/", Action::status(503)).times(2))`. Faults are tried in the order in
//! which they were added; every matching delay and hold is waited for, then the first matching fault of another kind decides. A fault that has struck as
//! often as it may lets requests pass.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode};

/// One fault: where it strikes and what it does.
#[derive(Debug, Clone)]
pub struct Fault {
    scope: Scope,
    method: Option<Method>,
    skip: u32,
    times: Option<u32>,
    action: Action,
}

#[derive(Debug, Clone)]
enum Scope {
    Exactly(String),
    Below(String),
    Everywhere,
}

impl Fault {
    /// Strikes requests for exactly this path; the query does not matter.
    pub fn at(path: &str, action: Action) -> Self {
        Self::new(Scope::Exactly(path.to_owned()), action)
    }

    /// Strikes requests whose path begins with `prefix`.
    pub fn below(prefix: &str, action: Action) -> Self {
        Self::new(Scope::Below(prefix.to_owned()), action)
    }

    /// Strikes every request.
    pub fn everywhere(action: Action) -> Self {
        Self::new(Scope::Everywhere, action)
    }

    fn new(scope: Scope, action: Action) -> Self {
        Self { scope, method: None, skip: 0, times: None, action }
    }

    /// Strikes requests with this method only.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        self.method = Some(method);
        self
    }

    /// Lets the first `requests` that match pass.
    #[must_use]
    pub fn after(mut self, requests: u32) -> Self {
        self.skip = requests;
        self
    }

    /// Strikes at most this often; without a limit it strikes until it is removed.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }

    /// Strikes one request.
    #[must_use]
    pub fn once(self) -> Self {
        self.times(1)
    }

    fn matches(&self, method: &Method, path: &str) -> bool {
        let here = match &self.scope {
            Scope::Exactly(exact) => path == exact,
            Scope::Below(prefix) => path.starts_with(prefix.as_str()),
            Scope::Everywhere => true,
        };
        here && self.method.as_ref().is_none_or(|wanted| wanted == method)
    }

    /// Whether this fault strikes a request that it matches, counting it.
    fn strikes(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        match &mut self.times {
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
            None => true,
        }
    }
}

/// What happens instead of an honest answer.
#[derive(Debug, Clone)]
pub enum Action {
    /// Waits before anything else happens to the request, its body unread; then goes on.
    Delay(Duration),
    /// Waits as a delay does, until the fault is removed: for tests that decide themselves when the request goes on.
    Hold,
    /// Reads the request to its end and answers this. The state of the simulated API does not change.
    Reply(Response<Bytes>),
    /// Answers this at once and leaves the request's body unread.
    ReplyEarly(Response<Bytes>),
    /// Never reads the request's body and never answers; the connection stays open until the client leaves.
    Hang,
    /// Ends the connection as soon as the request head is there, the body unread. (With a body on its way, the kernel makes a reset of any end.)
    Break(End),
    /// Reads the request to its end, writes these bytes in place of a reply and ends the connection. HTTP/1.1 only.
    Raw(Vec<u8>, End),
    /// Processes the request (a mint does mint), then cuts the reply after so many bytes of it.
    Cut(Point, End),
}

/// Where a reply is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// After this many bytes as written, head and chunk framing included: inside a head or a chunk's size line. HTTP/1.1 only.
    Reply(usize),
    /// After this many bytes of content, whatever the framing: a chunked reply has all its chunks so far and no last one. With HTTP/2 it is an
    /// upper bound, since the connection ends with the first frames that leave.
    Body(u64),
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// In order: TLS `close_notify`, then FIN.
    Close,
    /// FIN without `close_notify`: what a truncation attack and many a crash look like (RFC 8446 section 6.1).
    Fin,
    /// TCP RST.
    Reset,
    /// Not at all: it stays open and silent until the client leaves.
    Stay,
}

impl Action {
    /// An empty reply with this status and no `x-api-requestid`, as something in front of the API gives it. Panics below 100 and above 999.
    pub fn status(status: u16) -> Self {
        Self::Reply(response(status, Bytes::new()))
    }

    /// A reply of the API itself: JSON, with `x-api-requestid`. Panics below 100 and above 999.
    pub fn json(status: u16, body: &str) -> Self {
        let mut reply = response(status, Bytes::copy_from_slice(body.as_bytes()));
        reply.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        reply.headers_mut().insert("x-api-requestid", http::HeaderValue::from_static("simulated-fault"));
        Self::Reply(reply)
    }

    /// Writes these bytes in place of a reply, then closes in order.
    pub fn garbage(bytes: &[u8]) -> Self {
        Self::Raw(bytes.to_vec(), End::Close)
    }

    /// Closes in order when the request has been read, without a reply and without processing it.
    pub fn close_before_reply() -> Self {
        Self::Raw(Vec::new(), End::Close)
    }

    /// Resets the connection as soon as the request head is there.
    pub fn reset() -> Self {
        Self::Break(End::Reset)
    }

    /// Resets the connection when the request has been read, without processing it.
    pub fn reset_after_body() -> Self {
        Self::Raw(Vec::new(), End::Reset)
    }

    /// Reads the request and never answers.
    pub fn hang_after_body() -> Self {
        Self::Raw(Vec::new(), End::Stay)
    }

    /// Cuts the reply after `bytes` of it as written, with a FIN and no `close_notify`.
    pub fn cut_after(bytes: usize) -> Self {
        Self::Cut(Point::Reply(bytes), End::Fin)
    }

    /// Sends `bytes` of the reply's content and then nothing more, the connection open.
    pub fn stall_body(bytes: u64) -> Self {
        Self::Cut(Point::Body(bytes), End::Stay)
    }

    /// Processes the request (a mint does mint) and closes without a reply: the reply is lost.
    pub fn drop_reply() -> Self {
        Self::Cut(Point::Reply(0), End::Close)
    }
}

fn response(status: u16, body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).expect("the caller gives a status of three digits");
    response
}

/// Names one fault, to ask for its strikes or to remove it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultId(u64);

/// All faults in force.
#[derive(Default)]
pub(super) struct Faults {
    last_id: u64,
    entries: Vec<Entry>,
}

struct Entry {
    id: FaultId,
    fault: Fault,
    strikes: u64,
}

/// What the faults make of one request.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// The sum of all delays that struck.
    pub(super) delay: Duration,
    /// Faults whose removal is to be waited for.
    pub(super) holds: Vec<FaultId>,
    /// What to do in place of an honest answer; never a delay or a hold.
    pub(super) action: Option<Action>,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) -> FaultId {
        self.last_id += 1;
        let id = FaultId(self.last_id);
        self.entries.push(Entry { id, fault, strikes: 0 });
        id
    }

    pub(super) fn remove(&mut self, id: FaultId) {
        self.entries.retain(|entry| entry.id != id);
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(super) fn is_in_force(&self, id: FaultId) -> bool {
        self.entries.iter().any(|entry| entry.id == id)
    }

    /// How many requests the fault struck; 0 for one that was removed.
    pub(super) fn strikes(&self, id: FaultId) -> u64 {
        self.entries.iter().find(|entry| entry.id == id).map_or(0, |entry| entry.strikes)
    }

    /// Decides about one request, counting it at the faults that it reaches.
    pub(super) fn decide(&mut self, method: &Method, path: &str) -> Verdict {
        let mut verdict = Verdict::default();
        for entry in self.entries.iter_mut().filter(|entry| entry.fault.matches(method, path)) {
            if !entry.fault.strikes() {
                continue;
            }
            entry.strikes += 1;
            match &entry.fault.action {
                Action::Delay(delay) => verdict.delay += *delay,
                Action::Hold => verdict.holds.push(entry.id),
                other => {
                    verdict.action = Some(other.clone());
                    break;
                }
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strikes(fault: Fault, requests: &[(Method, &str)]) -> Vec<bool> {
        let mut faults = Faults::default();
        faults.add(fault);
        requests.iter().map(|(method, path)| faults.decide(method, path).action.is_some()).collect()
    }

    #[test]
    fn a_fault_strikes_where_and_as_often_as_it_says() {
        let get = |path| (Method::GET, path);
        let hang = || Action::Hang;
        let rows = [
            (Fault::at("/a", hang()), vec![get("/a"), get("/a/b"), get("/")], vec![true, false, false]),
            (Fault::below("/a", hang()), vec![get("/a"), get("/a/b"), get("/b")], vec![true, true, false]),
            (Fault::everywhere(hang()).method(Method::POST), vec![get("/a"), (Method::POST, "/a")], vec![false, true]),
            (Fault::at("/a", hang()).after(1).times(2), vec![get("/a"); 4], vec![false, true, true, false]),
            (Fault::at("/a", hang()).once(), vec![get("/b"), get("/a"), get("/a")], vec![false, true, false]),
        ];
        for (fault, requests, expected) in rows {
            let name = format!("{fault:?}");
            assert_eq!(strikes(fault, &requests), expected, "{name}");
        }
    }

    #[test]
    fn delays_add_up_and_the_first_other_fault_decides() {
        let mut faults = Faults::default();
        faults.add(Fault::everywhere(Action::Delay(Duration::from_secs(1))));
        let hang = faults.add(Fault::everywhere(Action::Hang).once());
        let reset = faults.add(Fault::everywhere(Action::reset()));

        let first = faults.decide(&Method::GET, "/");
        assert_eq!(first.delay, Duration::from_secs(1));
        assert!(matches!(first.action, Some(Action::Hang)));
        assert!(matches!(faults.decide(&Method::GET, "/").action, Some(Action::Break(End::Reset))));
        assert_eq!((faults.strikes(hang), faults.strikes(reset)), (1, 1));

        faults.remove(reset);
        assert!(faults.decide(&Method::GET, "/").action.is_none());
        faults.clear();
        assert_eq!(faults.decide(&Method::GET, "/").delay, Duration::ZERO);
    }
}
