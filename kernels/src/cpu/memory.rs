//! CPU memory: aligned, zeroed, fallible.

use crate::device::DeviceError;
use memmap2::MmapMut;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Bytes to which every buffer is aligned: a cache line and an AVX-512 register. Results do not depend on it (DET-1).
const ALIGNMENT_BYTES: usize = 64;
/// Buffers from this size on are mappings of their own, aligned to it: the kernel can back them with huge pages, and they go
/// back to the system when they are dropped. An allocator may keep what it is given back, and give the next thread other
/// memory: a rank that saves one shard after another then holds two.
const HUGE_PAGE_BYTES: usize = 2 * 1024 * 1024;

/// Flat f32 memory; both precisions are f32 on the CPU. Dereferences to a slice.
pub struct CpuBuffer {
    pointer: NonNull<f32>,
    len: usize,
    memory: Memory,
}

/// What a buffer's elements lie in.
enum Memory {
    /// No elements.
    None,
    /// The allocator's: the elements begin at its start.
    Heap(Layout),
    /// A mapping, longer than the elements: they begin at the first aligned address in it.
    Mapping(#[expect(dead_code, reason = "it is there as long as the buffer is")] MmapMut),
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
        let needed_bytes = len.saturating_mul(size_of::<f32>());
        match needed_bytes {
            0 => Some(Self {
                pointer: NonNull::dangling(),
                len,
                memory: Memory::None,
            }),
            HUGE_PAGE_BYTES.. => Self::mapped(len, needed_bytes),
            _ => Self::on_heap(len, needed_bytes),
        }
        .ok_or(out_of_memory(needed_bytes))
    }

    fn on_heap(len: usize, bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes, ALIGNMENT_BYTES).ok()?;
        // SAFETY: the layout's size is not zero.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) })?.cast();
        Some(Self {
            pointer,
            len,
            memory: Memory::Heap(layout),
        })
    }

    fn mapped(len: usize, bytes: usize) -> Option<Self> {
        let mut mapping = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES)?).ok()?;
        let offset = mapping.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // The rest behind whole pages is in small ones, or it would occupy a large one. A refusal of the advice costs speed alone.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise_range(memmap2::Advice::HugePage, offset, bytes - bytes % HUGE_PAGE_BYTES);
        // Longer than the elements by the alignment, it holds them behind the next aligned address.
        let pointer = NonNull::from(mapping.get_mut(offset..offset + bytes)?).cast();
        Some(Self {
            pointer,
            len,
            memory: Memory::Mapping(mapping),
        })
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

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        if let Memory::Heap(layout) = self.memory {
            // SAFETY: the memory came from `alloc_zeroed` with this same layout.
            unsafe { dealloc(self.pointer.as_ptr().cast(), layout) }
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

impl AsRef<[f32]> for CpuBuffer {
    fn as_ref(&self) -> &[f32] {
        self
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
