//! The store's way to its users: requests take time, get lost before or after they were carried out, and go on without the
//! process that sent them; listings are old. What is behind is an object store in memory, atomic per key.

use super::gate::Gate;
use super::history::Failure;
use super::random::Random;
use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tarazed_domain::Generation;
use tarazed_store::{CheckpointStore, Depth, Select, WriterId, WriterNonce};
use tokio::time::Instant;

/// How the store behaves towards everybody; faults change it while a simulation runs.
#[derive(Debug)]
pub struct Weather {
    inner: Mutex<WeatherNow>,
}

#[derive(Debug)]
struct WeatherNow {
    request_ms_max: u64,
    slow_until: Option<Instant>,
    errors_until: Option<Instant>,
    /// Listings show the store as it was so long ago, until then.
    stale: Option<(Duration, Instant)>,
    changes: Vec<Change>,
    /// The newest controller that has written into the chain of records.
    newest: u64,
    failure: Arc<Failure>,
    random: Random,
}

/// What a listing that is old enough does not know yet.
#[derive(Clone, Debug)]
struct Change {
    at: Instant,
    location: Path,
    /// What was there before: nothing, of a new object.
    before: Option<ObjectMeta>,
}

/// Where the chain of records lies.
const RECORDS: &str = "commits/";
/// Changes are remembered so long: no listing is older.
const STALE_MAX: Duration = Duration::from_secs(10);

/// What becomes of one request.
struct Fate {
    before: Duration,
    after: Duration,
    lost_before: bool,
    lost_after: bool,
}

impl Weather {
    /// Fair weather: requests take up to `request_ms_max` and succeed.
    #[must_use]
    pub fn new(request_ms_max: u64, random: Random, failure: Arc<Failure>) -> Self {
        Self {
            inner: Mutex::new(WeatherNow {
                request_ms_max,
                slow_until: None,
                errors_until: None,
                stale: None,
                changes: Vec::new(),
                newest: 0,
                failure,
                random,
            }),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut WeatherNow) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Requests take fifty times as long, for a while.
    pub fn slow(&self, time: Duration) {
        self.with(|now| now.slow_until = Some(Instant::now() + time));
    }

    /// A third of the requests fails, for a while.
    pub fn errors(&self, time: Duration) {
        self.with(|now| now.errors_until = Some(Instant::now() + time));
    }

    /// Listings are this old, for a while.
    pub fn stale(&self, age: Duration, time: Duration) {
        self.with(|now| now.stale = Some((age.min(STALE_MAX), Instant::now() + time)));
    }

    /// Fair weather again.
    pub fn clear(&self) {
        self.with(|now| (now.slow_until, now.errors_until, now.stale) = (None, None, None));
    }

    /// An object came, or one that was there has gone.
    fn changed(&self, location: Path, before: Option<ObjectMeta>) {
        self.with(|now| {
            let at = Instant::now();
            now.changes.retain(|change| at - change.at < STALE_MAX);
            now.changes.push(Change { at, location, before });
        });
    }

    /// CKPT-3: a controller has written a record; none older than it may do so any more.
    fn recorded(&self, owner: u64) {
        self.with(|now| {
            if owner < now.newest {
                let newest = now.newest;
                now.failure.set(&format!(
                    "controller {owner} writes a record behind the claim of {newest}"
                ));
            }
            now.newest = now.newest.max(owner);
        });
    }

    /// CKPT-3, CKPT-5: a controller that may be fenced has deleted something. It must be something that an earlier record
    /// gave up.
    async fn check_deleted(&self, owner: u64, behind: Arc<dyn ObjectStore>, location: &Path) {
        if self.with(|now| owner >= now.newest) {
            return;
        }
        let writer = WriterId {
            nonce: WriterNonce([0xfe; 16]),
            generation: Generation(0),
        };
        let store = CheckpointStore::with_object_store(behind, "", writer);
        let failure = self.with(|now| Arc::clone(&now.failure));
        match store.verify(Select::All, Depth::Quick).await {
            Ok(report) if report.is_clean() => {}
            found => failure.set(&format!(
                "controller {owner} is fenced and deletes {location}: {found:?}"
            )),
        }
    }

    /// A listing as the store gives it now.
    fn aged(&self, prefix: Option<&Path>, listed: Vec<ObjectMeta>) -> Vec<ObjectMeta> {
        let changes = self.with(|now| {
            let (age, _) = now.stale.filter(|(_, until)| Instant::now() < *until)?;
            let is_unknown = |change: &&Change| Instant::now() - change.at < age;
            Some(now.changes.iter().filter(is_unknown).cloned().collect::<Vec<_>>())
        });
        let mut listed: BTreeMap<Path, ObjectMeta> =
            listed.into_iter().map(|meta| (meta.location.clone(), meta)).collect();
        // Undone from the newest to the oldest.
        for Change { location, before, .. } in changes.unwrap_or_default().into_iter().rev() {
            if prefix.is_none_or(|prefix| location.prefix_matches(prefix)) {
                match before {
                    Some(meta) => listed.insert(location, meta),
                    None => listed.remove(&location),
                };
            }
        }
        listed.into_values().collect()
    }

    fn fate(&self) -> Fate {
        self.with(|now| {
            let instant = Instant::now();
            let slow = now.slow_until.is_some_and(|until| instant < until);
            let failing = now.errors_until.is_some_and(|until| instant < until);
            let most_us = now.request_ms_max * if slow { 50_000 } else { 1000 };
            let total = now.random.between(100, most_us.max(200));
            let before = now.random.between(0, total);
            let lost = failing && now.random.chance(0.33);
            let lost_before = lost && now.random.chance(0.5);
            Fate {
                before: Duration::from_micros(before),
                after: Duration::from_micros(total - before),
                lost_before,
                lost_after: lost && !lost_before,
            }
        })
    }
}

fn lost() -> object_store::Error {
    object_store::Error::Generic {
        store: "simulated",
        source: "connection reset".into(),
    }
}

/// The controller whose handle it is.
#[derive(Clone)]
pub struct Owner {
    /// Which.
    pub number: u64,
    /// Closed while it stands still: it sends nothing then, and hears no answer.
    pub gate: Arc<Gate>,
}

/// One process's handle.
#[derive(Clone)]
pub struct SimStore {
    behind: Arc<dyn ObjectStore>,
    weather: Arc<Weather>,
    owner: Option<Owner>,
}

impl SimStore {
    /// A handle on the store `behind`; that of a rank has no owner.
    #[must_use]
    pub fn new(behind: Arc<dyn ObjectStore>, weather: Arc<Weather>, owner: Option<Owner>) -> Arc<Self> {
        Arc::new(Self { behind, weather, owner })
    }

    async fn until_it_runs(&self) {
        if let Some(owner) = &self.owner {
            owner.gate.passed().await;
        }
    }

    /// Carries a request out on its own: it goes on when the process that sent it dies or stands still.
    async fn request<T, F>(&self, work: impl FnOnce(Arc<dyn ObjectStore>) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send,
    {
        self.until_it_runs().await;
        let (fate, behind) = (self.weather.fate(), Arc::clone(&self.behind));
        let request = tokio::spawn(async move {
            tokio::time::sleep(fate.before).await;
            if fate.lost_before {
                return Err(lost());
            }
            let answer = work(behind).await;
            tokio::time::sleep(fate.after).await;
            if fate.lost_after { Err(lost()) } else { answer }
        });
        let answer = request.await.unwrap_or_else(|_| Err(lost()));
        self.until_it_runs().await;
        answer
    }
}

impl fmt::Display for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated store")
    }
}

impl fmt::Debug for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[async_trait]
impl ObjectStore for SimStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let (location, weather) = (location.clone(), Arc::clone(&self.weather));
        let owner = self.owner.as_ref().map(|owner| owner.number);
        self.request(move |behind| async move {
            let before = behind.head(&location).await.ok();
            let put = behind.put_opts(&location, payload, options).await?;
            if let Some(owner) = owner.filter(|_| location.as_ref().starts_with(RECORDS)) {
                weather.recorded(owner);
            }
            weather.changed(location, before);
            Ok(put)
        })
        .await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let to = location.clone();
        let upload = self
            .request(move |behind| async move { behind.put_multipart_opts(&to, options).await })
            .await?;
        Ok(Box::new(SimUpload {
            location: location.clone(),
            behind: upload,
            weather: Arc::clone(&self.weather),
        }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let location = location.clone();
        self.request(move |behind| async move { behind.get_opts(&location, options).await })
            .await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let me = self.clone();
        let one = move |location: Result<Path>| {
            let me = me.clone();
            async move {
                let location = location?;
                let (weather, owner) = (Arc::clone(&me.weather), me.owner.as_ref().map(|owner| owner.number));
                me.request(move |behind| async move {
                    let before = behind.head(&location).await.ok();
                    let one = futures::stream::once(async move { Ok(location) }).boxed();
                    let deleted: Vec<Path> = behind.delete_stream(one).try_collect().await?;
                    let location = deleted.into_iter().next().ok_or_else(lost)?;
                    weather.changed(location.clone(), before);
                    if let Some(owner) = owner {
                        weather.check_deleted(owner, behind, &location).await;
                    }
                    Ok(location)
                })
                .await
            }
        };
        locations.then(one).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (me, prefix) = (self.clone(), prefix.cloned());
        let listing = async move {
            let weather = Arc::clone(&me.weather);
            me.request(move |behind| async move {
                let listed: Vec<ObjectMeta> = behind.list(prefix.as_ref()).try_collect().await?;
                Ok(weather.aged(prefix.as_ref(), listed))
            })
            .await
        };
        let flat = listing.map(|listed| match listed {
            Ok(listed) => listed.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        });
        flat.map(futures::stream::iter).flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let prefix = prefix.cloned();
        self.request(move |behind| async move { behind.list_with_delimiter(prefix.as_ref()).await })
            .await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let (from, to) = (from.clone(), to.clone());
        self.request(move |behind| async move { behind.copy_opts(&from, &to, options).await })
            .await
    }
}

/// A multipart upload whose parts get lost; one that is not completed leaves nothing to be seen.
#[derive(Debug)]
struct SimUpload {
    location: Path,
    behind: Box<dyn MultipartUpload>,
    weather: Arc<Weather>,
}

#[async_trait]
impl MultipartUpload for SimUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (fate, part) = (self.weather.fate(), self.behind.put_part(data));
        async move {
            tokio::time::sleep(fate.before).await;
            if fate.lost_before {
                return Err(lost());
            }
            let done = part.await;
            tokio::time::sleep(fate.after).await;
            if fate.lost_after { Err(lost()) } else { done }
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fate = self.weather.fate();
        tokio::time::sleep(fate.before).await;
        if fate.lost_before {
            return Err(lost());
        }
        let done = self.behind.complete().await;
        if done.is_ok() {
            self.weather.changed(self.location.clone(), None);
        }
        tokio::time::sleep(fate.after).await;
        if fate.lost_after { Err(lost()) } else { done }
    }

    async fn abort(&mut self) -> Result<()> {
        self.behind.abort().await
    }
}
