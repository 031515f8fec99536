//! `/api/v1`: what the CLI and the dashboard ask for.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use portable_atomic::Ordering;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Admin, Shared, tail};
use crate::message::CloseReason;
use crate::session::Session;

pub(super) fn router(admin: Arc<Admin>) -> Router<Arc<Admin>> {
    Router::new()
        .route("/status", get(status))
        .route("/sessions", get(sessions))
        .route("/sessions/{id}", delete(close_session))
        .route("/spool", get(spool))
        .route("/spool/ledger", get(ledger))
        .route("/spool/{sink}", delete(drop_sink))
        .route("/cache", get(cache).delete(purge))
        .route("/upstreams", get(|State(admin): Shared| async move { Json(admin.facts.upstreams()) }))
        .route("/reload", post(reload))
        .route("/tail", get(tail::tail))
        .layer(middleware::from_fn_with_state(admin, authorize))
}

async fn authorize(State(admin): Shared, request: Request, next: Next) -> Response {
    if admin.is_operator(request.headers()) {
        return next.run(request).await;
    }
    let challenge = [(axum::http::header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, problem("the admin token is missing or wrong")).into_response()
}

pub(super) fn problem(detail: &str) -> Json<Value> {
    Json(json!({ "title": detail }))
}

async fn status(State(admin): Shared) -> Json<Value> {
    let gateway = &admin.gateway;
    let (live, parked) = gateway.sessions.counts();
    let mut by_protocol: BTreeMap<&str, u32> = BTreeMap::new();
    for session in gateway.sessions.live() {
        *by_protocol.entry(session.key.protocol.as_str()).or_default() += 1;
    }
    let (messages, bytes) = gateway.hub.retained_counts();
    let checks = admin.facts.checks();
    Json(json!({
        "name": gateway.config().name,
        "version": env!("CARGO_PKG_VERSION"),
        "gateway_id": gateway.identity.gateway().id.to_string(),
        "epoch": gateway.spool.epoch(),
        "uptime_secs": admin.started.elapsed().as_secs(),
        "ready": checks.iter().all(|check| check.ok) && !gateway.is_draining(),
        "checks": checks,
        "listeners": admin.facts.listeners(),
        "sessions": { "live": live, "parked": parked, "by_protocol": by_protocol },
        "subscriptions": gateway.hub.subscriptions(),
        "retained": { "messages": messages, "bytes": bytes },
        "spool": gateway.spool.stats(),
        "upstreams": admin.facts.upstreams(),
    }))
}

async fn sessions(State(admin): Shared) -> Json<Value> {
    let mut sessions = admin.gateway.sessions.live();
    sessions.sort_by_key(|session| session.id);
    Json(sessions.iter().map(|session| describe(session)).collect())
}

fn describe(session: &Session) -> Value {
    json!({
        "id": session.id.0,
        "device": session.key.device.as_ref().map(|device| device.as_str()),
        "protocol": session.key.protocol.as_str(),
        "client": session.key.client,
        "address": session.peer.to_string(),
        "since_ms": session.since_ms,
        "last_seen_ms": session.last_seen_ms.load(Ordering::Relaxed),
        "received": session.received.load(Ordering::Relaxed),
        "delivered": session.delivered.load(Ordering::Relaxed),
        "refused": session.refused.load(Ordering::Relaxed),
    })
}

async fn close_session(State(admin): Shared, Path(id): Path<u64>) -> Response {
    match admin.gateway.sessions.close_where(CloseReason::Administrative, |session| session.id.0 == id) {
        0 => (StatusCode::NOT_FOUND, problem("no such session")).into_response(),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

async fn spool(State(admin): Shared) -> Json<Value> {
    Json(json!({ "epoch": admin.gateway.spool.epoch(), "sinks": admin.gateway.spool.stats() }))
}

#[derive(Deserialize)]
struct LedgerQuery {
    rows_max: Option<usize>,
}

async fn ledger(State(admin): Shared, Query(query): Query<LedgerQuery>) -> Response {
    let rows_max = query.rows_max.unwrap_or(100).clamp(1, 10_000);
    let spool = admin.gateway.spool.clone();
    // SQLite blocks, so it is read on the blocking pool.
    match tokio::task::spawn_blocking(move || spool.ledger(rows_max)).await {
        Ok(Ok(losses)) => Json(json!(losses)).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, problem(&error.to_string())).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, problem("the ledger could not be read")).into_response(),
    }
}

async fn drop_sink(State(admin): Shared, Path(sink): Path<String>) -> Response {
    let spool = admin.gateway.spool.clone();
    let dropped = tokio::task::spawn_blocking(move || spool.drop_sink(&sink)).await;
    match dropped {
        Ok(Ok(records)) => Json(json!({ "dropped": records })).into_response(),
        Ok(Err(error)) => (StatusCode::NOT_FOUND, problem(&error.to_string())).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, problem("the sink could not be dropped")).into_response(),
    }
}

async fn cache(State(admin): Shared) -> Json<Value> {
    let (bytes, answers) = admin.gateway.cached_if_used().map(|cached| cached.held()).unwrap_or_default();
    Json(json!({ "bytes": bytes, "answers": answers }))
}

#[derive(Deserialize)]
struct Purge {
    /// A whole URL, or a path and query for every host.
    url: String,
    /// Everything that begins with it.
    #[serde(default)]
    prefix: bool,
}

async fn purge(State(admin): Shared, Query(Purge { url, prefix }): Query<Purge>) -> Response {
    // Also what an earlier run has left on disk is meant, so the cache is opened for it.
    let cached = admin.gateway.cached().clone();
    match tokio::task::spawn_blocking(move || cached.purge(&url, prefix)).await {
        Ok(purged) => Json(json!({ "purged": purged })).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, problem("the cache could not be purged")).into_response(),
    }
}

async fn reload(State(admin): Shared) -> Response {
    let facts = admin.facts.clone();
    match tokio::task::spawn_blocking(move || facts.reload()).await {
        Ok(Ok(text)) => Json(json!({ "reloaded": true, "detail": text })).into_response(),
        Ok(Err(text)) => (StatusCode::UNPROCESSABLE_ENTITY, problem(&text)).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, problem("the configuration could not be read")).into_response(),
    }
}
