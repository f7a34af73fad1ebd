//! `/metrics` on `--metrics-listen`, `/healthz` and `/readyz` on `--health-listen`: served from before this controller leads.
//!
//! Healthy: the process answers. Ready: it leads, and knows every agent and every blade that the API has.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, Result};
use far_serve::Page;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{Config, metrics::Metrics, world::World};

/// What a leading controller works with.
#[derive(Debug)]
pub(crate) struct Works {
    pub(crate) world: Arc<World>,
    pub(crate) agents_known: CancellationToken,
    pub(crate) nodes_known: CancellationToken,
    pub(crate) stop: CancellationToken,
}

/// What the pages tell; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    pub(crate) metrics: Metrics,
    works: Arc<OnceLock<Works>>,
}

impl Told {
    /// This controller leads and works.
    pub(crate) fn works(&self, works: Works) {
        let _ = self.works.set(works);
    }

    fn metrics_page(&self, path: &str) -> Option<Page> {
        let census = || self.works.get().map(|works| works.world.census()).unwrap_or_default();
        (path == "/metrics").then(|| Page {
            code: 200,
            kind: prometheus::TEXT_FORMAT,
            text: self.metrics.text(&census()),
        })
    }

    fn health_page(&self, path: &str) -> Option<Page> {
        match path {
            "/healthz" => Some(Page::plain(200, "ok\n")),
            "/readyz" => Some(match self.lack() {
                None => Page::plain(200, "ok\n"),
                Some(lack) => Page::plain(503, format!("{lack}\n")),
            }),
            _ => None,
        }
    }

    fn lack(&self) -> Option<&'static str> {
        let Some(works) = self.works.get() else {
            return Some("this controller does not lead");
        };
        if works.stop.is_cancelled() {
            return Some("this controller ends");
        }
        if !works.agents_known.is_cancelled() {
            return Some("the list of agents is not complete yet");
        }
        (!works.nodes_known.is_cancelled()).then_some("the list of blades is not complete yet")
    }
}

/// Serves the pages while it is held.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) health: Option<SocketAddr>,
    _serving: Vec<AbortOnDropHandle<()>>,
}

impl Pages {
    /// Binds and serves what the configuration asks for.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub(crate) async fn start(config: &Config, told: &Told) -> Result<Self> {
        let mut pages = Self::default();
        if let Some(address) = config.metrics_listen {
            let told = told.clone();
            let page = move |path: &str| told.metrics_page(path);
            pages.metrics = Some(pages.serve(address, "--metrics-listen", page).await?);
        }
        if let Some(address) = config.health_listen {
            let told = told.clone();
            let page = move |path: &str| told.health_page(path);
            pages.health = Some(pages.serve(address, "--health-listen", page).await?);
        }
        Ok(pages)
    }

    async fn serve(
        &mut self,
        address: SocketAddr,
        option: &'static str,
        page: impl Fn(&str) -> Option<Page> + Clone + Send + Sync + 'static,
    ) -> Result<SocketAddr> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("binding {option} {address}"))?;
        let bound = listener.local_addr().context("reading the bound address")?;
        self._serving.push(AbortOnDropHandle::new(tokio::spawn(async move {
            far_serve::pages(listener, page, CancellationToken::new()).await;
        })));
        Ok(bound)
    }
}
