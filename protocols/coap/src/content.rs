//! Content-Format numbers and media types (the IANA registry "CoAP Content-Formats"), so that one content type travels over MQTT, HTTP and CoAP.

/// A few that the gateway itself speaks.
pub const TEXT_PLAIN: u16 = 0;
pub const LINK_FORMAT: u16 = 40;
pub const OCTET_STREAM: u16 = 42;
pub const JSON: u16 = 50;
pub const CBOR: u16 = 60;
pub const COSE_SIGN1: u16 = 18;
pub const SENML_JSON: u16 = 110;
pub const SENML_CBOR: u16 = 112;

/// Number and media type, sorted by number. Entries with a content coding (deflate) are left out: the coding would be lost on the way.
const TABLE: &[(u16, &str)] = &[
    (0, "text/plain;charset=utf-8"),
    (16, "application/cose;cose-type=\"cose-encrypt0\""),
    (17, "application/cose;cose-type=\"cose-mac0\""),
    (18, "application/cose;cose-type=\"cose-sign1\""),
    (19, "application/ace+cbor"),
    (21, "image/gif"),
    (22, "image/jpeg"),
    (23, "image/png"),
    (40, "application/link-format"),
    (41, "application/xml"),
    (42, "application/octet-stream"),
    (47, "application/exi"),
    (50, "application/json"),
    (51, "application/json-patch+json"),
    (52, "application/merge-patch+json"),
    (60, "application/cbor"),
    (61, "application/cwt"),
    (62, "application/multipart-core"),
    (63, "application/cbor-seq"),
    (64, "application/edhoc+cbor-seq"),
    (65, "application/cid-edhoc+cbor-seq"),
    (96, "application/cose;cose-type=\"cose-encrypt\""),
    (97, "application/cose;cose-type=\"cose-mac\""),
    (98, "application/cose;cose-type=\"cose-sign\""),
    (101, "application/cose-key"),
    (102, "application/cose-key-set"),
    (110, "application/senml+json"),
    (111, "application/sensml+json"),
    (112, "application/senml+cbor"),
    (113, "application/sensml+cbor"),
    (114, "application/senml-exi"),
    (115, "application/sensml-exi"),
    (256, "application/coap-group+json"),
    (257, "application/concise-problem-details+cbor"),
    (258, "application/swid+cbor"),
    (271, "application/dots+cbor"),
    (272, "application/missing-blocks+cbor-seq"),
    (280, "application/pkcs7-mime;smime-type=server-generated-key"),
    (281, "application/pkcs7-mime;smime-type=certs-only"),
    (284, "application/pkcs8"),
    (285, "application/csrattrs"),
    (286, "application/pkcs10"),
    (287, "application/pkix-cert"),
    (290, "application/aif+cbor"),
    (291, "application/aif+json"),
    (310, "application/senml+xml"),
    (311, "application/sensml+xml"),
    (320, "application/senml-etch+json"),
    (322, "application/senml-etch+cbor"),
    (340, "application/yang-data+cbor"),
    (432, "application/td+json"),
    (433, "application/tm+json"),
    (836, "application/voucher+cose"),
    (1542, "application/vnd.ocf+cbor"),
    (1543, "application/oscore"),
    (1544, "application/javascript"),
    (11542, "application/vnd.oma.lwm2m+tlv"),
    (11543, "application/vnd.oma.lwm2m+json"),
    (11544, "application/vnd.oma.lwm2m+cbor"),
    (20000, "text/css"),
    (30000, "image/svg+xml"),
];

/// The media type of a Content-Format number.
pub fn media_type(format: u16) -> Option<&'static str> {
    TABLE.binary_search_by_key(&format, |(number, _)| *number).ok().and_then(|at| TABLE.get(at)).map(|(_, name)| *name)
}

/// The Content-Format number of a media type as HTTP or MQTT spells it: type and parameters compare without case, blanks and quotes.
/// Bare `text/plain` and a UTF-8 `charset` on JSON and CBOR are what clients send, and mean the registered type.
pub fn format_of(media_type: &str) -> Option<u16> {
    let media_type = media_type.trim();
    // Nearly everybody spells it as the registry does, and comparing lengths is all that most of that search costs.
    let exact = TABLE.iter().find(|(_, name)| *name == media_type);
    exact.or_else(|| TABLE.iter().find(|(_, name)| same(name, media_type))).map(|(number, _)| *number).or_else(|| {
        let (bare, parameter) = media_type.split_once(';').unwrap_or((media_type, ""));
        let utf8 = parameter.trim().is_empty() || same(parameter, "charset=utf-8");
        let bare = bare.trim();
        match utf8 {
            true if bare.eq_ignore_ascii_case("text/plain") => Some(TEXT_PLAIN),
            true => TABLE.iter().find(|(_, name)| same(name, bare)).map(|(number, _)| *number),
            false => None,
        }
    })
}

/// Equal but for case, blanks and quotation marks.
fn same(a: &str, b: &str) -> bool {
    fn letters(text: &str) -> impl Iterator<Item = u8> {
        text.bytes().filter(|b| !matches!(b, b' ' | b'\t' | b'"')).map(|b| b.to_ascii_lowercase())
    }
    letters(a).eq(letters(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_maps_back_and_forth() {
        assert!(TABLE.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (number, name) in TABLE {
            assert_eq!(media_type(*number), Some(*name));
            assert_eq!(format_of(name), Some(*number), "{name}");
        }
    }

    #[test]
    fn media_types_as_other_protocols_spell_them_are_recognised() {
        assert_eq!(format_of("text/plain"), Some(0));
        assert_eq!(format_of("Text/Plain; charset=UTF-8"), Some(0));
        assert_eq!(format_of("text/plain; charset=latin1"), None);
        assert_eq!(format_of("application/json; charset=utf-8"), Some(50));
        assert_eq!(format_of("application/senml+json"), Some(110));
        assert_eq!(format_of("application/cose; cose-type=cose-sign1"), Some(18));
        assert_eq!(format_of("application/x-unknown"), None);
        assert_eq!(media_type(65000), None);
    }
}
