//! A file's bytes, mapped or read.
//!
//! Mapping makes opening instant, lets several processes share one copy, and lets the system drop pages under pressure.
//! Its price: the bytes stay the file's. If another program **truncates** a mapped file, touching a lost page ends the
//! process with SIGBUS (and so does an I/O error on a network file system); if it **rewrites** the file in place, the
//! values change under the reader. Neither can be caught in portable safe code. Programs that replace files by renaming a
//! finished one over the old (as [`super::publish`] does) never trigger either, because the mapping keeps the old file
//! alive. Where that cannot be relied on, [`Access::Read`] copies the file into memory once and is immune.
//!
//! This is the only module of `format` with `unsafe` code.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// How a file's bytes are brought into memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Access {
    /// Memory mapped: the default. The file must not be truncated while it is open.
    #[default]
    Map,
    /// Read into memory: slower to open and counted as the process's own, but independent of the file afterwards.
    Read,
}

/// A read-only file.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Map(memmap2::Mmap),
    Memory(Vec<u8>),
}

impl MappedFile {
    /// Opens a regular file; anything else (folders, pipes, devices) is refused before it is opened, because opening a
    /// pipe would wait for its writer.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref();
        let file = open_regular(path)?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let data = match access {
            // A mapping of nothing is an error on some systems.
            Access::Map if len == 0 => Data::Memory(Vec::new()),
            Access::Map => {
                // SAFETY: the mapping is read-only and lives as long as `self`. That nobody truncates or rewrites the file
                // meanwhile is the condition the module documentation puts on the user of `Access::Map`.
                Data::Map(unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?)
            }
            Access::Read => Data::Memory(read_all(path, file, len)?),
        };
        Ok(Self { path: path.to_path_buf(), data })
    }

    /// Bytes already in memory; `path` is the name used in messages.
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        Self { path: path.into(), data: Data::Memory(bytes) }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Map(map) => map,
            Data::Memory(bytes) => bytes,
        }
    }

    /// Tells the system that these bytes are not needed soon, so that they stop counting as memory of this process. They
    /// stay readable. Does nothing for a file that was read into memory.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Data::Map(map) = &self.data
            && range.start < range.end
            && range.end <= map.len()
        {
            // SAFETY: "don't need" discards data of anonymous or privately written pages only. This is a read-only shared
            // mapping of a file: the next touch reads the same bytes from the file again. The range is inside the map.
            let advised = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
            drop(advised); // advice: nothing depends on it
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Opens `path` if it is a regular file.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let kind = std::fs::metadata(path).map_err(Error::io(path))?;
    if !kind.is_file() {
        let found = if kind.is_dir() { "a folder" } else { "a pipe, socket or device" };
        return Err(Error::format(path, "kind of file", "a regular file", found));
    }
    File::open(path).map_err(Error::io(path))
}

/// Reads the `len` bytes the system says the file has, and no others.
pub(crate) fn read_all(path: &Path, file: File, len: u64) -> Result<Vec<u8>> {
    let too_large = || Error::format(path, "size", "a file that fits into memory", format!("{len} bytes"));
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(len).map_err(|_| too_large())?).map_err(|_| too_large())?;
    let read = file.take(len).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if read as u64 != len {
        return Err(Error::format(
            path,
            "size",
            format!("{len} bytes"),
            format!("{read} (it shrank while it was read)"),
        ));
    }
    Ok(bytes)
}
