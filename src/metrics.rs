//! Every metric in one list: name, unit, labels, help (contract §6).
//!
//! Counting and showing are apart. [`WorkerMetrics`] and [`TokenMetrics`] are plain atomics that their owners write without a lock; [`Metrics`] adds
//! them up and writes the page when it is scraped. The page is `OpenMetrics` text, where the library appends the unit and `_total` to the names below.

mod cells;
mod process;
mod token;
mod worker;

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

pub use token::{MINT_RESULTS, PROBE_RESULTS, RELOAD_RESULTS, STORE_OPERATIONS, TokenMetrics};
pub use worker::{CONNECT_RESULTS, ERROR_CODES, REPLAY_RESULTS, ResponseSource, WorkerMetrics};

use cells::HistogramSnapshot;
use process::Snapshot;
use worker::request_labels;

/// The content type of [`Metrics::encode`] (`OpenMetrics` 1.0, section "Overall structure").
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All that is counted, ready to be scraped.
#[derive(Debug)]
pub struct Metrics {
    workers: Arc<[Arc<WorkerMetrics>]>,
    registry: Registry,
}

impl Metrics {
    /// Shows the sum over `workers`, `token`, the lines that stderr did not take, and the process, which began at `started`.
    pub fn new(workers: Vec<Arc<WorkerMetrics>>, token: Arc<TokenMetrics>, dropped_lines: Arc<AtomicU64>, started: SystemTime) -> Self {
        let workers: Arc<[_]> = workers.into();
        let mut registry = Registry::default();
        let own = registry.sub_registry_with_prefix("upsolver_auth_proxy");
        own.register_collector(Box::new(RequestMetrics(Arc::clone(&workers))));
        own.register_collector(Box::new(ControlMetrics { token, dropped_lines }));
        registry.register_collector(Box::new(ProcessMetrics { started }));
        Self { workers, registry }
    }

    /// The whole page as `OpenMetrics` text, of type [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        let mut page = String::with_capacity(16 << 10);
        prometheus_client::encoding::text::encode(&mut page, &self.registry).expect("writing to a String does not fail");
        page
    }

    /// Requests whose response has not ended, over all workers.
    pub fn requests_in_flight(&self) -> u64 {
        in_flight(&self.workers)
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }
}

/// The request path, summed over the workers.
#[derive(Debug)]
struct RequestMetrics(Arc<[Arc<WorkerMetrics>]>);

impl Collector for RequestMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let workers = &self.0;
        let mut page = Page(encoder);

        let mut family = page.counter("requests", None, "Finished requests, by method, status and where the response came from.")?;
        for (index, count) in
            sum_by_index(workers.iter().map(|worker| worker.requests())).into_iter().enumerate().filter(|(_, count)| *count > 0)
        {
            family.encode_family(&request_labels(index))?.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
        }
        let durations = workers.iter().map(|worker| worker.duration.read()).reduce(|sum, next| sum.add(&next));
        page.histogram("request_duration", "From the request head to the last byte of the response.", durations)?;
        page.gauge_value("requests_in_flight", "Requests whose response has not ended.", &in_flight(workers))?;
        let tasks = workers.iter().map(|worker| worker.tasks() as u64).sum::<u64>();
        page.gauge_value("tasks", "Tasks of the workers: about one for each open connection, and a few besides.", &tasks)?;
        page.labelled(
            "errors",
            "The proxy's own answers, by code.",
            "code",
            sum_by_label(workers.iter().map(|worker| worker.errors.read())),
        )?;

        let (idle, active) = workers.iter().map(|worker| worker.connections()).fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
        let mut family = page.gauge("upstream_connections", "Open connections to the upstream, by whether a request uses them.")?;
        for (state, count) in [("idle", idle), ("active", active)] {
            family.encode_family(&[("state", state)])?.encode_gauge(&count)?;
        }
        let connects = sum_by_label(workers.iter().map(|worker| worker.connects.read()));
        page.labelled("upstream_connects", "Ended attempts to connect to the upstream, by result.", "result", connects)?;

        let (requests, responses) = workers.iter().map(|worker| worker.bytes()).fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
        page.counter_value("request", Some(&Unit::Bytes), "Bytes of request bodies.", &requests)?;
        page.counter_value("response", Some(&Unit::Bytes), "Bytes of response bodies.", &responses)?;
        let replays = sum_by_label(workers.iter().map(|worker| worker.replays.read()));
        page.labelled("replays", "Requests to be sent again after a proven rejection, by result.", "result", replays)?;

        let mut family =
            page.counter("policy_denials", None, "Requests that a policy rule denied, or would have denied without dry_run.")?;
        let denials = sum_by_index(workers.iter().map(|worker| worker.denials().flatten()));
        for (index, count) in denials.iter().enumerate() {
            let rule = if index + 2 < denials.len() { (index / 2).to_string() } else { "default".to_owned() };
            let dry_run = if index % 2 == 0 { "false" } else { "true" };
            family.encode_family(&[("rule", rule.as_str()), ("dry_run", dry_run)])?.encode_counter::<NoLabelSet, _, f64>(count, None)?;
        }
        Ok(())
    }
}

/// The token, its credentials, and what is left.
#[derive(Debug)]
struct ControlMetrics {
    token: Arc<TokenMetrics>,
    dropped_lines: Arc<AtomicU64>,
}

impl Collector for ControlMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let token = &self.token;
        let mut page = Page(encoder);
        page.labelled("token_mints", "Ended attempts to mint a token, by result.", "result", token.mints.read())?;
        page.histogram("token_mint_duration", "How long attempts to mint took.", Some(token.mint_duration.read()))?;
        page.gauge_value("token_generation", "Number of the token in use; 0 before the first.", &token.current_generation())?;
        // Without a token there is no sample, so that an age computed from it is never half a century.
        let mut created = page.gauge_with_unit("token_created_timestamp", &Unit::Seconds, "When the token in use was minted.")?;
        if let Some(seconds) = token.created() {
            created.encode_gauge(&seconds)?;
        }
        page.gauge_value("token_usable", "1 while a usable token is there.", &u32::from(token.is_usable()))?;
        page.labelled("token_rejections", "Rejected requests of the current generation, by status.", "status", token.rejections.read())?;
        page.labelled("token_probes", "Ended probes of the token in use, by result.", "result", token.probes.read())?;
        page.labelled("token_store_errors", "Failures of the token store, by operation.", "operation", token.store_errors.read())?;
        page.labelled("credentials_reloads", "How often the credentials were read again, by result.", "result", token.reloads.read())?;
        let pending = u32::from(token.is_pending_rejected());
        page.gauge_value("credentials_pending_rejected", "1 while new credentials are there that the upstream rejected.", &pending)?;

        let dropped = self.dropped_lines.load(Relaxed);
        page.counter_value("log_lines_dropped", None, "Log lines that stderr did not take in time.", &dropped)?;
        let mut build = page.0.encode_descriptor("build", "The running version.", None, MetricType::Info)?;
        build.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
    }
}

/// The process, under names without this program's prefix.
#[derive(Debug)]
struct ProcessMetrics {
    started: SystemTime,
}

impl Collector for ProcessMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let process = Snapshot::take(self.started);
        let mut page = Page(encoder);
        if let Some(cpu) = process.cpu {
            page.counter_value("process_cpu", Some(&Unit::Seconds), "User and system CPU time.", &cpu.as_secs_f64())?;
        }
        if let Some(bytes) = process.resident_memory_bytes {
            page.gauge_with_unit("process_resident_memory", &Unit::Bytes, "Resident memory.")?.encode_gauge(&bytes)?;
        }
        if let Some(files) = process.open_files {
            page.gauge_value("process_open_fds", "Open file descriptors.", &files)?;
        }
        if let Some(files) = process.max_files {
            page.gauge_value("process_max_fds", "Most file descriptors that may be open.", &files)?;
        }
        if let Some(started) = process.started {
            page.gauge_with_unit("process_start_time", &Unit::Seconds, "When the process started, since the epoch.")?
                .encode_gauge(&started.as_secs_f64())?;
        }
        Ok(())
    }
}

/// The library's encoder, in the few shapes that occur here.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn counter<'s>(&'s mut self, name: &'s str, unit: Option<&'s Unit>, help: &str) -> Result<MetricEncoder<'s>, Error> {
        self.0.encode_descriptor(name, help, unit, MetricType::Counter)
    }

    fn counter_value(&mut self, name: &str, unit: Option<&Unit>, help: &str, value: &impl EncodeCounterValue) -> Result<(), Error> {
        self.counter(name, unit, help)?.encode_counter::<NoLabelSet, _, f64>(value, None)
    }

    fn labelled(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        counts: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> Result<(), Error> {
        let mut family = self.counter(name, None, help)?;
        for (value, count) in counts {
            family.encode_family(&[(label, value)])?.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
        }
        Ok(())
    }

    fn gauge<'s>(&'s mut self, name: &'s str, help: &str) -> Result<MetricEncoder<'s>, Error> {
        self.0.encode_descriptor(name, help, None, MetricType::Gauge)
    }

    fn gauge_with_unit<'s>(&'s mut self, name: &'s str, unit: &'static Unit, help: &str) -> Result<MetricEncoder<'s>, Error> {
        self.0.encode_descriptor(name, help, Some(unit), MetricType::Gauge)
    }

    fn gauge_value(&mut self, name: &str, help: &str, value: &impl EncodeGaugeValue) -> Result<(), Error> {
        self.gauge(name, help)?.encode_gauge(value)
    }

    fn histogram(&mut self, name: &str, help: &str, snapshot: Option<HistogramSnapshot>) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let Some(snapshot) = snapshot else { return Ok(()) };
        encoder.encode_histogram::<NoLabelSet>(snapshot.sum.as_secs_f64(), snapshot.count(), &snapshot.buckets, None)
    }
}

fn in_flight(workers: &[Arc<WorkerMetrics>]) -> u64 {
    // Each worker's number is never negative; the sum of several reads may miss one that just ended.
    u64::try_from(workers.iter().map(|worker| worker.in_flight()).sum::<i64>()).unwrap_or(0)
}

/// Adds up what stands at the same position.
fn sum_by_index(workers: impl Iterator<Item = impl Iterator<Item = u64>>) -> Vec<u64> {
    let mut sums = Vec::new();
    for counts in workers {
        for (index, count) in counts.enumerate() {
            match sums.get_mut(index) {
                Some(sum) => *sum += count,
                None => sums.push(count),
            }
        }
    }
    sums
}

/// Adds up what has the same label value, in the order of the first worker.
fn sum_by_label(workers: impl Iterator<Item = impl Iterator<Item = (&'static str, u64)>>) -> Vec<(&'static str, u64)> {
    let mut sums: Vec<(&'static str, u64)> = Vec::new();
    for (label, count) in workers.flatten() {
        match sums.iter_mut().find(|(known, _)| *known == label) {
            Some((_, sum)) => *sum += count,
            None => sums.push((label, count)),
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{Method, StatusCode};

    use super::*;

    /// Two workers and a token of which everything was counted at least once.
    fn busy() -> Metrics {
        let workers: Vec<_> = (0..2).map(|_| Arc::new(WorkerMetrics::new(1))).collect();
        for worker in &workers {
            for _ in 0..3 {
                worker.request_started();
            }
            worker.request_finished(&Method::GET, StatusCode::OK, ResponseSource::Upstream, Duration::from_millis(2));
            worker.error("draining");
            worker.request_bytes(10);
            worker.response_bytes(100);
            worker.replay("success");
            worker.upstream_connect("tls");
            worker.upstream_connections(1, 2);
            worker.policy_denial("0", true);
        }
        let token = Arc::new(TokenMetrics::default());
        token.mint("success", Duration::from_millis(70));
        token.generation(7, SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500));
        token.usable(true);
        token.rejection(StatusCode::FORBIDDEN);
        token.probe("dead");
        token.store_error("write");
        token.credentials_reload("changed");
        token.pending_rejected(true);
        Metrics::new(workers, token, Arc::new(AtomicU64::new(9)), SystemTime::now())
    }

    /// Contract §6: each metric under its name and labels, summed over the workers.
    #[test]
    fn shows_every_metric_of_the_contract() {
        let metrics = busy();
        let page = metrics.encode();
        let rows = [
            r#"requests_total{method="GET",status="200",source="upstream"} 2"#,
            r#"request_duration_seconds_bucket{le="0.0025"} 2"#,
            r#"request_duration_seconds_bucket{le="+Inf"} 2"#,
            "request_duration_seconds_count 2",
            "requests_in_flight 4",
            "tasks 0",
            r#"errors_total{code="draining"} 2"#,
            r#"upstream_connections{state="idle"} 2"#,
            r#"upstream_connections{state="active"} 4"#,
            r#"upstream_connects_total{result="tls"} 2"#,
            "request_bytes_total 20",
            "response_bytes_total 200",
            r#"replays_total{result="success"} 2"#,
            r#"token_mints_total{result="success"} 1"#,
            r#"token_mint_duration_seconds_bucket{le="0.1"} 1"#,
            "token_generation 7",
            "token_created_timestamp_seconds 1700000000.5",
            "token_usable 1",
            r#"token_rejections_total{status="403"} 1"#,
            r#"token_probes_total{result="dead"} 1"#,
            r#"token_store_errors_total{operation="write"} 1"#,
            r#"credentials_reloads_total{result="changed"} 1"#,
            "credentials_pending_rejected 1",
            r#"policy_denials_total{rule="0",dry_run="true"} 2"#,
            r#"policy_denials_total{rule="default",dry_run="false"} 0"#,
            "log_lines_dropped_total 9",
            concat!("build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ];
        for row in rows {
            assert!(page.lines().any(|line| line.strip_prefix("upsolver_auth_proxy_") == Some(row)), "{row} is missing in\n{page}");
        }
        assert_eq!((metrics.requests_in_flight(), metrics.workers()), (4, 2));
        assert!(page.ends_with("# EOF\n"));
    }

    /// Alerts are written before anything happens: each value of a fixed label is there with 0. Only the age of a token that is not there is absent.
    #[test]
    fn every_fixed_label_value_is_there_from_the_start() {
        let page = Metrics::new(vec![Arc::default()], Arc::default(), Arc::default(), SystemTime::now()).encode();
        let families = [
            ("errors_total", "code", &ERROR_CODES[..]),
            ("upstream_connects_total", "result", &CONNECT_RESULTS),
            ("replays_total", "result", &REPLAY_RESULTS),
            ("token_mints_total", "result", &MINT_RESULTS),
            ("token_probes_total", "result", &PROBE_RESULTS),
            ("token_rejections_total", "status", &["401", "403"]),
            ("token_store_errors_total", "operation", &STORE_OPERATIONS),
            ("credentials_reloads_total", "result", &RELOAD_RESULTS),
        ];
        for (family, label, values) in families {
            for value in values {
                let sample = format!("upsolver_auth_proxy_{family}{{{label}=\"{value}\"}} 0");
                assert!(page.lines().any(|line| line == sample), "{sample} is missing in\n{page}");
            }
        }
        assert!(!page.lines().any(|line| line.starts_with("upsolver_auth_proxy_token_created_timestamp_seconds ")), "{page}");
    }

    /// `OpenMetrics`: names are unique, a sample belongs to the family whose TYPE stands above it, and a unit ends the family's name.
    #[test]
    fn the_page_is_well_formed() {
        let page = busy().encode();
        let mut seen = Vec::new();
        let mut family = "";
        for line in page.lines().filter(|line| *line != "# EOF") {
            let mut words = line.split(' ');
            match (words.next(), words.next(), words.next()) {
                (Some("#"), Some("HELP"), Some(name)) => {
                    assert!(!seen.contains(&name), "{name} twice");
                    assert!(!name.ends_with("_total"), "{name}: the library appends _total");
                    assert!(line.ends_with('.'), "{line}");
                    seen.push(name);
                    family = name;
                }
                (Some("#"), Some("TYPE"), Some(name)) => assert_eq!(name, family),
                (Some("#"), Some("UNIT"), Some(name)) => {
                    assert!(name == family && line.ends_with(name.rsplit('_').next().unwrap()), "{line}");
                }
                (Some(sample), Some(value), None) => {
                    let name = sample.split('{').next().unwrap();
                    let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} under {family}"));
                    assert!(["", "_total", "_sum", "_count", "_bucket", "_info"].contains(&suffix), "{line} under {family}");
                    assert!(value.parse::<f64>().is_ok(), "{line}");
                }
                _ => panic!("unexpected line {line:?}"),
            }
        }
        assert_eq!(seen.len(), 28, "families: {seen:?}");
    }
}
