//! What the tests share: the proxy under test, and raw sockets for both of its sides.

pub(crate) mod egress;
pub(crate) mod frames;
pub(crate) mod link;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod wire;
