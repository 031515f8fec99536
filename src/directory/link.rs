//! The link format (RFC 6690 section 2), read strictly and written back.

use std::fmt::{self, Write as _};

/// A resource of a device, as it registered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// As written: a path of the device, beginning with a slash.
    pub target: Box<str>,
    /// Its segments, decoded: none holds a slash, NUL, `+` or `#`, and none is `.` or `..`.
    pub path: Vec<Box<str>>,
    pub attributes: Vec<Attribute>,
}

/// `name`, `name=value` or `name="value"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    pub name: Box<str>,
    pub value: Option<Box<str>>,
    quoted: bool,
}

/// Why a text is not a list of links, or too long a one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotLinks {
    Malformed(&'static str),
    /// More than `links_max`.
    TooMany,
}

impl Link {
    /// Whether the device says that the resource can be observed.
    pub fn is_observable(&self) -> bool {
        self.attributes.iter().any(|attribute| &*attribute.name == "obs")
    }

    /// Where values of the resource are in the one address space, below the device.
    pub fn topic_level(&self) -> String {
        let mut level = String::from("coap");
        for segment in &self.path {
            level.push('/');
            level.push_str(segment);
        }
        level
    }

    /// Whether `name` has this value: exactly, or as a prefix where it ends in `*`. Relation, type and interface may be lists.
    pub fn has(&self, name: &str, wanted: &str) -> bool {
        self.attributes.iter().filter(|attribute| &*attribute.name == name).any(|attribute| {
            let value = attribute.value.as_deref().unwrap_or_default();
            match name {
                "rt" | "if" | "rel" => value.split(' ').any(|word| fits(word, wanted)),
                _ => fits(value, wanted),
            }
        })
    }
}

/// RFC 6690 section 4.1: a trailing `*` makes it a prefix.
pub fn fits(value: &str, wanted: &str) -> bool {
    wanted.strip_suffix('*').map_or(value == wanted, |prefix| value.starts_with(prefix))
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        let Some(value) = &self.value else { return Ok(()) };
        if !self.quoted {
            return write!(f, "={value}");
        }
        f.write_str("=\"")?;
        for c in value.chars() {
            if matches!(c, '"' | '\\') {
                f.write_char('\\')?;
            }
            f.write_char(c)?;
        }
        f.write_char('"')
    }
}

/// Reads a list of links. What points beyond the device (another scheme or host, or what is said about something there) is left out: the directory
/// holds what can be asked of the device itself.
///
/// # Errors
/// See [`NotLinks`].
pub fn parse(text: &[u8], links_max: usize) -> Result<Vec<Link>, NotLinks> {
    let text = std::str::from_utf8(text).map_err(|_| NotLinks::Malformed("links that are not UTF-8"))?;
    let mut rest = Rest(text.trim_matches(BLANK));
    let mut links = Vec::new();
    let mut seen = 0;
    while !rest.0.is_empty() {
        if seen > 0 && !rest.take(',') {
            return Err(NotLinks::Malformed("something between links that is no comma"));
        }
        seen += 1;
        if seen > links_max {
            return Err(NotLinks::TooMany);
        }
        if let Some(link) = rest.link().map_err(NotLinks::Malformed)? {
            links.push(link);
        }
    }
    Ok(links)
}

struct Rest<'t>(&'t str);

impl<'t> Rest<'t> {
    fn skip_blank(&mut self) {
        self.0 = self.0.trim_start_matches(BLANK);
    }

    fn take(&mut self, c: char) -> bool {
        self.skip_blank();
        match self.0.strip_prefix(c) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    /// `None`: a link that points elsewhere.
    fn link(&mut self) -> Result<Option<Link>, &'static str> {
        if !self.take('<') {
            return Err("a link that does not begin with <");
        }
        let (target, rest) = self.0.split_once('>').ok_or("a link without >")?;
        self.0 = rest;
        if target.bytes().any(|b| b <= b' ' || matches!(b, b'<' | b'"' | 0x7f)) {
            return Err("a character that no URI has");
        }
        let mut attributes = Vec::new();
        while self.take(';') {
            if attributes.len() >= ATTRIBUTES_MAX {
                return Err("a link with too many attributes");
            }
            attributes.push(self.attribute()?);
        }
        self.skip_blank();
        let is_about_another = attributes.iter().any(|a: &Attribute| &*a.name == "anchor");
        let is_local = target.starts_with('/') && !target.starts_with("//") && !target.contains(['?', '#']);
        if !is_local || is_about_another {
            return Ok(None);
        }
        let path = segments(target)?;
        Ok(Some(Link { target: target.into(), path, attributes }))
    }

    fn attribute(&mut self) -> Result<Attribute, &'static str> {
        self.skip_blank();
        let end = self.0.find(|c: char| !is_parmname(c)).unwrap_or(self.0.len());
        let (name, rest) = self.0.split_at(end);
        if name.is_empty() {
            return Err("an attribute without a name");
        }
        self.0 = rest;
        if !self.take('=') {
            return Ok(Attribute { name: name.into(), value: None, quoted: false });
        }
        if self.take('"') {
            let value = self.quoted()?;
            return Ok(Attribute { name: name.into(), value: Some(value.into()), quoted: true });
        }
        let end = self.0.find(|c: char| matches!(c, ';' | ',' | '"' | '<') || c <= ' ').unwrap_or(self.0.len());
        let (value, rest) = self.0.split_at(end);
        if value.is_empty() {
            return Err("an attribute without its value");
        }
        self.0 = rest;
        Ok(Attribute { name: name.into(), value: Some(value.into()), quoted: false })
    }

    fn quoted(&mut self) -> Result<String, &'static str> {
        let mut value = String::new();
        let mut chars = self.0.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.0 = self.0.get(at + 1..).unwrap_or_default();
                    return Ok(value);
                }
                '\\' => match chars.next() {
                    Some((_, escaped)) if escaped >= ' ' => value.push(escaped),
                    Some(_) | None => return Err("a broken escape"),
                },
                c if c < ' ' || c == '\x7f' => return Err("a control character"),
                c => value.push(c),
            }
        }
        Err("a quoted value without its end")
    }
}

/// The segments of a path, each decoded by itself.
fn segments(path: &str) -> Result<Vec<Box<str>>, &'static str> {
    let path = path.strip_prefix('/').unwrap_or(path);
    if path.is_empty() {
        return Ok(Vec::new());
    }
    path.split('/').map(segment).collect()
}

fn segment(text: &str) -> Result<Box<str>, &'static str> {
    let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let (high, low) = digit(bytes.next()).zip(digit(bytes.next())).ok_or("a broken percent encoding")?;
            decoded.push(high << 4 | low);
        } else {
            decoded.push(byte);
        }
    }
    let decoded = String::from_utf8(decoded).map_err(|_| "a path that is not UTF-8")?;
    let is_plain = !decoded.contains(['/', '\0', '+', '#']) && decoded != "." && decoded != "..";
    if is_plain { Ok(decoded.into()) } else { Err("a path segment that could be taken for another path") }
}

/// RFC 5987's `parmname`, and the `*` at its end.
fn is_parmname(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$&+-.^_`|~*".contains(c)
}

/// Between links; RFC 6690 has none there, devices do.
const BLANK: [char; 4] = [' ', '\t', '\r', '\n'];

/// Attributes of one link.
const ATTRIBUTES_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(link: &Link) -> String {
        let attributes: String = link.attributes.iter().map(|a| format!(";{a}")).collect();
        format!("<{}>{attributes}", link.target)
    }

    #[test]
    fn the_links_of_rfc_6690_read_back_and_what_points_elsewhere_is_left_out() {
        let text = "</sensors>;ct=40;title=\"Sensor \\\"Index\\\"\",\n</sensors/temp>;rt=\"temperature-c x\";if=\"sensor\";obs,\
                    <http://www.example.com/sensors/t123>;anchor=\"/sensors/temp\";rel=\"describedby\",\
                    </t>;anchor=\"/sensors/temp\";rel=\"alternate\",<//host/x>,</a?b>, </%61%20b/>";
        let links = parse(text.as_bytes(), 16).unwrap();
        let all: Vec<_> = links.iter().map(written).collect();
        assert_eq!(
            all,
            [
                "</sensors>;ct=40;title=\"Sensor \\\"Index\\\"\"",
                "</sensors/temp>;rt=\"temperature-c x\";if=\"sensor\";obs",
                "</%61%20b/>"
            ]
        );
        assert!(links[1].is_observable() && !links[0].is_observable());
        assert_eq!((links[1].topic_level(), links[2].topic_level()), ("coap/sensors/temp".into(), "coap/a b/".into()));
        assert!(links[1].has("rt", "x") && links[1].has("rt", "temp*") && links[1].has("obs", ""));
        assert!(!links[1].has("rt", "temp") && !links[0].has("title", "Index"));
        assert_eq!(parse(b"", 1), Ok(vec![]));
        assert!(parse(b"</>", 1).unwrap()[0].path.is_empty());
    }

    #[test]
    fn what_is_not_a_list_of_links_is_refused() {
        for bad in [
            "x",
            "</a",
            "</a>,",
            "</a></b>",
            "</a>;",
            "</a>;x=",
            "</a>;x=\"y",
            "</a>;x=\"\n\"",
            "</a>;=x",
            "</a b>",
            "</a<b>",
            "</%zz>",
            "</%2f>",
            "</a/../b>",
            "</%2e%2e>",
            "</a%00>",
            "</a/+>",
            "</%23>",
            "</%ff>",
        ] {
            assert!(matches!(parse(bad.as_bytes(), 16), Err(NotLinks::Malformed(_))), "{bad}");
        }
        assert_eq!(parse(b"</a>,</b>", 1), Err(NotLinks::TooMany));
        assert!(parse(&[b'<', b'/', 0xff, b'>'], 1).is_err());
    }

    proptest! {
        #[test]
        fn no_input_panics_and_what_is_read_reads_back_the_same(text in "[</>;,=\"\\\\ a-c%0-9.*+#?]{0,60}") {
            if let Ok(links) = parse(text.as_bytes(), 8) {
                let again: Vec<_> = links.iter().map(written).collect();
                prop_assert_eq!(parse(again.join(",").as_bytes(), 8), Ok(links));
            }
        }
    }
}
