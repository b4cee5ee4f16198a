//! The one worker pool: phases of chunks that whoever is awake works off.
//!
//! A token step makes hundreds of small parallel phases a few microseconds apart, on machines whose cores have other work
//! too. Two things follow.
//!
//! **A late worker is not needed.** A phase is a number of chunks. Threads claim chunks one by one, the caller among them,
//! and the phase is over when every *chunk* is done, not when every *thread* has come by. A worker that the system keeps
//! from running between two chunks costs nothing: the others take what it would have taken. Only a thread stopped in the
//! middle of a chunk is waited for, and then the caller sleeps, so that the system can run that thread on the caller's own
//! core.
//!
//! **Workers are woken once.** Waking a parked thread costs about 6 us, noticing a change of an atomic 0.1 us. While a
//! [`Pool::region`] is open, workers poll: for [`SPIN`], and then giving the core away between looks (`yield_now`), so that
//! an oversubscribed machine loses little. A forward pass is one region, and never makes them wait for longer than that,
//! unless the system has stopped the caller. After [`PATIENCE`] they take that to be so and park; the next phase wakes them,
//! which on a crowded machine makes the system run them at the same time as the caller. After a region's end they spin for
//! [`SPIN`] once more, in case the next token follows at once, and park. Between requests they cost nothing.
//!
//! # The claim
//!
//! The phase is published as one 64-bit word, the number of chunks and the next chunk to claim. A thread claims with
//! `fetch_add(1)`, and the value it gets back says all: a next chunk below the number of chunks is the thread's own, anything
//! else is nothing. It does not matter how long ago the thread last looked, or for which phase it came: there is no moment
//! between reading and claiming at which the phase could change. So the word needs no epoch. After a failed claim a thread
//! only loads the word until there is something to claim; each thread thus adds at most one failed claim to a phase, and the
//! counter never overflows.
//!
//! # Why the orderings are enough
//!
//! - *The job slot* is a plain cell. It is written before the word is stored with `Release`; a valid claim is an `Acquire`
//!   read-modify-write of that store or of other claims after it (one release sequence), so a thread with a valid claim sees
//!   the slot of its own phase. It reads the slot before it adds the chunk to `done` (`Release`), and the caller writes the
//!   next phase's slot only after it has read (`Acquire`) that all chunks are done. A thread without a valid claim never
//!   reads the slot. Hence no read is ever concurrent with a write, and the borrowed job is alive whenever it is called.
//! - *Results* that a chunk wrote reach the caller by the same pair of `done`, and what the caller wrote before a phase
//!   reaches the chunks by the word.
//! - *No wake-up is lost*, twice by the same argument: both sides store their own flag and then load the other's, all
//!   `SeqCst`, so at least one sees the other. A worker stores `parked` and then reads the word, a caller stores the word
//!   and then reads `parked`. A caller stores `waiting` and then reads `done`, a worker adds to `done` and then reads `waiting`.
//!
//! # What results depend on
//!
//! Which thread computes a chunk depends on timing. Each index is computed by exactly one thread with the same arithmetic,
//! so results depend neither on that nor on the number of threads.
//!
//! A forked child has no worker threads. The pool notices (the process id differs) before it touches a lock a lost
//! thread may hold, and starts afresh.
//!
//! This module holds the crate's only `unsafe` outside kernels, packing and mmap: the lifetime of the borrowed job.

#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long an idle worker, or a caller waiting for a chunk under way, spins before it gives its core away.
pub const SPIN: Duration = Duration::from_micros(50);

/// How long an idle worker gives its core away between looks, in a region, before it parks.
const PATIENCE: Duration = Duration::from_millis(1);

/// Most threads a pool takes; more is a mistake in the request.
pub const MAX_THREADS: usize = 512;

/// Chunks of a split for each thread. They shrink from the first to the last (see [`Pool::split`]), so few are enough.
const CHUNKS_PER_THREAD: usize = 4;

type Job<'a> = dyn Fn(usize) + Sync + 'a;

thread_local! {
    /// The pool whose chunk this thread is computing.
    static WORKING: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// The start of a slice whose parts go to different threads.
struct Base<T>(*mut T);

impl<T> Base<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: `split_rows` gives every thread its own part of a `&mut [T]` with `T: Send`.
unsafe impl<T: Send> Sync for Base<T> {}

/// The word of a phase: how many chunks it has, and the next one to claim.
#[derive(Clone, Copy)]
struct Word(u64);

impl Word {
    fn new(chunks: usize) -> Self {
        // Far from overflow either way: `next` is at most the chunks and one failed claim a thread.
        assert!(chunks <= (u32::MAX >> 1) as usize, "{chunks} chunks");
        Self((chunks as u64) << 32)
    }

    /// The chunk that a claim which found this word has won.
    fn chunk(self) -> Option<usize> {
        let (chunks, next) = ((self.0 >> 32) as usize, self.0 as u32 as usize);
        (next < chunks).then_some(next)
    }
}

/// What a thread touches to claim a chunk, on cache lines of its own (two, for processors fetch them in pairs).
#[repr(align(128))]
struct Phase {
    /// A [`Word`].
    word: AtomicU64,
    /// The phase's job; see the module's text for who may read and write it when.
    job: UnsafeCell<Option<&'static Job<'static>>>,
}

// SAFETY: by the protocol described at the module's top no read of `job` is concurrent with a write; the job itself is
// `Sync`.
unsafe impl Sync for Phase {}

/// What a thread touches when a chunk is done.
#[repr(align(128))]
struct Done {
    /// Chunks of the phase that workers have done.
    chunks: AtomicUsize,
    /// Whether the caller is (about to be) parked.
    waiting: AtomicBool,
}

/// State shared with the workers.
struct Shared {
    phase: Phase,
    done: Done,
    /// Open regions; while there are any, workers do not park at once.
    open: AtomicUsize,
    stop: AtomicBool,
    /// Whether the worker of that index is (about to be) parked.
    parked: Box<[AtomicBool]>,
    /// The thread that waits for a phase.
    caller: Mutex<Option<Thread>>,
    panicked: AtomicBool,
    /// What the first chunk that panicked left.
    payload: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The workers of one process.
struct Crew {
    pid: u32,
    shared: Arc<Shared>,
    workers: Vec<Thread>,
    handles: Vec<std::thread::JoinHandle<()>>,
    /// Held by the caller whose phase runs.
    running: Mutex<()>,
}

/// A fixed set of threads that compute one phase at a time together with the calling thread.
///
/// Several threads may use a pool; their phases take turns. A job that uses its own pool computes that part alone, on the
/// thread it is on.
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
    /// A pool of `threads` threads, the caller's among them; they start at the first phase or region.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(Error::argument("threads", format!("1 to {MAX_THREADS}"), threads));
        }
        Ok(Self { threads, crew: AtomicPtr::new(std::ptr::null_mut()), making: AtomicU32::new(0) })
    }

    /// Threads that may run at once when nothing else is asked for: `NYBBLE_THREADS`, or the CPUs this process may use:
    /// its affinity mask and, on Linux, the quota of its cgroup (version 1 or 2) in whole CPUs.
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

    /// Calls `work` with the workers awake from its start to its end, so that the phases in it start without delay.
    ///
    /// It does not own the pool: other threads' phases run between its own. Regions may be nested.
    pub fn region<R>(&self, work: impl FnOnce() -> R) -> R {
        if self.threads == 1 {
            return work();
        }
        let _open = Open::new(self.crew());
        work()
    }

    /// Calls `job` with disjoint ranges that cover `0..len` and returns when all are done. A thread may be given several
    /// ranges, or none.
    ///
    /// Boundaries are multiples of `grain` and depend on `len`, `grain` and the number of threads only. Ranges shrink
    /// linearly from the first to the last (trapezoid self-scheduling, Tzen and Ni 1993): few claims, and yet threads that
    /// started late or run slowly end together with the others.
    ///
    /// # Panics
    /// When `job` panics on any thread, after all ranges are done.
    pub fn split(&self, len: usize, grain: usize, job: &(dyn Fn(Range<usize>) + Sync)) {
        let grain = grain.max(1);
        let pieces = len.div_ceil(grain);
        let chunks = if self.threads == 1 { 1 } else { pieces.min(self.threads * CHUNKS_PER_THREAD) };
        if chunks <= 1 {
            if len > 0 {
                job(0..len);
            }
            return;
        }
        let bound = |i: usize| (pieces - left(pieces, chunks, i)).saturating_mul(grain).min(len);
        self.run_chunks(chunks, &|i| {
            let range = bound(i)..bound(i + 1);
            if !range.is_empty() {
                job(range);
            }
        });
    }

    /// Splits `data`, rows of `row` elements, into runs of whole rows and calls `job(first row, rows)` on each.
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

    /// Calls `job(0) .. job(threads - 1)` and returns when all are done: each on its own thread if all of them are free,
    /// several on one thread otherwise.
    ///
    /// # Panics
    /// When `job` panics on any thread, after all calls are done.
    pub fn run(&self, job: &Job<'_>) {
        self.run_chunks(self.threads, job);
    }

    /// One phase: calls `job` with every index below `chunks`.
    fn run_chunks(&self, chunks: usize, job: &Job<'_>) {
        if self.threads == 1 || chunks <= 1 {
            (0..chunks).for_each(job);
            return;
        }
        let crew = self.crew();
        let shared = &*crew.shared;
        if WORKING.get() == std::ptr::from_ref(shared) {
            (0..chunks).for_each(job); // the other threads are busy with the phase that this is a part of
            return;
        }
        let turn = lock(&crew.running);
        // SAFETY: the reference is stored under a longer lifetime than it has. It is used only for claimed chunks that are
        // not yet counted as done; this function waits until all are, and nothing in between unwinds (chunks run under
        // `catch_unwind`), so the borrow is alive throughout.
        let job = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
        // SAFETY: this thread holds `running` and the last phase is over, so nobody reads the slot.
        unsafe { *shared.phase.job.get() = Some(job) };
        shared.done.chunks.store(0, Ordering::Relaxed);
        shared.phase.word.store(Word::new(chunks).0, Ordering::SeqCst);
        crew.wake();
        let outer = WORKING.replace(shared);
        let mut own = 0;
        while shared.work_once() {
            own += 1;
        }
        WORKING.set(outer);
        shared.await_done(chunks - own);
        let payload = shared.panicked.swap(false, Ordering::Relaxed).then(|| lock(&shared.payload).take());
        drop(turn);
        if let Some(payload) = payload {
            resume_unwind(payload.unwrap_or_else(|| Box::new("a job panicked")));
        }
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
            phase: Phase { word: AtomicU64::new(Word::new(0).0), job: UnsafeCell::new(None) },
            done: Done { chunks: AtomicUsize::new(0), waiting: AtomicBool::new(false) },
            open: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
            panicked: AtomicBool::new(false),
            payload: Mutex::new(None),
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

    /// Wakes the workers that are parked.
    fn wake(&self) {
        for (parked, worker) in self.shared.parked.iter().zip(&self.workers) {
            // Whoever wakes a worker takes the flag down, so that one wake-up is paid for and not one a phase.
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                worker.unpark();
            }
        }
    }
}

/// An open region; closed when dropped.
struct Open<'a>(&'a Crew);

impl<'a> Open<'a> {
    fn new(crew: &'a Crew) -> Self {
        crew.shared.open.fetch_add(1, Ordering::Relaxed);
        crew.wake();
        Self(crew)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.shared.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// The life of worker `index`.
    fn work(&self, index: usize) {
        WORKING.set(self);
        while !self.stop.load(Ordering::Acquire) {
            if self.work_once() {
                self.done.chunks.fetch_add(1, Ordering::SeqCst);
                if self.done.waiting.load(Ordering::SeqCst) {
                    // Perhaps of a later phase by now, or not yet finished: a caller that is woken for nothing looks again.
                    if let Some(caller) = &*lock(&self.caller) {
                        caller.unpark();
                    }
                }
            } else {
                self.await_phase(index);
            }
        }
    }

    /// Claims a chunk and computes it; false when there is none.
    fn work_once(&self) -> bool {
        let Some(chunk) = Word(self.phase.word.fetch_add(1, Ordering::Acquire)).chunk() else {
            return false;
        };
        // SAFETY: the claim is valid, so the phase is not over and the slot holds its job (see the module's text).
        let job = unsafe { *self.phase.job.get() };
        if let Some(job) = job
            && let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(chunk)))
        {
            lock(&self.payload).get_or_insert(payload);
            self.panicked.store(true, Ordering::Relaxed); // ordered, like the chunk's results, by `done`
        }
        true
    }

    /// Returns when there is something to claim, or when the pool ends.
    fn await_phase(&self, index: usize) {
        let ready =
            |order| Word(self.phase.word.load(order)).chunk().is_some() || self.stop.load(Ordering::Relaxed);
        let soon = || ready(Ordering::Relaxed);
        while !spin(soon) {
            let start = Instant::now();
            while self.open.load(Ordering::Relaxed) > 0 && start.elapsed() < PATIENCE {
                if soon() {
                    return;
                }
                std::thread::yield_now();
            }
            // If the region has just ended, the next token's is given the time of one spin to begin.
            if spin(soon) {
                return;
            }
            let parked = &self.parked[index - 1];
            parked.store(true, Ordering::SeqCst);
            while parked.load(Ordering::SeqCst) && !ready(Ordering::SeqCst) {
                std::thread::park();
            }
            parked.store(false, Ordering::SeqCst);
        }
    }

    /// Returns when the workers have done `chunks` chunks: those that the caller did not do itself.
    fn await_done(&self, chunks: usize) {
        if spin(|| self.done.chunks.load(Ordering::Acquire) == chunks) {
            return;
        }
        *lock(&self.caller) = Some(std::thread::current());
        self.done.waiting.store(true, Ordering::SeqCst);
        while self.done.chunks.load(Ordering::SeqCst) != chunks {
            std::thread::park();
        }
        self.done.waiting.store(false, Ordering::SeqCst);
    }
}

/// Pieces that chunks from `i` on hold, of `pieces` in `chunks` chunks: the square of the share of chunks left.
fn left(pieces: usize, chunks: usize, i: usize) -> usize {
    let rest = (chunks - i) as u128;
    (pieces as u128 * rest * rest).div_ceil((chunks as u128).pow(2)) as usize
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spins until `done` or until [`SPIN`] is over; says whether it was done.
fn spin(done: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        // The clock costs as much as a few dozen pauses: look at it rarely.
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return done();
        }
    }
}

#[cfg(test)]
mod tests;
