//! How much memory this process may use, and how many connections and requests fit: a container is killed at its limit, whereas a limit here sheds.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Program, control plane and admin server: 9 MiB as measured, and some room.
const BASE: u64 = 12 << 20;
/// Of an idle connection, 11 KiB as measured.
const CONNECTION: u64 = 12 << 10;
/// Of a request in flight, with its buffers on both legs and TLS: 200 KiB to 290 KiB as measured where large bodies pass as fast as they can, and half of
/// it where they stall or are small.
const REQUEST: u64 = 256 << 10;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// `listen.max_connections`
    Connections,
    /// `limits.max_in_flight`
    Requests,
}

/// How many fit into a memory limit: connections have a third of it, requests the rest.
pub(super) fn fitting(what: What, limit: u64) -> NonZeroUsize {
    let third = limit.saturating_sub(BASE) / 3;
    let count = match what {
        What::Connections => third / CONNECTION,
        What::Requests => 2 * third / REQUEST,
    };
    usize::try_from(count).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN)
}

/// The memory limit of this process's control group or of one above it, in bytes; `None` without one.
pub(super) fn limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_files(&groups, Path::new("/sys/fs/cgroup")).iter().filter_map(|file| parse(&std::fs::read_to_string(file).ok()?)).min()
}

/// Where limits may stand, by `/proc/self/cgroup` (cgroups(7)): with version 2 in `memory.max`, with version 1 in the hierarchy of the controller
/// `memory`. In a container the path may be the host's, and the files are those at the root.
fn limit_files(groups: &str, root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, name) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            controllers if controllers.split(',').any(|controller| controller == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        files.extend(Path::new(path.trim_start_matches('/')).ancestors().map(|group| root.join(group).join(name)));
    }
    files
}

/// `max` is no limit; nor is what version 1 has for it, the greatest multiple of a page.
fn parse(content: &str) -> Option<u64> {
    content.trim().parse().ok().filter(|limit| *limit < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D38: what a sidecar is given, and what it then holds; much memory leaves the defaults alone.
    #[test]
    fn d38_limits_follow_the_memory() {
        let both = |mebibytes: u64| [What::Connections, What::Requests].map(|what| fitting(what, mebibytes << 20).get());
        assert_eq!([both(32), both(64), both(8)], [[568, 53], [1479, 138], [1, 1]]);
        let [connections, requests] = both(512);
        assert!(connections > 4096 && requests > 1024);
    }

    #[test]
    fn limits_are_looked_for_in_the_own_group_and_above() {
        let root = Path::new("/r");
        let paths = |groups: &str| limit_files(groups, root).iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        assert_eq!(paths("0::/a/b\n"), ["/r/a/b/memory.max", "/r/a/memory.max", "/r/memory.max"]);
        assert_eq!(paths("0::/\n"), ["/r/memory.max"]);
        assert_eq!(
            paths("5:cpu,cpuacct:/x\n4:hugetlb,memory:/x\n0::/\n"),
            ["/r/memory/x/memory.limit_in_bytes", "/r/memory/memory.limit_in_bytes", "/r/memory.max"]
        );
        assert_eq!(paths("nonsense"), Vec::<String>::new());
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!([parse("33554432\n"), parse("max\n"), parse("9223372036854771712\n"), parse("")], [Some(33_554_432), None, None, None]);
    }
}
