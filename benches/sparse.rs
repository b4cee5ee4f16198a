//! A feed-forward block that skips neurons beside one that does not: time against the share that is skipped.
//!
//! Dense is the same 4-bit kernel that runs models without sparsity. Both do all of a token's work: gate, activation, finding
//! the active neurons, `up`, rounding, `down`. Which neurons are active is drawn anew for every pass, each alone: the worst
//! case for memory. `l3` repeats as many layers as 12 MB hold (at least one), `dram` walks over at least 192 MB of them.
//!
//! ```text
//! cargo bench -p nybble --bench sparse [-- --csv FILE] [--quick] [--filter TEXT]
//! ```
//!
//! `NYBBLE_THREADS` sets the threads, `--quick` runs everything once and small. Both kinds take turns, so that other programs
//! disturb both alike: a row's two times are medians, and its speed-up is the median of the turns' own ratios.
#![allow(missing_docs)]
#![allow(clippy::print_stdout)] // a report

mod matrices;
mod report;

use std::fmt::Write as _;
use std::time::Instant;

use nybble::kernels::quantize::{Activations, Granularity, Rounding};
use nybble::kernels::w4a8_sparse::{sparse_columns, sparse_rows};
use nybble::kernels::{Columns, IntProduct, Kernels, int_matmul, int_matmuls};
use nybble::pack::{Bundles, Packed};
use nybble::threads::Pool;

use matrices::{noise, weights};
use report::{BLOCKS, Options, PLACES, layers, median, pool};

/// Groups of gate and up, and of down; 0 is one scale a row.
const GROUPS: [(usize, usize); 3] = [(32, 32), (64, 128), (32, 0)];
const HEADER: &str =
    "shape,hidden,ffn,weights,group_up,group_down,isa,threads,sparsity,dense_us,sparse_us,speedup";
const ROUNDING: Rounding = Rounding { bits: 8, per: Granularity::Group };

struct Layer {
    gate: Packed,
    up: Packed,
    down: Packed,
    bundles: Bundles,
}

/// A token's memory.
struct Scratch {
    x: Vec<f32>,       // [hidden]
    ones: Vec<f32>,    // [ffn]
    gate_up: Vec<f32>, // [2 ffn]
    act: Vec<f32>,     // [ffn]
    inner: Vec<f32>,   // [ffn]
    picked: Vec<f32>,  // [active]
    y: Vec<f32>,       // [hidden]
    active: Vec<u32>,
    rounded: Activations,
}

fn dense(pool: &Pool, kernels: &Kernels, layer: &Layer, s: &mut Scratch) {
    let (hidden, ffn) = (s.x.len(), s.act.len());
    let quantize = |rounded: &mut Activations, x: &[f32], group: usize| {
        rounded.quantize(pool, kernels.quantize, x, 1, x.len(), group, ROUNDING).expect("fits");
    };
    quantize(&mut s.rounded, &s.x, layer.gate.group());
    let columns = Columns::new(&mut s.gate_up, 1, 2 * ffn, 0, 2 * ffn);
    let product = |w, part| IntProduct { kernel: kernels.w4a8, w, y: columns.part(part * ffn, ffn) };
    let products = [product(&layer.gate, 0), product(&layer.up, 1)];
    int_matmuls(pool, &s.rounded, &mut products.into_iter()).expect("fits");
    let (gate, up) = s.gate_up.split_at(ffn);
    kernels.elementwise.silu_mul(gate, up, &mut s.inner);
    quantize(&mut s.rounded, &s.inner, layer.down.group());
    int_matmul(pool, kernels.w4a8, &layer.down, &s.rounded, Columns::new(&mut s.y, 1, hidden, 0, hidden))
        .expect("fits");
}

fn sparse(pool: &Pool, kernels: &Kernels, layer: &Layer, chosen: &[bool], s: &mut Scratch) {
    let ffn = s.act.len();
    let quantize = |rounded: &mut Activations, x: &[f32], group: usize| {
        rounded.quantize(pool, kernels.quantize, x, 1, x.len(), group, ROUNDING).expect("fits");
    };
    quantize(&mut s.rounded, &s.x, layer.gate.group());
    let gate = Columns::new(&mut s.gate_up, 1, 2 * ffn, 0, ffn);
    int_matmul(pool, kernels.w4a8, &layer.gate, &s.rounded, gate).expect("fits");
    kernels.elementwise.silu_mul(&s.gate_up[..ffn], &s.ones, &mut s.act);
    // The comparison with thresholds, as the model does it; what it decides is drawn here.
    s.active.clear();
    s.active.extend((0u32..).zip(chosen).filter(|(_, chosen)| **chosen).map(|(n, _)| n));
    s.picked.resize(s.active.len(), 0.0);
    sparse_rows(pool, kernels.w4a8_sparse, &layer.bundles, &s.rounded, 0, &s.active, &mut s.picked)
        .expect("fits");
    s.inner.fill(0.0);
    for (&n, up) in s.active.iter().zip(&s.picked) {
        s.inner[n as usize] = s.act[n as usize] * up;
    }
    quantize(&mut s.rounded, &s.inner, layer.down.group());
    sparse_columns(pool, kernels.w4a8_sparse, &layer.bundles, &s.rounded, 0, &s.active, &mut s.y)
        .expect("fits");
}

fn main() {
    let options = Options::read(&mut []);
    let (quick, pool) = (options.quick, pool());
    let kernels = Kernels::best();
    let mut table = format!("{HEADER}\n");
    println!("{HEADER}");
    for (name, hidden, ffn) in BLOCKS {
        for (group_up, group_down) in GROUPS {
            for place in PLACES {
                if !format!("{name}/{place}/{group_up}/{group_down}").contains(&options.filter) {
                    continue;
                }
                let (hidden, ffn) = if quick { (hidden / 4, ffn / 4) } else { (hidden, ffn) };
                let (group_up, group_down) =
                    if quick { (0, group_down.min(32)) } else { (group_up, group_down) };
                let mut seed = 1;
                let mut layer = || {
                    let mut matrix = |(rows, cols), group| {
                        let group = if group == 0 { cols } else { group };
                        weights(&pool, 4, (rows, cols), group, true, &mut seed)
                    };
                    let gate = matrix((ffn, hidden), group_up);
                    let up = matrix((ffn, hidden), group_up);
                    let down = matrix((hidden, ffn), group_down);
                    let bundles = Bundles::new(Some(&up), &down, &pool).expect("they fit");
                    Layer { gate, up, down, bundles }
                };
                let bytes = 3 * hidden * ffn / 2;
                let count = if quick { 1 } else { layers(place, bytes) };
                let layers: Vec<Layer> = (0..count).map(|_| layer()).collect();
                let mut s = Scratch {
                    x: noise(hidden, &mut seed).iter().map(|&b| f32::from(b) / 64.0 - 2.0).collect(),
                    ones: vec![1.0; ffn],
                    gate_up: vec![0.0; 2 * ffn],
                    act: vec![0.0; ffn],
                    inner: vec![0.0; ffn],
                    picked: Vec::new(),
                    y: vec![0.0; hidden],
                    active: Vec::new(),
                    rounded: Activations::new(),
                };
                for percent in (0..100).step_by(5) {
                    let passes = if quick { 1 } else { (1 << 30) / (bytes * layers.len()) };
                    let (mut with, mut without) = (Vec::new(), Vec::new());
                    // Each kind runs over all layers twice, and the second time counts: what the other kind left in the
                    // caches is gone by then, and what it can keep there itself is there.
                    for _ in 0..passes.clamp(1, 40) {
                        let draws = noise(2 * ffn, &mut seed);
                        for round in 0..2 {
                            let start = Instant::now();
                            pool.region(|| {
                                for layer in &layers {
                                    dense(&pool, &kernels, layer, &mut s);
                                }
                            });
                            if round == 1 {
                                without.push(start.elapsed().as_secs_f64());
                            }
                        }
                        for round in 0..2 {
                            let chosen: Vec<bool> = draws[round * 7..][..ffn]
                                .iter()
                                .map(|&draw| usize::from(draw) * 100 >= percent * 256)
                                .collect();
                            let start = Instant::now();
                            pool.region(|| {
                                for layer in &layers {
                                    sparse(&pool, &kernels, layer, &chosen, &mut s);
                                }
                            });
                            if round == 1 {
                                with.push(start.elapsed().as_secs_f64());
                            }
                        }
                    }
                    let each = 1e6 / layers.len() as f64;
                    let ratios = without.iter().zip(&with).map(|(without, with)| without / with).collect();
                    let (without, with) = (median(without) * each, median(with) * each);
                    let mut line = format!("{name},{hidden},{ffn},{place},{group_up},{group_down},");
                    let isa = kernels.w4a8_sparse.isa().name();
                    let _ = write!(line, "{isa},{},{percent},{without:.1},{with:.1}", pool.threads());
                    let _ = write!(line, ",{:.3}", median(ratios));
                    println!("{line}");
                    table += &line;
                    table.push('\n');
                }
            }
        }
    }
    options.save(&table);
}
