//! What the store's tests do not ask of this server: compare-and-swap, parts with conditions, pages, keys that are no paths.
#![allow(clippy::unwrap_used)]

use crate::folder::{Conditions, Folder, Version};
use crate::service::Objects;
use crate::{Credentials, Server};
use hyper::http::Extensions;
use hyper::{HeaderMap, Method, Uri};
use s3s::dto::*;
use s3s::{S3, S3ErrorCode, S3Request, S3Result};
use std::io::ErrorKind;
use std::sync::Arc;

const BUCKET: &str = "a-bucket";
const WRITERS: usize = 16;
const ROUNDS: usize = 20;
const MEBIBYTE: usize = 1024 * 1024;

fn folder() -> (tempfile::TempDir, Arc<Folder>) {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    folder.create_bucket(BUCKET).unwrap();
    (place, Arc::new(folder))
}

async fn write(folder: &Folder, key: &str, body: &[u8], conditions: &Conditions) -> S3Result<Version> {
    let chunk = Ok::<_, std::io::Error>(bytes::Bytes::copy_from_slice(body));
    let body = folder.receive(futures::stream::iter([chunk])).await?;
    folder.place(&body, BUCKET, key, conditions)
}

async fn put(folder: &Folder, key: &str, body: &[u8]) -> S3Result<Version> {
    write(folder, key, body, &Conditions::default()).await
}

fn read(folder: &Folder, key: &str) -> S3Result<Vec<u8>> {
    let (mut file, _) = folder.open_object(BUCKET, key)?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    Ok(bytes)
}

fn absent() -> Conditions {
    Conditions {
        if_none_match: Some(ETagCondition::Any),
        ..Conditions::default()
    }
}

fn still(version: &Version) -> Conditions {
    Conditions {
        if_match: Some(ETagCondition::ETag(version.etag())),
        ..Conditions::default()
    }
}

fn code<T>(result: S3Result<T>) -> S3ErrorCode {
    match result {
        Ok(_) => panic!("it must be refused"),
        Err(error) => error.code().clone(),
    }
}

fn request<T>(input: T) -> S3Request<T> {
    S3Request {
        input,
        method: Method::GET,
        uri: Uri::from_static("/"),
        headers: HeaderMap::new(),
        extensions: Extensions::new(),
        credentials: None,
        region: None,
        service: None,
        trailing_headers: None,
    }
}

fn blob(body: Vec<u8>) -> Option<StreamingBlob> {
    Some(StreamingBlob::from(s3s::Body::from(body)))
}

/// Bodies of one length, so that only the ETag tells them apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_many_conditional_writers_wins() {
    let (_place, folder) = folder();
    let mut newest = None;
    for round in 0..ROUNDS {
        let writers = (0..WRITERS).map(|writer| {
            let folder = folder.clone();
            tokio::spawn(async move {
                let conditions = newest.as_ref().map_or_else(absent, still);
                let body = format!("{round:04} {writer:04}");
                let won = write(&folder, "a/key", body.as_bytes(), &conditions).await;
                won.map(|version| (body, version))
            })
        });
        let mut won = Vec::new();
        for outcome in futures::future::join_all(writers).await {
            match outcome.unwrap() {
                Ok(winner) => won.push(winner),
                Err(error) => assert_eq!(*error.code(), S3ErrorCode::PreconditionFailed),
            }
        }
        assert_eq!(won.len(), 1, "round {round}: {won:?}");
        assert_eq!(read(&folder, "a/key").unwrap(), won[0].0.as_bytes());
        newest = Some(won[0].1);
    }
}

#[tokio::test]
async fn conditions_are_those_of_http() {
    let (_place, folder) = folder();
    let first = put(&folder, "k", b"1").await.unwrap();
    assert_eq!(
        code(write(&folder, "k", b"2", &absent()).await),
        S3ErrorCode::PreconditionFailed
    );
    let second = write(&folder, "k", b"2", &still(&first)).await.unwrap();
    assert_ne!(first.etag(), second.etag());
    assert_eq!(
        code(write(&folder, "k", b"3", &still(&first)).await),
        S3ErrorCode::PreconditionFailed
    );
    assert_eq!(
        code(write(&folder, "none", b"3", &still(&first)).await),
        S3ErrorCode::NoSuchKey
    );
    assert_eq!(read(&folder, "k").unwrap(), b"2");
}

#[tokio::test]
async fn uploads_in_parts_keep_conditions_and_know_their_parts() {
    let (_place, folder) = folder();
    let service = Objects(folder.clone());
    let (bucket, key) = (BUCKET.to_owned(), "large".to_owned());
    let part = |id: &str, number, body| {
        let mut input = UploadPartInput::builder();
        input.set_bucket(bucket.clone());
        input.set_key(key.clone());
        input.set_upload_id(id.to_owned());
        input.set_part_number(number);
        input.set_body(blob(body));
        request(input.build().unwrap())
    };
    let complete = |id: &str, parts: Vec<CompletedPart>| {
        let mut input = CompleteMultipartUploadInput::builder();
        input.set_bucket(bucket.clone());
        input.set_key(key.clone());
        input.set_upload_id(id.to_owned());
        input.set_if_none_match(Some(ETagCondition::Any));
        input.set_multipart_upload(Some(CompletedMultipartUpload { parts: Some(parts) }));
        request(input.build().unwrap())
    };
    let id = folder.begin_upload(BUCKET, "large").unwrap();
    let mut parts = Vec::new();
    // The second part comes first.
    for (number, bytes) in [(2, 3), (1, 6 * MEBIBYTE)] {
        let sent = service.upload_part(part(&id, number, vec![number as u8; bytes])).await;
        parts.push(CompletedPart {
            part_number: Some(number),
            e_tag: sent.unwrap().output.e_tag,
            ..Default::default()
        });
    }
    let disordered = service.complete_multipart_upload(complete(&id, parts.clone())).await;
    assert_eq!(code(disordered), S3ErrorCode::InvalidPartOrder);
    parts.reverse();
    let mut other = parts.clone();
    other[1].e_tag = Some(ETag::Strong("other".to_owned()));
    let other = service.complete_multipart_upload(complete(&id, other)).await;
    assert_eq!(code(other), S3ErrorCode::InvalidPart);
    put(&folder, "large", b"in the way").await.unwrap();
    let late = service.complete_multipart_upload(complete(&id, parts.clone())).await;
    assert_eq!(code(late), S3ErrorCode::PreconditionFailed);
    assert_eq!(read(&folder, "large").unwrap(), b"in the way");
    folder.remove(BUCKET, "large").unwrap();
    service
        .complete_multipart_upload(complete(&id, parts.clone()))
        .await
        .unwrap();
    let whole = [vec![1; 6 * MEBIBYTE], vec![2; 3]].concat();
    assert!(read(&folder, "large").unwrap() == whole);
    let again = service.complete_multipart_upload(complete(&id, parts)).await;
    assert_eq!(code(again), S3ErrorCode::NoSuchUpload);
    for id in ["", "..", "../a-bucket", "0123456789abcdef0123456789abcdef"] {
        let unknown = service.upload_part(part(id, 1, vec![0])).await;
        assert_eq!(code(unknown), S3ErrorCode::NoSuchUpload, "{id}");
    }
}

#[tokio::test]
async fn a_small_part_in_the_middle_is_refused() {
    let (_place, folder) = folder();
    let id = folder.begin_upload(BUCKET, "k").unwrap();
    let mut parts = Vec::new();
    for number in [1, 2] {
        let chunk = Ok::<_, std::io::Error>(bytes::Bytes::from_static(b"small"));
        let body = folder.receive(futures::stream::iter([chunk])).await.unwrap();
        folder.place_part(&body, &id, BUCKET, "k", number).unwrap();
        parts.push((number, None));
    }
    assert_eq!(code(folder.join(&id, BUCKET, "k", &parts)), S3ErrorCode::EntityTooSmall);
}

#[tokio::test]
async fn listings_come_in_pages_with_folders_taken_together() {
    let (_place, folder) = folder();
    for key in ["a/1", "a/2", "ab", "b/c/d", "b/e", "z"] {
        put(&folder, key, b"").await.unwrap();
    }
    let service = Objects(folder);
    let pages = async |prefix: &str, delimiter: Option<&str>, keys: i32| {
        let (mut names, mut token) = (Vec::new(), None);
        loop {
            let mut input = ListObjectsV2Input::builder();
            input.set_bucket(BUCKET.to_owned());
            input.set_prefix(Some(prefix.to_owned()));
            input.set_delimiter(delimiter.map(str::to_owned));
            input.set_max_keys(Some(keys));
            input.set_continuation_token(token);
            let page = service
                .list_objects_v2(request(input.build().unwrap()))
                .await
                .unwrap()
                .output;
            let objects = page
                .contents
                .unwrap_or_default()
                .into_iter()
                .filter_map(|object| object.key);
            let prefixes = page
                .common_prefixes
                .unwrap_or_default()
                .into_iter()
                .filter_map(|common| common.prefix);
            let mut page_names: Vec<String> = objects.chain(prefixes).collect();
            assert!(page_names.len() <= keys as usize);
            page_names.sort();
            names.extend(page_names);
            token = page.next_continuation_token;
            assert_eq!(page.is_truncated, Some(token.is_some()));
            if token.is_none() {
                return names;
            }
        }
    };
    for keys in [1, 2, 100] {
        assert_eq!(pages("", None, keys).await, ["a/1", "a/2", "ab", "b/c/d", "b/e", "z"]);
        assert_eq!(pages("", Some("/"), keys).await, ["a/", "ab", "b/", "z"]);
        assert_eq!(pages("b/", Some("/"), keys).await, ["b/c/", "b/e"]);
        assert_eq!(pages("a", None, keys).await, ["a/1", "a/2", "ab"]);
        assert!(pages("../", None, keys).await.is_empty());
    }
}

#[tokio::test]
async fn keys_that_are_no_paths_are_refused() {
    let (_place, folder) = folder();
    for key in ["", "/", "a//b", "../a-bucket/k", "a/./b", "a/", "/etc/passwd"] {
        assert_eq!(
            code(put(&folder, key, b"").await),
            S3ErrorCode::InvalidArgument,
            "{key}"
        );
    }
    assert_eq!(
        code(put(&folder, &"k".repeat(300), b"").await),
        S3ErrorCode::KeyTooLongError
    );
    put(&folder, "a/b", b"").await.unwrap();
    for key in ["a", "a/b/c"] {
        assert_eq!(code(put(&folder, key, b"").await), S3ErrorCode::InvalidRequest, "{key}");
        assert_eq!(code(read(&folder, key)), S3ErrorCode::NoSuchKey, "{key}");
    }
    // A folder is left as soon as it holds no object.
    folder.remove(BUCKET, "a/b").unwrap();
    put(&folder, "a", b"now an object").await.unwrap();
    let nowhere = folder.open_object("no-bucket", "a");
    assert_eq!(code(nowhere), S3ErrorCode::NoSuchBucket);
}

#[tokio::test]
async fn a_body_cut_short_leaves_nothing() {
    let (place, folder) = folder();
    let cut = [
        Ok(bytes::Bytes::from_static(b"half")),
        Err(std::io::Error::from(ErrorKind::ConnectionReset)),
    ];
    let received = folder.receive(futures::stream::iter(cut)).await.map(|_| ());
    assert_eq!(code(received), S3ErrorCode::IncompleteBody);
    assert_eq!(std::fs::read_dir(place.path().join(".uploads")).unwrap().count(), 0);
}

#[test]
fn a_folder_is_served_by_one_server_and_then_by_the_next() {
    let place = tempfile::tempdir().unwrap();
    let credentials = Credentials {
        key_id: "KEYID".to_owned(),
        secret: "hunter2hunter2".to_owned(),
    };
    let server = Server::start(place.path(), credentials.clone()).unwrap();
    server.create_bucket(BUCKET).unwrap();
    assert!(server.create_bucket("No Bucket").is_err());
    assert!(!format!("{server:?}").contains("hunter2"));
    let second = Server::start(place.path(), credentials.clone());
    assert_eq!(second.unwrap_err().kind(), ErrorKind::ResourceBusy);
    std::fs::write(place.path().join(BUCKET).join("k"), b"kept").unwrap();
    std::fs::write(place.path().join(".uploads/temporary-7"), b"left over").unwrap();
    drop(server);
    drop(Server::start(place.path(), credentials).unwrap());
    let folder = Folder::open(place.path()).unwrap();
    assert_eq!(read(&folder, "k").unwrap(), b"kept");
    assert!(!place.path().join(".uploads/temporary-7").exists());
}
