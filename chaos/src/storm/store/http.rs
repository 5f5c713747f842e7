//! As much of HTTP/1.1 as an object store's client and server need of each other: whole messages with a stated length.
//!
//! A message is kept as the bytes of its head and of its body, so that a proxy passes on what it was given: a signature over
//! the head stays right.

use std::io::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of one head.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Bytes of one body: a part of an upload has 8 MiB.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A request or an answer.
#[derive(Clone, Debug)]
pub struct Message {
    /// First line and headers, with the empty line.
    pub head: Vec<u8>,
    /// The body.
    pub body: Vec<u8>,
}

impl Message {
    /// An answer.
    #[must_use]
    pub fn answer(status: u16, headers: &[(&str, &str)], body: Vec<u8>) -> Self {
        let mut head = format!("HTTP/1.1 {status} .\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !headers.iter().any(|(name, _)| *name == "content-length") {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        Self {
            head: head.into_bytes(),
            body,
        }
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.head).unwrap_or_default()
    }

    /// A header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.text().lines().skip(1).filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(found, _)| found.eq_ignore_ascii_case(name))?;
        Some(value.trim())
    }

    /// The words of the first line: method and target, or version and status.
    #[must_use]
    pub fn words(&self) -> (&str, &str) {
        let mut words = self.text().lines().next().unwrap_or_default().split_whitespace();
        (words.next().unwrap_or_default(), words.next().unwrap_or_default())
    }

    /// An answer's status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.words().1.parse().unwrap_or(0)
    }

    /// Reads one; nothing where the connection ends between two messages. The answer to a HEAD has no body.
    ///
    /// # Errors
    /// If it breaks off, is too large, or states no length.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin), with_body: bool) -> Result<Option<Self>> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte).await? == 0 {
                return if head.is_empty() {
                    Ok(None)
                } else {
                    Err(ErrorKind::UnexpectedEof.into())
                };
            }
            head.push(byte[0]);
            if head.len() > HEAD_BYTES_MAX {
                return Err(Error::new(ErrorKind::InvalidData, "a head without an end"));
            }
        }
        let mut message = Self { head, body: Vec::new() };
        if message.header("transfer-encoding").is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "a body without a stated length"));
        }
        let length = message.header("content-length").map_or(Ok(0), str::parse);
        let length: usize = length.map_err(|_| Error::new(ErrorKind::InvalidData, "a length that is none"))?;
        if with_body && length <= BODY_BYTES_MAX {
            message.body = vec![0; length];
            stream.read_exact(&mut message.body).await?;
        } else if with_body {
            return Err(Error::new(ErrorKind::InvalidData, "a body too large"));
        }
        Ok(Some(message))
    }

    /// Writes it.
    ///
    /// # Errors
    /// If the connection breaks.
    pub async fn write(&self, stream: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        stream.write_all(&self.head).await?;
        stream.write_all(&self.body).await?;
        stream.flush().await
    }
}

/// A percent-encoded text in plain.
#[must_use]
pub fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..2).filter(|_| *first == b'%');
        let code = code.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        rest = if code.is_some() { &tail[2..] } else { tail };
        bytes.push(code.unwrap_or(*first));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_follow_each_other_on_a_connection() {
        let mut wire = Vec::new();
        for body in ["one", ""] {
            let answer = Message::answer(200, &[("etag", "\"x\"")], body.into());
            answer.write(&mut wire).await.expect("written");
        }
        let mut wire = &wire[..];
        let first = Message::read(&mut wire, true).await.expect("whole").expect("one");
        assert_eq!(
            (first.status(), first.header("ETag"), &first.body[..]),
            (200, Some("\"x\""), &b"one"[..])
        );
        assert!(Message::read(&mut wire, true).await.expect("whole").is_some());
        assert!(Message::read(&mut wire, true).await.expect("the end").is_none());
        let mut torn = &b"PUT /x HTTP/1.1\r\ncontent-length: 5\r\n\r\nab"[..];
        assert!(Message::read(&mut torn, true).await.is_err());
    }

    #[test]
    fn percent_signs_are_read() {
        assert_eq!(decode("a%2Fb%20c"), "a/b c");
        assert_eq!(decode("100%"), "100%");
    }
}
