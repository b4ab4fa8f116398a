//! An authenticating sidecar for the Upsolver API.
//!
//! An app speaks plain HTTP to localhost; the proxy obtains and keeps one API token, adds it to each request and forwards it to the upstream over
//! verified TLS. The app holds no secret.
//!
//! # Bird's-eye view
//!
//! Two planes. The **control plane** is the main thread: configuration, credentials, the token's life, the admin server, signals. The **workers** are
//! one thread each, with a listening socket and an upstream pool of their own; they share nothing that is written per request. The token crosses from
//! one to the other on a watch channel, rejections go back on a queue.
//!
//! # Modules, in reading order
//!
//! | I want to know | open |
//! |---|---|
//! | what happens to a request | [`proxy`], top to bottom; its steps are [`proxy::guard`], [`proxy::policy`], [`proxy::headers`], and for sending [`upstream`] |
//! | when a token is obtained, kept, dropped | [`token::state`], the table in its module doc; [`token::task`] runs it, [`token::mint`] and [`token::store`] do its work |
//! | which settings exist, with what defaults | [`config`] |
//! | why a downstream got a 502 | [`proxy::error`] |
//! | which timeout ended a connection | [`server::clock`] |
//! | what may be believed of a response, and where it ends | [`upstream::http1`] |
//! | who starts what, in which order, and how it ends | [`app`] |
//!
//! The rest: [`secret`] (what cannot be printed), [`credentials`] (reads and watches email and password), [`server`] (connections, for any service),
//! [`worker`], [`admin`], [`readiness`], [`liveness`], [`metrics`], [`telemetry`], [`shutdown`], [`harden`], [`sandbox`], [`descriptors`], [`backoff`], [`task`], [`cli`], and [`simulator`], the
//! Upsolver API that the demo, the tests and the benchmarks use.
//!
//! # Direction
//!
//! A module uses only modules to its right: `cli` → `app` → `worker`, `admin` → `proxy` → `token`, `upstream`, `server`, `credentials`, `telemetry` →
//! `config` → `secret`, `backoff`, `metrics`, `readiness`, `shutdown`.
//!
//! # Invariants
//!
//! - A secret's bytes are exposed in three places: the mint request, the making of the authorization value, the token store. Nothing in [`secret`]
//!   implements `Serialize` or `Display`.
//! - The downstream never chooses the upstream authority, and never sees or supplies its authorization.
//! - A body is never held whole; memory per request does not depend on its size.
//! - One task writes the token; a failed renewal never replaces a token that still works.
//! - Only `main` ends the process. Every task is named and has an owner that ends it, or a deadline.

pub mod admin;
pub mod app;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod credentials;
pub mod descriptors;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod harden;
pub mod liveness;
pub mod metrics;
pub mod proxy;
pub mod readiness;
pub mod sandbox;
pub mod secret;
pub mod server;
pub mod shutdown;
pub mod simulator;
pub mod task;
pub mod telemetry;
pub mod token;
pub mod upstream;
pub mod worker;
