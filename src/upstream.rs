//! Sending requests to the upstream.

pub mod connect;
pub mod single;
