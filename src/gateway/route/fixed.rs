//! `redirect` and `answer`: what the gateway says by itself.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use http::{Response, StatusCode, request};

use super::config::{Config, REDIRECT_WORDS};
use super::rewrite::rest;
use super::step::{Kept, Step};
use super::template::Template;
use super::without_port;

#[derive(Debug)]
pub(super) struct Redirect {
    to: Template,
    status: StatusCode,
    segments: usize,
}

impl Redirect {
    pub fn of(config: &Config) -> Option<Self> {
        let redirect = config.redirect.as_ref()?;
        Some(Redirect {
            // A configuration that was not checked sends nobody anywhere.
            to: Template::parse(&redirect.to, &REDIRECT_WORDS).ok()?,
            status: StatusCode::from_u16(redirect.status).ok()?,
            segments: config.path_prefix.split('/').filter(|segment| !segment.is_empty()).count(),
        })
    }
}

impl Step for Redirect {
    fn before_upstream(&self, _: &mut request::Parts, kept: &Kept) -> Option<Response<Bytes>> {
        let query = kept.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        let host = kept.host.as_deref().map(without_port).unwrap_or_default();
        // In the order of `REDIRECT_WORDS`.
        let values = [host, &kept.path, rest(&kept.path, self.segments), &query];
        let location = self.to.fill(|index| values.get(index).copied().unwrap_or_default());
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = self.status;
        response.headers_mut().insert(LOCATION, HeaderValue::try_from(location).ok()?);
        Some(response)
    }
}

#[derive(Debug)]
pub(super) struct Fixed {
    status: StatusCode,
    content_type: HeaderValue,
    body: Bytes,
}

impl Fixed {
    pub fn of(config: &Config) -> Option<Self> {
        let answer = config.answer.as_ref()?;
        Some(Fixed {
            status: StatusCode::from_u16(answer.status).ok()?,
            content_type: HeaderValue::from_str(&answer.content_type).ok()?,
            body: answer.body.clone().into(),
        })
    }
}

impl Step for Fixed {
    fn before_upstream(&self, _: &mut request::Parts, _: &Kept) -> Option<Response<Bytes>> {
        let mut response = Response::new(self.body.clone());
        *response.status_mut() = self.status;
        if !self.body.is_empty() {
            response.headers_mut().insert(CONTENT_TYPE, self.content_type.clone());
        }
        Some(response)
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{FixedAnswer, Redirect as RedirectConfig};
    use super::super::tests::{head, kept};
    use super::*;

    #[test]
    fn a_redirect_keeps_what_it_is_told_to() {
        let to = |to: &str, prefix: &str, target| {
            let redirect = Some(RedirectConfig { to: to.into(), status: 301 });
            let step = Redirect::of(&Config { redirect, path_prefix: prefix.into(), ..Config::default() }).unwrap();
            let answer = step.before_upstream(&mut head("GET", target, &[]), &kept(target)).unwrap();
            assert_eq!(answer.status(), 301);
            answer.headers()[LOCATION].to_str().unwrap().to_owned()
        };
        assert_eq!(to("https://{host}{path}{query}", "/", "/a%20b?c=d"), "https://gateway.example/a%20b?c=d");
        assert_eq!(to("https://new.example/v2{rest}", "/old", "/old/x?y"), "https://new.example/v2/x");
    }

    #[test]
    fn an_answer_is_given_as_it_is_written() {
        let answer = FixedAnswer { status: 410, body: "gone".into(), ..FixedAnswer::default() };
        let step = Fixed::of(&Config { answer: Some(answer), ..Config::default() }).unwrap();
        let answer = step.before_upstream(&mut head("GET", "/", &[]), &kept("/")).unwrap();
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (410, &b"gone"[..]));
        assert_eq!(answer.headers()[CONTENT_TYPE], "text/plain; charset=utf-8");
    }
}
