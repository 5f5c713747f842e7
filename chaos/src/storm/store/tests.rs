//! Server and proxy together, with requests as a client sends them.

use super::http::Message;
use super::*;
use tokio::io::BufReader;
use tokio::net::TcpStream;

async fn ask(store: &Store, method: &str, target: &str, headers: &str, body: &[u8]) -> Option<Message> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, store.port))
        .await
        .expect("connected");
    let mut stream = BufReader::new(stream);
    let head = format!(
        "{method} /{BUCKET}/{target} HTTP/1.1\r\nauthorization: AWS4 Credential={KEY_ID}/x\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    let request = Message {
        head: head.into_bytes(),
        body: body.to_vec(),
    };
    request.write(&mut stream).await.expect("sent");
    Message::read(&mut stream, method != "HEAD")
        .await
        .expect("an answer or an end")
}

async fn status(store: &Store, method: &str, target: &str, headers: &str, body: &[u8]) -> u16 {
    ask(store, method, target, headers, body)
        .await
        .expect("an answer")
        .status()
}

#[tokio::test]
async fn an_object_is_created_once_read_in_parts_listed_and_deleted() {
    let store = Store::start(None).await.expect("started");
    let create = "if-none-match: *\r\n";
    assert_eq!(status(&store, "PUT", "a/b", create, b"0123456789").await, 200);
    assert_eq!(status(&store, "PUT", "a/b", create, b"other").await, 412);
    let part = ask(&store, "GET", "a/b", "range: bytes=2-4\r\n", b"")
        .await
        .expect("an answer");
    assert_eq!((part.status(), &part.body[..]), (206, &b"234"[..]));
    let head = ask(&store, "HEAD", "a/b", "", b"").await.expect("an answer");
    assert_eq!(head.header("content-length"), Some("10"));
    for number in 0..server::PAGE_OBJECTS {
        assert_eq!(status(&store, "PUT", &format!("a/x{number:03}"), "", b"x").await, 200);
    }
    let page = ask(&store, "GET", "?list-type=2&prefix=a%2F", "", b"")
        .await
        .expect("an answer");
    let text = String::from_utf8(page.body).expect("text");
    assert!(
        text.contains("<Key>a/b</Key>") && text.contains("<IsTruncated>true</IsTruncated>"),
        "{text}"
    );
    assert_eq!(status(&store, "DELETE", "a/b", "", b"").await, 204);
    assert_eq!(status(&store, "GET", "a/b", "", b"").await, 404);
}

#[tokio::test]
async fn each_mischief_does_what_its_name_says_and_counts() {
    let store = Store::start(None).await.expect("started");
    store.set(Some(Mischief::Unavailable));
    assert_eq!(status(&store, "PUT", "k", "", b"one").await, 503);
    assert_eq!(store.set(None), Tally { hits: 1 });
    assert_eq!(status(&store, "GET", "k", "", b"").await, 404, "nothing was done");

    store.set(Some(Mischief::LoseAnswers(2)));
    assert!(
        ask(&store, "PUT", "k", "", b"two").await.is_none(),
        "a closed connection"
    );
    assert_eq!(status(&store, "PUT", "l", "", b"two").await, 503);
    assert_eq!(status(&store, "GET", "k", "", b"").await, 200, "it was done");
    assert_eq!(store.set(None), Tally { hits: 2 });

    store.set(Some(Mischief::TearUploads(1)));
    assert!(ask(&store, "PUT", "m", "", b"three").await.is_none());
    assert_eq!(status(&store, "GET", "m", "", b"").await, 404, "half an upload is none");

    store.set(Some(Mischief::CorruptReads(1)));
    let bad = ask(&store, "GET", "k", "", b"").await.expect("an answer");
    let good = ask(&store, "GET", "k", "", b"").await.expect("an answer");
    assert!(bad.body != good.body && good.body == b"two");
    assert_eq!(store.set(None), Tally { hits: 1 });
}
