//! Sending requests to the upstream: connections opened with verification, kept and reused per worker, and one request more only where the first
//! was certainly not processed.
//!
//! [`pool`] is the face for proxied traffic, [`single`] the one for the control plane: a mint never shares a connection with proxied requests. Below the
//! pool, [`http1`] is one HTTP/1.1 connection, [`departures`] decides when its request is sent; HTTP/2 is hyper's.

pub mod connect;
mod departures;
pub mod http1;
pub mod pool;
mod resolve;
pub mod single;
pub mod tls;
