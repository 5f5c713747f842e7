//! Floor 3: one training step as a straight line, and the start of a generation that it follows.
//!
//! Begin at [`step`]. What a step computes is a function of (config, data, decisions, seed, step, lane) alone (DET-1): ranks,
//! threads and arrival order decide only who computes what and when. This crate holds no actor and no clock that a
//! number depends on; the device thread that runs it is spawned and watched by the actors above.
//!
//! | module | holds |
//! |---|---|
//! | [`step`] | lanes, reduce, forward, barrier, update, gather: the line itself |
//! | [`barrier`] | what every rank brings to the barrier, and what all read out of it |
//! | [`compute`] | forward and backward of this rank's lanes, folded along the lane tree |
//! | [`generation`] | bringing every holder to the agreed step (STEP-2), copies, restore, first gather |
//! | [`harm`] | bits flipped on purpose, for chaos runs |
//! | [`moments`] | sums over the weights now and then, for the weight trajectory |
//! | [`optimizer`] | optimizer shards: update, hashes, snapshots |
//! | [`snapshot`] | copies of the state that the next update waits for |
//! | [`feeder`] | the samples of this rank's lanes, a few steps ahead |
//! | [`waiting`] | how it waits for other threads, or gives way where there are none |
//! | [`world`] | who does what in one generation, as plain tables |
//! | [`device_thread`] | the command loop around all of it |

pub mod barrier;
pub mod compute;
pub mod device_thread;
pub mod error;
pub mod feeder;
pub mod generation;
pub mod harm;
pub mod host;
pub mod moments;
pub mod optimizer;
pub mod progress;
pub mod snapshot;
pub mod state;
pub mod step;
pub mod waiting;
pub mod world;

pub use error::StepError;
