//! Starting, ready or draining, on a watch channel.
