//! Every truncation and every flipped bit of small files: an error or the same tensors, never a crash or a hang.

use std::fs;
use std::time::Duration;

use nybble::format::folder::Folder;
use nybble::format::gguf::Gguf;
use nybble::format::mapped::MappedFile;
use nybble::format::safetensors::SafeTensors;
use nybble::format::{Access, Dtype, TensorInfo};

use crate::badfiles::{GgufFile, Stopwatch, small_safetensors, write_sharded};

/// Types and shapes, without the names, which a flipped bit may change.
fn shapes<'a>(tensors: impl IntoIterator<Item = &'a TensorInfo>) -> Vec<(Dtype, Vec<usize>)> {
    let mut shapes: Vec<_> = tensors.into_iter().map(|tensor| (tensor.dtype, tensor.shape.clone())).collect();
    shapes.sort_by_key(|(dtype, shape)| (dtype.name(), shape.clone()));
    shapes
}

/// Calls `check` with each copy of `bytes` that has one bit flipped.
fn flips(bytes: &[u8], mut check: impl FnMut(Vec<u8>, usize)) {
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        check(flipped, bit);
    }
}

#[test]
fn safetensors() {
    let start = Stopwatch::start();
    let good = small_safetensors();
    let open = |bytes| SafeTensors::from_file(MappedFile::from_bytes("f", bytes));
    let expected = shapes(open(good.clone()).expect("a good file").tensors().values());
    for len in 0..good.len() {
        assert!(open(good[..len].to_vec()).is_err(), "{len} bytes");
    }
    let (mut refused, mut opened) = (0, 0);
    flips(&good, |bytes, bit| match open(bytes) {
        Err(_) => refused += 1,
        Ok(file) => {
            opened += 1;
            assert_eq!(shapes(file.tensors().values()), expected, "bit {bit}");
        }
    });
    assert!(refused > 700 && opened >= 28 * 8, "{refused} refused, {opened} opened");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn gguf() {
    let start = Stopwatch::start();
    let good = GgufFile::small().bytes();
    let open = |bytes| Gguf::from_file(MappedFile::from_bytes("f", bytes));
    assert!(open(good.clone()).is_ok());
    let padding = 30; // behind the last tensor: 66 of 96 bytes of data are used
    for len in 0..good.len() {
        assert_eq!(open(good[..len].to_vec()).is_ok(), len >= good.len() - padding, "{len} bytes");
    }
    let (mut refused, mut opened) = (0, 0);
    flips(&good, |bytes, _| match open(bytes) {
        Err(_) => refused += 1,
        Ok(file) => {
            opened += 1;
            for (name, tensor) in file.tensors() {
                let bytes = file.bytes(name).expect("a tensor of the file");
                assert_eq!(Some(bytes.len()), tensor.dtype.tensor_bytes(&tensor.shape));
            }
        }
    });
    assert!(refused > 1000 && opened >= 96 * 8, "{refused} refused, {opened} opened");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn folder() {
    let start = Stopwatch::start();
    let folder = tempfile::tempdir().expect("a folder");
    write_sharded(folder.path());
    let open = || Folder::open(folder.path(), Access::Map);
    let expected = shapes(open().expect("a good folder").tensors().values());
    for entry in fs::read_dir(folder.path()).expect("a folder") {
        let path = entry.expect("an entry").path();
        let good = fs::read(&path).expect("a file");
        for len in 0..good.len() {
            fs::write(&path, &good[..len]).expect("a file");
            assert!(open().is_err(), "{len} bytes of {}", path.display());
        }
        flips(&good, |bytes, bit| {
            fs::write(&path, bytes).expect("a file");
            if let Ok(model) = open() {
                assert_eq!(shapes(model.tensors().values()), expected, "bit {bit} of {}", path.display());
            }
        });
        fs::write(&path, good).expect("a file");
    }
    assert!(open().is_ok());
    assert!(start.elapsed() < Duration::from_secs(30));
}
