//! The actor that stands for one life of one worker: waits out the back-off, starts the process, sees its end.

use super::agent::NodeMessage;
use super::lifeline::Watcher;
use super::process::Process;
use super::{Exit, ExitCause, LaunchSpec, StartError};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tarazed_domain::{Incarnation, WorkerId};
use tokio::task::AbortHandle;

/// How long an orderly stop waits for a killed process to be gone; one in an uninterruptible system call takes longer.
const STOP_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct RankProcess {
    pub worker: WorkerId,
    pub incarnation: Incarnation,
    pub spec: Arc<LaunchSpec>,
    pub agent: ActorRef<NodeMessage>,
    /// The process is there already, started by an earlier agent.
    pub adopted: bool,
}

pub(super) enum LifeMessage {
    /// The back-off is over.
    Start,
    /// Its lifeline says so.
    Ending,
    /// The pidfd says so.
    Ended(io::Result<()>),
    Kill(String),
    LetGo,
}
impl ractor::Message for LifeMessage {}

pub(super) enum Life {
    Waiting {
        timer: AbortHandle,
    },
    Running {
        process: Process,
        watcher: AbortHandle,
        killed: Option<String>,
    },
    Over,
}

impl Drop for Life {
    fn drop(&mut self) {
        match self {
            Self::Waiting { timer } => timer.abort(),
            Self::Running { watcher, .. } => watcher.abort(),
            Self::Over => {}
        }
    }
}

impl RankProcess {
    /// Reports to the agent. If it is gone, this actor is being ended with it.
    fn report(&self, message: NodeMessage) {
        let _ = self.agent.cast(message);
    }

    fn start_failed(&self, myself: &ActorRef<LifeMessage>, life: &mut Life, error: StartError) {
        *life = Life::Over;
        self.report(NodeMessage::StartFailed {
            worker: self.worker,
            incarnation: self.incarnation,
            error,
        });
        myself.stop(None);
    }

    async fn start(&self, myself: &ActorRef<LifeMessage>, life: &mut Life) -> Result<(), ActorProcessingErr> {
        let (spec, worker, incarnation) = (Arc::clone(&self.spec), self.worker, self.incarnation);
        let adopted = self.adopted;
        let start = move || match adopted {
            true => Process::adopt(&spec, worker, incarnation),
            // This process may have stood still since the start was asked for. What it wrote down would hide its successor's.
            false if !spec.is_in_charge() => Err(StartError::Cancelled("another agent is in charge".to_owned())),
            false => Process::start(&spec, worker, incarnation),
        };
        // If this actor is killed while it waits here, the process is dropped where it comes to be, and so killed.
        match tokio::task::spawn_blocking(start).await? {
            Err(error) => self.start_failed(myself, life, error),
            Ok(mut process) => {
                let (watch, watcher_myself) = (process.watch()?, myself.clone());
                let lifeline = process.lifeline.take();
                let watcher = tokio::spawn(async move {
                    let ended = watch.ended();
                    tokio::pin!(ended);
                    let seen = tokio::select! {
                        // The pipe ends first; where both are seen at once, it is told first, too.
                        biased;
                        () = unannounced_end(lifeline) => {
                            let _ = watcher_myself.cast(LifeMessage::Ending);
                            ended.await
                        }
                        seen = &mut ended => seen,
                    };
                    // If the actor is gone, its process is being reaped elsewhere.
                    let _ = watcher_myself.cast(LifeMessage::Ended(seen));
                })
                .abort_handle();
                self.report(NodeMessage::Started {
                    worker,
                    incarnation,
                    pid: process.pid.as_raw_nonzero().get().unsigned_abs(),
                });
                *life = Life::Running {
                    process,
                    watcher,
                    killed: None,
                };
            }
        }
        Ok(())
    }

    async fn finish(&self, life: &mut Life) -> Result<(), ActorProcessingErr> {
        let Life::Running { process, killed, .. } = life else {
            return Ok(());
        };
        let at = Instant::now();
        let cause = process.reap()?;
        let (log, log_start) = (process.log.clone(), process.log_start());
        let ran = at.duration_since(process.started);
        let killed = killed.take();
        *life = Life::Over;
        let path = log.clone();
        let tail = tokio::task::spawn_blocking(move || Process::tail(&path, log_start)).await?;
        self.report(NodeMessage::Exited {
            worker: self.worker,
            incarnation: self.incarnation,
            exit: Exit {
                cause,
                killed,
                tail,
                log,
                at,
                ran,
            },
        });
        Ok(())
    }
}

async fn unannounced_end(lifeline: Option<Watcher>) {
    match lifeline {
        Some(lifeline) => lifeline.unannounced_end().await,
        None => std::future::pending().await,
    }
}

impl Actor for RankProcess {
    type Msg = LifeMessage;
    type State = Life;
    type Arguments = Duration;

    async fn pre_start(&self, myself: ActorRef<Self::Msg>, after: Duration) -> Result<Life, ActorProcessingErr> {
        let timer = tokio::spawn(async move {
            // Even a sleep of nothing costs a timer tick, a millisecond of recovery.
            if !after.is_zero() {
                tokio::time::sleep(after).await;
            }
            // The actor may have been told to end while this slept.
            let _ = myself.cast(LifeMessage::Start);
        });
        Ok(Life::Waiting {
            timer: timer.abort_handle(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: LifeMessage,
        life: &mut Life,
    ) -> Result<(), ActorProcessingErr> {
        match (message, &mut *life) {
            (LifeMessage::Start, Life::Waiting { .. }) => self.start(&myself, life).await?,
            (LifeMessage::Kill(reason), Life::Waiting { .. }) => {
                self.start_failed(&myself, life, StartError::Cancelled(reason));
            }
            (LifeMessage::Kill(reason), Life::Running { process, killed, .. }) => {
                killed.get_or_insert(reason);
                process.kill();
            }
            (LifeMessage::Ending, Life::Running { process, killed, .. }) => {
                // Should its lifeline have broken for another reason: what follows is sure of its end.
                process.kill();
                self.report(NodeMessage::Ending {
                    worker: self.worker,
                    incarnation: self.incarnation,
                    killed: killed.clone(),
                });
            }
            (LifeMessage::Ended(seen), Life::Running { .. }) => {
                seen?;
                self.finish(life).await?;
                myself.stop(None);
            }
            (LifeMessage::LetGo, _) => {
                if let Life::Running { process, .. } = &mut *life {
                    process.let_go();
                }
                *life = Life::Over;
                myself.stop(None);
            }
            (LifeMessage::Start | LifeMessage::Ending | LifeMessage::Ended(_), _)
            | (LifeMessage::Kill(_), Life::Over) => {}
        }
        Ok(())
    }

    /// The agent stops: the process goes first, as long as it is this agent's. However a controller ends that has been put
    /// out of charge, its ranks are its successor's.
    async fn post_stop(&self, _: ActorRef<Self::Msg>, life: &mut Life) -> Result<(), ActorProcessingErr> {
        if let Life::Running { process, .. } = life {
            if !process.is_ours() {
                process.let_go();
                return Ok(());
            }
            process.kill();
            let watch = process.watch()?;
            match tokio::time::timeout(STOP_LIMIT, watch.ended()).await {
                Ok(seen) => {
                    seen?;
                    process.reap()?;
                }
                Err(_) => tracing::error!(
                    worker = %self.worker,
                    pid = process.pid.as_raw_nonzero(),
                    "a killed rank has not ended; it hangs in the kernel and is reaped when it returns"
                ),
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        _: SupervisionEvent,
        _: &mut Life,
    ) -> Result<(), ActorProcessingErr> {
        // It has no children.
        Ok(())
    }
}

impl ExitCause {
    /// The report for a life whose actor died.
    pub(super) fn unsupervised(cause: String, log: std::path::PathBuf) -> Exit {
        Exit {
            cause: Self::Unsupervised(cause),
            killed: None,
            tail: Vec::new(),
            log,
            at: Instant::now(),
            ran: Duration::ZERO,
        }
    }
}
