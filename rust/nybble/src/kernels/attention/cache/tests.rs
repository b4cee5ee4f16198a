use super::*;

fn element(cache: &KvCache, head: usize, position: usize, d: usize) -> (f32, f32) {
    let key = (position / LANES * cache.head_dim + d) * LANES + position % LANES;
    let value = position * cache.padded_dim() + d;
    match cache.kind {
        KvType::F32 => (cache.keys::<f32>(head)[key], cache.values::<f32>(head)[value]),
        KvType::F16 => (cache.keys::<f16>(head)[key].to_f32(), cache.values::<f16>(head)[value].to_f32()),
        KvType::Int8 => {
            let (keys, values) = cache.scales(head).expect("codes have scales");
            let codes = (cache.keys::<i8>(head)[key], cache.values::<i8>(head)[value]);
            (f32::from(codes.0) * keys[position], f32::from(codes.1) * values[position])
        }
    }
}

#[test]
fn positions_survive_growth_and_truncation() {
    for threads in [1, 3] {
        let pool = Pool::new(threads).expect("a pool");
        for kind in [KvType::F32, KvType::F16, KvType::Int8] {
            for (heads, dim) in [(1, 16), (3, 8), (2, 80)] {
                let mut cache = KvCache::new(heads, dim, kind);
                assert_eq!((cache.len(), cache.bytes(), cache.is_empty()), (0, 0, true));
                let stride = 2 * heads * dim;
                // Integers up to 2048 are exact in both float types, codes half a step of 2048 / 127 off.
                let value = |i: usize, at: usize| ((i * 31 + at * 7) % 2048) as f32;
                let slack = if kind == KvType::Int8 { 1024.5 / 127.0 } else { 0.0 };
                let near =
                    |(a, b): (f32, f32), (c, d): (f32, f32)| (a - c).abs() <= slack && (b - d).abs() <= slack;
                let mut at = 0;
                for n in [1, 0, 15, 2, 200, 1] {
                    let rows: Vec<f32> =
                        (0..n * stride).map(|j| value(at + j / stride, j % stride)).collect();
                    let v = rows.get(heads * dim..).unwrap_or(&[]);
                    cache.append(&pool, &rows, v, n, stride).expect("room");
                    at += n;
                }
                cache.truncate(300);
                assert_eq!((cache.len(), cache.capacity() % STEP), (219, 0));
                let check = |cache: &KvCache, len: usize| {
                    for i in 0..len {
                        for h in 0..heads {
                            for d in 0..dim {
                                let expected = (value(i, h * dim + d), value(i, (heads + h) * dim + d));
                                let found = element(cache, h, i, d);
                                assert!(near(found, expected), "{i} {h} {d}: {found:?}, {expected:?}");
                            }
                        }
                    }
                };
                check(&cache, 219);
                cache.truncate(100);
                let zeros = vec![0.0; heads * dim];
                cache.append(&pool, &zeros, &zeros, 1, heads * dim).expect("room");
                check(&cache, 100);
                assert_eq!((cache.len(), element(&cache, 0, 100, 0)), (101, (0.0, 0.0)));
                assert_eq!(
                    cache.bytes(),
                    cache.capacity()
                        * heads
                        * ((dim + cache.padded_dim()) * kind.bytes() + kind.scale_bytes())
                );
            }
        }
    }
}

#[test]
fn scales_of_rows_without_one() {
    let pool = Pool::new(1).expect("a pool");
    let mut cache = KvCache::new(1, 4, KvType::Int8);
    let rows = [[0.0; 4], [1e-39, 0.0, 0.0, 0.0], [1.0, f32::NAN, 0.0, 0.0], [f32::INFINITY, 1.0, 0.0, 0.0]];
    for row in rows {
        cache.append(&pool, &row, &row, 1, 4).expect("room");
    }
    for d in 0..4 {
        assert_eq!(element(&cache, 0, 0, d), (0.0, 0.0));
        assert_eq!(element(&cache, 0, 1, d), (0.0, 0.0));
        assert!(element(&cache, 0, 2, d).0.is_nan() && element(&cache, 0, 3, d).1.is_nan());
    }
    // The largest magnitude is exact, of either sign.
    let row = [-2.54, 1.27, 0.01, 2.54];
    cache.append(&pool, &row, &row, 1, 4).expect("room");
    let codes: Vec<i8> = (0..4).map(|d| cache.values::<i8>(0)[4 * 16 + d]).collect();
    assert_eq!(codes, [-127, 64, 0, 127]); // 63.5 and 0.5 are ties
}

#[test]
fn the_limit_and_the_memory_are_errors() {
    let pool = Pool::new(1).expect("a pool");
    let mut cache = KvCache::new(2, 8, KvType::F32).with_limit(70);
    let data = vec![0.0; 71 * 16];
    assert!(cache.append(&pool, &data, &data, 70, 16).is_ok());
    let error = cache.append(&pool, &data, &data, 1, 16).expect_err("too many");
    assert!(matches!(error, Error::Context { tokens: 71, limit: 70 }));
    assert_eq!(cache.len(), 70);
    assert!(cache.append(&pool, &data, &data[..15], 1, 16).is_err());
    assert!(cache.append(&pool, &data, &data, 2, 15).is_err());

    let mut huge = KvCache::new(8, 128, KvType::F16);
    for positions in [1 << 45, 1 << 55, usize::MAX] {
        assert!(matches!(huge.reserve(positions), Err(Error::Argument { .. })), "{positions}");
    }
    assert_eq!((huge.len(), huge.capacity()), (0, 0));
    assert!(huge.reserve(1).is_ok());
}

#[test]
fn narrowing_rounds_to_nearest_and_keeps_finite_values_finite() {
    // Every half float, the midpoint to the next one, and both neighbours of the midpoint.
    for bits in 0..0x7bffu16 {
        let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        let middle = f32::midpoint(low, high);
        let near = [middle.to_bits() - 1, middle.to_bits(), middle.to_bits() + 1];
        for x in near.map(f32::from_bits).into_iter().chain([low, -low, -middle]) {
            assert_eq!(narrow(x).to_bits(), f16::from_f32(x).to_bits(), "{x}");
        }
    }
    assert_eq!(narrow(1e30).to_f32(), 65504.0);
    assert_eq!(narrow(-1e30).to_f32(), -65504.0);
    assert_eq!(narrow(f32::MIN_POSITIVE / 2.0).to_bits(), 0);
    assert_eq!((narrow(f32::INFINITY), narrow(f32::NEG_INFINITY)), (f16::INFINITY, f16::NEG_INFINITY));
    assert!(narrow(f32::NAN).is_nan());
}
