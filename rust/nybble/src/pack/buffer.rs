//! The memory of a packed matrix: one aligned allocation, filled in parallel.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::threads::Pool;

/// Alignment of every buffer: a cache line, and the widest vector load.
pub(crate) const ALIGN: usize = 64;

/// Size of a large page.
const LARGE_PAGE: usize = 2 << 20;

/// From this size on a buffer is a mapping of its own in large pages, where the system has them: decode then misses the
/// TLB once in 2 MiB instead of once in 4 KiB, and packing takes one page fault instead of 512.
const MAPPED: usize = 2 * LARGE_PAGE;

/// Immutable bytes, aligned to [`ALIGN`], of exactly the requested length.
///
/// Small buffers are allocations of the exact length, so that an address sanitizer catches a kernel that reads past the
/// end of a matrix.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Memory,
    /// Where the bytes start in the memory, and how many there are.
    start: usize,
    len: usize,
}

#[derive(Debug)]
enum Memory {
    Heap(Heap),
    Map(MmapMut),
}

/// An aligned allocation; empty ones hold no memory.
#[derive(Debug)]
struct Heap {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory, like a `Box<[u8]>`.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

impl Heap {
    fn new(len: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, ALIGN).ok()?;
        if len == 0 {
            return Some(Self { data: NonNull::<Line>::dangling().cast(), layout });
        }
        // SAFETY: the size is not zero.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { data, layout })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `new` allocated and zeroed this many bytes.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.layout.size()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.data.as_ptr(), self.layout) }
        }
    }
}

/// Stands for the aligned address of an empty buffer.
#[repr(align(64))]
struct Line;

const _: () = assert!(align_of::<Line>() == ALIGN);

impl Buffer {
    /// `units` runs of `unit` bytes; `fill(i, bytes)` writes run `i`, which it gets zeroed.
    ///
    /// The runs are filled on the pool's threads, so the pages of a large buffer are first touched, and so provided by the
    /// system, in parallel. A size the system cannot give is an error about `name`.
    pub(crate) fn build(
        name: &str,
        units: usize,
        unit: usize,
        pool: &Pool,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<Self> {
        let refused = || Error::argument(name, format!("memory for {units} x {unit} bytes"), "out of memory");
        let len = units.checked_mul(unit).ok_or_else(refused)?;
        let mut buffer = Self::zeroed(len).ok_or_else(refused)?;
        if len > 0 {
            pool.split_rows(buffer.bytes_mut(), unit, &|first, runs| {
                for (i, run) in runs.chunks_exact_mut(unit).enumerate() {
                    fill(first + i, run);
                }
            });
        }
        Ok(buffer)
    }

    /// That many zeros; none if the system has no room for them.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        if len < MAPPED {
            return Some(Self { memory: Memory::Heap(Heap::new(len)?), start: 0, len });
        }
        let mapped = len.checked_add(LARGE_PAGE).filter(|&n| isize::try_from(n).is_ok())?;
        let map = MmapMut::map_anon(mapped).ok()?;
        let start = map.as_ptr().align_offset(LARGE_PAGE).min(LARGE_PAGE);
        // Whole pages only: the rest of the last one would be memory held for nothing. A refusal changes no result.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, len / LARGE_PAGE * LARGE_PAGE);
        Some(Self { memory: Memory::Map(map), start, len })
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Heap(heap) => heap.bytes(),
            Memory::Map(map) => &map[self.start..][..self.len],
        }
    }

    /// The bytes.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Heap(heap) => heap.bytes_mut(),
            Memory::Map(map) => &mut map[self.start..][..self.len],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_zeroed_aligned_and_filled_once() {
        for threads in [1, 3] {
            let pool = Pool::new(threads).expect("a pool");
            for (units, unit) in [(0, 5), (5, 0), (1, 1), (7, 33), (5, LARGE_PAGE)] {
                let buffer = Buffer::build("w", units, unit, &pool, &|i, run| {
                    assert!(run.iter().all(|&b| b == 0) && run.len() == unit);
                    if let Some(first) = run.first_mut() {
                        *first = i as u8 + 1;
                    }
                })
                .expect("memory");
                assert_eq!(buffer.bytes().len(), units * unit);
                assert_eq!(buffer.bytes().as_ptr() as usize % ALIGN, 0);
                for i in (0..units).filter(|_| unit > 0) {
                    assert_eq!(buffer.bytes()[i * unit], i as u8 + 1);
                }
            }
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let pool = Pool::new(1).expect("a pool");
        for (units, unit) in [(usize::MAX, 2), (1, isize::MAX as usize), (1 << 40, 1 << 20), (1, usize::MAX)]
        {
            let error = Buffer::build("w", units, unit, &pool, &|_, _| {}).expect_err("too large");
            assert!(error.to_string().starts_with("w: "), "{error}");
        }
    }
}
