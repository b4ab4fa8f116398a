//! Room for open files: each connection of an app takes one, and each request in flight another one upstream.
//!
//! The usual soft limit of 1024 dates from `select(2)`, which cannot watch more; programs that do not use it are meant to raise it to the hard limit.

use rustix::process::{Resource, Rlimit};

use crate::config::Config;

/// Log, listeners, runtimes, file watching, the admin server and its connections.
const BESIDE_CONNECTIONS: u64 = 128;

/// Raises the soft limit of open files to the hard one. Returns what to say where that is still less than the configuration may need: with no
/// descriptor left nothing can be accepted, health probes included.
pub fn make_room(config: &Config) -> Option<String> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // Without the right to do so the old limit stays, which is judged below.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    shortage(needed(config), rustix::process::getrlimit(Resource::Nofile).current)
}

/// The most that the configuration lets be open at a time.
fn needed(config: &Config) -> u64 {
    let count = |number: std::num::NonZeroUsize| number.get() as u64;
    count(config.listen.max_connections) + count(config.limits.max_in_flight) + BESIDE_CONNECTIONS
}

/// `None` as a limit is no limit.
fn shortage(needed: u64, limit: Option<u64>) -> Option<String> {
    let limit = limit.filter(|limit| *limit < needed)?;
    Some(format!(
        "only {limit} files may be open, and listen.max_connections and limits.max_in_flight allow for {needed}; raise the limit \
         (ulimit -n, LimitNOFILE=) or lower these two, else probes go unanswered under full load"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b14_a_shortage_is_told_with_both_numbers() {
        let config =
            Config::from_toml("[credentials]\ntoken_file = \"/t\"\n[listen]\nmax_connections = 10\n[limits]\nmax_in_flight = 5").unwrap();
        let needed = needed(&config);
        assert_eq!(needed, 15 + BESIDE_CONNECTIONS);
        assert_eq!((shortage(needed, None), shortage(needed, Some(needed))), (None, None));
        let told = shortage(needed, Some(64)).unwrap();
        assert!(told.contains("only 64 files") && told.contains("allow for 143"), "{told}");
    }
}
