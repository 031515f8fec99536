//! Uri-Path and Uri-Query as what they are: lists of segments and of arguments.
//!
//! CoAP sends a path as one option per segment, and nothing stops a sender from putting a slash into one. Joined into a string, the one segment
//! `a/b` and the two segments `a`, `b` look the same, so that a policy on the string and a router on the list would disagree. A [`Path`] therefore
//! refuses every segment that could be confused: one with a slash, `.` and `..` (which RFC 7252 section 5.10.1 forbids), bytes that are not UTF-8, and NUL.
//! What is left joins to a string that splits back to the same list.

use std::fmt;

use crate::message::Contents;
use crate::option::number;

/// A request's path: segments that cannot be confused. Borrowed; at most [`Path::SEGMENTS_MAX`] of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Path<'d> {
    contents: Contents<'d>,
    segments: usize,
    bytes: usize,
}

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathError {
    Dots,
    Slash,
    NotText,
    TooManySegments,
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PathError::Dots => "path segment . or ..",
            PathError::Slash => "path segment with a slash",
            PathError::NotText => "path segment that is not text",
            PathError::TooManySegments => "too many path segments",
        })
    }
}

impl std::error::Error for PathError {}

impl<'d> Path<'d> {
    pub const SEGMENTS_MAX: usize = 64;

    /// Reads the path of a request.
    ///
    /// # Errors
    /// A segment that could be confused with another path.
    pub fn of(contents: Contents<'d>) -> Result<Self, PathError> {
        let (mut segments, mut bytes) = (0, 0);
        for value in contents.all(number::URI_PATH) {
            segments += 1;
            bytes += value.len();
            if value == b"." || value == b".." {
                return Err(PathError::Dots);
            }
            if value.contains(&b'/') {
                return Err(PathError::Slash);
            }
            if value.contains(&0) || std::str::from_utf8(value).is_err() {
                return Err(PathError::NotText);
            }
        }
        match segments <= Self::SEGMENTS_MAX {
            true => Ok(Path { contents, segments, bytes }),
            false => Err(PathError::TooManySegments),
        }
    }

    /// The segments in order; an empty segment is one.
    pub fn segments(&self) -> impl Iterator<Item = &'d str> + use<'d> {
        // `of` has checked that each is UTF-8; the alternative cannot be reached.
        self.contents.all(number::URI_PATH).map(|value| std::str::from_utf8(value).unwrap_or_default())
    }

    pub fn segment(&self, index: usize) -> Option<&'d str> {
        self.segments().nth(index)
    }

    /// How many segments there are; 0 is the root.
    pub fn len(&self) -> usize {
        self.segments
    }

    pub fn is_empty(&self) -> bool {
        self.segments == 0
    }

    /// The segments from `skip` on, joined by `/` and without a leading one: unambiguous, because no segment contains a slash.
    /// No segments and one empty segment both give the empty string, so ask [`Path::len`] where that matters.
    pub fn join(&self, skip: usize) -> String {
        let mut joined = String::with_capacity(self.bytes + self.segments);
        self.join_into(skip, &mut joined);
        joined
    }

    /// [`Path::join`] into a buffer that is used again.
    pub fn join_into(&self, skip: usize, joined: &mut String) {
        joined.clear();
        for (at, segment) in self.segments().skip(skip).enumerate() {
            if at > 0 {
                joined.push('/');
            }
            joined.push_str(segment);
        }
    }
}

impl fmt::Debug for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.segments()).finish()
    }
}

/// A request's Uri-Query arguments, `name=value` or just `name`.
#[derive(Clone, Copy, Debug)]
pub struct Query<'d>(Contents<'d>);

impl<'d> Query<'d> {
    pub fn of(contents: Contents<'d>) -> Self {
        Query(contents)
    }

    /// `(name, value)` in order; an argument without `=` has an empty value, one that is not UTF-8 is left out.
    pub fn pairs(&self) -> impl Iterator<Item = (&'d str, &'d str)> + use<'d> {
        self.0
            .all(number::URI_QUERY)
            .filter_map(|value| std::str::from_utf8(value).ok())
            .map(|text| text.split_once('=').unwrap_or((text, "")))
    }

    /// The first value of `name`.
    pub fn value(&self, name: &str) -> Option<&'d str> {
        self.pairs().find(|(n, _)| *n == name).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;
    use crate::code::Code;
    use crate::message::{Kind, MessageView};

    fn request(options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut builder = Builder::datagram(&mut out, Kind::Confirmable, Code::GET, 1, &[]);
        for (number, value) in options {
            builder = builder.option(*number, value);
        }
        builder.payload(&[]);
        out
    }

    fn path_of(segments: &[&[u8]]) -> Result<(Vec<String>, String), PathError> {
        let options: Vec<_> = segments.iter().map(|s| (number::URI_PATH, *s)).collect();
        let datagram = request(&options);
        let path = Path::of(MessageView::parse(&datagram).unwrap().contents)?;
        Ok((path.segments().map(str::to_owned).collect(), path.join(0)))
    }

    #[test]
    fn a_segment_that_could_be_taken_for_another_path_is_refused() {
        assert_eq!(path_of(&[b"a/b"]), Err(PathError::Slash));
        assert_eq!(path_of(&[b"a", b".."]), Err(PathError::Dots));
        assert_eq!(path_of(&[b"."]), Err(PathError::Dots));
        assert_eq!(path_of(&[b"a\0"]), Err(PathError::NotText));
        assert_eq!(path_of(&[b"\xff"]), Err(PathError::NotText));
        assert_eq!(path_of(&[&b"x"[..]; 65]), Err(PathError::TooManySegments));
    }

    #[test]
    fn accepted_paths_join_to_a_string_that_splits_back() {
        for segments in [&[&b"ps"[..], b"dev", b"d1"][..], &[b"ps", b"", b"x"], &[b"...", b"%2f"], &[b"t", b""]] {
            let (list, joined) = path_of(segments).unwrap();
            assert_eq!(joined.split('/').collect::<Vec<_>>(), list);
        }
        assert_eq!(path_of(&[]).unwrap(), (vec![], String::new()));
    }

    #[test]
    fn queries_are_pairs_and_the_first_of_a_name_counts() {
        let datagram = request(&[(15, b"t=a=b"), (15, b"flag"), (15, b"t=c"), (15, b"\xff")]);
        let query = Query::of(MessageView::parse(&datagram).unwrap().contents);
        assert_eq!(query.pairs().collect::<Vec<_>>(), [("t", "a=b"), ("flag", ""), ("t", "c")]);
        assert_eq!((query.value("t"), query.value("flag"), query.value("x")), (Some("a=b"), Some(""), None));
    }
}
