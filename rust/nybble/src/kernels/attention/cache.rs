//! The keys and values of one layer.
//!
//! Both are stored the way attention reads them, so that no kernel ever adds across lanes or transposes:
//!
//! - keys as `[kv head][position / 16][dimension][16 positions]`: a query meets 16 keys at once, one dimension a step;
//! - values as `[kv head][position][dimensions padded to 16]`: 16 dimensions of an output at once, one position a step.
//!
//! With [`KvType::Int8`] a key or value of one head and position is 8-bit codes and one scale, `max / 127`. The scale of a key
//! multiplies the score it gave, that of a value the weight it gets, so the products run over plain codes.
//!
//! A new token's key is scattered over lines that the same token's attention then reads anyway.
//!
//! The memory doubles as the sequence grows, up to a limit. Memory that cannot be had is an error, and the cache then holds
//! what it held before.

#![allow(clippy::inline_always)] // a conversion inside a loop

use half::f16;

use super::super::f32::lanes::{Element, LANES};
use crate::error::{Error, Result};
use crate::threads::Pool;

/// Positions the memory grows by at least, and of which it always holds a multiple.
const STEP: usize = 64;

/// Appended elements from which several threads are worth waking.
const PARALLEL: usize = 1 << 15;

/// Elements converted at once.
const RUN: usize = 32;

/// Number type of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 32 bits an element, exact.
    F32,
    /// 16 bits an element: half the memory and traffic. Finite values beyond its range become its largest.
    F16,
    /// 8 bits an element and a scale for each position's key and value in a head: a quarter.
    Int8,
}

impl KvType {
    /// The name used in settings and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }

    /// The type of that name.
    pub fn parse(name: &str) -> Result<Self> {
        let all = [Self::F32, Self::F16, Self::Int8];
        let found = all.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| Error::argument("kv", all.map(Self::name).join(", "), format!("{name:?}")))
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of the scales of a position's key and value in one head.
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 0,
            Self::Int8 => 2 * size_of::<f32>(),
        }
    }
}

/// One cache line; a vector of them is aligned to its size.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Zeroed lines, aligned to 64 bytes.
#[derive(Default)]
pub(super) struct Lines(Vec<Line>);

impl Lines {
    /// Room for `elements` of `size` bytes, a whole number of lines.
    pub(super) fn new(what: &str, elements: usize, size: usize) -> Result<Self> {
        let refused = || {
            Error::argument(what, format!("memory for {elements} elements of {size} bytes"), "out of memory")
        };
        let lines = elements.checked_mul(size).ok_or_else(refused)?.div_ceil(size_of::<Line>());
        let mut data = Vec::new();
        data.try_reserve_exact(lines).map_err(|_| refused())?;
        data.resize(lines, Line([0; 64]));
        Ok(Self(data))
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.len() * size_of::<Line>()
    }

    pub(super) fn elements<E: Element>(&self) -> &[E] {
        // SAFETY: lines are initialised bytes, every bit pattern is an element, and a line's alignment exceeds an element's.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.bytes() / size_of::<E>()) }
    }

    pub(super) fn elements_mut<E: Element>(&mut self) -> &mut [E] {
        // SAFETY: as in `elements`, and every element's bytes are valid lines' bytes.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.bytes() / size_of::<E>()) }
    }
}

/// The keys and values of one layer, for all positions so far.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    kind: KvType,
    len: usize,
    capacity: usize,
    limit: usize,
    keys: Lines,
    values: Lines,
    /// `[kv head][position]`; empty unless the elements are codes.
    key_scales: Lines,
    value_scales: Lines,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvCache")
            .field("kv_heads", &self.kv_heads)
            .field("head_dim", &self.head_dim)
            .field("kind", &self.kind)
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl KvCache {
    /// An empty cache; it takes memory when the first positions are appended.
    pub fn new(kv_heads: usize, head_dim: usize, kind: KvType) -> Self {
        Self {
            kv_heads,
            head_dim,
            kind,
            len: 0,
            capacity: 0,
            limit: usize::MAX,
            keys: Lines::default(),
            values: Lines::default(),
            key_scales: Lines::default(),
            value_scales: Lines::default(),
        }
    }

    /// The same cache, but it never holds more than `positions`.
    #[must_use]
    pub fn with_limit(mut self, positions: usize) -> Self {
        self.limit = positions;
        self
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions there is memory for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes() + self.key_scales.bytes() + self.value_scales.bytes()
    }

    /// Bytes of the positions held, without memory for more and without padding.
    pub fn used_bytes(&self) -> usize {
        self.len * self.kv_heads * (2 * self.head_dim * self.kind.bytes() + self.kind.scale_bytes())
    }

    /// Number type of the elements.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Forgets all positions from `len` on. The memory stays.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Of the entries from `past` on keeps those at `past + path[0]`, `past + path[1]`, ..., in this order, and forgets the
    /// others. Places in a path ascend.
    pub(crate) fn keep(&mut self, past: usize, path: &[usize]) {
        debug_assert!(path.is_sorted_by(|a, b| a < b), "a path ascends");
        match self.kind {
            KvType::F32 => self.gather::<f32>(past, path),
            KvType::F16 => self.gather::<f16>(past, path),
            KvType::Int8 => {
                self.gather::<i8>(past, path);
                let capacity = self.capacity.max(1);
                for scales in [&mut self.key_scales, &mut self.value_scales] {
                    for scales in scales.elements_mut::<f32>().chunks_exact_mut(capacity) {
                        for (to, from) in (past..).zip(path) {
                            scales[to] = scales[past + from];
                        }
                    }
                }
            }
        }
        self.len = past + path.len();
    }

    fn gather<E: Element>(&mut self, past: usize, path: &[usize]) {
        let (dim, padded, capacity) = (self.head_dim, self.padded_dim(), self.capacity);
        if dim == 0 || capacity == 0 {
            return;
        }
        for (to, from) in (past..).zip(path.iter().map(|place| past + place)).filter(|(to, from)| to != from)
        {
            let key = |position: usize| position / LANES * LANES * dim + position % LANES;
            for keys in self.keys.elements_mut::<E>().chunks_exact_mut(capacity * dim) {
                for d in 0..dim {
                    keys[key(to) + d * LANES] = keys[key(from) + d * LANES];
                }
            }
            for values in self.values.elements_mut::<E>().chunks_exact_mut(capacity * padded) {
                values.copy_within(from * padded..(from + 1) * padded, to * padded);
            }
        }
    }

    /// Makes sure that `positions` fit without further allocation.
    pub fn reserve(&mut self, positions: usize) -> Result<()> {
        if positions > self.limit {
            return Err(Error::Context { tokens: positions, limit: self.limit });
        }
        if positions <= self.capacity {
            return Ok(());
        }
        let doubled = self.capacity.saturating_mul(2).min(self.limit);
        let capacity = positions.max(doubled).checked_next_multiple_of(STEP).unwrap_or(usize::MAX);
        let elements = |dim: usize| {
            let product = self.kv_heads.checked_mul(dim).and_then(|row| row.checked_mul(capacity));
            product.ok_or_else(|| {
                let wanted = format!("{} heads of {} for {capacity} positions", self.kv_heads, self.head_dim);
                Error::argument("KV cache", "a size that can be addressed", wanted)
            })
        };
        let mut keys = Lines::new("KV cache", elements(self.head_dim)?, self.kind.bytes())?;
        let mut values = Lines::new("KV cache", elements(self.padded_dim())?, self.kind.bytes())?;
        let scales = if self.kind.scale_bytes() > 0 { elements(1)? } else { 0 };
        let mut key_scales = Lines::new("KV cache", scales, size_of::<f32>())?;
        let mut value_scales = Lines::new("KV cache", scales, size_of::<f32>())?;
        if self.capacity > 0 {
            let key_run = self.len.next_multiple_of(LANES) * self.head_dim;
            let value_run = self.len * self.padded_dim();
            let factor = (self.capacity, capacity);
            match self.kind {
                KvType::F32 => {
                    respace::<f32>(&self.keys, &mut keys, self.head_dim, factor, key_run);
                    respace::<f32>(&self.values, &mut values, self.padded_dim(), factor, value_run);
                }
                KvType::F16 => {
                    respace::<f16>(&self.keys, &mut keys, self.head_dim, factor, key_run);
                    respace::<f16>(&self.values, &mut values, self.padded_dim(), factor, value_run);
                }
                KvType::Int8 => {
                    respace::<i8>(&self.keys, &mut keys, self.head_dim, factor, key_run);
                    respace::<i8>(&self.values, &mut values, self.padded_dim(), factor, value_run);
                    respace::<f32>(&self.key_scales, &mut key_scales, 1, factor, self.len);
                    respace::<f32>(&self.value_scales, &mut value_scales, 1, factor, self.len);
                }
            }
        }
        (self.keys, self.values, self.capacity) = (keys, values, capacity);
        (self.key_scales, self.value_scales) = (key_scales, value_scales);
        Ok(())
    }

    /// Appends `n` positions: head `h` of position `i` starts at `i * stride + h * head_dim` of `k` and of `v`.
    pub fn append(&mut self, pool: &Pool, k: &[f32], v: &[f32], n: usize, stride: usize) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let width = self.kv_heads * self.head_dim;
        let needed = (n - 1).checked_mul(stride).and_then(|last| last.checked_add(width));
        if stride < width || needed.is_none_or(|needed| k.len() < needed || v.len() < needed) {
            return Err(Error::argument(
                "keys and values",
                format!("{n} rows of {width}, {stride} apart"),
                format!("{} and {} values", k.len(), v.len()),
            ));
        }
        let end = self.len.checked_add(n).ok_or(Error::Context { tokens: usize::MAX, limit: self.limit })?;
        self.reserve(end)?;
        if width > 0 {
            match self.kind {
                KvType::F32 => self.write::<f32>(pool, k, v, n, stride, |x, _| x),
                KvType::F16 => self.write::<f16>(pool, k, v, n, stride, |x, _| narrow(x)),
                KvType::Int8 => {
                    self.write_scales(k, v, n, stride);
                    self.write::<i8>(pool, k, v, n, stride, code);
                }
            }
        }
        self.len = end;
        Ok(())
    }

    /// Stores the scales of `n` positions after the last one.
    fn write_scales(&mut self, k: &[f32], v: &[f32], n: usize, stride: usize) {
        for (source, scales) in [(k, &mut self.key_scales), (v, &mut self.value_scales)] {
            let scales = scales.elements_mut::<f32>();
            for i in 0..n {
                for head in 0..self.kv_heads {
                    let row = &source[i * stride + head * self.head_dim..][..self.head_dim];
                    scales[head * self.capacity + self.len + i] = scale(row);
                }
            }
        }
    }

    /// Stores `n` positions after the last one; there is room for them. `convert` gets an element and its row's scale.
    fn write<E: Element>(
        &mut self,
        pool: &Pool,
        k: &[f32],
        v: &[f32],
        n: usize,
        stride: usize,
        convert: impl Fn(f32, f32) -> E + Sync,
    ) {
        let (dim, padded, len) = (self.head_dim, self.padded_dim(), self.len);
        let written = n * dim * self.kv_heads;
        let capacity = self.capacity;
        let (key_scales, value_scales) = (self.key_scales.elements(), self.value_scales.elements());
        let inverse = |scales: &[f32], head: usize, position: usize| {
            scales.get(head * capacity + position).map_or(1.0, |scale| 1.0 / scale)
        };
        let key_head = |head: usize, keys: &mut [E]| {
            for i in 0..n {
                let source = &k[i * stride + head * dim..][..dim];
                let position = len + i;
                let inverse = inverse(key_scales, head, position);
                let block = &mut keys[position / LANES * LANES * dim..][..LANES * dim];
                // Converted before they are scattered: only the former can be vector code.
                let mut part = [convert(0.0, 0.0); RUN];
                for (source, block) in source.chunks(RUN).zip(block.chunks_mut(RUN * LANES)) {
                    for (part, &x) in part.iter_mut().zip(source) {
                        *part = convert(x, inverse);
                    }
                    for (lanes, &x) in block.chunks_exact_mut(LANES).zip(&part) {
                        lanes[position % LANES] = x;
                    }
                }
            }
        };
        let value_head = |head: usize, values: &mut [E]| {
            for i in 0..n {
                let source = &v[i * stride + head * dim..][..dim];
                let inverse = inverse(value_scales, head, len + i);
                for (value, &x) in values[(len + i) * padded..].iter_mut().zip(source) {
                    *value = convert(x, inverse);
                }
            }
        };
        each_head(pool, written, self.keys.elements_mut(), self.capacity * dim, &key_head);
        each_head(pool, written, self.values.elements_mut(), self.capacity * padded, &value_head);
    }

    /// Elements between two positions of the values.
    pub(super) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// The keys of one head.
    pub(super) fn keys<E: Element>(&self, head: usize) -> &[E] {
        let size = self.capacity * self.head_dim;
        &self.keys.elements()[head * size..][..size]
    }

    /// The scales of one head's keys and of its values, by position; none unless the elements are codes.
    pub(super) fn scales(&self, head: usize) -> Option<(&[f32], &[f32])> {
        let of = |scales: &'_ Lines| {
            (scales.bytes() > 0).then_some(head * self.capacity..(head + 1) * self.capacity)
        };
        let (keys, values) = (of(&self.key_scales)?, of(&self.value_scales)?);
        Some((&self.key_scales.elements()[keys], &self.value_scales.elements()[values]))
    }

    /// The values of one head.
    pub(super) fn values<E: Element>(&self, head: usize) -> &[E] {
        let size = self.capacity * self.padded_dim();
        &self.values.elements()[head * size..][..size]
    }
}

/// The scale of one position's key or value in a head: `max / 127`; 0 where all are too small to have one, NaN where one is
/// not finite, so that the output shows it.
fn scale(row: &[f32]) -> f32 {
    // Non-negative floats compare as their bits do, and NaN and infinity compare above all numbers.
    let top = f32::from_bits(row.iter().fold(0, |top, x| top.max(x.to_bits() & 0x7fff_ffff)));
    if !top.is_finite() {
        f32::NAN
    } else if top < 127.0 * f32::MIN_POSITIVE {
        0.0
    } else {
        top / 127.0
    }
}

/// The nearest code, ties to even. Adding 1.5 * 2^23 leaves it in the low bits; of a row without a scale the codes do not
/// matter, for they are multiplied by 0 or NaN.
#[inline(always)]
fn code(x: f32, inverse: f32) -> i8 {
    (x * inverse + 12_582_912.0).to_bits() as i8
}

/// Calls `job` with every head's part of `data`, each of `size` elements, on several threads when there is much to write.
fn each_head<E: Element>(
    pool: &Pool,
    written: usize,
    data: &mut [E],
    size: usize,
    job: &(dyn Fn(usize, &mut [E]) + Sync),
) {
    let run = |first: usize, part: &mut [E]| {
        for (head, part) in (first..).zip(part.chunks_exact_mut(size)) {
            job(head, part);
        }
    };
    if written < PARALLEL {
        run(0, data);
    } else {
        pool.split_rows(data, size, &run);
    }
}

/// Copies the first `run` elements of every head, whose heads are `dim` times old and new capacity apart.
fn respace<E: Element>(old: &Lines, new: &mut Lines, dim: usize, (from, to): (usize, usize), run: usize) {
    if dim == 0 {
        return;
    }
    let heads = old.elements::<E>().chunks_exact(from * dim);
    for (old, new) in heads.zip(new.elements_mut::<E>().chunks_exact_mut(to * dim)) {
        new[..run].copy_from_slice(&old[..run]);
    }
}

/// The nearest half float, ties to even; a finite number beyond the range becomes the largest one, not infinity, which would
/// turn a whole head's output into NaN.
///
/// Selections instead of branches, so that a loop over it becomes vector code on any CPU.
#[inline(always)]
fn narrow(x: f32) -> f16 {
    const INFINITY: u32 = 0x7f80_0000;
    const LARGEST: u32 = 0x477f_e000; // 65504
    const SMALLEST_NORMAL: u32 = 0x3880_0000; // 2^-14
    let sign = x.to_bits() >> 16 & 0x8000;
    let size = x.to_bits() & 0x7fff_ffff;
    let held = if size > LARGEST { LARGEST } else { size };
    // Half of the last place that stays, less one if it is even already, carries into it.
    let normal = (held + 0xfff + (held >> 13 & 1)) >> 13;
    let normal = normal.wrapping_sub(112 << 10);
    // Near 0.5 floats are 2^-24 apart, as subnormal half floats are: the addition rounds.
    let subnormal = (f32::from_bits(held) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if held < SMALLEST_NORMAL { subnormal } else { normal };
    let special = if size > INFINITY { 0x7e00 } else { 0x7c00 };
    f16::from_bits((sign | if size < INFINITY { finite } else { special }) as u16)
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // exact results are what is asked for
mod tests;
