//! The command line (contract section 2): which command, from which sources of configuration, with which exit status.
//!
//! No flag takes a secret, since every process of the machine may read the command line of every other (B42); `--set` refuses those keys too.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::app::EXIT_USAGE;
use crate::config::{Config, Loaded, Need, Problems, Sources};
use crate::{app, descriptors, sandbox, telemetry};

pub mod check;
pub mod client;

/// `--version`: the version and the optional features that were built in; there are none so far.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (optional features: none)");

/// An authenticating sidecar for the Upsolver API: apps speak plain HTTP to localhost, the proxy holds the token.
#[derive(Debug, Parser)]
#[command(name = "upsolver-auth-proxy", version = VERSION, about, disable_help_subcommand = true)]
struct CommandLine {
    #[command(flatten)]
    flags: ConfigFlags,
    /// What to do; run, if nothing is said.
    #[command(subcommand)]
    command: Option<Command>,
}

/// Where the configuration comes from. Accepted before and after the name of the command.
#[derive(Debug, Clone, Default, Args)]
struct ConfigFlags {
    /// Configuration file; the environment variable `UPSOLVER_AUTH_PROXY_CONFIG` may name it too.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets one key of the configuration, above file and environment; repeatable. Takes no secrets.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy; the default.
    Run {
        #[command(flatten)]
        flags: ConfigFlags,
    },
    /// Validate configuration and credential files; starts nothing, mints nothing.
    Check {
        #[command(flatten)]
        flags: ConfigFlags,
        /// Also resolve, connect and verify TLS to the upstream.
        #[arg(long)]
        connect: bool,
    },
    /// Print the effective configuration as TOML, each value with its origin, secrets redacted.
    Config {
        #[command(flatten)]
        flags: ConfigFlags,
    },
    /// Ask the running proxy for its health: exit status 0 or 1, for exec probes.
    Health {
        #[command(flatten)]
        flags: ConfigFlags,
        /// What to ask for.
        #[arg(value_enum, default_value = "readiness")]
        kind: client::Kind,
    },
    /// Wait until the proxy is ready: exit status 0, or 1 at the timeout.
    Wait {
        #[command(flatten)]
        flags: ConfigFlags,
        /// How long at most.
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
        timeout: Duration,
    },
    /// Ask the running proxy to stop gracefully.
    Shutdown {
        #[command(flatten)]
        flags: ConfigFlags,
    },
    /// Run the proxy in front of a simulated Upsolver API; needs no account.
    Demo {
        #[command(flatten)]
        flags: ConfigFlags,
    },
    /// Print completions for a shell.
    Completions {
        /// Which one.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// Does what the process's command line says, and returns the exit status. The whole of `main`.
pub fn main() -> ExitCode {
    // Before any secret is read. `app::run` does it again, to say in the log what the kernel refused.
    let _ = crate::harden::process();
    match CommandLine::try_parse() {
        Ok(command_line) => command_line.execute(),
        // Help and version come this way too, for stdout and with status 0; wrong usage has status 2. A closed stdout is no error of ours.
        Err(error) => {
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE))
        }
    }
}

impl CommandLine {
    fn execute(self) -> ExitCode {
        let before = self.flags;
        match self.command.unwrap_or(Command::Run { flags: ConfigFlags::default() }) {
            Command::Run { flags } => run(before.then(flags).sources(Need::Credentials)),
            Command::Check { flags, connect } => check::check(&before.then(flags).sources(Need::Credentials), connect),
            Command::Config { flags } => with_config(&before.then(flags).sources(Need::Nothing), |loaded| {
                print(loaded.effective.to_string().trim_end());
                for warning in loaded.warnings.iter().chain(&descriptors::make_room(&mut loaded.config.clone()).shortage) {
                    complain(format_args!("warning: {warning}"));
                }
                Ok(true)
            }),
            Command::Health { flags, kind } => ask(before.then(flags), |config| client::health(config, kind)),
            Command::Wait { flags, timeout } => ask(before.then(flags), |config| client::wait(config, timeout)),
            Command::Shutdown { flags } => ask(before.then(flags), client::shutdown),
            Command::Demo { flags } => app::demo(before.then(flags).sources(Need::Nothing)),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "upsolver-auth-proxy", &mut script);
                print(String::from_utf8_lossy(&script).trim_end());
                ExitCode::SUCCESS
            }
        }
    }
}

impl ConfigFlags {
    /// Flags in front of the command, then those behind it, which win.
    fn then(mut self, later: Self) -> Self {
        self.overrides.extend(later.overrides);
        Self { config: later.config.or(self.config), overrides: self.overrides }
    }

    /// With the process's environment. A flag wins over the variable; an empty variable is none.
    fn sources(self, need: Need) -> Sources {
        let from_environment = || std::env::var_os("UPSOLVER_AUTH_PROXY_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        Sources::from_process(self.config.or_else(from_environment), self.overrides, need)
    }
}

fn run(sources: Sources) -> ExitCode {
    let loaded = match Config::load(&sources) {
        Ok(loaded) => loaded,
        Err(problems) => return usage(&problems),
    };
    let sandboxed = match sandbox::is_wanted(&sources.environment) {
        Ok(sandboxed) => sandboxed,
        Err(problem) => {
            complain(format_args!("error: {problem}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match telemetry::init(&loaded.config.log, sandboxed) {
        Ok(telemetry) => {
            if !sandboxed {
                tracing::info!("not sandboxed: it is turned off");
            }
            app::run(loaded, sources, &telemetry, sandboxed)
        }
        Err(error) => failure(&error),
    }
}

/// Asks the running proxy; `false` is exit status 1, as is no answer.
fn ask(flags: ConfigFlags, question: impl FnOnce(&Config) -> anyhow::Result<bool>) -> ExitCode {
    with_config(&flags.sources(Need::Nothing), |loaded| question(&loaded.config))
}

fn with_config(sources: &Sources, action: impl FnOnce(&Loaded) -> anyhow::Result<bool>) -> ExitCode {
    match Config::load(sources).map(|loaded| action(&loaded)) {
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
        Ok(Err(error)) => failure(&error),
        Err(problems) => usage(&problems),
    }
}

fn failure(error: &anyhow::Error) -> ExitCode {
    complain(format_args!("error: {error:#}"));
    ExitCode::FAILURE
}

fn usage(problems: &Problems) -> ExitCode {
    complain(format_args!("error: {problems}"));
    ExitCode::from(EXIT_USAGE)
}

/// A line on stdout, for the person or script that called. Nobody reading any more, as after `| head`, is no error; `println!` would panic.
fn print(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// A line on stderr, likewise.
fn complain(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &str) -> CommandLine {
        CommandLine::try_parse_from(std::iter::once("upsolver-auth-proxy").chain(arguments.split_whitespace())).unwrap()
    }

    #[test]
    fn clap_finds_no_contradiction_in_the_definitions() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn flags_count_on_both_sides_of_the_command() {
        let rows = [
            ("--config a --set x.y=1", Some("a"), vec!["x.y=1"]),
            ("run --config a --set x.y=1", Some("a"), vec!["x.y=1"]),
            ("--config a --set x.y=1 run --config b --set x.z=2 --set x.y=3", Some("b"), vec!["x.y=1", "x.z=2", "x.y=3"]),
            ("--config a run --set x.z=2", Some("a"), vec!["x.z=2"]),
            ("", None, vec![]),
        ];
        for (arguments, config, overrides) in rows {
            let command_line = parsed(arguments);
            let later = match command_line.command {
                None => ConfigFlags::default(),
                Some(Command::Run { flags }) => flags,
                other => panic!("{arguments}: {other:?}"),
            };
            let flags = command_line.flags.then(later);
            assert_eq!(flags.config.as_deref(), config.map(std::path::Path::new), "{arguments}");
            assert_eq!(flags.overrides, overrides, "{arguments}");
        }
    }

    #[test]
    fn health_asks_for_readiness_unless_told_otherwise() {
        let kind = |arguments| match parsed(arguments).command {
            Some(Command::Health { kind, .. }) => kind,
            other => panic!("{other:?}"),
        };
        assert_eq!(kind("health"), client::Kind::Readiness);
        assert_eq!(kind("health --config x startup"), client::Kind::Startup);
    }

    /// B42: there is no flag for a secret, and wrong usage does not repeat what stands behind one.
    #[test]
    fn b42_no_flag_takes_a_secret() {
        for flag in ["--password", "--email", "--token"] {
            let error = CommandLine::try_parse_from(["upsolver-auth-proxy", &format!("{flag}=canary")]).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(EXIT_USAGE));
            assert!(!error.to_string().contains("canary"), "{error}");
        }
    }
}
