//! What is remembered to answer quickly. Pure: `now` is passed in, the owner holds the lock.

pub mod last_value;
pub mod response;
