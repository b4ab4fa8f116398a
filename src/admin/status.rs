//! `GET /status`: all that an operator may ask about the running proxy, on one page (contract §6). The types have room for nothing secret.

use std::time::SystemTime;

use serde::Serialize;

use super::Handles;
use crate::readiness::{Phase, Readiness};

/// The page. Times are RFC 3339 in UTC; what is not known or not there is `null`.
#[derive(Debug, Serialize)]
pub(super) struct Page {
    version: &'static str,
    uptime_seconds: u64,
    ready: bool,
    /// Why it is not ready, or what to look at although it is.
    reasons: Vec<String>,
    upstream: String,
    workers: usize,
    requests_in_flight: u64,
    token: Token,
    last_mint: Option<LastMint>,
    next_attempt: Option<String>,
    mints_left: u32,
    credentials: Credentials,
}

#[derive(Debug, Serialize)]
struct Token {
    state: &'static str,
    id: Option<String>,
    name: Option<String>,
    generation: u64,
    source: &'static str,
    created: Option<String>,
    age_seconds: Option<u64>,
}

#[derive(Debug, Serialize)]
struct LastMint {
    result: &'static str,
    at: String,
}

#[derive(Debug, Serialize)]
struct Credentials {
    source: String,
    loaded_at: Option<String>,
    pending_rejected: bool,
}

impl Page {
    /// The state of things at `now`.
    pub(super) fn new(handles: &Handles, now: SystemTime) -> Self {
        let status = handles.readiness.token();
        let Readiness { phase, reasons } = Readiness::of(&status, handles.readiness.draining());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: seconds_between(handles.started, now),
            ready: phase == Phase::Ready,
            reasons,
            upstream: handles.upstream.clone(),
            workers: handles.workers.len(),
            requests_in_flight: handles.metrics.requests_in_flight(),
            token: Token {
                state: status.state,
                id: status.id.clone(),
                name: status.name.clone(),
                generation: status.generation,
                source: status.source,
                created: status.created.map(time),
                age_seconds: status.created.map(|created| seconds_between(created, now)),
            },
            last_mint: status.last_mint.map(|(result, at)| LastMint { result, at: time(at) }),
            next_attempt: status.next_attempt.map(time),
            mints_left: status.mints_left,
            credentials: Credentials {
                source: status.credentials_source.clone(),
                loaded_at: status.credentials_loaded_at.map(time),
                pending_rejected: status.pending_rejected,
            },
        }
    }
}

/// `2026-10-06T07:08:09Z`. A time that this notation can't express, which only a broken clock or a forged token store brings about, is named so;
/// its `Display` would fail.
fn time(time: SystemTime) -> String {
    const YEAR_10000: u64 = 253_402_300_800;
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since_epoch) if since_epoch.as_secs() < YEAR_10000 => humantime::format_rfc3339_seconds(time).to_string(),
        _ => "out of range".to_owned(),
    }
}

/// Whole seconds; 0 where the clock went back in between.
fn seconds_between(earlier: SystemTime, later: SystemTime) -> u64 {
    later.duration_since(earlier).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::admin::tests::Proxy;
    use crate::readiness::tests::status;
    use crate::token::Status;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// Contract §6: exactly these fields.
    #[tokio::test]
    async fn has_exactly_the_fields_of_the_contract() {
        let proxy = Proxy::new();
        let now = proxy.handles.started + Duration::from_secs(5);
        let page = serde_json::to_value(Page::new(&proxy.handles, now)).unwrap();
        let expected = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"), "uptime_seconds": 5, "ready": false, "reasons": ["no usable token (token state: minting)"],
            "upstream": "https://api.upsolver.com", "workers": 1, "requests_in_flight": 0,
            "token": {"state": "minting", "id": null, "name": null, "generation": 0, "source": "none", "created": null, "age_seconds": null},
            "last_mint": null, "next_attempt": null, "mints_left": 6,
            "credentials": {
                "source": "environment variables UPSOLVER_EMAIL and UPSOLVER_PASSWORD", "loaded_at": null, "pending_rejected": false,
            },
        });
        assert_eq!(page, expected);

        proxy.token.send_replace(std::sync::Arc::new(Status {
            state: "usable",
            started: true,
            usable: true,
            reasons: vec!["the new credentials were rejected".to_owned()],
            id: Some("id-1".to_owned()),
            name: Some("upsolver-auth-proxy".to_owned()),
            generation: 3,
            source: "minted",
            created: Some(at(1_000_000_000)),
            last_mint: Some(("rejected", at(1_000_000_060))),
            next_attempt: Some(at(1_000_003_600)),
            mints_left: 4,
            credentials_loaded_at: Some(at(1_000_000_050)),
            pending_rejected: true,
            ..status()
        }));
        let page = serde_json::to_value(Page::new(&proxy.handles, at(1_000_000_100))).unwrap();
        assert_eq!((&page["ready"], &page["reasons"][0]), (&true.into(), &"the new credentials were rejected".into()));
        let token = serde_json::json!({
            "state": "usable", "id": "id-1", "name": "upsolver-auth-proxy", "generation": 3, "source": "minted",
            "created": "2001-09-09T01:46:40Z", "age_seconds": 100,
        });
        assert_eq!(page["token"], token);
        assert_eq!(page["last_mint"], serde_json::json!({"result": "rejected", "at": "2001-09-09T01:47:40Z"}));
        assert_eq!(page["next_attempt"], "2001-09-09T02:46:40Z");
        assert_eq!(page["credentials"]["loaded_at"], "2001-09-09T01:47:30Z");
    }

    #[test]
    fn a_broken_clock_breaks_nothing() {
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!((time(before), time(at(1 << 40))), ("out of range".to_owned(), "out of range".to_owned()));
        assert_eq!((time(at(253_402_300_799)), seconds_between(at(9), at(7))), ("9999-12-31T23:59:59Z".to_owned(), 0));
    }
}
