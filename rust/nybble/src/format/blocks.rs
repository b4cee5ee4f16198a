//! Stored elements to `f32`.
//!
//! A block type stores a row as blocks of 32 or 256 integers with their scales. The older ones have one 16-bit float scale
//! `d` a block (`w = d q`), and the `_1` forms an offset `m` as well (`w = d q + m`). The `_K` forms cut 256 elements into
//! sub-blocks of 16 or 32 whose own scales are small integers times the block's `d` (and `dmin` for the offsets), so a
//! sub-block costs a few bits instead of a float.
//!
//! Each formula multiplies and adds in the order of the format's reference, in `f32` and unfused, so the results equal the
//! reference bit for bit. The functions are plain loops over fixed-size blocks: the sizes are known to the compiler, which
//! turns them into vector code for whatever the build targets.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::dtype::Dtype;
use crate::error::{Error, Result};

/// Converts stored elements to `f32`.
///
/// `bytes` must be exactly the bytes of `out.len()` elements ([`Dtype::row_bytes`]); any run of whole blocks can be
/// converted, so large tensors go row by row. Integer types are not numbers of a model by themselves and are refused.
pub fn dequantize(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    if !dtype.is_float() {
        return Err(Error::unsupported(
            format!("reading {dtype} elements as real numbers"),
            "F64, F32, F16, BF16 and the block types of GGUF are",
        ));
    }
    if dtype.row_bytes(out.len()) != Some(bytes.len()) {
        return Err(Error::argument(
            "bytes",
            format!("whole blocks of {} bytes for {} elements of {dtype}", dtype.block_bytes(), out.len()),
            format!("{} bytes", bytes.len()),
        ));
    }
    match dtype {
        Dtype::F64 => each(bytes, out, |b: &[u8; 8], o: &mut [f32; 1]| o[0] = f64::from_le_bytes(*b) as f32),
        Dtype::F32 => each(bytes, out, |b: &[u8; 4], o: &mut [f32; 1]| o[0] = f32::from_le_bytes(*b)),
        Dtype::Bf16 => each(bytes, out, |b: &[u8; 2], o: &mut [f32; 1]| {
            o[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }),
        Dtype::F16 => halves(bytes, out),
        Dtype::Q4_0 => each(bytes, out, q4_0),
        Dtype::Q4_1 => each(bytes, out, q4_1),
        Dtype::Q5_0 => each(bytes, out, q5_0),
        Dtype::Q5_1 => each(bytes, out, q5_1),
        Dtype::Q8_0 => each(bytes, out, q8_0),
        Dtype::Q4K => each(bytes, out, q4_k),
        Dtype::Q5K => each(bytes, out, q5_k),
        Dtype::Q6K => each(bytes, out, q6_k),
        // Refused above.
        Dtype::I64
        | Dtype::I32
        | Dtype::I16
        | Dtype::I8
        | Dtype::U64
        | Dtype::U32
        | Dtype::U16
        | Dtype::U8
        | Dtype::Bool => {}
    }
    Ok(())
}

/// Calls `convert` on each block of `B` bytes and its `N` values.
fn each<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    convert: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, values) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        convert(block, values);
    }
}

/// 16-bit floats, a run at a time: the run goes through an aligned buffer so that the CPU's own conversion can be used.
fn halves(bytes: &[u8], out: &mut [f32]) {
    const RUN: usize = 512;
    let mut bits = [0_u16; RUN];
    for (block, values) in bytes.chunks(2 * RUN).zip(out.chunks_mut(RUN)) {
        let bits = &mut bits[..values.len()];
        for (bits, pair) in bits.iter_mut().zip(block.as_chunks().0) {
            *bits = u16::from_le_bytes(*pair);
        }
        bits.reinterpret_cast::<f16>().convert_to_f32_slice(values);
    }
}

/// The 16-bit float at byte `at` of a block.
fn half_at<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Bytes `at .. at + N` of a block.
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("offsets are constants inside the block")
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, &q) in part::<16>(block, 2).iter().enumerate() {
        out[i] = d * f32::from((q & 15) as i8 - 8);
        out[i + 16] = d * f32::from((q >> 4) as i8 - 8);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in part::<16>(block, 4).iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// The 32 five-bit codes of a block: low four bits as nibbles, fifth bits as one 32-bit mask.
fn five_bits(high: [u8; 4], low: &[u8; 16]) -> [u8; 32] {
    let mut codes = [0; 32];
    let (first, second) = codes.split_at_mut(16);
    let (first_bits, second_bits) = high.split_at(2);
    for ((half, bits), shift) in [(first, first_bits), (second, second_bits)].into_iter().zip([0, 4]) {
        for (i, code) in half.iter_mut().enumerate() {
            // The byte and the shift are constants once the loop is unrolled: a mask and a compare, no variable shift.
            let fifth = if bits[i / 8] & (1 << (i % 8)) == 0 { 0 } else { 16 };
            *code = (low[i] >> shift) & 15 | fifth;
        }
    }
    codes
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let codes = five_bits(*part(block, 2), part(block, 6));
    for (value, q) in out.iter_mut().zip(codes) {
        *value = d * f32::from(q as i8 - 16);
    }
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let codes = five_bits(*part(block, 4), part(block, 8));
    for (value, q) in out.iter_mut().zip(codes) {
        *value = d * f32::from(q) + m;
    }
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (value, &q) in out.iter_mut().zip(part::<32>(block, 2)) {
        *value = f32::from(q as i8) * d;
    }
}

/// Scale and offset of sub-block `j` of 8: six bits each. Those of sub-blocks 0 to 3 stand whole in bytes 0 to 7; the
/// others have their low nibbles in bytes 8 to 11 and their two high bits on top of the first eight.
fn scale_and_offset(packed: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, offset) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4)
    };
    (f32::from(scale), f32::from(offset))
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = part(block, 4);
    let codes = part::<128>(block, 16);
    // 32 bytes hold two sub-blocks: one in the low nibbles, one in the high.
    for (pair, (out, codes)) in
        out.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<32>().0).enumerate()
    {
        let (low, high) = out.split_at_mut(32);
        let (scale, offset) = scale_and_offset(packed, 2 * pair);
        let (scale, offset) = (d * scale, dmin * offset);
        for (value, &q) in low.iter_mut().zip(codes) {
            *value = scale * f32::from(q & 15) - offset;
        }
        let (scale, offset) = scale_and_offset(packed, 2 * pair + 1);
        let (scale, offset) = (d * scale, dmin * offset);
        for (value, &q) in high.iter_mut().zip(codes) {
            *value = scale * f32::from(q >> 4) - offset;
        }
    }
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = part(block, 4);
    let fifths = part::<32>(block, 16); // bit j of byte i is the fifth bit of element i of sub-block j
    let codes = part::<128>(block, 48);
    for (pair, (out, codes)) in
        out.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<32>().0).enumerate()
    {
        let (low, high) = out.split_at_mut(32);
        let (scale, offset) = scale_and_offset(packed, 2 * pair);
        let (scale, offset) = (d * scale, dmin * offset);
        for ((value, &q), &fifth) in low.iter_mut().zip(codes).zip(fifths) {
            *value = scale * f32::from(q & 15 | (fifth >> (2 * pair) & 1) << 4) - offset;
        }
        let (scale, offset) = scale_and_offset(packed, 2 * pair + 1);
        let (scale, offset) = (d * scale, dmin * offset);
        for ((value, &q), &fifth) in high.iter_mut().zip(codes).zip(fifths) {
            *value = scale * f32::from(q >> 4 | (fifth >> (2 * pair + 1) & 1) << 4) - offset;
        }
    }
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let low = part::<128>(block, 0);
    let high = part::<64>(block, 128);
    let scales = part::<16>(block, 192);
    let d = half_at(block, 208);
    // Each half of 128 elements is four runs of 32: run r has its low nibbles in byte run r % 2 (low nibbles for r < 2, high
    // ones for the others) and its two high bits at bits 2 r of 32 shared bytes. A scale covers 16 elements.
    for (side, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let high = &high[32 * side..][..32];
        for (run, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = &low[64 * side + 32 * (run % 2)..][..32];
            let shift = if run < 2 { 0 } else { 4 };
            for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let scale = d * f32::from(scales[8 * side + 2 * run + part] as i8);
                let (low, high) = (&low[16 * part..][..16], &high[16 * part..][..16]);
                for ((value, &low), &high) in out.iter_mut().zip(low).zip(high) {
                    let q = (low >> shift & 15 | (high >> (2 * run) & 3) << 4) as i8 - 32;
                    *value = scale * f32::from(q);
                }
            }
        }
    }
}
