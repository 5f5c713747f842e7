//! Which request gets which answer. Pure but for [`Token::random`].
//!
//! All that is served lies below a path that only whoever was told it knows: `/TOKEN/` is the page, `/TOKEN/view.json` the
//! present, `/TOKEN/history.json?after=STEP` the course of the run. Everything else is not found, and so is all of it with
//! another token, whatever else the request says.
//!
//! **The `Host` header is not looked at.** A page of somebody else's that a browser was made to take for this address (DNS
//! rebinding) can ask, and is not answered: it does not know the token, which is in no header and no cookie that a browser
//! would add by itself. In return the page works through `ssh -L`, a proxy, and every name of the machine.

use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, LOCATION, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Response, StatusCode};
use std::io;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 16;
/// The page, without its nonce.
const PAGE: &str = include_str!("page.html");
/// Where the nonce stands in it.
const NONCE_MARK: &str = "{{nonce}}";

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// What cannot be guessed. Printing it for debugging does not show it.
#[derive(Clone)]
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; TOKEN_BYTES];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// As it stands in an address.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Compared as hashes, so that the time it takes says nothing of the token.
    fn is(&self, given: &str) -> bool {
        blake3::hash(given.as_bytes()) == blake3::hash(self.0.as_bytes())
    }
}

/// What a request is answered with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// The page.
    Page,
    /// The present.
    View,
    /// The course of the run after a step.
    History {
        /// Which.
        after: u64,
    },
    /// `after` is no step.
    NoStep,
    /// The page, but for the slash that is missing.
    Slash,
    /// It is there, and can only be read.
    ReadOnly,
    /// Nothing is there, or nobody is told of it.
    NotFound,
}

/// For a request with this method, path and query.
#[must_use]
pub fn route(method: &Method, path: &str, query: Option<&str>, token: &Token) -> Route {
    let inner = path.strip_prefix('/').unwrap_or_default();
    let (given, name) = inner
        .split_once('/')
        .map_or((inner, None), |(given, name)| (given, Some(name)));
    if !token.is(given) {
        return Route::NotFound;
    }
    let found = match name {
        None => Route::Slash,
        Some("") => Route::Page,
        Some("view.json") => Route::View,
        Some("history.json") => after(query).map_or(Route::NoStep, |after| Route::History { after }),
        _ => return Route::NotFound,
    };
    if method == Method::GET || method == Method::HEAD {
        found
    } else {
        Route::ReadOnly
    }
}

/// The step after which the course is wanted; 0 where none is named, nothing where it is no number.
fn after(query: Option<&str>) -> Option<u64> {
    let mut fields = query.unwrap_or_default().split('&');
    match fields.find_map(|field| field.strip_prefix("after=")) {
        Some(step) if step.bytes().all(|byte| byte.is_ascii_digit()) => step.parse().ok(),
        Some(_) => None,
        None => Some(0),
    }
}

/// Makes answers, all with the headers that keep a browser from doing anything else with them.
#[derive(Debug)]
pub struct Answers {
    page: String,
    policy: HeaderValue,
}

impl Answers {
    /// With scripts and styles of the page alone, known by `nonce`.
    ///
    /// # Errors
    /// If the nonce is none for a header.
    pub fn new(nonce: &Token) -> io::Result<Self> {
        let nonce = nonce.text();
        let policy = format!(
            "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        Ok(Self {
            page: PAGE.replace(NONCE_MARK, nonce),
            policy: HeaderValue::try_from(policy).map_err(io::Error::other)?,
        })
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> Response<String> {
        self.answer(StatusCode::OK, HTML, self.page.clone())
    }

    /// Where the page is, for one who left its slash out.
    #[must_use]
    pub fn slash(&self, token: &Token) -> Response<String> {
        let mut answer = self.refusal(StatusCode::PERMANENT_REDIRECT, "a slash is missing");
        // A token is hex digits.
        if let Ok(place) = HeaderValue::try_from(format!("/{}/", token.text())) {
            answer.headers_mut().insert(LOCATION, place);
        }
        answer
    }

    /// JSON.
    #[must_use]
    pub fn json(&self, text: String) -> Response<String> {
        self.answer(StatusCode::OK, JSON, text)
    }

    /// Something that is not as it was asked for, in words.
    #[must_use]
    pub fn refusal(&self, status: StatusCode, text: &str) -> Response<String> {
        let mut answer = self.answer(status, TEXT, format!("{text}\n"));
        if status == StatusCode::METHOD_NOT_ALLOWED {
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        answer
    }

    fn answer(&self, status: StatusCode, kind: &'static str, body: String) -> Response<String> {
        let mut answer = Response::new(body);
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token("0123456789abcdef0123456789abcdef".to_owned())
    }

    fn get(path: &str) -> Route {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(path, query)| (path, Some(query)));
        let path = path.replace("TOKEN", token().text());
        route(&Method::GET, &path, query, &token())
    }

    #[test]
    fn what_is_there_is_found_by_its_path() {
        assert_eq!(get("/TOKEN/"), Route::Page);
        assert_eq!(get("/TOKEN/?whatever"), Route::Page);
        assert_eq!(get("/TOKEN"), Route::Slash);
        assert_eq!(get("/TOKEN/view.json"), Route::View);
        assert_eq!(get("/TOKEN/history.json"), Route::History { after: 0 });
        assert_eq!(get("/TOKEN/history.json?after=120"), Route::History { after: 120 });
        assert_eq!(get("/TOKEN/history.json?x=1&after=7"), Route::History { after: 7 });
        for bad in ["", "-1", "+1", "1.5", "1e3", "99999999999999999999", "%31", " 1"] {
            let route = get(&format!("/TOKEN/history.json?after={bad}"));
            assert_eq!(route, Route::NoStep, "{bad:?}");
        }
    }

    #[test]
    fn all_else_is_not_found_whoever_asks_and_how() {
        for path in [
            "",
            "/",
            "//",
            "*",
            "TOKEN/",
            "TOKEN",
            "//TOKEN/",
            "/TOKEN//",
            "/TOKEN/view.json/",
            "/TOKEN/VIEW.JSON",
            "/TOKEN/../TOKEN/",
            "/TOKEN/%2e%2e/",
            "/TOKENx/",
            "/favicon.ico",
            "/view.json",
            "/0123456789ABCDEF0123456789ABCDEF/",
            "/0123456789abcdef0123456789abcde/view.json",
        ] {
            assert_eq!(get(path), Route::NotFound, "{path}");
        }
        let other = route(&Method::POST, "/wrong/view.json", None, &token());
        assert_eq!(other, Route::NotFound, "a stranger is told nothing");
    }

    #[test]
    fn nothing_can_be_changed() {
        for method in [
            Method::POST,
            Method::PUT,
            Method::DELETE,
            Method::OPTIONS,
            Method::CONNECT,
        ] {
            let path = format!("/{}/view.json", token().text());
            assert_eq!(route(&method, &path, None, &token()), Route::ReadOnly, "{method}");
        }
        let path = format!("/{}/", token().text());
        assert_eq!(route(&Method::HEAD, &path, None, &token()), Route::Page);
    }

    #[test]
    fn tokens_are_long_and_differ() {
        let (one, other) = (Token::random().expect("random"), Token::random().expect("random"));
        assert_ne!(one.text(), other.text());
        assert_eq!(one.text().len(), 2 * TOKEN_BYTES);
        assert!(one.text().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert!(!format!("{one:?}").contains(one.text()));
    }

    /// Nothing is fetched from elsewhere, and what is not of the page does not run.
    #[test]
    fn the_page_has_what_it_needs_and_its_nonce() {
        let answers = Answers::new(&token()).expect("answers");
        let page = answers.page();
        assert_eq!(page.headers()[CACHE_CONTROL], "no-store");
        let policy = page.headers()[CONTENT_SECURITY_POLICY].to_str().expect("text");
        assert!(
            policy.starts_with("default-src 'none'; script-src 'nonce-0123"),
            "{policy}"
        );
        let body = page.body();
        assert!(!body.contains(NONCE_MARK));
        for tag in ["<script", "<style"] {
            assert_eq!(body.matches(tag).count(), 1, "{tag}");
            assert!(body.contains(&format!("{tag} nonce=\"{}\">", token().text())), "{tag}");
        }
        for foreign in [
            "src=",
            "@import",
            "innerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!body.contains(foreign), "{foreign}");
        }
        let inside = body.matches("url(#").count();
        assert_eq!(body.matches("url(").count(), inside, "parts of the page itself");
        let addresses: Vec<&str> = body.match_indices("://").map(|(at, _)| &body[at..at + 14]).collect();
        assert_eq!(addresses, ["://www.w3.org/"], "the name of SVG, which nobody fetches");
    }

    #[test]
    fn refusals_say_what_can_be_done() {
        let answers = Answers::new(&token()).expect("answers");
        let refused = answers.refusal(StatusCode::METHOD_NOT_ALLOWED, "it can only be read");
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()[ALLOW]),
            (405, &HeaderValue::from_static("GET, HEAD"))
        );
        assert_eq!(refused.body(), "it can only be read\n");
        assert_eq!(refused.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
    }
}
