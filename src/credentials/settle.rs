//! Decides what a reading means: nothing new, a change to be taken, a change to be looked at again, a failure. Pure: readings and the time come in.
//!
//! | reading | before anything was read | later |
//! |---|---|---|
//! | unusable | failed | failed; what is in force stays, a change that was settling is forgotten |
//! | the content in force | – | unchanged |
//! | other content, out of a Kubernetes volume | taken | taken: the volume was swapped as a whole |
//! | other content, plain files | taken | taken when it was read equal for [`SETTLE`]: whoever writes them may be half through |
//!
//! The very first reading is taken at once, since a start would otherwise always be late by [`SETTLE`]; if it was half a file, the upstream rejects it and
//! the whole one follows. A reload that somebody asked for follows the same table: the asker knows that the files changed, not that every write of them
//! has arrived.

use std::time::Duration;

use tokio::time::Instant;

use super::{Content, Reading};

/// For how long changed plain files must read equal before they are used (C39).
pub(super) const SETTLE: Duration = Duration::from_secs(1);

/// What is in force, and what may follow it.
#[derive(Debug, Default)]
pub(super) struct Settling {
    started: bool,
    in_force: Option<Content>,
    /// Another content, and since when every reading gave it.
    candidate: Option<(Content, Instant)>,
    /// Of the last reading, where it failed.
    problem: Option<String>,
}

/// What to do after a reading.
#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    /// Publish this.
    Take(Content),
    /// It changed, but may not be complete: look again after this long.
    LookAgain(Duration),
    /// What is in force was read.
    Unchanged {
        /// The reading before had failed.
        recovered: bool,
    },
    /// Nothing usable was read.
    Failed {
        /// Why, for people.
        reason: String,
        /// The reading before did not fail for the same reason.
        news: bool,
    },
}

impl Settling {
    pub(super) fn judge(&mut self, reading: Reading, now: Instant) -> Decision {
        let first = !std::mem::replace(&mut self.started, true);
        let content = match reading.content {
            Ok(content) => content,
            Err(reason) => {
                self.candidate = None;
                let news = self.problem.as_ref() != Some(&reason);
                self.problem = Some(reason.clone());
                return Decision::Failed { reason, news };
            }
        };
        let recovered = self.problem.take().is_some();
        if self.in_force.as_ref() == Some(&content) {
            self.candidate = None;
            return Decision::Unchanged { recovered };
        }
        let since = match self.candidate.take() {
            Some((candidate, since)) if candidate == content => since,
            _ => now,
        };
        let age = now.saturating_duration_since(since);
        if first || reading.atomic || age >= SETTLE {
            self.in_force = Some(content.clone());
            return Decision::Take(content);
        }
        self.candidate = Some((content, since));
        Decision::LookAgain(SETTLE.saturating_sub(age))
    }

    /// Whether there is anything to go on with when a reading fails.
    pub(super) fn has_any(&self) -> bool {
        self.in_force.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Token;

    fn content(text: &str) -> Content {
        Content::Token(Token::new(text.to_owned()).unwrap())
    }

    /// Plain content, `~` in front for a volume's, `!` for a failure.
    fn reading(text: &str) -> Reading {
        match text.split_at(1) {
            ("!", reason) => Reading { content: Err(reason.to_owned()), atomic: false },
            ("~", text) => Reading { content: Ok(content(text)), atomic: true },
            _ => Reading { content: Ok(content(text)), atomic: false },
        }
    }

    fn take(text: &str) -> Decision {
        Decision::Take(content(text))
    }

    fn again(milliseconds: u64) -> Decision {
        Decision::LookAgain(Duration::from_millis(milliseconds))
    }

    fn failed(reason: &str, news: bool) -> Decision {
        Decision::Failed { reason: reason.to_owned(), news }
    }

    /// At this many milliseconds this was read, and this was decided.
    type History = Vec<(u64, &'static str, Decision)>;

    const SAME: Decision = Decision::Unchanged { recovered: false };
    const RECOVERED: Decision = Decision::Unchanged { recovered: true };

    #[test]
    fn c37_c39_c41_histories() {
        let rows: Vec<(&str, History)> = vec![
            ("the first reading is taken at once", vec![(0, "a", take("a")), (10, "a", SAME)]),
            (
                "c39: a change is taken when it was read equal for a second",
                vec![(0, "a", take("a")), (5_000, "b", again(1_000)), (5_999, "b", again(1)), (6_000, "b", take("b")), (6_001, "b", SAME)],
            ),
            (
                "c39: a half-written file is never used",
                vec![
                    (0, "a", take("a")),
                    (5_000, "b", again(1_000)),
                    (5_900, "bb", again(1_000)),
                    (6_800, "bb", again(100)),
                    (6_900, "bb", take("bb")),
                ],
            ),
            (
                "c37: there and back again is no change",
                vec![(0, "a", take("a")), (5_000, "b", again(1_000)), (5_500, "a", SAME), (6_000, "b", again(1_000))],
            ),
            ("c35: a swapped volume is taken at once", vec![(0, "~a", take("a")), (5_000, "~b", take("b")), (5_001, "~b", SAME)]),
            (
                "c41: a failure keeps what is in force, and is news once",
                vec![
                    (0, "a", take("a")),
                    (1_000, "!empty", failed("empty", true)),
                    (2_000, "!empty", failed("empty", false)),
                    (3_000, "!gone", failed("gone", true)),
                    (4_000, "a", RECOVERED),
                    (5_000, "!gone", failed("gone", true)),
                ],
            ),
            (
                "c37: failed, then good again with other content",
                vec![(0, "a", take("a")), (1_000, "!empty", failed("empty", true)), (2_000, "b", again(1_000)), (3_000, "b", take("b"))],
            ),
            (
                "a failure between two equal readings begins anew",
                vec![(0, "a", take("a")), (1_000, "b", again(1_000)), (1_900, "!x", failed("x", true)), (2_500, "b", again(1_000))],
            ),
            (
                "c34: files that come after the start may be half-written, too",
                vec![(0, "!gone", failed("gone", true)), (1_000, "a", again(1_000)), (2_000, "a", take("a"))],
            ),
        ];
        for (name, history) in rows {
            let start = Instant::now();
            let mut settling = Settling::default();
            for (at, text, expected) in history {
                assert_eq!(settling.judge(reading(text), start + Duration::from_millis(at)), expected, "{name}: {text} at {at} ms");
            }
        }
    }
}
