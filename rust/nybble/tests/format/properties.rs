//! Random files: what is written is read back, and noise never does worse than an error.

use std::collections::BTreeMap;

use nybble::format::dtype::dequantize;
use nybble::format::gguf::Gguf;
use nybble::format::mapped::MappedFile;
use nybble::format::safetensors::SafeTensors;
use nybble::format::writer::SafeTensorsWriter;
use nybble::format::{Access, Dtype, json};
use proptest::prelude::*;

fn plain_dtype() -> impl Strategy<Value = Dtype> {
    let plain: Vec<_> = Dtype::ALL.into_iter().filter(|dtype| !dtype.is_quantized()).collect();
    proptest::sample::select(plain)
}

fn tensors() -> impl Strategy<Value = BTreeMap<String, (Dtype, Vec<usize>)>> {
    let shape = proptest::collection::vec(0..6_usize, 0..4);
    let name = proptest::collection::vec(
        proptest::sample::select(vec!['a', 'é', '.', '/', '"', '\\', '0', ' ']),
        1..8,
    );
    let name = name.prop_map(String::from_iter);
    proptest::collection::btree_map(name, (plain_dtype(), shape), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(tensors in tensors(), seed: u64) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("m.safetensors");
        let entries = tensors.iter().map(|(name, (dtype, shape))| (name.clone(), *dtype, shape.clone())).collect();
        let mut writer = SafeTensorsWriter::create(&path, entries).expect("a new file");
        let contents: BTreeMap<_, Vec<u8>> = tensors.iter().map(|(name, (dtype, shape))| {
            let len = dtype.tensor_bytes(shape).expect("a small tensor");
            (name, (0..len as u64).map(|i| (i.wrapping_mul(seed | 1) >> 7) as u8).collect())
        }).collect();
        // Pieces in an order of the seed's choosing.
        let mut pieces = Vec::new();
        for (name, bytes) in &contents {
            let size = 1 + seed as usize % 13;
            pieces.extend(bytes.chunks(size).enumerate().map(|(i, piece)| (*name, i * size, piece)));
        }
        pieces.sort_by_key(|(name, offset, _)| (*offset as u64 ^ name.len() as u64).wrapping_mul(seed | 1));
        for (name, offset, piece) in pieces {
            writer.write_at(name, offset, piece).expect("inside");
        }
        writer.finish().expect("complete");

        let file = SafeTensors::open(&path, Access::Map).expect("a good file");
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (name, (dtype, shape)) in &tensors {
            let found = &file.tensors()[name];
            prop_assert_eq!((found.dtype, &found.shape), (*dtype, shape));
            prop_assert_eq!(file.bytes(name).expect("there"), &contents[name][..]);
        }
        // The format's own crate reads the same.
        let bytes = std::fs::read(&path).expect("a file");
        let peer = safetensors::SafeTensors::deserialize(&bytes).expect("a good file");
        prop_assert_eq!(peer.len(), tensors.len());
        for (name, (dtype, shape)) in &tensors {
            let view = peer.tensor(name).expect("there");
            prop_assert_eq!(view.shape(), &shape[..]);
            prop_assert_eq!(view.dtype().to_string(), dtype.name());
            prop_assert_eq!(view.data(), &contents[name][..]);
        }
    }

    #[test]
    fn what_the_peer_writes_is_read(tensors in tensors()) {
        let contents: BTreeMap<_, Vec<u8>> = tensors.iter().map(|(name, (dtype, shape))| {
            (name.clone(), vec![7; dtype.tensor_bytes(shape).expect("a small tensor")])
        }).collect();
        let views = tensors.iter().map(|(name, (dtype, shape))| {
            let dtype: safetensors::Dtype = serde_json::from_str(&format!("\"{dtype}\"")).expect("a type of the format");
            let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), &contents[name]);
            (name.clone(), view.expect("a good tensor"))
        });
        let bytes = safetensors::serialize(views, None).expect("good tensors");
        let file = SafeTensors::from_file(MappedFile::from_bytes("f", bytes)).expect("a good file");
        for (name, (dtype, shape)) in &tensors {
            let found = &file.tensors()[name];
            prop_assert_eq!((found.dtype, &found.shape), (*dtype, shape));
            prop_assert_eq!(file.bytes(name).expect("there"), &contents[name][..]);
        }
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..400), small: u8) {
        let _ = SafeTensors::from_file(MappedFile::from_bytes("f", noise.clone()));
        let _ = Gguf::from_file(MappedFile::from_bytes("f", noise.clone()));
        let _ = json::parse("f", &noise);
        // Behind a plausible start.
        let mut header = u64::from(small).to_le_bytes().to_vec();
        header.extend(b"{\"a\":{");
        header.extend(&noise);
        let _ = SafeTensors::from_file(MappedFile::from_bytes("f", header));
        let mut gguf = b"GGUF\x03\0\0\0".to_vec();
        gguf.extend([small % 4, 0, 0, 0, 0, 0, 0, 0, small / 4 % 4, 0, 0, 0, 0, 0, 0, 0]);
        gguf.extend(&noise);
        let _ = Gguf::from_file(MappedFile::from_bytes("f", gguf));
    }

    #[test]
    fn mixed_json_never_panics(text in r#"([\[\]{}:,0-9"\\u. a\-]|"[a-z]":|\{"dtype":"F32","shape":\[|\],"data_offsets":\[){0,60}"#) {
        let _ = json::parse("f", text.as_bytes());
        let _ = SafeTensors::from_file(MappedFile::from_bytes("f", crate::badfiles::safetensors(&text, &[0; 16])));
    }

    #[test]
    fn any_blocks_dequantize(noise in proptest::collection::vec(any::<u8>(), 0..700)) {
        for dtype in Dtype::ALL {
            let blocks = noise.len() / dtype.block_bytes();
            let mut out = vec![0.0; blocks * dtype.block()];
            let outcome = dequantize(dtype, &noise[..blocks * dtype.block_bytes()], &mut out);
            prop_assert_eq!(outcome.is_ok(), dtype.is_float());
        }
    }
}
