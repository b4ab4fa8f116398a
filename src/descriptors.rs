//! Room for open files: each connection of an app takes one, and each request in flight another one upstream.
//!
//! The usual soft limit of 1024 dates from `select(2)`, which cannot watch more; programs that do not use it are meant to raise it to the hard limit.
//! Where even that is too low for the configured numbers, these are lowered until they fit, so that apps can never take the last descriptor: the admin
//! server goes on accepting, tokens are minted, files are read, and whoever is over the limit is told so (B14).

use std::num::NonZeroUsize;

use rustix::process::{Resource, Rlimit};

use crate::admin;
use crate::config::Config;
use crate::server;

/// Standard streams, runtime, signals, file watching, the admin listeners: 14 after a start. And what comes and goes: a mint, its name lookups, the
/// token store, credential files, `/proc` for the metrics.
const PROCESS: usize = 32;
/// A worker's runtime and listeners, 6 with one address; the least number of refusals; a connection that is just being judged; and one to the upstream that
/// is just being closed.
const PER_WORKER: usize = 8 + server::MIN_REFUSALS + 1 + UPSTREAM;
/// What a request may hold upstream: while a name is dialled that has addresses of both families, two sockets (RFC 8305).
const UPSTREAM: usize = 2;
/// Connections of the admin server that must fit whatever the limit is: a probe and a scrape.
const MIN_ADMIN: usize = 2;

/// What fits under the limit of open files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Of the admin server, at a time.
    pub admin_connections: usize,
    /// What to say where `listen.max_connections` or `limits.max_in_flight` had to be lowered.
    pub shortage: Option<String>,
}

/// Raises the soft limit of open files to the hard one, and lowers `listen.max_connections` and `limits.max_in_flight` to what fits.
pub fn make_room(config: &mut Config) -> Room {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // Without the right to do so the old limit stays, which is judged below.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    // `None` is no limit.
    let limit = rustix::process::getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
    fit(config, limit.unwrap_or(usize::MAX / 16))
}

fn fit(config: &mut Config, limit: usize) -> Room {
    let spare = limit.saturating_sub(PROCESS + PER_WORKER * config.runtime.workers.get());
    let admin_connections = (spare / 4).clamp(MIN_ADMIN, admin::MAX_CONNECTIONS);
    let spare = spare.saturating_sub(admin_connections);

    // With d connections and r requests at a time: d, an eighth of d for refusals, and UPSTREAM for each request. HTTP/1 carries one request a
    // connection, so r counts up to d; both alike take 8 of 9 + 8 × UPSTREAM parts.
    let (configured, in_flight) = (config.listen.max_connections, config.limits.max_in_flight);
    let requests = in_flight.get().min(configured.get()).min(spare * 8 / (9 + 8 * UPSTREAM)).max(1);
    let connections = configured.get().min(spare.saturating_sub(UPSTREAM * requests) * 8 / 9).max(1);
    if connections == configured.get() {
        return Room { admin_connections, shortage: None };
    }
    let at_most = |number: usize| NonZeroUsize::new(number).expect("at least one");
    config.listen.max_connections = at_most(connections);
    config.limits.max_in_flight = at_most(requests).min(in_flight);
    let shortage = format!(
        "only {limit} files may be open: there is room for {connections} connections and {requests} requests at a time, not for {configured} \
         (listen.max_connections) and {in_flight} (limits.max_in_flight); raise the limit (ulimit -n, LimitNOFILE=) or lower these two"
    );
    Room { admin_connections, shortage: Some(shortage) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(connections: usize, in_flight: usize, workers: usize) -> Config {
        Config::from_toml(&format!(
            "[credentials]\ntoken_file = \"/t\"\n[listen]\nmax_connections = {connections}\n[limits]\nmax_in_flight = {in_flight}\n[runtime]\nworkers = {workers}"
        ))
        .unwrap()
    }

    /// B14: whatever the limit, all that may be open at a time fits, and as much as fits is allowed.
    #[test]
    fn b14_the_limits_fit_under_that_of_open_files() {
        for limit in [64, 100, 128, 256, 1024, 4096, 6800, 20_000, 1 << 20] {
            for (connections, in_flight, workers) in [(4096, 1024, 1), (4096, 1024, 4), (10, 5, 1), (4096, 4096, 2), (1_000_000, 10, 2)] {
                let mut config = config(connections, in_flight, workers);
                let room = fit(&mut config, limit);
                let (d, r) = (config.listen.max_connections.get(), config.limits.max_in_flight.get());
                let row = format!("{limit}: {connections}, {in_flight}, {workers}: {d}, {r}, {room:?}");
                if limit < PROCESS + PER_WORKER * workers {
                    assert_eq!((d, r, room.admin_connections), (1, 1, MIN_ADMIN), "{row}");
                    continue;
                }
                let needed = PROCESS + PER_WORKER * workers + room.admin_connections + d + d / 8 + UPSTREAM * r.min(d);
                assert!(needed <= limit, "{row}: {needed}");
                assert!(room.shortage.is_none() == ((d, r) == (connections, in_flight)), "{row}");
                assert!(room.shortage.is_none() || needed + 64 > limit, "{row}: {needed}");
            }
        }
    }

    #[test]
    fn b14_the_defaults_fit_under_the_usual_limits() {
        let rows = [(64, 1, 1), (1024, 280, 280), (4096, 1688, 1024), (16384, 4096, 1024)];
        for (limit, connections, in_flight) in rows {
            let mut config = config(4096, 1024, 4);
            fit(&mut config, limit);
            assert_eq!((config.listen.max_connections.get(), config.limits.max_in_flight.get()), (connections, in_flight), "{limit}");
        }
    }

    #[test]
    fn b14_a_shortage_is_told_with_all_numbers() {
        let shortage = fit(&mut config(4096, 1024, 1), 128).shortage.unwrap();
        assert!(shortage.contains("only 128 files") && shortage.contains("4096 (listen.max_connections) and 1024"), "{shortage}");
    }
}
