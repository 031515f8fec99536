//! Who hears what: the subscription tree and one bounded outbox per session.

pub mod outbox;
pub mod tree;
