//! Reads little-endian fields one after the other, never past the end.

use std::path::Path;

use crate::error::{Error, Result};
use crate::format::tensor::quoted;

/// A position in a file.
pub(super) struct Cursor<'a> {
    pub(super) path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// An error about `item`.
    pub(super) fn wrong(
        &self,
        item: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::format(self.path, item, expected, found)
    }

    /// The next `n` bytes.
    pub(super) fn take(&mut self, n: usize, item: &dyn Fn() -> String) -> Result<&'a [u8]> {
        let bytes = self.bytes; // outlives the borrow of `self`
        match bytes[self.position..].get(..n) {
            Some(taken) => {
                self.position += n;
                Ok(taken)
            }
            None => Err(self.wrong(
                item(),
                format!("{n} bytes at offset {}", self.position),
                format!("{} before the end of the file", self.left()),
            )),
        }
    }

    fn array<const N: usize>(&mut self, item: &dyn Fn() -> String) -> Result<[u8; N]> {
        Ok(*self.take(N, item)?.first_chunk().expect("exactly N bytes were taken"))
    }

    pub(super) fn u32(&mut self, item: &dyn Fn() -> String) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(item)?))
    }

    pub(super) fn u64(&mut self, item: &dyn Fn() -> String) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(item)?))
    }

    /// A count of things that take at least `least` bytes each: no more than the bytes left can hold.
    pub(super) fn count(&mut self, least: usize, item: &dyn Fn() -> String) -> Result<usize> {
        let count = self.u64(item)?;
        let most = self.left() / least;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(self.wrong(
                item(),
                format!("at most {most}, all that the {} bytes left can hold", self.left()),
                count.to_string(),
            )),
        }
    }

    /// A length and that many bytes of UTF-8.
    pub(super) fn text(&mut self, item: &dyn Fn() -> String) -> Result<&'a str> {
        let length = self.count(1, &|| format!("{}: length", item()))?;
        let bytes = self.take(length, item)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
            let found = format!("{}, wrong at byte {}", quoted(&start), error.valid_up_to());
            self.wrong(item(), "UTF-8 text", found)
        })
    }
}
