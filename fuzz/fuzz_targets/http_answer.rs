//! What an upstream answers: head and body, however it is cut.
#![no_main]

use bytes::BytesMut;
use http::Method;
use libfuzzer_sys::fuzz_target;
use tidegate_http::body::{Decoder, Piece};
use tidegate_http::response::take_head;

/// Status, the bytes of the body, and whether it ended; None is malformed.
fn read(bytes: &[u8], step: usize, method: &Method) -> Option<(Option<u16>, Vec<u8>, bool)> {
    let (mut buffer, mut found, mut data) = (BytesMut::new(), None, Vec::new());
    for piece in bytes.chunks(step) {
        buffer.extend_from_slice(piece);
        if found.is_none() {
            let Some(head) = take_head(&mut buffer, method).ok()? else { continue };
            found = Some((head.status.as_u16(), Decoder::new(head.length)));
        }
        let Some((_, decoder)) = &mut found else { continue };
        loop {
            match decoder.next(&mut buffer).ok()? {
                Piece::Data(bytes) => data.extend_from_slice(&bytes),
                Piece::Trailers(_) => {}
                Piece::Wanting | Piece::End => break,
            }
        }
    }
    let ended = found.as_ref().is_some_and(|(_, decoder)| decoder.is_ended());
    Some((found.map(|(status, _)| status), data, ended))
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let method = if step & 0x80 == 0 { Method::GET } else { Method::HEAD };
    let whole = read(bytes, bytes.len().max(1), &method);
    let pieces = read(bytes, usize::from(step & 0x7f) + 1, &method);
    // What is malformed early in pieces may be cut off by the end of the input; what is read both ways is read alike.
    if let (Some(whole), Some(pieces)) = (whole, pieces) {
        assert_eq!(whole, pieces);
    }
});
