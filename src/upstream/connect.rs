//! Connecting to the upstream: name, TCP, egress proxy, TLS.

/// Opens verified connections to the configured upstream. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connector {}
