//! The mesh between threads of one process, for tests and the simulator.
//!
//! Same promises as the sockets', checked by the same suite. A message is copied once, into a queue per pair of ranks
//! that holds a few messages: like a socket's buffer it lets a peer be ahead, but not far.

use crate::mesh::copy_to_self;
use crate::{AbortHandle, Collective, FabricError, ProgressCounter, Receive, Send, Tag};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};

/// Messages that may wait between two ranks.
const QUEUED_MESSAGES_MAX: usize = 4;
/// Failure timeout that a local mesh derives its limit from, in milliseconds; generous, for loaded test machines.
const FAILURE_MS: u64 = 30_000;

/// One rank's end of an in-process mesh.
pub struct LocalMesh {
    rank: Rank,
    generation: Generation,
    shared: Arc<Shared>,
    stall_limit: Duration,
    abort: AbortHandle,
    progress: Arc<ProgressCounter>,
    failed: Option<FabricError>,
}

struct Shared {
    world: Mutex<World>,
    /// One per rank: waited on by that rank's thread alone.
    changed: Vec<Condvar>,
}

struct World {
    /// `queues[from * size + to]`.
    queues: Vec<VecDeque<(Tag, Vec<u8>)>>,
    presence: Vec<Presence>,
}

#[derive(Clone, PartialEq, Eq)]
enum Presence {
    Here,
    Left,
    /// Gone, and whose fault it was.
    Lost {
        blame: Rank,
        cause: String,
    },
}

/// A mesh of `world_size` ranks; entry `r` belongs to rank `r`'s thread.
///
/// # Panics
/// If `world_size` is 0.
#[must_use]
pub fn local_mesh(world_size: usize, generation: Generation) -> Vec<LocalMesh> {
    assert!(world_size > 0, "a world has at least one rank");
    let world = World {
        queues: (0..world_size * world_size).map(|_| VecDeque::new()).collect(),
        presence: vec![Presence::Here; world_size],
    };
    let changed = (0..world_size).map(|_| Condvar::new()).collect();
    let shared = Arc::new(Shared {
        world: Mutex::new(world),
        changed,
    });
    (0..world_size as u32)
        .map(|rank| LocalMesh {
            rank: Rank(rank),
            generation,
            shared: Arc::clone(&shared),
            stall_limit: Duration::from_millis(Timeouts::derive(FAILURE_MS).collective_ms),
            abort: shared.abort_handle(rank as usize, generation),
            progress: Arc::default(),
            failed: None,
        })
        .collect()
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn abort_handle(self: &Arc<Self>, rank: usize, generation: Generation) -> AbortHandle {
        let handle = AbortHandle::without_descriptor(generation);
        let shared = Arc::clone(self);
        handle.on_abort(Box::new(move || {
            // Through the lock, so that a thread between its check and its wait cannot miss it.
            drop(shared.lock());
            shared.changed[rank].notify_all();
        }));
        handle
    }

    fn announce(&self, rank: Rank, presence: Presence) {
        self.lock().presence[rank.index()] = presence;
        self.changed.iter().for_each(Condvar::notify_all);
    }
}

/// What is left of one exchange.
struct Work<'e, 'a> {
    sends: Vec<VecDeque<(Tag, Vec<u8>)>>,
    receives: Vec<VecDeque<&'e mut Receive<'a>>>,
    moved_at: Vec<Instant>,
}

impl Work<'_, '_> {
    fn due(&self, peer: usize) -> Option<Tag> {
        let receive = self.receives[peer].front().map(|receive| receive.tag);
        receive.or(self.sends[peer].front().map(|(tag, _)| *tag))
    }
}

impl LocalMesh {
    /// Sets how long a peer may move nothing before it is [`FabricError::TimedOut`].
    #[must_use]
    pub fn with_stall_limit(mut self, limit: Duration) -> Self {
        self.stall_limit = limit;
        self
    }

    fn check(&self) -> Result<(), FabricError> {
        self.abort.check()?;
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn plan<'e, 'a>(&self, sends: &[Send<'_>], receives: &'e mut [Receive<'a>]) -> Work<'e, 'a> {
        let size = self.world_size();
        let mut work = Work {
            sends: (0..size).map(|_| VecDeque::new()).collect(),
            receives: (0..size).map(|_| VecDeque::new()).collect(),
            moved_at: vec![Instant::now(); size],
        };
        let mut to_self = VecDeque::new();
        for send in sends {
            assert!(
                send.to.index() < size,
                "rank {} is outside the world of {size}",
                send.to
            );
            if send.to == self.rank {
                to_self.push_back(*send);
            } else {
                work.sends[send.to.index()].push_back((send.tag, send.bytes.to_vec()));
            }
        }
        for receive in receives {
            assert!(
                receive.from.index() < size,
                "rank {} is outside the world of {size}",
                receive.from
            );
            if receive.from == self.rank {
                copy_to_self(to_self.pop_front(), receive);
            } else {
                work.receives[receive.from.index()].push_back(receive);
            }
        }
        assert!(
            to_self.is_empty(),
            "a message to the own rank needs its receive in the same exchange"
        );
        work
    }

    fn run(&self, mut work: Work<'_, '_>) -> Result<(), FabricError> {
        let own = self.rank.index();
        let mut world = self.shared.lock();
        loop {
            self.abort.check()?;
            for peer in (0..self.world_size()).filter(|&peer| peer != own) {
                if self.advance(&mut world, &mut work, peer)? {
                    work.moved_at[peer] = Instant::now();
                    self.shared.changed[peer].notify_all();
                }
            }
            let pending = (0..self.world_size()).filter_map(|peer| work.due(peer).map(|tag| (peer, tag)));
            let Some((peer, tag)) = pending.min_by_key(|&(peer, _)| (work.moved_at[peer], peer)) else {
                return Ok(());
            };
            self.blame_the_lost(&world)?;
            let waited = work.moved_at[peer].elapsed();
            if waited >= self.stall_limit {
                let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
                return Err(FabricError::TimedOut {
                    peer: Rank(peer as u32),
                    waited_ms,
                    tag,
                });
            }
            let changed = &self.shared.changed[own];
            let left = self.stall_limit - waited;
            world = changed
                .wait_timeout(world, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Moves what can move between this rank and one peer; says whether anything did.
    fn advance(&self, world: &mut World, work: &mut Work<'_, '_>, peer: usize) -> Result<bool, FabricError> {
        let (own, size) = (self.rank.index(), self.world_size());
        let mut moved = false;
        while let Some(receive) = work.receives[peer].front_mut() {
            let Some((tag, bytes)) = world.queues[peer * size + own].pop_front() else {
                break;
            };
            check_due(Rank(peer as u32), receive, tag, bytes.len())?;
            receive.bytes.copy_from_slice(&bytes);
            self.progress.received(bytes.len());
            work.receives[peer].pop_front();
            moved = true;
        }
        if let (Presence::Left, Some(due)) = (&world.presence[peer], work.due(peer)) {
            return Err(FabricError::lost(
                Rank(peer as u32),
                format_args!("it left in good order before {due}"),
            ));
        }
        let queue = &mut world.queues[own * size + peer];
        while queue.len() < QUEUED_MESSAGES_MAX {
            let Some(message) = work.sends[peer].pop_front() else {
                break;
            };
            self.progress.sent(message.1.len());
            queue.push_back(message);
            moved = true;
        }
        Ok(moved)
    }

    /// While this rank has to wait: a lost peer is to blame, whether it is the one waited for or not. One that gave up
    /// because of another passes the blame on.
    fn blame_the_lost(&self, world: &World) -> Result<(), FabricError> {
        for (rank, presence) in world.presence.iter().enumerate() {
            if let Presence::Lost { blame, cause } = presence {
                let told = *blame == self.rank;
                let peer = if told { Rank(rank as u32) } else { *blame };
                return Err(FabricError::PeerLost {
                    peer,
                    cause: cause.clone(),
                });
            }
        }
        Ok(())
    }
}

fn check_due(peer: Rank, due: &Receive<'_>, tag: Tag, bytes: usize) -> Result<(), FabricError> {
    if tag != due.tag {
        return Err(FabricError::TagMismatch {
            peer,
            expected: due.tag,
            received: tag,
        });
    }
    if bytes != due.bytes.len() {
        let (expected, received) = (due.bytes.len() as u64, bytes as u64);
        return Err(FabricError::LengthMismatch {
            peer,
            tag,
            expected,
            received,
        });
    }
    Ok(())
}

impl Collective for LocalMesh {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.changed.len()
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn exchange(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        self.check()?;
        self.progress.started();
        let work = self.plan(sends, receives);
        let outcome = self.run(work);
        match &outcome {
            Ok(()) => self.progress.completed(),
            Err(FabricError::Aborted { .. }) => {}
            Err(error) => {
                self.failed = Some(error.clone());
                if let FabricError::PeerLost { peer, .. } | FabricError::TimedOut { peer, .. } = error {
                    let cause = format!("rank {} reports it", self.rank);
                    self.shared.announce(self.rank, Presence::Lost { blame: *peer, cause });
                }
            }
        }
        outcome
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn progress(&self) -> Arc<ProgressCounter> {
        Arc::clone(&self.progress)
    }

    fn leave(&mut self) {
        if self.check().is_ok() {
            self.failed = Some(FabricError::Aborted {
                generation: self.generation,
            });
            self.shared.announce(self.rank, Presence::Left);
        }
    }
}

impl Drop for LocalMesh {
    fn drop(&mut self) {
        if self.shared.lock().presence[self.rank.index()] == Presence::Here {
            let cause = "it dropped its mesh".to_owned();
            self.shared.announce(
                self.rank,
                Presence::Lost {
                    blame: self.rank,
                    cause,
                },
            );
        }
    }
}

impl std::fmt::Debug for LocalMesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalMesh")
            .field("rank", &self.rank)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
