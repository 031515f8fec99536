//! Every number that bounds the gateway, and the token buckets and sliding windows that bound rates.
//!
//! [`Config`] is the whole `[limits]` table: each module reads its bounds from here, so that one place sums the memory.
//! [`Gcra`] is one bucket without a lock, for a session or a rule; [`KeyedBuckets`] is a bounded table of buckets for keys that
//! strangers choose, such as addresses, [`KeyedWindows`] one of sliding windows.
//!
//! Promises: a bucket never admits more than `burst + time / interval` tokens, never refuses a sender that keeps to its rate, a sliding window
//! never admits more than its count in any stretch of its length, and no table grows beyond its bound, whatever is sent. Not here: who is counted by which bucket (`gateway`), and permits for
//! connections (`listener`).
//!
//! `now_nanos` everywhere is nanoseconds since one fixed instant of this process (its start will do; zero works), monotone.

mod config;
mod gcra;
mod keyed;
mod window;

pub use config::Config;
pub use gcra::{Gcra, Left};
pub use keyed::{AddressKey, KeyedBuckets, KeyedWindows};
