//! A kept answer, and the bytes that it is on disk.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use portable_atomic::{AtomicU64, Ordering};
use sha2::{Digest, Sha256};

use super::{Directives, Terms, Use};

/// What is asked for, and in which form of it: both are cut hashes, so that nobody outside can make two of them alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub page: u128,
    pub variant: u128,
}

/// A whole answer to a GET.
#[derive(Debug)]
pub struct Entry {
    pub key: Key,
    /// As a client asks for it.
    pub url: Box<str>,
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub terms: Terms,
    /// How old it was at `at_ms`.
    pub age: Duration,
    pub at_ms: u64,
    /// The count of invalidations when it was asked for.
    pub seq: AtomicU64,
    /// Until then the upstream need not be asked again after an error.
    pub rest_until_ms: AtomicU64,
}

/// Bytes that are no entry, or not the one they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;

impl Entry {
    pub fn age(&self, now_ms: u64) -> Duration {
        self.age.saturating_add(Duration::from_millis(now_ms.saturating_sub(self.at_ms)))
    }

    pub fn permit(&self, asks: &Directives, now_ms: u64) -> Use {
        let permitted = self.terms.permit(asks, self.age(now_ms));
        match permitted {
            // The upstream has just failed, and failing again would take as long.
            Use::Ask { if_error: true } if now_ms < self.rest_until_ms.load(Ordering::Relaxed) => Use::WhileRevalidate,
            Use::Fresh | Use::WhileRevalidate | Use::Ask { .. } => permitted,
        }
    }

    pub fn rest(&self, until_ms: u64) {
        self.rest_until_ms.store(until_ms, Ordering::Relaxed);
    }

    pub fn is_resting(&self, now_ms: u64) -> bool {
        now_ms < self.rest_until_ms.load(Ordering::Relaxed)
    }

    /// What it costs in memory.
    pub fn cost_bytes(&self) -> u64 {
        let headers: usize = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum();
        (ENTRY_BYTES + self.url.len() + headers + self.body.len()) as u64
    }

    /// The bytes for the disk. `wall_ms` is now by the wall clock, since no other goes on while the gateway is off.
    pub fn to_bytes(&self, now_ms: u64, wall_ms: u64) -> Vec<u8> {
        let mut out = BytesMut::with_capacity(self.body.len() + 1024);
        out.put_slice(MAGIC);
        out.put_slice(&[0; DIGEST_BYTES]);
        out.put_u128(self.key.page);
        out.put_u128(self.key.variant);
        out.put_u64(wall_ms);
        let terms = &self.terms;
        for duration in [self.age(now_ms), terms.fresh, terms.while_revalidate, terms.if_error] {
            out.put_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        }
        out.put_u8(terms.must_revalidate.into());
        out.put_u16(self.status.as_u16());
        put(&mut out, self.url.as_bytes());
        out.put_u32(u32::try_from(self.headers.len()).unwrap_or(u32::MAX));
        for (name, value) in &self.headers {
            put(&mut out, name.as_str().as_bytes());
            put(&mut out, value.as_bytes());
        }
        out.put_slice(&self.body);
        let digest = digest(&out);
        if let Some(place) = out.get_mut(MAGIC.len()..MAGIC.len() + DIGEST_BYTES) {
            place.copy_from_slice(&digest);
        }
        out.into()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) has written. Where the wall clock has gone back meanwhile, the age is not known: the entry is then stale.
    ///
    /// # Errors
    /// [`Damaged`], also if it is another key's.
    pub fn from_bytes(bytes: &Bytes, key: Key, now_ms: u64, wall_ms: u64) -> Result<Self, Damaged> {
        let digest_at = MAGIC.len();
        if bytes.get(..digest_at) != Some(MAGIC)
            || bytes.get(digest_at..digest_at + DIGEST_BYTES) != Some(&digest(bytes)[..])
        {
            return Err(Damaged);
        }
        let mut from = Reader { rest: &bytes[digest_at + DIGEST_BYTES..] };
        if (from.u128()?, from.u128()?) != (key.page, key.variant) {
            return Err(Damaged);
        }
        let written_ms = from.u64()?;
        let mut duration = || from.u64().map(Duration::from_millis);
        let (age, fresh, while_revalidate, if_error) = (duration()?, duration()?, duration()?, duration()?);
        let must_revalidate = from.u8()? != 0;
        let status = StatusCode::from_u16(from.u16()?).map_err(|_| Damaged)?;
        let url = std::str::from_utf8(from.slice()?).map_err(|_| Damaged)?.into();
        let mut headers = HeaderMap::new();
        for _ in 0..from.u32()? {
            let name = HeaderName::from_bytes(from.slice()?).map_err(|_| Damaged)?;
            let value = HeaderValue::from_bytes(from.slice()?).map_err(|_| Damaged)?;
            headers.try_append(name, value).map_err(|_| Damaged)?;
        }
        let body = bytes.slice(bytes.len() - from.rest.len()..);
        let age = match wall_ms.checked_sub(written_ms) {
            Some(since) => age.saturating_add(Duration::from_millis(since)),
            None => age.max(fresh),
        };
        let terms = Terms { fresh, while_revalidate, if_error, must_revalidate };
        let rest_until_ms = AtomicU64::new(0);
        Ok(Entry { key, url, status, headers, body, terms, age, at_ms: now_ms, seq: AtomicU64::new(0), rest_until_ms })
    }

    /// The URL in the bytes of an entry, or in their beginning; not checked against damage.
    pub fn url_of(bytes: &[u8]) -> Result<&str, Damaged> {
        let mut from = Reader { rest: bytes.get(URL_AT..).ok_or(Damaged)? };
        std::str::from_utf8(from.slice()?).map_err(|_| Damaged)
    }
}

fn put(out: &mut BytesMut, text: &[u8]) {
    // Heads are bounded far below 4 GiB.
    out.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
    out.put_slice(text);
}

/// Over all that follows it.
fn digest(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    let whole = Sha256::digest(bytes.get(MAGIC.len() + DIGEST_BYTES..).unwrap_or_default());
    let mut cut = [0; DIGEST_BYTES];
    cut.copy_from_slice(&whole[..DIGEST_BYTES]);
    cut
}

struct Reader<'b> {
    rest: &'b [u8],
}

impl<'b> Reader<'b> {
    fn take(&mut self, count: usize) -> Result<&'b [u8], Damaged> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Damaged)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damaged> {
        self.take(N)?.try_into().map_err(|_| Damaged)
    }

    fn u8(&mut self) -> Result<u8, Damaged> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Damaged> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Damaged> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Damaged> {
        self.array().map(u64::from_be_bytes)
    }

    fn u128(&mut self) -> Result<u128, Damaged> {
        self.array().map(u128::from_be_bytes)
    }

    fn slice(&mut self) -> Result<&'b [u8], Damaged> {
        let count = self.u32()?;
        self.take(usize::try_from(count).map_err(|_| Damaged)?)
    }
}

const MAGIC: &[u8; 4] = b"TGC1";
const DIGEST_BYTES: usize = 16;
/// Before the URL: magic, digest, key, wall clock, four durations, one flag, status.
const URL_AT: usize = 4 + DIGEST_BYTES + 32 + 8 + 32 + 1 + 2;
/// What an entry costs beside its text.
const ENTRY_BYTES: usize = 512;
