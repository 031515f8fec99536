//! Text with places to fill in: `{word}` is one, `{{` and `}}` are braces.

use std::fmt;

/// Parsed once, filled in per request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template(Box<[Piece]>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(Box<str>),
    /// An index into the words it was parsed with.
    Word(usize),
}

/// A place that nobody fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unknown(String);

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{{{}}}` is not known", self.0)
    }
}

impl Template {
    /// # Errors
    /// The first word that is not one of `words`, or a brace without its other half.
    pub fn parse(text: &str, words: &[&str]) -> Result<Self, Unknown> {
        let mut pieces = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            plain.push_str(before);
            if let Some(after) = from.strip_prefix("{{").or_else(|| from.strip_prefix("}}")) {
                plain.push_str(from.get(..1).unwrap_or_default());
                rest = after;
                continue;
            }
            let Some((word, after)) = from.strip_prefix('{').and_then(|from| from.split_once('}')) else {
                return Err(Unknown(from.trim_start_matches('{').to_owned()));
            };
            let index = words.iter().position(|known| *known == word).ok_or_else(|| Unknown(word.to_owned()))?;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain).into()));
            }
            pieces.push(Piece::Word(index));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain.into()));
        }
        Ok(Template(pieces.into()))
    }

    /// `value` is asked for each word by its index.
    pub fn fill<'v>(&self, mut value: impl FnMut(usize) -> &'v str) -> String {
        let mut text = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(plain) => text.push_str(plain),
                Piece::Word(index) => text.push_str(value(*index)),
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [&str; 2] = ["host", "path"];

    #[test]
    fn places_are_filled_and_doubled_braces_are_braces() {
        let fill = |text| Template::parse(text, &WORDS).unwrap().fill(|index| ["h", "/p"][index]);
        assert_eq!(fill("https://{host}{path}?x={{}}"), "https://h/p?x={}");
        assert_eq!(fill(""), "");
        assert_eq!(fill("plain"), "plain");
    }

    #[test]
    fn an_unknown_place_is_named() {
        for (text, unknown) in [("{x}", "x"), ("a{", ""), ("{host", "host"), ("}", "}")] {
            assert_eq!(Template::parse(text, &WORDS), Err(Unknown(unknown.to_owned())), "{text}");
        }
    }
}
