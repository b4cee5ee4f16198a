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

use std::fmt::Write as _;
use std::time::Instant;

use nybble::kernels::quantize::{self, Activations, Granularity, Rounding};
use nybble::kernels::{Columns, IntMatmul, int_matmul, peak, w4a4, w4a4_trip, w4a8, w8a8};
use nybble::pack::{IntSource, Packed};
use nybble::probe::read_bandwidth;
use nybble::threads::Pool;

const SIDE: usize = 4096;
const HEADER: &str = "op,isa,group,threads,rows,side,cold_mb,median_us,gb_s,bandwidth_gb_s,bandwidth_share,\
gmac_s,peak_gmac_s,peak_share,clock_ghz,mac_per_cycle";

struct Settings {
    quick: bool,
    csv: Option<String>,
    filter: String,
    rows: Vec<usize>,
}

fn settings() -> Settings {
    let mut found =
        Settings { quick: false, csv: None, filter: String::new(), rows: vec![1, 2, 4, 8, 16, 128] };
    let mut bench = false;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => found.quick = true,
            "--bench" => bench = true, // cargo bench adds it
            "--csv" => found.csv = words.next(),
            "--filter" => found.filter = words.next().unwrap_or_default(),
            "--rows" => {
                let list = words.next().unwrap_or_default();
                found.rows = list.split(',').map(|n| n.parse().expect("--rows takes numbers")).collect();
            }
            other => panic!("{other}: expected --quick, --csv FILE, --filter TEXT or --rows LIST"),
        }
    }
    found.quick |= !bench; // `cargo test --benches`
    found
}

/// Repeatable bytes.
fn noise(len: usize, mut state: u32) -> Vec<u8> {
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn weights(pool: &Pool, bits: u32, side: usize, group: usize, seed: u32) -> Packed {
    let row_bytes = side * bits as usize / 8;
    let groups = side / group;
    let codes = noise(side * row_bytes, seed);
    let scales = vec![0.01; side * groups];
    let zeros = noise(side * groups, seed);
    let source = IntSource {
        name: "bench",
        rows: side,
        cols: side,
        bits,
        group,
        codes: &codes,
        row_bytes,
        scales: &scales,
        zeros: (bits == 4).then_some(&zeros),
        row_map: None,
    };
    Packed::from_int(&source, pool).expect("good weights")
}

fn activations(pool: &Pool, bits: u32, rows: usize, cols: usize, group: usize) -> Activations {
    let x: Vec<f32> = noise(rows * cols, 1).iter().map(|&b| f32::from(b) - 127.5).collect();
    let kernel = *quantize::kernels().last().expect("scalar is always there");
    let mut activations = Activations::new();
    activations
        .quantize(pool, kernel, &x, rows, cols, group, Rounding { bits, per: Granularity::Group })
        .expect("good activations");
    activations
}

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
    let mut times: Vec<f64> = (0..repeats).map(|_| walk()).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let settings = settings();
    let threads = Pool::default_threads().expect("NYBBLE_THREADS is a number");
    let pool = Pool::new(threads).expect("a pool");
    let (side, cold_mb, repeats) = if settings.quick { (256, 1, 1) } else { (SIDE, 128, 9) };
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
            let bytes = weights(&pool, bits, side, group, 1).bytes();
            let count = ((cold_mb << 20) / bytes).max(1);
            let matrices: Vec<_> = (0..count).map(|i| weights(&pool, bits, side, group, i as u32)).collect();
            for kernel in &kernels {
                let isa = kernel.isa();
                let label = format!(
                    "{op}/{} g{}",
                    isa.name(),
                    if group == side { "row".into() } else { group.to_string() }
                );
                if !label.contains(&settings.filter) || (isa.name() == "scalar" && !settings.quick) {
                    continue;
                }
                let probe = if settings.quick { 1 << 20 } else { 512 << 20 };
                let bandwidth = read_bandwidth(&pool, probe) / 1e9;
                let clock = peak::clock() / 1e9;
                let peak = peak::int8_products(&pool, isa).map(|rate| rate / 1e9);
                for &rows in &settings.rows {
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
    if let Some(path) = settings.csv {
        std::fs::write(&path, csv).expect("the file can be written");
        println!("written to {path}");
    }
}
