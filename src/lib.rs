//! Tidegate, an IoT edge gateway: MQTT, CoAP and HTTP in, one identity and one policy, a durable queue and a balanced uplink out.
//!
//! `ARCHITECTURE.md` is the map. Modules are layered: a module imports only from layers below its own (`tests/architecture.rs` checks it).

pub mod admin;
pub mod balance;
pub mod cache;
pub mod cli;
pub mod config;
pub mod gateway;
pub mod hub;
pub mod identity;
pub mod limit;
pub mod listener;
pub mod message;
pub mod network;
pub mod policy;
pub mod session;
pub mod spool;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod units;
pub mod upstream;
pub mod worker;
