//! Keeps other processes of the same user out of this one's memory.

use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// Makes the process non-dumpable (no ptrace, no `/proc/PID/mem`, prctl(2) `PR_SET_DUMPABLE`) and forbids core files. To be called before a secret is
/// read. A kernel that refuses either costs that protection, not the service: the reasons are returned for the log.
pub fn process() -> Vec<String> {
    let mut refused = Vec::new();
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        refused.push(format!("the process stays dumpable: {error}"));
    }
    if let Err(error) = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        refused.push(format!("core files stay possible: {error}"));
    }
    refused
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B43: afterwards the kernel says so.
    #[test]
    fn b43_the_process_is_not_dumpable_and_leaves_no_core() {
        assert_eq!(process(), Vec::<String>::new());
        assert_eq!(rustix::process::dumpable_behavior(), Ok(DumpableBehavior::NotDumpable));
        assert_eq!(rustix::process::getrlimit(Resource::Core).current, Some(0));
    }
}
