//! The cloud side: who can be reached, and how what the spool holds gets there.

mod config;
pub mod endpoint;
pub mod event;
pub mod mqtt;
pub mod template;

pub use config::{BatchConfig, BatchFormat, Config, ForwardConfig, HealthConfig, Kind, MqttVersion};
