//! Harm done to a rank on purpose: one flipped bit, as a cosmic ray or a worn-out cell leaves it (DET-3); or a part of it that
//! stands still, as a deadlock or a driver that never returns leaves it (SUP-4).
//!
//! Chaos runs ask for it; nothing else does. It stands in the step because that is where memory is owned.

use crate::StepError;
use crate::state::RankState;
use crate::world::World;
use std::time::Duration;
use tarazed_domain::{LaneIndex, LaneRange, StepIndex};
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
    /// The gradient of a lane computed here, before it is looked at, added to others and sent: only an audit of that very lane
    /// can tell. What changes in sums of lanes is in no audit.
    Gradient,
    /// A master weight as the update makes it, hash and all: a wrong result, not a change of memory.
    Update,
}

impl Place {
    /// When in a step it is flipped.
    const fn moment(self) -> Moment {
        match self {
            Self::Weight | Self::Master | Self::FirstMoment | Self::SecondMoment => Moment::Begun,
            Self::Gradient => Moment::Computed,
            Self::Update => Moment::Updated,
        }
    }
}

/// One flip.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Harm {
    /// Before this step is computed, or a later one.
    pub step: StepIndex,
    /// In what.
    pub place: Place,
    /// Which of the shards held here, or of the lanes computed here, counted round.
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

    /// `STEP:PLACE:SHARD:ELEMENT:BIT`, with places `weight`, `master`, `first`, `second`, `gradient`, `update`; `STEP+` for a
    /// stuck one.
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
                "gradient" => Place::Gradient,
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
    /// A lane has just been computed.
    Computed,
    /// The own shards have taken it.
    Updated,
}

impl Harm {
    /// The lane whose gradient is meant, where these are computed.
    pub(crate) fn lane(self, range: LaneRange) -> Option<LaneIndex> {
        range.lanes().nth(self.shard % range.len().max(1))
    }

    /// Flips the bit.
    pub(crate) fn flip<D: Device>(self, device: &D, stream: &mut D::Stream, buffer: &mut D::Buffer) {
        let element = self.element % device.len(buffer);
        let mut value = [0.0_f32];
        let read = device.download(stream, View::at(buffer, element), &mut value);
        let flipped = [f32::from_bits(value[0].to_bits() ^ 1 << self.bit)];
        let written = device.upload(stream, &flipped, ViewMut::at(buffer, element));
        if read.is_err() || written.and_then(|()| device.synchronize(stream)).is_err() {
            tracing::warn!("the bit could not be flipped");
        }
    }
}

/// What is due at this moment, once; or each time, where it is stuck.
pub(crate) fn take_due(asked: &mut Option<Harm>, step: StepIndex, moment: Moment) -> Option<Harm> {
    let due = asked.take_if(|harm| {
        let now = if harm.stuck {
            step == harm.step
        } else {
            step >= harm.step
        };
        now && harm.place.moment() == moment
    })?;
    *asked = Some(due).filter(|harm| harm.stuck);
    tracing::warn!(harm = ?due, "a bit is flipped on purpose");
    Some(due)
}

/// Does what is due at a moment of the step itself. A wrong update of state that has no other copy is spared: nothing could
/// tell.
pub(crate) fn strike<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    step: StepIndex,
    moment: Moment,
) -> Result<(), StepError> {
    let hangs = |hang: Hang| hang.part == Part::Device && step >= hang.step;
    if moment == Moment::Begun && state.hang.is_some_and(hangs) {
        tracing::warn!("the device thread stands still on purpose");
        stand_still();
    }
    let copies = world.holders.iter().map(Vec::len).min().unwrap_or(0);
    if moment == Moment::Updated && copies < 2 {
        return Ok(());
    }
    let Some(harm) = take_due(&mut state.harm, step, moment) else {
        return Ok(());
    };
    let device = &state.device;
    if harm.place == Place::Weight {
        harm.flip(device, &mut state.stream, &mut state.weights);
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
        Place::Master | Place::Update | Place::Weight | Place::Gradient => &mut inner.master,
    };
    harm.flip(device, &mut state.stream, buffer);
    drop(inner);
    if harm.place == Place::Update {
        shard.rehash(device, &mut state.stream, &state.layout)?;
    }
    Ok(())
}

/// What of a rank stands still, without a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The device thread: heartbeats go on, and say that nothing is done.
    Device,
    /// The actors: no heartbeat comes, and the device thread goes on until it needs them.
    Runtime,
}

/// One hang: for good.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hang {
    /// Before this step is computed, or a later one.
    pub step: StepIndex,
    /// Of what.
    pub part: Part,
}

impl std::str::FromStr for Hang {
    type Err = String;

    /// `STEP:PART`, with parts `device` and `runtime`.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((step, part)) = text.split_once(':') else {
            return Err(format!("'{text}' is not STEP:PART"));
        };
        let number = step.parse::<u64>();
        Ok(Self {
            step: StepIndex(number.map_err(|e| format!("'{step}' in '{text}': {e}"))?),
            part: match part {
                "device" => Part::Device,
                "runtime" => Part::Runtime,
                other => return Err(format!("no part '{other}' in '{text}'")),
            },
        })
    }
}

/// Keeps the thread that calls it, for good.
pub fn stand_still() {
    loop {
        std::thread::sleep(Duration::from_secs(1));
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
        let gradient: Harm = "12:gradient:3:70:33".parse().expect("a harm");
        assert_eq!(gradient.place, Place::Gradient);
        for wrong in ["", "1:2", "1:nowhere:0:0:0", "x:weight:0:0:0", "1:weight:0:0:0:0"] {
            assert!(wrong.parse::<Harm>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_hang_is_read_from_text() {
        for (text, part) in [("40:device", Part::Device), ("40:runtime", Part::Runtime)] {
            let step = StepIndex(40);
            assert_eq!(text.parse::<Hang>(), Ok(Hang { step, part }));
        }
        for wrong in ["", "40", "x:device", "40:nothing", "40:device:1"] {
            assert!(wrong.parse::<Hang>().is_err(), "{wrong}");
        }
    }

    /// A bit flips at its moment, and once where it is not stuck; of a lane that is computed here.
    #[test]
    fn a_harm_is_due_at_its_moment() {
        let mut asked: Option<Harm> = "12:gradient:5:70:3".parse().ok();
        assert_eq!(take_due(&mut asked, StepIndex(11), Moment::Computed), None);
        assert_eq!(take_due(&mut asked, StepIndex(12), Moment::Begun), None);
        let due = take_due(&mut asked, StepIndex(13), Moment::Computed).expect("it is due");
        let range = LaneRange { start: 4, end: 7 };
        assert_eq!(due.lane(range), Some(LaneIndex(6)));
        assert_eq!(due.lane(LaneRange { start: 4, end: 4 }), None);
        assert_eq!(asked, None);

        let mut stuck: Option<Harm> = "12+:update:0:70:3".parse().ok();
        assert_eq!(take_due(&mut stuck, StepIndex(13), Moment::Updated), None);
        for _ in 0..2 {
            assert!(take_due(&mut stuck, StepIndex(12), Moment::Updated).is_some());
        }
    }
}
