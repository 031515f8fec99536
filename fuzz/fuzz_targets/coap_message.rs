//! CoAP messages: total on any datagram; what is accepted has exactly one encoding.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_coap::uri::{Path, Query};
use tidegate_coap::{Block, Builder, MessageView};

fuzz_target!(|data: &[u8]| {
    let Ok(message) = MessageView::parse(data) else { return };
    let contents = message.contents;
    let mut rebuilt = Vec::new();
    let mut builder = Builder::datagram(&mut rebuilt, message.kind, contents.code, message.message_id, contents.token);
    let mut last = 0;
    for (number, value) in contents.options() {
        assert!(number >= last, "options are in order");
        last = number;
        assert!(contents.all(number).any(|v| v == value));
        builder = builder.option(number, value);
        let _ = Block::parse(value);
    }
    builder.payload(contents.payload);
    assert_eq!(rebuilt, data);
    let _ = (contents.content_format(), contents.media_type(), contents.accept(), contents.max_age());
    let _ = (contents.observe(), contents.uri_host());
    if let Ok(path) = Path::of(contents) {
        assert_eq!(path.segments().count(), path.len());
        assert!(path.segments().all(|s| s != "." && s != ".."));
    }
    let query = Query::of(contents);
    for (name, _) in query.pairs() {
        assert!(query.value(name).is_some());
    }
});
