//! Floor 5: proofs by harm. A simulator that runs the production machines and actors in virtual time, and storms that harm
//! real processes.

pub mod scale;
pub mod sim;
pub mod storm;
