//! The one worker pool: fork-join over index ranges with workers that spin a little and then park.
//!
//! A token step makes hundreds of small parallel regions a few microseconds apart. Waking a parked thread costs about
//! 6 us, spinning on an atomic 0.3 us; so a worker spins for [`SPIN`] after its last job and only then parks. While a
//! token is computed the workers never sleep; between requests they cost nothing, and an oversubscribed machine loses
//! at most the spin.
//!
//! Work is split by index alone ([`Pool::split`]), never by timing, and each index is computed by exactly one thread with
//! the same arithmetic, so results do not depend on the number of threads.
//!
//! A forked child has no worker threads. The pool notices (the process id differs) before it touches a lock a lost
//! thread may hold, and starts afresh.
//!
//! This module holds the crate's only `unsafe` outside kernels, packing and mmap: the lifetime of the borrowed job.

#![allow(unsafe_code)]

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long an idle worker, or a caller waiting for its workers, spins before it sleeps.
pub const SPIN: Duration = Duration::from_micros(50);

/// Most threads a pool takes; more is a mistake in the request.
pub const MAX_THREADS: usize = 512;

type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// The start of a slice whose parts go to different threads.
struct Base<T>(*mut T);

impl<T> Base<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: `split_rows` gives every thread its own part of a `&mut [T]` with `T: Send`.
unsafe impl<T: Send> Sync for Base<T> {}

/// State shared with the workers.
struct Shared {
    /// Number of jobs started so far; a change is the signal.
    epoch: AtomicU32,
    /// The current job, valid from the epoch's change until `pending` is 0.
    job: Mutex<Option<&'static Job<'static>>>,
    /// Workers that have not finished the current job.
    pending: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Whether the worker of that index is (about to be) parked.
    parked: Box<[AtomicBool]>,
    /// The thread that waits for `pending` to reach 0.
    caller: Mutex<Option<Thread>>,
}

/// The workers of one process.
struct Crew {
    pid: u32,
    shared: Arc<Shared>,
    workers: Vec<Thread>,
    handles: Vec<std::thread::JoinHandle<()>>,
    /// Held by the caller whose job runs.
    running: Mutex<()>,
}

/// A fixed set of threads that run one job at a time together with the calling thread.
///
/// Jobs must not start another job on the same pool: it would wait for itself.
pub struct Pool {
    threads: usize,
    /// Null until first used, then the crew of the current process.
    crew: AtomicPtr<Crew>,
    /// Serialises the making of a crew; a process id, or 0. Not a mutex: a forked child must never find it locked.
    making: AtomicU32,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller's among them; they start at the first job.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(Error::argument("threads", format!("1 to {MAX_THREADS}"), threads));
        }
        Ok(Self { threads, crew: AtomicPtr::new(std::ptr::null_mut()), making: AtomicU32::new(0) })
    }

    /// Threads that may run at once when nothing else is asked for: `NYBBLE_THREADS`, or the CPUs this process may use
    /// (its affinity mask and, on Linux, its cgroup quota).
    pub fn default_threads() -> Result<usize> {
        match std::env::var("NYBBLE_THREADS") {
            Err(_) => Ok(std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)),
            Ok(text) => match text.trim().parse() {
                Ok(n) if (1..=MAX_THREADS).contains(&n) => Ok(n),
                _ => Err(Error::argument(
                    "NYBBLE_THREADS",
                    format!("a number from 1 to {MAX_THREADS}"),
                    format!("{text:?}"),
                )),
            },
        }
    }

    /// Number of threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `job` with disjoint ranges that cover `0..len`, one call a thread at most, and returns when all are done.
    ///
    /// Boundaries are multiples of `grain` and depend on `len`, `grain` and the number of threads only.
    ///
    /// # Panics
    /// When `job` panics on any thread, after all threads have finished.
    pub fn split(&self, len: usize, grain: usize, job: &(dyn Fn(Range<usize>) + Sync)) {
        let grain = grain.max(1);
        let pieces = len.div_ceil(grain);
        let shares = self.threads.min(pieces);
        if shares <= 1 {
            if len > 0 {
                job(0..len);
            }
            return;
        }
        let bound = |i: usize| (pieces * i / shares * grain).min(len);
        self.run(&|worker| {
            if worker < shares {
                job(bound(worker)..bound(worker + 1));
            }
        });
    }

    /// Splits `data`, rows of `row` elements, into one run of whole rows a thread and calls `job(first row, rows)` on each.
    ///
    /// # Panics
    /// When `row` is 0 or does not divide `data.len()`, and as [`Pool::split`].
    pub fn split_rows<T: Send>(&self, data: &mut [T], row: usize, job: &(dyn Fn(usize, &mut [T]) + Sync)) {
        assert!(row > 0 && data.len().is_multiple_of(row), "{} elements are not rows of {row}", data.len());
        let rows = data.len() / row;
        let base = Base(data.as_mut_ptr());
        self.split(rows, 1, &|range| {
            // SAFETY: `split` hands out disjoint ranges inside `0..rows`, so the slices lie inside `data` and never overlap;
            // `data` is borrowed mutably until all of them are done.
            let part = unsafe {
                std::slice::from_raw_parts_mut(base.get().add(range.start * row), range.len() * row)
            };
            job(range.start, part);
        });
    }

    /// Calls `job(0) .. job(threads - 1)`, each on its own thread, and returns when all are done.
    ///
    /// # Panics
    /// When `job` panics on any thread, after all threads have finished.
    pub fn run(&self, job: &Job<'_>) {
        if self.threads == 1 {
            job(0);
            return;
        }
        let crew = self.crew();
        let _turn = crew.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*crew.shared;
        // SAFETY: the reference is handed to the workers under a longer lifetime than it has. It is used only between the
        // change of `epoch` and the moment `pending` reaches 0; this function waits for that moment before it returns or
        // unwinds (the caller's own share runs under `catch_unwind`), so the borrow is alive throughout.
        let borrowed = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(borrowed);
        *shared.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        shared.pending.store(self.threads - 1, Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&crew.workers) {
            if parked.load(Ordering::SeqCst) {
                worker.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        wait(|| shared.pending.load(Ordering::Acquire) == 0);
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a worker thread panicked");
    }

    /// The crew of this process, made at first use and again after a fork.
    fn crew(&self) -> &Crew {
        let pid = std::process::id();
        loop {
            let current = self.crew.load(Ordering::Acquire);
            if !current.is_null() {
                // SAFETY: a crew is stored only after it is complete, and freed only in `drop`, which needs `&mut self`.
                let crew = unsafe { &*current };
                if crew.pid == pid {
                    return crew;
                }
            }
            let holder = self.making.load(Ordering::Acquire);
            // A holder of another process id was copied by fork in the middle of its work and will never finish.
            if holder == pid
                || self.making.compare_exchange(holder, pid, Ordering::AcqRel, Ordering::Relaxed).is_err()
            {
                std::thread::yield_now();
                continue;
            }
            if self.crew.load(Ordering::Acquire) == current {
                // After a fork the parent's crew is left alone: its threads are not here and its locks may be held.
                let crew = Box::into_raw(Box::new(Crew::start(self.threads, pid)));
                self.crew.store(crew, Ordering::Release);
            }
            self.making.store(0, Ordering::Release);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let crew = *self.crew.get_mut();
        if crew.is_null() {
            return;
        }
        // SAFETY: the pointer came from `Box::into_raw` in `crew`, and `&mut self` shows that nobody else uses it.
        let crew = unsafe { Box::from_raw(crew) };
        if crew.pid != std::process::id() {
            std::mem::forget(crew); // a forked child: there is nobody to stop or to join
            return;
        }
        crew.shared.stop.store(true, Ordering::SeqCst);
        crew.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in &crew.workers {
            worker.unpark();
        }
        for handle in crew.handles {
            let _ = handle.join(); // a worker catches its panics, so this only waits
        }
    }
}

impl Crew {
    fn start(threads: usize, pid: u32) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            job: Mutex::new(None),
            pending: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
        });
        let handles: Vec<_> = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("nybble-{index}"))
                    .spawn(move || shared.work(index))
                    .expect("the system has room for another thread")
            })
            .collect();
        let workers = handles.iter().map(|handle| handle.thread().clone()).collect();
        Self { pid, shared, workers, handles, running: Mutex::new(()) }
    }
}

impl Shared {
    /// The life of worker `index`.
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.await_epoch(index, seen);
            seen = self.epoch.load(Ordering::Acquire);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(job) = job
                && catch_unwind(AssertUnwindSafe(|| job(index))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            // Cloned before the last worker reports: afterwards the caller may start the next job.
            let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if self.pending.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(caller) = caller
            {
                caller.unpark();
            }
        }
    }

    fn await_epoch(&self, index: usize, seen: u32) {
        let changed = || self.epoch.load(Ordering::SeqCst) != seen;
        if spin(changed) {
            return;
        }
        let parked = &self.parked[index - 1];
        parked.store(true, Ordering::SeqCst);
        while !changed() {
            std::thread::park();
        }
        parked.store(false, Ordering::SeqCst);
    }
}

/// Spins until `done` or until [`SPIN`] is over; says whether it was done.
fn spin(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        // The clock costs as much as a few dozen pauses: look at it rarely.
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return done();
        }
    }
}

/// Waits until `done`: spins, then sleeps until unparked.
fn wait(done: impl Fn() -> bool) {
    if !spin(&done) {
        while !done() {
            // A lost wake-up is impossible by the order of the stores; the limit only bounds the harm of being wrong.
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
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
        for culprit in [0, 1] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| assert!(worker != culprit, "on purpose"));
            }));
            assert!(outcome.is_err());
        }
        let ran = AtomicUsize::new(0);
        pool.run(&|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn sizes_out_of_range_are_errors() {
        assert!(Pool::new(0).is_err());
        assert!(Pool::new(MAX_THREADS + 1).is_err());
    }
}
