//! Reading an rkyv 0.8 archive without rkyv: numbers, texts, lists and options at given places of a byte slice.
//!
//! The layout is that of `docs/FORMATS.md`: little-endian numbers at their natural alignment, fields in order as in C,
//! references as signed 32-bit distances from their own place. Every access is checked against the slice: a reference that
//! leaves it, a text that is not UTF-8 or a tag that does not exist is an error with its place.

/// Bytes of a text or a list where it is referred to.
pub const REFERENCE_BYTES: usize = 8;

#[derive(Clone, Copy)]
pub struct Archive<'a>(pub &'a [u8]);

impl<'a> Archive<'a> {
    pub fn bytes(&self, at: usize, length: usize) -> Result<&'a [u8], String> {
        let end = at.checked_add(length);
        end.and_then(|end| self.0.get(at..end))
            .ok_or_else(|| format!("{length} bytes at {at} lie outside the archive"))
    }

    pub fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(at, N)?);
        Ok(array)
    }

    pub fn u32(&self, at: usize) -> Result<u32, String> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub fn u64(&self, at: usize) -> Result<u64, String> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// Where the reference at `at` points, seen from `origin`.
    fn follow(&self, origin: usize, at: usize) -> Result<usize, String> {
        let distance = self.array(at).map(i32::from_le_bytes)?;
        let target = origin.checked_add_signed(distance as isize);
        target
            .filter(|target| *target <= self.0.len())
            .ok_or_else(|| format!("the reference at {at} leaves the archive"))
    }

    /// Up to eight bytes lie in place, ended by 0xFF if fewer. The two highest bits of the first byte of a longer one are
    /// `10`, which begins no text; they are not part of its length.
    pub fn text(&self, at: usize) -> Result<&'a str, String> {
        let place: &'a [u8] = self.bytes(at, REFERENCE_BYTES)?;
        let bytes = if place[0] & 0xc0 == 0x80 {
            let stored = self.u32(at)?;
            let length = (stored & 0x3f) | (stored & !0xff) >> 2;
            self.bytes(self.follow(at, at + 4)?, length as usize)?
        } else {
            let length = place.iter().position(|byte| *byte == 0xff);
            &place[..length.unwrap_or(REFERENCE_BYTES)]
        };
        std::str::from_utf8(bytes).map_err(|_| format!("the text at {at} is not UTF-8"))
    }

    /// Places of the elements of a list, each `stride` bytes long.
    pub fn list(&self, at: usize, stride: usize) -> Result<impl ExactSizeIterator<Item = usize> + use<>, String> {
        let count = self.u32(at + 4)? as usize;
        let first = if count == 0 { 0 } else { self.follow(at, at)? };
        let length = count.checked_mul(stride).ok_or("a list longer than any archive")?;
        self.bytes(first, length)?;
        Ok((0..count).map(move |index| first + index * stride))
    }

    /// The place of an optional value of the given alignment, if there is one.
    pub fn option(&self, at: usize, alignment: usize) -> Result<Option<usize>, String> {
        match self.bytes(at, 1)?[0] {
            0 => Ok(None),
            1 => Ok(Some(at + alignment)),
            tag => Err(format!("the option at {at} has tag {tag}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_lie_in_place_or_elsewhere() {
        let long = "exactly 70 bytes long, so that its length needs both parts of the word";
        assert_eq!(long.len(), 70);
        let mut bytes = long.as_bytes().to_vec();
        let at = bytes.len();
        // 70 = 1·64 + 6: the six low bits stay, a 1 0 mark follows, the rest moves up by two.
        bytes.extend_from_slice(&(6_u32 | 0x80 | 1 << 8).to_le_bytes());
        bytes.extend_from_slice(&(-70_i32).to_le_bytes());
        bytes.extend_from_slice(b"eight by");
        bytes.extend_from_slice(b"abc\xff\0\0\0\0");
        bytes.extend_from_slice(b"\xff\0\0\0\0\0\0\0");
        let archive = Archive(&bytes);
        assert_eq!(archive.text(at), Ok(long));
        assert_eq!(archive.text(at + 8), Ok("eight by"));
        assert_eq!(archive.text(at + 16), Ok("abc"));
        assert_eq!(archive.text(at + 24), Ok(""));
        assert!(archive.text(at + 25).is_err(), "it ends beyond the archive");
        bytes[0] = 0xff;
        assert!(Archive(&bytes).text(at).is_err(), "no UTF-8");
        bytes[at + 4..at + 8].copy_from_slice(&(-71_i32).to_le_bytes());
        assert!(Archive(&bytes).text(at).unwrap_err().contains("leaves the archive"));
    }

    #[test]
    fn lists_and_options_are_checked() {
        let mut bytes = vec![7, 0, 0, 0, 9, 0, 0, 0];
        bytes.extend_from_slice(&(-8_i32).to_le_bytes());
        bytes.extend_from_slice(&2_u32.to_le_bytes());
        let archive = Archive(&bytes);
        let read: Vec<u32> = archive.list(8, 4).unwrap().map(|at| archive.u32(at).unwrap()).collect();
        assert_eq!(read, [7, 9]);
        assert!(archive.list(8, 9).is_err(), "the second element ends outside");
        assert_eq!(archive.option(1, 8), Ok(None));
        assert!(archive.option(0, 8).is_err(), "tag 7");
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Archive(&bytes).list(8, usize::MAX).is_err());
        assert!(Archive(&bytes).u64(9).is_err());
    }
}
