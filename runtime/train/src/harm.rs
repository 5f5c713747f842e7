//! Harm done to a rank on purpose: one flipped bit, as a cosmic ray or a worn-out cell leaves it (DET-3).
//!
//! Chaos runs ask for it; nothing else does. It stands in the step because that is where memory is owned.

use crate::StepError;
use crate::state::RankState;
use crate::world::World;
use tarazed_domain::StepIndex;
use tarazed_kernels::{Device, View, ViewMut};

/// What is flipped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A working weight: the lanes of this rank are computed with it, and the next gather overwrites it.
    Weight,
    /// A master weight of an optimizer shard held here.
    Master,
    /// A first moment of an optimizer shard held here.
    FirstMoment,
    /// A second moment of an optimizer shard held here.
    SecondMoment,
    /// A master weight as the update makes it, hash and all: a wrong result, not a change of memory.
    Update,
}

/// One flip.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Harm {
    /// Before this step is computed, or a later one.
    pub step: StepIndex,
    /// In what.
    pub place: Place,
    /// Which of the shards held here, counted round.
    pub shard: usize,
    /// Which element, counted round.
    pub element: usize,
    /// Which bit of it.
    pub bit: u8,
    /// It is stuck: each time that very step is done.
    pub stuck: bool,
}

impl std::str::FromStr for Harm {
    type Err = String;

    /// `STEP:PLACE:SHARD:ELEMENT:BIT`, with places `weight`, `master`, `first`, `second`, `update`; `STEP+` for a stuck one.
    fn from_str(text: &str) -> Result<Self, String> {
        let fields: Vec<&str> = text.split(':').collect();
        let [step, place, shard, element, bit] = fields[..] else {
            return Err(format!("'{text}' is not STEP:PLACE:SHARD:ELEMENT:BIT"));
        };
        let number = |field: &str| field.parse::<u64>().map_err(|e| format!("'{field}' in '{text}': {e}"));
        Ok(Self {
            stuck: step.ends_with('+'),
            step: StepIndex(number(step.trim_end_matches('+'))?),
            place: match place {
                "weight" => Place::Weight,
                "master" => Place::Master,
                "first" => Place::FirstMoment,
                "second" => Place::SecondMoment,
                "update" => Place::Update,
                other => return Err(format!("no place '{other}' in '{text}'")),
            },
            shard: number(shard)? as usize,
            element: number(element)? as usize,
            bit: (number(bit)? % 32) as u8,
        })
    }
}

/// When in a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Moment {
    /// Nothing is computed yet.
    Begun,
    /// The own shards have taken it.
    Updated,
}

/// Flips the bit that is due, once. A wrong update of state that has no other copy is spared: nothing could tell.
pub(crate) fn strike<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    step: StepIndex,
    moment: Moment,
) -> Result<(), StepError> {
    let copies = world.holders.iter().map(Vec::len).min().unwrap_or(0);
    let due = |harm: &Harm| {
        let now = if harm.stuck {
            step == harm.step
        } else {
            step >= harm.step
        };
        now && (harm.place == Place::Update) == (moment == Moment::Updated)
            && (harm.place != Place::Update || copies > 1)
    };
    let Some(harm) = state.harm.filter(due) else {
        return Ok(());
    };
    state.harm = state.harm.filter(|harm| harm.stuck);
    tracing::warn!(?harm, "a bit is flipped on purpose");
    let device = &state.device;
    if harm.place == Place::Weight {
        let elements = device.len(&state.weights);
        flip(
            device,
            &mut state.stream,
            &mut state.weights,
            harm.element % elements,
            harm.bit,
        );
        return Ok(());
    }
    let place = harm.shard % state.shards.len().max(1);
    let Some(shard) = state.shards.values_mut().nth(place) else {
        return Ok(());
    };
    let mut inner = shard.write();
    let buffer = match harm.place {
        Place::FirstMoment => &mut inner.first_moment,
        Place::SecondMoment => &mut inner.second_moment,
        Place::Master | Place::Update | Place::Weight => &mut inner.master,
    };
    let elements = device.len(buffer);
    flip(device, &mut state.stream, buffer, harm.element % elements, harm.bit);
    drop(inner);
    if harm.place == Place::Update {
        shard.rehash(device, &mut state.stream, &state.layout)?;
    }
    Ok(())
}

fn flip<D: Device>(device: &D, stream: &mut D::Stream, buffer: &mut D::Buffer, element: usize, bit: u8) {
    let mut value = [0.0_f32];
    let read = device.download(stream, View::at(buffer, element), &mut value);
    let flipped = [f32::from_bits(value[0].to_bits() ^ 1 << bit)];
    let written = device.upload(stream, &flipped, ViewMut::at(buffer, element));
    if read.is_err() || written.and_then(|()| device.synchronize(stream)).is_err() {
        tracing::warn!("the bit could not be flipped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_harm_is_read_from_text() {
        let harm: Harm = "12:second:3:70:33".parse().expect("a harm");
        let expected = Harm {
            step: StepIndex(12),
            place: Place::SecondMoment,
            shard: 3,
            element: 70,
            bit: 1,
            stuck: false,
        };
        assert_eq!(harm, expected);
        let stuck: Harm = "12+:update:3:70:33".parse().expect("a harm");
        assert!(stuck.stuck && stuck.place == Place::Update);
        for wrong in ["", "1:2", "1:nowhere:0:0:0", "x:weight:0:0:0", "1:weight:0:0:0:0"] {
            assert!(wrong.parse::<Harm>().is_err(), "{wrong}");
        }
    }
}
