//! Every integer matmul of every tier against the machine's limits, measured in the same minute.
//!
//! One row reads weights that the caches do not hold, as decoding does: matrices are walked in turn until they exceed
//! 128 MB, and the rate is a share of the read bandwidth. Many rows multiply: the rate is a share of what the tier's multiply
//! instruction alone reaches. A few rows (drafts to verify) should cost little more than one.
//!
//! ```text
//! cargo bench -p nybble --bench roofline [-- --csv FILE] [--quick] [--filter TEXT] [--rows 1,128]
//! ```
//!
//! `NYBBLE_THREADS` sets the threads, `--quick` runs everything once and small. Criterion's benches (`kernels.rs`) watch single
//! kernels over time; this one answers how far from the limit they are.
#![allow(missing_docs)]
#![allow(clippy::print_stdout)] // a report

mod matrices;
mod report;

use std::fmt::Write as _;
use std::time::Instant;

use nybble::kernels::{Columns, IntMatmul, int_matmul, peak, w4a4, w4a4_trip, w4a8, w8a8};
use nybble::pack::Packed;
use nybble::probe::read_bandwidth;
use nybble::threads::Pool;

use matrices::{activations, weights};
use report::{Options, median, pool};

const SIDE: usize = 4096;
const HEADER: &str = "op,isa,group,threads,rows,side,cold_mb,median_us,gb_s,bandwidth_gb_s,bandwidth_share,\
gmac_s,peak_gmac_s,peak_share,clock_ghz,mac_per_cycle";

/// Seconds of one multiplication: the median over walks through all matrices.
fn seconds(pool: &Pool, kernel: &dyn IntMatmul, matrices: &[Packed], rows: usize, repeats: usize) -> f64 {
    let (side, group) = (matrices[0].cols(), matrices[0].group());
    let x = activations(pool, kernel.activation_bits(), rows, side, group);
    let mut y = vec![0.0; rows * side];
    let mut walk = || {
        let start = Instant::now();
        pool.region(|| {
            for w in matrices {
                int_matmul(pool, kernel, w, &x, Columns::new(&mut y, rows, side, 0, side))
                    .expect("shapes match");
            }
        });
        start.elapsed().as_secs_f64() / matrices.len() as f64
    };
    walk();
    median((0..repeats).map(|_| walk()).collect())
}

fn main() {
    let mut rows = "1,2,4,8,16,128".to_owned();
    let options = Options::read(&mut [("--rows", &mut rows)]);
    let counts = rows.split(',').map(|n| n.parse().expect("--rows takes numbers"));
    let counts: Vec<usize> = counts.collect();
    let pool = pool();
    let threads = pool.threads();
    let (side, cold_mb, repeats) = if options.quick { (256, 1, 1) } else { (SIDE, 128, 9) };
    let mut csv = String::from(HEADER);
    println!("{threads} threads, {side} x {side}, medians of {repeats}");
    println!(
        "{:<26} {:>5} {:>10} {:>8} {:>10} {:>8} {:>10} {:>10}",
        "kernel", "rows", "us", "GB/s", "of memory", "GMAC/s", "of peak", "MAC/cycle"
    );
    let operations = [
        ("w4a8", 4, w4a8::kernels()),
        ("w8a8", 8, w8a8::kernels()),
        ("w4a4", 4, w4a4::kernels()),
        ("w4a4_trip", 4, w4a4_trip::kernels()),
    ];
    for (op, bits, kernels) in operations {
        for group in [32, 64, 128, side] {
            let matrix = |seed| weights(&pool, bits, (side, side), group, bits == 4, &mut { seed });
            let bytes = matrix(1).bytes();
            let count = ((cold_mb << 20) / bytes).max(1);
            let matrices: Vec<_> = (0..count as u32).map(matrix).collect();
            for kernel in &kernels {
                let isa = kernel.isa();
                let label = format!(
                    "{op}/{} g{}",
                    isa.name(),
                    if group == side { "row".into() } else { group.to_string() }
                );
                if !label.contains(&options.filter) || (isa.name() == "scalar" && !options.quick) {
                    continue;
                }
                let probe = if options.quick { 1 << 20 } else { 512 << 20 };
                let bandwidth = read_bandwidth(&pool, probe) / 1e9;
                let clock = peak::clock() / 1e9;
                let peak = peak::int8_products(&pool, isa).map(|rate| rate / 1e9);
                for &rows in &counts {
                    // Many rows take long enough with one matrix.
                    let matrices = if rows > 16 { &matrices[..1] } else { &matrices[..] };
                    let time = seconds(&pool, *kernel, matrices, rows, repeats);
                    let read = bytes as f64 / time / 1e9;
                    let products = (rows * side * side) as f64 / time / 1e9;
                    let share =
                        peak.map_or(String::new(), |peak| format!("{:.0} %", 100.0 * products / peak));
                    let per_cycle = products / clock / threads as f64;
                    println!(
                        "{label:<26} {rows:>5} {:>10.1} {read:>8.1} {:>8.0} % {products:>8.1} {share:>10} \
                         {per_cycle:>10.1}",
                        time * 1e6,
                        100.0 * read / bandwidth
                    );
                    let (peak, peak_share) = peak.map_or((String::new(), String::new()), |peak| {
                        (format!("{peak:.1}"), format!("{:.3}", products / peak))
                    });
                    let _ = write!(
                        csv,
                        "\n{op},{},{group},{threads},{rows},{side},{cold_mb},{:.1},{read:.2},{bandwidth:.2},{:.3},\
                         {products:.2},{peak},{peak_share},{clock:.2},{per_cycle:.2}",
                        isa.name(),
                        time * 1e6,
                        read / bandwidth
                    );
                }
            }
        }
    }
    csv.push('\n');
    options.save(&csv);
}
