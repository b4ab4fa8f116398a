//! The simulated Upsolver API at an address of its own, for test scripts that put the proxy somewhere else: in a network namespace, under limits.
//!
//! `cargo run --example upstream -- --address '[::]:8443' --directory DIR` leaves its certificate authority, an email and a password in DIR, says
//! `listening`, and serves until its standard input ends.
#![allow(clippy::print_stdout, reason = "a program that says when it is ready")]

use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use upsolver_auth_proxy::simulator::{self, Options, Protocols, Simulator};

/// Serves the simulated Upsolver API.
#[derive(Parser)]
struct Arguments {
    /// Where it listens.
    #[arg(long)]
    address: SocketAddr,
    /// Where the proxy's files go.
    #[arg(long)]
    directory: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Arguments { address, directory } = Arguments::parse();
    let account = simulator::demo_credentials();
    let options = Options { address, protocols: Protocols::Both, record: false, accounts: vec![account.clone()], ..Options::default() };
    let simulator = Simulator::start(options)?;
    simulator.write_ca(&directory)?;
    std::fs::write(directory.join("email"), &account.email)?;
    std::fs::write(directory.join("password"), &account.password)?;
    println!("listening at {}", simulator.address());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
