//! Any bytes as a GGUF file: an error, or metadata and tensors that lie inside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::format::gguf::Gguf;
use nybble::format::mapped::MappedFile;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = Gguf::from_file(MappedFile::from_bytes("fuzz", bytes.to_vec())) {
        let mut total = 0;
        for (name, tensor) in file.tensors() {
            let data = file.bytes(name).expect("a tensor of the file");
            assert_eq!(Some(data.len()), tensor.dtype.tensor_bytes(&tensor.shape));
            total += data.len();
        }
        for (key, value) in file.metadata() {
            total += key.len();
            if let Some(array) = value.as_array() {
                assert_eq!(array.iter().count(), array.len());
            }
            let _ = (
                file.u64(key),
                file.f64(key),
                file.bool(key),
                file.text(key),
                file.texts(key),
                file.array(key),
            );
        }
        assert!(total <= bytes.len(), "tensors and keys must not share bytes");
    }
});
