//! The pretend cloud: an HTTP backend and an MQTT broker (rumqttd), both in this process, and a way to cut them off.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use base64::Engine;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;

/// What arrived, by device.
#[derive(Default)]
pub struct Arrivals {
    /// Numbers of the readings that the HTTP backend has, each once.
    pub readings: Mutex<HashMap<String, HashSet<u64>>>,
    /// Message ids seen; one that comes again is a duplicate, to be recognised by its id.
    ids: Mutex<HashSet<String>>,
    pub requests: portable_atomic::AtomicU64,
    pub duplicates: portable_atomic::AtomicU64,
    /// Messages at the broker.
    pub at_broker: portable_atomic::AtomicU64,
}

/// The running cloud.
pub struct Cloud {
    pub http: SocketAddr,
    pub mqtt: SocketAddr,
    pub arrivals: Arc<Arrivals>,
    up: watch::Sender<bool>,
}

impl Cloud {
    /// Starts both on free ports of the loopback interface.
    pub async fn start() -> io::Result<Self> {
        let arrivals = Arc::new(Arrivals::default());
        let (up, watch) = watch::channel(true);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let http = listener.local_addr()?;
        tokio::spawn(backend(listener, watch, arrivals.clone()));
        let mqtt = start_broker(arrivals.clone())?;
        Ok(Cloud { http, mqtt, arrivals, up })
    }

    /// Cuts the HTTP backend off, or brings it back: connections are reset, new ones refused.
    pub fn set_up(&self, up: bool) {
        self.up.send_replace(up);
    }

    pub fn is_up(&self) -> bool {
        *self.up.borrow()
    }
}

async fn backend(mut listener: TcpListener, mut up: watch::Receiver<bool>, arrivals: Arc<Arrivals>) {
    let Ok(address) = listener.local_addr() else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            changed = up.changed() => {
                if changed.is_err() {
                    return;
                }
                if *up.borrow() {
                    continue;
                }
                // A closed listener answers with a reset, as a dead backend does.
                drop(listener);
                if up.wait_for(|up| *up).await.is_err() {
                    return;
                }
                match rebind(address) {
                    Ok(again) => listener = again,
                    Err(error) => return tracing::error!(%error, "the pretend cloud cannot come back"),
                }
                continue;
            }
        };
        let Ok((stream, _)) = accepted else { continue };
        let (arrivals, mut up) = (arrivals.clone(), up.clone());
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| receive(request, arrivals.clone()));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                _ = up.wait_for(|up| !*up) => {}
            }
        });
    }
}

fn rebind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(128)
}

async fn receive(request: Request<Incoming>, arrivals: Arc<Arrivals>) -> Result<Response<Full<Bytes>>, Infallible> {
    let is_health_check = request.method() == hyper::Method::GET;
    let status = match request.into_body().collect().await {
        Ok(_) if is_health_check => StatusCode::OK,
        Ok(body) => {
            arrivals.take_batch(&body.to_bytes());
            StatusCode::ACCEPTED
        }
        Err(_) => StatusCode::BAD_REQUEST,
    };
    let mut response = Response::new(Full::new(Bytes::new()));
    *response.status_mut() = status;
    Ok(response)
}

impl Arrivals {
    /// Reads a batch of newline-delimited CloudEvents (`docs/uplink.md`).
    fn take_batch(&self, body: &[u8]) {
        self.requests.fetch_add(1, portable_atomic::Ordering::Relaxed);
        for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let Ok(event) = serde_json::from_slice::<Value>(line) else { continue };
            if let Some(id) = event["id"].as_str()
                && !self.ids.lock().insert(id.to_owned())
            {
                self.duplicates.fetch_add(1, portable_atomic::Ordering::Relaxed);
            }
            let reading = match event.get("data") {
                Some(data) => data.clone(),
                None => decode_base64(&event["data_base64"]),
            };
            if let (Some(device), Some(number)) = (reading["device"].as_str(), reading["n"].as_u64()) {
                self.readings.lock().entry(device.to_owned()).or_default().insert(number);
            }
        }
    }
}

fn decode_base64(value: &Value) -> Value {
    let bytes = value.as_str().and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok());
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or(Value::Null)
}

/// Runs rumqttd on a free port, in threads of its own; they end with the process.
fn start_broker(arrivals: Arc<Arrivals>) -> io::Result<SocketAddr> {
    // rumqttd binds by itself and does not say where, so a port is found first.
    let address = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let config: rumqttd::Config = serde_json::from_value(json!({
        "id": 0,
        "router": {
            "id": 0, "max_connections": 32, "max_outgoing_packet_count": 200,
            "max_segment_size": 1 << 20, "max_segment_count": 4,
        },
        "v5": { "1": {
            "name": "cloud", "listen": address.to_string(), "next_connection_delay_ms": 1,
            "connections": {
                "connection_timeout_ms": 10_000, "max_payload_size": 262_144, "max_inflight_count": 200, "dynamic_filters": true,
            },
        }},
    }))
    .map_err(io::Error::other)?;
    let mut broker = rumqttd::Broker::new(config);
    let (mut link, mut messages) = broker.link("cloud").map_err(io::Error::other)?;
    link.subscribe("#").map_err(io::Error::other)?;
    std::thread::Builder::new().name("cloud-broker".into()).spawn(move || {
        if let Err(error) = broker.start() {
            tracing::error!(%error, "the pretend broker has ended");
        }
    })?;
    std::thread::Builder::new().name("cloud-reader".into()).spawn(move || {
        // The link has to live as long as its receiver is read.
        let _link = link;
        while let Ok(notification) = messages.recv() {
            if let Some(rumqttd::Notification::Forward(_)) = notification {
                arrivals.at_broker.fetch_add(1, portable_atomic::Ordering::Relaxed);
            }
        }
    })?;
    Ok(address)
}
