//! The operator's door: health, metrics, the admin API and the dashboard, on an address of its own.
//!
//! `/livez`, `/readyz` and `/metrics` answer anybody who reaches the address (loopback by default), as probes and scrapers cannot log in.
//! Everything under `/api/v1` wants `Authorization: Bearer TOKEN` with the token of `[admin]`, compared in constant time; without a configured
//! token the API is closed. Runs on the control runtime: nothing here touches a worker.

mod api;
mod tail;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::gateway::Gateway;
use crate::telemetry;

/// The `[admin]` table.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the admin API, /metrics, /livez, /readyz and the dashboard listen. Keep it on loopback or a management network: it speaks plain HTTP.
    pub bind: String,
    /// The bearer token of the admin API, at least 16 characters; best "${file:admin.token}". Empty: the API is closed, health and metrics stay open.
    #[schemars(extend("secret" = true))]
    pub token: String,
}

impl Default for Config {
    fn default() -> Self {
        Config { bind: "127.0.0.1:9883".into(), token: String::new() }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("bind", &self.bind).finish_non_exhaustive()
    }
}

/// One line of `/readyz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub ok: bool,
    /// What is wrong, or a word on what is right.
    pub detail: String,
}

/// What the admin side needs to know from those it may not import.
pub trait Facts: Send + Sync {
    /// The readiness checks, each looked at now.
    fn checks(&self) -> Vec<Check>;
    /// Listeners as they are bound.
    fn listeners(&self) -> Vec<ListenerFacts>;
    /// Upstreams and their endpoints, as JSON for people and programs.
    fn upstreams(&self) -> serde_json::Value;
    /// Reads the configuration again; the text is for the operator either way.
    fn reload(&self) -> Result<String, String>;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListenerFacts {
    pub name: String,
    pub address: String,
    pub transport: &'static str,
}

pub(crate) struct Admin {
    gateway: Arc<Gateway>,
    facts: Arc<dyn Facts>,
    token: String,
    started: Instant,
    shutdown: CancellationToken,
}

type Shared = State<Arc<Admin>>;

/// Serves until `shutdown`.
///
/// # Errors
/// The socket fails for good.
pub async fn serve(
    listener: TcpListener,
    config: &Config,
    gateway: Arc<Gateway>,
    facts: Arc<dyn Facts>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let router = router(config, gateway, facts, shutdown.clone());
    axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.cancelled().await }).await
}

fn router(config: &Config, gateway: Arc<Gateway>, facts: Arc<dyn Facts>, shutdown: CancellationToken) -> Router {
    let admin = Admin { gateway, facts, token: config.token.clone(), started: Instant::now(), shutdown };
    let admin = Arc::new(admin);
    Router::new()
        .route("/", get(dashboard))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .nest("/api/v1", api::router(admin.clone()))
        .with_state(admin)
}

/// The page holds no secret; what it shows comes from the API, for who has the token. Nothing foreign can run in it or frame it.
async fn dashboard() -> Response {
    const POLICY: &str = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'";
    let headers = [(header::CONTENT_SECURITY_POLICY, POLICY), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (headers, Html(include_str!("dashboard.html"))).into_response()
}

async fn readyz(State(admin): Shared) -> Response {
    let mut checks = admin.facts.checks();
    let draining = admin.gateway.is_draining();
    checks.push(Check {
        name: "accepting",
        ok: !draining,
        detail: if draining { "draining".into() } else { "yes".into() },
    });
    let ready = checks.iter().all(|check| check.ok);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(serde_json::json!({ "ready": ready, "checks": checks }))).into_response()
}

async fn metrics(State(admin): Shared) -> Response {
    admin.gateway.spool.export_metrics();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry::render()).into_response()
}

impl Admin {
    /// Whether the request carries the admin token. The comparison takes the same time whatever is wrong with it.
    fn is_operator(&self, headers: &HeaderMap) -> bool {
        use sha2::{Digest, Sha256};
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(given) = given.and_then(|value| value.strip_prefix("Bearer ")) else { return false };
        if self.token.is_empty() {
            return false;
        }
        // Equal lengths by hashing, then no early exit.
        let (a, b) = (Sha256::digest(given.trim()), Sha256::digest(&self.token));
        a.iter().zip(b.iter()).fold(0u8, |difference, (x, y)| difference | (x ^ y)) == 0
    }
}
