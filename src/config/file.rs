//! The TOML file as written: every key with its line. Unknown keys are refused; what a value must look like is not decided here.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use toml::Value;
use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use super::error::{Problem, Provenance};
use super::layer::{Layer, Setting};
use super::{schema, suggest};

/// A configuration has some 60 keys; a larger file is not one.
const MAX_FILE_BYTES: u64 = 256 << 10;

/// Reads the file. The text may hold secrets and is cleared when dropped.
pub(super) fn read(path: &Path) -> Result<Zeroizing<String>, Problem> {
    let problem = |message| Problem { provenance: Provenance::File { path: path.into(), line: 0 }, key: None, message };
    let mut bytes = Zeroizing::new(Vec::new());
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| problem(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(problem(format!("longer than {} KiB, which no configuration is", MAX_FILE_BYTES >> 10)));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(error) => {
            let line = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count();
            Err(Problem { provenance: Provenance::File { path: path.into(), line }, key: None, message: "not UTF-8".to_owned() })
        }
    }
}

/// Takes the file apart. After a syntax error the rest is still read, as far as it can be told what it means, so that its problems are reported too.
pub(super) fn parse(path: &Arc<Path>, text: &str, problems: &mut Vec<Problem>) -> Layer {
    let mut walk = Walk { path, lines: Lines::new(text), broken: BTreeSet::new(), layer: Layer::new(), problems };
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        // `message` is made of fixed words; `Display` would quote the line, which may hold a secret.
        let line = walk.lines.of(&error.span().unwrap_or_default());
        if walk.broken.insert(line) {
            walk.refuse(line, None, format!("not TOML: {}", error.message()));
        }
    }
    walk.table("", table.get_ref());
    walk.layer
}

/// Finds the line of a byte.
struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    fn of(&self, span: &Range<usize>) -> usize {
        self.0.partition_point(|newline| *newline < span.start) + 1
    }
}

struct Walk<'a> {
    path: &'a Arc<Path>,
    lines: Lines,
    /// Lines with a syntax error: what seems to stand there is a guess.
    broken: BTreeSet<usize>,
    layer: Layer,
    problems: &'a mut Vec<Problem>,
}

impl Walk<'_> {
    /// `section` is the dotted name of this table, empty for the document.
    fn table(&mut self, section: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let line = self.lines.of(&name.span());
            let full = if section.is_empty() { name.get_ref().to_string() } else { format!("{section}.{}", name.get_ref()) };
            // A quoted name with a dot in it is not the dotted key that it looks like.
            let known = !name.get_ref().contains('.');
            if self.broken.contains(&line) {
                continue;
            }
            match (schema::find(&full).filter(|_| known), value.get_ref()) {
                (Some(key), value) => {
                    let mut setting = Setting::new(plain(value), self.at(line));
                    if let DeValue::Array(items) = value {
                        setting.lines = items.iter().map(|item| self.lines.of(&item.span())).collect();
                    }
                    self.layer.insert(key.name, setting);
                }
                (None, DeValue::Table(inner)) if known && schema::is_section(&full) => self.table(&full, inner),
                (None, _) if known && schema::is_section(&full) => {
                    self.refuse(line, Some(full.clone()), format!("a section, not a key; write [{full}] and its keys below"));
                }
                (None, _) => {
                    let meant = match suggest::key(&full) {
                        Some(key) if key == full => "; write it without the quotes".to_owned(),
                        Some(key) => format!("; did you mean {key}?"),
                        None => String::new(),
                    };
                    self.refuse(line, Some(full), format!("unknown key{meant}"));
                }
            }
        }
    }

    fn at(&self, line: usize) -> Provenance {
        Provenance::File { path: Arc::clone(self.path), line }
    }

    fn refuse(&mut self, line: usize, key: Option<String>, message: String) {
        let provenance = self.at(line);
        self.problems.push(Problem { provenance, key, message });
    }
}

/// The value without spans. A number too large for 64 bits stays text, and is refused where the key is read.
fn plain(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or_else(|_| Value::String(number.to_string()), Value::Integer)
        }
        DeValue::Float(number) => number.as_str().parse().map_or_else(|_| Value::String(number.to_string()), Value::Float),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(datetime) => Value::Datetime(*datetime),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| plain(item.get_ref())).collect()),
        DeValue::Table(table) => {
            Value::Table(table.iter().map(|(name, value)| (name.get_ref().to_string(), plain(value.get_ref()))).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `line key=value` of each setting, and the problems.
    fn walked(text: &str) -> (Vec<String>, Vec<String>) {
        let mut problems = Vec::new();
        let layer = parse(&Path::new("f").into(), text, &mut problems);
        let settings =
            layer.iter().map(|(key, setting)| format!("{} {key}={} {:?}", setting.provenance, setting.value, setting.lines)).collect();
        (settings, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn each_key_has_its_line() {
        let (settings, problems) = walked(
            "# comment\r\n[listen]\r\nallowed_hosts = [\r\n \"a\",\r\n \"b\"]\r\ntls.client_ca_file = \"x\"\r\n[token.store]\r\ntype = \"file\"\r\n\
             [[policy.rules]]\r\naction = \"deny\"\r\n[[policy.rules]]\r\naction = \"allow\"\r\n",
        );
        assert_eq!(problems, [""; 0]);
        let expected = [
            r#"f:3 listen.allowed_hosts=["a", "b"] [4, 5]"#,
            r#"f:6 listen.tls.client_ca_file="x" []"#,
            r#"f:9 policy.rules=[{ action = "deny" }, { action = "allow" }] [9, 11]"#,
            r#"f:8 token.store.type="file" []"#,
        ];
        assert_eq!(settings, expected);
    }

    #[test]
    fn unknown_keys_are_refused_with_a_suggestion() {
        let (_, problems) = walked(
            "lisen = 1\nadmin = 1\n[listen]\nadress = \"canary\"\n\"tls.client_ca_file\" = \"\"\n[tokn]\nwait = \"1s\"\n[log]\nlevel = 1\nlevel = 2",
        );
        let expected = [
            "f:10: not TOML: duplicate key",
            "f:2: admin: a section, not a key; write [admin] and its keys below",
            "f:1: lisen: unknown key; did you mean listen?",
            "f:4: listen.adress: unknown key; did you mean listen.address?",
            "f:5: listen.tls.client_ca_file: unknown key; write it without the quotes",
            "f:6: tokn: unknown key; did you mean token?",
        ];
        assert_eq!(problems, expected);
    }

    #[test]
    fn a_syntax_error_hides_neither_the_others_nor_shows_the_line() {
        let (settings, problems) =
            walked("[token]\nwait = 10s\nprobe_path = \"/x\"\n[log]\nlevle = \"info\"\n[credentials]\npassword = \"canary\n");
        assert_eq!(settings, [r#"f:3 token.probe_path="/x" []"#]);
        assert!(problems[0].starts_with("f:2: not TOML: ") && problems[1].starts_with("f:7: not TOML: "), "{problems:?}");
        assert_eq!(problems[2..], ["f:5: log.levle: unknown key; did you mean log.level?"]);
        assert!(!problems.concat().contains("canary"));
    }

    #[test]
    fn an_unreadable_file_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.toml");
        assert!(read(&path).unwrap_err().to_string().contains("c.toml: cannot be read: No such file"));
        std::fs::write(&path, b"[log]\nlevel = \"\xff\"").unwrap();
        assert!(read(&path).unwrap_err().to_string().ends_with("c.toml:2: not UTF-8"));
        std::fs::write(&path, vec![b'#'; 1 << 20]).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("longer than 256 KiB"));
    }
}
