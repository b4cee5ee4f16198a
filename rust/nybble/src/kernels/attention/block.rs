//! One task: some rows (queries times heads) through the keys they see in some spans.

use std::ops::Range;

use half::f16;

use super::super::f32::lanes::{Element, LANES, MAX_ROWS, Panel, Tier};
use super::softmax::{Bias, Cap, Merge, Running, Scale, Scores, Slope, Times, Weigh};
use super::{
    Attention, Call, Given, KEYS, KvType, Memory, Record, SPAN, Statistic, TASK_ROWS, Task, codes, graph,
    statistics,
};
use crate::cpu::Isa;
use crate::kernels::Columns;

/// Floats of scratch a task needs, with `nodes` floats a row for scores with the nodes of a tree.
pub(super) fn floats(head_dim: usize, nodes: usize) -> usize {
    let padded = head_dim.next_multiple_of(LANES);
    TASK_ROWS * (3 * padded + nodes) + MAX_ROWS * KEYS
}

/// Floats of what one span leaves of one row: the weighted sums, then the largest score and the sum of weights.
pub(super) fn partial(padded: usize) -> usize {
    padded + LANES
}

impl<T: Tier> Attention for T {
    fn isa(&self) -> Isa {
        T::ISA
    }

    unsafe fn run(&self, call: &Call<'_>, task: Task, memory: &mut Memory) {
        // SAFETY: promised by the caller; each arm names the cache's own element.
        unsafe {
            match call.cache.kind() {
                KvType::F32 => run::<T, f32>(*self, call, &task, memory),
                KvType::F16 => run::<T, f16>(*self, call, &task, memory),
                KvType::Int8 => run::<T, i8>(*self, call, &task, memory),
            }
        }
    }

    unsafe fn merge(&self, call: &Call<'_>, partials: Columns<'_>, rows: Range<usize>, memory: &mut Memory) {
        let (dim, padded) = (call.shape.head_dim, call.cache.padded_dim());
        let spans = call.spans.len();
        let total = &mut memory.lines.elements_mut::<f32>()[..padded];
        for row in rows {
            let mut running = Running::START;
            for place in row * spans..(row + 1) * spans {
                // SAFETY: promised by the caller.
                let left = unsafe { partials.row(place, 0, partial(padded)) };
                let span = Running { max: left[padded], sum: left[padded + 1], fade: 1.0 };
                let span_sums = &left[..padded];
                Tier::run(*self, Merge { sums: total, running: &mut running, span_sums, span });
            }
            let (query, head) = (row / call.shape.heads, row % call.shape.heads);
            // SAFETY: promised by the caller.
            let out = unsafe { call.out.row(query, head * dim, dim) };
            out.copy_from_slice(&total[..dim]);
            Tier::run(*self, Scale(out, 1.0 / running.sum));
        }
    }

    fn encode_head(
        &self,
        rows: &codes::Rows<'_>,
        kv_head: usize,
        n: usize,
        dim: usize,
        head: &mut codes::Head,
    ) {
        codes::encode(*self, rows, kv_head, n, dim, head);
    }

    unsafe fn run_codes(
        &self,
        call: &codes::Call<'_>,
        head: usize,
        queries: Range<usize>,
        memory: &mut Memory,
    ) {
        // SAFETY: promised by the caller.
        unsafe { codes::run(*self, call, head, queries, memory) }
    }

    fn statistics(
        &self,
        call: &Call<'_>,
        kv_head: usize,
        queries: Range<usize>,
        statistic: Statistic,
        sums: &mut [f32],
        memory: &mut Memory,
    ) {
        let run = match call.cache.kind() {
            KvType::F32 => statistics::run::<T, f32>,
            KvType::F16 => statistics::run::<T, f16>,
            KvType::Int8 => statistics::run::<T, i8>,
        };
        run(*self, call, kv_head, queries, statistic, sums, memory);
    }

    unsafe fn encode(&self, record: &Record<'_>, head: usize, block: usize, query: usize, weights: &Scores) {
        // SAFETY: promised by the caller.
        unsafe { record.encode(*self, (head, block, query), weights) }
    }

    fn votes(
        &self,
        weights: Given<'_>,
        factors: &[f32],
        scores: &[f32],
        coefficients: &mut [f32],
        out: &mut Scores,
    ) {
        graph::votes(*self, weights, factors, scores, coefficients, out);
    }
}

/// # Safety
/// As [`Attention::run`], and `E` is the cache's element.
unsafe fn run<T: Tier, E: Element>(tier: T, call: &Call<'_>, task: &Task, memory: &mut Memory) {
    let job = Job::<T, E>::new(tier, call, task);
    if call.shape.log2 {
        // SAFETY: promised by the caller.
        return unsafe { super::log2::run(&job, memory) };
    }
    let Job { dim, padded, .. } = job;
    let rows = job.rows();

    let (queries, rest) = memory.lines.elements_mut::<f32>().split_at_mut(TASK_ROWS * padded);
    let (sums, rest) = rest.split_at_mut(TASK_ROWS * padded);
    let (totals, rest) = rest.split_at_mut(TASK_ROWS * padded);
    let (scores, node_scores) = rest.split_at_mut(MAX_ROWS * KEYS);
    let scores = scores.as_chunks_mut::<KEYS>().0;
    let mut total_running = [Running::START; TASK_ROWS];
    job.queries(queries);
    if let Some(branches) = call.branches {
        job.node_scores(branches, queries, node_scores);
    }

    let seen = job.all_seen();
    for span in task.spans.clone() {
        let mut running = [Running::START; TASK_ROWS];
        sums[..rows * padded].fill(0.0);
        let from = seen.start.max(span * SPAN) / KEYS * KEYS;
        for start in (from..seen.end.min((span + 1) * SPAN)).step_by(KEYS) {
            for part in job.parts() {
                let lines = part.start * padded..part.end * padded;
                let (seen, slopes) = job.sight(&part, start);
                let rows = Rows {
                    queries: &queries[lines.clone()],
                    sums: &mut sums[lines],
                    scores,
                    running: &mut running[part.clone()],
                    seen: &seen[..part.len()],
                    slopes: &slopes[..part.len()],
                };
                match call.branches {
                    Some(branches) if start + KEYS > call.past => {
                        job.branched_block(branches, start, part.start, node_scores, rows);
                    }
                    _ => job.block(start, part.start, rows),
                }
            }
        }
        for row in 0..rows {
            let (span_sums, running) = (&sums[row * padded..][..padded], running[row]);
            if let Some(partials) = call.partials {
                let (query, head) = job.place(row);
                let place = (query * call.shape.heads + head) * call.spans.len() + span - call.spans.start;
                // SAFETY: this query and head in this span are this task's own.
                let left = unsafe { partials.row(place, 0, partial(padded)) };
                left[..padded].copy_from_slice(span_sums);
                (left[padded], left[padded + 1]) = (running.max, running.sum);
            } else {
                let total = &mut totals[row * padded..][..padded];
                tier.run(Merge { sums: total, running: &mut total_running[row], span_sums, span: running });
            }
        }
    }
    if call.partials.is_some() {
        return; // `merge` writes the output
    }

    if let Some(record) = &call.record {
        job.factors(record, &total_running[..rows]);
    }
    for row in 0..rows {
        let (query, head) = job.place(row);
        // SAFETY: this query and head are this task's own.
        let out = unsafe { call.out.row(query, head * dim, dim) };
        out.copy_from_slice(&totals[row * padded..][..dim]);
        tier.run(Scale(out, 1.0 / total_running[row].sum));
    }
}

/// What all rows of a task share.
pub(super) struct Job<'a, T, E> {
    pub(super) tier: T,
    pub(super) call: &'a Call<'a>,
    pub(super) task: &'a Task,
    keys: &'a [E],
    pub(super) values: &'a [E],
    /// Of the keys and of the values, if they are codes.
    pub(super) scales: Option<(&'a [f32], &'a [f32])>,
    pub(super) dim: usize,
    pub(super) padded: usize,
}

/// For each row of a part, the first key of a block that it sees and the first after those; and its slope.
pub(super) type Sight = ([(usize, usize); MAX_ROWS], [f32; MAX_ROWS]);

/// At most [`Tier::ROWS`] rows.
pub(super) struct Rows<'a> {
    /// Scaled queries, `padded` apart.
    pub(super) queries: &'a [f32],
    /// Weighted sums of values, `padded` apart.
    pub(super) sums: &'a mut [f32],
    pub(super) scores: &'a mut [Scores],
    pub(super) running: &'a mut [Running],
    /// First key of the block that a row sees, and the first after those.
    pub(super) seen: &'a [(usize, usize)],
    pub(super) slopes: &'a [f32],
}

impl<'a, T: Tier, E: Element> Job<'a, T, E> {
    pub(super) fn new(tier: T, call: &'a Call<'a>, task: &'a Task) -> Self {
        let job = Self {
            tier,
            call,
            task,
            keys: call.cache.keys::<E>(task.kv_head),
            values: call.cache.values::<E>(task.kv_head),
            scales: call.cache.scales(task.kv_head),
            dim: call.shape.head_dim,
            padded: call.cache.padded_dim(),
        };
        assert!(job.rows() <= TASK_ROWS, "{} rows of a task", job.rows());
        job
    }

    /// Queries times heads.
    pub(super) fn rows(&self) -> usize {
        self.task.queries.len() * self.task.heads.len()
    }

    /// The query and the head of a row.
    pub(super) fn place(&self, row: usize) -> (usize, usize) {
        let heads = self.task.heads.len();
        (self.task.queries.start + row / heads, self.task.heads.start + row % heads)
    }

    /// The rows in parts that a panel takes together.
    pub(super) fn parts(&self) -> impl Iterator<Item = Range<usize>> + use<T, E> {
        let rows = self.rows();
        let parts = rows.div_ceil(T::ROWS);
        (0..parts).map(move |part| rows * part / parts..rows * (part + 1) / parts)
    }

    /// Writes the scaled queries, `padded` apart.
    pub(super) fn queries(&self, queries: &mut [f32]) {
        for row in 0..self.rows() {
            let (query, head) = self.place(row);
            let source = &self.call.q[query * self.call.q_stride + head * self.dim..][..self.dim];
            let target = &mut queries[row * self.padded..][..self.dim];
            target.copy_from_slice(source);
            self.tier.run(Scale(target, self.call.shape.scale));
        }
    }

    /// From the first to the last position that any query sees.
    pub(super) fn all_seen(&self) -> Range<usize> {
        let seen = self.task.queries.clone().map(|query| self.seen(query));
        seen.reduce(|all, own| all.start.min(own.start)..all.end.max(own.end)).unwrap_or(0..0)
    }

    /// What the rows of a part see of the block of keys that begins at position `start`.
    pub(super) fn sight(&self, part: &Range<usize>, start: usize) -> Sight {
        let (mut seen, mut slopes) = ([(0, 0); MAX_ROWS], [0.0; MAX_ROWS]);
        for ((row, seen), slope) in part.clone().zip(&mut seen).zip(&mut slopes) {
            let (query, head) = self.place(row);
            let all = self.seen(query);
            *seen =
                (all.start.clamp(start, start + KEYS) - start, all.end.clamp(start, start + KEYS) - start);
            *slope = self.call.shape.alibi.map_or(0.0, |slopes| slopes[head]);
        }
        (seen, slopes)
    }

    /// The positions that query number `query` of the call sees.
    fn seen(&self, query: usize) -> Range<usize> {
        if !self.call.shape.causal {
            return 0..self.call.cache.len();
        }
        let end = self.call.past + self.call.branches.map_or(query, |branches| branches.depth(query)) + 1;
        self.call.shape.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Brings the rows' running softmax past the block of keys that begins at position `start`, and leaves weights relative
    /// to the largest score so far in the place of scores. Says whether any row sees any of the keys.
    pub(super) fn weigh(&self, start: usize, rows: &mut Rows<'_>) -> bool {
        let some = |&&(from, to): &&(usize, usize)| from < to;
        let Some(from) = rows.seen.iter().filter(some).map(|seen| seen.0).min() else { return false };
        let to = rows.seen.iter().filter(some).map(|seen| seen.1).max().unwrap_or(from);
        self.scores(start, from..to, rows);
        let Rows { scores, running, seen, slopes, .. } = rows;
        for (i, &(from, to)) in seen.iter().enumerate() {
            if from == to {
                continue;
            }
            let scores = &mut scores[i];
            if let Some((keys, _)) = self.scales {
                self.tier.run(Times(&mut scores[from..to], &keys[start + from..start + to]));
            }
            self.shape_scores(scores, start, (from, to), slopes[i]);
        }
        self.tier.run(Weigh { scores, running, seen });
        true
    }

    /// Caps and slopes one row's scores, and takes away those of the keys that it does not see.
    pub(super) fn shape_scores(
        &self,
        scores: &mut Scores,
        start: usize,
        (from, to): (usize, usize),
        slope: f32,
    ) {
        if let Some(cap) = self.call.shape.softcap {
            self.tier.run(Cap(scores, cap));
        }
        if self.call.shape.alibi.is_some() {
            self.tier.run(Slope(scores, slope, start));
        }
        if let Some(bias) = self.call.shape.bias {
            self.tier.run(Bias(&mut scores[from..to], &bias[start + from..start + to]));
        }
        scores[..from].fill(f32::NEG_INFINITY);
        scores[to..].fill(f32::NEG_INFINITY);
    }

    /// Takes the rows, number `first` and the ones behind it, through the block of keys that begins at position `start`.
    fn block(&self, start: usize, first: usize, mut rows: Rows<'_>) {
        if !self.weigh(start, &mut rows) {
            return;
        }
        let Rows { sums, scores, running, seen, .. } = rows;
        if let Some(record) = &self.call.record {
            for (i, running) in running.iter().enumerate() {
                let (query, head) = self.place(first + i);
                // SAFETY: this query and head are this task's own.
                unsafe {
                    record.encode(self.tier, (head, start / KEYS, query), &scores[i]);
                    record.factors(head, start / KEYS, query, 1)[0] = running.max;
                }
            }
        }
        for (i, running) in running.iter().enumerate() {
            // Exactly 1 as long as the largest score stays: then there is nothing to do.
            if seen[i].0 < seen[i].1 && running.fade.to_bits() != 1.0f32.to_bits() {
                self.tier.run(Scale(&mut sums[i * self.padded..][..self.padded], running.fade));
            }
        }
        if let Some((_, values)) = self.scales {
            for (scores, &(from, to)) in scores.iter_mut().zip(seen) {
                self.tier.run(Times(&mut scores[from..to], &values[start + from..start + to]));
            }
        }
        // Rows that see the same keys share the loads of the values; at the diagonal and at a window's edge each row has
        // its own range.
        if seen.iter().all(|other| *other == seen[0]) {
            self.values(start, seen[0], scores, sums);
        } else {
            for (i, &seen) in seen.iter().enumerate() {
                if seen.0 < seen.1 {
                    let own = i * self.padded..(i + 1) * self.padded;
                    self.values(start, seen, &scores[i..=i], &mut sums[own]);
                }
            }
        }
    }

    /// Makes factors of the largest scores that were left with each block, now that the softmax's own are known.
    fn factors(&self, record: &Record<'_>, running: &[Running]) {
        let Task { heads, queries, .. } = self.task;
        let (mut max, mut sum) = ([0.0; TASK_ROWS], [0.0; TASK_ROWS]);
        for (number, head) in heads.clone().enumerate() {
            let own = running[number..].iter().step_by(heads.len());
            for ((max, sum), own) in max.iter_mut().zip(&mut sum).zip(own) {
                (*max, *sum) = (own.max, own.sum);
            }
            for block in 0..self.call.cache.len().div_ceil(KEYS) {
                // SAFETY: these queries and this head are this task's own.
                let factors = unsafe { record.factors(head, block, queries.start, queries.len()) };
                self.tier.run(graph::Factors { of: factors, max: &max, sum: &sum });
            }
        }
    }

    /// Scores of all rows with the block's keys `seen`, and with the neighbours that share their 16 lanes.
    fn scores(&self, start: usize, seen: Range<usize>, rows: &mut Rows<'_>) {
        let tiles = seen.start / LANES..seen.end.div_ceil(LANES);
        let count = rows.seen.len();
        assert!(rows.scores.len() >= count, "rows of a panel");
        let mut y = [std::ptr::null_mut(); MAX_ROWS];
        for (y, scores) in y.iter_mut().zip(&mut rows.scores[..count]) {
            *y = scores[tiles.start * LANES..tiles.end * LANES].as_mut_ptr();
        }
        self.products(start + tiles.start * LANES, tiles.len(), count, rows.queries, y);
    }

    /// Products of `count` queries with the keys of `tiles` runs of 16 entries from entry `first` on. `y` are the rows of the
    /// result, each with room for them and used by nothing else.
    pub(super) fn products(
        &self,
        first: usize,
        tiles: usize,
        count: usize,
        queries: &[f32],
        y: [*mut f32; MAX_ROWS],
    ) {
        let keys = &self.keys[first * self.dim..(first + tiles * LANES) * self.dim];
        assert!(queries.len() >= count * self.padded && count <= MAX_ROWS, "rows of a panel");
        let panel = Panel {
            x: queries.as_ptr(),
            x_stride: self.padded,
            w: keys.as_ptr(),
            w_step: LANES,
            w_tile: self.dim * LANES,
            depth: self.dim,
            y,
            fresh: true,
        };
        // SAFETY: the slices above hold these rows, tiles and depth, and the callers' rows have room for the tiles.
        unsafe { self.tier.panel(&panel, count, tiles) }
    }

    /// Adds the values of the block's positions `from..to`, weighted by `scores`, to as many rows of `sums`.
    pub(super) fn values(
        &self,
        start: usize,
        (from, to): (usize, usize),
        scores: &[Scores],
        sums: &mut [f32],
    ) {
        self.add_values(start + from..start + to, &scores.as_flattened()[from..], sums);
    }

    /// Adds the value of one entry, weighted by the only one of `weight`, to one row of sums.
    pub(super) fn value(&self, entry: usize, weight: &[f32], sums: &mut [f32]) {
        self.add_values(entry..entry + 1, weight, sums);
    }

    /// Adds the values of some entries to rows of `sums`; the weights of a row are [`KEYS`] behind those of the one before.
    fn add_values(&self, entries: Range<usize>, weights: &[f32], sums: &mut [f32]) {
        let values = &self.values[entries.start * self.padded..entries.end * self.padded];
        let count = sums.len() / self.padded;
        assert!(weights.len() >= count.saturating_sub(1) * KEYS + entries.len(), "rows of a panel");
        let mut y = [std::ptr::null_mut(); MAX_ROWS];
        for (y, sums) in y.iter_mut().zip(sums.chunks_exact_mut(self.padded)) {
            *y = sums.as_mut_ptr();
        }
        let panel = Panel {
            x: weights.as_ptr(),
            x_stride: KEYS,
            w: values.as_ptr(),
            w_step: self.padded,
            w_tile: LANES,
            depth: entries.len(),
            y,
            fresh: false,
        };
        // SAFETY: the slices above hold these rows, depth and dimensions.
        unsafe { self.tier.panel(&panel, count, self.padded / LANES) }
    }
}
