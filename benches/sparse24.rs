//! 2:4 weights beside dense ones: is reading two of four weights faster than reading all? A prototype of the kernel, not
//! part of the library; `docs/sparse24.md` says what came out and why it stayed here.
//!
//! The prototype has the tiles of `w4a8` with two codes and two 2-bit positions for each four columns: 3.5 bits a weight where
//! dense 4-bit tiles have 4.5, and with codes of 8 bits 5.5 instead of 8.5. Its results are compared bit for bit with those of the
//! dense kernels for the same weights before anything is timed.
//!
//! ```text
//! cargo bench -p nybble --bench sparse24 [-- --csv FILE] [--quick] [--filter TEXT]
//! ```
//!
//! A layer is `up` and `down` of a feed-forward block; the rounding of activations, the same for all, is left out. `l3` repeats
//! as many layers as 12 MB of dense 4-bit weights are, `dram` at least 192 MB. All kinds take turns, and each walks twice over all
//! layers, of which the second walk counts; the figures are medians, a speed-up is the median of the ratios of a turn.
#![allow(missing_docs)]
#![allow(clippy::print_stdout)] // a report
#![allow(clippy::cast_ptr_alignment)] // of loads that need none

#[cfg(target_arch = "x86_64")]
mod report;

#[cfg(target_arch = "x86_64")]
mod sparse24 {
    #[allow(clippy::wildcard_imports)] // all of them have the same prefix
    use std::arch::x86_64::*;
    use std::time::Instant;

    use half::f16;
    use memmap2::MmapMut;
    use nybble::cpu::Isa;
    use nybble::kernels::quantize::{Activations, Granularity, Rounding};
    use nybble::kernels::{Columns, Kernels, int_matmul};
    use nybble::pack::{IntSource, Packed, TILE_K, TILE_ROWS};
    use nybble::threads::Pool;

    use crate::report::{BLOCKS, Options, PLACES, layers, median, pool};

    const HEADER: &str =
        "shape,hidden,ffn,weights,rows,threads,kind,bits_a_weight,us_a_layer,times_dense_4_bit";
    /// Rows of activations that share an unpacked weight, as in the dense kernels.
    const TOGETHER: usize = 4;
    const SCALES: usize = 2 * TILE_ROWS;
    const POSITIONS: usize = 64;

    /// A number generator good enough for weights.
    fn next(state: &mut u64) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 11) as usize
    }

    /// A 2:4 matrix as integers, and its dense forms' codes.
    struct Matrix {
        rows: usize,
        cols: usize,
        /// `[rows, cols]`, two of four other than 0.
        weights: Vec<i8>,
        /// `[rows, cols / 4]`, which two.
        kept: Vec<[u8; 2]>,
        scales: Vec<f32>, // [rows, cols / 32]
    }

    impl Matrix {
        /// Weights of magnitude 7 at most, that 4 bits hold.
        fn random(rows: usize, cols: usize, state: &mut u64) -> Self {
            let mut weights = vec![0; rows * cols];
            let mut kept = Vec::with_capacity(rows * cols / 4);
            for four in weights.chunks_exact_mut(4) {
                let drawn = next(state);
                let pair = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3], [0, 3], [1, 2]][drawn % 8];
                for (i, &at) in pair.iter().enumerate() {
                    four[usize::from(at)] = (drawn >> (8 + 8 * i)) as i8 % 8;
                }
                kept.push(pair);
            }
            let scale = |i| f32::from(f16::from_f32(0.01 + 0.001 * (i % 7) as f32));
            let scales = (0..rows * cols / TILE_K).map(scale).collect();
            Self { rows, cols, weights, kept, scales }
        }

        fn dense(&self, bits: u32, pool: &Pool) -> Packed {
            let codes: Vec<u8> = if bits == 4 {
                let code = |w: i8| (w + 8) as u8;
                self.weights.chunks_exact(2).map(|two| code(two[0]) | code(two[1]) << 4).collect()
            } else {
                self.weights.iter().map(|&w| (w as u8) ^ 128).collect()
            };
            let source = IntSource {
                name: "bench",
                rows: self.rows,
                cols: self.cols,
                bits,
                group: TILE_K,
                codes: &codes,
                row_bytes: self.cols * bits as usize / 8,
                scales: &self.scales,
                zeros: None,
                row_map: None,
            };
            Packed::from_int(&source, pool).expect("good weights")
        }
    }

    /// Tiles of 16 rows; for each 32 columns 16 scales as f16, the codes and 64 bytes of positions.
    ///
    /// With 4 bits, 32 bytes of codes are two times four columns, the first in the low nibbles: byte `2 r + i` is row `r`, the
    /// `i`-th kept. Positions of four times four columns share 32 bytes, at bits 0, 4, 2 and 6. With 8 bits, 32 bytes are eight
    /// columns of eight rows, byte `4 r + i`; positions of the four times eight columns of eight rows share 32 bytes.
    struct Sparse24 {
        bits: u32,
        rows: usize,
        tile_bytes: usize,
        data: MmapMut,
    }

    impl Sparse24 {
        fn step_bytes(bits: u32) -> usize {
            SCALES + 32 * bits as usize + POSITIONS
        }

        fn new(matrix: &Matrix, bits: u32) -> Self {
            let (tiles, steps) = (matrix.rows / TILE_ROWS, matrix.cols / TILE_K);
            let tile_bytes = steps * Self::step_bytes(bits);
            let mut data = MmapMut::map_anon(tiles * tile_bytes).expect("memory");
            #[cfg(target_os = "linux")]
            data.advise(memmap2::Advice::HugePage).expect("large pages, as the dense tiles have");
            for (at, step) in data.chunks_exact_mut(Self::step_bytes(bits)).enumerate() {
                let (t, s) = (at / steps, at % steps);
                let (scales, rest) = step.split_at_mut(SCALES);
                let (codes, positions) = rest.split_at_mut(32 * bits as usize);
                for r in 0..TILE_ROWS {
                    let row = t * TILE_ROWS + r;
                    let scale = f16::from_f32(matrix.scales[row * steps + s]);
                    scales[2 * r..2 * r + 2].copy_from_slice(&scale.to_le_bytes());
                    for quad in 0..8 {
                        let first = row * matrix.cols + s * TILE_K + 4 * quad;
                        for (i, &at) in matrix.kept[first / 4].iter().enumerate() {
                            let w = matrix.weights[first + usize::from(at)];
                            if bits == 4 {
                                codes[quad / 2 * 32 + 2 * r + i] |= ((w + 8) as u8) << (4 * (quad % 2));
                                let field = [0, 4, 2, 6][quad % 4];
                                positions[quad / 4 * 32 + 2 * r + i] |= at << field;
                            } else {
                                let byte = 4 * (r % 8) + 2 * (quad % 2) + i;
                                codes[quad / 2 * 64 + r / 8 * 32 + byte] = w as u8;
                                positions[r / 8 * 32 + byte] |= at << (quad / 2 * 2);
                            }
                        }
                    }
                }
            }
            Self { bits, rows: matrix.rows, tile_bytes, data }
        }
    }

    /// Activations: for 4-bit weights as unsigned numbers, 128 more than they are, for 8-bit ones as they are.
    struct Vectors {
        count: usize,
        cols: usize,
        unsigned: Vec<u8>,
        signed: Vec<u8>,
        scales: Vec<f32>, // [count, cols / 32]
    }

    impl Vectors {
        fn of(x: &Activations) -> Self {
            let codes = (0..x.rows()).flat_map(|r| x.codes(r)[..x.cols()].iter());
            Self {
                count: x.rows(),
                cols: x.cols(),
                unsigned: codes.clone().map(|&code| (code as u8) ^ 128).collect(),
                signed: codes.map(|&code| code as u8).collect(),
                scales: (0..x.rows()).flat_map(|r| x.scales(r)).copied().collect(),
            }
        }
    }

    fn fetch(step: *const u8, bytes: usize) {
        for line in 0..bytes.div_ceil(64) {
            // SAFETY: the instruction never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(step.wrapping_add(1536 + 64 * line).cast()) }
        }
    }

    /// Ends a group of a row: sums of 16 outputs in 32 bits.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn finish(y: &mut [__m256; 2], sums: [__m256i; 2], scales: [__m256; 2], x_scale: f32) {
        for half in 0..2 {
            let scale = _mm256_mul_ps(scales[half], _mm256_set1_ps(x_scale));
            y[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scale, y[half]);
        }
    }

    /// # Safety
    /// There are 32 bytes.
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_of(step: *const u8) -> [__m256; 2] {
        let at = step.cast::<__m128i>();
        // SAFETY: the caller's promise.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))] }
    }

    /// 16 outputs of `M` rows of activations from row `first` on, 4-bit codes.
    ///
    /// Four activations fill a vector, over and over, so that the lowest two bits of a shuffle's index choose one of them whatever the
    /// next two are. `vpmaddubsw` multiplies them, unsigned, by signed weights and adds a row's two products in 16 bits: 8 quads
    /// come to `8 * 2 * 255 * 8 = 32640` at most. That is 128 times the sum of the weights too much, which is found once for all
    /// rows of activations. Changing the activations' signs instead takes as many multiplication slots again for each of these.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn four_bits<const M: usize>(tile: &[u8], x: &Vectors, first: usize, out: &mut [[f32; TILE_ROWS]]) {
        let groups = x.cols / TILE_K;
        assert!(out.len() == M && first + M <= x.count && tile.len() == groups * Sparse24::step_bytes(4));
        let (nibble, eight) = (_mm256_set1_epi8(15), _mm256_set1_epi8(8));
        let (fields, ones) = (_mm256_set1_epi8(0x33), _mm256_set1_epi8(1));
        let mut y = [[_mm256_setzero_ps(); 2]; M];
        for (g, step) in tile.chunks_exact(Sparse24::step_bytes(4)).enumerate() {
            let step = step.as_ptr();
            fetch(step, Sparse24::step_bytes(4));
            // SAFETY: a step has these bytes, and each row of activations as many columns as there are steps.
            unsafe {
                let codes = step.add(SCALES).cast::<__m256i>();
                let mut sums = [_mm256_setzero_si256(); M];
                let mut excess = _mm256_setzero_si256();
                for half in 0..2 {
                    let positions = _mm256_loadu_si256(codes.add(4 + half));
                    let low = _mm256_and_si256(positions, fields);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<2>(positions), fields);
                    for pair in 0..2 {
                        let packed = _mm256_loadu_si256(codes.add(2 * half + pair));
                        let chosen = if pair == 0 { low } else { high };
                        let weights = [
                            _mm256_sub_epi8(_mm256_and_si256(packed, nibble), eight),
                            _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16::<4>(packed), nibble), eight),
                        ];
                        let chosen = [chosen, _mm256_srli_epi16::<4>(chosen)];
                        for quad in 0..2 {
                            excess = _mm256_add_epi16(excess, _mm256_maddubs_epi16(ones, weights[quad]));
                            let at = g * TILE_K + 16 * half + 8 * pair + 4 * quad;
                            for (m, sum) in sums.iter_mut().enumerate() {
                                let four = x.unsigned.as_ptr().add((first + m) * x.cols + at).cast::<i32>();
                                let four = _mm256_set1_epi32(four.read_unaligned());
                                let picked = _mm256_shuffle_epi8(four, chosen[quad]);
                                let products = _mm256_maddubs_epi16(picked, weights[quad]);
                                *sum = _mm256_add_epi16(*sum, products);
                            }
                        }
                    }
                }
                let scales = scales_of(step);
                let excess = _mm256_slli_epi16::<7>(excess);
                for m in 0..M {
                    let sum = _mm256_sub_epi16(sums[m], excess);
                    let wide = [
                        _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)),
                        _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(sum)),
                    ];
                    finish(&mut y[m], wide, scales, x.scales[(first + m) * groups + g]);
                }
            }
        }
        store(&y, out);
    }

    /// The same with 8-bit codes: magnitudes times activations with the weights' signs, as `w8a8` has them.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn eight_bits<const M: usize>(tile: &[u8], x: &Vectors, first: usize, out: &mut [[f32; TILE_ROWS]]) {
        let groups = x.cols / TILE_K;
        assert!(out.len() == M && first + M <= x.count && tile.len() == groups * Sparse24::step_bytes(8));
        let three = _mm256_set1_epi8(3);
        let second = _mm256_set1_epi32(0x0404_0000); // the other four of eight columns
        let ones = _mm256_set1_epi16(1);
        let mut y = [[_mm256_setzero_ps(); 2]; M];
        for (g, step) in tile.chunks_exact(Sparse24::step_bytes(8)).enumerate() {
            let step = step.as_ptr();
            fetch(step, Sparse24::step_bytes(8));
            // SAFETY: as above.
            unsafe {
                let codes = step.add(SCALES).cast::<__m256i>();
                let mut sums = [[_mm256_setzero_si256(); 2]; M];
                let mut positions = [_mm256_loadu_si256(codes.add(8)), _mm256_loadu_si256(codes.add(9))];
                for eight in 0..4 {
                    for half in 0..2 {
                        let chosen = _mm256_or_si256(_mm256_and_si256(positions[half], three), second);
                        positions[half] = _mm256_srli_epi16::<2>(positions[half]);
                        let w = _mm256_loadu_si256(codes.add(2 * eight + half));
                        let magnitude = _mm256_abs_epi8(w);
                        for (m, sums) in sums.iter_mut().enumerate() {
                            let at = (first + m) * x.cols + g * TILE_K + 8 * eight;
                            let columns = x.signed.as_ptr().add(at).cast::<i64>().read_unaligned();
                            let picked = _mm256_shuffle_epi8(_mm256_set1_epi64x(columns), chosen);
                            let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(picked, w));
                            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
                let scales = scales_of(step);
                for m in 0..M {
                    finish(&mut y[m], sums[m], scales, x.scales[(first + m) * groups + g]);
                }
            }
        }
        store(&y, out);
    }

    #[target_feature(enable = "avx2")]
    fn store(y: &[[__m256; 2]], out: &mut [[f32; TILE_ROWS]]) {
        for (y, out) in y.iter().zip(out) {
            // SAFETY: 16 floats.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), y[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), y[1]);
            }
        }
    }

    /// `y [tiles, count, 16] = x Wᵀ`.
    fn multiply(pool: &Pool, w: &Sparse24, x: &Vectors, y: &mut [[f32; TILE_ROWS]]) {
        pool.split_rows(y, x.count, &|t, tiles| {
            for (t, out) in (t..).zip(tiles.chunks_exact_mut(x.count)) {
                let tile = &w.data[t * w.tile_bytes..][..w.tile_bytes];
                for (first, out) in (0..).step_by(TOGETHER).zip(out.chunks_mut(TOGETHER)) {
                    // SAFETY: `main` asked for AVX2, which comes with FMA and F16C on all CPUs that nybble calls so.
                    unsafe {
                        match (w.bits, out.len()) {
                            (4, 1) => four_bits::<1>(tile, x, first, out),
                            (4, _) => four_bits::<TOGETHER>(tile, x, first, out),
                            (_, 1) => eight_bits::<1>(tile, x, first, out),
                            _ => eight_bits::<TOGETHER>(tile, x, first, out),
                        }
                    }
                }
            }
        });
    }

    /// `up` and `down` in every form.
    struct Layer {
        dense: [[Packed; 2]; 2], // 4 bits, 8 bits
        sparse: [[Sparse24; 2]; 2],
    }

    const KINDS: [(&str, f64); 4] =
        [("dense 4-bit", 4.5), ("dense 8-bit", 8.5), ("2:4 4-bit", 3.5), ("2:4 8-bit", 5.5)];

    struct Bench<'a> {
        pool: &'a Pool,
        kernels: Kernels,
        x: [Activations; 2], // what up and down read
        vectors: [Vectors; 2],
        y: Vec<f32>,
        tiles: Vec<[f32; TILE_ROWS]>,
    }

    impl Bench<'_> {
        fn product(&mut self, layer: &Layer, kind: usize, which: usize) {
            let count = self.x[which].rows();
            if kind < 2 {
                let w = &layer.dense[kind][which];
                let kernel = if kind == 0 { self.kernels.w4a8 } else { self.kernels.w8a8 };
                let y = Columns::new(&mut self.y, count, w.rows(), 0, w.rows());
                int_matmul(self.pool, kernel, w, &self.x[which], y).expect("fits");
            } else {
                let w = &layer.sparse[kind - 2][which];
                let tiles = &mut self.tiles[..w.rows / TILE_ROWS * count];
                multiply(self.pool, w, &self.vectors[which], tiles);
            }
        }

        /// Asserts that 2:4 kernels and dense ones give the same bits.
        fn check(&mut self, layer: &Layer) {
            for bits in 0..2 {
                for which in 0..2 {
                    self.product(layer, bits, which);
                    self.product(layer, 2 + bits, which);
                    let (rows, count) = (layer.dense[bits][which].rows(), self.x[which].rows());
                    for m in 0..count {
                        for r in 0..rows {
                            let dense = self.y[m * rows + r];
                            let sparse = self.tiles[r / TILE_ROWS * count + m][r % TILE_ROWS];
                            assert_eq!(dense.to_bits(), sparse.to_bits(), "kind {bits}, row {r} of {m}");
                        }
                    }
                }
            }
        }

        /// Seconds of a walk over all layers.
        fn walk(&mut self, layers: &[Layer], kind: usize) -> f64 {
            let mut seconds = 0.0;
            for _ in 0..2 {
                let start = Instant::now();
                let pool = self.pool;
                pool.region(|| {
                    for layer in layers {
                        self.product(layer, kind, 0);
                        self.product(layer, kind, 1);
                    }
                });
                seconds = start.elapsed().as_secs_f64();
            }
            seconds
        }
    }

    pub(crate) fn main() {
        let options = Options::read(&mut []);
        let quick = options.quick;
        if !Isa::Avx2.detected() {
            println!("nothing measured: this CPU has no AVX2");
            return;
        }
        let pool = pool();
        let mut table = format!("{HEADER}\n");
        println!("{HEADER}");
        for (name, hidden, ffn) in BLOCKS {
            for place in PLACES {
                if !format!("{name}/{place}").contains(&options.filter) {
                    continue;
                }
                let (hidden, ffn) = if quick { (64, 96) } else { (hidden, ffn) };
                let mut state = 1;
                let matrices =
                    [(ffn, hidden), (hidden, ffn)].map(|(rows, cols)| Matrix::random(rows, cols, &mut state));
                let layer = || Layer {
                    dense: [4, 8].map(|bits| [0, 1].map(|which| matrices[which].dense(bits, &pool))),
                    sparse: [4, 8].map(|bits| [0, 1].map(|which| Sparse24::new(&matrices[which], bits))),
                };
                let bytes = hidden * ffn; // of both, with 4 bits
                let count = if quick { 1 } else { layers(place, bytes) };
                let layers: Vec<Layer> = (0..count).map(|_| layer()).collect();
                for rows in [1, 8] {
                    let x = [hidden, ffn].map(|cols| {
                        let value = |i| (f64::from(i) * 0.7).sin() as f32 * (1 + i % 5) as f32;
                        let values: Vec<f32> = (0..(rows * cols) as i32).map(value).collect();
                        let mut x = Activations::new();
                        let rounding = Rounding { bits: 8, per: Granularity::Group };
                        let kernel = Kernels::best().quantize;
                        x.quantize(&pool, kernel, &values, rows, cols, TILE_K, rounding).expect("fits");
                        x
                    });
                    let mut bench = Bench {
                        pool: &pool,
                        kernels: Kernels::up_to(Isa::Avx2),
                        vectors: [Vectors::of(&x[0]), Vectors::of(&x[1])],
                        x,
                        y: vec![0.0; rows * ffn.max(hidden)],
                        tiles: vec![[0.0; TILE_ROWS]; rows * ffn.max(hidden) / TILE_ROWS],
                    };
                    bench.check(&layers[0]);
                    let turns =
                        if quick { 1 } else { ((8 << 30) / (bytes * layers.len() * rows)).clamp(9, 41) };
                    let mut seconds = [const { Vec::new() }; KINDS.len()];
                    let mut ratios = [const { Vec::new() }; KINDS.len()];
                    for _ in 0..turns {
                        let turn = [0, 1, 2, 3].map(|kind| bench.walk(&layers, kind));
                        for kind in 0..KINDS.len() {
                            seconds[kind].push(turn[kind]);
                            ratios[kind].push(turn[0] / turn[kind]);
                        }
                    }
                    for (((kind, bits), seconds), ratios) in KINDS.into_iter().zip(seconds).zip(ratios) {
                        let each = 1e6 * median(seconds) / layers.len() as f64;
                        let line = format!(
                            "{name},{hidden},{ffn},{place},{rows},{},{kind},{bits},{each:.1},{:.3}",
                            pool.threads(),
                            median(ratios)
                        );
                        println!("{line}");
                        table += &line;
                        table.push('\n');
                    }
                }
            }
        }
        options.save(&table);
    }
}

fn main() {
    #[cfg(target_arch = "x86_64")]
    sparse24::main();
    #[cfg(not(target_arch = "x86_64"))]
    println!("nothing measured: the prototype is for x86-64");
}
