//! Any bytes as a safetensors file: an error, or tensors that lie inside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::format::mapped::MappedFile;
use nybble::format::safetensors::SafeTensors;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = SafeTensors::from_file(MappedFile::from_bytes("fuzz", bytes.to_vec())) {
        let mut total = 0;
        for (name, tensor) in file.tensors() {
            let data = file.bytes(name).expect("a tensor of the file");
            assert_eq!(Some(data.len()), tensor.dtype.tensor_bytes(&tensor.shape));
            assert_eq!(tensor.elements(), tensor.rows() * tensor.cols());
            total += data.len();
        }
        assert!(total <= bytes.len(), "tensors must not share bytes");
    }
});
