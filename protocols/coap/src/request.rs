//! A request as the application sees it, and the checks of its options that come before (RFC 7252 section 5.4).

use std::borrow::Cow;
use std::net::SocketAddr;

use crate::block::Block;
use crate::code::Code;
use crate::endpoint::Handle;
use crate::message::Contents;
use crate::option::{self, number};
use crate::uri::{Path, Query};

/// One request. Borrowed from the datagram; the payload is owned only when it was put together from blocks.
#[derive(Clone, Debug)]
pub struct Request<'d> {
    pub handle: Handle,
    pub peer: SocketAddr,
    /// CON, or any request over TCP: the sender wants to be told.
    pub confirmable: bool,
    /// Code, token and every option, for what has no field of its own.
    pub contents: Contents<'d>,
    pub path: Path<'d>,
    pub payload: Cow<'d, [u8]>,
    pub observe: Option<Observe>,
}

/// What a GET or FETCH wants beside its answer (RFC 7641 section 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Observe {
    /// Answer with [`crate::Endpoint::observe`] to register the observer, with `respond` to decline.
    Register,
    /// The engine has already removed the observer.
    Deregister,
}

impl<'d> Request<'d> {
    pub fn code(&self) -> Code {
        self.contents.code
    }

    pub fn query(&self) -> Query<'d> {
        Query::of(self.contents)
    }

    pub fn content_format(&self) -> Option<u16> {
        self.contents.content_format()
    }

    /// Size1: how large the sender says that the body is (RFC 7959 section 4).
    pub fn size_hint(&self) -> Option<u32> {
        self.contents.uint(number::SIZE1)
    }
}

/// What the engine itself says no to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// 4.02: a critical option that is unknown, repeated, or of an impossible length or value.
    BadOption,
    /// 4.00: a path that could be confused with another.
    BadRequest,
    /// 4.05: a method outside RFC 7252 and RFC 8132.
    MethodNotAllowed,
    /// 5.05: Proxy-Uri and Proxy-Scheme.
    ProxyingNotSupported,
}

impl Refused {
    pub const fn code(self) -> Code {
        match self {
            Refused::BadOption => Code::BAD_OPTION,
            Refused::BadRequest => Code::BAD_REQUEST,
            Refused::MethodNotAllowed => Code::METHOD_NOT_ALLOWED,
            Refused::ProxyingNotSupported => Code::PROXYING_NOT_SUPPORTED,
        }
    }
}

/// What the engine needs to know of a request's options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inspected<'d> {
    pub path: Path<'d>,
    pub block1: Option<Block>,
    pub block2: Option<Block>,
    pub observe: Option<Observe>,
    /// Bits of RFC 7967: 2, 8 and 16 for the classes that the sender does not want.
    pub no_response: u8,
    pub echo: Option<&'d [u8]>,
}

/// Walks the options once.
pub(crate) fn inspect<'d>(contents: Contents<'d>) -> Result<Inspected<'d>, Refused> {
    inspect_with(contents, Block::parse)
}

/// The same, of a request over a reliable transport.
pub(crate) fn inspect_reliable<'d>(contents: Contents<'d>) -> Result<Inspected<'d>, Refused> {
    inspect_with(contents, Block::parse_reliable)
}

fn inspect_with<'d>(contents: Contents<'d>, block: fn(&[u8]) -> Option<Block>) -> Result<Inspected<'d>, Refused> {
    if !contents.code.is_known_method() {
        return Err(Refused::MethodNotAllowed);
    }
    let (mut block1, mut block2, mut observe, mut no_response, mut echo) = (None, None, None, 0, None);
    let mut last = 0;
    for (n, value) in contents.options() {
        let recognised = option::definition(n).is_some_and(|d| {
            let length = usize::from(d.length_min)..=usize::from(d.length_max);
            // A repetition of what must not repeat counts as unrecognised (section 5.4.5), and so does a wrong length (5.4.3).
            length.contains(&value.len()) && (d.repeatable || n != last)
        });
        last = n;
        if matches!(n, number::PROXY_URI | number::PROXY_SCHEME) {
            return Err(Refused::ProxyingNotSupported);
        }
        if option::is_critical(n) && !(recognised && option::is_understood_critical(n)) {
            return Err(Refused::BadOption);
        }
        if !recognised {
            continue;
        }
        match n {
            number::BLOCK1 => block1 = Some(block(value).ok_or(Refused::BadOption)?),
            number::BLOCK2 => block2 = Some(block(value).ok_or(Refused::BadOption)?),
            number::URI_HOST | number::URI_QUERY if std::str::from_utf8(value).is_err() => {
                return Err(Refused::BadOption);
            }
            number::OBSERVE if contents.code.is_safe() => {
                observe = match option::uint32(value) {
                    Some(0) => Some(Observe::Register),
                    Some(1) => Some(Observe::Deregister),
                    _ => None,
                }
            }
            number::NO_RESPONSE => no_response = value.first().copied().unwrap_or(0),
            number::ECHO => echo = Some(value),
            _ => {}
        }
    }
    let path = Path::of(contents).map_err(|_| Refused::BadRequest)?;
    Ok(Inspected { path, block1, block2, observe, no_response, echo })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MessageView;

    fn refused(datagram: &[u8]) -> Option<Refused> {
        inspect(MessageView::parse(datagram).unwrap().contents).err()
    }

    #[test]
    fn critical_options_that_are_unknown_repeated_or_malformed_are_refused() {
        assert_eq!(refused(b"\x40\x01\0\0\x90"), Some(Refused::BadOption), "OSCORE");
        assert_eq!(refused(b"\x40\x01\0\0\xd0\xfe"), Some(Refused::BadOption), "267");
        assert_eq!(refused(b"\x40\x01\0\0\x30"), Some(Refused::BadOption), "empty Uri-Host");
        assert_eq!(refused(b"\x40\x01\0\0\x31a\x01b"), Some(Refused::BadOption), "two Uri-Host");
        assert_eq!(refused(b"\x40\x01\0\0\xd1\x04\x32\x01\x32"), Some(Refused::BadOption), "two Accept");
        assert_eq!(refused(b"\x40\x01\0\0\xd1\x02\xff"), Some(Refused::BadOption), "query not UTF-8");
        assert_eq!(refused(b"\x40\x01\0\0\xd1\x0a\x07"), Some(Refused::BadOption), "Block2 size 7");
        assert_eq!(refused(b"\x40\x01\0\0\xd1\x16x"), Some(Refused::ProxyingNotSupported));
        assert_eq!(refused(b"\x40\x08\0\0"), Some(Refused::MethodNotAllowed));
        assert_eq!(refused(b"\x40\x01\0\0\xb3a/b"), Some(Refused::BadRequest));
        assert_eq!(refused(b"\x40\x01\0\0\xb2.."), Some(Refused::BadRequest));
    }

    #[test]
    fn elective_options_that_are_unknown_repeated_or_malformed_are_ignored() {
        assert_eq!(refused(b"\x40\x01\0\0\xd0\xff"), None, "268");
        assert_eq!(refused(b"\x40\x01\0\0\x60\x00"), None, "two Observe");
        assert_eq!(refused(b"\x40\x01\0\0\x64abcd"), None, "Observe too long");
        assert_eq!(refused(b"\x40\x01\0\0\xd4\x02abcd"), None, "a long query");
    }
}
