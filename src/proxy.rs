//! The straight line of one request.

pub mod error;
pub mod guard;
pub mod headers;
pub mod policy;
