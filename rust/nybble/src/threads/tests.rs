//! The pool: every index once, panics, forks, workers that come late or never.

use super::*;

#[test]
fn every_index_is_visited_once_at_any_split() {
    for threads in [1, 2, 3, 7] {
        let pool = Pool::new(threads).expect("a pool");
        for len in [0, 1, 2, 15, 16, 17, 1000] {
            for grain in [0, 1, 4, 64] {
                let visits: Vec<AtomicUsize> = (0..len).map(|_| AtomicUsize::new(0)).collect();
                pool.split(len, grain, &|range| {
                    assert_eq!(range.start % grain.max(1), 0);
                    for i in range {
                        visits[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(visits.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }
}

#[test]
fn rows_are_handed_out_whole() {
    let pool = Pool::new(3).expect("a pool");
    let mut data = vec![0; 7 * 5];
    pool.split_rows(&mut data, 5, &|first, rows| {
        for (i, row) in rows.chunks_exact_mut(5).enumerate() {
            row.fill(first + i);
        }
    });
    assert!(data.iter().enumerate().all(|(i, &row)| row == i / 5));
}

#[test]
fn workers_wake_after_they_parked() {
    let pool = Pool::new(2).expect("a pool");
    for _ in 0..20 {
        let sum = AtomicUsize::new(0);
        pool.run(&|worker| {
            sum.fetch_add(worker + 1, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3);
        std::thread::sleep(SPIN * 3);
    }
}

#[test]
fn two_callers_take_turns() {
    let pool = Pool::new(3).expect("a pool");
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.split(30, 1, &|range| {
                        total.fetch_add(range.len(), Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 2 * 200 * 30);
}

#[test]
fn a_panicking_job_reaches_the_caller_and_the_pool_survives() {
    let pool = Pool::new(2).expect("a pool");
    let others = AtomicUsize::new(0);
    for culprit in [0, 1] {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|worker| {
                assert!(worker != culprit, "on purpose");
                others.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let payload = outcome.expect_err("a panic");
        assert_eq!(payload.downcast_ref(), Some(&"on purpose"));
    }
    assert_eq!(others.load(Ordering::Relaxed), 2);
    let ran = AtomicUsize::new(0);
    pool.run(&|_| {
        ran.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(ran.load(Ordering::Relaxed), 2);
}

#[test]
fn a_phase_needs_no_worker() {
    let pool = Pool::new(4).expect("a pool");
    // A crew without workers: to the caller the same as one whose workers the system never runs.
    let absent = Box::new(Crew::start(1, std::process::id()));
    pool.crew.store(Box::into_raw(absent), Ordering::Release);
    let sum = AtomicUsize::new(0);
    pool.region(|| {
        for _ in 0..100 {
            pool.split(1000, 1, &|range| {
                sum.fetch_add(range.len(), Ordering::Relaxed);
            });
        }
    });
    assert_eq!(sum.load(Ordering::Relaxed), 100_000);
}

#[test]
fn phases_that_follow_at_once_do_not_mix() {
    let pool = Pool::new(4).expect("a pool");
    pool.region(|| {
        for phase in 0..20_000 {
            let chunks = 1 + phase % 9;
            let mut found = [0; 9];
            pool.split_rows(&mut found[..chunks], 1, &|first, part| {
                for (i, one) in part.iter_mut().enumerate() {
                    *one += phase + first + i;
                }
            });
            let expected = |i| if i < chunks { phase + i } else { 0 };
            assert!(found.iter().enumerate().all(|(i, &one)| one == expected(i)), "{phase}: {found:?}");
        }
    });
}

#[test]
fn a_job_may_use_its_own_pool() {
    let pool = Pool::new(3).expect("a pool");
    let sum = AtomicUsize::new(0);
    pool.split(20, 1, &|outer| {
        pool.region(|| {
            pool.split(10, 1, &|inner| {
                sum.fetch_add(outer.len() * inner.len(), Ordering::Relaxed);
            });
        });
    });
    assert_eq!(sum.load(Ordering::Relaxed), 200);
}

#[test]
fn ranges_shrink_and_cover_all() {
    for (pieces, chunks) in [(8, 8), (12, 8), (3072, 8), (1000, 7), (usize::MAX, 2048)] {
        let bounds: Vec<usize> = (0..=chunks).map(|i| pieces - left(pieces, chunks, i)).collect();
        assert_eq!((bounds[0], bounds[chunks]), (0, pieces));
        assert!(bounds.is_sorted());
        let (first, last) = (bounds[1], pieces - bounds[chunks - 1]);
        assert!(last <= pieces.div_ceil(chunks * chunks) && first >= pieces / chunks, "{bounds:?}");
    }
}

/// `available_parallelism`, on which the default rests, knows affinity masks and quotas.
#[test]
#[cfg(target_os = "linux")]
fn the_default_is_not_above_the_affinity_mask() {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let mask = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:")).expect("a mask");
    let digits = mask.chars().filter_map(|digit| digit.to_digit(16));
    let allowed: u32 = digits.map(u32::count_ones).sum();
    if std::env::var_os("NYBBLE_THREADS").is_none() {
        assert!(Pool::default_threads().expect("no setting") <= allowed as usize);
    }
}

#[test]
fn sizes_out_of_range_are_errors() {
    assert!(Pool::new(0).is_err());
    assert!(Pool::new(MAX_THREADS + 1).is_err());
}
