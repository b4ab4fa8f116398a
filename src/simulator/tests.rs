//! The simulator seen from a client that sees bytes: what other tests rely on must itself be proven.

mod api;
mod client;
mod connections;
mod faults;
mod records;
