//! What fails, how often, how it shows and what it takes along.
//!
//! Rates are those of Llama 3's 54 days on 16,384 H100 (Grattafiori and others, arXiv 2407.21783, table 5): unexpected
//! interruptions divided by 21.2 million GPU-hours. The table does not say how a failure showed. The columns `seen`,
//! `hang_share` and `reach` are assumptions of this tier; together the hanging ones are a tenth of all, as in `ByteRobust`'s
//! symptoms (9.9 %). A drained host goes with all its ranks, as operators do it; so does that of a rank that computed
//! something wrong.

use crate::sim::random::Random;

/// How a failure shows to the runtime; when follows from its derived timeouts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// The process ends; its node agent sees it in milliseconds.
    Exit,
    /// The device thread stands still while the process is heard.
    Hang,
    /// The whole host is not heard any more.
    Silence,
    /// The process lives and its data plane reaches nobody.
    Connection,
    /// A step's result is wrong; whose, shows when the step is done again.
    Corruption,
}

/// What goes with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// One process, started again on its host.
    Rank,
    /// One host with all its ranks, replaced by a spare.
    Host,
    /// A host, or for a share of the failures every host of one switch.
    Network,
}

/// One kind of failure.
#[derive(Clone, Copy, Debug)]
pub struct Cause {
    /// As the table names it.
    pub name: &'static str,
    /// Failures in a million GPU-hours.
    pub per_million_hours: f64,
    /// How it shows where it does not hang.
    pub seen: Seen,
    /// Share of its failures that show as a hang.
    pub hang_share: f64,
    /// What it takes along.
    pub reach: Reach,
}

const fn cause(name: &'static str, per_million_hours: f64, seen: Seen, hang_share: f64, reach: Reach) -> Cause {
    Cause {
        name,
        per_million_hours,
        seen,
        hang_share,
        reach,
    }
}

/// Every kind, by falling rate.
pub const CAUSES: [Cause; 18] = [
    cause("faulty GPU", 6.97, Seen::Exit, 0.10, Reach::Host),
    cause("HBM", 3.39, Seen::Exit, 0.03, Reach::Host),
    cause("software", 2.54, Seen::Exit, 0.15, Reach::Rank),
    cause("switch or cable", 1.65, Seen::Silence, 0.0, Reach::Network),
    cause("host maintenance", 1.51, Seen::Silence, 0.0, Reach::Host),
    cause("SRAM", 0.89, Seen::Exit, 0.03, Reach::Host),
    cause("GSP", 0.80, Seen::Exit, 0.50, Reach::Host),
    cause("NIC", 0.33, Seen::Connection, 0.0, Reach::Host),
    cause("collective watchdog", 0.33, Seen::Hang, 1.0, Reach::Rank),
    cause("silent corruption", 0.28, Seen::Corruption, 0.0, Reach::Host),
    cause("thermal", 0.28, Seen::Exit, 0.0, Reach::Host),
    cause("SSD", 0.14, Seen::Exit, 0.0, Reach::Host),
    cause("power", 0.14, Seen::Silence, 0.0, Reach::Host),
    cause("chassis", 0.09, Seen::Silence, 0.0, Reach::Host),
    cause("IO board", 0.09, Seen::Silence, 0.0, Reach::Host),
    cause("dependency", 0.09, Seen::Exit, 0.0, Reach::Rank),
    cause("CPU", 0.09, Seen::Silence, 0.0, Reach::Host),
    cause("system memory", 0.09, Seen::Silence, 0.0, Reach::Host),
];

/// Failures of all kinds in a million GPU-hours.
#[must_use]
pub fn total_per_million_hours() -> f64 {
    CAUSES.iter().map(|cause| cause.per_million_hours).sum()
}

/// Share of all failures that hang.
#[must_use]
pub fn hang_share() -> f64 {
    let hanging: f64 = CAUSES.iter().map(|c| c.per_million_hours * c.hang_share).sum();
    hanging / total_per_million_hours()
}

/// A failure, drawn.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    /// Place in [`CAUSES`].
    pub cause: usize,
    /// How this one shows.
    pub seen: Seen,
    /// Every host of the switch is taken.
    pub whole_switch: bool,
}

/// Draws the kind of the next failure.
pub fn draw(random: &mut Random, switch_share: f64) -> Drawn {
    let mut left = random.unit() * total_per_million_hours();
    let at = CAUSES.iter().position(|cause| {
        left -= cause.per_million_hours;
        left < 0.0
    });
    // Rounding may leave a crumb behind the last one.
    let at = at.unwrap_or(CAUSES.len() - 1);
    let cause = CAUSES[at];
    Drawn {
        cause: at,
        seen: if random.chance(cause.hang_share) {
            Seen::Hang
        } else {
            cause.seen
        },
        whole_switch: cause.reach == Reach::Network && random.chance(switch_share),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_the_published_ones() {
        // 419 interruptions in 54 days on 16,384 GPUs: one in 50.7 thousand GPU-hours.
        let hours = 1e6 / total_per_million_hours();
        assert!((hours - 50_700.0).abs() < 300.0, "{hours}");
        assert!((hang_share() - 0.099).abs() < 0.005, "{}", hang_share());
    }

    #[test]
    fn drawn_kinds_follow_their_rates() {
        let mut random = Random::new(3);
        let mut counts = [0_u32; CAUSES.len()];
        let draws = 200_000;
        for _ in 0..draws {
            counts[draw(&mut random, 0.1).cause] += 1;
        }
        for (cause, count) in CAUSES.iter().zip(counts) {
            let expected = cause.per_million_hours / total_per_million_hours() * f64::from(draws);
            let off = (f64::from(count) - expected).abs();
            assert!(
                off < 5.0 * expected.sqrt(),
                "{}: {count}, expected {expected}",
                cause.name
            );
        }
    }
}
