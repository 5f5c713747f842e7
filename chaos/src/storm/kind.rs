//! The kinds of fault: their names, and what a storm expects of each.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a fault is expected to cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weight {
    /// A process ends, or a generation cannot go on: the runtime must notice.
    Lethal,
    /// The runtime may ride it out: slow, or cured by a retry.
    Bearable,
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $variant:ident = $name:literal, $weight:ident;)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Kind {
            $($(#[doc = $doc])* $variant,)*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in scenarios and reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it is expected to cost.
            #[must_use]
            pub const fn weight(self) -> Weight {
                match self { $(Self::$variant => Weight::$weight,)* }
            }
        }
    };
}

kinds! {
    /// SIGKILL to one rank.
    KillRank = "kill_rank", Lethal;
    /// SIGKILL to primary and replica of one optimizer shard at once.
    KillPair = "kill_pair", Lethal;
    /// SIGKILL to every rank.
    KillAllRanks = "kill_all_ranks", Lethal;
    /// SIGKILL to the controller.
    KillController = "kill_controller", Lethal;
    /// SIGKILL to the controller and every rank.
    KillEverything = "kill_everything", Lethal;
    /// SIGTERM to one rank.
    TermRank = "term_rank", Lethal;
    /// SIGTERM to the controller: a last checkpoint, and another life.
    TermController = "term_controller", Lethal;
    /// SIGSTOP to one rank; SIGCONT comes too late or in time.
    StopRank = "stop_rank", Bearable;
    /// SIGSTOP to the controller, SIGCONT later.
    StopController = "stop_controller", Bearable;
    /// SIGSTOP to one rank, SIGKILL to the controller; the rank wakes up in the next controller's time.
    ZombieRank = "zombie_rank", Lethal;
    /// One rank runs a tenth of the time.
    CpuStarvation = "cpu_starvation", Bearable;
    /// One rank is ended by the kernel for want of memory.
    OomKill = "oom_kill", Lethal;
    /// The disk under the run folder is full.
    DiskFull = "disk_full", Lethal;
    /// One rank can open no further file or socket.
    DescriptorExhaustion = "descriptor_exhaustion", Bearable;
    /// Bytes from one rank to another vanish.
    EdgePartitionOneWay = "edge_partition_one_way", Lethal;
    /// Bytes between two ranks vanish, both ways.
    EdgePartition = "edge_partition", Lethal;
    /// The connection between two ranks is reset.
    EdgeReset = "edge_reset", Lethal;
    /// Bytes between two ranks come late.
    EdgeDelay = "edge_delay", Bearable;
    /// Bytes between two ranks come slowly.
    EdgeThrottle = "edge_throttle", Bearable;
    /// One bit between two ranks is flipped.
    EdgeBitFlip = "edge_bit_flip", Lethal;
    /// Bytes between one rank and the controller vanish, both ways.
    ControlPartition = "control_partition", Lethal;
    /// The connection between one rank and the controller is reset.
    ControlReset = "control_reset", Lethal;
    /// One bit between one rank and the controller is flipped.
    ControlBitFlip = "control_bit_flip", Lethal;
    /// The store answers 503.
    StoreUnavailable = "store_unavailable", Bearable;
    /// The store answers late.
    StoreLatency = "store_latency", Bearable;
    /// The store does what it is asked and answers that it failed, or not at all.
    StoreLostAnswer = "store_lost_answer", Bearable;
    /// Uploads break off half-way.
    StoreTornUpload = "store_torn_upload", Bearable;
    /// A bit flips in what is read from the store, while every rank has lost its state.
    StoreCorruptRead = "store_corrupt_read", Lethal;
}

impl Kind {
    /// Whether it ends a controller's process.
    #[must_use]
    pub const fn kills_controller(self) -> bool {
        matches!(self, Self::KillController | Self::KillEverything | Self::ZombieRank)
    }

    /// Whether the controller's end is what is seen of it.
    #[must_use]
    pub const fn is_of_controller(self) -> bool {
        self.kills_controller() || matches!(self, Self::TermController)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_one_that_a_scenario_says() {
        for kind in Kind::ALL {
            let text = serde_json::to_string(kind).expect("JSON");
            assert_eq!(text, format!("\"{kind}\""));
        }
    }

    /// The page that explains them names each.
    #[test]
    fn each_kind_is_explained() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/CHAOS.md");
        let page = std::fs::read_to_string(path).expect("docs/CHAOS.md");
        for kind in Kind::ALL {
            assert!(
                page.contains(&format!("| `{kind}` |")),
                "docs/CHAOS.md does not explain {kind}"
            );
        }
    }
}
