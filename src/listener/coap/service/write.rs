//! Messages from devices: published, signed, removed, patched.

use std::time::Instant;

use bytes::Bytes;
use tidegate_coap::option::number;
use tidegate_coap::{Code, Request, content};

use super::{Moment, Reply, Service, refuse};
use crate::gateway::{Address, Draft, Gateway, NotTaken, Published};
use crate::listener::coap::answer::{Answer, etag};
use crate::listener::coap::call::Space;
use crate::listener::coap::contexts::{Context, ContextId};
use crate::listener::coap::patch;
use crate::message::{Properties, Qos, Receipt, Reject};

impl Service {
    /// A message that carries its own proof (COSE_Sign1): nobody logs in, and nothing else is granted by it.
    pub(super) fn publish_signed(&mut self, now: Moment, request: &Request<'_>, space: Space, rest: &str) -> Reply {
        let peer = request.peer;
        // It costs a verification, as a login does.
        if let Err(reject) = self.gateway.admit_login(peer.ip(), now.at) {
            return Reply::Now(refuse(&reject, false));
        }
        let path: Vec<&str> = request.path.segments().collect();
        let identity = self.gateway.identity.clone();
        let signed = match identity.coap_signed(&request.payload, request.code().0, &path, now.clock) {
            Ok(signed) => signed,
            Err(NotTaken::Used) => return Reply::Now(Answer::new(Code::CONFLICT)),
            Err(NotTaken::Reject(reject)) => return Reply::Now(refuse(&reject, false)),
        };
        let found = self.contexts.find(peer, Some(&*signed.device), now.at).map(|context| context.id);
        let begun = found.map_or_else(|| self.begin(now, peer, Some(signed.device.clone()), None, u64::MAX), Ok);
        let id = match begun {
            Ok(id) => id,
            Err(reject) => return Reply::Now(refuse(&reject, true)),
        };
        let format = signed.content_format;
        self.publish(now, request, id, space, rest, Said { payload: signed.payload, format, retain: false })
    }

    fn publish(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        space: Space,
        rest: &str,
        said: Said<'_>,
    ) -> Reply {
        let size = self.check_size(said.payload.len());
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        if let Err(reject) = size {
            self.gateway.note_reject(&context.client, &reject);
            return Reply::Now(Answer::refusal(&reject, known));
        }
        match holds(&self.gateway, context, request, space.address(rest), now.at) {
            Ok(true) => {}
            Ok(false) => return Reply::Now(Answer::new(Code::PRECONDITION_FAILED)),
            Err(reject) => return Reply::Now(Answer::refusal(&reject, known)),
        }
        let draft = said.draft(qos(request));
        let done = Some((&self.completion, request.handle.to_bits()));
        match self.gateway.publish(&mut context.client, space.address(rest), draft, done, now.at) {
            Ok(Published::Done(_)) => Reply::Now(Answer::new(Code::CHANGED)),
            Ok(Published::Pending) => Reply::Later,
            Err(reject) => Reply::Now(Answer::refusal(&reject, known)),
        }
    }

    pub(super) fn remove(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        space: Space,
        rest: &str,
    ) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let draft = Draft { payload: Bytes::new(), qos: qos(request), retain: true, properties: None };
        let handle = request.handle.to_bits();
        match self.gateway.publish(
            &mut context.client,
            space.address(rest),
            draft,
            Some((&self.completion, handle)),
            now.at,
        ) {
            Ok(Published::Done(_)) => Reply::Now(Answer::new(Code::DELETED)),
            Ok(Published::Pending) => {
                self.removals.insert(handle);
                Reply::Later
            }
            Err(reject) => Reply::Now(Answer::refusal(&reject, known)),
        }
    }

    /// PATCH and iPATCH: reads, changes, publishes. Nothing keeps another writer from coming in between.
    pub(super) fn patch(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        space: Space,
        rest: &str,
    ) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let old = match self.gateway.read(&mut context.client, space.address(rest), now.at) {
            Ok(message) => Some(message),
            Err(Reject::NotFound) => None,
            Err(reject) => return Reply::Now(Answer::refusal(&reject, known)),
        };
        let text = old.as_ref().map(|message| &message.payload[..]);
        let new = match patch::apply(text, &request.payload, request.content_format()) {
            Ok(new) => new,
            Err(answer) => return Reply::Now(answer),
        };
        let is_state = matches!(space, Space::Device(_, _));
        let retain = is_state || old.is_some_and(|message| message.retain);
        let said = Said { payload: &new, format: Some(patch::PATCHED_FORMAT), retain };
        self.publish(now, request, id, space, rest, said)
    }

    /// The outcome of a request that was answered by [`Reply::Later`].
    pub fn completed(&mut self, handle: u64, outcome: &Result<Receipt, Reject>) -> Answer {
        let removal = !self.removals.is_empty() && self.removals.remove(&handle);
        match outcome {
            Ok(_) if removal => Answer::new(Code::DELETED),
            Ok(_) => Answer::new(Code::CHANGED),
            // Whoever was let publish is no stranger.
            Err(reject) => Answer::refusal(reject, true),
        }
    }
}

/// If-Match and If-None-Match (RFC 7252 section 5.10.8). They compare with the last value, so who sets one needs leave to read; nothing
/// keeps another writer from coming in between.
///
/// # Errors
/// What keeps the caller from reading.
fn holds(
    gateway: &Gateway,
    context: &mut Context,
    request: &Request<'_>,
    address: Address<'_>,
    now: Instant,
) -> Result<bool, Reject> {
    let must_be_new = request.contents.first(number::IF_NONE_MATCH).is_some();
    let mut wanted = request.contents.all(number::IF_MATCH).peekable();
    if !must_be_new && wanted.peek().is_none() {
        return Ok(true);
    }
    match gateway.read(&mut context.client, address, now) {
        Ok(message) => {
            let tag = etag(message.id);
            // An empty If-Match stands for any value that exists.
            let matches = wanted.peek().is_none() || wanted.any(|known| known.is_empty() || known == tag);
            Ok(!must_be_new && matches)
        }
        Err(Reject::NotFound) => Ok(wanted.peek().is_none()),
        Err(reject) => Err(reject),
    }
}

/// What is to be published.
pub(super) struct Said<'m> {
    pub payload: &'m [u8],
    pub format: Option<u16>,
    pub retain: bool,
}

impl Said<'_> {
    fn draft(&self, qos: Qos) -> Draft {
        // A number outside the registry names no type that another protocol could carry.
        let properties = self
            .format
            .and_then(content::media_type)
            .map(|media_type| Box::new(Properties { content_type: Some(media_type.into()), ..Properties::default() }));
        Draft { payload: Bytes::copy_from_slice(self.payload), qos, retain: self.retain, properties }
    }
}

fn qos(request: &Request<'_>) -> Qos {
    if request.confirmable { Qos::AtLeastOnce } else { Qos::AtMostOnce }
}
