//! Sending requests to the upstream: connections opened with verification, kept and reused per worker, and one request more only where the first
//! was certainly not processed.
//!
//! [`pool`] is the face for proxied traffic, [`single`] the one for the control plane: a mint never shares a connection with proxied requests.

pub mod connect;
mod departures;
pub mod http1;
pub mod pool;
mod resolve;
pub mod single;
pub mod tls;
