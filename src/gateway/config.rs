//! The `[gateway]` table.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Who this gateway is and where it keeps its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The gateway's name: the first part of every message id and the `ce-source` of what it forwards. 1 to 64 characters out of A-Z a-z 0-9 . _ -
    #[schemars(regex(pattern = r"^[A-Za-z0-9._-]{1,64}$"))]
    pub name: String,
    /// Where the registry, the spool and the gateway key live; relative to the configuration file.
    #[schemars(extend("format" = "path"))]
    pub data_dir: PathBuf,
    /// Worker threads: "auto" (one per core) or a number from 1 to 256. Each has its own sockets and upstream connections.
    pub workers: Workers,
    /// The path under which the device API (/telemetry, /event, /command, /state), /topics, /auth and /oauth2 live over HTTP. "/" puts them at the top;
    /// "/gw" keeps them clear of a proxied site.
    #[schemars(regex(pattern = r"^(/|(/[A-Za-z0-9._~-]+)+)$"))]
    pub device_api_prefix: String,
    /// Whether the gateway keeps a retained message at dev/DEVICE/presence that says if the device is connected.
    pub presence: bool,
    /// How often the `$SYS/broker/...` topics are published to those who are subscribed to them, in seconds.
    #[schemars(range(min = 1, max = 86400))]
    pub sys_interval_secs: u32,
    /// What becomes of a publish that is refused over MQTT 3.1.1, which has no words for it: "close" ends the connection, "drop" acknowledges the
    /// message and throws it away. Messages that are too fast or find no room are neither: they wait.
    pub mqtt311_refused: Mqtt311Refused,
    /// Minutes east of UTC, for the `hours` of policy rules. -720 to 840.
    #[schemars(range(min = -720, max = 840))]
    pub utc_offset_minutes: i32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: "tidegate".into(),
            data_dir: "data".into(),
            workers: Workers::Auto,
            device_api_prefix: "/".into(),
            presence: true,
            sys_interval_secs: 10,
            mqtt311_refused: Mqtt311Refused::Close,
            utc_offset_minutes: 0,
        }
    }
}

/// See [`Config::mqtt311_refused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mqtt311Refused {
    Close,
    Drop,
}

/// `"auto"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    Auto,
    Count(u16),
}

impl Workers {
    const COUNT_MAX: u16 = 256;
    const ALLOWED: &'static str = "\"auto\" or a number from 1 to 256";

    /// The number of threads to start, at least 1.
    pub fn count(self) -> usize {
        match self {
            Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from),
            Workers::Count(count) => usize::from(count.max(1)),
        }
    }
}

impl Serialize for Workers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Workers::Auto => serializer.serialize_str("auto"),
            Workers::Count(count) => serializer.serialize_u16(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Workers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u16),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(count) if (1..=Workers::COUNT_MAX).contains(&count) => Ok(Workers::Count(count)),
            Written::Text(text) if text == "auto" => Ok(Workers::Auto),
            Written::Number(_) | Written::Text(_) => Err(serde::de::Error::custom(Workers::ALLOWED)),
        }
    }
}

impl schemars::JsonSchema for Workers {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Workers".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": Workers::COUNT_MAX }] })
    }
}
