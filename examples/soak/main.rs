//! Drives mixed traffic through the real binary to the simulated API for a given time, and checks every byte that comes back (matrix D33):
//!
//! `cargo build --release && cargo run --release --example soak -- --seconds 3600`
//!
//! Downloads and uploads of all sizes, polls, and exchanges that apps abandon in several ways; meanwhile, every second or as often as you say, the token is revoked, the password
//! changes, the upstream ends all its connections (in order, by FIN alone, by reset) or is gone for a moment. The simulated API notes whom it struck, so
//! each error is either explained by one certain strike or a failure ([`verdict`]). So are wrong bytes, memory that grows, descriptors and tasks that stay
//! behind, and a proxy that dies. Exit status 1 where something failed.
#![allow(clippy::print_stdout, reason = "a program whose output is its report")]

mod client;
mod disturb;
mod proxy;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use clap::Parser;
use tokio::time::Instant;
use upsolver_auth_proxy::simulator::{self, Options, Protocols, Simulator};

use client::Tally;
use disturb::Strike;
use proxy::{Proxy, Sample};
use verdict::Verdict;

/// Memory settles in this share of the time; the slope is taken over the rest.
const WARM_UP: f64 = 0.25;
/// Growth of resident memory after the warm-up that allocators explain, in bytes.
const TOLERATED_GROWTH: f64 = 4.0 * 1024.0 * 1024.0;
/// What connections and tasks get to end after the last client left; the pool's idle timeout is a part of it.
const REST: Duration = Duration::from_secs(30);

/// Drives mixed traffic through the proxy and checks every byte.
#[derive(Parser)]
struct Arguments {
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Apps at a time, each with a connection of its own.
    #[arg(long, default_value_t = 16)]
    clients: u64,
    /// Milliseconds between two strikes. In less than 500 a new password would not settle before the next one.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(500..))]
    every: u64,
    /// HTTP/2 to the upstream.
    #[arg(long)]
    http2: bool,
    /// The proxy's binary; by default the one that cargo built beside this.
    #[arg(long)]
    binary: Option<PathBuf>,
}

fn main() -> ExitCode {
    match soak(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was wrong.
fn soak(arguments: &Arguments) -> anyhow::Result<bool> {
    let account = simulator::demo_credentials();
    let protocols = if arguments.http2 { Protocols::Http2 } else { Protocols::Http1 };
    let options = Options { accounts: vec![account.clone()], record: false, protocols, ..Options::default() };
    let simulator = Simulator::start(options)?;
    let directory = tempfile::tempdir()?;
    let binary = arguments.binary.clone().map_or_else(proxy::beside_this, Ok)?;
    let mut proxy = Proxy::start(&binary, &simulator, directory.path(), &account, arguments.http2)?;
    let before = proxy.at_rest(None, REST)?;

    let started = Instant::now();
    let until = started + Duration::from_secs(arguments.seconds);
    let stop = AtomicBool::new(false);
    let (tallies, strikes, samples) = std::thread::scope(|scope| {
        let (address, stop) = (proxy.address, &stop);
        let clients: Vec<_> = (0..arguments.clients).map(|number| scope.spawn(move || client::run(number, address, until))).collect();
        let disturbances =
            scope.spawn(|| disturb::run(&simulator, &account, directory.path(), Duration::from_millis(arguments.every), stop));
        let samples = watch(&proxy, started, until);
        let tallies: Vec<_> = clients.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        (tallies, disturbances.join(), samples)
    });
    let mut tally = Tally::default();
    for client in tallies {
        tally.add(client.map_err(|_| anyhow!("a client panicked"))?);
    }
    let strikes = strikes.map_err(|_| anyhow!("the disturbances panicked"))?;
    let alive = proxy.process.try_wait()?.is_none();
    let after = if alive { Some(proxy.at_rest(Some(&before), REST)?) } else { None };
    let streams = if arguments.http2 { arguments.clients } else { 1 };
    let verdict = verdict::explain(&tally.failures, &strikes, &simulator.ended(), &simulator.refused(), streams);
    let report =
        Report { tally: &tally, verdict: &verdict, strikes: &strikes, samples: &samples, before, after, mints: simulator.mints().len() };
    let fine = report.print(started.elapsed());
    if !fine {
        println!("the last warnings of the proxy:\n{}", proxy.warnings());
    }
    Ok(fine)
}

/// Memory, descriptors and tasks, second by second.
fn watch(proxy: &Proxy, started: Instant, until: Instant) -> Vec<(f64, Sample)> {
    let mut samples = Vec::new();
    while Instant::now() < until {
        std::thread::sleep(Duration::from_secs(1));
        if let Ok(sample) = proxy.sample() {
            samples.push((started.elapsed().as_secs_f64(), sample));
        }
    }
    samples
}

struct Report<'a> {
    tally: &'a Tally,
    verdict: &'a Verdict,
    strikes: &'a [Strike],
    samples: &'a [(f64, Sample)],
    before: Sample,
    /// Without clients; `None` where the proxy ended.
    after: Option<Sample>,
    mints: usize,
}

impl Report<'_> {
    /// Prints everything; answers whether nothing was wrong.
    fn print(&self, elapsed: Duration) -> bool {
        let Self { tally, verdict, strikes, samples, before, after, mints } = self;
        let explained: u64 = verdict.explained.values().sum();
        let requests = tally.right + tally.abandoned + tally.failures.len() as u64 + tally.wrong.len() as u64;
        println!("requests     {requests} in {} s", elapsed.as_secs());
        println!("  right      {}, every byte\n  abandoned  {}, by the app\n  explained  {explained}", tally.right, tally.abandoned);
        for (reason, count) in &verdict.explained {
            println!("    {count:>7}  {reason}");
        }
        println!("  unexplained {}\n  wrong       {}", verdict.unexplained.len(), tally.wrong.len());
        for failure in verdict.unexplained.iter().chain(&tally.wrong).take(20) {
            println!("    {failure}");
        }
        println!("strikes      {}, {mints} mints", strikes.len());

        let mebibytes = |bytes: f64| bytes / 1024.0 / 1024.0;
        let duration = samples.last().map_or(0.0, |(time, _)| *time);
        let settled: Vec<_> = samples.iter().filter(|(time, _)| *time >= duration * WARM_UP).collect();
        let growth = slope(&settled) * duration * (1.0 - WARM_UP);
        let most = |of: fn(&Sample) -> f64| samples.iter().map(|(_, sample)| of(sample)).fold(0.0, f64::max);
        println!(
            "memory       {:.1} MiB at first, {:.1} MiB at most; trend after the warm-up {:+.2} MiB in {:.0} s",
            mebibytes(before.resident),
            mebibytes(most(|sample| sample.resident)),
            mebibytes(growth),
            duration * (1.0 - WARM_UP)
        );
        let at_end = |of: fn(&Sample) -> f64| after.as_ref().map_or(f64::NAN, of);
        for (name, of) in [("descriptors", (|sample| sample.descriptors) as fn(&Sample) -> f64), ("tasks", |sample| sample.tasks)] {
            println!("{name:<12} {} at first, {} at most, {} without clients", of(before), most(of), at_end(of));
        }

        let failures = [
            (!tally.wrong.is_empty(), "wrong bytes, or no answer"),
            (!verdict.unexplained.is_empty(), "errors that no strike explains"),
            (tally.right == 0, "nothing was answered"),
            (growth > TOLERATED_GROWTH, "memory grows"),
            (after.is_none(), "the proxy ended"),
            (after.as_ref().is_some_and(|after| !after.is_at_rest(Some(before))), "descriptors, tasks or requests stay behind"),
        ];
        for (_, what) in failures.iter().filter(|(failed, _)| *failed) {
            println!("FAILED: {what}");
        }
        failures.iter().all(|(failed, _)| !failed)
    }
}

/// Least squares over memory, in bytes per second.
fn slope(samples: &[&(f64, Sample)]) -> f64 {
    let count = f64::from(u32::try_from(samples.len()).unwrap_or(u32::MAX)).max(1.0);
    let mean = |value: fn(&(f64, Sample)) -> f64| samples.iter().map(|sample| value(sample)).sum::<f64>() / count;
    let (time, memory) = (mean(|(time, _)| *time), mean(|(_, sample)| sample.resident));
    let covariance: f64 = samples.iter().map(|(at, sample)| (at - time) * (sample.resident - memory)).sum();
    let variance: f64 = samples.iter().map(|(at, _)| (at - time).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}
