//! "Did you mean …?" for misspelt words.

use super::schema::{KEYS, is_section};

/// More slips than this make another word.
const MAX_SLIPS: usize = 3;

/// The candidate most like `word`, where one is like it at all: a slip or two in a word of usual length.
pub(super) fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let length = word.chars().count();
    candidates
        .into_iter()
        // What comparing a word of any length with all of them costs is not for whoever wrote it to say.
        .filter(|candidate| length.abs_diff(candidate.len()) <= MAX_SLIPS)
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_ascii_lowercase()), candidate))
        // Not where every letter is another, as in words of one letter and in the empty one.
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).clamp(1, MAX_SLIPS) && *distance < candidate.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The key or section that was meant by the unknown dotted name: misspelt as a whole, or put into the wrong section.
pub(super) fn key(name: &str) -> Option<&'static str> {
    let sections = KEYS.iter().map(super::schema::Key::section);
    let similar = || closest(name, KEYS.iter().map(|key| key.name).chain(sections));
    let leaf = name.rsplit_once('.').map_or(name, |(_, leaf)| leaf);
    let mut namesakes = KEYS.iter().filter(|key| key.leaf() == leaf);
    let misplaced = match (namesakes.next(), namesakes.next()) {
        (Some(key), None) => Some(key.name),
        _ => None,
    };
    // In an existing section, a misspelt sibling is likelier than a key that lost its way; a leaf spelt right speaks for itself.
    let section = name.rsplit_once('.').map_or("", |(section, _)| section);
    let sibling = || closest(leaf, KEYS.iter().filter(|key| key.section() == section).map(super::schema::Key::leaf));
    let sibling = || sibling().and_then(|leaf| KEYS.iter().find(|key| key.section() == section && key.leaf() == leaf)).map(|key| key.name);
    misplaced.or_else(|| if is_section(section) { sibling() } else { None }).or_else(similar)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let rows = [
            ("listen.adress", Some("listen.address")),
            ("listen.address", Some("listen.address")),
            ("connect_timeout", Some("upstream.connect_timeout")),
            ("token.connect_timeout", Some("upstream.connect_timeout")),
            ("upstream.conect_timeout", Some("upstream.connect_timeout")),
            ("upstraem", Some("upstream")),
            ("token.stor", Some("token.store")),
            ("token.store.typ", Some("token.store.type")),
            ("credentials.passwort", Some("credentials.password")),
            ("something.entirely_else", None),
            ("x", None),
        ];
        for (name, expected) in rows {
            assert_eq!(key(name), expected, "{name}");
        }
    }

    #[test]
    fn nothing_is_suggested_for_a_word_unlike_all() {
        assert_eq!(closest("jsno", ["auto", "json", "pretty"]), Some("json"));
        assert_eq!(closest("xml", ["auto", "json", "pretty"]), None);
        assert_eq!((closest("", ["1.1", "2"]), closest("3", ["1.1", "2"]), closest("1.2", ["1.1", "2"])), (None, None, Some("1.1")));
    }
}
