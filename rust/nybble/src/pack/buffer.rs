//! The memory of a packed matrix: one aligned allocation, filled in parallel.

#![allow(unsafe_code)]

use std::alloc::{alloc, dealloc};
use std::ptr::NonNull;

use crate::error::{Error, Result};
use crate::threads::Pool;

/// Alignment of every buffer: a cache line, and the widest vector load.
pub(crate) const ALIGN: usize = 64;

/// Size of a large page. Buffers of several of them start on such a boundary, so the system can back them with large
/// pages: decode then misses the TLB once in 2 MiB instead of once in 4 KiB.
const LARGE_PAGE: usize = 2 << 20;

/// Immutable bytes, aligned to [`ALIGN`], of exactly the requested length.
///
/// The length is exact on purpose: a kernel that reads past the end of a matrix is caught by address sanitizers instead of
/// silently reading padding.
pub(crate) struct Buffer {
    data: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: the buffer owns its memory and gives out shared references to it only.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.layout.size()).finish_non_exhaustive()
    }
}

/// The uninitialised start of a buffer, shared with the threads that fill it.
struct Base(*mut u8);

// SAFETY: `build` gives every thread its own units.
unsafe impl Sync for Base {}

impl Base {
    fn get(&self) -> *mut u8 {
        self.0
    }
}

impl Buffer {
    /// `units` runs of `unit` bytes; `fill(i, bytes)` writes run `i`, which it gets zeroed.
    ///
    /// The runs are filled on the pool's threads, so each page is first touched by the thread that will later read it. A
    /// size the system cannot give is an error about `name`.
    pub(crate) fn build(
        name: &str,
        units: usize,
        unit: usize,
        pool: &Pool,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<Self> {
        let refused = || Error::argument(name, format!("memory for {units} x {unit} bytes"), "out of memory");
        let len = units.checked_mul(unit).ok_or_else(refused)?;
        let align = if len >= 2 * LARGE_PAGE { LARGE_PAGE } else { ALIGN };
        let layout = std::alloc::Layout::from_size_align(len, align).map_err(|_| refused())?;
        if len == 0 {
            return Ok(Self { data: NonNull::<Line>::dangling().cast(), layout });
        }
        // SAFETY: the size is not zero.
        let data = NonNull::new(unsafe { alloc(layout) }).ok_or_else(refused)?;
        // Made before filling: if `fill` panics, the memory is freed and nobody sees the unfilled part.
        let buffer = Self { data, layout };
        let base = Base(buffer.data.as_ptr());
        pool.split(units, 1, &|range| {
            for i in range {
                // SAFETY: run `i` lies inside the allocation, and `split` gives `i` to one thread only. The bytes are
                // initialised before a slice of them exists.
                let run = unsafe {
                    let start = base.get().add(i * unit);
                    start.write_bytes(0, unit);
                    std::slice::from_raw_parts_mut(start, unit)
                };
                fill(i, run);
            }
        });
        Ok(buffer)
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `build` initialised all of them, and nothing writes them afterwards.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated in `build` with this layout.
            unsafe { dealloc(self.data.as_ptr(), self.layout) }
        }
    }
}

/// Stands for the aligned address of an empty buffer.
#[repr(align(64))]
struct Line;

const _: () = assert!(align_of::<Line>() == ALIGN);

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
        for (units, unit) in [(usize::MAX, 2), (1, isize::MAX as usize), (1 << 40, 1 << 20)] {
            let error = Buffer::build("w", units, unit, &pool, &|_, _| {}).expect_err("too large");
            assert!(error.to_string().starts_with("w: "), "{error}");
        }
    }
}
