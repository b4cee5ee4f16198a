//! The safetensors writer: complete files or none.

use nybble::format::safetensors::SafeTensors;
use nybble::format::writer::SafeTensorsWriter;
use nybble::format::{Access, Dtype};

fn entries() -> Vec<(String, Dtype, Vec<usize>)> {
    vec![
        ("bytes".into(), Dtype::U8, vec![3]),
        ("w".into(), Dtype::F32, vec![2, 2]),
        ("none".into(), Dtype::F16, vec![0]),
        ("scalar".into(), Dtype::I64, vec![]),
    ]
}

#[test]
fn tensors_are_written_in_any_order_and_pieces() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("m.safetensors");
    let mut writer = SafeTensorsWriter::create(&path, entries()).expect("a new file");
    writer.write_at("w", 12, &[12, 13, 14, 15]).expect("inside");
    writer.write("scalar", &7_i64.to_le_bytes()).expect("whole");
    writer.write_at("w", 0, &[0, 1, 2, 3, 4]).expect("inside");
    writer.write("bytes", &[1, 2, 3]).expect("whole");
    writer.write_at("w", 5, &[5, 6, 7, 8, 9, 10, 11]).expect("inside");
    writer.write_at("w", 16, &[]).expect("nothing at the end");
    writer.finish().expect("complete");

    let file = SafeTensors::open(&path, Access::Map).expect("a good file");
    assert_eq!(file.bytes("w").expect("there"), (0..16).collect::<Vec<u8>>());
    assert_eq!(file.bytes("bytes").expect("there"), [1, 2, 3]);
    assert_eq!(file.bytes("scalar").expect("there"), 7_i64.to_le_bytes());
    assert_eq!(file.metadata()["format"], "pt");
    // Larger elements come first behind a header of a multiple of eight bytes, so every tensor is aligned.
    let bytes = std::fs::read(&path).expect("a file");
    assert_eq!(bytes.len() % 8, (16 + 8 + 3) % 8);
    assert_eq!(bytes[bytes.len() - 27..][..8], 7_i64.to_le_bytes());
}

#[test]
fn incomplete_files_are_errors_and_are_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("m.safetensors");
    let mut writer = SafeTensorsWriter::create(&path, entries()).expect("a new file");
    writer.write("bytes", &[1, 2, 3]).expect("whole");
    writer.write("scalar", &[0; 8]).expect("whole");
    writer.write_at("w", 0, &[0; 15]).expect("inside");
    assert!(path.exists());
    assert_eq!(
        writer.finish().expect_err("a byte is missing").to_string(),
        "\"w\": expected 16 bytes written, found 15 when the file was finished"
    );
    assert!(!path.exists());
    drop(SafeTensorsWriter::create(&path, entries()).expect("a new file"));
    assert!(!path.exists());
    SafeTensorsWriter::create(&path, Vec::new()).expect("a new file").finish().expect("complete");
    assert!(SafeTensors::open(&path, Access::Map).expect("a good file").tensors().is_empty());
}

#[test]
fn mistakes_of_the_caller_are_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("m.safetensors");
    let mut writer = SafeTensorsWriter::create(&path, entries()).expect("a new file");
    for (outcome, expected) in [
        (writer.write("x", &[]), "name: expected a tensor announced to `create`, found \"x\""),
        (writer.write("w", &[0; 15]), "\"w\": expected the tensor's 16 bytes, found 15"),
        (
            writer.write_at("w", 13, &[0; 4]),
            "\"w\": expected bytes within its 16, found 4 bytes at offset 13",
        ),
        (
            writer.write_at("w", usize::MAX, &[0; 4]),
            "\"w\": expected bytes within its 16, found 4 bytes at offset 18446744073709551615",
        ),
    ] {
        assert_eq!(outcome.expect_err(expected).to_string(), expected);
    }
    writer.write_at("w", 4, &[0; 4]).expect("inside");
    for (offset, len) in [(4, 4), (0, 5), (7, 2), (5, 1), (0, 16)] {
        let error = writer.write_at("w", offset, &vec![0; len]).expect_err("written twice").to_string();
        let end = offset + len;
        assert_eq!(
            error,
            format!("\"w\": expected each byte written once, found some of {offset} to {end} a second time")
        );
    }
    writer.write_at("w", 0, &[0; 4]).expect("beside it");
    writer.write_at("w", 8, &[0; 8]).expect("beside it");

    let refused = |entries: Vec<(&str, Dtype, Vec<usize>)>| {
        let entries =
            entries.into_iter().map(|(name, dtype, shape)| (name.to_string(), dtype, shape)).collect();
        let other = folder.path().join("other.safetensors");
        let error = SafeTensorsWriter::create(&other, entries).expect_err("refused").to_string();
        assert!(!other.exists());
        error
    };
    let one = |name, dtype, shape| refused(vec![(name, dtype, shape)]);
    assert_eq!(one("", Dtype::U8, vec![1]), "tensor name: expected a name, found an empty one");
    assert!(one("__metadata__", Dtype::U8, vec![1]).contains("expected another name"));
    assert!(
        one("q", Dtype::Q4_0, vec![32]).contains("expected a type of the safetensors format, found Q4_0")
    );
    assert!(one("r", Dtype::U8, vec![1; 9]).contains("expected at most 8 dimensions, found 9"));
    assert!(one("o", Dtype::F32, vec![1 << 31, 1 << 31, 2]).contains("expected sizes that can be counted"));
    let twice = vec![("a", Dtype::U8, vec![1]), ("a", Dtype::I8, vec![1])];
    assert_eq!(refused(twice), "\"a\": expected one tensor of this name, found a second one");
    let half = 1_usize << 62;
    let sum = vec![("a", Dtype::U8, vec![half]), ("b", Dtype::U8, vec![half]), ("c", Dtype::U8, vec![half])];
    assert!(refused(sum).starts_with("entries: expected a file whose size can be counted"));

    // An existing file is never written over: somebody may have it mapped.
    let error = SafeTensorsWriter::create(&path, entries()).expect_err("it exists").to_string();
    assert!(error.starts_with(&path.display().to_string()), "{error}");
    assert!(path.exists());
}
