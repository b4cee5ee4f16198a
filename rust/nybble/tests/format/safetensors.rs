//! Safetensors files, good and bad.

use nybble::Error;
use nybble::format::mapped::MappedFile;
use nybble::format::safetensors::SafeTensors;
use nybble::format::{Access, Dtype};

use crate::badfiles::{Stopwatch, safetensors, safetensors_error, small_safetensors};

fn open(bytes: Vec<u8>) -> SafeTensors {
    SafeTensors::from_file(MappedFile::from_bytes("f", bytes)).expect("a good file")
}

#[test]
fn a_good_file_is_read_by_mapping_and_by_reading() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, small_safetensors()).expect("a file");
    for access in [Access::Map, Access::Read] {
        let file = SafeTensors::open(&path, access).expect("a good file");
        assert_eq!(file.tensors().keys().collect::<Vec<_>>(), ["a", "b"]);
        let a = &file.tensors()["a"];
        assert_eq!((a.dtype, &a.shape[..]), (Dtype::F32, &[2, 3][..]));
        assert_eq!((a.elements(), a.byte_len(), a.rows(), a.cols()), (6, 24, 2, 3));
        assert_eq!(file.bytes("b").expect("there"), [24, 25, 26, 27]);
        assert_eq!(file.metadata()["format"], "pt");
        let error = file.bytes("c").expect_err("not there").to_string();
        assert_eq!(error, format!("{}: \"c\": expected a tensor of this name, found none", path.display()));
    }
}

#[test]
fn odd_but_good_headers_are_read() {
    // Any order of tensors, padding behind the header, a scalar, an empty tensor, names that look like paths.
    let header = r#"{"../../etc/passwd":{"data_offsets":[4,8],"shape":[],"dtype":"F32"},
        "é":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},"none":{"dtype":"BF16","shape":[0,7],"data_offsets":[4,4]}}   "#;
    let file = open(safetensors(header, &[1, 2, 3, 4, 5, 6, 7, 8]));
    assert_eq!(file.bytes("../../etc/passwd").expect("a name like any other"), [5, 6, 7, 8]);
    assert_eq!(file.tensors()["../../etc/passwd"].elements(), 1);
    assert!(file.bytes("none").expect("there").is_empty());
    assert!(open(safetensors("{}", &[])).tensors().is_empty());
    // 640 bytes of header start like a pickle of protocol 2.
    let padded = format!("{:640}", "{}");
    assert!(open(safetensors(&padded, &[])).tensors().is_empty());
}

/// Header and data length, and the message after "f: ".
#[rustfmt::skip]
const REFUSED: &[(&str, usize, &str)] = &[
    // Class 2: sizes that overflow.
    (r#"{"a":{"dtype":"F32","shape":[2147483648,2147483648,4],"data_offsets":[0,4]}}"#, 4, r#""a": shape: expected a size that fits into memory, found [2147483648, 2147483648, 4], more bytes of F32 than can be counted"#),
    (r#"{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}"#, 0, r#""a": shape: expected a size that fits into memory, found [4611686018427387904], more bytes of F32 than can be counted"#),
    (r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0, r#""a": shape: expected a size that fits into memory, found [4294967296, 4294967296], more bytes of U8 than can be counted"#),
    (r#"{"a":{"dtype":"U8","shape":[18446744073709551615,0,2],"data_offsets":[0,0]}}"#, 0, r#""a": shape: expected a size that fits into memory, found [18446744073709551615, 0, 2], more bytes of U8 than can be counted"#),
    (r#"{"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,0]}}"#, 0, r#""a": shape: expected an array of sizes, each zero or more, found "#),
    // Class 1 and 3: offsets.
    (r#"{"a":{"dtype":"U8","shape":[2147483648],"data_offsets":[0,2147483648]}}"#, 8, r#""a": data_offsets: expected an end within the 8 bytes present, found 2147483648"#),
    (r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#, 8, r#""a": data_offsets: expected an end within the 8 bytes present, found 9"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#, 4, r#""a": data_offsets: expected 4 bytes for U8 [4], found 4 to 0"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,5]}}"#, 5, r#""a": data_offsets: expected 4 bytes for U8 [4], found 0 to 5"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#, 6, r#""b": data_offsets: expected a start at 4, found 2 (an overlap)"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4, r#""b": data_offsets: expected a start at 4, found 0 (an overlap)"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}}"#, 9, r#""b": data_offsets: expected a start at 4, found 5 (a hole)"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}}"#, 5, r#""a": data_offsets: expected a start at 0, found 1 (a hole)"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 7, "end of file: expected the end of the last tensor, found 3 more bytes"),
    (r"{}", 1, "end of file: expected the end of the last tensor, found 1 more bytes"),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4,5]}}"#, 4, r#""a": data_offsets: expected at most 2 numbers, found more"#),
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0]}}"#, 4, r#""a": data_offsets: expected a start and an end, found 1 numbers"#),
    // Class 5: names and duplicates.
    (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#, 8, r#""a": expected one tensor of this name, found a second one"#),
    (r#"{"":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4, r#"tensor name "": expected a name, found an empty one"#),
    (r#"{"a\u0000b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4, r#"tensor name "a\0b": expected a name without control characters, found '\0' in it"#),
    (r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "__metadata__: expected one entry, found a second one"),
    (r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, r#"__metadata__: "k": expected each key once, found a second one"#),
    (r#"{"__metadata__":{"k":1}}"#, 0, r#"__metadata__: "k": expected a text, found invalid type: integer `1`, expected a string"#),
    (r#"{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#, 4, r#""a": dtype: expected one, found a second one"#),
    // Class 6: types and dimensions.
    (r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4, r#""a": dtype: expected one of F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, found "F31""#),
    (r#"{"a":{"dtype":"Q4_K","shape":[1],"data_offsets":[0,4]}}"#, 4, r#""a": dtype: expected one of F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, found "Q4_K""#),
    (r#"{"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}}"#, 4, r#""a": dtype: expected the name of a type, found invalid type: integer `7`, expected a string"#),
    (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, r#""a": shape: expected an array of sizes, each zero or more, found invalid value: integer `-1`, expected usize"#),
    (r#"{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}"#, 4, r#""a": shape: expected an array of sizes, each zero or more, found invalid type: floating point `1.0`, expected usize"#),
    (r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#, 4, r#""a": shape: expected at most 8 numbers, found more"#),
    (r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4, r#""a": data_offsets: expected one, found none"#),
    (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1}}"#, 4, r#""a": expected only dtype, shape and data_offsets, found "extra""#),
    (r#"{"a":[1]}"#, 4, r#""a": expected dtype, shape and data_offsets, found invalid type: sequence, expected an object with dtype, shape and data_offsets"#),
    // Class 7: nesting has no place to happen.
    (r#"{"a":{"dtype":[[[[[["#, 0, r#""a": dtype: expected the name of a type, found invalid type: sequence, expected a string"#),
    (r#"{"a":"#, 0, r#""a": expected dtype, shape and data_offsets, found EOF while parsing a value"#),
    (r#"{"a"#, 0, "header: expected valid JSON, found EOF while parsing a string at line 1 column 3"),
    (r"{} x", 0, "header: expected valid JSON, found trailing characters at line 1 column 4"),
    (r"[]", 0, r#"header: expected a JSON object that starts with '{', found "[]""#),
    (r"", 8, r#"header: expected a JSON object that starts with '{', found """#),
];

#[test]
fn each_wrong_header_is_refused_by_name() {
    for (header, data, expected) in REFUSED {
        let message = safetensors_error(safetensors(header, &vec![0; *data]));
        assert!(
            message.starts_with(&format!("f: {expected}")),
            "{header}\n  expected: f: {expected}\n  found:    {message}"
        );
        // What follows the expected text is at most a place in the header.
        let rest = &message[3 + expected.len()..];
        assert!(
            expected.ends_with("found")
                || expected.ends_with(' ')
                || rest.is_empty()
                || rest.contains(" at line "),
            "{message}"
        );
    }
}

#[test]
fn types_of_the_format_that_are_not_read_are_unsupported() {
    let header = r#"{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#;
    let file = MappedFile::from_bytes("f", safetensors(header, &[0; 4]));
    let error = SafeTensors::from_file(file).expect_err("not read");
    assert!(matches!(error, Error::Unsupported { .. }));
    assert_eq!(
        error.to_string(),
        "f: \"w\": type F8_E4M3 is not supported: the types read are F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL"
    );
}

#[test]
fn a_header_length_beyond_the_file_is_refused_at_once() {
    let start = Stopwatch::start();
    for length in [29_u64, 1 << 20, 1 << 31, 1 << 32, 1 << 63, u64::MAX] {
        let mut file = small_safetensors();
        file.truncate(8 + 28);
        file[..8].copy_from_slice(&length.to_le_bytes());
        let expected =
            if length > 100_000_000 { "at most 100000000" } else { "at most the 28 bytes that follow" };
        assert_eq!(safetensors_error(file), format!("f: header length: expected {expected}, found {length}"));
    }
    assert!(start.elapsed().as_millis() < 100);
}

#[test]
fn a_name_of_any_length_is_refused_in_few_words() {
    let header =
        format!(r#"{{"{}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#, "n".repeat(100_000));
    let message = safetensors_error(safetensors(&header, &[0]));
    assert!(
        message.contains("... (100000 bytes): expected a name of at most 512 bytes, found 100000 bytes"),
        "{message}"
    );
    assert!(message.len() < 300);
}

#[test]
fn files_of_other_kinds_are_recognised() {
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    assert_eq!(
        safetensors_error(lfs.to_vec()),
        "f: contents: expected a safetensors file, found a Git LFS pointer of 70 bytes: the real file was never downloaded; run `git lfs pull` in its folder"
    );
    assert_eq!(
        safetensors_error(Vec::new()),
        "f: contents: expected a safetensors file, found an empty file"
    );
    assert_eq!(
        safetensors_error(b"<!DOCTYPE html><title>404".to_vec()),
        "f: contents: expected a safetensors file, found a web page, probably an error saved by a download: \"<!DOCTYPE html><title>404\""
    );
    for pickle in
        [&b"PK\x03\x04archive"[..], b"\x80\x02}q\x00.", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}."]
    {
        let message = safetensors_error(pickle.to_vec());
        assert!(
            message.starts_with("f: a pickle checkpoint is not supported: it could run code"),
            "{message}"
        );
    }
    let named = MappedFile::from_bytes("pytorch_model.BIN", small_safetensors());
    let error = SafeTensors::from_file(named).expect_err("refused by its name");
    assert!(error.to_string().starts_with("pytorch_model.BIN: a pickle checkpoint is not supported"));
}

#[test]
fn only_regular_files_are_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let error = SafeTensors::open(folder.path(), Access::Map).expect_err("a folder").to_string();
    assert!(error.ends_with("kind of file: expected a regular file, found a folder"), "{error}");
    let error = SafeTensors::open("/dev/zero", Access::Read).expect_err("a device").to_string();
    assert!(error.ends_with("expected a regular file, found a pipe, socket or device"), "{error}");
    let missing = folder.path().join("none.safetensors");
    let error = SafeTensors::open(&missing, Access::Map).expect_err("nothing").to_string();
    assert!(error.starts_with(&missing.display().to_string()), "{error}");
}
