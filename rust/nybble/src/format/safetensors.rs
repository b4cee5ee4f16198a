//! The safetensors format: a JSON header, then the tensors' bytes.
//!
//! ```text
//! 8 bytes   length n of the header, little-endian
//! n bytes   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}}
//! the rest  the buffer that the offsets point into
//! ```
//!
//! The format is simple enough to be checked completely. The tensors must tile the buffer: sorted by offset, each begins
//! where the one before ended, and the last ends the file. That leaves no room for hidden bytes, for one region named
//! thousands of times, or for a file cut short, and each tensor's size must be what its type and shape say. The header
//! is read straight into its final form; nothing in it can nest or ask for memory beyond its own length and a fixed number of
//! tensors.

use std::collections::BTreeMap;
use std::path::Path;

use super::foreign::refuse_foreign;
use super::header::Header;
use super::mapped::{Access, MappedFile};
use super::tensor::{TensorInfo, quoted};
use crate::error::{Error, Result};

/// Longest header in bytes, the format's own limit.
pub const MAX_HEADER: usize = 100_000_000;

/// Most dimensions a tensor may have.
pub const MAX_RANK: usize = 8;

/// An open safetensors file whose header was checked against its size.
#[derive(Debug)]
pub struct SafeTensors {
    file: MappedFile,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl SafeTensors {
    /// Opens and checks a file.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        Self::from_file(MappedFile::open(path, access)?)
    }

    /// Checks a file that is in memory already.
    pub fn from_file(file: MappedFile) -> Result<Self> {
        let (path, bytes) = (file.path(), file.bytes());
        refuse_foreign(path, bytes, "a safetensors file")?;
        let (header, start) = header(path, bytes)?;
        let Header { mut tensors, metadata } = Header::parse(path, header)?;
        check_tiling(path, &tensors, bytes.len() - start)?;
        for tensor in tensors.values_mut() {
            tensor.range.start += start;
            tensor.range.end += start;
        }
        Ok(Self { file, tensors, metadata })
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The texts of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(&self.file.bytes()[tensor.range.clone()]),
            None => Err(Error::format(self.path(), quoted(name), "a tensor of this name", "none")),
        }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file and its tensors.
    pub(crate) fn into_parts(self) -> (MappedFile, BTreeMap<String, TensorInfo>) {
        (self.file, self.tensors)
    }
}

/// The header's text and the offset of the buffer behind it.
fn header<'a>(path: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], usize)> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let found = format!("{} bytes", bytes.len());
        return Err(Error::format(path, "header length", "8 bytes", found));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER as u64 {
        return Err(Error::format(
            path,
            "header length",
            format!("at most {MAX_HEADER}"),
            length.to_string(),
        ));
    }
    let length = length as usize; // at most MAX_HEADER
    let Some(header) = rest.get(..length) else {
        return Err(Error::format(
            path,
            "header length",
            format!("at most the {} bytes that follow", rest.len()),
            length.to_string(),
        ));
    };
    if header.first() != Some(&b'{') {
        let found = quoted(&String::from_utf8_lossy(&header[..header.len().min(16)]));
        return Err(Error::format(path, "header", "a JSON object that starts with '{'", found));
    }
    Ok((header, 8 + length))
}

/// Checks that the tensors, in the order of their offsets, cover `0..buffer` exactly.
fn check_tiling(path: &Path, tensors: &BTreeMap<String, TensorInfo>, buffer: usize) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    let mut end = 0;
    for (name, tensor) in order {
        let item = || format!("{}: data_offsets", quoted(name));
        if tensor.range.start != end {
            let kind = if tensor.range.start < end { "an overlap" } else { "a hole" };
            let found = format!("{} ({kind})", tensor.range.start);
            return Err(Error::format(path, item(), format!("a start at {end}"), found));
        }
        end = tensor.range.end;
        if end > buffer {
            return Err(Error::format(
                path,
                item(),
                format!("an end within the {buffer} bytes present"),
                end.to_string(),
            ));
        }
    }
    if end < buffer {
        let found = format!("{} more bytes", buffer - end);
        return Err(Error::format(path, "end of file", "the end of the last tensor", found));
    }
    Ok(())
}
