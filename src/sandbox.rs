//! What the process can still reach once it runs: the files and ports that its configuration names, and no others. A sandbox that it puts itself into,
//! with Landlock (landlock(7)); it needs no privileges, and what it gave up it cannot get back.
//!
//! | may | where |
//! |---|---|
//! | read | the directories of the credential files, of `listen.caller_token_file` and of the configuration file; what name lookups need; `/proc/self` |
//! | write | the directory of the token store |
//! | remove files | the directories of its Unix sockets, which it cleans up |
//! | connect by TCP | the port of the upstream, or of the egress proxy; port 53 |
//!
//! Nothing else: no program is started, no other TCP port is listened at (its own are bound before), no signal is sent, no abstract Unix socket is
//! reached. Certificates and keys are read before, and not reached any more. UDP and Unix sockets with a path are not restricted.
//!
//! Rules are made for directories, since files get replaced, and hold for whatever is below them later, such as what Kubernetes swaps in. A kernel without
//! Landlock, or one that forbids it, costs this protection and not the service.

use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::config::{Config, CredentialsSource, ListenAddress, Source};

/// Turns the sandbox off, for emergencies. No key of the configuration, which whoever can write to it could use to the same end.
const VARIABLE: &str = "UPSOLVER_AUTH_PROXY_SANDBOX";
/// Everything up to this version of Landlock is given up (Linux 6.12). Of later ones, Unix sockets and UDP would break name lookups.
const VERSION: ABI = ABI::V6;
/// The directories are looked at by a thread of its own, for so long: one on a dead network mount must not hold the start up. Ample for a container with a
/// fraction of a processor.
const DEADLINE: Duration = Duration::from_secs(5);

const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
/// Beside reading, what replacing and locking a file takes.
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | MakeReg | RemoveFile | Truncate});
const REMOVE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{RemoveFile});

/// DNS over TCP, for answers that do not fit into a datagram (RFC 7766).
const DNS: u16 = 53;
/// `resolv.conf`, `hosts`, `nsswitch.conf`, `gai.conf` and the like are replaced by renaming, so that a rule has to be for their directory; and the metrics.
const SYSTEM: [&str; 2] = ["/etc", "/proc/self"];
const RESOLVER: &str = "/etc/resolv.conf";
/// Where the programs that manage it keep it, of which another may take over meanwhile.
const RESOLVERS: [&str; 3] = ["/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager"];
/// Where the C library finds its name service modules when the first name is looked up. A static build loads none.
const LIBRARIES: &[&str] =
    if cfg!(target_feature = "crt-static") { &[] } else { &["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/nix/store"] };

/// What a configuration makes necessary.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Files that are read while the proxy runs.
    read: BTreeSet<PathBuf>,
    /// Files that are replaced.
    write: BTreeSet<PathBuf>,
    /// Files that are removed at the end.
    remove: BTreeSet<PathBuf>,
    /// TCP ports.
    connect: BTreeSet<u16>,
}

/// A sandbox that is being made.
#[derive(Debug)]
pub struct Prepared(io::Result<oneshot::Receiver<Result<RulesetCreated, RulesetError>>>);

/// A rule for a directory.
#[derive(Debug, PartialEq, Eq)]
struct Allowed {
    directory: PathBuf,
    access: BitFlags<AccessFs>,
    /// The directory that it stands in for, which is not there yet.
    missing: Option<PathBuf>,
}

/// Whether the environment lets the sandbox be. For people where it says neither.
pub fn is_wanted(environment: &[(String, String)]) -> Result<bool, String> {
    match environment.iter().find(|(name, _)| name == VARIABLE).map(|(_, value)| value.as_str()) {
        None | Some("" | "on") => Ok(true),
        Some("off") => Ok(false),
        Some(_) => Err(format!("environment variable {VARIABLE}: must be \"on\" or \"off\"")),
    }
}

impl Needs {
    /// `file` is the configuration's own, for reloads. Looks at nothing outside the configuration.
    pub fn of(config: &Config, file: Option<&Path>) -> Self {
        let mut needs = Self::default();
        needs.read.extend(file.map(Path::to_owned));
        needs.read.extend(config.listen.caller_token_file.clone());
        match &config.credentials.source {
            CredentialsSource::Pair { email, password } => {
                needs.read.extend(path_of(email).into_iter().chain(path_of(password)));
            }
            CredentialsSource::TokenFile(path) => needs.read.extend([path.clone()]),
            CredentialsSource::Unconfigured => {}
        }
        needs.write.extend(config.store_file().map(Path::to_owned));
        needs.remove.extend(config.listen.addresses.iter().chain(&config.admin.addresses).filter_map(|address| match address {
            ListenAddress::Unix(path) => Some(path.clone()),
            ListenAddress::Localhost(_) | ListenAddress::Socket(_) => None,
        }));
        let upstream = &config.upstream;
        let port = match (&upstream.proxy, upstream.resolve) {
            (Some(proxy), _) => proxy.authority.port_u16().unwrap_or(80),
            (None, Some(address)) => address.port(),
            (None, None) => upstream.origin.port,
        };
        needs.connect.extend([port, DNS]);
        needs
    }

    /// Begins to look at the directories, beside the rest of the start.
    pub fn prepare(self) -> Prepared {
        let (done, built) = oneshot::channel();
        let builder = std::thread::Builder::new().name("sandbox".to_owned());
        // Whoever asked may have given up.
        let started = builder.spawn(move || drop(done.send(self.ruleset())));
        Prepared(started.map(|_| built))
    }

    fn ruleset(&self) -> Result<RulesetCreated, RulesetError> {
        let mut ruleset = nothing_allowed()?;
        for Allowed { directory, access, missing } in self.allowed() {
            if let Some(missing) = missing {
                let (missing, instead) = (missing.display(), directory.display());
                tracing::warn!(%missing, %instead, "a configured directory is not there yet; the sandbox lets all of another one be reached instead");
            }
            // Gone meanwhile, or not ours to see: then there is nothing to allow.
            let Ok(directory) = PathFd::new(directory) else { continue };
            ruleset = ruleset.add_rule(PathBeneath::new(directory, access))?;
        }
        for port in &self.connect {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
        }
        Ok(ruleset)
    }

    fn allowed(&self) -> Vec<Allowed> {
        let system = SYSTEM.iter().chain(&RESOLVERS).chain(LIBRARIES).map(Path::new);
        let mut allowed: Vec<_> = system.filter(|path| path.is_dir()).map(existing(READ)).collect();
        // Often a link into a directory of the program that manages it.
        let resolver = Path::new(RESOLVER).canonicalize().ok();
        allowed.extend(resolver.iter().filter_map(|file| file.parent()).map(existing(READ)));
        for (files, access) in [(&self.read, READ), (&self.write, WRITE), (&self.remove, REMOVE)] {
            allowed.extend(files.iter().flat_map(|file| directories(file, access)).map(|directory| existing(access)(&directory)));
        }
        allowed
    }
}

impl Prepared {
    /// Puts the calling thread into the sandbox, and with it all threads that it starts from now on. Says in the log what came of it.
    pub async fn enter(self) {
        let built = match self.0 {
            Ok(built) => timeout(DEADLINE, built).await,
            Err(error) => return tracing::warn!(%error, "not sandboxed: cannot start a thread"),
        };
        let entered = match built {
            Ok(Ok(built)) => built.and_then(RulesetCreated::restrict_self),
            // The thread panicked.
            Ok(Err(_)) => {
                return tracing::warn!("not sandboxed: looking at the configured directories failed; this is a defect of the proxy");
            }
            Err(_) => {
                return tracing::warn!(waited = ?DEADLINE, "not sandboxed: a configured directory does not answer, on a dead network mount perhaps");
            }
        };
        match entered.map(|status| Outcome::of(&status)) {
            Ok(Outcome { open, .. }) if open.is_empty() => tracing::info!("sandboxed: only configured files and ports can be reached"),
            Ok(Outcome { open, why }) => tracing::info!(open = open.join(", "), why, "the sandbox is not complete"),
            Err(error) => tracing::warn!(%error, "not sandboxed"),
        }
    }
}

fn path_of<T>(source: &Source<T>) -> Option<PathBuf> {
    match source {
        Source::File(path) => Some(path.clone()),
        Source::Value { .. } => None,
    }
}

/// A rule for the directory, or for what there is of the way to it.
fn existing(access: BitFlags<AccessFs>) -> impl Fn(&Path) -> Allowed {
    move |directory| {
        let there = directory.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
        Allowed { directory: there.to_owned(), access, missing: (there != directory).then(|| directory.to_owned()) }
    }
}

/// The directories by which a file is reached, now and after a change: the one it is named in; the one where it is, where that is another one; and the ones
/// in which a link on the way leads to a neighbour, such as Kubernetes' `..data` or a release's `current`, since that is what changes.
fn directories(file: &Path, access: BitFlags<AccessFs>) -> Vec<PathBuf> {
    let named = directory(file, access);
    let mut directories = vec![named.to_owned()];
    for link in named.ancestors() {
        let Ok(target) = link.read_link() else { continue };
        let relative = matches!(target.components().next(), Some(Component::Normal(_)));
        // Never all there is, for a link such as `/lib` to `usr/lib`.
        if let Some(parent) = link.parent().filter(|parent| (relative || target.starts_with(parent)) && !is_root(parent)) {
            directories.push(parent.to_owned());
        }
    }
    if let (Ok(file), Ok(named)) = (file.canonicalize(), named.canonicalize()) {
        let real = directory(&file, access);
        if !real.starts_with(named) {
            directories.push(real.to_owned());
        }
    }
    directories
}

/// What a file is in. One at the root stands for itself where it is only read, as containers mount single files there: all of the root would be everything.
fn directory(file: &Path, access: BitFlags<AccessFs>) -> &Path {
    match file.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) if is_root(parent) && access == READ => file,
        Some(parent) => parent,
        None => file,
    }
}

fn is_root(path: &Path) -> bool {
    path.has_root() && path.parent().is_none()
}

/// Puts the calling thread into a sandbox in which it can open nothing at all. For a thread that has what it needs. What the kernel lacks is told by
/// [`Prepared::enter`].
pub(crate) fn close_thread() {
    // No protection, no service lost.
    let _ = nothing_allowed().and_then(RulesetCreated::restrict_self);
}

/// All that Landlock can forbid, forbidden; where the kernel cannot do all, as much as it can.
fn nothing_allowed() -> Result<RulesetCreated, RulesetError> {
    let mut scopes = Scope::from_all(VERSION);
    // Older service managers listen for notifications on an abstract socket.
    if std::env::var_os("NOTIFY_SOCKET").is_some_and(|socket| socket.as_encoded_bytes().starts_with(b"@")) {
        scopes.remove(Scope::AbstractUnixSocket);
    }
    Ruleset::default().handle_access(AccessFs::from_all(VERSION))?.handle_access(AccessNet::from_all(VERSION))?.scope(scopes)?.create()
}

/// What stayed open, and why.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    open: Vec<&'static str>,
    why: &'static str,
}

impl Outcome {
    fn of(status: &RestrictionStatus) -> Self {
        let (version, why) = match status.landlock {
            LandlockStatus::Available { effective_abi, .. } => (effective_abi, "the kernel is too old"),
            LandlockStatus::NotEnabled => (ABI::Unsupported, "Landlock is off in this kernel"),
            LandlockStatus::NotImplemented => (ABI::Unsupported, "the kernel has no Landlock, or a system call filter forbids it"),
        };
        Self { open: missing_in(version), why }
    }
}

/// What a version of Landlock cannot restrict of what later ones can, up to [`VERSION`].
fn missing_in(version: ABI) -> Vec<&'static str> {
    let since = [
        (ABI::V1, "files"),
        (ABI::V3, "truncating files"),
        (ABI::V4, "TCP ports"),
        (ABI::V5, "device controls"),
        (ABI::V6, "signals and abstract sockets"),
    ];
    since.into_iter().filter(|(since, _)| version < *since).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn needs(toml: &str) -> Needs {
        Needs::of(&Config::from_toml(toml).unwrap(), Some(Path::new("/conf/proxy.toml")))
    }

    fn paths(paths: &[&str]) -> BTreeSet<PathBuf> {
        paths.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn what_is_needed_follows_from_the_configuration() {
        let rows = [
            (
                "[credentials]\nemail = \"a@example.com\"\npassword_file = \"/c/password\"\n\
                 [token.store]\ntype = \"file\"\npath = \"/var/lib/p/token.json\"",
                (&["/c/password", "/conf/proxy.toml"][..], &["/var/lib/p/token.json"][..], &[][..], [DNS, 443]),
            ),
            (
                "[credentials]\ntoken_file = \"/t/token\"\n[upstream]\nurl = \"https://api.example:8443\"",
                (&["/conf/proxy.toml", "/t/token"], &[], &[], [DNS, 8443]),
            ),
            (
                "[credentials]\ntoken_file = \"/t/token\"\n[upstream]\nurl = \"https://api.example:8443\"\nresolve = \"10.0.0.1:444\"",
                (&["/conf/proxy.toml", "/t/token"], &[], &[], [DNS, 444]),
            ),
            (
                "[credentials]\ntoken_file = \"/t/token\"\n[upstream]\nproxy = \"http://proxy.example:3128\"",
                (&["/conf/proxy.toml", "/t/token"], &[], &[], [DNS, 3128]),
            ),
            (
                "[credentials]\ntoken_file = \"/t/token\"\n[listen]\naddress = [\"unix:/run/p/sock\", \"localhost:0\"]\n\
                 caller_token_file = \"/t/caller\"\n[admin]\naddress = \"unix:/run/a/sock\"\n\
                 [token.store]\ntype = \"file\"\npath = \"/var/lib/p/token.json\"",
                // Nothing is minted, so nothing is stored.
                (&["/conf/proxy.toml", "/t/caller", "/t/token"], &[], &["/run/a/sock", "/run/p/sock"], [DNS, 443]),
            ),
        ];
        for (toml, (read, write, remove, connect)) in rows {
            let expected = Needs { read: paths(read), write: paths(write), remove: paths(remove), connect: connect.into() };
            assert_eq!(needs(toml), expected, "{toml}");
        }
    }

    #[test]
    fn a_file_is_reached_by_the_directories_that_can_change() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let at = |path: &str| root.join(path);
        // As Kubernetes mounts a Secret.
        fs::create_dir_all(at("mount/..2030")).unwrap();
        fs::write(at("mount/..2030/email"), "").unwrap();
        symlink("..2030", at("mount/..data")).unwrap();
        symlink("..data/email", at("mount/email")).unwrap();
        // A link of the file to elsewhere, and one of its directory.
        fs::create_dir(at("elsewhere")).unwrap();
        fs::write(at("elsewhere/real"), "").unwrap();
        fs::create_dir(at("plain")).unwrap();
        symlink(at("elsewhere/real"), at("plain/linked")).unwrap();
        symlink(at("elsewhere"), at("absolute")).unwrap();
        // As tools do that deploy releases.
        fs::create_dir_all(at("app/releases/1")).unwrap();
        fs::write(at("app/releases/1/email"), "").unwrap();
        symlink(at("app/releases/1"), at("app/current")).unwrap();
        let rows: [(&str, &[&str]); 7] = [
            ("mount/email", &["mount"]),
            ("mount/..data/email", &["mount/..data", "mount"]),
            ("plain/linked", &["plain", "elsewhere"]),
            ("plain/absent", &["plain"]),
            ("app/current/email", &["app/current", "app"]),
            ("absolute/real", &["absolute", ""]),
            ("absent/email", &["absent"]),
        ];
        for (file, expected) in rows {
            assert_eq!(directories(&at(file), READ), expected.iter().map(|path| at(path)).collect::<Vec<_>>(), "{file}");
        }
        assert_eq!(directories(Path::new("email"), READ), [Path::new(".")]);
        // A file at the root is there alone, unless it is replaced by renaming.
        assert_eq!(directories(Path::new("/proxy.toml"), READ), [Path::new("/proxy.toml")]);
        assert_eq!(directories(Path::new("/token.json"), WRITE), [Path::new("/")]);
    }

    /// Credentials may be waited for, with their directory.
    #[test]
    fn what_is_not_there_yet_is_reached_through_what_is() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("not/there");
        let expected = Allowed { directory: root.path().to_owned(), access: READ, missing: Some(missing.clone()) };
        assert_eq!(existing(READ)(&missing), expected);
        fs::create_dir_all(&missing).unwrap();
        assert_eq!(existing(READ)(&missing), Allowed { directory: missing, access: READ, missing: None });
    }

    #[test]
    fn what_an_older_kernel_leaves_open_is_told() {
        let rows: [(ABI, &[&str]); 5] = [
            (ABI::V10, &[]),
            (ABI::V6, &[]),
            (ABI::V4, &["device controls", "signals and abstract sockets"]),
            (ABI::V2, &["truncating files", "TCP ports", "device controls", "signals and abstract sockets"]),
            (ABI::Unsupported, &["files", "truncating files", "TCP ports", "device controls", "signals and abstract sockets"]),
        ];
        for (version, expected) in rows {
            assert_eq!(missing_in(version), expected, "{version:?}");
        }
    }

    #[test]
    fn the_environment_turns_it_off_and_nothing_else_does() {
        let given = |value: &str| is_wanted(&[("PATH".to_owned(), "off".to_owned()), (VARIABLE.to_owned(), value.to_owned())]);
        assert_eq!((given("on"), given(""), given("off"), is_wanted(&[])), (Ok(true), Ok(true), Ok(false), Ok(true)));
        assert!(given("false").unwrap_err().contains(VARIABLE));
    }

    /// Where this kernel has Landlock: what was not allowed is out of reach, by a thread of the thread too. In a thread of its own, since there is no way back.
    #[test]
    fn a_sandboxed_thread_reaches_what_it_may_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        for (file, content) in [("mine/password", "secret"), ("other/file", "no"), ("store/token.json", "{}")] {
            fs::create_dir_all(root.path().join(file).parent().unwrap()).unwrap();
            fs::write(root.path().join(file), content).unwrap();
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (allowed, forbidden) = (listener.local_addr().unwrap(), other.local_addr().unwrap());
        let at = |path: &str| root.path().join(path);
        let needs = Needs {
            read: [at("mine/password")].into(),
            write: [at("store/token.json")].into(),
            remove: BTreeSet::new(),
            connect: [allowed.port(), DNS].into(),
        };
        let files = [at("mine/password"), at("other/file"), at("store/token.json"), at("store/new"), at("mine/new")];
        let inside = std::thread::spawn(move || {
            let status = needs.ruleset().unwrap().restrict_self().unwrap();
            let version = match status.landlock {
                LandlockStatus::Available { effective_abi, .. } => effective_abi,
                LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => ABI::Unsupported,
            };
            if version < ABI::V4 {
                return None;
            }
            let child = std::thread::spawn(move || {
                let [mine, other, store, store_new, mine_new] = &files;
                (
                    [fs::read(mine).is_ok(), fs::read(other).is_ok(), fs::read(store).is_ok()],
                    [fs::write(store_new, "").is_ok(), fs::rename(store_new, store).is_ok(), fs::write(mine_new, "").is_ok()],
                    [allowed, forbidden].map(|address| std::net::TcpStream::connect(address).is_ok()),
                    std::net::TcpListener::bind("127.0.0.1:0").is_ok(),
                    std::process::Command::new("/bin/true").status().is_ok(),
                )
            });
            Some(child.join().unwrap())
        });
        match inside.join().unwrap() {
            Some(reached) => assert_eq!(reached, ([true, false, true], [true, true, false], [true, false], false, false)),
            #[allow(clippy::print_stderr)] // said aloud, since nothing was tested
            None => eprintln!("SKIPPED: this kernel has no Landlock that restricts TCP"),
        }
    }

    #[test]
    fn a_closed_thread_opens_nothing() {
        let opened = std::thread::spawn(|| {
            let status = nothing_allowed().unwrap().restrict_self().unwrap();
            (status.ruleset == landlock::RulesetStatus::NotEnforced, fs::read("/etc/hostname").is_ok() || fs::read("/etc/passwd").is_ok())
        });
        let (unprotected, opened) = opened.join().unwrap();
        assert!(unprotected || !opened);
    }
}
