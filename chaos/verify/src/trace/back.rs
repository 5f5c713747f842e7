//! Roll back and skip: a step that starts from an older state than that of the line before it.
//!
//! What the lines in between trained on is used, once like everything, and its effect is undone. Checked is what the trace
//! alone can show: that a rollback goes back to a line that is there, whose state no earlier one has left behind, and that it
//! names the very draws whose effect is undone.

/// As a decision says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rollback {
    /// Steps in the state that is gone back to.
    pub to: u64,
    /// Of each domain: the first draw without effect, over all epochs, and how many.
    pub discarded: Vec<(u64, u64)>,
}

struct Standing {
    decision: u64,
    at: u64,
    rollback: Rollback,
}

/// The rollbacks of a trace, and what each step drew.
#[derive(Default)]
pub struct Backs {
    standing: Vec<Standing>,
    /// Sequences of each domain that there was, step by step.
    counts: Vec<Box<[u32]>>,
}

impl Backs {
    /// Takes over a rollback decided on this line that acts at the step `at`, counted from 0, at which there are so many domains.
    pub fn decide(
        &mut self,
        decision: u64,
        line: u64,
        at: u64,
        rollback: &Rollback,
        domains: usize,
    ) -> Result<(), String> {
        let to = rollback.to;
        if to >= line {
            return Err(format!("it goes back to step {to}, which is not before line {line}"));
        }
        if rollback.discarded.len() != domains {
            let named = rollback.discarded.len();
            return Err(format!("it names draws of {named} domains, not of {domains}"));
        }
        if let Some(last) = self.standing.last().filter(|last| last.at >= at) {
            return Err(format!("it acts at step {at}, and an earlier one at step {}", last.at));
        }
        let over = |other: &&Standing| other.rollback.to < to && to <= other.at;
        if let Some(other) = self.standing.iter().find(over) {
            return Err(format!(
                "it goes back to step {to}, which decision {} has left behind",
                other.decision
            ));
        }
        self.standing.push(Standing {
            decision,
            at,
            rollback: rollback.clone(),
        });
        Ok(())
    }

    /// Takes one back, if it is one; it must not have acted by step `from`.
    pub fn veto(&mut self, decision: u64, from: u64) -> Result<(), String> {
        let Some(position) = self.standing.iter().position(|back| back.decision == decision) else {
            return Ok(());
        };
        let at = self.standing[position].at;
        if at < from {
            return Err(format!("decision {decision} has gone back at step {at} already"));
        }
        self.standing.remove(position);
        Ok(())
    }

    /// The next step is about to draw; says what is wrong with the rollback that acts at it, if one does.
    pub fn begin(&self) -> Option<String> {
        let step = self.counts.len() as u64;
        let back = self.standing.iter().find(|back| back.at == step)?;
        let Rollback { to, discarded } = &back.rollback;
        let drawn = |steps: u64, domain: usize| -> u64 {
            let before = self.counts.iter().take(steps as usize);
            // Of a domain that came later nothing was drawn before.
            before
                .filter_map(|counts| counts.get(domain))
                .map(|&count| u64::from(count))
                .sum()
        };
        discarded.iter().enumerate().find_map(|(domain, &said)| {
            let (first, end) = (drawn(*to, domain), drawn(step, domain));
            (said != (first, end - first)).then(|| {
                format!(
                    "decision {} says that of domain {domain} {} draws from {} on have no effect; they are {} from {first} on",
                    back.decision,
                    said.1,
                    said.0,
                    end - first
                )
            })
        })
    }

    /// What a step drew.
    pub fn drew(&mut self, counts: &[u32]) {
        self.counts.push(counts.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(to: u64, discarded: &[(u64, u64)]) -> Rollback {
        Rollback {
            to,
            discarded: discarded.to_vec(),
        }
    }

    #[test]
    fn what_has_no_effect_is_named_exactly() {
        // Steps 2, 3 and 4, behind what steps 0 and 1 drew.
        for (discarded, good) in [
            ([(4, 6), (2, 3)], true),
            ([(4, 6), (2, 2)], false),
            ([(3, 6), (2, 3)], false),
        ] {
            let mut backs = Backs::default();
            (0..4).for_each(|_| backs.drew(&[2, 1]));
            backs.decide(7, 4, 5, &back(2, &discarded), 2).unwrap();
            assert_eq!(backs.begin(), None, "it acts later");
            backs.drew(&[2, 1]);
            assert_eq!(backs.begin().is_none(), good, "{discarded:?}");
        }
    }

    /// A domain that comes between the decision and its step, or between the state gone back to and that step.
    #[test]
    fn domains_that_came_later_have_drawn_nothing_before() {
        for (third, good) in [((0, 5), true), ((0, 4), false), ((1, 5), false)] {
            let mut backs = Backs::default();
            (0..4).for_each(|_| backs.drew(&[2, 1]));
            assert!(backs.decide(7, 4, 5, &back(2, &[(4, 6), (2, 3)]), 3).is_err());
            backs.decide(7, 4, 5, &back(2, &[(4, 6), (2, 3), third]), 3).unwrap();
            backs.drew(&[2, 1, 5]);
            assert_eq!(backs.begin().is_none(), good, "{third:?}");
        }
    }

    #[test]
    fn a_rollback_goes_to_a_state_that_stands() {
        let mut backs = Backs::default();
        let none = [(0, 0)];
        let refused = |backs: &mut Backs, line, at, to, part: &str| {
            let why = backs.decide(9, line, at, &back(to, &none), 1).unwrap_err();
            assert!(why.contains(part), "{why}");
        };
        refused(&mut backs, 8, 10, 8, "not before line 8");
        assert!(
            backs
                .decide(9, 8, 10, &back(2, &[]), 1)
                .unwrap_err()
                .contains("0 domains")
        );
        backs.decide(1, 8, 10, &back(5, &none), 1).unwrap();
        refused(&mut backs, 8, 10, 5, "an earlier one at step 10");
        for dead in [6, 10] {
            refused(&mut backs, 16, 18, dead, "decision 1 has left behind");
        }
        backs.veto(3, 12).unwrap();
        assert!(backs.veto(1, 11).unwrap_err().contains("already"));
        for live in [5, 11, 0] {
            let mut backs = Backs::default();
            backs.decide(1, 8, 10, &back(5, &none), 1).unwrap();
            backs.decide(2, 16, 18, &back(live, &none), 1).unwrap();
        }
        backs.veto(1, 10).unwrap();
        backs.decide(2, 16, 18, &back(6, &none), 1).unwrap();
    }
}
