//! The admin API from the outside: what `status`, `top`, `tail` and `spool` ask the running gateway.
//!
//! The address is what the gateway wrote into its data folder, else what the configuration says; the token is the configuration's.

use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::{Context, Failure};
use crate::config::Config;

pub struct AdminClient {
    runtime: tokio::runtime::Runtime,
    address: String,
    token: String,
}

/// What went wrong with one call.
#[derive(Debug)]
pub enum Trouble {
    /// Nobody listens there, or not an admin API: a stopped gateway.
    Unreachable(String),
    /// It answered, and the answer is no.
    Refused { status: StatusCode, title: String },
}

impl AdminClient {
    pub fn find(context: &Context) -> Result<AdminClient, Failure> {
        AdminClient::of(&context.load()?.config)
    }

    pub fn of(config: &Config) -> Result<AdminClient, Failure> {
        if config.admin.token.is_empty() {
            return Err(Failure::input("the admin API is closed: `admin.token` is empty").help(
                "put a secret of at least 16 characters into a file and set token = \"${file:admin.token}\" in [admin]",
            ));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Failure::unavailable(format!("cannot start: {error}")))?;
        let running = config.gateway.data_dir.join(crate::RUNNING_FILE);
        let running = std::fs::read_to_string(running).unwrap_or_default();
        let running: Value = serde_json::from_str(&running).unwrap_or_default();
        let address = running["admin"].as_str().unwrap_or(&config.admin.bind).to_owned();
        Ok(AdminClient { runtime, address, token: config.admin.token.trim().to_owned() })
    }

    pub fn get(&self, path: &str) -> Result<Value, Trouble> {
        self.call(Method::GET, path)
    }

    pub fn delete(&self, path: &str) -> Result<Value, Trouble> {
        self.call(Method::DELETE, path)
    }

    /// One request on one connection; the JSON of a success.
    fn call(&self, method: Method, path: &str) -> Result<Value, Trouble> {
        let exchange = async {
            let mut answer = self.send(method, path).await?;
            let status = answer.status();
            let body = Limited::new(answer.body_mut(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| self.unreachable(&error))?.to_bytes();
            judge(status, &body)
        };
        let answered = self.runtime.block_on(async { tokio::time::timeout(DEADLINE, exchange).await });
        answered.map_err(|_| self.unreachable(&"no answer in time"))?
    }

    /// Reads the answer line by line until it ends or `line` says stop.
    pub fn follow(&self, path: &str, mut line: impl FnMut(&str) -> Result<bool, Failure>) -> Result<(), Failure> {
        self.runtime.block_on(async {
            let opened = tokio::time::timeout(DEADLINE, self.send(Method::GET, path)).await;
            let answer = opened.map_err(|_| self.unreachable(&"no answer in time")).and_then(|sent| sent);
            let mut answer = answer.map_err(Failure::from)?;
            if answer.status() != StatusCode::OK {
                let body = Limited::new(answer.body_mut(), ANSWER_BYTES_MAX).collect().await;
                let body = body.map(|body| body.to_bytes()).unwrap_or_default();
                return judge(answer.status(), &body).map(|_| ()).map_err(Failure::from);
            }
            let mut buffer = Vec::new();
            while let Some(frame) = answer.frame().await {
                let frame = frame.map_err(|error| Failure::from(self.unreachable(&error)))?;
                buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let complete: Vec<u8> = buffer.drain(..=end).collect();
                    if !line(String::from_utf8_lossy(&complete).trim_end())? {
                        return Ok(());
                    }
                }
                if buffer.len() > ANSWER_BYTES_MAX {
                    return Err(Failure::unavailable("the gateway sent a line without end"));
                }
            }
            Ok(())
        })
    }

    async fn send(&self, method: Method, path: &str) -> Result<Response<Incoming>, Trouble> {
        let stream = tokio::net::TcpStream::connect(&self.address).await.map_err(|error| self.unreachable(&error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.unreachable(&error))?;
        // Ends with the answer's body, or with the runtime.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .header("host", &self.address)
            .header("authorization", format!("Bearer {}", self.token))
            .body(Empty::<bytes::Bytes>::new())
            .map_err(|error| self.unreachable(&error))?;
        sender.send_request(request).await.map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, why: &dyn std::fmt::Display) -> Trouble {
        Trouble::Unreachable(format!("no gateway answers at {}: {why}", self.address))
    }
}

fn judge(status: StatusCode, body: &[u8]) -> Result<Value, Trouble> {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    if status.is_success() {
        return Ok(json);
    }
    let title = json["title"].as_str().unwrap_or("no reason given").to_owned();
    Err(Trouble::Refused { status, title })
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreachable(what) => Failure::unavailable(what).help("is it running? `tidegate run` starts it"),
            Trouble::Refused { status: StatusCode::UNAUTHORIZED, .. } => {
                Failure::input("the gateway does not take this admin token")
                    .help("it was started with another one; `--config FILE` names the configuration it runs on")
            }
            Trouble::Refused { status, title } => Failure::input(format!("the gateway refused: {title} ({status})")),
        }
    }
}

const DEADLINE: Duration = Duration::from_secs(10);
/// Ten thousand rows of the ledger fit.
const ANSWER_BYTES_MAX: usize = 16 << 20;
