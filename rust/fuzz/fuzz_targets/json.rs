//! Any bytes as JSON: an error, or a value that is written and read again unchanged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::format::json;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = json::parse("fuzz", bytes) {
        let again = json::parse("fuzz", value.to_string().as_bytes()).expect("what was written is good JSON");
        // Numbers may differ in the last bit of a decimal fraction; the form may not.
        assert_eq!(value.is_object(), again.is_object());
        assert_eq!(value.as_array().map(Vec::len), again.as_array().map(Vec::len));
    }
});
