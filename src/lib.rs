//! An authenticating sidecar for the Upsolver API.
//!
//! An app speaks plain HTTP to localhost; the proxy obtains and keeps one API token, adds it to each request and forwards it to the upstream over
//! verified TLS.

pub mod admin;
pub mod app;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod credentials;
pub mod liveness;
pub mod metrics;
pub mod proxy;
pub mod readiness;
pub mod secret;
pub mod server;
pub mod shutdown;
pub mod simulator;
pub mod task;
pub mod telemetry;
pub mod token;
pub mod upstream;
pub mod worker;
