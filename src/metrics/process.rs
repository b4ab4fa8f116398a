//! The process metrics that Prometheus users expect from any program, under their customary names
//! (Prometheus, "Writing client libraries", section "Process metrics").

use std::time::{Duration, SystemTime};

/// What the operating system says of this process; a part that cannot be told is absent, not zero.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) cpu: Option<Duration>,
    pub(super) resident_memory_bytes: Option<u64>,
    pub(super) open_files: Option<u64>,
    pub(super) max_files: Option<u64>,
    /// Since the epoch.
    pub(super) started: Option<Duration>,
}

impl Snapshot {
    /// A few reads of `/proc/self`, which stays readable to a non-dumpable process. Opens two files: it shows itself in `open_files`.
    pub(super) fn take(started: SystemTime) -> Self {
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Self {
            cpu: Duration::try_from(cpu).ok(),
            resident_memory_bytes: std::fs::read_to_string("/proc/self/status").ok().and_then(|status| resident_bytes(&status)),
            open_files: std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64),
            max_files: rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
            started: started.duration_since(SystemTime::UNIX_EPOCH).ok(),
        }
    }
}

/// `VmRSS` of `/proc/self/status` (`proc_pid_status(5)`), where it is in `KiB` whatever the page size.
fn resident_bytes(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_resident_size() {
        let rows = [
            ("Name:\tx\nVmRSS:\t    5120 kB\nThreads:\t1\n", Some(5 << 20)),
            ("VmRSS:\t5120 MB\n", None),
            ("VmRSS:\t99999999999999999999 kB\n", None),
            ("", None),
        ];
        for (status, expected) in rows {
            assert_eq!(resident_bytes(status), expected, "{status:?}");
        }
    }

    #[test]
    fn knows_this_process() {
        let now = Snapshot::take(SystemTime::now());
        assert!(now.resident_memory_bytes.is_some_and(|bytes| bytes > 100_000), "{now:?}");
        assert!(now.open_files.is_some_and(|files| files >= 3), "{now:?}");
        assert!(now.cpu.is_some() && now.started.is_some());
    }
}
