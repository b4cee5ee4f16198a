//! The GGUF format of llama.cpp: one file with typed metadata, tensor descriptions and tensors.
//!
//! ```text
//! "GGUF", version, number of tensors, number of metadata entries
//! metadata   name, type, value                          repeated
//! tensors    name, dimensions, type, offset             repeated
//! padding    up to a multiple of general.alignment (32 unless stated)
//! data       the tensors in the order of their descriptions, each padded to the alignment
//! ```
//!
//! Versions 2 and 3 are read (they differ only in that version 3 allows big-endian files, which are refused). Dimensions
//! stand in the file fastest first; [`TensorInfo::shape`] has them the usual way round, last one contiguous.
//!
//! Every count in the file is compared with what the bytes that are left could hold before anything is reserved for it.
//! The offset of each tensor must be exactly where the one before it ended (padded), as writers make it and llama.cpp
//! demands; the file ends with the last tensor or its padding.

mod cursor;
mod value;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::Path;

pub use value::{Array, Texts, Value};

use self::cursor::Cursor;
use super::dtype::{Dtype, GGUF_NAMES};
use super::foreign::refuse_foreign;
use super::mapped::{Access, MappedFile};
use super::tensor::{MAX_TENSORS, TensorInfo, name_fault, quoted};
use crate::error::{Error, Result};

/// Most dimensions a tensor may have.
pub const MAX_RANK: usize = 4;

/// Most metadata entries.
const MAX_METADATA: usize = 1 << 16;

/// Longest metadata key in bytes, the format's own limit.
const MAX_KEY: usize = 65_535;

/// Alignment where the file states none.
const DEFAULT_ALIGNMENT: u64 = 32;

/// An open GGUF file whose descriptions were checked against its size.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens and checks a file.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        Self::from_file(MappedFile::open(path, access)?)
    }

    /// Checks a file that is in memory already.
    pub fn from_file(file: MappedFile) -> Result<Self> {
        refuse_foreign(file.path(), file.bytes(), "a GGUF file")?;
        let mut cursor = Cursor::new(file.path(), file.bytes());
        let version = read_version(&mut cursor)?;
        // A description takes at least: name length, one letter, number of dimensions, one dimension, type, offset.
        let tensor_count = cursor.count(8 + 1 + 4 + 8 + 4 + 8, &|| "number of tensors".into())?;
        // An entry takes at least: name length, one letter, type, one byte.
        let metadata_count = cursor.count(8 + 1 + 4 + 1, &|| "number of metadata entries".into())?;
        for (item, count, most) in [
            ("number of tensors", tensor_count, MAX_TENSORS),
            ("number of metadata entries", metadata_count, MAX_METADATA),
        ] {
            if count > most {
                return Err(cursor.wrong(item, format!("at most {most}"), count.to_string()));
            }
        }
        let metadata = read_metadata(&mut cursor, metadata_count)?;
        refuse_split(file.path(), &metadata)?;
        let alignment = alignment(&cursor, &metadata)?;
        let described = read_tensors(&mut cursor, tensor_count)?;
        let tensors = place(&cursor, described, alignment)?;
        Ok(Self { file, version, metadata, tensors })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The metadata by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let absent = || Error::format(self.path(), quoted(name), "a tensor of this name", "none");
        self.tensors.get(name).ok_or_else(absent)
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.file.bytes()[self.tensor(name)?.range.clone()])
    }

    /// Tells the system that a tensor's bytes are not needed soon ([`MappedFile::release`]).
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensors.get(name) {
            self.file.release(tensor.range.clone());
        }
    }

    /// A non-negative integer of the metadata, if there; another type is an error.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// A number of the metadata, if there; another type is an error.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A truth value of the metadata, if there; another type is an error.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a truth value", Value::as_bool)
    }

    /// A text of the metadata, if there; another type is an error.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a text", Value::as_str)
    }

    /// An array of texts of the metadata, if there; another type is an error.
    pub fn texts(&self, key: &str) -> Result<Option<&Texts>> {
        self.typed(key, "an array of texts", Value::as_texts)
    }

    /// An array of the metadata, if there; another type is an error.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "an array", Value::as_array)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        cast: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match cast(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::format(self.path(), key, expected, value.kind())),
        }
    }
}

/// Reads the magic and the version.
fn read_version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let magic = cursor.take(4, &|| "magic".into())?;
    if magic != b"GGUF" {
        return Err(cursor.wrong("magic", "\"GGUF\"", quoted(&String::from_utf8_lossy(magic))));
    }
    let version = cursor.u32(&|| "version".into())?;
    let refuse = |what: String, detail: &str| {
        Err(Error::unsupported(format!("{}: {what}", cursor.path.display()), detail))
    };
    match version {
        2 | 3 => Ok(version),
        0 => Err(cursor.wrong("version", "2 or 3", "0")),
        1 => refuse("GGUF version 1".into(), "versions 2 and 3 are; convert the original model again"),
        // A small number with its bytes the other way round.
        _ if version.swap_bytes() <= 0xffff => refuse(
            "a big-endian GGUF file".into(),
            "little-endian files are; convert the original model again",
        ),
        _ => refuse(format!("GGUF version {version}"), "versions 2 and 3 are"),
    }
}

fn read_metadata(cursor: &mut Cursor<'_>, count: usize) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = cursor.text(&|| format!("metadata key {index}"))?;
        if key.is_empty() || key.len() > MAX_KEY || key.chars().any(char::is_control) {
            let expected = format!("1 to {MAX_KEY} bytes without control characters");
            return Err(cursor.wrong(format!("metadata key {index}"), expected, quoted(key)));
        }
        let value = value::read(cursor, &|| quoted(key))?;
        if metadata.insert(key.to_string(), value).is_some() {
            return Err(cursor.wrong(quoted(key), "each metadata key once", "a second one"));
        }
    }
    Ok(metadata)
}

/// One part of a model that was split over several files has some of the tensors only.
fn refuse_split(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<()> {
    match metadata.get("split.count").and_then(Value::as_u64) {
        Some(parts @ 2..) => Err(Error::unsupported(
            format!("{}: one of {parts} parts of a split GGUF file", path.display()),
            "a whole one is; join the parts with `llama-gguf-split --merge`",
        )),
        _ => Ok(()),
    }
}

fn alignment(cursor: &Cursor<'_>, metadata: &BTreeMap<String, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(alignment)) if alignment.is_power_of_two() => Ok(alignment.into()),
        Some(value) => {
            let number = value.as_i64().map_or_else(String::new, |value| format!(" {value}"));
            let found = format!("{}{number}", value.kind());
            Err(cursor.wrong("\"general.alignment\"", "u32, a power of two", found))
        }
    }
}

/// A tensor as described, its offset counted from the start of the data.
struct Described {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
}

fn read_tensors(cursor: &mut Cursor<'_>, count: usize) -> Result<Vec<Described>> {
    let mut described = Vec::with_capacity(count); // at most MAX_TENSORS
    for index in 0..count {
        let name = cursor.text(&|| format!("name of tensor {index}"))?;
        if let Some((expected, found)) = name_fault(name) {
            return Err(cursor.wrong(format!("name of tensor {index}"), expected, found));
        }
        let item = |field: &str| format!("{}: {field}", quoted(name));
        let rank = cursor.u32(&|| item("number of dimensions"))?;
        if rank == 0 || rank as usize > MAX_RANK {
            let expected = format!("1 to {MAX_RANK}");
            return Err(cursor.wrong(item("number of dimensions"), expected, rank.to_string()));
        }
        let mut shape = Vec::with_capacity(MAX_RANK);
        for _ in 0..rank {
            let dim = cursor.u64(&|| item("dimensions"))?;
            match usize::try_from(dim) {
                Ok(dim) if (1..=isize::MAX as usize).contains(&dim) => shape.push(dim),
                _ => {
                    let expected = format!("sizes from 1 to {}", isize::MAX);
                    return Err(cursor.wrong(item("dimensions"), expected, dim.to_string()));
                }
            }
        }
        shape.reverse();
        let dtype = dtype(cursor, name)?;
        let offset = cursor.u64(&|| item("offset"))?;
        let cols = shape[shape.len() - 1];
        if !cols.is_multiple_of(dtype.block()) {
            let expected = format!("rows of whole blocks of {} {dtype} elements", dtype.block());
            return Err(cursor.wrong(item("dimensions"), expected, format!("rows of {cols}")));
        }
        let Some(bytes) = dtype.tensor_bytes(&shape) else {
            let found = format!("{shape:?}, more bytes of {dtype} than can be counted");
            return Err(cursor.wrong(item("dimensions"), "a size that fits into memory", found));
        };
        described.push(Described { name: name.into(), dtype, shape, offset, bytes: bytes as u64 });
    }
    Ok(described)
}

fn dtype(cursor: &mut Cursor<'_>, name: &str) -> Result<Dtype> {
    let code = cursor.u32(&|| format!("{}: type", quoted(name)))?;
    if let Some(dtype) = Dtype::from_ggml(code) {
        return Ok(dtype);
    }
    if let Some(other) = Dtype::other_ggml_name(code) {
        return Err(Error::unsupported(
            format!("{}: {}: type {other}", cursor.path.display(), quoted(name)),
            format!("the types read are {GGUF_NAMES}"),
        ));
    }
    let expected = format!("the number of one of {GGUF_NAMES}");
    Err(cursor.wrong(format!("{}: type", quoted(name)), expected, code.to_string()))
}

/// Gives the tensors their places in the file, where each must follow the one before.
fn place(
    cursor: &Cursor<'_>,
    described: Vec<Described>,
    alignment: u64,
) -> Result<BTreeMap<String, TensorInfo>> {
    let file_len = (cursor.position() + cursor.left()) as u64;
    // No overflow: a position in a file, and an alignment below 2^32.
    let start = (cursor.position() as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    // End of the last tensor, counted from the start of the data, without and with its padding.
    let (mut end, mut padded) = (0, 0);
    for Described { name, dtype, shape, offset, bytes } in described {
        if offset != padded {
            let kind = if offset < padded { "an overlap" } else { "a hole" };
            let item = format!("{}: offset", quoted(&name));
            return Err(cursor.wrong(item, padded.to_string(), format!("{offset} ({kind})")));
        }
        let present = file_len.saturating_sub(start);
        let past = || {
            let left = present.saturating_sub(offset);
            let expected = format!("{bytes} bytes for {dtype} {shape:?}");
            cursor.wrong(
                format!("{}: data", quoted(&name)),
                expected,
                format!("{left} before the end of the file"),
            )
        };
        end = offset.checked_add(bytes).filter(|&end| end <= present).ok_or_else(past)?;
        padded = end.checked_next_multiple_of(alignment).ok_or_else(past)?;
        let range = Range { start: (start + offset) as usize, end: (start + end) as usize };
        match tensors.entry(name) {
            Entry::Vacant(slot) => slot.insert(TensorInfo { dtype, shape, shard: 0, range }),
            Entry::Occupied(slot) => {
                return Err(cursor.wrong(quoted(slot.key()), "one tensor of this name", "a second one"));
            }
        };
    }
    let last = if tensors.is_empty() { cursor.position() as u64 } else { start + end };
    let limit = start.saturating_add(padded);
    if file_len > limit {
        let found = format!("{} more bytes", file_len - last);
        return Err(cursor.wrong("end of file", "the end of the last tensor and its padding", found));
    }
    Ok(tensors)
}
