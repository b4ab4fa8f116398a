//! What the documents promise is what the program does: every example configuration loads, and the tables of `README.md` list exactly the settings,
//! metrics and error codes that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use upsolver_auth_proxy::config::{Config, Need, Sources};
use upsolver_auth_proxy::metrics::{ERROR_CODES, Metrics, TokenMetrics, WorkerMetrics};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The lines of `README.md` under the heading `title`.
fn section(title: &str) -> String {
    let readme = read("README.md");
    let heading = format!("\n## {title}\n");
    let (_, rest) = readme.split_once(&heading).unwrap_or_else(|| panic!("no section {title}"));
    rest.split("\n## ").next().unwrap_or_default().to_owned()
}

/// B34: what widens trust to other Pods, processes or people is said.
#[test]
fn b34_shared_namespaces_are_documented() {
    let security = read("SECURITY.md");
    for widening in ["`hostNetwork: true`", "`shareProcessNamespace: true`", "`kubectl port-forward`"] {
        assert!(security.contains(widening), "{widening}");
    }
}

/// The rows of the Markdown tables in `text`, cell by cell, without their heads.
fn rows(text: &str) -> Vec<Vec<String>> {
    // A `|` within a cell is written `\|`.
    let cells =
        |line: &str| line.replace(r"\|", "¦").trim_matches('|').split('|').map(|cell| cell.trim().replace('¦', "|")).collect::<Vec<_>>();
    let mut rows = Vec::new();
    let mut in_body = false;
    for line in text.lines() {
        match (line.starts_with('|'), line.starts_with("|--")) {
            (false, _) => in_body = false,
            (true, true) => in_body = true,
            (true, false) if in_body => rows.push(cells(line)),
            (true, false) => {}
        }
    }
    rows
}

/// What stands between backticks in `cell`.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every TOML block of the README is a whole configuration that somebody may copy.
#[test]
fn the_readmes_configurations_load() {
    let readme = read("README.md");
    let blocks: Vec<_> = readme.split("\n```toml\n").skip(1).map(|rest| rest.split("\n```\n").next().unwrap_or_default()).collect();
    assert!(blocks.len() >= 5, "found {}", blocks.len());
    for block in blocks {
        if let Err(problems) = Config::from_toml(block) {
            panic!("{block}\n\n{problems}");
        }
    }
}

#[test]
fn the_deployments_configurations_load() {
    let found: Vec<PathBuf> = fs::read_dir(root().join("deploy"))
        .expect("the folder is there")
        .map(|entry| entry.expect("and can be read").path().join("config.toml"))
        .filter(|path| path.exists())
        .collect();
    assert_eq!(found.len(), 2, "Kubernetes and systemd: {found:?}");
    for path in found {
        if let Err(problems) = Config::from_toml(&read(&path)) {
            panic!("{}: {problems}", path.display());
        }
    }
}

/// The Job is configured by its environment alone.
#[test]
fn the_jobs_environment_is_a_configuration() {
    let manifest = read("deploy/kubernetes/job.yaml");
    let mut lines = manifest.lines().map(str::trim);
    let mut environment = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("- name: ").filter(|name| name.starts_with("UPSOLVER_")) {
            let value = lines.next().and_then(|line| line.strip_prefix("value: ")).expect("a plain value");
            environment.push((name.to_owned(), value.trim_matches('"').to_owned()));
        }
    }
    assert_eq!(environment.len(), 2, "{environment:?}");
    if let Err(problems) = Config::load(&Sources { environment, ..Sources::default() }) {
        panic!("{problems}");
    }
}

/// The settings' table names every key with its default, and no other.
#[test]
fn the_readme_lists_every_setting() {
    let loaded = Config::load(&Sources { need: Need::Nothing, ..Sources::default() }).expect("the defaults are valid");
    let mut settings = BTreeMap::new();
    let mut section_name = String::new();
    for line in loaded.effective.to_string().lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            name.clone_into(&mut section_name);
        } else if let Some((key, value)) = line.split_once(" = ") {
            let value = value.split("  # ").next().unwrap_or_default();
            settings.insert(format!("{section_name}.{key}"), value.to_owned());
        }
    }
    assert!(settings.len() > 50, "{settings:?}");

    let documented: BTreeMap<_, _> =
        rows(&section("Settings")).iter().map(|row| (quoted(&row[0]).join(""), quoted(&row[1]).join(""))).collect();
    assert_eq!(documented, settings);
}

/// The metrics' table names every metric, and no other.
#[test]
fn the_readme_lists_every_metric() {
    let workers = vec![Arc::new(WorkerMetrics::default())];
    let page = Metrics::new(workers, Arc::new(TokenMetrics::default()), Arc::new(AtomicU64::new(0)), SystemTime::now()).encode();
    let mut metrics = BTreeSet::new();
    for line in page.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) {
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            metrics.insert(format!("{name}{suffix}"));
        }
    }

    let section = section("Metrics");
    let own = rows(&section).into_iter().flat_map(|row| quoted(&row[0])).map(|name| format!("upsolver_auth_proxy_{name}"));
    let process = quoted(&section).into_iter().filter(|name| name.starts_with("process_"));
    assert_eq!(own.chain(process).collect::<BTreeSet<_>>(), metrics);
}

/// E12: the answers' table names every code, and no other.
#[test]
fn the_readme_lists_every_error_code() {
    let documented: BTreeSet<_> = rows(&section("Answers of the proxy itself")).iter().flat_map(|row| quoted(&row[1])).collect();
    // Nobody is left to read this one; it is in the metrics' table.
    let codes = ERROR_CODES.iter().filter(|code| **code != "downstream_closed").map(|code| (*code).to_owned()).collect();
    assert_eq!(documented, codes);
}
