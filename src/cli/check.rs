//! `check`: what is wrong with the configuration and with the files that it names. Starts nothing, mints nothing.
//!
//! A problem would keep the proxy from its work, and exits 2; a warning is about what works today and surprises later, and exits 0. At run time the
//! proxy is more patient: it waits for credential files that are not there yet.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::Access;

use super::{complain, print, usage};
use crate::app::{self, EXIT_USAGE};
use crate::config::{Config, CredentialsSource, ListenAddress, Source, Sources};
use crate::credentials::read_secret;
use crate::secret::{Email, InvalidSecret, Password, Token};
use crate::token::store::{Store, StoreError};
use crate::upstream::tls;

/// Runs the command. With `connect` it also reaches for the upstream; that failing is no fault of the configuration, and exits 1.
pub(super) fn check(sources: &Sources, connect: bool) -> ExitCode {
    let loaded = match Config::load(sources) {
        Ok(loaded) => loaded,
        Err(problems) => return usage(&problems),
    };
    let mut findings = Findings::default();
    findings.inspect(&loaded.config, &mount_points());
    let located = |found: &[String]| found.iter().map(|text| loaded.effective.locate(text)).collect::<Vec<_>>();
    for warning in loaded.warnings.iter().chain(&located(&findings.warnings)) {
        complain(format_args!("warning: {warning}"));
    }
    for problem in located(&findings.problems) {
        complain(format_args!("error: {problem}"));
    }
    if !findings.problems.is_empty() {
        return ExitCode::from(EXIT_USAGE);
    }
    print("configuration is valid");
    if connect {
        match app::check_connect(&loaded.config) {
            Ok(success) => print(success),
            Err(reason) => {
                complain(format_args!("error: {reason}"));
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Each begins with the key and names the file. None quotes a secret.
#[derive(Debug, Default)]
struct Findings {
    problems: Vec<String>,
    warnings: Vec<String>,
}

impl Findings {
    /// Looks at every file that the configuration names.
    fn inspect(&mut self, config: &Config, mount_points: &HashSet<PathBuf>) {
        match &config.credentials.source {
            CredentialsSource::Pair { email, password } => {
                self.credential("credentials.email_file", email, Email::new, mount_points);
                self.credential("credentials.password_file", password, Password::new, mount_points);
            }
            CredentialsSource::TokenFile(path) => {
                self.secret_file("credentials.token_file", path, Token::new);
                self.rotation("credentials.token_file", path, mount_points);
            }
            CredentialsSource::Unconfigured => {}
        }
        if let Some(path) = &config.listen.caller_token_file {
            self.secret_file("listen.caller_token_file", path, Token::new);
        }
        if let Some(path) = &config.upstream.ca_file
            && let Err(reason) = tls::read_certificates(path)
        {
            self.problems.push(format!("upstream.ca_file: {reason}"));
        }
        if let Some(files) = &config.listen.tls {
            self.problems.extend(app::server_tls(files).err().into_iter().flatten());
            self.mode("listen.tls.private_key_file", &files.private_key_file);
        }
        if let Some(path) = config.store_file() {
            self.store(path, &Store::new(&config.token.store, &config.upstream.origin));
        }
        for (key, addresses) in [("listen.address", &config.listen.addresses), ("admin.address", &config.admin.addresses)] {
            for address in addresses {
                if let ListenAddress::Unix(path) = address {
                    self.parent_directory(key, path, "the socket could not be made");
                }
            }
        }
    }

    fn credential<T>(&mut self, key: &str, source: &Source<T>, make: Make<T>, mount_points: &HashSet<PathBuf>) {
        // A value was judged when the configuration was loaded.
        if let Source::File(path) = source {
            self.secret_file(key, path, make);
            self.rotation(key, path, mount_points);
        }
    }

    /// Whether a file holds a secret is judged by the very code that reads it at run time; anybody else being able to read it is worth a warning.
    fn secret_file<T>(&mut self, key: &str, path: &Path, make: Make<T>) {
        match read_secret(path, make) {
            Ok(_) => self.mode(key, path),
            Err(reason) => self.problems.push(format!("{key}: {reason}")),
        }
    }

    fn mode(&mut self, key: &str, path: &Path) {
        // In a Kubernetes volume the modes are the pod's business: its containers alone see the files.
        if kubernetes_volume(path) {
            return;
        }
        let others = std::fs::metadata(path).map_or(0, |file| file.mode() & 0o077);
        if others != 0 {
            self.warnings.push(format!("{key}: {}: other users may read it; chmod go= it", path.display()));
        }
    }

    /// A file that is a mount of its own, as a Kubernetes `subPath` or a file mounted into a container, shows for ever what it was when mounted:
    /// rotation replaces the file, and the mount keeps the old one (C38).
    fn rotation(&mut self, key: &str, path: &Path, mount_points: &HashSet<PathBuf>) {
        if std::fs::canonicalize(path).is_ok_and(|path| mount_points.contains(&path)) {
            let path = path.display();
            self.warnings
                .push(format!("{key}: {path}: a mount of its own (subPath?), which can never rotate; mount the directory instead"));
        }
    }

    /// What the store holds is judged by the very code that reads it at run time.
    fn store(&mut self, path: &Path, store: &Store) {
        const KEY: &str = "token.store.path";
        const CONSEQUENCE: &str = "no token would outlive this process, and each start would mint";
        match store.inspect() {
            Ok(()) => self.parent_directory(KEY, path, CONSEQUENCE),
            Err(refused @ StoreError::Refused { .. }) => {
                self.warnings.push(format!("{KEY}: {}: {}", refused.reason(), StoreError::REPLACED));
                self.parent_directory(KEY, path, CONSEQUENCE);
            }
            Err(unusable) => self.problems.push(format!("{KEY}: {}: {CONSEQUENCE}", unusable.reason())),
        }
    }

    fn parent_directory(&mut self, key: &str, path: &Path, consequence: &str) {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Err(error) = rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK) {
            let error = std::io::Error::from(error);
            self.problems.push(format!("{key}: {}: the directory cannot be written, {error}: {consequence}", directory.display()));
        }
    }
}

/// Makes a secret out of text, or says why not.
type Make<T> = fn(String) -> Result<T, InvalidSecret>;

/// Kubelet puts the files of a Secret behind a `..data` link, which it swaps.
fn kubernetes_volume(path: &Path) -> bool {
    path.parent().is_some_and(|directory| directory.join("..data").is_symlink())
}

/// Where anything is mounted in this process's view; empty where that cannot be told.
fn mount_points() -> HashSet<PathBuf> {
    std::fs::read("/proc/self/mountinfo").map_or_else(|_| HashSet::new(), |text| parse_mount_points(&text))
}

/// The fifth field of each line (proc(5)), in which white space and backslashes are octal escapes.
fn parse_mount_points(mountinfo: &[u8]) -> HashSet<PathBuf> {
    let field = |line: &[u8]| line.split(|byte| *byte == b' ').nth(4).map(unescape);
    mountinfo.split(|byte| *byte == b'\n').filter_map(field).collect()
}

fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(escaped) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            path.push(escaped);
            rest = &tail[3..];
        } else {
            path.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// A directory with the files that the tests need, and what `check` finds in a configuration that names some of them by `{dir}`.
    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            for (name, content, mode) in [
                ("email", "me@example.com\n", 0o600),
                ("password", "canary", 0o600),
                ("open", "canary", 0o644),
                ("empty", "", 0o600),
                ("bad", "ca\0nary", 0o600),
            ] {
                std::fs::write(files.path(name), content).unwrap();
                std::fs::set_permissions(files.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
            }
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().canonicalize().unwrap().join(name)
        }

        fn findings(&self, toml: &str) -> Findings {
            let toml = toml.replace("{dir}", self.0.path().to_str().unwrap());
            let mut findings = Findings::default();
            findings.inspect(&Config::from_toml(&toml).unwrap(), &HashSet::from([self.path("open")]));
            findings
        }
    }

    const GOOD: &str = "[credentials]\nemail_file = '{dir}/email'\npassword_file = '{dir}/password'\n";

    #[test]
    fn finds_what_is_wrong_with_credential_files() {
        let files = Files::new();
        let rows = [
            ("password", None),
            ("nothing", Some("credentials.password_file: {dir}/nothing: No such file or directory (os error 2)")),
            ("empty", Some("credentials.password_file: {dir}/empty: it is empty")),
            (".", Some("credentials.password_file: {dir}/.: it is not a regular file")),
        ];
        for (name, expected) in rows {
            let findings = files.findings(&GOOD.replace("/password'", &format!("/{name}'")));
            let expected: Vec<_> = expected.into_iter().map(|text| text.replace("{dir}", files.0.path().to_str().unwrap())).collect();
            assert_eq!(findings.problems, expected, "{name}");
            assert!(findings.warnings.is_empty(), "{findings:?}");
        }
        let findings = files.findings(&GOOD.replace("/password'", "/bad'"));
        assert!(findings.problems.len() == 1 && findings.problems[0].contains("bad"), "{findings:?}");
        assert!(!format!("{findings:?}").contains("ca\0nary"));
    }

    /// C38: a file that is a mount point of its own; and modes, which a Kubernetes volume is excused from.
    #[test]
    fn c38_warns_of_mounts_that_never_rotate() {
        let files = Files::new();
        let open = GOOD.replace("/password'", "/open'");
        let findings = files.findings(&open);
        assert!(findings.problems.is_empty(), "{findings:?}");
        let [mode, mount] = findings.warnings.as_slice() else { panic!("{findings:?}") };
        assert!(mode.contains("other users may read it") && mount.contains("can never rotate"), "{findings:?}");

        symlink(files.path("."), files.path("..data")).unwrap();
        assert_eq!(files.findings(&open).warnings.len(), 1);
    }

    #[test]
    fn finds_directories_and_certificates_that_cannot_be_used() {
        let files = Files::new();
        let rows = [
            (
                "[token.store]\ntype = 'file'\npath = '{dir}/none/token.json'",
                "token.store.path: {dir}/none: the directory cannot be written",
            ),
            ("[listen]\naddress = 'unix:{dir}/none/x'", "listen.address: {dir}/none: the directory cannot be written"),
            ("[upstream]\nca_file = '{dir}/email'", "upstream.ca_file: {dir}/email: holds no certificate"),
            ("[upstream]\nca_file = '{dir}/none'", "upstream.ca_file: {dir}/none: cannot be read"),
            ("[listen]\ncaller_token_file = '{dir}/empty'", "listen.caller_token_file: {dir}/empty: it is empty"),
        ];
        for (toml, expected) in rows {
            let findings = files.findings(&format!("{GOOD}{toml}"));
            let expected = expected.replace("{dir}", files.0.path().to_str().unwrap());
            assert!(findings.problems.len() == 1 && findings.problems[0].starts_with(&expected), "{toml}: {findings:?}");
        }
        // Both in one run.
        let tls = files.findings(&format!("{GOOD}[listen.tls]\ncertificate_file = '{{dir}}/none'\nprivate_key_file = '{{dir}}/email'"));
        let [certificate, key] = tls.problems.as_slice() else { panic!("{tls:?}") };
        assert!(certificate.starts_with("listen.tls.certificate_file: ") && certificate.contains("/none: cannot be read"), "{certificate}");
        assert!(key.starts_with("listen.tls.private_key_file: ") && key.contains("/email: no usable PEM key"), "{key}");
        let fine = files.findings(&format!("{GOOD}[token.store]\ntype = 'file'\npath = '{{dir}}/token.json'"));
        assert!(fine.problems.is_empty(), "{fine:?}");
    }

    #[test]
    fn mount_points_are_unescaped() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n37 35 98:0 / /with\\040space\\134 rw - tmpfs t rw\n";
        assert_eq!(parse_mount_points(text), HashSet::from([PathBuf::from("/mnt2"), PathBuf::from("/with space\\")]));
        assert_eq!(parse_mount_points(b"\\x \\"), HashSet::new());
        assert_eq!(unescape(b"a\\9999\\1"), PathBuf::from("a\\9999\\1"));
    }
}
