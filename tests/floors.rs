//! Releases that the proxy must not be built without: each floor is the first release without a fault that concerns it. Asserted over `Cargo.lock`, since
//! a requirement in `Cargo.toml` says nothing about what is locked, or about crates that come along.

/// Crate, first acceptable release, and what was wrong before. A crate that is not in the lock file at all is fine.
const FLOORS: [(&str, &str, &str); 11] = [
    (
        "hyper",
        "1.12.0",
        "stale Content-Length beside chunked (hyper #4123), `close` undone by a later keep-alive, CPU spin on half-close (#4085)",
    ),
    ("h2", "0.4.20", "duplicate differing content-length; RUSTSEC-2026-0258, unbounded empty DATA frames"),
    ("rustls", "0.23.18", "RUSTSEC-2024-0399, a panic in the acceptor"),
    ("rustls-webpki", "0.103.13", "RUSTSEC-2026-0098 and -0099, name constraints"),
    ("bytes", "1.11.1", "an overflow in BytesMut::reserve"),
    ("tracing-subscriber", "0.3.20", "RUSTSEC-2025-0055, escape sequences in logs"),
    ("tokio", "1.44.2", "RUSTSEC-2025-0023, unsound broadcast channel"),
    ("ring", "0.17.12", "RUSTSEC-2025-0009, a panic on overflow"),
    ("slab", "0.4.11", "RUSTSEC-2025-0047, out-of-bounds access"),
    ("idna", "1.0.0", "RUSTSEC-2024-0421, Punycode labels that mean another name"),
    ("aws-lc-sys", "0.39.0", "several advisories; ring is what is used"),
];

/// Crates that must not come in, and why.
const BANNED: [(&str, &str); 6] = [
    ("hickory-proto", "RUSTSEC-2026-0118, an endless loop; names are resolved by the system"),
    ("openssl", "TLS is rustls"),
    ("openssl-sys", "TLS is rustls"),
    ("native-tls", "TLS is rustls"),
    ("webpki", "unmaintained; its successor is rustls-webpki"),
    ("serde_yaml", "unmaintained"),
];

/// Name and version of every locked package.
fn locked() -> Vec<(String, Vec<u64>)> {
    let lock: toml::Table = include_str!("../Cargo.lock").parse().expect("Cargo.lock is TOML");
    let packages = lock["package"].as_array().expect("a list of packages");
    let text = |package: &toml::Value, key: &str| package[key].as_str().expect("a text").to_owned();
    packages.iter().map(|package| (text(package, "name"), numbers(&text(package, "version")))).collect()
}

/// A pre-release would compare as its release, so that none is accepted.
fn numbers(version: &str) -> Vec<u64> {
    let core = version.split('+').next().expect("split gives at least one part");
    assert!(!core.contains('-'), "{version} is a pre-release");
    core.split('.').map(|part| part.parse().expect("a number")).collect()
}

#[test]
fn e15_locked_crates_are_at_or_above_their_floors() {
    let locked = locked();
    for needed in ["hyper", "h2", "rustls", "rustls-webpki", "bytes", "tokio", "ring", "tracing-subscriber"] {
        assert!(locked.iter().any(|(name, _)| name == needed), "{needed} is not in Cargo.lock: is its floor still worth a line?");
    }
    let mut fallen = Vec::new();
    for (name, floor, why) in FLOORS {
        let below = locked.iter().filter(|(locked, version)| locked == name && *version < numbers(floor));
        fallen.extend(below.map(|(_, version)| format!("{name} {version:?} is below {floor}: {why}")));
    }
    assert!(fallen.is_empty(), "{}", fallen.join("\n"));
}

#[test]
fn e15_no_banned_crate_is_locked() {
    let locked = locked();
    let present: Vec<_> = BANNED.iter().filter(|(banned, _)| locked.iter().any(|(name, _)| name == banned)).collect();
    assert!(present.is_empty(), "{present:?}");
}

/// Versions compare by number, not as text: 1.9 is below 1.12.
#[test]
fn versions_compare_by_number() {
    assert!(numbers("1.9.0") < numbers("1.12.0"));
    assert!(numbers("0.103.13") > numbers("0.103.9"));
    assert!(numbers("1.12.0+build") == numbers("1.12.0"));
}
