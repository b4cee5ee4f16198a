//! Small binary files that are there whole or not at all: a header, then words, and a checksum over everything.
//!
//! ```text
//!  8 bytes   what it is
//!  4 bytes   version
//!  4 bytes   numbers in the header, n
//!  8 bytes   checksum of everything behind these 24 bytes and of the first 16
//!  8 n       the header's numbers
//!  the rest  the payload, words of 4 bytes
//! ```
//!
//! All little-endian.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a kind of file is.
pub(super) struct Kind {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    /// For messages: `an adjacency matrix`.
    pub(super) what: &'static str,
}

const FIXED: usize = 24;

/// FNV-1a over words of 8 bytes: a flipped bit always changes it.
fn checksum(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for word in part.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..word.len()].copy_from_slice(word);
            hash = (hash ^ u64::from_le_bytes(bytes)).wrapping_mul(0x0000_0100_0000_01b3);
            hash ^= hash >> 29;
        }
    }
    hash
}

/// Writes a file beside `path`, makes it reach the disk and gives it its name.
pub(super) fn write(path: &Path, kind: &Kind, numbers: &[u64], payload: &[&[u32]]) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(Error::argument("file", "a path that ends with a name", path.display()));
    };
    let mut body = Vec::new();
    for number in numbers {
        body.extend_from_slice(&number.to_le_bytes());
    }
    for word in payload.iter().flat_map(|words| *words) {
        body.extend_from_slice(&word.to_le_bytes());
    }
    let mut head = Vec::with_capacity(FIXED);
    head.extend_from_slice(&kind.magic);
    head.extend_from_slice(&kind.version.to_le_bytes());
    head.extend_from_slice(&(numbers.len() as u32).to_le_bytes());
    let sum = checksum(&[&head, &body]);
    head.extend_from_slice(&sum.to_le_bytes());

    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let staged = folder.join(format!(".{}.tmp-{}", name.to_string_lossy(), std::process::id()));
    let written = File::create(&staged).and_then(|mut file| {
        file.write_all(&head)?;
        file.write_all(&body)?;
        file.sync_all()
    });
    let named = written.and_then(|()| fs::rename(&staged, path));
    if let Err(error) = named {
        let _ = fs::remove_file(&staged); // it may not be there
        return Err(Error::io(path)(error));
    }
    if !cfg!(windows) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}

/// Checks a file's bytes, and returns its `N` numbers and where its payload begins.
pub(super) fn check<const N: usize>(path: &Path, kind: &Kind, bytes: &[u8]) -> Result<([u64; N], usize)> {
    let bad = |item: &str, expected: String, found: String| Err(Error::format(path, item, expected, found));
    if bytes.len() < FIXED || bytes[..8] != kind.magic {
        return bad(
            "beginning",
            format!("that of {}", kind.what),
            format!("another one in {} bytes", bytes.len()),
        );
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if word(8) != kind.version {
        return bad("version", kind.version.to_string(), word(8).to_string());
    }
    let start = FIXED + 8 * N;
    if word(12) as usize != N || bytes.len() < start || !(bytes.len() - start).is_multiple_of(4) {
        let found = format!("{} numbers in {} bytes", word(12), bytes.len());
        return bad("size", format!("{N} numbers and whole words"), found);
    }
    let number = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    // A fuzzer would never get behind it.
    if !cfg!(fuzzing) && checksum(&[&bytes[..16], &bytes[FIXED..]]) != number(16) {
        return bad(
            "checksum",
            "the one of its bytes".into(),
            "another one: the file is damaged or cut short".into(),
        );
    }
    Ok((std::array::from_fn(|i| number(FIXED + 8 * i)), start))
}

/// Reads a whole file of at most `most` bytes.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let path: PathBuf = path.into();
    let size = fs::metadata(&path).map_err(Error::io(&path))?.len();
    if size > most {
        return Err(Error::format(&path, "size", format!("at most {most} bytes"), size.to_string()));
    }
    fs::read(&path).map_err(Error::io(&path))
}
