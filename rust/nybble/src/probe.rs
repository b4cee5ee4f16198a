//! What the machine can do, measured: the yardstick for every speed this crate reports.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use crate::kernels::tiles::fetch_ahead;
use crate::threads::Pool;

/// Passes over the buffer; the best one counts, for neighbours on the machine can only slow a pass down.
const PASSES: usize = 6;

/// Bytes a second that the pool's threads together read from a buffer of `bytes`, each its own contiguous part.
///
/// A buffer several times larger than the last-level cache measures the memory, which is the limit of decode: no model
/// generates more tokens a second than this divided by the bytes it reads a token. When the system does not give that much
/// memory, a smaller buffer is used; 0 means that there was none at all.
pub fn read_bandwidth(pool: &Pool, bytes: usize) -> f64 {
    let mut words = bytes.div_ceil(size_of::<u64>()).max(1);
    let mut data: Vec<u64> = Vec::new();
    while data.try_reserve_exact(words).is_err() {
        words /= 2;
        if words == 0 {
            return 0.0;
        }
    }
    // Written, not just reserved: untouched pages would all be one page of zeros.
    data.resize(words, 1);
    pool.split_rows(&mut data, 1, &|first, part| {
        for (i, word) in part.iter_mut().enumerate() {
            *word = (first + i) as u64;
        }
    });
    let total = Mutex::new(0u64);
    let mut best = f64::INFINITY;
    for pass in 0..PASSES {
        let ahead = pass % 2 == 1; // as the kernels read; which way is faster depends on the machine
        let start = Instant::now();
        pool.split(words, 8, &|range| {
            let mut sums = [0u64; 16];
            let (runs, rest) = data[range].as_chunks::<16>();
            for run in runs {
                if ahead {
                    fetch_ahead::<64>(run.as_ptr().cast());
                }
                for (sum, word) in sums.iter_mut().zip(run) {
                    *sum ^= word;
                }
            }
            let sum = sums.iter().chain(rest).fold(0, |all, one| all ^ one);
            *total.lock().unwrap_or_else(std::sync::PoisonError::into_inner) ^= black_box(sum);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    black_box(total);
    (words * size_of::<u64>()) as f64 / best.max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_a_positive_number() {
        for (threads, bytes) in [(1, 0), (1, 1), (2, 1 << 20)] {
            let pool = Pool::new(threads).expect("a pool");
            let found = read_bandwidth(&pool, bytes);
            assert!(found.is_finite() && found > 0.0, "{found}");
        }
    }
}
