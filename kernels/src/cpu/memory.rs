//! CPU memory: aligned, zeroed, fallible.

use crate::device::DeviceError;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Bytes to which every buffer is aligned: a cache line and an AVX-512 register. Results do not depend on it (DET-1).
const ALIGNMENT_BYTES: usize = 64;
/// Buffers from this size on are aligned to it, so that the kernel can back them with huge pages.
const HUGE_PAGE_BYTES: usize = 2 * 1024 * 1024;

/// Flat f32 memory; both precisions are f32 on the CPU. Dereferences to a slice.
pub struct CpuBuffer {
    /// What was allocated; the elements begin at the next aligned address in it.
    base: NonNull<u8>,
    pointer: NonNull<f32>,
    len: usize,
}

// SAFETY: the buffer owns its memory, and shared access only reads.
unsafe impl Send for CpuBuffer {}
// SAFETY: as above.
unsafe impl Sync for CpuBuffer {}

/// The system does not say what it would have given.
pub(super) const fn out_of_memory(needed_bytes: usize) -> DeviceError {
    DeviceError::OutOfMemory {
        needed_bytes,
        memory: None,
    }
}

impl CpuBuffer {
    /// A zeroed buffer.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the system has no memory of that size.
    pub fn zeroed(len: usize) -> Result<Self, DeviceError> {
        if len == 0 {
            return Ok(Self {
                base: NonNull::dangling(),
                pointer: NonNull::dangling(),
                len,
            });
        }
        let needed_bytes = len.saturating_mul(size_of::<f32>());
        let out_of_memory = out_of_memory(needed_bytes);
        let Some((layout, alignment)) = layout(len) else {
            return Err(out_of_memory);
        };
        // SAFETY: the layout's size is not zero.
        let Some(base) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            return Err(out_of_memory);
        };
        // SAFETY: the allocation is longer than the elements by the alignment, so they fit behind the next aligned address.
        let pointer = unsafe { base.add(base.align_offset(alignment)) }.cast::<f32>();
        prefer_huge_pages(pointer, needed_bytes);
        Ok(Self { base, pointer, len })
    }

    /// A buffer with the values of `from`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn from_slice(from: &[f32]) -> Result<Self, DeviceError> {
        let mut buffer = Self::zeroed(from.len())?;
        buffer.copy_from_slice(from);
        Ok(buffer)
    }
}

/// What is allocated for `len` elements, and to what they are aligned in it. Asked for with a larger alignment, the
/// allocator would write zeros over fresh pages that are zero already, and every page would be touched at once.
fn layout(len: usize) -> Option<(Layout, usize)> {
    let bytes = len.checked_mul(size_of::<f32>())?;
    let alignment = if bytes >= HUGE_PAGE_BYTES {
        HUGE_PAGE_BYTES
    } else {
        ALIGNMENT_BYTES
    };
    let layout = Layout::from_size_align(bytes.checked_add(alignment)?, align_of::<f32>()).ok()?;
    Some((layout, alignment))
}

#[cfg(target_os = "linux")]
fn prefer_huge_pages(pointer: NonNull<f32>, bytes: usize) {
    if bytes >= HUGE_PAGE_BYTES {
        // SAFETY: the range is ours and page-aligned; the advice changes no contents, and a refusal changes nothing.
        unsafe {
            libc::madvise(pointer.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_: NonNull<f32>, _: usize) {}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        if self.len > 0
            && let Some((layout, _)) = layout(self.len)
        {
            // SAFETY: the memory came from `alloc_zeroed` with this same layout.
            unsafe { dealloc(self.base.as_ptr(), layout) }
        }
    }
}

impl Deref for CpuBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the pointer is valid and initialised for `len` elements, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl DerefMut for CpuBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for CpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuBuffer({} elements)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_aligned_and_sized() {
        for len in [1, 100, HUGE_PAGE_BYTES / 4 - 1, HUGE_PAGE_BYTES / 4 + 3] {
            let buffer = CpuBuffer::zeroed(len).unwrap();
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&x| x == 0.0));
            assert!(buffer.as_ptr().addr().is_multiple_of(ALIGNMENT_BYTES));
        }
        assert!(CpuBuffer::zeroed(0).unwrap().is_empty());
    }

    #[test]
    fn a_refusal_says_what_was_needed() {
        for len in [1 << 60, usize::MAX] {
            let Err(DeviceError::OutOfMemory { needed_bytes, .. }) = CpuBuffer::zeroed(len) else {
                panic!("{len} elements were granted");
            };
            assert!(needed_bytes >= 1 << 60);
        }
    }
}
