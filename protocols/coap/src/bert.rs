//! Bodies in blocks over a reliable transport (RFC 7959 with BERT, RFC 8323 section 6): blocks of 1024 bytes, several in one message.

use std::collections::VecDeque;

use crate::block::{self, Block, Untaken};
use crate::code::Code;
use crate::message::Contents;
use crate::peer::Secret;
use crate::response::Response;

/// What one connection has half here and half sent. It goes with the connection.
#[derive(Debug)]
pub(crate) struct Transfers {
    secret: Secret,
    bytes_max: usize,
    /// Bodies of requests, the one that went on last behind; together within `bytes_max`.
    up: VecDeque<(u64, Vec<u8>)>,
    /// The last long answer that cannot be made again.
    down: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    key: u64,
    code: Code,
    content_format: Option<u16>,
    bytes: Vec<u8>,
}

impl Transfers {
    /// Bodies under way; the one that did not go on for longest gives way.
    const UP_MAX: usize = 16;

    /// No body of a request, nor all of them, is longer than `bytes_max`.
    pub fn new(bytes_max: usize) -> Self {
        // Who finds two bodies with one key mixes up nobody's but his own.
        Transfers { secret: Secret::new([0; 32]), bytes_max, up: VecDeque::new(), down: None }
    }

    pub fn key(&self, contents: &Contents<'_>) -> u64 {
        block::body_key(&self.secret, contents)
    }

    /// Takes a piece of a request's body: the whole of it once it is here.
    pub fn take(&mut self, key: u64, block: Block, piece: &[u8]) -> Result<Option<Vec<u8>>, Untaken> {
        let begun = self.up.iter().position(|(of, _)| *of == key).and_then(|at| self.up.remove(at));
        let mut body = match begun {
            _ if block.number == 0 => Vec::new(),
            Some((_, body)) if body.len() == block.offset() => body,
            Some(_) | None => return Err(Untaken::Incomplete),
        };
        if body.len() + piece.len() > self.bytes_max {
            return Err(Untaken::TooLarge(self.bytes_max));
        }
        body.extend_from_slice(piece);
        if !block.more {
            return Ok(Some(body));
        }
        self.up.push_back((key, body));
        while self.up.len() > Self::UP_MAX || self.up.iter().map(|(_, body)| body.len()).sum::<usize>() > self.bytes_max
        {
            self.up.pop_front();
        }
        Ok(None)
    }

    /// Keeps an answer for the requests of its later blocks, in place of the one before.
    pub fn keep(&mut self, key: u64, response: &Response<'_>) {
        let (code, content_format) = (response.code, response.content_format);
        self.down = Some(Kept { key, code, content_format, bytes: response.payload.to_vec() });
    }

    /// Takes out the kept answer; who does not send the last of it keeps it again.
    pub fn take_kept(&mut self, key: u64) -> Option<(Code, Option<u16>, Vec<u8>)> {
        let kept = self.down.take_if(|kept| kept.key == key)?;
        Some((kept.code, kept.content_format, kept.bytes))
    }

    pub fn etag(&self, payload: &[u8]) -> [u8; 8] {
        self.secret.hash(payload).to_be_bytes()
    }
}

/// Whether a piece has a length that `block` allows: all of a block, or of several in BERT, and at the end less (RFC 7959 section 2.2).
pub(crate) fn fits(block: Block, bytes: usize) -> bool {
    match (block.exponent, block.more) {
        (Block::BERT, true) => bytes > 0 && bytes.is_multiple_of(block.bytes()),
        (Block::BERT, false) => true,
        (_, true) => bytes == block.bytes(),
        (_, false) => bytes <= block.bytes(),
    }
}

/// What a message with room for `bytes` takes of a body: whole blocks.
pub(crate) const fn size_within(bytes: usize) -> usize {
    const BLOCK_BYTES: usize = 1024;
    if bytes < BLOCK_BYTES { BLOCK_BYTES } else { bytes / BLOCK_BYTES * BLOCK_BYTES }
}
