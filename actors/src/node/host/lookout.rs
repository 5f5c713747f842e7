//! The way to the controller: a node that loses it looks for the next one, as ranks do (`rank/home.rs`).

use super::{HostMessage, HostTree, NodeEnd, NodeFailed, NodeNotice, NodeNotify};
use crate::controller::node_token;
use crate::link::{LinkError, PeerId, UplinkConfig, UplinkEvent, connect_uplink};
use crate::run_folder::{InCharge, RunPaths};
use std::ops::Range;
use std::time::Duration;
use tarazed_domain::config::{Config, NodeConfig};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Incarnation, WorkerId};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Between looks for a controller while there is none.
const LOOK_WHEN_LOST: Duration = Duration::from_millis(50);
/// Between looks while a link lasts, at most: one that stands still keeps its links open, and another may have taken over.
const LOOK_WHEN_LINKED_MAX: Duration = Duration::from_millis(500);

pub(super) struct Lookout {
    pub paths: RunPaths,
    pub node: NodeConfig,
    /// Which of the run's nodes.
    pub index: u32,
    /// Its workers.
    pub workers: Range<u32>,
    /// Which life of the node this process is.
    pub incarnation: Incarnation,
    pub timeouts: Timeouts,
    pub tree: HostTree,
    /// How long to look while no rank of this host lives.
    pub wait: Duration,
    pub notify: NodeNotify,
}

/// A link, and where its end is heard.
struct Linked {
    generation: u64,
    ended: mpsc::UnboundedReceiver<String>,
}

/// What a dial came to.
enum Dialed {
    Linked(Linked),
    Again,
    Never(String),
}

/// The config of the run once a controller is in charge of it that has nodes; none if there is none in time.
pub(super) async fn first_config(paths: &RunPaths, wait: Duration) -> Option<Result<Config, NodeFailed>> {
    let deadline = Instant::now() + wait;
    loop {
        if named(paths).await.is_some_and(|named| named.nodes.is_some()) {
            let file = paths.config();
            let loaded = crate::blocking::run(move || Config::load(&file, &[]).map_err(|e| e.to_string())).await;
            let config = loaded.and_then(|config| config);
            return Some(config.map_err(|cause| NodeFailed {
                what: "config".to_owned(),
                cause,
                remedy: "give the run folder of a run of this version",
            }));
        }
        if Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(LOOK_WHEN_LOST).await;
    }
}

/// Who is in charge, as far as the folder can be read.
async fn named(paths: &RunPaths) -> Option<InCharge> {
    let paths = paths.clone();
    crate::blocking::run(move || InCharge::read(&paths))
        .await
        .ok()
        .flatten()
}

impl Lookout {
    /// Keeps the node linked to whoever is in charge, until the process ends.
    pub(super) async fn stay(self) {
        let mut number = 0;
        loop {
            number += 1;
            let Some(mut linked) = self.find(number).await else {
                return;
            };
            let why = self.until_over(&mut linked).await;
            (self.notify)(NodeNotice::Unlinked(why));
            self.tree.unlinked();
        }
    }

    async fn find(&self, number: u64) -> Option<Linked> {
        let mut lost = Instant::now();
        loop {
            if let Some(named) = named(&self.paths).await {
                match self.dial(&named, number).await {
                    Dialed::Linked(linked) => return Some(linked),
                    Dialed::Again => {}
                    Dialed::Never(reason) => {
                        self.tree.tell(HostMessage::Yield(reason));
                        return None;
                    }
                }
            }
            if lost.elapsed() >= self.wait {
                // Where a rank lives, its controller may come yet; it ends by itself where none does.
                self.tree.tell(HostMessage::GiveUp(NodeEnd::Abandoned));
                lost = Instant::now();
            }
            tokio::time::sleep(LOOK_WHEN_LOST).await;
        }
    }

    async fn dial(&self, named: &InCharge, number: u64) -> Dialed {
        let Some(address) = named.nodes.clone() else {
            return Dialed::Again;
        };
        if let Some(reason) = self.misfit().await {
            return Dialed::Never(reason);
        }
        let (end, ended) = mpsc::unbounded_channel();
        let heard = self.tree.clone();
        let config = UplinkConfig {
            address: address.clone(),
            token: node_token(&named.token),
            peer: PeerId {
                worker: WorkerId(self.index),
                incarnation: self.incarnation,
            },
            connect: Duration::from_millis(self.timeouts.connect_ms).min(Duration::from_secs(2)),
            failure: Duration::from_millis(self.timeouts.failure_ms),
            supervisor: Some(self.tree.0.get_cell()),
        };
        let dialed = connect_uplink(config, move |event| match event {
            UplinkEvent::Message(body) => heard.heard(number, body.into_vec()),
            // An error means that the link was given up for another one.
            UplinkEvent::Lost(reason) => drop(end.send(reason)),
        })
        .await;
        let generation = named.generation;
        match dialed {
            Ok(uplink) => {
                self.tree.linked(Box::new(uplink));
                (self.notify)(NodeNotice::Linked { address, generation });
                Dialed::Linked(Linked { generation, ended })
            }
            Err(LinkError::Halt { .. }) => {
                Dialed::Never(format!("another process stands for node '{}' by now", self.node.name))
            }
            Err(error) => {
                tracing::debug!(%error, "no link to the controller");
                Dialed::Again
            }
        }
    }

    /// Why this process can be no node of the run as it is configured now.
    async fn misfit(&self) -> Option<String> {
        let file = self.paths.config();
        let config = crate::blocking::run(move || Config::load(&file, &[]))
            .await
            .ok()?
            .ok()?;
        let index = self.index as usize;
        let same =
            config.cluster.nodes.get(index) == Some(&self.node) && config.cluster.workers_of(index) == self.workers;
        (!same).then(|| {
            format!(
                "node '{}' has another place in the config by now; start it again",
                self.node.name
            )
        })
    }

    /// Waits until the link ends, or until another controller is in charge; says why.
    async fn until_over(&self, linked: &mut Linked) -> String {
        let look = LOOK_WHEN_LINKED_MAX.min(Duration::from_millis(self.timeouts.failure_ms / 4));
        loop {
            tokio::select! {
                reason = linked.ended.recv() => return reason.unwrap_or_else(|| "it was given up".to_owned()),
                () = tokio::time::sleep(look) => {}
            }
            let newest = named(&self.paths).await.map(|named| named.generation);
            if newest.is_some_and(|newest| newest > linked.generation) {
                return "another controller is in charge".to_owned();
            }
        }
    }
}
