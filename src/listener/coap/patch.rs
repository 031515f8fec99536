//! JSON Merge Patch (RFC 7396) of a last value, for PATCH and iPATCH (RFC 8132): it is idempotent, so both mean the same.

use bytes::Bytes;
use serde_json::{Map, Value};
use tidegate_coap::{Code, content};

use super::answer::{Answer, Payload};

/// Content-Format of `application/merge-patch+json`.
pub const MERGE_PATCH: u16 = 52;

/// `old` with `patch` applied. What does not exist is patched from nothing.
///
/// # Errors
/// The answer: 4.15 for another kind of patch, 4.09 where the value is not JSON, 4.00 where the patch is not.
pub fn apply(old: Option<&[u8]>, patch: &[u8], patch_format: Option<u16>) -> Result<Bytes, Answer> {
    if patch_format != Some(MERGE_PATCH) {
        let only = Payload::Static("merge-patch+json (52) only");
        return Err(Answer { payload: only, ..Answer::new(Code::UNSUPPORTED_CONTENT_FORMAT) });
    }
    let mut value: Value = match old {
        Some(old) => serde_json::from_slice(old).map_err(|_| Answer::new(Code::CONFLICT))?,
        None => Value::Null,
    };
    let patch: Value = serde_json::from_slice(patch).map_err(|_| Answer::new(Code::BAD_REQUEST))?;
    merge(&mut value, patch);
    serde_json::to_vec(&value).map(Bytes::from).map_err(|_| Answer::new(Code::INTERNAL_SERVER_ERROR))
}

/// RFC 7396 section 2. The depth is bounded by the parser.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(&name);
        } else {
            merge(target.entry(name).or_insert(Value::Null), value);
        }
    }
}

/// What a patched value is.
pub const PATCHED_FORMAT: u16 = content::JSON;

#[cfg(test)]
mod tests {
    use super::*;

    /// The cases of RFC 7396 appendix A.
    #[test]
    fn the_cases_of_rfc_7396() {
        for (old, patch, new) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, r#"{}"#),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"["a","b"]"#, r#"["c","d"]"#, r#"["c","d"]"#),
            (r#"{"a":"b"}"#, r#"["c"]"#, r#"["c"]"#),
            (r#"{"a":"foo"}"#, "null", "null"),
            (r#"{"a":"foo"}"#, r#""bar""#, r#""bar""#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"a":1,"e":null}"#),
            ("[1,2]", r#"{"a":"b","c":null}"#, r#"{"a":"b"}"#),
            ("{}", r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            let patched = apply(Some(old.as_bytes()), patch.as_bytes(), Some(MERGE_PATCH)).unwrap();
            let (patched, new): (Value, Value) =
                (serde_json::from_slice(&patched).unwrap(), serde_json::from_str(new).unwrap());
            assert_eq!(patched, new, "{old} {patch}");
        }
        assert_eq!(apply(None, br#"{"a":1}"#, Some(MERGE_PATCH)).unwrap(), &br#"{"a":1}"#[..]);
    }

    #[test]
    fn what_cannot_be_patched_says_why() {
        let code = |old: Option<&[u8]>, patch: &[u8], format| apply(old, patch, format).unwrap_err().code;
        assert_eq!(code(None, b"{}", Some(50)), Code::UNSUPPORTED_CONTENT_FORMAT);
        assert_eq!(code(None, b"{}", None), Code::UNSUPPORTED_CONTENT_FORMAT);
        assert_eq!(code(Some(b"21.5 C"), b"{}", Some(MERGE_PATCH)), Code::CONFLICT);
        assert_eq!(code(Some(b"{}"), b"{", Some(MERGE_PATCH)), Code::BAD_REQUEST);
    }
}
