//! The flows of each protocol, from body to body: a listener passes on what it received and sends what comes back.

use serde::Serialize;
use tidegate_auth::challenge::{Asker, Peer};
use tidegate_auth::enhanced::{self, MqttChallenge, Opening};
use tidegate_auth::exchange::{ChallengeAnswer, ChallengeRequest, SessionAnswer, SessionRequest, TokenType};
use tidegate_auth::{Challenge, Proto, Transcript};

use super::clock::Now;
use super::login::{Channel, Login, Proof};
use super::{Identity, random};
use crate::message::{Protocol, Reject};

// MQTT 5 enhanced authentication.

/// What an MQTT client's opening leads to.
#[derive(Debug)]
pub enum MqttStep {
    /// Send AUTH 0x18 with `data`, keep `pending` with the connection, and wait for AUTH.
    Challenge { data: Vec<u8>, pending: Box<MqttPending> },
    /// Send CONNACK 0x00 (or AUTH 0x00 in a re-authentication) with `data`.
    Done { login: Login, data: Vec<u8> },
}

/// An authentication under way. Good for one answer.
#[derive(Debug)]
pub struct MqttPending {
    device_id: String,
    client_id: String,
    opening: Opening,
    challenge: MqttChallenge,
    issued_boot_secs: u32,
}

impl Identity {
    /// Begins an enhanced authentication: CONNECT with Authentication Method `auth::enhanced::METHOD`, or AUTH 0x19. `data` is its
    /// Authentication Data.
    ///
    /// # Errors
    /// `Malformed` if `data` is not of the contract, `Unauthenticated` (0x87) for a proof that does not hold.
    pub fn mqtt_begin(
        &self,
        username: Option<&str>,
        client_id: &str,
        data: &[u8],
        channel: &Channel,
        now: Now,
    ) -> Result<MqttStep, Reject> {
        let opening =
            Opening::parse(data).ok_or(Reject::Malformed { what: "the authentication data is not of this method" })?;
        let device_id = self.mqtt_device_id(username, client_id).unwrap_or_default().to_owned();
        let client_id = client_id.to_owned();
        if opening.signature.is_some() {
            let pending =
                MqttPending { device_id, client_id, opening, challenge: [0; 32], issued_boot_secs: now.boot_secs };
            let (login, data) = self.mqtt_verify(&pending, &[], opening.signature, channel, now)?;
            return Ok(MqttStep::Done { login, data });
        }
        let challenge = random().map_err(no_entropy)?;
        let data = enhanced::encode_challenge(&challenge, &self.gateway().id);
        let pending = MqttPending { device_id, client_id, opening, challenge, issued_boot_secs: now.boot_secs };
        Ok(MqttStep::Challenge { data, pending: Box::new(pending) })
    }

    /// Ends an enhanced authentication: `data` is the client's AUTH 0x18. Gives the login and the data for CONNACK.
    ///
    /// # Errors
    /// `Malformed` if `data` is not of the contract, `Unauthenticated` (0x87) for a proof that does not hold or comes too late.
    #[allow(clippy::needless_pass_by_value, clippy::boxed_local)] // A challenge is answered once: it is used up here.
    pub fn mqtt_answer(
        &self,
        pending: Box<MqttPending>,
        data: &[u8],
        channel: &Channel,
        now: Now,
    ) -> Result<(Login, Vec<u8>), Reject> {
        let signature = enhanced::parse_signature(data);
        if signature.is_none() {
            return Err(Reject::Malformed { what: "the authentication data is not of this method" });
        }
        let age_secs = now.boot_secs.saturating_sub(pending.issued_boot_secs);
        let fresh = age_secs < self.shared.config.load().challenge_ttl_secs;
        let signature = signature.filter(|_| fresh);
        self.mqtt_verify(&pending, &pending.challenge, signature, channel, now)
    }

    fn mqtt_verify(
        &self,
        pending: &MqttPending,
        challenge: &[u8],
        signature: Option<tidegate_auth::Signature>,
        channel: &Channel,
        now: Now,
    ) -> Result<(Login, Vec<u8>), Reject> {
        let outcome = (|| {
            let opening = &pending.opening;
            let (Some(signature), Some(channel_binding)) = (signature, channel.binding(opening.cb_type)) else {
                return Err(Reject::Unauthenticated);
            };
            let transcript = Transcript {
                proto: Proto::Mqtt,
                cb_type: opening.cb_type,
                gateway_id: &self.gateway().id,
                device_id: &pending.device_id,
                key_id: opening.key_id,
                client_nonce: &opening.client_nonce,
                challenge,
                channel_binding,
                ctx: pending.client_id.as_bytes(),
            };
            let lifetime_secs = self.shared.config.load().mqtt_login_ttl_secs.into();
            let proof = Proof { transcript, signature: &signature, lifetime_secs };
            let claimant = self.shared.claimant(&pending.device_id, opening.key_id, now);
            let login = self.shared.verify_proof(claimant, &proof, now)?;
            let ours = self.gateway_proof(&transcript, &signature)?;
            Ok((login, enhanced::encode_signature(&ours)))
        })();
        self.counted(Protocol::Mqtt, outcome)
    }

    fn gateway_proof(
        &self,
        transcript: &Transcript<'_>,
        signature: &tidegate_auth::Signature,
    ) -> Result<tidegate_auth::Signature, Reject> {
        // A part that is too long has failed verification already.
        transcript.sign_as_gateway(&self.gateway().secret, signature).map_err(|_| Reject::Unauthenticated)
    }
}

// HTTP and CoAP: challenge and session.

impl Identity {
    /// `POST /auth/challenge`: JSON in, JSON out. Costs one HMAC and keeps nothing.
    ///
    /// # Errors
    /// `Malformed` if the body is not of the contract.
    pub fn http_challenge(&self, body: &[u8], now: Now) -> Result<Vec<u8>, Reject> {
        let ask: ChallengeRequest = json(body)?;
        let challenge = self.issue_challenge(Proto::Http, &ask, Peer::Any, now)?;
        let expires_in = self.shared.config.load().challenge_ttl_secs;
        to_json(&ChallengeAnswer { challenge, gateway_id: self.gateway().id, expires_in })
    }

    /// `POST /auth/session`: JSON in, JSON with a bearer token out.
    ///
    /// # Errors
    /// `Malformed` if the body is not of the contract, `Unauthenticated` for everything that does not hold.
    pub fn http_session(&self, body: &[u8], channel: &Channel, now: Now) -> Result<Vec<u8>, Reject> {
        let request = json(body)?;
        let answer = self.open_session(Proto::Http, &request, Peer::Any, channel, now);
        to_json(&self.counted(Protocol::Http, answer)?)
    }

    /// `POST /auth/c`: CBOR in, the bare challenge out.
    ///
    /// # Errors
    /// `Malformed` if the payload is not of the contract; render it as 4.01 too.
    pub fn coap_challenge(&self, payload: &[u8], peer: std::net::SocketAddr, now: Now) -> Result<Challenge, Reject> {
        let ask = ChallengeRequest::from_cbor(payload).ok_or(NOT_OF_THE_CONTRACT)?;
        self.issue_challenge(Proto::Coap, &ask, Peer::Address(peer), now)
    }

    /// `POST /auth/s`: CBOR in, CBOR with a token out.
    ///
    /// # Errors
    /// `Malformed` if the payload is not of the contract, `Unauthenticated` for everything that does not hold; render each as 4.01.
    pub fn coap_session(&self, payload: &[u8], peer: std::net::SocketAddr, now: Now) -> Result<Vec<u8>, Reject> {
        let request = SessionRequest::from_cbor(payload).ok_or(NOT_OF_THE_CONTRACT)?;
        let answer = self.open_session(Proto::Coap, &request, Peer::Address(peer), &Channel::default(), now);
        Ok(self.counted(Protocol::Coap, answer)?.to_cbor())
    }

    fn issue_challenge(&self, proto: Proto, ask: &ChallengeRequest, peer: Peer, now: Now) -> Result<Challenge, Reject> {
        if ask.device_id.len() > crate::message::DeviceId::BYTES_MAX {
            return Err(NOT_OF_THE_CONTRACT);
        }
        let asker = Asker { proto, device_id: &ask.device_id, client_nonce: &ask.client_nonce, peer };
        let random_part = random().map_err(no_entropy)?;
        let mut keys = self.shared.challenge_keys.lock();
        if keys.is_stale(now.boot_secs) {
            keys.rotate(random().map_err(no_entropy)?, now.boot_secs);
        }
        Ok(keys.seal(now.boot_secs, random_part, &asker))
    }

    fn open_session(
        &self,
        proto: Proto,
        request: &SessionRequest,
        peer: Peer,
        channel: &Channel,
        now: Now,
    ) -> Result<SessionAnswer, Reject> {
        let channel_binding = channel.binding(request.cb_type).ok_or(Reject::Unauthenticated)?;
        let transcript = Transcript {
            proto,
            cb_type: request.cb_type,
            gateway_id: &self.gateway().id,
            device_id: &request.device_id,
            key_id: request.key_id,
            client_nonce: &request.client_nonce,
            challenge: &request.challenge,
            channel_binding,
            ctx: &[],
        };
        let asker = Asker { proto, device_id: &request.device_id, client_nonce: &request.client_nonce, peer };
        let lifetime_secs = self.shared.config.load().token_ttl_secs.into();
        let proof = Proof { transcript, signature: &request.signature, lifetime_secs };
        let claimant = self.shared.claimant(&request.device_id, request.key_id, now);
        let login = self.shared.verify_challenge_proof(&request.challenge, &asker, claimant, &proof, now)?;
        let ours = self.gateway_proof(&transcript, &request.signature)?;
        Ok(SessionAnswer {
            access_token: self.shared.token_for(&login, proto)?,
            token_type: TokenType::Bearer,
            expires_in: seconds(&login),
            gateway_signature: Some(ours),
        })
    }
}

// OAuth 2: client credentials with a JWT as client assertion (RFC 7523 section 2.2).

/// A refusal of `POST /oauth2/token`: `reject` gives the status, `code` is the `error` member (RFC 6749 section 5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OauthError {
    pub reject: Reject,
    pub code: &'static str,
}

impl OauthError {
    /// The body that RFC 6749 asks for.
    pub fn body(&self) -> Vec<u8> {
        format!(r#"{{"error":"{}"}}"#, self.code).into_bytes()
    }
}

impl Identity {
    /// `POST /oauth2/token`: a form in, JSON with a bearer token out.
    ///
    /// # Errors
    /// With the codes of RFC 6749; `invalid_client` for everything that does not hold.
    pub fn oauth_token(&self, form: &[u8], now: Now) -> Result<Vec<u8>, OauthError> {
        let malformed =
            |code| OauthError { reject: Reject::Malformed { what: "not a token request of RFC 7523" }, code };
        let form = Form::parse(form).ok_or_else(|| malformed("invalid_request"))?;
        if form.grant_type.as_deref() != Some("client_credentials") {
            return Err(malformed("unsupported_grant_type"));
        }
        if form.client_assertion_type.as_deref() != Some(ASSERTION_TYPE) {
            return Err(malformed("invalid_request"));
        }
        let assertion = form.client_assertion.ok_or_else(|| malformed("invalid_request"))?;
        let answer = (|| {
            let login = self.verify_jwt(assertion.as_bytes(), form.client_id.as_deref(), now)?;
            let ttl = u64::from(self.shared.config.load().token_ttl_secs);
            let login = login.at_most(ttl, now);
            let access_token = self.shared.token_for(&login, Proto::Http)?;
            let expires_in = seconds(&login);
            to_json(&SessionAnswer { access_token, token_type: TokenType::Bearer, expires_in, gateway_signature: None })
        })();
        self.counted(Protocol::Http, answer).map_err(|reject| match reject {
            Reject::TooFast { .. } | Reject::Full { .. } => OauthError { reject, code: "temporarily_unavailable" },
            reject => OauthError { reject, code: "invalid_client" },
        })
    }
}

/// The parameters of a token request; others are ignored (RFC 6749 section 3.2).
#[derive(Default)]
struct Form {
    grant_type: Option<String>,
    client_assertion_type: Option<String>,
    client_assertion: Option<String>,
    client_id: Option<String>,
}

impl Form {
    /// None if a parameter is there twice or is not percent-encoded UTF-8.
    fn parse(body: &[u8]) -> Option<Form> {
        let mut form = Form::default();
        for pair in body.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()) {
            let mut halves = pair.splitn(2, |byte| *byte == b'=');
            let (name, value) = (halves.next()?, halves.next().unwrap_or_default());
            let place = match name {
                b"grant_type" => &mut form.grant_type,
                b"client_assertion_type" => &mut form.client_assertion_type,
                b"client_assertion" => &mut form.client_assertion,
                b"client_id" => &mut form.client_id,
                _ => continue,
            };
            if place.replace(decode(value)?).is_some() {
                return None;
            }
        }
        Some(form)
    }
}

/// One value of `application/x-www-form-urlencoded`.
fn decode(value: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.iter().copied();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let [byte] = tidegate_auth::text::from_hex(std::str::from_utf8(&[rest.next()?, rest.next()?]).ok()?)?;
                byte
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Reject> {
    serde_json::from_slice(body).map_err(|_| NOT_OF_THE_CONTRACT)
}

fn to_json(answer: &impl Serialize) -> Result<Vec<u8>, Reject> {
    // Our own types of text and numbers always have a JSON form; were it otherwise, nobody is let in.
    serde_json::to_vec(answer).map_err(|_| Reject::Unauthenticated)
}

fn seconds(login: &Login) -> u32 {
    u32::try_from(login.lifetime.as_secs()).unwrap_or(u32::MAX)
}

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn no_entropy(error: super::Error) -> Reject {
    tracing::error!(%error, "no challenge issued");
    Reject::Full { limit: "entropy", retry_after: std::time::Duration::from_secs(1) }
}

const NOT_OF_THE_CONTRACT: Reject = Reject::Malformed { what: "not an authentication request" };
const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
