//! Speed of every float kernel of every tier.
//!
//! Matmul: `decode` is one row with a matrix larger than the last-level cache, in bytes of packed weights; `prefill` is 128
//! rows with a matrix that fits, in multiplications. Attention: 9 heads that share 3 key heads of 64 elements; `prefill` is
//! 512 new positions, `decode` one new position after 1023 others; both in multiplications of queries with keys and weights
//! with values. `attention/257` and `/1370` are the tokens of an image of 224 and of 518 pixels in 6 heads of 64 that see all
//! keys, in floats (also with all probabilities left as a graph) and on codes of 7 bits, from the layer's matrix to the
//! output. The rest: elements.
//!
//! `cargo bench -p nybble --bench float_kernels -- attention/decode` runs a part; `NYBBLE_THREADS` sets the threads.
#![allow(missing_docs)]

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use nybble::cpu::Isa;
use nybble::kernels::attention::{
    self, Graph, KvCache, KvType, Scratch, Shape, attend, attend_codes, attend_graph, codes,
};
use nybble::kernels::{Columns, Kernels, elementwise, f32 as matmul, float_matmul, norm, rope};
use nybble::pack::{IntSource, Layout, Packed};
use nybble::threads::Pool;

/// Rows, columns: 67 MB at 16 bits.
const LARGE: (usize, usize) = (8192, 4096);
const SMALL: (usize, usize) = (1536, 576);
const PREFILL_ROWS: usize = 128;

fn pool() -> Pool {
    let threads = Pool::default_threads().expect("NYBBLE_THREADS is a number");
    Pool::new(threads).expect("a pool")
}

/// Repeatable values in -1..1.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn weights(pool: &Pool, layout: Layout, (rows, cols): (usize, usize)) -> Packed {
    let values = noise(rows * cols);
    match layout {
        Layout::F32 => Packed::from_f32(rows, cols, &values, pool),
        Layout::F16 | Layout::Bf16 => {
            let bits = |x: &f32| ((x.to_bits() >> 16) as u16 & 0xbfff).to_le_bytes();
            let data: Vec<_> = values.iter().map(bits).collect();
            Packed::from_half(rows, cols, &data, layout, pool)
        }
        Layout::W4 | Layout::W8 => {
            let bits = if layout == Layout::W4 { 4 } else { 8 };
            let row_bytes = cols * bits as usize / 8;
            let codes: Vec<u8> = values[..rows * row_bytes].iter().map(|x| x.to_bits() as u8).collect();
            let scales = vec![0.01; rows * cols / 32];
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
            Packed::from_int(&source, pool)
        }
    }
    .expect("good weights")
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    group
}

fn bench_f32(c: &mut Criterion) {
    let pool = pool();
    for (name, shape, rows) in [("decode", LARGE, 1), ("prefill", SMALL, PREFILL_ROWS)] {
        let mut group = group(c, &format!("f32/{name}"));
        let x = noise(rows * shape.1);
        let mut y = vec![0.0; rows * shape.0];
        for layout in [Layout::F32, Layout::F16, Layout::Bf16, Layout::W4, Layout::W8] {
            let w = weights(&pool, layout, shape);
            group.throughput(if rows == 1 {
                Throughput::Bytes(w.bytes() as u64)
            } else {
                Throughput::Elements((rows * shape.0 * shape.1) as u64)
            });
            for kernel in matmul::kernels() {
                group.bench_function(format!("{}/{}", kernel.isa().name(), layout.name()), |b| {
                    b.iter(|| {
                        let y = Columns::new(&mut y, rows, shape.0, 0, shape.0);
                        float_matmul(&pool, kernel, &w, &x, y).expect("matching shapes");
                    });
                });
            }
        }
        group.finish();
    }
}

fn bench_attention(c: &mut Criterion) {
    let pool = pool();
    let (heads, kv_heads, head_dim) = (9, 3, 64);
    let shape = Shape {
        groups: None,
        heads,
        kv_heads,
        head_dim,
        scale: 0.125,
        window: None,
        alibi: None,
        softcap: None,
        bias: None,
        causal: true,
        log2: false,
    };
    for (name, len, n) in [("prefill", 512, 512), ("decode", 1024, 1)] {
        let mut group = group(c, &format!("attention/{name}"));
        let q = noise(n * heads * head_dim);
        let kv = noise(len * kv_heads * head_dim);
        let mut out = vec![0.0; q.len()];
        let pairs: usize = (len - n..len).map(|i| i + 1).sum();
        group.throughput(Throughput::Elements((2 * pairs * heads * head_dim) as u64));
        for kind in [KvType::F32, KvType::F16, KvType::Int8] {
            let mut cache = KvCache::new(kv_heads, head_dim, kind);
            cache.append(&pool, &kv, &kv, len, kv_heads * head_dim).expect("memory");
            let mut scratch = Scratch::new();
            for kernel in attention::kernels() {
                group.bench_function(format!("{}/{}", kernel.isa().name(), kind.name()), |b| {
                    b.iter(|| {
                        attend(
                            &pool,
                            kernel,
                            &shape,
                            &cache,
                            &q,
                            heads * head_dim,
                            n,
                            &mut out,
                            &mut scratch,
                        )
                        .expect("matching shapes");
                    });
                });
            }
        }
        group.finish();
    }
}

fn bench_images(c: &mut Criterion) {
    let pool = pool();
    let (heads, dim) = (6, 64);
    let (width, stride) = (heads * dim, 3 * heads * dim);
    let shape = Shape {
        groups: None,
        heads,
        kv_heads: heads,
        head_dim: dim,
        scale: 0.125,
        window: None,
        alibi: None,
        softcap: None,
        bias: None,
        causal: false,
        log2: false,
    };
    for n in [257, 1370] {
        let mut group = group(c, &format!("attention/{n}"));
        let qkv = noise(n * stride);
        let (k, v) = (&qkv[width..], &qkv[2 * width..]);
        let mut out = vec![0.0; n * width];
        group.throughput(Throughput::Elements((2 * n * n * width) as u64));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.allowed()) {
            let kernels = Kernels::up_to(isa);
            let mut scratch = Scratch::new();
            let mut cache = KvCache::new(heads, dim, KvType::F16);
            group.bench_function(format!("{}/f16", isa.name()), |b| {
                b.iter(|| {
                    cache.truncate(0);
                    cache.append(&pool, k, v, n, stride).expect("memory");
                    attend(&pool, kernels.attention, &shape, &cache, &qkv, stride, n, &mut out, &mut scratch)
                        .expect("matching shapes");
                });
            });
            let mut graph = Graph::default();
            group.bench_function(format!("{}/f16 and the graph", isa.name()), |b| {
                b.iter(|| {
                    cache.truncate(0);
                    cache.append(&pool, k, v, n, stride).expect("memory");
                    let (kernel, (graph, scratch)) = (kernels.attention, (&mut graph, &mut scratch));
                    attend_graph(&pool, kernel, &shape, &cache, &qkv, stride, &mut out, graph, scratch)
                        .expect("matching shapes");
                });
            });
            let rows = codes::Rows { q: &qkv, q_stride: stride, k, v, kv_stride: stride };
            group.bench_function(format!("{}/codes", isa.name()), |b| {
                b.iter(|| {
                    attend_codes(&pool, &kernels, &shape, rows, n, &mut out, &mut scratch)
                        .expect("matching shapes");
                });
            });
        }
        group.finish();
    }
}

fn bench_append(c: &mut Criterion) {
    let pool = pool();
    let mut group = group(c, "append");
    let kv = noise(512 * 192);
    group.throughput(Throughput::Elements(2 * 512 * 192));
    for kind in [KvType::F32, KvType::F16, KvType::Int8] {
        let mut cache = KvCache::new(3, 64, kind);
        group.bench_function(kind.name(), |b| {
            b.iter(|| {
                cache.truncate(0);
                cache.append(&pool, &kv, &kv, 512, 192).expect("memory");
            });
        });
    }
    group.finish();
}

fn bench_rows(c: &mut Criterion) {
    let mut group = group(c, "rows");
    let (x, gain) = (noise(1536), noise(1536));
    let mut out = vec![0.0; 1536];
    group.throughput(Throughput::Elements(1536));
    for kernel in norm::kernels() {
        group.bench_function(format!("rms/{}", kernel.isa().name()), |b| {
            b.iter(|| kernel.rms(&x, &gain, 1e-5, &mut out));
        });
    }
    for kernel in elementwise::kernels() {
        group.bench_function(format!("silu_mul/{}", kernel.isa().name()), |b| {
            b.iter(|| kernel.silu_mul(&x, &gain, &mut out));
        });
        group.bench_function(format!("gelu_erf/{}", kernel.isa().name()), |b| {
            b.iter(|| {
                out.copy_from_slice(&x);
                kernel.gelu_erf(&mut out);
            });
        });
        group.bench_function(format!("softcap/{}", kernel.isa().name()), |b| {
            b.iter(|| {
                out.copy_from_slice(&x);
                kernel.softcap(&mut out, 2.0);
            });
        });
    }
    let (cos, sin) = (noise(32), noise(32));
    for kernel in rope::kernels() {
        group.bench_function(format!("rope/{}", kernel.isa().name()), |b| {
            b.iter(|| kernel.rotate(&mut out, 64, 64, &cos, &sin));
        });
    }
    group.finish();
}

criterion_group!(benches, bench_f32, bench_attention, bench_images, bench_append, bench_rows);
criterion_main!(benches);
