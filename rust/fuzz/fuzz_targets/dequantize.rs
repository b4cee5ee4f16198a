//! Any bytes as blocks: the first byte chooses the type. Only whole blocks of real numbers are converted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::format::dtype::{Dtype, dequantize};

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let dtype = Dtype::ALL[usize::from(choice) % Dtype::ALL.len()];
    let mut out = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block()];
    let whole = bytes.len() % dtype.block_bytes() == 0;
    assert_eq!(dequantize(dtype, bytes, &mut out).is_ok(), whole && dtype.is_float());
});
