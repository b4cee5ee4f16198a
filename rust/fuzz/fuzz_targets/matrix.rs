//! Any bytes as an adjacency matrix: an error, or rows of tokens of its vocabulary.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nybble::speculate::Matrix;

const VOCAB: usize = 10;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(mut matrix) = Matrix::from_bytes(Path::new("fuzz"), bytes, VOCAB) {
        assert!(matrix.bytes() <= bytes.len(), "memory must be of the file's size");
        for token in 0..VOCAB as u32 {
            assert!(matrix.row(token).iter().all(|&next| (next as usize) < VOCAB));
            matrix.update(token, &[0.5; VOCAB]);
            assert!(!matrix.row(token).is_empty());
        }
    }
});
