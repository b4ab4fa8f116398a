//! Black-box tests: the real binary between raw sockets, or between real clients and the simulated Upsolver API. One module for each behaviour; the
//! matrix id of what a test proves stands in its name.
//!
//! Every proxy that a test starts logs at level trace, and every test fails if a secret shows in what the proxy printed.

// Waiting is real here; no test of this binary pauses the clock.
#![allow(clippy::disallowed_types)]
// A failed test shows the proxy's log.
#![allow(clippy::print_stderr)]
// Samples of metrics are whole numbers.
#![allow(clippy::float_cmp)]

mod admin;
mod bad_network;
mod cleanup;
mod cli;
mod clients;
mod connection_life;
mod contract;
mod desync;
mod egress;
mod expect;
mod faults;
mod framing;
mod guard;
mod hop_by_hop;
mod host_and_target;
mod http2;
mod http2_faults;
mod http2_floods;
mod leaks;
mod limits;
mod overload;
mod panics;
mod redirects;
mod replay;
mod responses;
mod sandbox;
mod shutdown;
mod support;
mod tokens;
mod unix_and_tls;
