//! What a request asks for, read from method, path and query alone.
//!
//! The engine has refused every path segment that could be confused with another path (a slash inside, `.` and `..`), so segments joined by `/` are
//! the topic that MQTT and HTTP mean.

use tidegate_coap::uri::Path;
use tidegate_coap::{Code, Observe, Request};

use crate::gateway::{Address, Part};

/// A request to the gateway itself. What stands behind the name is in the buffer given to [`parse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `POST /auth/c`
    Challenge,
    /// `POST /auth/s`
    Session,
    /// `GET /.well-known/core`
    Core,
    /// `POST /t`, `PUT /ps/T`, ...
    Publish { space: Space, retain: bool },
    /// `DELETE /ps/T`: the topic has no last value any more.
    Remove { space: Space },
    /// `GET /ps`: the topics that have a value.
    Topics,
    /// `FETCH /ps`: those that match the filter in the payload.
    Matching,
    /// `POST /rd`
    Register,
    /// `POST /rd/DEVICE`
    Renew,
    /// `DELETE /rd/DEVICE`
    Withdraw,
    /// `POST /.well-known/rd`: simple registration.
    FetchLinks,
    /// `GET /rd-lookup/res`, `GET /rd-lookup/ep`
    Lookup { endpoints: bool },
    /// `PATCH` and `iPATCH`, of the last value.
    Patch { space: Space },
    /// `GET /ps/T`, `GET /s`
    Read { space: Space },
    /// The same with Observe 0, and `/c`; `wildcard`: of many topics.
    Follow { space: Space, wildcard: bool },
}

/// Where a message goes or a value stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The mirror: a topic as MQTT would name it.
    Topic,
    /// The device API, with or without something behind the name.
    Device(Part, bool),
}

impl Space {
    /// `rest` is what [`parse`] left in its buffer.
    pub fn address(self, rest: &str) -> Address<'_> {
        match self {
            Space::Topic => Address::from_mqtt(rest),
            Space::Device(part, has_rest) => Address::Device(part, has_rest.then_some(rest)),
        }
    }
}

/// Why a request is no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCall {
    /// Nothing of ours.
    NotFound,
    /// There is such a resource, without this method.
    Method,
    Malformed(&'static str),
}

/// Reads a request; `rest` becomes the topic, stream, event type or answer behind the name.
///
/// # Errors
/// See [`NoCall`].
pub fn parse(request: &Request<'_>, rest: &mut String) -> Result<Call, NoCall> {
    let (path, method) = (&request.path, request.code());
    rest.clear();
    match (path.segment(0).unwrap_or_default(), path.len()) {
        ("auth", 2) => match path.segment(1) {
            Some("c") => only_post(method, Call::Challenge),
            Some("s") => only_post(method, Call::Session),
            _ => Err(NoCall::NotFound),
        },
        (".well-known", 2) if path.segment(1) == Some("core") => match method {
            Code::GET => Ok(Call::Core),
            _ => Err(NoCall::Method),
        },
        (".well-known", 2) if path.segment(1) == Some("rd") => only_post(method, Call::FetchLinks),
        ("rd", 1) => only_post(method, Call::Register),
        ("rd", 2) => {
            path.join_into(1, rest);
            match method {
                Code::POST => Ok(Call::Renew),
                Code::DELETE => Ok(Call::Withdraw),
                _ => Err(NoCall::Method),
            }
        }
        ("rd-lookup", 2) => match (method, path.segment(1)) {
            (Code::GET, Some("res")) => Ok(Call::Lookup { endpoints: false }),
            (Code::GET, Some("ep")) => Ok(Call::Lookup { endpoints: true }),
            (_, Some("res" | "ep")) => Err(NoCall::Method),
            _ => Err(NoCall::NotFound),
        },
        ("t", _) => device_post(request, Part::Telemetry, rest),
        ("e", _) => device_post(request, Part::Event, rest),
        ("s", 1) => state(request),
        ("c", 1) => match (method, request.observe) {
            (Code::GET, Some(Observe::Register)) => {
                rest.push('#');
                Ok(Call::Follow { space: Space::Device(Part::Command, true), wildcard: true })
            }
            (Code::GET, _) => Err(NoCall::Malformed("commands are observed")),
            _ => Err(NoCall::Method),
        },
        ("cr", 2) => answer(request, rest),
        ("ps", 1) => match method {
            Code::GET => Ok(Call::Topics),
            Code::FETCH => Ok(Call::Matching),
            _ => Err(NoCall::Method),
        },
        ("ps", 2..) => mirror(request, rest),
        _ => Err(NoCall::NotFound),
    }
}

fn only_post(method: Code, call: Call) -> Result<Call, NoCall> {
    if method == Code::POST { Ok(call) } else { Err(NoCall::Method) }
}

fn device_post(request: &Request<'_>, part: Part, rest: &mut String) -> Result<Call, NoCall> {
    if request.code() != Code::POST {
        return Err(NoCall::Method);
    }
    named(&request.path, rest)?;
    Ok(Call::Publish { space: Space::Device(part, request.path.len() > 1), retain: retain(request)? })
}

fn state(request: &Request<'_>) -> Result<Call, NoCall> {
    let space = Space::Device(Part::State, false);
    match (request.code(), request.observe) {
        (Code::GET, Some(Observe::Register)) => Ok(Call::Follow { space, wildcard: false }),
        (Code::GET, _) => Ok(Call::Read { space }),
        // The state is the last value: it is always kept.
        (Code::PUT, _) => Ok(Call::Publish { space, retain: true }),
        (Code::PATCH | Code::IPATCH, _) => Ok(Call::Patch { space }),
        _ => Err(NoCall::Method),
    }
}

fn answer(request: &Request<'_>, rest: &mut String) -> Result<Call, NoCall> {
    if request.code() != Code::POST {
        return Err(NoCall::Method);
    }
    named(&request.path, rest)?;
    let status = request.query().value("status").filter(|status| !status.is_empty());
    let status = status.ok_or(NoCall::Malformed("an answer needs ?status="))?;
    if status.contains('/') {
        return Err(NoCall::Malformed("status is one word"));
    }
    rest.push('/');
    rest.push_str(status);
    Ok(Call::Publish { space: Space::Device(Part::Answer, true), retain: false })
}

fn mirror(request: &Request<'_>, rest: &mut String) -> Result<Call, NoCall> {
    request.path.join_into(1, rest);
    if rest.is_empty() {
        return Err(NoCall::Malformed("an empty topic"));
    }
    let space = Space::Topic;
    match (request.code(), request.observe) {
        (Code::GET, Some(Observe::Register)) => {
            // A shared subscription is one session's part of a group's work; an observer has no way to give work back.
            if rest.starts_with("$share/") {
                return Err(NoCall::Malformed("not a topic filter"));
            }
            Ok(Call::Follow { space, wildcard: rest.contains(['+', '#']) })
        }
        (Code::GET, _) => Ok(Call::Read { space }),
        (Code::POST | Code::PUT, _) => Ok(Call::Publish { space, retain: retain(request)? }),
        (Code::PATCH | Code::IPATCH, _) => Ok(Call::Patch { space }),
        (Code::DELETE, _) => Ok(Call::Remove { space }),
        _ => Err(NoCall::Method),
    }
}

/// The segments behind the first; in the device API an empty one is a mistake.
fn named(path: &Path<'_>, rest: &mut String) -> Result<(), NoCall> {
    if path.segments().skip(1).any(str::is_empty) {
        return Err(NoCall::Malformed("an empty path segment"));
    }
    path.join_into(1, rest);
    Ok(())
}

fn retain(request: &Request<'_>) -> Result<bool, NoCall> {
    match request.query().value("retain") {
        None | Some("0" | "false") => Ok(false),
        Some("" | "1" | "true") => Ok(true),
        Some(_) => Err(NoCall::Malformed("retain is 0 or 1")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tidegate_coap::option::number;
    use tidegate_coap::{Builder, Endpoint, Kind, Received};

    use super::*;

    /// `call` of `METHOD path?query`, with the text behind the name; `observe` as in the option.
    fn call(method: Code, target: &str, observe: Option<u32>) -> Result<(Call, String), NoCall> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut datagram = Vec::new();
        let mut builder = Builder::datagram(&mut datagram, Kind::Confirmable, method, 1, &[]);
        builder = builder.uint_if(number::OBSERVE, observe);
        for segment in path.trim_start_matches('/').split('/') {
            builder = builder.option(number::URI_PATH, segment.as_bytes());
        }
        for argument in query.split('&').filter(|a| !a.is_empty()) {
            builder = builder.option(number::URI_QUERY, argument.as_bytes());
        }
        builder.payload(&[]);
        let mut endpoint = Endpoint::new(Default::default(), Instant::now(), [0; 32]);
        let peer = "192.0.2.1:5683".parse().unwrap();
        let Received::Request(request) = endpoint.handle_datagram(Instant::now(), peer, &datagram) else {
            panic!("{target}: not a request")
        };
        let mut rest = String::from("from before");
        parse(&request, &mut rest).map(|call| (call, rest))
    }

    #[test]
    fn the_device_api_and_the_mirror_of_the_contract() {
        let publish = |part, has_rest| Call::Publish { space: Space::Device(part, has_rest), retain: false };
        let topic = Space::Topic;
        for (method, target, expected, rest) in [
            (Code::POST, "/t", publish(Part::Telemetry, false), ""),
            (Code::POST, "/t/temp/in", publish(Part::Telemetry, true), "temp/in"),
            (Code::POST, "/e/door", publish(Part::Event, true), "door"),
            (Code::POST, "/cr/7?status=200", publish(Part::Answer, true), "7/200"),
            (Code::PUT, "/s", Call::Publish { space: Space::Device(Part::State, false), retain: true }, ""),
            (Code::GET, "/s", Call::Read { space: Space::Device(Part::State, false) }, ""),
            (Code::PUT, "/ps/a/b", Call::Publish { space: topic, retain: false }, "a/b"),
            (Code::POST, "/ps//a/?retain=1", Call::Publish { space: topic, retain: true }, "/a/"),
            (Code::GET, "/ps/a", Call::Read { space: topic }, "a"),
            (Code::DELETE, "/ps/a", Call::Remove { space: topic }, "a"),
            (Code::IPATCH, "/ps/a", Call::Patch { space: topic }, "a"),
            (Code::PATCH, "/s", Call::Patch { space: Space::Device(Part::State, false) }, ""),
            (Code::GET, "/ps", Call::Topics, ""),
            (Code::FETCH, "/ps", Call::Matching, ""),
            (Code::POST, "/rd", Call::Register, ""),
            (Code::POST, "/rd/d1", Call::Renew, "d1"),
            (Code::DELETE, "/rd/d1", Call::Withdraw, "d1"),
            (Code::POST, "/.well-known/rd", Call::FetchLinks, ""),
            (Code::GET, "/rd-lookup/res?rt=x", Call::Lookup { endpoints: false }, ""),
            (Code::GET, "/rd-lookup/ep", Call::Lookup { endpoints: true }, ""),
            (Code::POST, "/auth/c", Call::Challenge, ""),
            (Code::POST, "/auth/s", Call::Session, ""),
            (Code::GET, "/.well-known/core", Call::Core, ""),
        ] {
            assert_eq!(call(method, target, None), Ok((expected, rest.to_owned())), "{method} {target}");
        }
    }

    #[test]
    fn observe_makes_a_read_a_subscription() {
        let follow = |space, wildcard| Call::Follow { space, wildcard };
        for (target, expected, rest) in [
            ("/ps/a/b", follow(Space::Topic, false), "a/b"),
            ("/ps/a/+/c", follow(Space::Topic, true), "a/+/c"),
            ("/s", follow(Space::Device(Part::State, false), false), ""),
            ("/c", follow(Space::Device(Part::Command, true), true), "#"),
        ] {
            assert_eq!(call(Code::GET, target, Some(0)), Ok((expected, rest.to_owned())), "{target}");
        }
        assert_eq!(call(Code::GET, "/ps/a", Some(1)), Ok((Call::Read { space: Space::Topic }, "a".into())));
    }

    #[test]
    fn what_is_no_call_says_why() {
        for (method, target) in [(Code::GET, "/x"), (Code::GET, ""), (Code::POST, "/auth/x"), (Code::GET, "/s/x")] {
            assert_eq!(call(method, target, None), Err(NoCall::NotFound), "{target}");
        }
        for (method, target) in [
            (Code::GET, "/t"),
            (Code::PUT, "/c"),
            (Code::POST, "/s"),
            (Code::GET, "/auth/c"),
            (Code::POST, "/ps"),
            (Code::FETCH, "/ps/a"),
        ] {
            assert_eq!(call(method, target, None), Err(NoCall::Method), "{target}");
        }
        for (method, target) in [
            (Code::POST, "/t//x"),
            (Code::POST, "/cr/7"),
            (Code::POST, "/cr/7?status=a/b"),
            (Code::PUT, "/ps/"),
            (Code::PUT, "/ps/a?retain=2"),
            (Code::GET, "/c"),
        ] {
            assert!(matches!(call(method, target, None), Err(NoCall::Malformed(_))), "{target}");
        }
    }
}
