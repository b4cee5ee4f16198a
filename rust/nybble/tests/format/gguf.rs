//! GGUF files, good and bad.

use nybble::Error;
use nybble::format::gguf::{Array, Gguf, Value};
use nybble::format::mapped::MappedFile;
use nybble::format::{Access, Dtype};

use crate::badfiles::{ARRAY, BOOL, GgufFile, GgufTensor, Stopwatch, TEXT, U32, gguf_error, text};

fn open(bytes: Vec<u8>) -> Gguf {
    Gguf::from_file(MappedFile::from_bytes("f", bytes)).expect("a good file")
}

#[test]
fn a_good_file_is_read_in_both_versions() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    for (version, access) in [(2, Access::Map), (3, Access::Read)] {
        std::fs::write(&path, GgufFile { version, ..GgufFile::small() }.bytes()).expect("a file");
        let file = Gguf::open(&path, access).expect("a good file");
        assert_eq!(file.version(), version);
        assert_eq!(file.text("general.architecture").expect("a text"), Some("llama"));
        assert_eq!(file.u64("llama.block_count").expect("a number"), Some(2));
        assert_eq!(file.f64("llama.block_count").expect("a number"), Some(2.0));
        assert_eq!(file.bool("flag").expect("a truth value"), Some(true));
        assert_eq!(file.u64("absent").expect("nothing"), None);
        let tokens = file.texts("tokens").expect("texts").expect("there");
        assert_eq!(tokens.iter().collect::<Vec<_>>(), ["<s>", "", "é"]);
        assert_eq!((tokens.len(), tokens.get(2), tokens.get(3)), (3, Some("é"), None));
        assert_eq!(file.metadata()["scores"], Value::Array(Array::F32(vec![0.5])));
        let error = file.u64("flag").expect_err("another type").to_string();
        assert!(error.ends_with("flag: expected a non-negative integer, found a truth value"), "{error}");

        let (a, b) = (&file.tensors()["a"], &file.tensors()["b"]);
        assert_eq!((a.dtype, &a.shape[..]), (Dtype::F32, &[2, 3][..]));
        assert_eq!((b.dtype, &b.shape[..], b.byte_len()), (Dtype::Q8_0, &[32][..], 34));
        assert_eq!(file.bytes("a").expect("there"), (0..24).collect::<Vec<u8>>());
        assert_eq!(file.bytes("b").expect("there"), (32..66).collect::<Vec<u8>>());
        assert!(file.bytes("c").is_err());
    }
}

#[test]
fn the_last_padding_may_be_missing_and_there_may_be_no_tensors() {
    let mut file = GgufFile::small();
    file.data.truncate(66);
    assert_eq!(open(file.bytes()).tensors().len(), 2);
    assert!(open(GgufFile::empty().bytes()).tensors().is_empty());
    // Another alignment.
    let mut file = GgufFile { alignment: 64, data: (0..98).collect(), ..GgufFile::small() };
    file.metadata.push(("general.alignment".into(), U32, 64_u32.to_le_bytes().into()));
    file.tensors[1].offset = 64;
    assert_eq!(open(file.bytes()).bytes("b").expect("there")[0], 64);
}

#[test]
fn magic_and_version_are_checked() {
    let broken = |change: fn(&mut GgufFile)| {
        let mut file = GgufFile::small();
        change(&mut file);
        gguf_error(file.bytes())
    };
    assert_eq!(broken(|file| file.magic = *b"GGML"), "f: magic: expected \"GGUF\", found \"GGML\"");
    assert_eq!(broken(|file| file.version = 0), "f: version: expected 2 or 3, found 0");
    assert_eq!(
        broken(|file| file.version = 1),
        "f: GGUF version 1 is not supported: versions 2 and 3 are; convert the original model again"
    );
    assert_eq!(broken(|file| file.version = 4), "f: GGUF version 4 is not supported: versions 2 and 3 are");
    assert_eq!(
        broken(|file| file.version = 3_u32.swap_bytes()),
        "f: a big-endian GGUF file is not supported: little-endian files are; convert the original model again"
    );
    assert_eq!(gguf_error(Vec::new()), "f: contents: expected a GGUF file, found an empty file");
    assert_eq!(
        gguf_error(b"GG".to_vec()),
        "f: magic: expected 4 bytes at offset 0, found 2 before the end of the file"
    );
    assert!(
        gguf_error(b"version https://git-lfs.github.com/spec/v1\n".to_vec()).contains("a Git LFS pointer")
    );
}

#[test]
fn counts_beyond_the_file_are_refused_at_once() {
    let start = Stopwatch::start();
    for count in [1 << 20, 1_u64 << 31, 1 << 32, 1 << 61, 1 << 63, u64::MAX] {
        let file = GgufFile { tensor_count: Some(count), ..GgufFile::small() };
        let left = file.bytes().len() - 16;
        assert_eq!(
            gguf_error(file.bytes()),
            format!(
                "f: number of tensors: expected at most {}, all that the {left} bytes left can hold, found {count}",
                left / 33
            )
        );
        let file = GgufFile { metadata_count: Some(count), ..GgufFile::small() };
        let left = file.bytes().len() - 24;
        assert_eq!(
            gguf_error(file.bytes()),
            format!(
                "f: number of metadata entries: expected at most {}, all that the {left} bytes left can hold, found {count}",
                left / 14
            )
        );
        // Lengths of a key, of a text and of arrays.
        let long =
            |file: &mut GgufFile, value: Vec<u8>, code| file.metadata = vec![("k".into(), code, value)];
        let cases: [(Vec<u8>, u32, &str, usize, usize); 3] = [
            (count.to_le_bytes().into(), TEXT, "\"k\": length", 8, 1),
            ([&U32.to_le_bytes()[..], &count.to_le_bytes()].concat(), ARRAY, "\"k\": array length", 12, 4),
            ([&TEXT.to_le_bytes()[..], &count.to_le_bytes()].concat(), ARRAY, "\"k\": array length", 12, 8),
        ];
        for (value, code, item, used, width) in cases {
            let mut file = GgufFile::small();
            long(&mut file, value, code);
            let left = file.bytes().len() - (24 + 9 + 4 + used);
            assert_eq!(
                gguf_error(file.bytes()),
                format!(
                    "f: {item}: expected at most {}, all that the {left} bytes left can hold, found {count}",
                    left / width
                )
            );
        }
    }
    assert!(start.elapsed().as_millis() < 100);
}

/// Breaks the small file's metadata; the message after "f: ".
#[test]
fn each_wrong_metadata_is_refused_by_key() {
    let with = |entry: (&[u8], u32, &[u8])| {
        let mut file = GgufFile::small();
        file.metadata.push((entry.0.into(), entry.1, entry.2.into()));
        gguf_error(file.bytes())
    };
    let array =
        |code: u32, count: u64, rest: &[u8]| [&code.to_le_bytes()[..], &count.to_le_bytes(), rest].concat();
    let cases: &[(&[u8], u32, &[u8], &str)] = &[
        (b"flag", BOOL, &[0], r#""flag": expected each metadata key once, found a second one"#),
        (
            b"",
            BOOL,
            &[0],
            r#"metadata key 5: expected 1 to 65535 bytes without control characters, found """#,
        ),
        (
            b"a\0",
            BOOL,
            &[0],
            r#"metadata key 5: expected 1 to 65535 bytes without control characters, found "a\0""#,
        ),
        (
            b"\xff\xfe",
            BOOL,
            &[0],
            "metadata key 5: expected UTF-8 text, found \"\u{fffd}\u{fffd}\", wrong at byte 0",
        ),
        (b"k", BOOL, &[2], r#""k": expected a truth value of 0 or 1, found 2"#),
        (b"k", 13, &[0], r#""k": expected a value type from 0 to 12, found 13"#),
        (b"k", ARRAY, &array(13, 1, &[0]), r#""k": expected a value type from 0 to 12, found 13"#),
        (
            b"k",
            ARRAY,
            &array(ARRAY, 1, &[0]),
            r#""k": expected an array of numbers or texts, found an array of arrays"#,
        ),
        (
            b"k",
            ARRAY,
            &array(TEXT, 1, &text(b"x\xc3")),
            "\"k\"[0]: expected UTF-8 text, found \"x\u{fffd}\", wrong at byte 1",
        ),
        (
            b"general.alignment",
            U32,
            &0_u32.to_le_bytes(),
            r#""general.alignment": expected u32, a power of two, found u32 0"#,
        ),
        (
            b"general.alignment",
            U32,
            &48_u32.to_le_bytes(),
            r#""general.alignment": expected u32, a power of two, found u32 48"#,
        ),
        (
            b"general.alignment",
            10,
            &32_u64.to_le_bytes(),
            r#""general.alignment": expected u32, a power of two, found u64 32"#,
        ),
        (
            b"general.alignment",
            TEXT,
            &text("32"),
            r#""general.alignment": expected u32, a power of two, found a text"#,
        ),
    ];
    for (key, code, value, expected) in cases {
        assert_eq!(with((key, *code, value)), format!("f: {expected}"));
    }
    let message = with((b"split.count", 2, &3_u16.to_le_bytes()));
    assert!(
        message.starts_with("f: one of 3 parts of a split GGUF file is not supported: a whole one is"),
        "{message}"
    );
}

#[test]
fn each_wrong_tensor_is_refused_by_name() {
    let float = |dims: &[u64], offset| GgufTensor::new("b", dims, 0, offset);
    let large = "f: \"b\": dimensions: expected a size that fits into memory, found ";
    let cases: Vec<(GgufTensor, String)> = vec![
        // Class 2.
        (float(&[1 << 31, 1 << 31, 4], 32), format!("{large}[4, 2147483648, 2147483648], more bytes of F32 than can be counted")),
        (float(&[1 << 32, 1 << 32], 32), format!("{large}[4294967296, 4294967296], more bytes of F32 than can be counted")),
        (float(&[1 << 62], 32), format!("{large}[4611686018427387904], more bytes of F32 than can be counted")),
        (float(&[1 << 63], 32), format!("f: \"b\": dimensions: expected sizes from 1 to {}, found {}", isize::MAX, 1_u64 << 63)),
        (float(&[u64::MAX], 32), format!("f: \"b\": dimensions: expected sizes from 1 to {}, found {}", isize::MAX, u64::MAX)),
        // A size that is countable, and padded beyond what is.
        (GgufTensor::new("b", &[i64::MAX as u64], 24, 32), format!("f: \"b\": data: expected {0} bytes for I8 [{0}], found 64 before the end of the file", i64::MAX)),
        // Class 3.
        (float(&[4], 0), "f: \"b\": offset: expected 32, found 0 (an overlap)".into()),
        (float(&[4], 24), "f: \"b\": offset: expected 32, found 24 (an overlap)".into()),
        (float(&[4], 64), "f: \"b\": offset: expected 32, found 64 (a hole)".into()),
        (float(&[4], u64::MAX), format!("f: \"b\": offset: expected 32, found {} (a hole)", u64::MAX)),
        (float(&[17], 32), "f: \"b\": data: expected 68 bytes for F32 [17], found 64 before the end of the file".into()),
        (float(&[8], 32), "f: end of file: expected the end of the last tensor and its padding, found 32 more bytes".into()),
        // Class 5.
        (GgufTensor::new("a", &[4], 0, 32), "f: \"a\": expected one tensor of this name, found a second one".into()),
        (GgufTensor::new("", &[4], 0, 32), "f: name of tensor 1: expected a name, found an empty one".into()),
        (GgufTensor::new("b\n", &[4], 0, 32), "f: name of tensor 1: expected a name without control characters, found '\\n' in it".into()),
        (GgufTensor { name: vec![b'b', 0xff], ..float(&[4], 32) }, "f: name of tensor 1: expected UTF-8 text, found \"b\u{fffd}\", wrong at byte 1".into()),
        (GgufTensor { name: vec![b'n'; 513], ..float(&[4], 32) }, "f: name of tensor 1: expected a name of at most 512 bytes, found 513 bytes".into()),
        // Class 6.
        (float(&[], 32), "f: \"b\": number of dimensions: expected 1 to 4, found 0".into()),
        (float(&[1, 1, 1, 1, 1], 32), "f: \"b\": number of dimensions: expected 1 to 4, found 5".into()),
        (GgufTensor { rank: Some(u32::MAX), ..float(&[4], 32) }, format!("f: \"b\": number of dimensions: expected 1 to 4, found {}", u32::MAX)),
        (float(&[0], 32), format!("f: \"b\": dimensions: expected sizes from 1 to {}, found 0", isize::MAX)),
        (GgufTensor::new("b", &[48], 8, 32), "f: \"b\": dimensions: expected rows of whole blocks of 32 Q8_0 elements, found rows of 48".into()),
        (GgufTensor::new("b", &[16, 2], 8, 32), "f: \"b\": dimensions: expected rows of whole blocks of 32 Q8_0 elements, found rows of 16".into()),
        (GgufTensor::new("b", &[32], 12, 32), "f: \"b\": dimensions: expected rows of whole blocks of 256 Q4_K elements, found rows of 32".into()),
        (GgufTensor::new("b", &[4], 99, 32), "f: \"b\": type: expected the number of one of F32, F16, BF16, F64, I8, I16, I32, I64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, found 99".into()),
        (GgufTensor::new("b", &[4], 4, 32), "f: \"b\": type: expected the number of one of F32, F16, BF16, F64, I8, I16, I32, I64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, found 4".into()),
    ];
    for (tensor, expected) in cases {
        let mut file = GgufFile::small();
        file.tensors[1] = tensor;
        assert_eq!(gguf_error(file.bytes()), expected);
    }
}

#[test]
fn types_that_are_not_read_are_unsupported() {
    let mut file = GgufFile::small();
    file.tensors[1] = GgufTensor::new("b", &[256], 10, 32);
    let error = Gguf::from_file(MappedFile::from_bytes("f", file.bytes())).expect_err("not read");
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(
        error.to_string().starts_with("f: \"b\": type Q2_K is not supported: the types read are F32, "),
        "{error}"
    );
}

#[test]
fn bytes_behind_the_last_padding_are_refused() {
    let mut file = GgufFile::small();
    file.data.push(0);
    assert_eq!(
        gguf_error(file.bytes()),
        "f: end of file: expected the end of the last tensor and its padding, found 31 more bytes"
    );
    let mut bare = GgufFile::empty().bytes();
    bare.resize(33, 0);
    assert!(gguf_error(bare).starts_with("f: end of file: expected the end of the last tensor"));
}
