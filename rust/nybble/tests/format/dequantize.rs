//! Block types against values made by the `gguf` package (`golden/make.py`), bit for bit.

use std::path::{Path, PathBuf};

use nybble::format::dtype::{Dtype, dequantize};
use nybble::format::gguf::Gguf;
use nybble::format::{Access, mapped::MappedFile};

const TYPES: [Dtype; 11] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q8_0,
    Dtype::Q4K,
    Dtype::Q5K,
    Dtype::Q6K,
];

fn golden(dtype: Dtype) -> (Vec<u8>, Vec<u32>) {
    let path = |kind: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{}.{kind}", dtype.name()))
    };
    let blocks = std::fs::read(path("blocks")).expect("a golden file");
    let values = std::fs::read(path("f32")).expect("a golden file");
    let bits = values.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (blocks, bits)
}

#[test]
fn every_type_equals_the_reference() {
    for dtype in TYPES {
        let (blocks, expected) = golden(dtype);
        let mut values = vec![f32::NAN; expected.len()];
        dequantize(dtype, &blocks, &mut values).expect("whole blocks");
        for (i, (value, &expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(
                value.to_bits(),
                expected,
                "{dtype} element {i}: {value} and {}",
                f32::from_bits(expected)
            );
        }
        // A part of whole blocks alone gives the same.
        let part = 3 * dtype.block();
        let mut again = vec![f32::NAN; part];
        let bytes = dtype.row_bytes(part).expect("whole blocks");
        dequantize(dtype, &blocks[..bytes], &mut again).expect("whole blocks");
        assert!(again.iter().zip(&expected).all(|(value, &expected)| value.to_bits() == expected));
        dequantize(dtype, &[], &mut []).expect("nothing from nothing");
    }
}

#[test]
fn wrong_lengths_and_integers_are_errors() {
    for dtype in TYPES {
        let (blocks, expected) = golden(dtype);
        let mut values = vec![0.0; expected.len()];
        assert!(dequantize(dtype, &blocks[1..], &mut values).is_err());
        assert!(dequantize(dtype, &blocks, &mut values[1..]).is_err());
        assert!(dequantize(dtype, &[], &mut values).is_err());
    }
    for dtype in Dtype::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        let error = dequantize(dtype, &vec![0; dtype.block_bytes()], &mut [0.0]).expect_err("no real number");
        assert!(error.to_string().contains(dtype.name()));
    }
    let mut value = [0.0];
    dequantize(Dtype::F64, &0.1_f64.to_le_bytes(), &mut value).expect("one element");
    assert_eq!(value[0].to_bits(), 0.1_f32.to_bits());
}

#[test]
fn sizes_are_whole_blocks_or_nothing() {
    assert_eq!(Dtype::Q4K.row_bytes(512), Some(288));
    assert_eq!(Dtype::Q4K.row_bytes(511), None);
    assert_eq!(Dtype::F64.row_bytes(usize::MAX), None);
    assert_eq!(Dtype::Q8_0.tensor_bytes(&[3, 64]), Some(3 * 68));
    assert_eq!(Dtype::Q8_0.tensor_bytes(&[64, 3]), None);
    assert_eq!(Dtype::F16.tensor_bytes(&[]), Some(2));
    assert_eq!(Dtype::U8.tensor_bytes(&[1 << 32, 1 << 32]), None);
    assert_eq!(Dtype::Q4_0.tensor_bytes(&[2, usize::MAX & !31]), None);
}

/// A real file against sums made by the `gguf` package: `NYBBLE_TEST_GGUF=model.gguf`, and beside it `model.gguf.golden`
/// with a line `name type shape sum` a tensor, made by `golden/real.py`.
#[test]
fn a_real_file_equals_the_reference() {
    let Some(path) = std::env::var_os("NYBBLE_TEST_GGUF").map(PathBuf::from) else {
        eprintln!("skipped: NYBBLE_TEST_GGUF names no GGUF file");
        return;
    };
    let mut list = path.clone().into_os_string();
    list.push(".golden");
    let list = std::fs::read_to_string(list).expect("the list that golden/real.py makes");
    for access in [Access::Map, Access::Read] {
        let file = Gguf::open(&path, access).expect("a good file");
        assert_eq!(list.lines().count(), file.tensors().len());
        for line in list.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            let &[name, dtype, shape, sum] = &fields[..] else { panic!("four fields: {line}") };
            let tensor = file.tensor(name).expect("there");
            assert_eq!(tensor.dtype.name(), dtype, "{name}");
            assert_eq!(tensor.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(","), shape);
            let mut values = vec![0.0; tensor.elements()];
            dequantize(tensor.dtype, file.bytes(name).expect("there"), &mut values).expect("whole blocks");
            let found = values.iter().zip(0_u64..).fold(0_u64, |sum, (value, i)| {
                let weight = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                sum.wrapping_add(u64::from(value.to_bits()).wrapping_mul(weight))
            });
            assert_eq!(format!("{found:016x}"), sum, "{name}");
            file.release(name);
            assert_eq!(file.bytes(name).expect("there").len(), tensor.byte_len());
        }
    }
}

#[test]
fn released_bytes_stay_readable() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(&path, &bytes).expect("a file");
    for access in [Access::Map, Access::Read] {
        let file = MappedFile::open(&path, access).expect("a file");
        assert_eq!(file.bytes(), bytes);
        for range in [0..100_000, 1..2, 5000..70_000, 100_000..100_000, 99_999..100_001] {
            file.release(range);
            assert_eq!(file.bytes(), bytes);
        }
    }
}
