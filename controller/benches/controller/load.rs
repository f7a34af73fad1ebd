//! Load on one kind of object, and what a watcher sees of it: the same for every arm.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt, stream};
use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, ListParams, PostParams, WatchEvent, WatchParams},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// Creations under way at a time where nothing limits their rate.
const CREATORS: usize = 32;
/// Whatever takes longer does not work.
const PATIENCE: Duration = Duration::from_secs(600);

/// One arm: a kind of object, who places it, and how that shows.
pub(crate) struct Arm {
    pub(crate) client: Client,
    pub(crate) api: Api<DynamicObject>,
    /// An object of this name.
    pub(crate) object: fn(&str) -> Value,
    pub(crate) is_placed: fn(&Value) -> bool,
    pub(crate) has_ended: fn(&Value) -> bool,
    /// Plurals of what is counted as this arm's objects; the first is its own kind.
    pub(crate) resources: &'static [&'static str],
    /// What is left of its objects when they are deleted: this goes with them.
    pub(crate) leaves: Option<Api<DynamicObject>>,
    /// Who places them.
    pub(crate) placer: u32,
}

impl Arm {
    async fn create(&self, name: &str) -> Result<()> {
        let object = serde_json::from_value((self.object)(name))?;
        self.api
            .create(&PostParams::default(), &object)
            .await
            .map(drop)
            .with_context(|| format!("creating {name}"))
    }

    /// When each of `count` objects was first seen as `is` says, from now on; ends when all were.
    async fn watch(
        &self,
        count: usize,
        is: fn(&Value) -> bool,
        ready: tokio::sync::oneshot::Sender<()>,
    ) -> Result<HashMap<String, Instant>> {
        let list = self.api.list(&ListParams::default().limit(1)).await?;
        let mut version = list.metadata.resource_version.unwrap_or_default();
        // The server ends a watch after this; what the benches do is shorter.
        let params = WatchParams::default().timeout(290);
        let mut events = self.api.watch(&params, &version).await?.boxed();
        let _ = ready.send(());
        let mut seen = HashMap::new();
        while seen.len() < count {
            match events.try_next().await? {
                Some(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    let name = object.metadata.name.clone().unwrap_or_default();
                    version = object.metadata.resource_version.clone().unwrap_or(version);
                    if !seen.contains_key(&name) && is(&serde_json::to_value(&object)?) {
                        seen.insert(name, Instant::now());
                    }
                }
                Some(WatchEvent::Error(error)) => bail!("the watch of {} failed: {error:?}", self.resources[0]),
                Some(WatchEvent::Deleted(_) | WatchEvent::Bookmark(_)) => {}
                // The server ends the watches of a kind whose definition it takes up anew.
                None => events = self.api.watch(&params, &version).await?.boxed(),
            }
        }
        Ok(seen)
    }

    /// Creates `count` objects at `rate` a second whatever becomes of them; milliseconds from each create to the watcher's
    /// sight of its placement, sorted.
    pub(crate) async fn latencies(&self, prefix: &str, count: usize, rate: f64) -> Result<Vec<f64>> {
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let begun: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
        let load = async {
            is_ready.await.context("the watch did not begin")?;
            let start = Instant::now();
            let all = stream::iter(0..count).map(|number| {
                let begun = begun.clone();
                async move {
                    let at = start + Duration::from_secs_f64(number as f64 / rate);
                    tokio::time::sleep_until(at.into()).await;
                    let name = format!("{prefix}-{number}");
                    let now = Instant::now();
                    begun.lock().expect("nobody panics with it").insert(name.clone(), now);
                    self.create(&name).await
                }
            });
            // Open loop: a slow answer holds back no other creation.
            all.buffer_unordered(count).try_collect::<Vec<()>>().await
        };
        let watch = self.watch(count, self.is_placed, ready);
        let (seen, _) = tokio::time::timeout(PATIENCE, async { tokio::try_join!(watch, load) })
            .await
            .with_context(|| format!("{count} {} were not placed", self.resources[0]))??;
        let begun = begun.lock().expect("nobody panics with it");
        let mut latencies: Vec<f64> = seen
            .iter()
            .filter_map(|(name, at)| Some(at.duration_since(*begun.get(name)?).as_secs_f64() * 1e3))
            .collect();
        latencies.sort_by(f64::total_cmp);
        Ok(latencies)
    }

    /// Objects a second that are placed when `count` of them wait: the placer is held (SIGSTOP) while they are created.
    pub(crate) async fn burst(&self, prefix: &str, count: usize) -> Result<f64> {
        let placer = Pid::from_raw(i32::try_from(self.placer)?);
        kill(placer, Signal::SIGSTOP)?;
        let created = stream::iter(0..count)
            .map(|number| async move { self.create(&format!("{prefix}-{number}")).await })
            .buffer_unordered(CREATORS)
            .try_collect::<Vec<()>>()
            .await;
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let release = async {
            is_ready.await.context("the watch did not begin")?;
            kill(placer, Signal::SIGCONT)?;
            anyhow::Ok(Instant::now())
        };
        if let Err(error) = created {
            kill(placer, Signal::SIGCONT)?;
            return Err(error);
        }
        let both = async { tokio::try_join!(self.watch(count, self.is_placed, ready), release) };
        let (seen, start) = tokio::time::timeout(PATIENCE, both)
            .await
            .context("a burst was not placed")??;
        let last = seen.values().max().context("nothing was placed")?;
        Ok(count as f64 / last.duration_since(start).as_secs_f64())
    }

    /// Waits until every object has ended.
    pub(crate) async fn all_ended(&self) -> Result<()> {
        let waits = async {
            loop {
                let all = self.api.list(&ListParams::default()).await?;
                let values: Result<Vec<Value>, _> = all.items.iter().map(serde_json::to_value).collect();
                if values?.iter().all(|object| (self.has_ended)(object)) {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waits)
            .await
            .context("not everything ended")?
    }

    /// Deletes every object and waits until they are gone.
    pub(crate) async fn clear(&self) -> Result<()> {
        let clears = async {
            loop {
                let params = DeleteParams {
                    grace_period_seconds: Some(0),
                    ..DeleteParams::default()
                };
                let mut are_gone = true;
                for api in std::iter::once(&self.api).chain(&self.leaves) {
                    api.delete_collection(&params, &ListParams::default()).await?;
                    are_gone &= api.list(&ListParams::default().limit(1)).await?.items.is_empty();
                }
                if are_gone {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        };
        tokio::time::timeout(PATIENCE, clears).await.context("objects stayed")?
    }

    /// Writes the API server was asked for so far: to this arm's objects, and to Events. Asking for nothing else writes either.
    pub(crate) async fn writes(&self) -> Result<(f64, f64)> {
        let request = http::Request::get("/metrics").body(Vec::new())?;
        let text = self.client.request_text(request).await?;
        let (mut own, mut events) = (0.0, 0.0);
        for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
            let has = |label: &str, value: &str| line.contains(&format!("{label}=\"{value}\""));
            if !["POST", "PUT", "PATCH", "APPLY"].iter().any(|verb| has("verb", verb)) {
                continue;
            }
            let count: f64 = line
                .rsplit(' ')
                .next()
                .and_then(|number| number.parse().ok())
                .unwrap_or(0.0);
            if self.resources.iter().any(|one| has("resource", one)) {
                own += count;
            } else if has("resource", "events") {
                events += count;
            }
        }
        Ok((own, events))
    }
}

/// The value below which this share of sorted values lies.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or(0.0)
}
