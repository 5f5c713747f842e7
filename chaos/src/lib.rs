//! Floor 5: proofs by harm. A simulator that runs the production machines and actors in virtual time.

pub mod scale;
pub mod sim;
