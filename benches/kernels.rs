//! Speed of every integer kernel of every tier, and of packing.
//!
//! `decode` multiplies one row with a matrix larger than the last-level cache: its rate, in bytes of packed weights, is to
//! be compared with the machine's read bandwidth. `prefill` multiplies many rows with a matrix that fits into the cache: its
//! rate, in multiplications, is to be compared with the instruction set's peak.
//!
//! `cargo bench -p nybble --bench kernels -- w4a8/decode` runs a part; `NYBBLE_THREADS` sets the threads.
#![allow(missing_docs)]

mod matrices;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nybble::kernels::quantize::{self, Activations, Granularity, Rounding};
use nybble::kernels::{Columns, IntMatmul, int_matmul, w4a4, w4a4_trip, w4a8, w8a8};
use nybble::pack::{IntSource, Packed};
use nybble::threads::Pool;

use matrices::{activations, floats, noise, weights};

/// Rows, columns: 37.7 MB at 4 bits in groups of 32.
const LARGE: (usize, usize) = (8192, 8192);
const SMALL: (usize, usize) = (2048, 2048);
const PREFILL_ROWS: usize = 64;

fn pool() -> Pool {
    let threads = Pool::default_threads().expect("NYBBLE_THREADS is a number");
    Pool::new(threads).expect("a pool")
}

fn matmul(c: &mut Criterion, op: &str, [bits, x_bits]: [u32; 2], kernels: &[&'static dyn IntMatmul]) {
    let pool = pool();
    for (name, shape, rows) in [("decode", LARGE, 1), ("prefill", SMALL, PREFILL_ROWS)] {
        let mut group = c.benchmark_group(format!("{op}/{name}"));
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(1))
            .warm_up_time(Duration::from_millis(300));
        for columns in [32, 128] {
            let w = weights(&pool, bits, shape, columns, false, &mut 1);
            let x = activations(&pool, x_bits, rows, shape.1, columns);
            let mut y = vec![0.0; rows * shape.0];
            group.throughput(if rows == 1 {
                Throughput::Bytes(w.bytes() as u64)
            } else {
                Throughput::Elements((rows * shape.0 * shape.1) as u64)
            });
            for kernel in kernels {
                group.bench_function(format!("{}/group{columns}", kernel.isa().name()), |b| {
                    b.iter(|| {
                        let y = Columns::new(&mut y, rows, shape.0, 0, shape.0);
                        int_matmul(&pool, *kernel, &w, &x, y).expect("matching shapes");
                    });
                });
            }
        }
        group.finish();
    }
}

fn integer_matmuls(c: &mut Criterion) {
    matmul(c, "w4a8", [4, 8], &w4a8::kernels());
    matmul(c, "w8a8", [8, 8], &w8a8::kernels());
    matmul(c, "w7a7", [7, 7], &w8a8::kernels());
    matmul(c, "w4a4", [4, 4], &w4a4::kernels());
    matmul(c, "w4a4_trip", [4, 4], &w4a4_trip::kernels());
}

fn quantizing(c: &mut Criterion) {
    let pool = pool();
    let (rows, cols) = (64, 4096);
    let x = floats(rows * cols);
    let mut group = c.benchmark_group("quantize");
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Elements(x.len() as u64));
    let mut activations = Activations::new();
    for kernel in quantize::kernels() {
        group.bench_function(kernel.isa().name(), |b| {
            b.iter(|| {
                activations
                    .quantize(
                        &pool,
                        kernel,
                        &x,
                        rows,
                        cols,
                        32,
                        Rounding { bits: 8, per: Granularity::Group },
                    )
                    .expect("good input");
            });
        });
    }
    group.finish();
}

/// From the bytes of a file, already in memory, to tiles.
fn packing(c: &mut Criterion) {
    let pool = pool();
    let (rows, cols) = LARGE;
    let mut group = c.benchmark_group("pack");
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for bits in [4, 8] {
        let row_bytes = cols * bits as usize / 8;
        let codes = noise(rows * row_bytes, &mut 1);
        let scales = vec![0.25; rows * cols / 32];
        let source = IntSource {
            name: "bench",
            rows,
            cols,
            bits,
            group: 32,
            codes: &codes,
            row_bytes,
            scales: &scales,
            zeros: None,
            row_map: None,
        };
        group.throughput(Throughput::Bytes(codes.len() as u64));
        group.bench_function(format!("w{bits}"), |b| {
            b.iter(|| Packed::from_int(&source, &pool).expect("good weights"));
        });
    }
    group.finish();
}

criterion_group!(benches, integer_matmuls, quantizing, packing);
criterion_main!(benches);
