//! The way to the controller: a rank that loses it goes on, and finds the one that takes over.
//!
//! The run folder names the controller in charge (`controller.json`). A rank looks there when its session ends, and now
//! and then while it lasts: a controller that stands still keeps its sessions open, and another may have taken over.
//! A controller with another token does not know this rank, which then ends.

use super::{RankError, RankTree};
use crate::link::{LinkError, PeerId, Uplink, UplinkConfig, UplinkEvent, connect_uplink};
use crate::run_folder::{InCharge, RunPaths};
use std::time::Duration;
use tarazed_domain::limits::Timeouts;
use tokio::sync::mpsc;

/// Between looks for a new controller while there is none.
const LOOK_WHEN_LOST: Duration = Duration::from_millis(50);
/// Between looks while a session lasts, at most.
const LOOK_WHEN_LINKED_MAX: Duration = Duration::from_millis(500);

pub(super) struct Home {
    pub paths: RunPaths,
    pub token: [u8; 32],
    pub peer: PeerId,
    pub timeouts: Timeouts,
    /// Of the data plane, as others dial it.
    pub listener: String,
    pub tree: RankTree,
}

/// A session, and where its end is heard.
pub(super) struct Linked {
    /// That of the controller; none where the folder did not say.
    generation: Option<u64>,
    ended: mpsc::UnboundedReceiver<String>,
}

/// How a session ended.
enum Over {
    /// The other side is gone, and why.
    Lost(String),
    /// Another controller is in charge.
    Superseded,
    /// This rank closed it: it leaves.
    Closed,
}

impl Home {
    /// Dials the controller that started this process, or the one that the run folder names.
    pub(super) async fn first(&self, address: Option<&str>) -> Result<Linked, RankError> {
        let patience = Duration::from_millis(self.timeouts.connect_ms);
        let Some(address) = address else {
            let found = tokio::time::timeout(patience, self.find()).await;
            let found = found.unwrap_or_else(|_| Err("no controller is there".to_owned()));
            return found.map_err(|e| RankError::because("control plane")(&e));
        };
        let generation = self.named().await.map(|named| named.generation);
        self.dial(address, generation, patience)
            .await
            .map_err(|e| RankError::because("control plane")(&e))
    }

    async fn dial(&self, address: &str, generation: Option<u64>, patience: Duration) -> Result<Linked, LinkError> {
        let (end, ended) = mpsc::unbounded_channel();
        let heard = self.tree.clone();
        let config = UplinkConfig {
            address: address.to_owned(),
            token: self.token,
            peer: self.peer,
            connect: patience,
            failure: Duration::from_millis(self.timeouts.failure_ms),
            supervisor: Some(self.tree.cell()),
        };
        let uplink: Uplink = connect_uplink(config, move |event| match event {
            UplinkEvent::Message(body) => heard.told(body.into_vec()),
            // An error means that the session was given up for another one.
            UplinkEvent::Lost(reason) => drop(end.send(reason)),
        })
        .await?;
        self.tree
            .linked(Box::new(uplink), self.listener.clone(), std::process::id());
        Ok(Linked { generation, ended })
    }

    /// Stays linked to whoever is in charge, until the process ends.
    pub(super) async fn stay(self, mut linked: Linked) {
        loop {
            match self.until_over(&mut linked).await {
                Over::Lost(reason) => self.tree.controller_lost(reason),
                // From now on the time runs in which the next one must be found.
                Over::Superseded => self.tree.controller_lost("another controller is in charge".to_owned()),
                Over::Closed => return,
            }
            match self.find().await {
                Ok(found) => linked = found,
                Err(reason) => return self.tree.dismissed(reason),
            }
        }
    }

    /// Waits until the session ends, or until another controller is in charge.
    async fn until_over(&self, linked: &mut Linked) -> Over {
        // The next one waits for `failure_ms` until its ranks have come.
        let look = LOOK_WHEN_LINKED_MAX.min(Duration::from_millis(self.timeouts.failure_ms / 4));
        loop {
            tokio::select! {
                reason = linked.ended.recv() => return reason.map_or(Over::Closed, Over::Lost),
                () = tokio::time::sleep(look) => {}
            }
            if self
                .named()
                .await
                .is_some_and(|named| Some(named.generation) > linked.generation)
            {
                return Over::Superseded;
            }
        }
    }

    /// Who is in charge, as far as the folder can be read.
    async fn named(&self) -> Option<InCharge> {
        let paths = self.paths.clone();
        let read = move || InCharge::read(&paths);
        crate::blocking::run(read).await.ok().flatten()
    }

    async fn find(&self) -> Result<Linked, String> {
        loop {
            if let Some(named) = self.named().await {
                if named.token != self.token {
                    return Err("another controller runs on without this rank".to_owned());
                }
                match self
                    .dial(&named.address, Some(named.generation), LOOK_WHEN_LOST * 4)
                    .await
                {
                    Ok(linked) => return Ok(linked),
                    Err(LinkError::Retry { .. }) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
            tokio::time::sleep(LOOK_WHEN_LOST).await;
        }
    }
}
