//! What the store does on a server, in a process whose environment says which.

use crate::checkpoints::{checkpoint, life, upload, writer};
use crate::place;
use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tarazed_domain::Generation;
use tarazed_store::{CheckpointStore, StoreError};

/// Writers of one key at once, and how many keys they write.
const WRITERS: u8 = 32;
const ROUNDS: usize = 8;
/// More objects than one page of a listing holds.
const OBJECTS: usize = 1_003;
const REQUESTS_AT_ONCE: usize = 32;

pub async fn run(case: &str, location: &str) {
    // Opening a store also sets up the HTTP client.
    let store = CheckpointStore::open(location, writer(1)).await.expect("a URL");
    match case {
        "life" => life(location).await,
        "race" => race(location).await,
        "claims" => claims(location).await,
        "objects" => objects(location).await,
        "search" => search(location).await,
        "plant" => plant(location).await,
        "no deletion" => no_deletion(location).await,
        "wrong credentials" => refused(&store, "check the credentials").await,
        "expired" => refused(&store, "renew them").await,
        "clock behind" => refused(&store, "20 minutes behind").await,
        "clock ahead" => refused(&store, "120 minutes ahead of").await,
        "no bucket" => refused(&store, "create the bucket").await,
        other => panic!("no case {other}"),
    }
}

/// Names all objects below a URL that hold a secret, and says how many there are.
async fn search(location: &str) {
    let ((client, prefix), secrets) = (client(location), place::secrets());
    assert!(!secrets.is_empty(), "nothing to search for");
    println!(); // what names the test may stand at the line's beginning
    let found = client.list(Some(&prefix)).map_ok(|meta| meta.location);
    let found: Vec<Path> = found.try_collect().await.expect("a listing");
    for path in &found {
        let object = client.get(path).await.expect("an object");
        if place::tells(&object.bytes().await.expect("its bytes"), &secrets) {
            println!("{}{path}", place::TOLD_BY);
        }
    }
    println!("{}{}", place::LOOKED_AT, found.len());
}

/// Writes an object that holds the first secret, and one that holds none.
async fn plant(location: &str) {
    let ((client, prefix), secrets) = (client(location), place::secrets());
    for (name, text) in [("planted", secrets[0].as_str()), ("innocent", "nothing")] {
        let body = [b"\0before ".as_slice(), text.as_bytes(), b" behind"].concat();
        let key = prefix.clone().join(name);
        let put = client.put(&key, PutPayload::from(body));
        put.await.expect("written");
    }
}

/// Whoever may not delete can write and read all the same.
async fn no_deletion(location: &str) {
    let (client, prefix) = client(location);
    let path = prefix.join("kept");
    client
        .put(&path, PutPayload::from(vec![7; 10]))
        .await
        .expect("may write");
    let deleted = client.delete(&path).await.expect_err("may not delete").to_string();
    assert!(deleted.contains("403"), "{deleted}");
    let read = client.get(&path).await.expect("may read").bytes().await.expect("bytes");
    assert_eq!(read.as_ref(), [7; 10]);
}

async fn refused(store: &CheckpointStore, remedy: &str) {
    let written = store.self_test().await.expect_err("unfit");
    let listed = store.newest_valid(None).await.expect_err("unreadable");
    for error in [written, listed] {
        assert!(matches!(error, StoreError::Reconfigure { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(remedy) && text.contains(store.location()), "{text}");
    }
}

/// The server without our store around it, and the prefix of the test.
fn client(location: &str) -> (AmazonS3, Path) {
    let (bucket, prefix) = location
        .strip_prefix("s3://")
        .and_then(|rest| rest.split_once('/'))
        .expect("a URL with a prefix");
    let client = AmazonS3Builder::from_env().with_bucket_name(bucket).build();
    (client.expect("a client"), Path::from(prefix))
}

/// Of many who create one object at once, one does; its bytes stay, and the others are told.
async fn race(location: &str) {
    let (client, prefix) = client(location);
    for round in 0..ROUNDS {
        let path = prefix.clone().join(format!("race-{round}"));
        let create = async |writer: u8| {
            let body = PutPayload::from(vec![writer; 100]);
            // 409 is S3's answer while another write is under way; who gets it has lost or tries again.
            match client.put_opts(&path, body, PutMode::Create.into()).await {
                Ok(_) => Some(writer),
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => None,
                Err(error) => panic!("round {round}: {error}"),
            }
        };
        let outcomes = join_all((0..WRITERS).map(create)).await;
        let winners: Vec<u8> = outcomes.into_iter().flatten().collect();
        assert_eq!(winners.len(), 1, "round {round}: {winners:?} won");
        let found = client.get(&path).await.expect("the object").bytes().await;
        assert_eq!(found.expect("its bytes"), vec![winners[0]; 100], "round {round}");
    }
}

/// CKPT-3: of many controllers that claim a store at once, each gets a place of its own in the chain or is told to come
/// again; only the last can commit.
async fn claims(location: &str) {
    let open = |number| CheckpointStore::open(location, writer(number));
    let stores: Vec<CheckpointStore> = join_all((1..=WRITERS).map(open))
        .await
        .into_iter()
        .collect::<Result<_, _>>()
        .expect("stores");
    let claims = join_all(stores.iter().map(|store| store.claim(Generation(0)))).await;
    let mut fences = Vec::new();
    for (store, claim) in stores.iter().zip(claims) {
        match claim {
            Ok(fence) => fences.push((fence, store)),
            Err(StoreError::Retry { .. } | StoreError::Fenced { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    fences.sort_by_key(|(fence, _)| fence.sequence);
    assert!(
        fences
            .windows(2)
            .all(|pair| pair[0].0.sequence < pair[1].0.sequence && pair[0].0.generation < pair[1].0.generation),
        "{fences:?}"
    );
    let (newest, store) = fences.pop().expect("somebody claims it");
    for (fence, store) in fences {
        let manifest = upload(store, 10, fence.generation).await;
        let error = store.commit(&fence, &manifest).await.expect_err("fenced");
        assert!(matches!(error, StoreError::Fenced { .. }), "{error:?}");
    }
    checkpoint(store, &newest, 10).await;
}

/// What restores and collections ask of a server.
async fn objects(location: &str) {
    let (client, prefix) = client(location);
    let folder = prefix.join("folder");
    let path = |number: usize| folder.clone().join(format!("{number:06}"));
    futures::stream::iter(0..OBJECTS)
        .map(|number| {
            let (client, path) = (client.clone(), path(number));
            async move { client.put(&path, PutPayload::from(number.to_string())).await }
        })
        .buffer_unordered(REQUESTS_AT_ONCE)
        .try_collect::<Vec<_>>()
        .await
        .expect("all are written");
    let list = async || -> Vec<Path> {
        let found = client.list(Some(&folder)).map_ok(|meta| meta.location);
        let mut found: Vec<Path> = found.try_collect().await.expect("a listing");
        found.sort();
        found
    };
    let listed = list().await;
    assert_eq!(listed.len(), OBJECTS);
    assert!(listed.into_iter().eq((0..OBJECTS).map(path)), "others are listed");
    assert_eq!(client.head(&path(1_000)).await.expect("an object").size, 4);
    let range = client.get_range(&path(1_002), 1..3).await;
    assert_eq!(range.expect("a range"), "00");
    let none = client.get(&folder.clone().join("none")).await;
    assert!(matches!(none, Err(object_store::Error::NotFound { .. })), "{none:?}");
    let doomed: Vec<_> = (0..OBJECTS).map(path).map(Ok).collect();
    let doomed = futures::stream::iter(doomed).boxed();
    let deleted: Vec<Path> = client.delete_stream(doomed).try_collect().await.expect("all go");
    assert_eq!(deleted.len(), OBJECTS);
    assert_eq!(list().await, []);
}
