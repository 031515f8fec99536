//! The `[gateway]` table.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The gateway's name: the source of every message id, and what upstreams see. One topic level.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Folder of the registry, the spool and the gateway's key. Created with mode 0700 if it is missing.
    #[schemars(extend("format" = "path"))]
    pub data_dir: PathBuf,
    /// Worker threads: "auto" is one per core.
    pub workers: Workers,
    /// Prefix of the device API and of `/topics` on HTTP listeners, such as "/iot"; empty for none. Set it when routes serve a site
    /// that uses the same paths.
    #[schemars(length(max = 256))]
    pub device_api_prefix: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: "tidegate".into(),
            data_dir: "data".into(),
            workers: Workers::Auto,
            device_api_prefix: String::new(),
        }
    }
}

/// How many worker threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    Auto,
    Count(u16),
}

impl Workers {
    pub const MAX: u16 = 256;

    /// The number of threads on this machine.
    pub fn count(self) -> usize {
        match self {
            Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from).min(usize::from(Self::MAX)),
            Workers::Count(count) => usize::from(count),
        }
    }
}

impl Serialize for Workers {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Workers::Auto => serializer.serialize_str("auto"),
            Workers::Count(count) => serializer.serialize_u16(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Workers {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Count(u16),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Count(count) if (1..=Self::MAX).contains(&count) => Ok(Workers::Count(count)),
            Written::Word(word) if word == "auto" => Ok(Workers::Auto),
            _ => Err(serde::de::Error::custom("allowed: \"auto\", or an integer from 1 to 256")),
        }
    }
}

impl schemars::JsonSchema for Workers {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Workers".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "oneOf": [{ "type": "string", "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": Workers::MAX }]
        })
    }
}
