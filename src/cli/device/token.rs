//! `tidegate device token`: a JWT, signed here and now by the device's key.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tidegate_auth::jwt::{Audience, Claims, NumericDate, sign};
use tidegate_auth::text;

use super::key_file::{KeyFile, Target, no_gateway};
use super::{Context, Failure, Site, device_id, random, unix_now};
use crate::units::Age;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    id: String,
    /// The device's private key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// How long it may be used, and how long the session that it opens lasts; at most 24h.
    #[arg(long, default_value = "1h", value_name = "AGE")]
    ttl: Age,
    /// The gateway's id, or its gateway.pub [default: as the key file says, else this machine's gateway].
    #[arg(long, value_name = "ID|FILE")]
    gateway: Option<String>,
}

pub(super) fn run(
    context: &Context,
    site: &impl Fn() -> Result<Site, Failure>,
    arguments: &Arguments,
) -> Result<(), Failure> {
    let id = device_id(&arguments.id)?;
    let ttl = arguments.ttl.0;
    if ttl < Duration::from_secs(1) || ttl > TTL_MAX {
        return Err(Failure::usage(format!("--ttl {}: allowed: 1s to 24h", arguments.ttl)));
    }
    let key_file = KeyFile::read(&arguments.key)?;
    let gateway = Target::find(arguments.gateway.as_deref(), &key_file, site)?.ok_or_else(no_gateway)?;
    let now = unix_now();
    let expires = now.saturating_add(ttl.as_secs());
    let claims = Claims {
        iss: id.as_str().to_owned(),
        sub: id.as_str().to_owned(),
        aud: Audience::One(gateway.id.audience()),
        iat: NumericDate(now),
        exp: NumericDate(expires),
        nbf: None,
        jti: text::base64url(&random::<16>()?),
        nonce: None,
    };
    let token = sign(&claims, &key_file.secret);
    if context.json {
        return context
            .print_json(&json!({ "token": token, "expires_in": ttl.as_secs(), "audience": gateway.id.audience() }));
    }
    context.print(&format!("{token}\n"))
}

const TTL_MAX: Duration = Duration::from_secs(86_400);
