//! Hostile sizes cost neither time nor memory. Measured in a process of its own, because the high-water mark of memory
//! belongs to the whole process.

use std::process::Command;
use std::time::Duration;

use crate::badfiles::{ARRAY, GgufFile, Stopwatch, TEXT, gguf_error, safetensors, safetensors_error};

const CHILD: &str = "NYBBLE_TEST_LIMITS";

/// Peak resident memory of this process in bytes.
fn peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

/// What is wrong, the file, and the reader that must refuse it.
type Hostile = (&'static str, Vec<u8>, fn(Vec<u8>) -> String);

/// Large files of tiny claims and small files of large claims; each is refused.
fn hostile() -> Vec<Hostile> {
    const SIZE: usize = 8 << 20;
    let mut files: Vec<Hostile> = Vec::new();
    for count in [1 << 31, 1_u64 << 40, 1 << 63, u64::MAX] {
        let array = |code: u32| [&code.to_le_bytes()[..], &count.to_le_bytes()].concat();
        for (code, value) in [(TEXT, count.to_le_bytes().to_vec()), (ARRAY, array(0)), (ARRAY, array(TEXT))] {
            let file = GgufFile { metadata: vec![("k".into(), code, value)], ..GgufFile::empty() };
            files.push(("a metadata length", file.bytes(), gguf_error));
        }
        let file = GgufFile { tensor_count: Some(count), ..GgufFile::empty() };
        files.push(("a number of tensors", file.bytes(), gguf_error));
        let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{count}],"data_offsets":[0,{count}]}}}}"#);
        files.push(("a shape", safetensors(&header, &[]), safetensors_error));
    }
    // Tensors without bytes are the cheapest to claim in JSON.
    let entries: Vec<_> =
        (0..300_000).map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    files.push(("many tensors", safetensors(&format!("{{{}}}", entries.join(",")), &[]), safetensors_error));
    let zeros = format!(r#"{{"a":{{"dtype":"U8","shape":[{}1]}}}}"#, "0,".repeat(SIZE / 2));
    files.push(("a long shape", safetensors(&zeros, &[]), safetensors_error));
    let texts: Vec<_> = (0..SIZE / 12).map(|i| format!(r#""{i}":"""#)).collect();
    let texts = format!(r#"{{"__metadata__":{{{}}}}}"#, texts.join(","));
    files.push(("many metadata texts", safetensors(&texts, &[]), safetensors_error));
    let mut file = GgufFile::empty().bytes();
    file[8..16].copy_from_slice(&200_000_u64.to_le_bytes());
    file.resize(SIZE, 0);
    files.push(("many nameless tensors", file, gguf_error));
    files
}

#[test]
fn hostile_sizes_are_cheap() {
    if std::env::var_os(CHILD).is_none() {
        let me = std::env::current_exe().expect("the path of this test");
        let output = Command::new(me)
            .args(["--exact", "limits::hostile_sizes_are_cheap", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .expect("a child process");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    for (what, bytes, refuse) in hostile() {
        let size = bytes.len();
        let before = peak();
        let start = Stopwatch::start();
        let message = refuse(bytes);
        let taken = start.elapsed();
        // 100 ms for a length that is beyond the file; text that must be read takes the time of reading it.
        let allowed = if size < 1 << 16 { Duration::from_millis(100) } else { Duration::from_secs(2) };
        assert!(taken < allowed, "{what}: {taken:?}");
        if let (Some(before), Some(after)) = (before, peak()) {
            // The kernel counts in batches, so the mark may even seem to fall a little.
            let more = after.saturating_sub(before);
            assert!(more < size + (64 << 20), "{what}: {} MiB more: {message}", more >> 20);
        }
    }
}
