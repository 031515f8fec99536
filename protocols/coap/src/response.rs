//! An answer as the application gives it.

use crate::build::Builder;
use crate::code::Code;
use crate::option::number;

/// Code, the options that servers send, and the payload; borrowed, because it is encoded at once.
#[derive(Clone, Copy, Debug)]
pub struct Response<'r> {
    pub code: Code,
    /// 1 to 8 bytes.
    pub etag: &'r [u8],
    pub location_path: &'r [&'r str],
    pub content_format: Option<u16>,
    /// Seconds. Absent means 60 to the receiver (RFC 7252 section 5.10.5).
    pub max_age: Option<u32>,
    /// With 4.13: the largest body that would be taken.
    pub size1: Option<u32>,
    pub echo: &'r [u8],
    pub payload: &'r [u8],
}

impl<'r> Response<'r> {
    pub const fn new(code: Code) -> Self {
        Response {
            code,
            etag: &[],
            location_path: &[],
            content_format: None,
            max_age: None,
            size1: None,
            echo: &[],
            payload: &[],
        }
    }

    /// The payload and its content format.
    pub const fn content(mut self, content_format: Option<u16>, payload: &'r [u8]) -> Self {
        self.content_format = content_format;
        self.payload = payload;
        self
    }

    /// A human-readable reason in an error (section 5.5.2).
    pub const fn diagnostic(mut self, text: &'r str) -> Self {
        self.payload = text.as_bytes();
        self
    }

    pub const fn max_age(mut self, seconds: u32) -> Self {
        self.max_age = Some(seconds);
        self
    }

    pub const fn size1(mut self, bytes: u32) -> Self {
        self.size1 = Some(bytes);
        self
    }

    pub const fn etag(mut self, etag: &'r [u8]) -> Self {
        self.etag = etag;
        self
    }

    pub const fn echo(mut self, echo: &'r [u8]) -> Self {
        self.echo = echo;
        self
    }
}

/// Options that the engine adds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Added {
    pub observe: Option<u32>,
    pub block1: Option<u32>,
    pub block2: Option<u32>,
    pub size2: Option<u32>,
}

/// Writes options in their order, and `payload`, which is the response's or one block of it.
pub(crate) fn write(response: &Response<'_>, added: Added, payload: &[u8], mut builder: Builder<'_>) {
    if let Some(etag) = response.etag.get(..response.etag.len().min(8)).filter(|e| !e.is_empty()) {
        builder = builder.option(number::ETAG, etag);
    }
    builder = builder.uint_if(number::OBSERVE, added.observe);
    for segment in response.location_path {
        builder = builder.option(number::LOCATION_PATH, segment.as_bytes());
    }
    builder = builder
        .uint_if(number::CONTENT_FORMAT, response.content_format.map(u32::from))
        .uint_if(number::MAX_AGE, response.max_age)
        .uint_if(number::BLOCK2, added.block2)
        .uint_if(number::BLOCK1, added.block1)
        .uint_if(number::SIZE2, added.size2)
        .uint_if(number::SIZE1, response.size1);
    if !response.echo.is_empty() {
        builder = builder.option(number::ECHO, response.echo);
    }
    builder.payload(payload);
}
