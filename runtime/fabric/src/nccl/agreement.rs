//! Whether the ranks of a generation use NCCL: what each brings, and the one answer that follows from it.

use std::collections::BTreeMap;
use tarazed_domain::Rank;
use tarazed_kernels::cuda::nccl::version_text;

/// Bytes of an encoded [`Offer`].
pub const OFFER_BYTES: usize = 128;
const DIGEST_BYTES: usize = 32;
const REASON_AT: usize = 1 + 4 + DIGEST_BYTES;
/// A reason is cut to so many bytes.
const REASON_BYTES_MAX: usize = OFFER_BYTES - REASON_AT - 1;

/// What a rank brings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Offer {
    /// A CUDA device and NCCL.
    Ready {
        /// NCCL's version, e.g. 22809: another one on another rank may speak another protocol.
        version: u32,
        /// The device that it computes on, whatever process asks.
        place: [u8; DIGEST_BYTES],
    },
    /// Not both of them.
    Without {
        /// Why, in one line.
        because: String,
    },
}

impl Offer {
    /// A device on a host, as NCCL tells devices apart: hosts by name, `bus_id` within each.
    #[must_use]
    pub fn ready(version: u32, host: &str, bus_id: &str) -> Self {
        let mut place = blake3::Hasher::new_derive_key("tarazed 2026 place of a device");
        place.update(&(host.len() as u64).to_le_bytes());
        place.update(host.as_bytes());
        place.update(bus_id.as_bytes());
        let place = *place.finalize().as_bytes();
        Self::Ready { version, place }
    }

    /// As it travels. A reason that is too long is cut.
    #[must_use]
    pub fn encode(&self) -> [u8; OFFER_BYTES] {
        let mut bytes = [0; OFFER_BYTES];
        match self {
            Self::Ready { version, place } => {
                bytes[0] = 1;
                bytes[1..5].copy_from_slice(&version.to_le_bytes());
                bytes[5..REASON_AT].copy_from_slice(place);
            }
            Self::Without { because } => {
                let ends = because.char_indices().map(|(start, letter)| start + letter.len_utf8());
                let length = ends.take_while(|&end| end <= REASON_BYTES_MAX).last().unwrap_or(0);
                bytes[REASON_AT] = length as u8;
                bytes[REASON_AT + 1..][..length].copy_from_slice(&because.as_bytes()[..length]);
            }
        }
        bytes
    }

    /// What another rank sent; bytes that mean nothing are no offer.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        let unreadable = || Self::Without {
            because: "its offer cannot be read".to_owned(),
        };
        let Ok(bytes) = <&[u8; OFFER_BYTES]>::try_from(bytes) else {
            return unreadable();
        };
        match bytes[0] {
            1 => Self::Ready {
                version: u32::from_le_bytes(std::array::from_fn(|i| bytes[1 + i])),
                place: std::array::from_fn(|i| bytes[5 + i]),
            },
            0 => {
                let length = usize::from(bytes[REASON_AT]).min(REASON_BYTES_MAX);
                match std::str::from_utf8(&bytes[REASON_AT + 1..][..length]) {
                    Ok(because) => Self::Without {
                        because: because.to_owned(),
                    },
                    Err(_) => unreadable(),
                }
            }
            _ => unreadable(),
        }
    }
}

/// Whether ranks with these offers, in order, use NCCL: the same list gives the same answer on each.
///
/// # Errors
/// Why they do not, in one line that names a rank.
pub fn agree(offers: &[Offer]) -> Result<(), String> {
    let mut places = BTreeMap::new();
    let mut first_version = None;
    for (rank, offer) in (0..).map(Rank).zip(offers) {
        match offer {
            Offer::Without { because } => return Err(format!("rank {rank}: {because}")),
            Offer::Ready { version, place } => {
                let first = *first_version.get_or_insert(*version);
                if first != *version {
                    let (first, other) = (version_text(first), version_text(*version));
                    return Err(format!("rank 0 has NCCL {first}, and rank {rank} has {other}"));
                }
                if let Some(other) = places.insert(*place, rank) {
                    return Err(format!("ranks {other} and {rank} share a GPU"));
                }
            }
        }
    }
    Ok(())
}

/// This host as NCCL names it: by `NCCL_HOSTID` where that is set, else by its name and boot.
#[must_use]
pub fn host_identity() -> String {
    if let Some(set) = std::env::var_os("NCCL_HOSTID").filter(|set| !set.is_empty()) {
        return set.to_string_lossy().into_owned();
    }
    // Where one cannot be read, hosts look alike, and ranks that only seem to share a GPU stay on sockets.
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (name, boot) = (
        read("/proc/sys/kernel/hostname"),
        read("/proc/sys/kernel/random/boot_id"),
    );
    format!("{} {}", name.trim(), boot.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ready(host: &str, bus_id: &str) -> Offer {
        Offer::ready(22_809, host, bus_id)
    }

    fn without(because: &str) -> Offer {
        let because = because.to_owned();
        Offer::Without { because }
    }

    #[test]
    fn all_or_none() {
        let of_its_own = [ready("a", "0"), ready("a", "1"), ready("b", "0")];
        assert_eq!(agree(&of_its_own), Ok(()));
        let mut one_without = of_its_own.to_vec();
        one_without[2] = without("libnccl.so.2 is not there");
        assert_eq!(agree(&one_without).unwrap_err(), "rank 2: libnccl.so.2 is not there");
        let mut other_version = of_its_own.to_vec();
        other_version[1] = Offer::ready(22_703, "a", "1");
        let text = agree(&other_version).unwrap_err();
        assert_eq!(text, "rank 0 has NCCL 2.28.9, and rank 1 has 2.27.3");
        let shared = [ready("a", "0"), ready("b", "0"), ready("a", "0")];
        assert_eq!(agree(&shared).unwrap_err(), "ranks 0 and 2 share a GPU");
        // Where the host's name ends and the device's begins is part of it.
        assert_eq!(agree(&[ready("a", "bc"), ready("ab", "c")]), Ok(()));
    }

    proptest! {
        #[test]
        fn an_offer_survives_the_wire(because in ".{0,120}", version: u32, host in ".{0,9}", bus_id in ".{0,9}") {
            let offer = Offer::ready(version, &host, &bus_id);
            prop_assert_eq!(Offer::decode(&offer.encode()), offer);
            let Offer::Without { because: heard } = Offer::decode(&without(&because).encode()) else {
                panic!("an offer of nothing became one")
            };
            prop_assert!(because.starts_with(&heard));
            prop_assert!(heard == because || heard.len() + 4 > REASON_BYTES_MAX);
        }

        #[test]
        fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Offer::decode(&bytes);
        }
    }
}
