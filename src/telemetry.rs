//! The log: its format, its filter, and the way of a line to stderr.
//!
//! The filter can change while the program runs. Above it stands one rule that no filter lifts: other libraries are heard from level info up, never
//! at debug or trace, since what they print there can hold header values (contract §7).

pub mod access;
mod writer;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::Context;
use tracing::{Dispatch, Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config;

pub use access::{AccessLog, AccessRecord};

/// Overrides `log.level`, as with most Rust programs.
const FILTER_VARIABLE: &str = "RUST_LOG";

/// The running log. Dropping it writes out what is buffered, for at most a second; lines after that are lost, so `main` drops it last.
#[derive(Debug)]
pub struct Telemetry {
    filter: LogFilter,
    dropped_lines: Arc<AtomicU64>,
    _flush: writer::FlushGuard,
}

impl Telemetry {
    /// The filter, to be read and set.
    pub fn filter(&self) -> LogFilter {
        self.filter.clone()
    }

    /// How many lines stderr did not take: a counter for the metrics.
    pub fn dropped_lines(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.dropped_lines)
    }
}

/// Starts the log of this process on stderr; from here on a panic is a log line too. To be called once. `sandboxed` closes the writing thread off.
///
/// Fails where `RUST_LOG` or `log.level` is not a filter, or a log was started before.
pub fn init(log: &config::Log, sandboxed: bool) -> anyhow::Result<Telemetry> {
    let terminal = std::io::stderr().is_terminal();
    let (key, text) = filter_text(std::env::var(FILTER_VARIABLE).ok(), &log.level);
    let format = Format::new(log.format, terminal);
    let (lines, flush, dropped_lines) =
        writer::start(std::io::stderr(), format.colour, sandboxed).context("cannot start the log writer thread")?;
    let (dispatch, filter) = with_writer(&text, format, lines).with_context(|| key.to_owned())?;
    tracing::dispatcher::set_global_default(dispatch).context("cannot start the log a second time")?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(Telemetry { filter, dropped_lines, _flush: flush })
}

/// The filter to start with, and where it was written; an empty variable counts as absent.
fn filter_text(variable: Option<String>, configured: &str) -> (&'static str, String) {
    match variable {
        Some(text) if !text.is_empty() => (FILTER_VARIABLE, text),
        _ => ("log.level", configured.to_owned()),
    }
}

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    json: bool,
    colour: bool,
}

impl Format {
    fn new(format: config::LogFormat, terminal: bool) -> Self {
        let json = match format {
            config::LogFormat::Auto => !terminal,
            config::LogFormat::Json => true,
            config::LogFormat::Pretty => false,
        };
        Self { json, colour: terminal && !json }
    }
}

/// The log without its outer end, so that tests can look at the lines.
fn with_writer<W>(filter: &str, format: Format, writer: W) -> Result<(Dispatch, LogFilter), InvalidFilter>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    // No span list: this program's spans carry a task's name, which the innermost span has.
    let lines = if format.json {
        tracing_subscriber::fmt::layer().json().flatten_event(true).with_span_list(false).with_writer(writer).boxed()
    } else {
        tracing_subscriber::fmt::layer().with_ansi(format.colour).with_writer(writer).boxed()
    };
    // Both filters stand below the lines and hold for all of them.
    let subscriber = Registry::default().with(filter).with(filter_fn(may_be_heard)).with(lines);
    Ok((Dispatch::new(subscriber), LogFilter(handle)))
}

/// B39: other libraries have their say from level info up only. A list of what is ours is complete; a list of what is not never would be.
fn may_be_heard(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    *metadata.level() <= Level::INFO
        || target == access::TARGET
        || target.strip_prefix(env!("CARGO_CRATE_NAME")).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The log's filter: reads it, or sets another one for all lines from now on. Cloning shares it.
#[derive(Debug, Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// Puts another filter in force, e.g. `debug` or `info,access=off`; on an error the old one stays.
    pub fn set(&self, filter: &str) -> Result<(), InvalidFilter> {
        let filter = parse(filter)?;
        // Fails only where the log is gone, and then there is nothing to filter.
        let _ = self.0.reload(filter);
        Ok(())
    }

    /// The filter in force, normalized.
    pub fn current(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Not a tracing filter; in the words of the configuration, which has the same rule.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct InvalidFilter(String);

fn parse(filter: &str) -> Result<EnvFilter, InvalidFilter> {
    config::parse_log_filter(filter).map_err(InvalidFilter)
}

/// A panic as a log line.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let said = panic_message(panic.payload());
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    tracing::error!(
        said,
        location,
        thread = thread.name().unwrap_or_default(),
        "a task panicked: this is a bug in the proxy, please report it"
    );
}

/// The message where it stands in the source. A formatted one is withheld: it may quote what was being worked on, as those of string slicing do.
fn panic_message(payload: &(dyn std::any::Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("(formatted message withheld)")
}

/// A log that goes nowhere, and its filter, for the tests of others. The filter works as long as the log is kept.
#[cfg(test)]
pub(crate) fn unseen(filter: &str) -> (Dispatch, LogFilter) {
    with_writer(filter, Format { json: false, colour: false }, std::io::sink).expect("a valid filter")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Mutex;
    use std::time::Duration;

    use http::{Method, StatusCode};

    use super::*;
    use crate::metrics::ResponseSource;

    const JSON: Format = Format { json: true, colour: false };
    const PRETTY: Format = Format { json: false, colour: false };

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Written {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What `log` writes under a filter, through the real writer.
    fn written(filter: &str, format: Format, log: impl FnOnce(&LogFilter)) -> String {
        let written = Written::default();
        let (lines, flush, _) = writer::start(written.clone(), format.colour, true).unwrap();
        let (dispatch, handle) = with_writer(filter, format, lines).unwrap();
        tracing::dispatcher::with_default(&dispatch, || log(&handle));
        drop(flush);
        written.take()
    }

    fn record(path: &str) -> AccessRecord<'_> {
        AccessRecord {
            method: &Method::GET,
            path,
            status: StatusCode::OK,
            source: ResponseSource::Upstream,
            code: None,
            duration: Duration::from_micros(1_234),
            request_bytes: 1,
            response_bytes: 2,
            attempts: 1,
            generation: 3,
        }
    }

    /// B39: not even `trace` brings out what a library says below info, be it under a name that begins like ours.
    #[test]
    fn b39_other_libraries_are_heard_from_info_up() {
        let lines = written("trace", PRETTY, |_| {
            tracing::trace!(target: "hyper::proto", "canary");
            tracing::debug!(target: "rustls::client", "canary");
            tracing::debug!(target: "upsolver_auth_proxy_plugin", "canary");
            tracing::info!(target: "h2", "heard");
            tracing::trace!("own");
            tracing::trace!(target: "upsolver_auth_proxy", "own");
        });
        assert_eq!((lines.matches("canary").count(), lines.matches("heard").count(), lines.matches("own").count()), (0, 1, 2), "{lines}");
    }

    #[test]
    fn the_filter_changes_while_running() {
        let lines = written("info", PRETTY, |filter| {
            tracing::debug!("first");
            filter.set("debug").unwrap();
            tracing::debug!("second");
            assert!(filter.set("a=b=c").is_err() && filter.set(" ").is_err() && filter.set("inof").is_err());
            assert_eq!(filter.current(), "debug");
            filter.set("error").unwrap();
            tracing::info!("third");
        });
        assert!(lines.contains("second") && !lines.contains("first") && !lines.contains("third"), "{lines}");
    }

    #[test]
    fn rust_log_wins() {
        let rows = [(None, "log.level", "info"), (Some(""), "log.level", "info"), (Some("debug"), "RUST_LOG", "debug")];
        for (variable, key, text) in rows {
            assert_eq!(filter_text(variable.map(str::to_owned), "info"), (key, text.to_owned()), "{variable:?}");
        }
    }

    /// B36: a panic whose message was formatted at run time does not show it.
    #[test]
    fn b36_a_formatted_panic_message_is_withheld() {
        let payload = |panicking: fn()| std::panic::catch_unwind(panicking).unwrap_err();
        assert_eq!(panic_message(&*payload(|| panic!("literal"))), "literal");
        let formatted = payload(|| {
            let _ = &std::hint::black_box("canäry").to_owned()[..4];
        });
        assert!(!panic_message(&*formatted).contains("can"), "{}", panic_message(&*formatted));
    }

    #[test]
    fn auto_is_json_unless_stderr_is_a_terminal() {
        let rows = [
            (config::LogFormat::Auto, true, Format { json: false, colour: true }),
            (config::LogFormat::Auto, false, JSON),
            (config::LogFormat::Json, true, JSON),
            (config::LogFormat::Pretty, false, PRETTY),
        ];
        for (format, terminal, expected) in rows {
            assert_eq!(Format::new(format, terminal), expected, "{format:?} {terminal}");
        }
    }

    #[test]
    fn an_access_line_has_these_fields_and_no_query() {
        let line = written("info", JSON, |_| AccessLog::new(config::AccessLog::All).record(&record("/inputs/?secret=canary")));
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let expected = serde_json::json!({
            "level": "INFO", "target": "access", "timestamp": line["timestamp"], "method": "GET", "path": "/inputs/", "status": 200,
            "source": "upstream", "duration_ms": 1.234, "request_bytes": 1, "response_bytes": 2, "attempts": 1, "generation": 3,
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn log_access_chooses_the_requests() {
        let rows = [
            (config::AccessLog::All, 200, 1),
            (config::AccessLog::All, 503, 1),
            (config::AccessLog::Errors, 302, 0),
            (config::AccessLog::Errors, 404, 1),
            (config::AccessLog::Errors, 503, 1),
            (config::AccessLog::Off, 503, 0),
        ];
        for (which, status, expected) in rows {
            let lines = written("info", JSON, |_| {
                AccessLog::new(which).record(&AccessRecord { status: StatusCode::from_u16(status).unwrap(), ..record("/") });
            });
            assert_eq!(lines.lines().count(), expected, "{which:?} {status}");
        }
        assert_eq!(written("info,access=off", JSON, |_| AccessLog::new(config::AccessLog::All).record(&record("/"))), "");
    }

    /// B41: escape sequences and line ends in values reach no terminal and forge no line, in either format; a long path is cut.
    #[test]
    fn b41_values_are_escaped_and_truncated() {
        for format in [JSON, PRETTY, Format { json: false, colour: true }] {
            let lines = written("info", format, |_| {
                tracing::info!(field = %"x\x1b]0;a\nforged", debug = ?"y\x1b]0;b\nforged", "message \x1b]0;c\nforged {}", "z\x1b]0;d\nforged");
                AccessLog::new(config::AccessLog::All).record(&record(&format!("/\x1b]0;e\nforged{}", "a".repeat(1 << 20))));
            });
            assert_eq!(lines.lines().count(), 2, "{format:?} {lines}");
            assert!(!lines.contains("\x1b]"), "{format:?} {lines:?}");
            assert!(lines.len() < 2048, "{format:?} {} bytes", lines.len());
            if format.json {
                assert!(lines.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{lines}");
            }
        }
    }
}
