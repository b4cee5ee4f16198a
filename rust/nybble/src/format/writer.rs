//! Writing safetensors piece by piece.
//!
//! A compressed model is made layer by layer and must never be in memory as a whole. The sizes of all tensors are known
//! before the first of them is computed, so the header is written first and the tensors then go to their places in any
//! order and in any pieces. [`SafeTensorsWriter::finish`] accepts nothing but a complete file.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::dtype::Dtype;
use super::safetensors::{MAX_HEADER, MAX_RANK};
use super::tensor::{MAX_TENSORS, name_fault, quoted};
use crate::error::{Error, Result};

/// A safetensors file being written. Dropped before [`SafeTensorsWriter::finish`], it removes the file.
#[derive(Debug)]
pub struct SafeTensorsWriter {
    path: PathBuf,
    file: File,
    finished: bool,
    tensors: BTreeMap<String, Slot>,
}

/// A tensor's place in the file.
#[derive(Debug)]
struct Slot {
    start: u64,
    len: u64,
    /// What has been written: start and end of disjoint runs, counted from the tensor's start, none touching another.
    written: BTreeMap<u64, u64>,
}

impl SafeTensorsWriter {
    /// Creates the file, which must not exist, and writes the header. Tensors are laid out by size of their elements,
    /// largest first, so that all of them are aligned; otherwise in the order given.
    pub fn create(path: impl AsRef<Path>, entries: Vec<(String, Dtype, Vec<usize>)>) -> Result<Self> {
        let path = path.as_ref();
        let (header, tensors, len) = layout(entries)?;
        let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(Error::io(path))?;
        let started = file.write_all(&header).and_then(|()| file.set_len(len));
        let writer = Self { path: path.to_path_buf(), file, finished: false, tensors };
        started.map_err(Error::io(path))?; // drops the writer, which removes the file
        Ok(writer)
    }

    /// Writes a whole tensor.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        if slot.len != bytes.len() as u64 {
            let expected = format!("the tensor's {} bytes", slot.len);
            return Err(Error::argument(quoted(name), expected, bytes.len()));
        }
        self.write_at(name, 0, bytes)
    }

    /// Writes the part of a tensor that starts `offset` bytes into it. Each byte is written once.
    pub fn write_at(&mut self, name: &str, offset: usize, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        let start = offset as u64;
        let end = start.checked_add(bytes.len() as u64).filter(|&end| end <= slot.len);
        let Some(end) = end else {
            let found = format!("{} bytes at offset {offset}", bytes.len());
            return Err(Error::argument(quoted(name), format!("bytes within its {}", slot.len), found));
        };
        if bytes.is_empty() {
            return Ok(());
        }
        if !slot.is_free(start, end) {
            let found = format!("some of {start} to {end} a second time");
            return Err(Error::argument(quoted(name), "each byte written once", found));
        }
        let place = SeekFrom::Start(slot.start + start);
        let written = self.file.seek(place).and_then(|_| self.file.write_all(bytes));
        written.map_err(Error::io(&self.path))?;
        self.slot(name)?.mark(start, end);
        Ok(())
    }

    /// Checks that all bytes were written and that they have reached the disk.
    pub fn finish(mut self) -> Result<()> {
        for (name, slot) in &self.tensors {
            let written: u64 = slot.written.iter().map(|(start, end)| end - start).sum();
            if written != slot.len {
                let found = format!("{written} when the file was finished");
                return Err(Error::argument(quoted(name), format!("{} bytes written", slot.len), found));
            }
        }
        self.file.sync_all().map_err(Error::io(&self.path))?;
        self.finished = true;
        Ok(())
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn slot(&mut self, name: &str) -> Result<&mut Slot> {
        let absent = || Error::argument("name", "a tensor announced to `create`", quoted(name));
        self.tensors.get_mut(name).ok_or_else(absent)
    }
}

impl Drop for SafeTensorsWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Half a file is worse than none; if it cannot be removed, its reader will refuse it or find zeros.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Slot {
    /// Whether nothing of a run has been written.
    fn is_free(&self, start: u64, end: u64) -> bool {
        // Runs are disjoint, so the last one that starts before `end` reaches furthest.
        self.written.range(..end).next_back().is_none_or(|(_, &before_end)| before_end <= start)
    }

    /// Marks a free run as written. Runs that touch become one, so a tensor written front to back is a single run.
    fn mark(&mut self, mut start: u64, mut end: u64) {
        if let Some((&before_start, &before_end)) = self.written.range(..start).next_back()
            && before_end == start
        {
            start = before_start;
        }
        if let Some(after_end) = self.written.remove(&end) {
            end = after_end;
        }
        self.written.insert(start, end);
    }
}

/// The bytes before the tensors, the tensors' places, and the length of the file.
fn layout(mut entries: Vec<(String, Dtype, Vec<usize>)>) -> Result<(Vec<u8>, BTreeMap<String, Slot>, u64)> {
    if entries.len() > MAX_TENSORS {
        return Err(Error::argument("entries", format!("at most {MAX_TENSORS} tensors"), entries.len()));
    }
    entries.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(dtype.block_bytes()));
    let mut json = Map::new();
    json.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut tensors = BTreeMap::new();
    let mut end = 0_u64;
    for (name, dtype, shape) in entries {
        if let Some((expected, found)) = name_fault(&name) {
            return Err(Error::argument("tensor name", expected, found));
        }
        if name == "__metadata__" {
            return Err(Error::argument("tensor name", "another name", "__metadata__"));
        }
        if dtype.is_quantized() {
            return Err(Error::argument(quoted(&name), "a type of the safetensors format", dtype));
        }
        if shape.len() > MAX_RANK {
            return Err(Error::argument(
                quoted(&name),
                format!("at most {MAX_RANK} dimensions"),
                shape.len(),
            ));
        }
        let size = dtype.tensor_bytes(&shape).map(|bytes| bytes as u64);
        let Some((len, new_end)) = size.and_then(|len| Some((len, end.checked_add(len)?))) else {
            return Err(Error::argument(quoted(&name), "sizes that can be counted", format!("{shape:?}")));
        };
        let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [end, new_end]});
        match tensors.entry(name) {
            Entry::Occupied(slot) => {
                return Err(Error::argument(quoted(slot.key()), "one tensor of this name", "a second one"));
            }
            Entry::Vacant(slot) => {
                json.insert(slot.key().clone(), entry);
                slot.insert(Slot { start: end, len, written: BTreeMap::new() });
            }
        }
        end = new_end;
    }
    let mut text = Value::Object(json).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' '); // the buffer starts aligned
    }
    if text.len() > MAX_HEADER {
        let expected = format!("names and shapes whose header has at most {MAX_HEADER} bytes");
        return Err(Error::argument("entries", expected, text.len()));
    }
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    let start = header.len() as u64;
    let Some(len) = end.checked_add(start).filter(|&len| i64::try_from(len).is_ok()) else {
        return Err(Error::argument("entries", "a file whose size can be counted", format!("{end} bytes")));
    };
    for slot in tensors.values_mut() {
        slot.start += start; // at most `len`
    }
    Ok((header, tensors, len))
}
