//! What happened in the run on this thread, as one log: the world's own lines and those of the program under test, with their virtual time.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id};
use tracing::{Dispatch, Event, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

thread_local! {
    static JOURNAL: RefCell<Option<(Instant, Lines)>> = const { RefCell::new(None) };
}

/// Since the beginning of the run, and what.
type Lines = Vec<(Duration, String)>;

/// Begins a new one, at the present instant.
pub(super) fn begin() {
    JOURNAL.replace(Some((Instant::now(), Vec::new())));
}

pub(super) fn note(line: &str) {
    JOURNAL.with_borrow_mut(|journal| {
        if let Some((began, lines)) = journal {
            lines.push((began.elapsed(), line.to_owned()));
        }
    });
}

/// Whether a line of the program holds both texts.
pub(super) fn has(one: &str, other: &str) -> bool {
    JOURNAL.with_borrow(|journal| {
        journal.iter().flat_map(|(_, lines)| lines.iter().rev()).any(|(_, line)| line.contains(one) && line.contains(other))
    })
}

/// All of it, a line for each thing that happened.
pub(super) fn take() -> String {
    let lines = JOURNAL.take().map(|(_, lines)| lines).unwrap_or_default();
    let mut text = String::new();
    for (at, line) in lines {
        let (seconds, ms) = (at.as_secs(), at.subsec_millis());
        let _ = writeln!(text, "{:02}:{:02}:{:02}.{ms:03} {line}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    }
    text
}

/// Writes what the program logs into the journal.
pub(super) fn dispatch() -> Dispatch {
    let relevant = filter_fn(|metadata| metadata.is_span() || *metadata.level() <= LevelFilter::INFO);
    Dispatch::new(tracing_subscriber::registry().with(Capture.with_filter(relevant)))
}

struct Capture;

struct Process(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if attributes.metadata().name() == "process" {
            let mut text = Text::default();
            attributes.record(&mut text);
            context.span(id).expect("it was just made").extensions_mut().insert(Process(text.0));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let process = context.event_scope(event).into_iter().flatten().find_map(|span| {
            let extensions = span.extensions();
            extensions.get::<Process>().map(|process| process.0.clone())
        });
        let mut text = Text::default();
        event.record(&mut text);
        note(&format!("  process{} {}:{}", process.unwrap_or_default(), event.metadata().level(), text.0));
    }
}

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
