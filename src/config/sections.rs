//! Each section from its settings: what every key must look like, and which keys must go together.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::error::Provenance;
use super::layer::Settings;
use super::load::Need;
use super::memory::{self, What};
use super::policy::{ACTIONS, rule};
use super::reader::Reader;
use super::value::{
    INTERVAL, INTERVAL_OR_ZERO, TIMEOUT, TIMEOUT_OR_ZERO, choice, duration, duration_or_off, flag, limit, log_filter, mode, number,
    optional_path, path, request_path, revoke_path, secret, size, size_or_off, template,
};
use super::{
    AccessLog, Action, Admin, Config, Credentials, CredentialsSource, HttpVersion, Limits, Listen, ListenAddress, ListenTls, Log,
    LogFormat, Policy, Replay, Runtime, Shutdown, Source, Store, Token, Upstream, address, schema,
};
use crate::secret::{Email, Password};

/// More workers than this only cost memory: one serves tens of thousands of requests a second.
const MAX_WORKERS: u32 = 256;
/// What `runtime.workers = 0` takes at most: a sidecar leaves the machine to its app.
const MAX_AUTOMATIC_WORKERS: usize = 4;
/// As `humantime` writes it.
const YEAR: Duration = Duration::from_hours(8766);
/// More than any host has descriptors for.
const MAX_CONNECTIONS: u32 = 1_000_000;

/// Reads everything. What it returns is only meant for use where no problem was noted.
pub(super) fn config(reader: &mut Reader<'_>, need: Need) -> Config {
    for (key, feature) in schema::NOT_BUILT {
        if reader.differs_from_default(key) {
            reader.refuse(key, format!("{feature} is not built yet; remove this key"));
        }
    }
    let listen = listen(reader);
    let admin = admin(reader, &listen);
    Config {
        listen,
        admin,
        credentials: credentials(reader, need),
        token: token(reader),
        upstream: upstream(reader),
        limits: Limits {
            max_in_flight: within_memory(reader, "limits.max_in_flight", What::Requests),
            max_request_body: reader.read("limits.max_request_body", size_or_off(1..=1 << 50)),
        },
        policy: Policy {
            rules: reader.read_list("policy.rules", rule),
            default: reader.read("policy.default", choice(ACTIONS)),
            dry_run: reader.read("policy.dry_run", flag),
            allow_minting: reader.read("policy.allow_minting", flag),
        },
        log: Log {
            level: reader.read("log.level", log_filter),
            format: reader
                .read("log.format", choice(&[("auto", LogFormat::Auto), ("json", LogFormat::Json), ("pretty", LogFormat::Pretty)])),
            access: reader.read("log.access", choice(&[("all", AccessLog::All), ("errors", AccessLog::Errors), ("off", AccessLog::Off)])),
        },
        runtime: Runtime { workers: workers(reader.read("runtime.workers", number(0..=MAX_WORKERS))) },
        shutdown: Shutdown {
            delay: reader.read("shutdown.delay", duration(TIMEOUT_OR_ZERO)),
            drain_timeout: reader.read("shutdown.drain_timeout", duration(TIMEOUT_OR_ZERO)),
        },
    }
}

fn listen(reader: &mut Reader<'_>) -> Listen {
    let listen = Listen {
        addresses: reader.read_list("listen.address", address::listen),
        unix_mode: reader.read("listen.unix_mode", mode),
        allow_non_loopback: reader.read("listen.allow_non_loopback", flag),
        allowed_hosts: reader.read_list("listen.allowed_hosts", address::host),
        caller_token_file: reader.read("listen.caller_token_file", optional_path),
        max_connections: within_memory(reader, "listen.max_connections", What::Connections),
        header_timeout: reader.read("listen.header_timeout", duration(TIMEOUT)),
        idle_timeout: reader.read("listen.idle_timeout", duration(TIMEOUT)),
        // hyper takes no buffer below 8 KiB.
        max_header_size: usize_of(reader.read("listen.max_header_size", size(8 << 10..=1 << 20))),
        tls: listen_tls(reader),
    };
    if listen.addresses.is_empty() && !reader.has_problem_with("listen.address") {
        reader.refuse("listen.address", "at least one address is needed");
    }
    for (index, address) in listen.addresses.iter().enumerate() {
        if listen.addresses[..index].iter().any(|other| other.collides(address)) {
            reader.refuse("listen.address", format!("{address} is already covered by another address of the list"));
        }
    }
    // B33: whoever reaches the listener uses the token, so beyond this machine callers must prove who they are.
    if let Some(open) = listen.addresses.iter().find(|address| !address.is_loopback()) {
        let callers_are_known = listen.caller_token_file.is_some() || listen.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some());
        let proof = "listen.tls.client_ca_file or listen.caller_token_file";
        if !listen.allow_non_loopback {
            reader.refuse(
                "listen.address",
                format!("{open} is reached from other machines, which would use your token; set listen.allow_non_loopback = true and {proof}, or use localhost"),
            );
        } else if !callers_are_known {
            reader.refuse(
                "listen.address",
                format!("{open} is reached from other machines; set {proof}, so that not everyone uses your token"),
            );
        }
    }
    listen
}

/// A certificate and its key belong together; a CA for clients is of no use without them.
fn listen_tls(reader: &mut Reader<'_>) -> Option<ListenTls> {
    let certificate_file = reader.read("listen.tls.certificate_file", optional_path);
    let private_key_file = reader.read("listen.tls.private_key_file", optional_path);
    let client_ca_file = reader.read("listen.tls.client_ca_file", optional_path);
    match (certificate_file, private_key_file) {
        (Some(certificate_file), Some(private_key_file)) => return Some(ListenTls { certificate_file, private_key_file, client_ca_file }),
        (Some(_), None) => reader.refuse("listen.tls.certificate_file", "needs listen.tls.private_key_file beside it"),
        (None, Some(_)) => reader.refuse("listen.tls.private_key_file", "needs listen.tls.certificate_file beside it"),
        (None, None) if client_ca_file.is_some() => {
            reader.refuse("listen.tls.client_ca_file", "needs listen.tls.certificate_file and listen.tls.private_key_file beside it");
        }
        (None, None) => {}
    }
    None
}

fn admin(reader: &mut Reader<'_>, listen: &Listen) -> Admin {
    // From the environment and from flags, text for this key is a list already.
    let is_off = |value: &toml::Value| match value {
        toml::Value::Array(items) => matches!(items.as_slice(), [only] if only.as_str() == Some("off")),
        other => other.as_str() == Some("off"),
    };
    let off = reader.read("admin.address", |value| Ok(is_off(value)));
    let addresses: Vec<ListenAddress> = if off {
        Vec::new()
    } else {
        reader.read_list("admin.address", |value| address::listen(value).map_err(|rule| format!(r#"{rule}, or "off" alone"#)))
    };
    if let Some(taken) = addresses.iter().find(|address| listen.addresses.iter().any(|other| other.collides(address))) {
        reader.refuse("admin.address", format!("{taken} is taken by listen.address; give the admin server another port"));
    }
    Admin { addresses }
}

fn credentials(reader: &mut Reader<'_>, need: Need) -> Credentials {
    let email = credential(reader, ("credentials.email", "credentials.email_file"), Email::new);
    let password = credential(reader, ("credentials.password", "credentials.password_file"), Password::new);
    let token_file = reader.read("credentials.token_file", optional_path);
    let poll_interval = reader.read("credentials.poll_interval", duration(Duration::from_millis(1)..=Duration::from_hours(1)));
    let source = match (email, password, token_file) {
        // Beside a pair a token file is a contradiction, which was noted when the layers were merged.
        (_, _, Some(file)) => CredentialsSource::TokenFile(file),
        (Some(email), Some(password), None) => CredentialsSource::Pair { email, password },
        (email, password, None) => {
            if need == Need::Credentials && !reader.has_problem_with("credentials") {
                missing(reader, email.is_some(), password.is_some());
            }
            CredentialsSource::Unconfigured
        }
    };
    Credentials { source, poll_interval }
}

/// Says what to do about credentials that are not there or not complete.
fn missing(reader: &mut Reader<'_>, email: bool, password: bool) {
    match (email, password) {
        (true, false) => reader.refuse(
            "credentials.password",
            "missing beside the email; set UPSOLVER_PASSWORD or UPSOLVER_PASSWORD_FILE, or credentials.password_file in the configuration file",
        ),
        (false, true) => reader.refuse(
            "credentials.email",
            "missing beside the password; set UPSOLVER_EMAIL or UPSOLVER_EMAIL_FILE, or credentials.email_file in the configuration file",
        ),
        _ => reader.refuse_section(
            "credentials",
            "none configured; set UPSOLVER_EMAIL and UPSOLVER_PASSWORD, or UPSOLVER_EMAIL_FILE and UPSOLVER_PASSWORD_FILE, or UPSOLVER_TOKEN_FILE for a \
             token made in Upsolver's UI, or the same keys under [credentials] in a file given with --config",
        ),
    }
}

/// One credential: as a value or in a file. Both is a contradiction, which was noted when the layers were merged.
fn credential<T>(
    reader: &mut Reader<'_>,
    (value_key, file_key): (&'static str, &'static str),
    new: impl Fn(String) -> Result<T, crate::secret::InvalidSecret>,
) -> Option<Source<T>> {
    let value = reader.read(value_key, secret(new));
    let file = reader.read(file_key, optional_path);
    let origin = || match reader.provenance(value_key) {
        // The line is where people look.
        place @ Provenance::File { .. } => format!("configuration file {place}"),
        place => place.to_string(),
    };
    value.map(|value| Source::Value { value, origin: origin() }).or_else(|| file.map(Source::File))
}

fn token(reader: &mut Reader<'_>) -> Token {
    Token {
        name: reader.read("token.name", template(200)),
        description: reader.read("token.description", template(1000)),
        wait: reader.read("token.wait", duration(TIMEOUT_OR_ZERO)),
        max_age: reader.read("token.max_age", duration_or_off(Duration::from_millis(1)..=YEAR)),
        min_mint_interval: reader.read("token.min_mint_interval", duration(INTERVAL_OR_ZERO)),
        mint_budget: reader.read("token.mint_budget", number(1..=3600)),
        mint_timeout: reader.read("token.mint_timeout", duration(TIMEOUT)),
        probe_path: reader.read("token.probe_path", request_path),
        probe_interval: reader.read("token.probe_interval", duration(INTERVAL)),
        replay: reader.read("token.replay", choice(&[("all", Replay::All), ("safe", Replay::Safe), ("off", Replay::Off)])),
        replay_buffer: usize_of(reader.read("token.replay_buffer", size(0..=16 << 20))),
        revoke_path: reader.read("token.revoke_path", revoke_path),
        store: store(reader),
    }
}

fn store(reader: &mut Reader<'_>) -> Store {
    #[derive(Clone, Copy, PartialEq)]
    enum Type {
        Memory,
        File,
        Kubernetes,
    }
    let path: PathBuf = reader.read("token.store.path", path);
    let types = &[("memory", Type::Memory), ("file", Type::File), ("kubernetes", Type::Kubernetes)];
    match reader.read("token.store.type", choice(types)) {
        Type::Memory => Store::Memory,
        Type::File => Store::File(path),
        Type::Kubernetes => {
            reader.refuse("token.store.type", r#"the Kubernetes token store is not built yet; use "file" on a volume, or "memory""#);
            Store::Memory
        }
    }
}

fn upstream(reader: &mut Reader<'_>) -> Upstream {
    let upstream = Upstream {
        origin: reader.read("upstream.url", address::origin),
        ca_file: reader.read("upstream.ca_file", optional_path),
        connect_timeout: reader.read("upstream.connect_timeout", duration(TIMEOUT)),
        response_timeout: reader.read("upstream.response_timeout", duration(INTERVAL)),
        body_idle_timeout: reader.read("upstream.body_idle_timeout", duration(TIMEOUT)),
        pool_idle_timeout: reader.read("upstream.pool_idle_timeout", duration(TIMEOUT)),
        max_connection_age: reader.read("upstream.max_connection_age", duration(INTERVAL)),
        http_version: reader
            .read("upstream.http_version", choice(&[("1.1", HttpVersion::Http1), ("2", HttpVersion::Http2), ("auto", HttpVersion::Auto)])),
        proxy: reader.read("upstream.proxy", address::egress_proxy),
        resolve: reader.read("upstream.resolve", address::socket),
    };
    // Plain HTTP is for loopback alone, and these two lead elsewhere.
    if !upstream.origin.tls {
        if upstream.resolve.is_some_and(|address| !address.ip().is_loopback()) {
            reader.refuse(
                "upstream.resolve",
                "must be a loopback address while upstream.url is http://: the token would travel in the clear",
            );
        }
        if upstream.proxy.is_some() {
            reader.refuse("upstream.proxy", "must be empty while upstream.url is http://: the token would travel in the clear");
        }
    }
    upstream
}

/// A default gives way to the memory limit; what somebody set is theirs, and is warned about.
fn within_memory(reader: &mut Reader<'_>, name: &'static str, what: What) -> NonZeroUsize {
    let value = reader.read(name, limit(MAX_CONNECTIONS));
    match (reader.provenance(name), memory::limit()) {
        (Provenance::Default, Some(limit)) => value.min(memory::fitting(what, limit)),
        _ => value,
    }
}

/// What the memory limit makes of the limits in number.
fn memory_warnings(config: &Config, settings: &Settings) -> Vec<String> {
    let Some(limit) = memory::limit() else { return Vec::new() };
    let mut warnings = Vec::new();
    for (name, what, value) in [
        ("listen.max_connections", What::Connections, config.listen.max_connections),
        ("limits.max_in_flight", What::Requests, config.limits.max_in_flight),
    ] {
        let setting = settings.get(name);
        let fitting = memory::fitting(what, limit);
        let in_mebibytes = limit >> 20;
        match setting.provenance {
            Provenance::Default if setting.value.as_integer() != i64::try_from(value.get()).ok() => {
                warnings.push(format!(
                    "{name}: lowered to {value}, which fits the memory limit of {in_mebibytes} MiB; set it, or raise the limit"
                ));
            }
            Provenance::Default => {}
            _ if value > fitting => warnings.push(format!(
                "{name}: {value} may need more memory than the limit of {in_mebibytes} MiB, and the process then be killed; {fitting} fit"
            )),
            _ => {}
        }
    }
    warnings
}

/// 0 becomes what the CPU quota allows: `available_parallelism` looks at the affinity mask and at the cgroup's quota, of version 1 and 2.
fn workers(configured: u32) -> NonZeroUsize {
    NonZeroUsize::new(configured as usize).unwrap_or_else(|| {
        let most = NonZeroUsize::new(MAX_AUTOMATIC_WORKERS).expect("not zero");
        std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN).min(most)
    })
}

/// Sizes of buffers are bounded far below what any `usize` holds.
fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the range of the key ends far below")
}

/// What is allowed, and yet worth a word at the start.
pub(super) fn warnings(config: &Config, settings: &Settings) -> Vec<String> {
    let mut warnings = memory_warnings(config, settings);
    for address in config.admin.addresses.iter().filter(|address| !address.is_loopback()) {
        warnings
            .push(format!("admin.address: {address} is reached from other machines; it shows no secret, but names, addresses and metrics"));
    }
    if let CredentialsSource::Pair { email, password } = &config.credentials.source {
        for (name, origin) in [("credentials.email", email.origin()), ("credentials.password", password.origin())] {
            if let Some(origin) = origin {
                warnings.push(format!(
                    "{name}: from the {origin}; it cannot rotate while the proxy runs, and stays readable there; prefer {name}_file"
                ));
            }
        }
    }
    if config.policy.default == Action::Deny && config.policy.rules.is_empty() && !config.policy.dry_run {
        warnings.push(r#"policy.default: "deny" without any rule denies every request"#.to_owned());
    }
    if config.listen.caller_token_file.is_some()
        && config.listen.tls.is_none()
        && config.listen.addresses.iter().any(|address| !address.is_loopback())
    {
        warnings.push("listen.caller_token_file: without listen.tls the caller token crosses the network in the clear".to_owned());
    }
    if let (Store::Memory, Provenance::File { .. } | Provenance::Environment(_) | Provenance::Flag) =
        (&config.token.store, &settings.get("token.store.path").provenance)
    {
        warnings.push(r#"token.store.path: has no effect while token.store.type is "memory""#.to_owned());
    }
    if let (CredentialsSource::TokenFile(_), Store::File(_)) = (&config.credentials.source, &config.token.store) {
        warnings.push("token.store.type: has no effect with credentials.token_file, since nothing is minted".to_owned());
    }
    warnings
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The defaults are valid (else `Reader::read` would panic on a wrong value), and no key of the schema is forgotten.
    #[test]
    fn every_key_is_read_and_every_default_valid() {
        let mut problems = Vec::new();
        let settings = Settings::merge([], &mut problems);
        let mut reader = Reader::new(&settings, &mut problems);
        config(&mut reader, Need::Nothing);
        let seen = std::mem::take(&mut reader.seen);
        assert_eq!(seen, schema::KEYS.iter().map(|key| key.name).collect::<BTreeSet<_>>());
        assert_eq!(problems, []);
    }

    #[test]
    fn workers_follow_the_quota_and_stay_few() {
        assert_eq!(workers(7).get(), 7);
        assert!((1..=MAX_AUTOMATIC_WORKERS).contains(&workers(0).get()));
    }
}
