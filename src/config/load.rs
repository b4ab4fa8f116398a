//! From a file, an environment and a command line to a [`Config`]: default < file < environment < flag. All problems are found in one run.

use std::fmt;
use std::path::{Path, PathBuf};

use super::effective::Effective;
use super::error::Problems;
use super::layer::Settings;
use super::reader::Reader;
use super::{Config, environment, file, sections};

/// Where the configuration comes from. Kept for reloads.
#[derive(Clone, Default)]
pub struct Sources {
    /// `--config`; without it, the environment alone decides.
    pub file: Option<PathBuf>,
    /// Environment variables; handed in, so that tests have their own. [`Sources::from_process`] takes the process's.
    pub environment: Vec<(String, String)>,
    /// Each `section.key=value` of `--set`, in order.
    pub overrides: Vec<String>,
    /// What the command cannot do without.
    pub need: Need,
}

/// What a command cannot do without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Need {
    /// Credentials: without any, there is nothing that the proxy could do.
    #[default]
    Credentials,
    /// Nothing: `health` and its like only ask the running proxy. The source may be [`super::CredentialsSource::Unconfigured`].
    Nothing,
}

impl Sources {
    /// A file and overrides, and those variables of the process's environment that matter. Bytes that are not UTF-8 are replaced, and refused where
    /// they matter.
    pub fn from_process(file: Option<PathBuf>, overrides: Vec<String>, need: Need) -> Self {
        let relevant = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok().filter(|name| environment::is_relevant(name))?;
            Some((name, value.to_string_lossy().into_owned()))
        });
        Self { file, environment: relevant.collect(), overrides, need }
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets.
        let variables: Vec<_> = self.environment.iter().map(|(name, _)| name).collect();
        f.debug_struct("Sources")
            .field("file", &self.file)
            .field("environment", &variables)
            .field("need", &self.need)
            .finish_non_exhaustive()
    }
}

/// A configuration, and what people may want to know about it.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Valid by construction.
    pub config: Config,
    /// Every key with its value and origin, secrets replaced.
    pub effective: Effective,
    /// What is allowed, and yet worth a word in the log.
    pub warnings: Vec<String>,
    /// The file that was read.
    pub file: Option<PathBuf>,
}

impl Config {
    /// Reads, layers and checks everything. Blocks while it reads the file; opens no other file and no socket.
    pub fn load(sources: &Sources) -> Result<Loaded, Problems> {
        let Some(path) = &sources.file else { return assemble(None, sources) };
        match file::read(path) {
            Ok(text) => assemble(Some((path, &text)), sources),
            // What the environment and the flags have wrong is worth knowing all the same; what seems to be missing may stand in the file.
            Err(problem) => {
                let others = assemble(None, &Sources { need: Need::Nothing, ..sources.clone() }).err();
                let others = others.iter().flat_map(Problems::iter).cloned();
                Err(Problems::new([problem].into_iter().chain(others).collect()).expect("there is one"))
            }
        }
    }

    /// The configuration of a TOML text alone, as if it stood in a file given to `run`: no environment, no flags.
    pub fn from_toml(text: &str) -> Result<Self, Problems> {
        assemble(Some((Path::new("configuration"), text)), &Sources::default()).map(|loaded| loaded.config)
    }
}

fn assemble(file: Option<(&Path, &str)>, sources: &Sources) -> Result<Loaded, Problems> {
    let mut problems = Vec::new();
    let from_file = file.map(|(path, text)| file::parse(&path.into(), text, &mut problems)).unwrap_or_default();
    let from_environment = environment::environment(&sources.environment, &mut problems);
    let from_flags = environment::flags(&sources.overrides, &mut problems);
    let mut settings = Settings::merge([from_file, from_environment, from_flags], &mut problems);
    environment::apply_well_known(&mut settings, &sources.environment);

    let config = sections::config(&mut Reader::new(&settings, &mut problems), sources.need);
    if let Some(problems) = Problems::new(problems) {
        return Err(problems);
    }
    let mut warnings = sections::warnings(&config, &settings);
    warnings.extend(environment::warnings(&sources.environment));
    Ok(Loaded { effective: Effective::new(&settings, &config), config, warnings, file: file.map(|(path, _)| path.to_owned()) })
}
